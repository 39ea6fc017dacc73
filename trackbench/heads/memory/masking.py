"""Random masking while training, so that no query relies on one slot or one neighbour."""

from __future__ import annotations

import torch
from torch import Tensor


def randomly_masked(mask: Tensor, ratio: float) -> Tensor:
    """``mask`` (bool, any shape) with further entries set, each with probability ``ratio``."""
    if ratio == 0.0:
        return mask
    return mask | (torch.rand(mask.shape, device=mask.device) < ratio)
