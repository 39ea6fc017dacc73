"""Features at points of a clip, without copying a map per point."""

from __future__ import annotations

import torch
from torch import Tensor


def sample_clip(maps: Tensor, time: Tensor, xy: Tensor) -> Tensor:
    """Bilinear samples in the frames of a clip; beyond the outermost cell centres the border continues.

    Args:
        maps: (B, T, C, h, w).
        time: (B, N) int64, frame of each point, within [0, T).
        xy: (B, N, 2), cells.

    Returns:
        (B, N, C) in the wider dtype of ``maps`` and ``xy``.
    """
    B, _, _, h, w = maps.shape
    x = (xy[..., 0] - 0.5).clamp(0, w - 1)
    y = (xy[..., 1] - 0.5).clamp(0, h - 1)
    left, top = x.floor(), y.floor()
    right, bottom = (left + 1).clamp(max=w - 1), (top + 1).clamp(max=h - 1)
    columns = torch.stack([left, right, left, right])
    lines = torch.stack([top, top, bottom, bottom])
    along, down = x - left, y - top
    weights = torch.stack([(1 - along) * (1 - down), along * (1 - down), (1 - along) * down, along * down])
    batch = torch.arange(B, device=maps.device)[:, None]
    corners = maps.permute(0, 1, 3, 4, 2)[batch, time, lines.long(), columns.long()]
    return (corners * weights[..., None]).sum(dim=0)
