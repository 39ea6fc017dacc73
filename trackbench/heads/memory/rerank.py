"""Re-ranking: look closely at the best candidates of the first correlation before deciding.

Track-On, https://arxiv.org/abs/2501.18487, section 3.2.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trackbench.heads.memory.pyramid import Pyramid
from trackbench.layers.attention import AttentionBlock, DeformableBlock


class Reranking(nn.Module):
    """Samples features around each candidate, rates them, and lets the query attend to them.

    Args:
        dim: channels.
        num_heads: attention heads.
        num_layers: deformable layers at each candidate.
        num_levels: levels of the pyramid.
        dropout: of the blocks.
    """

    def __init__(self, dim: int, num_heads: int, num_layers: int, num_levels: int, dropout: float) -> None:
        super().__init__()
        self.local_patch_encoder = nn.ModuleList(
            DeformableBlock(dim, num_heads, num_levels, dropout=dropout) for _ in range(num_layers)
        )
        self.local_decoder = nn.ModuleList([AttentionBlock(dim, num_heads, dropout)])
        self.sample_projection = nn.Linear(2 * dim, dim)
        self.sample_query_fusion = nn.Linear(2 * dim, dim)
        self.sample_uncertainty = nn.Linear(dim, 1)

    def forward(self, query: Tensor, pyramid: Pyramid, reference: Tensor) -> tuple[Tensor, Tensor]:
        """Refine queries by their candidates.

        Args:
            query: (B, N, D).
            pyramid: of the frame.
            reference: (B, N, K, 2), normalised centres of the K candidates.

        Returns:
            Refined queries (B, N, D), and the logit (B, N, K) that a candidate is wrong.
        """
        N, K = reference.shape[1:3]
        sample = query[:, :, None].expand(-1, -1, K, -1).flatten(1, 2)
        where = reference.flatten(1, 2)[:, :, None]
        for block in self.local_patch_encoder:
            sample = block(sample, pyramid.tokens, where, pyramid.shapes)
        # a linear layer on (query, sample); the query's half is the same for all its candidates
        of_query, of_sample = self.sample_projection.weight.chunk(2, dim=1)
        shared = F.linear(query, of_query, self.sample_projection.bias)[:, :, None]
        sample = F.linear(sample, of_sample).unflatten(1, (N, K)) + shared
        uncertainty = self.sample_uncertainty(sample)[..., 0]
        candidates = sample.flatten(0, 1)
        chosen = self.local_decoder[0](query.flatten(0, 1)[:, None], candidates, candidates)
        refined = self.sample_query_fusion(torch.cat([query, chosen.view_as(query)], dim=-1))
        return refined, uncertainty
