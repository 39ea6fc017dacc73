"""Learning-rate schedules as functions of the optimiser step."""

from __future__ import annotations

import math

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR


def warmup_cosine(
    optimizer: Optimizer, total_steps: int, warmup_fraction: float = 0.01, start_factor: float = 1e-5
) -> LambdaLR:
    """Linear warm-up from ``start_factor`` x lr, then cosine to zero (Track-On's recipe).

    Args:
        optimizer: its learning rate is the peak.
        total_steps: optimiser steps in all.
        warmup_fraction: share of ``total_steps`` spent warming up.
        start_factor: factor at step 0.
    """
    warmup = max(1, round(warmup_fraction * total_steps))

    def factor(step: int) -> float:
        if step < warmup:
            return start_factor + (1 - start_factor) * step / warmup
        progress = min(1.0, (step - warmup) / max(1, total_steps - warmup))
        return 0.5 * (1 + math.cos(math.pi * progress))

    return LambdaLR(optimizer, factor)
