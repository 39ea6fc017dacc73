"""Post-norm transformer blocks: multi-head or deformable attention, then a feed-forward layer.

Attention Is All You Need, https://arxiv.org/abs/1706.03762, section 3; the arrangement is Track-On's
(https://arxiv.org/abs/2501.18487, appendix): no position terms inside the blocks.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trackbench.layers.chunking import by_chunks
from trackbench.layers.deformable import QUERIES_PER_CHUNK, DeformableAttention, Shapes


class MultiheadAttention(nn.Module):
    """Multi-head attention with the parameters of ``torch.nn.MultiheadAttention``, and never NaN.

    Where every key of a batch element is ignored, its queries attend to nothing: the attended value is zero
    and the result is the bias of the output projection (PyTorch's own module gives NaN on some code paths).

    Args:
        dim: channels.
        num_heads: attention heads; divides ``dim``.
        dropout: on the attention weights.
    """

    def __init__(self, dim: int, num_heads: int, dropout: float = 0.0) -> None:
        super().__init__()
        if dim % num_heads:
            raise ValueError(f"num_heads={num_heads} must divide dim={dim}")
        self.num_heads, self.dropout = num_heads, dropout
        self.in_proj_weight = nn.Parameter(torch.empty(3 * dim, dim))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * dim))
        self.out_proj = nn.Linear(dim, dim)
        nn.init.xavier_uniform_(self.in_proj_weight)
        nn.init.zeros_(self.out_proj.bias)

    def forward(self, query: Tensor, key: Tensor, value: Tensor, ignored: Tensor | None = None) -> Tensor:
        """Attend from queries to keys.

        Args:
            query: (B, Q, C).
            key: (B, K, C).
            value: (B, K, C).
            ignored: (B, K) bool, True for keys that nobody may attend to.

        Returns:
            (B, Q, C).
        """
        dropout = self.dropout if self.training else 0.0
        if 2 * query.shape[1] * self.num_heads <= query.shape[2] and not dropout:
            return self._attend_unprojected(query, key, value, ignored)
        weights = self.in_proj_weight.chunk(3)
        biases = self.in_proj_bias.chunk(3)
        q, k, v = (
            F.linear(x, weight, bias).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for x, weight, bias in zip((query, key, value), weights, biases, strict=True)
        )
        mask, alone = _attention_mask(ignored)
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout)
        return self._finish(attended.transpose(1, 2).flatten(2), alone)

    def _attend_unprojected(self, query: Tensor, key: Tensor, value: Tensor, ignored: Tensor | None) -> Tensor:
        """The same for few queries, which take on the projections of the many keys and values.

        Each head's query is carried over into the space of the keys, and what it gathers there into that of its
        values; the keys' bias shifts all scores of a query alike, which the softmax does not see.
        """
        H = self.num_heads
        to_query, to_key, to_value = (weight.unflatten(0, (H, -1)) for weight in self.in_proj_weight.chunk(3))
        query_bias, _, value_bias = (bias.unflatten(0, (H, -1)) for bias in self.in_proj_bias.chunk(3))
        B, Q, C = query.shape
        projected = F.linear(query, to_query.flatten(0, 1), query_bias.flatten()).unflatten(-1, (H, -1))
        carried = torch.einsum("bqhd,hdc->bqhc", projected, to_key).flatten(1, 2)
        mask, alone = _attention_mask(ignored)
        gathered = F.scaled_dot_product_attention(
            carried[:, None], key[:, None], value[:, None], attn_mask=mask, scale=(C // H) ** -0.5
        )
        gathered = gathered.view(B, Q, H, C)
        attended = torch.einsum("bqhc,hdc->bqhd", gathered, to_value) + value_bias
        return self._finish(attended.flatten(2), alone)

    def _finish(self, attended: Tensor, alone: Tensor | None) -> Tensor:
        if alone is not None:
            attended = attended.masked_fill(alone[:, None, None], 0.0)
        return self.out_proj(attended)


def _attention_mask(ignored: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """Keys to attend to (B, 1, 1, K), and batch elements (B,) whose keys are all ignored: they attend to all."""
    if ignored is None:
        return None, None
    alone = ignored.all(dim=-1)
    return (~ignored | alone[:, None])[:, None, None, :], alone


class _PostNormBlock(nn.Module):
    """What both blocks share: the two norms and the feed-forward layer."""

    def __init__(self, dim: int, dropout: float, ffn_ratio: int) -> None:
        super().__init__()
        self.linear1 = nn.Linear(dim, ffn_ratio * dim)
        self.linear2 = nn.Linear(ffn_ratio * dim, dim)
        self.norm1 = nn.LayerNorm(dim)
        self.norm2 = nn.LayerNorm(dim)
        self.dropout = nn.Dropout(dropout)

    def _add(self, query: Tensor, update: Tensor) -> Tensor:
        x = self.norm1(query + self.dropout(update))
        hidden = self.dropout(F.relu(self.linear1(x), inplace=True))
        return self.norm2(x + self.dropout(self.linear2(hidden)))


class AttentionBlock(_PostNormBlock):
    """Multi-head attention, then a feed-forward layer, each with residual and LayerNorm after it.

    Args:
        dim: channels.
        num_heads: attention heads.
        dropout: on attention weights, updates and hidden units.
        ffn_ratio: hidden width of the feed-forward layer relative to ``dim``.
    """

    def __init__(self, dim: int, num_heads: int, dropout: float = 0.1, ffn_ratio: int = 4) -> None:
        super().__init__(dim, dropout, ffn_ratio)
        self.mha = MultiheadAttention(dim, num_heads, dropout)

    def forward(self, query: Tensor, key: Tensor, value: Tensor, ignored: Tensor | None = None) -> Tensor:
        """(B, Q, C) from queries (B, Q, C), keys and values (B, K, C); ``ignored`` (B, K): masked keys."""
        size = max(1, QUERIES_PER_CHUNK // max(1, key.shape[1]))
        return by_chunks(self._attend, query, key, value, ignored, dim=0, size=size)

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, ignored: Tensor | None) -> Tensor:
        return self._add(query, self.mha(query, key, value, ignored))


class DeformableBlock(_PostNormBlock):
    """Multi-scale deformable attention, then a feed-forward layer, each with residual and LayerNorm after it.

    The attention brings its own residual, so the query counts twice in the first sum; published weights
    expect that.

    Args:
        dim: channels.
        num_heads: attention heads.
        num_levels: levels of the value pyramid.
        num_points: samples per head and level.
        dropout: on updates and hidden units.
        ffn_ratio: hidden width of the feed-forward layer relative to ``dim``.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        num_levels: int,
        num_points: int = 4,
        dropout: float = 0.1,
        ffn_ratio: int = 4,
    ) -> None:
        super().__init__(dim, dropout, ffn_ratio)
        self.mha = DeformableAttention(dim, num_heads, num_levels, num_points, dropout)

    def forward(self, query: Tensor, value: Tensor, reference: Tensor, shapes: Shapes) -> Tensor:
        """See :meth:`DeformableAttention.forward`: query (B, Q, C), value (B, S, C) -> (B, Q, C)."""
        attend = self.mha.attention(query.shape[1], value, shapes)

        def block(query: Tensor, reference: Tensor) -> Tensor:
            return self._add(query, attend(query, reference))

        return by_chunks(block, query, reference, dim=1, size=QUERIES_PER_CHUNK)
