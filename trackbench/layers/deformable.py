"""Multi-scale deformable attention in plain PyTorch.

Deformable DETR, https://arxiv.org/abs/2010.04159, section 4.1 (equation 3), with the conventions of mmcv's
module, which Track-On was trained with: offsets count cells of each level, one softmax runs over levels and
points together, sampling is bilinear with zeros outside, and the module adds its own residual.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trackbench.layers.chunking import by_chunks

Shapes = Sequence[tuple[int, int]]

QUERIES_PER_CHUNK = 1024  # on the CPU without gradients: what one chunk samples then fits into the caches


def level_sizes(shapes: Shapes) -> list[int]:
    """Number of cells of each level (h, w)."""
    return [h * w for h, w in shapes]


def _corners(
    locations: Tensor, weights: Tensor, shapes: Shapes, base: Tensor, stride: int
) -> tuple[Tensor, Tensor]:
    """The four cells around every sampling location: rows of the flattened pyramid, and their weights.

    Args:
        locations: (B, Q, H, L, P, 2), normalised (x, y).
        weights: (B, Q, H, L, P), attention weights.
        shapes: (h, w) of the L levels.
        base: (B, 1, H or 1, 1, 1) int64, row of the pyramid's first cell.
        stride: rows from one cell to the next.

    Returns:
        Rows (B, Q, H, 4 * L * P) int64, and weights of the same shape, 0 for cells outside.
    """
    if torch.is_grad_enabled() or min(min(shape) for shape in shapes) < 2:
        return _corners_with_gradients(locations, weights, shapes, base, stride)
    L, P = locations.shape[3:5]
    height, width, first = (x.expand(L, P).reshape(-1) for x in _level_geometry(tuple(shapes), locations.device))
    size = torch.stack([width, height], dim=-1).flatten()
    weights, base = weights.flatten(3), base.flatten(3)
    position = (locations.flatten(3) * size).sub_(0.5)  # long last axes: short ones are slow to broadcast over
    # the two cells before and after, moved inside where they are not; clamped as integers because of NaN
    before = position.floor().long().clamp_(min=0).minimum(size - 2)
    distance = position.sub_(before)
    before_share = distance.abs().neg_().add_(1).clamp_(min=0).unflatten(-1, (-1, 2))
    after_share = distance.sub_(1).abs_().neg_().add_(1).clamp_(min=0).unflatten(-1, (-1, 2))
    left, top = before.unflatten(-1, (-1, 2)).unbind(dim=-1)
    down = width * stride
    row = torch.addcmul(left * stride + first * stride, top, down).add_(base)
    rows = torch.stack([row, row + stride, row + down, row + (down + stride)], dim=3)
    upper, lower = before_share[..., 1] * weights, after_share[..., 1] * weights
    scales = [share[..., 0] * vertical for vertical in (upper, lower) for share in (before_share, after_share)]
    return rows.flatten(3), torch.stack(scales, dim=3).flatten(3)


def _corners_with_gradients(
    locations: Tensor, weights: Tensor, shapes: Shapes, base: Tensor, stride: int
) -> tuple[Tensor, Tensor]:
    """:func:`_corners` with the gradients of bilinear sampling, on whole cells too, for levels of any size."""
    height, width, first = _level_geometry(tuple(shapes), locations.device)
    x, y = locations.unbind(dim=-1)
    left, right, left_share, right_share = _neighbours(x, width)
    top, bottom, top_share, bottom_share = _neighbours(y, height)
    top, bottom = top * width + first, bottom * width + first
    top_share, bottom_share = top_share * weights, bottom_share * weights
    rows = torch.stack([top + left, top + right, bottom + left, bottom + right], dim=3)
    scales = [
        top_share * left_share,
        top_share * right_share,
        bottom_share * left_share,
        bottom_share * right_share,
    ]
    return (rows * stride + base[:, :, :, None]).flatten(3), torch.stack(scales, dim=3).flatten(3)


def _level_geometry(shapes: tuple[tuple[int, int], ...], device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Height, width and first row of every level, (L, 1) int64 each, made on the device: copying would sync."""
    if torch.compiler.is_compiling():
        return _make_level_geometry(shapes, device)
    return _kept_level_geometry(shapes, device)


def _make_level_geometry(
    shapes: tuple[tuple[int, int], ...], device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    height, width = (
        torch.stack([torch.full((1,), shape[axis], dtype=torch.int64, device=device) for shape in shapes])
        for axis in (0, 1)
    )
    area = height * width
    return height, width, area.cumsum(0) - area


@lru_cache(maxsize=64)
def _kept_level_geometry(
    shapes: tuple[tuple[int, int], ...], device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    # made outside of inference mode, so that later training steps may use the kept tensors too
    with torch.inference_mode(False):
        return _make_level_geometry(shapes, device)


def _neighbours(coordinate: Tensor, size: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Along one axis: the cells before and after a normalised coordinate, and their shares (0 outside)."""
    position = coordinate * size - 0.5
    floor = position.detach().floor()
    part = position - floor
    before, last = floor.long(), size - 1
    before_share = (1 - part) * ((before >= 0) & (before <= last))
    after_share = part * ((before >= -1) & (before < last))
    # clamped as integers, so that NaN (a step that a gradient scaler will skip) stays within the map
    before, after = before.clamp(min=-1).minimum(last), (before + 1).clamp(min=0).minimum(last)
    return before.clamp(min=0), after, before_share, after_share


def _gather(table: Tensor, rows: Tensor, scales: Tensor) -> Tensor:
    """Weighted sums of rows of ``table`` (R, D): rows and scales (B, Q, H, K) -> (B, Q, H, D)."""
    bags, weights = rows.flatten(0, 2), scales.flatten(0, 2).to(table.dtype)
    sums = F.embedding_bag(bags, table, mode="sum", per_sample_weights=weights)
    return sums.unflatten(0, rows.shape[:3])


def deformable_sample(value: Tensor, shapes: Shapes, locations: Tensor, weights: Tensor) -> Tensor:
    """Weighted sums of bilinear samples: the core of deformable attention.

    Args:
        value: (B, S, H, D), the cells of all levels one after the other, each level row by row, H heads.
        shapes: (h, w) of the L levels; their areas sum to S.
        locations: (B, Q, H, L, P, 2), normalised (x, y); (0, 0) and (1, 1) are the outer corners of a level.
        weights: (B, Q, H, L, P), attention weights.

    Returns:
        (B, Q, H * D). Locations outside a level contribute zero.
    """
    B, S, H, D = value.shape
    batch = torch.arange(B, device=value.device).view(B, 1, 1, 1, 1) * (S * H)
    head = torch.arange(H, device=value.device).view(1, 1, H, 1, 1)
    rows, scales = _corners(locations, weights, shapes, batch + head, stride=H)
    return _gather(value.reshape(B * S * H, D), rows, scales).flatten(2)


class DeformableAttention(nn.Module):
    """Multi-scale deformable attention with its own residual: ``dropout(attention) + query``.

    Args:
        dim: channels of queries and values.
        num_heads: attention heads; divides ``dim``.
        num_levels: levels of the value pyramid.
        num_points: samples per head and level.
        dropout: on the output, before the residual.
        value_ratio: width of the value projection relative to ``dim``.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        num_levels: int,
        num_points: int = 4,
        dropout: float = 0.1,
        value_ratio: float = 1.0,
    ) -> None:
        super().__init__()
        inner = int(dim * value_ratio)
        if dim % num_heads or inner % num_heads:
            raise ValueError(f"num_heads={num_heads} must divide dim={dim} and the value width {inner}")
        self.dim, self.num_heads, self.num_levels, self.num_points = dim, num_heads, num_levels, num_points
        self.sampling_offsets = nn.Linear(dim, num_heads * num_levels * num_points * 2)
        self.attention_weights = nn.Linear(dim, num_heads * num_levels * num_points)
        self.value_proj = nn.Linear(dim, inner)
        self.output_proj = nn.Linear(inner, dim)
        self.dropout = nn.Dropout(dropout)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Each head starts out looking along its own ray, the p-th point p cells away, all weights equal."""
        nn.init.zeros_(self.sampling_offsets.weight)
        angle = torch.arange(self.num_heads, dtype=torch.float32) * (2.0 * math.pi / self.num_heads)
        ray = torch.stack([angle.cos(), angle.sin()], dim=-1)
        ray = ray / ray.abs().amax(dim=-1, keepdim=True)
        distance = torch.arange(1, self.num_points + 1, dtype=torch.float32)
        rays = ray[:, None, None] * distance[None, None, :, None]
        with torch.no_grad():
            self.sampling_offsets.bias.copy_(rays.expand(-1, self.num_levels, -1, -1).flatten())
        nn.init.zeros_(self.attention_weights.weight)
        nn.init.zeros_(self.attention_weights.bias)
        for layer in (self.value_proj, self.output_proj):
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, query: Tensor, value: Tensor, reference: Tensor, shapes: Shapes) -> Tensor:
        """Attend to a pyramid around one reference point per query and level.

        Args:
            query: (B, Q, C).
            value: (B, S, C), the cells of all levels one after the other.
            reference: (B, Q, L, 2) or (B, Q, 1, 2) for all levels alike; normalised (x, y) in [0, 1].
            shapes: (h, w) of the L levels.

        Returns:
            (B, Q, C): dropout(output projection) + query.

        Raises:
            ValueError: the number of levels or cells is not what the module and ``shapes`` say.
        """
        attend = self.attention(query.shape[1], value, shapes)
        return by_chunks(attend, query, reference, dim=1, size=QUERIES_PER_CHUNK)

    def attention(self, num_queries: int, value: Tensor, shapes: Shapes) -> Callable[[Tensor, Tensor], Tensor]:
        """:meth:`forward` for one pyramid, as a function of any of its queries and reference points.

        Args:
            num_queries: how many there will be in all, which decides what is projected.
            value: (B, S, C).
            shapes: (h, w) of the L levels.
        """
        B, S, _ = value.shape
        H, L = self.num_heads, self.num_levels
        if len(shapes) != L or sum(level_sizes(shapes)) != S:
            raise ValueError(f"expected {L} levels that fill {S} cells, got {list(shapes)}")
        few = 2 * num_queries * H <= S
        projected = value if few else self.value_proj(value).view(B, S, H, -1)

        def attend(query: Tensor, reference: Tensor) -> Tensor:
            locations, weights = self._locations(query, reference, shapes)
            sample = self._sample_then_project if few else deformable_sample
            return self.dropout(self.output_proj(sample(projected, shapes, locations, weights))) + query

        return attend

    def _sample_then_project(self, value: Tensor, shapes: Shapes, locations: Tensor, weights: Tensor) -> Tensor:
        """The same result for few queries, which need only a few of the cells projected.

        Projection and sampling are both linear, so they commute; the bias counts as much as lies inside.
        """
        B, S, C = value.shape
        batch = torch.arange(B, device=value.device).view(B, 1, 1, 1, 1) * S
        rows, scales = _corners(locations, weights, shapes, batch, stride=1)
        raw = _gather(value.reshape(B * S, C), rows, scales)
        weight = self.value_proj.weight.view(self.num_heads, -1, C)
        bias = self.value_proj.bias.view(self.num_heads, -1)
        projected = torch.einsum("bqhc,hdc->bqhd", raw, weight)
        return (projected + scales.sum(dim=-1, keepdim=True) * bias).flatten(2)

    def _locations(self, query: Tensor, reference: Tensor, shapes: Shapes) -> tuple[Tensor, Tensor]:
        """Where each query looks (B, Q, H, L, P, 2) and how much each sample counts (B, Q, H, L, P)."""
        B, Q, _ = query.shape
        H, L, P = self.num_heads, self.num_levels, self.num_points
        with torch.autocast(query.device.type, enabled=False):  # geometry keeps at least 24 bits
            precise = query.to(self.sampling_offsets.weight.dtype)
            offsets = self.sampling_offsets(precise).view(B, Q, H, L, P, 2)
            weights = self.attention_weights(precise).view(B, Q, H, L * P).softmax(-1).view(B, Q, H, L, P)
            height, width, _ = _level_geometry(tuple(shapes), offsets.device)
            locations = reference[:, :, None, :, None] + offsets / torch.stack([width, height], dim=-1)
        return locations, weights
