"""A frame's features at several scales, as the tokens that deformable attention and correlation read."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Pyramid(NamedTuple):
    """Tokens (B, S, D) of all levels one after the other, each row by row, and the (h, w) of the levels."""

    tokens: Tensor
    shapes: list[tuple[int, int]]


def build_pyramid(tokens: Tensor, size: tuple[int, int], levels: int) -> Pyramid:
    """Average-pool a map by 1, 2, 4, ...

    Where a factor does not divide the size, a level has ``ceil(size / factor)`` cells, whose windows spread
    evenly over the map (neighbours may share cells), so that equal normalised coordinates mean the same place
    on every level.

    Args:
        tokens: (B, h * w, D), row by row.
        size: (h, w).
        levels: number of levels; the last one is pooled by ``2 ** (levels - 1)``.
    """
    h, w = size
    grid = tokens.unflatten(1, size).permute(0, 3, 1, 2)  # channels last in memory: no copy, and pooling keeps it
    parts, shapes = [tokens], [size]
    for level in range(1, levels):
        factor = 2**level
        if h % factor or w % factor:
            pooled = F.adaptive_avg_pool2d(grid, (-(-h // factor), -(-w // factor)))
        else:
            pooled = F.avg_pool2d(grid, factor)
        parts.append(pooled.flatten(2).transpose(1, 2))
        shapes.append((pooled.shape[2], pooled.shape[3]))
    return Pyramid(torch.cat(parts, dim=1), shapes)


def scramble_last_level(pyramid: Pyramid) -> Pyramid:
    """Replace the coarsest level by the one that Track-On's published re-ranking attends to.

    It pools the matrix of tokens x channels instead of the map: ``f`` consecutive tokens by ``f``
    neighbouring channels, with f the level's factor, and reads the result in memory order as channels x
    positions. Published weights were trained with it, so they need it.

    Raises:
        ValueError: the factor does not divide the height, the width or the channels.
    """
    (h, w), levels = pyramid.shapes[0], len(pyramid.shapes)
    B, _, D = pyramid.tokens.shape
    factor = 2 ** (levels - 1)
    if h % factor or w % factor or D % factor:
        raise ValueError(
            f"the published coarsest level of re-ranking needs a map and channels that {factor} divides, got "
            f"{h} x {w} cells and {D} channels; set scrambled_rerank_level=False for other sizes"
        )
    cells = h * w // factor**2
    last = F.avg_pool2d(pyramid.tokens[:, : h * w], factor).reshape(B, D, cells).transpose(1, 2)
    return Pyramid(torch.cat([pyramid.tokens[:, :-cells], last], dim=1), pyramid.shapes)
