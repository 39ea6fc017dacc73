"""Where numbers need float32, also under autocast."""

from __future__ import annotations

import torch
from torch import Tensor


def at_least_float32(x: Tensor) -> Tensor:
    """``x`` in float32, or as it is where it is more precise."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def normalize_length(features: Tensor) -> Tensor:
    """Divide features (n, C, h, w) by sqrt(max(sum of squares over C, 1e-6)), in float32."""
    features = at_least_float32(features)
    return features * features.square().sum(dim=1, keepdim=True).clamp(min=1e-6).rsqrt()
