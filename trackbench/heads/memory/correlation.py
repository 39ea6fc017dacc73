"""Correlation of queries with a frame at several scales."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from trackbench.heads.memory.pyramid import Pyramid
from trackbench.layers.precision import at_least_float32


def normalise(pyramid: Pyramid) -> Pyramid:
    """Every token of every level divided by its length, in float32: once per frame, for all correlations."""
    return Pyramid(F.normalize(at_least_float32(pyramid.tokens), dim=-1), pyramid.shapes)


def correlate(query: Tensor, normalised: Pyramid, weight: Tensor) -> Tensor:
    """Cosine similarity of queries with all cells, summed over levels at the resolution of the finest.

    The products are formed at each level's own resolution and then enlarged bilinearly. Everything is in
    float32 also under autocast: maxima and top-k need more than the bits of a half.

    Args:
        query: (B, N, D).
        normalised: of the frame, from :func:`normalise`.
        weight: one weight per level, of any shape.

    Returns:
        (B, N, h * w).
    """
    size = normalised.shapes[0]
    with torch.autocast(query.device.type, enabled=False):
        unit = F.normalize(at_least_float32(query), dim=-1)
        products = unit @ normalised.tokens.transpose(1, 2)
        levels = products.split([h * w for h, w in normalised.shapes], dim=-1)
        finest, *coarser = (level * factor for level, factor in zip(levels, weight.flatten(), strict=True))
        total = finest
        for level, shape in zip(coarser, normalised.shapes[1:], strict=True):
            # queries on the batch axis, which may be empty
            maps = level.unflatten(-1, shape).flatten(0, 1)[:, None]
            enlarged = F.interpolate(maps, size=size, mode="bilinear", align_corners=False)
            total = total + enlarged.view_as(finest)
    return total
