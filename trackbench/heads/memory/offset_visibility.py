"""The last step of a frame: from a cell to a point, and whether that point is visible.

Track-On, https://arxiv.org/abs/2501.18487, section 3.2.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from trackbench.heads.memory.pyramid import Pyramid
from trackbench.layers.attention import DeformableBlock
from trackbench.layers.precision import at_least_float32


class OffsetHead(nn.Module):
    """Offset of the point from the centre of its cell, at most one cell per axis, after each of its layers.

    Args:
        dim: channels.
        num_heads: attention heads.
        num_layers: deformable layers.
        num_levels: levels of the pyramid.
        dropout: of the blocks.
    """

    def __init__(self, dim: int, num_heads: int, num_layers: int, num_levels: int, dropout: float) -> None:
        super().__init__()
        self.local_transformer = nn.ModuleList(
            DeformableBlock(dim, num_heads, num_levels, dropout=dropout) for _ in range(num_layers)
        )
        self.offset_layer = nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, 2))

    def forward(self, query: Tensor, pyramid: Pyramid, reference: Tensor) -> Tensor:
        """Offsets (B, N, layers, 2) in cells, last layer last; ``reference`` (B, N, 1, 2) is normalised."""
        offsets = []
        for block in self.local_transformer:
            query = block(query, pyramid.tokens, reference, pyramid.shapes)
            offsets.append(at_least_float32(self.offset_layer(query)).tanh())
        return torch.stack(offsets, dim=2)


class VisibilityHead(nn.Module):
    """Visibility and uncertainty of a point, from its query and the features around it.

    Args:
        dim: channels.
        num_heads: attention heads.
        num_levels: levels of the pyramid.
        dropout: of the block.
    """

    def __init__(self, dim: int, num_heads: int, num_levels: int, dropout: float) -> None:
        super().__init__()
        self.decoder_layer = DeformableBlock(dim, num_heads, num_levels, dropout=dropout)
        self.vis_layer = nn.Linear(2 * dim, 1)
        self.unc_layer = nn.Linear(2 * dim, 1)

    def forward(self, query: Tensor, pyramid: Pyramid, reference: Tensor) -> tuple[Tensor, Tensor]:
        """Logits (B, N) of being visible and of being wrong; ``reference`` (B, N, 1, 2) is normalised."""
        local = self.decoder_layer(query, pyramid.tokens, reference, pyramid.shapes)
        both = torch.cat([query, local.to(query.dtype)], dim=-1)
        return at_least_float32(self.vis_layer(both)[..., 0]), at_least_float32(self.unc_layer(both)[..., 0])
