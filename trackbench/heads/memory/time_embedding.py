"""Time embeddings of memory slots, stretched from the trained number of slots to any other."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def new_time_embedding(slots: int, dim: int) -> nn.Parameter:
    """Freshly initialised rows (1, slots + 1, dim): the slots, oldest first, then the current frame."""
    return nn.Parameter(nn.init.trunc_normal_(torch.empty(1, slots + 1, dim), std=0.02))


def resize_time_embedding(embedding: Tensor, slots: int) -> Tensor:
    """Rows for another number of slots: Track-On's inference-time memory extension (arXiv 2501.18487).

    The rows of the slots, oldest first, are interpolated linearly, end to end; the last row, the current
    frame's, stays. Always start from the trained rows: repeated resizing loses them.

    Args:
        embedding: (1, trained slots + 1, D).
        slots: wanted number of slots.

    Returns:
        (1, slots + 1, D).
    """
    if embedding.shape[1] == slots + 1:
        return embedding
    past, current = embedding[:, :-1], embedding[:, -1:]
    past = F.interpolate(past.transpose(1, 2), size=slots, mode="linear", align_corners=True)
    return torch.cat([past.transpose(1, 2), current], dim=1)
