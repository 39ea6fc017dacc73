"""Correlation of queries with a frame at several scales."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from trackbench.heads.memory.pyramid import Pyramid
from trackbench.layers.precision import at_least_float32

EPSILON = 1e-12


@dataclass(frozen=True)
class CorrelationMap:
    """What a frame's queries are compared with, made once for all correlations of the frame.

    Attributes:
        tokens: (B, S, D) of all levels one after the other, float32 or wider.
        scale: (B, 1, S), what a product with a token counts: its level's weight divided by its length.
        shapes: (h, w) of the levels.
    """

    tokens: Tensor
    scale: Tensor
    shapes: list[tuple[int, int]]

    @staticmethod
    def of(pyramid: Pyramid, weight: Tensor) -> CorrelationMap:
        """The tokens stay as they are: dividing a few products by their lengths is less work.

        Args:
            pyramid: of the frame.
            weight: one weight per level, of any shape.
        """
        with torch.autocast(pyramid.tokens.device.type, enabled=False):
            tokens = at_least_float32(pyramid.tokens)
            length = torch.linalg.vector_norm(tokens, dim=-1).clamp(min=EPSILON)
            factors = weight.to(tokens.dtype).flatten().unbind()
            levels = length.split([h * w for h, w in pyramid.shapes], dim=-1)
            scale = torch.cat([factor / level for factor, level in zip(factors, levels, strict=True)], dim=-1)
        return CorrelationMap(tokens, scale[:, None], pyramid.shapes)


def correlate(query: Tensor, frame: CorrelationMap) -> Tensor:
    """Cosine similarity of queries with all cells, summed over levels at the resolution of the finest.

    The products are formed at each level's own resolution. Enlarging them bilinearly is a product with one small
    matrix per axis, so all coarser levels join the finest in a single product, and none is ever held enlarged.
    Everything is in float32 also under autocast: maxima and top-k need more than the bits of a half.

    Args:
        query: (B, N, D).
        frame: from :meth:`CorrelationMap.of`.

    Returns:
        (B, N, h * w).
    """
    B, N, _ = query.shape
    h, w = frame.shapes[0]
    with torch.autocast(query.device.type, enabled=False):
        unit = F.normalize(at_least_float32(query), dim=-1, eps=EPSILON)
        products = (unit @ frame.tokens.transpose(1, 2)) * frame.scale
        finest, *coarser = products.split([rows * columns for rows, columns in frame.shapes], dim=-1)
        if not coarser or not N:
            return finest
        enlarging = {size: _enlarging(*size, products.dtype, products.device) for size in _sizes(frame.shapes)}
        widened = [
            level.flatten(0, 1).unflatten(-1, shape) @ enlarging[shape[1], w].T
            for level, shape in zip(coarser, frame.shapes[1:], strict=True)
        ]
        heightening = torch.cat([enlarging[shape[0], h] for shape in frame.shapes[1:]], dim=1)
        total = torch.baddbmm(
            finest.flatten(0, 1).unflatten(-1, (h, w)),
            heightening.expand(B * N, -1, -1),
            torch.cat(widened, dim=1),
        )
        return total.view(B, N, h * w)


def _sizes(shapes: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """(size, enlarged size) of the axes of all coarser levels."""
    h, w = shapes[0]
    return [pair for rows, columns in shapes[1:] for pair in ((rows, h), (columns, w))]


def _enlarging(size: int, target: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """(target, size): bilinear interpolation along one axis, half-pixel centres, made on the device."""
    if torch.compiler.is_compiling():
        return _make_enlarging(size, target, dtype, device)
    return _kept_enlarging(size, target, dtype, device)


def _make_enlarging(size: int, target: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    identity = torch.eye(size, dtype=dtype, device=device)[None]
    return F.interpolate(identity, size=target, mode="linear", align_corners=False)[0].T.contiguous()


@lru_cache(maxsize=64)
def _kept_enlarging(size: int, target: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    # made outside of inference mode, so that later training steps may use the kept tensor too
    with torch.inference_mode(False), torch.no_grad():
        return _make_enlarging(size, target, dtype, device)
