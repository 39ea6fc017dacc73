"""Spatial memory: writes what a point looks like where it was found, and updates queries from it.

Track-On, https://arxiv.org/abs/2501.18487, section 3.3.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from trackbench.heads.memory.masking import randomly_masked
from trackbench.heads.memory.pyramid import Pyramid
from trackbench.heads.memory.time_embedding import new_time_embedding, resize_time_embedding
from trackbench.layers.attention import AttentionBlock, DeformableBlock


class SpatialMemory(nn.Module):
    """Reader (:meth:`update`) and writer (:meth:`write`) of the spatial memory.

    Args:
        dim: channels.
        num_heads: attention heads.
        num_layers: deformable layers of the writer.
        num_levels: levels of the pyramid that the writer reads.
        memory_size: slots that the time embedding is trained for.
        dropout: of the blocks.
        mask_ratio: share of memory slots that training hides at random.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        num_layers: int,
        num_levels: int,
        memory_size: int,
        dropout: float,
        mask_ratio: float,
    ) -> None:
        super().__init__()
        self.mask_ratio = mask_ratio
        self.time_embedding = new_time_embedding(memory_size, dim)
        self.query_to_feature = nn.ModuleList(
            DeformableBlock(dim, num_heads, num_levels, dropout=dropout) for _ in range(num_layers)
        )
        self.memory_to_memory = nn.ModuleList([AttentionBlock(dim, num_heads, dropout)])
        self.query_to_memory = nn.ModuleList([AttentionBlock(dim, num_heads, dropout)])
        self.augment_layer = nn.Linear(2 * dim, dim)
        self.query_residual = nn.Linear(dim, dim)

    def update(self, query: Tensor, memory: Tensor, ignored: Tensor, slots: int) -> Tensor:
        """Bring the initial queries up to date.

        Args:
            query: (B, N, D), as sampled in the query frames.
            memory: (B, N, n, D), the newest slots, newest last.
            ignored: (B, N, n) bool: from before the query frame, or occluded.
            slots: size of the whole memory, of which n slots may count.

        Returns:
            (B, N, D); queries whose slots are all ignored come back as they were.
        """
        used = memory.shape[2]
        if used == 0:
            return query
        ignored = randomly_masked(ignored, self.mask_ratio if self.training else 0.0).flatten(0, 1)
        memory = memory.flatten(0, 1)
        time = resize_time_embedding(self.time_embedding, slots)
        past, now = time[:, slots - used : slots], time[:, slots:]
        timed = memory + past
        memory = self.memory_to_memory[0](timed, timed, memory, ignored)
        asking = query.flatten(0, 1)[:, None] + now
        answer = self.query_to_memory[0](asking, memory + past, memory, ignored)
        updated = query + self.query_residual(answer).view_as(query)
        empty = ignored.all(dim=1).view(*query.shape[:2], 1)
        return torch.where(empty, query.to(updated.dtype), updated)

    def write(self, query: Tensor, initial: Tensor, pyramid: Pyramid, reference: Tensor) -> Tensor:
        """The new slot (B, N, D) of queries (B, N, D) found at ``reference`` (B, N, 1, 2), normalised."""
        slot = self.augment_layer(torch.cat([query, initial.to(query.dtype)], dim=-1))
        for block in self.query_to_feature:
            slot = block(slot, pyramid.tokens, reference, pyramid.shapes)
        return slot
