"""Query decoder: queries gather information from the frame, from each other and from their own past.

Track-On, https://arxiv.org/abs/2501.18487, section 3.2.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trackbench.heads.memory.masking import randomly_masked
from trackbench.heads.memory.time_embedding import new_time_embedding, resize_time_embedding
from trackbench.layers.attention import AttentionBlock
from trackbench.layers.chunking import by_chunks
from trackbench.layers.deformable import QUERIES_PER_CHUNK


class FeatureDecoder(nn.Module):
    """Turns tokens into those that queries are compared with: three residual layers and a linear one."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.linear1 = nn.Linear(dim, dim)
        self.linear2 = nn.Linear(dim, dim)
        self.linear3 = nn.Linear(dim, dim)
        self.linear4 = nn.Linear(dim, dim)

    def forward(self, tokens: Tensor) -> Tensor:
        """(B, S, D) -> (B, S, D)."""
        return by_chunks(self._decode, tokens, dim=1, size=QUERIES_PER_CHUNK)

    def _decode(self, tokens: Tensor) -> Tensor:
        for layer in (self.linear1, self.linear2, self.linear3):
            tokens = F.relu(layer(tokens) + tokens, inplace=True)
        return self.linear4(tokens)


class QueryDecoder(nn.Module):
    """Layers of attention to the frame, to the other queries and to the query's context memory.

    Args:
        dim: channels.
        num_heads: attention heads.
        num_layers: layers, each with the three attentions.
        memory_size: slots that the time embedding is trained for.
        dropout: of the blocks.
        mask_ratio: share of memory slots and of queries that training hides at random.
    """

    def __init__(
        self, dim: int, num_heads: int, num_layers: int, memory_size: int, dropout: float, mask_ratio: float
    ) -> None:
        super().__init__()
        self.mask_ratio = mask_ratio
        self.time_embedding = new_time_embedding(memory_size, dim)
        self.token_to_query, self.query_to_query, self.memory_to_query = (
            nn.ModuleList(AttentionBlock(dim, num_heads, dropout) for _ in range(num_layers)) for _ in range(3)
        )

    def forward(
        self, query: Tensor, tokens: Tensor, waiting: Tensor, memory: Tensor, hidden: Tensor, slots: int
    ) -> Tensor:
        """Decode the queries of one frame.

        Args:
            query: (B, N, D).
            tokens: (B, h * w, D), the frame.
            waiting: (B, N) bool, queries that have not started: the others do not see them.
            memory: (B, N, n, D), the newest slots of the context memory, newest last.
            hidden: (B, N, n) bool, slots that do not count.
            slots: size of the whole memory, of which n slots may count.

        Returns:
            (B, N, D).
        """
        waiting = randomly_masked(waiting, self.mask_ratio if self.training else 0.0)
        hidden = randomly_masked(hidden, self.mask_ratio if self.training else 0.0)
        used = memory.shape[2]
        time = resize_time_embedding(self.time_embedding, slots)[:, slots - used :]
        memory, hidden = memory.flatten(0, 1), hidden.flatten(0, 1)
        last = len(self.memory_to_query) - 1
        for i in range(last + 1):
            query = self.token_to_query[i](query, tokens, tokens)
            query = self.query_to_query[i](query, query, query, waiting)
            if used:
                query, memory = self._remember(i, query, memory, hidden, time, with_memory=i < last)
        return query

    def _remember(
        self, i: int, query: Tensor, memory: Tensor, hidden: Tensor, time: Tensor, with_memory: bool
    ) -> tuple[Tensor, Tensor]:
        """Attention within (slots, current query); queries without a slot that counts stay as they are."""
        current = query.flatten(0, 1)[:, None]
        tokens = torch.cat([memory.to(current.dtype), current], dim=1)
        ignored = F.pad(hidden, (0, 1), value=False)
        timed = tokens + time
        # the last layer's slots are read by nobody
        asking = timed if with_memory else timed[:, -1:]
        updated = self.memory_to_query[i](asking, timed, tokens, ignored)
        empty = hidden.all(dim=1)[:, None]
        return torch.where(empty, current[:, 0], updated[:, -1]).view_as(query), updated[:, :-1]
