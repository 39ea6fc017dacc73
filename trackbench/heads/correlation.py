"""Chrono's head: match the query's feature against every cell of every frame; only occlusion is learned.

"Exploring Temporally-Aware Features for Point Tracking" (Kim et al., CVPR 2025).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import product
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trackbench.heads.base import FrameOutput, Head, HeadOutput, Target
from trackbench.layers.precision import normalize_length
from trackbench.losses import ChronoLoss

COSTS_PER_CHUNK = 2**24  # of queries with cells, that exist at a time
COSTS_PER_CHUNK_CPU = 2**20  # likewise on the CPU, where more would only leave the caches


class _Match(NamedTuple):
    """Positions (B, T, n, 2) in cells, logits (B, T, n, 2): occlusion, expected distance.

    cost (B, T, n, h*w) only where the loss asks for it, otherwise (B, T, n, 0).
    """

    xy: Tensor
    logits: Tensor
    cost: Tensor


@dataclass
class CorrelationState:
    """A stream: the frame to come, and what is known of the points.

    Attributes:
        frame: index of the next frame.
        query_features: (B, N, D); None before the first point.
        queries: (B, N, 3).
    """

    frame: int
    query_features: Tensor | None
    queries: Tensor


class CorrelationHead(Head):
    """Cost volume, local soft-argmax, and occlusion from the statistics of the cost.

    Every frame is matched on its own, so tracks run backward in time as well as forward. The features must
    come with unit length (Chrono's do), or be given one here by ``normalize``.

    Args:
        in_dim: channels of the feature maps.
        projection_dim: match in this many channels, after a learned 1x1 convolution; None: the features as
            they are (published).
        normalize: divide features (after the projection) by their length.
        temperature: factor of the cost inside the softmax.
        radius: cells further than this from the best one, or as far, do not take part in the soft-argmax.
        query_chunk_size: query points matched at once, at most; it bounds memory and changes rounding only. None:
            as many queries, or frames, as keep their costs in a few MB (64 on a GPU).
        loss: the training loss; None: the published one.
    """

    causal = False

    def __init__(
        self,
        in_dim: int,
        projection_dim: int | None = None,
        normalize: bool = False,
        temperature: float = 20.0,
        radius: float = 5.0,
        query_chunk_size: int | None = None,
        loss: ChronoLoss | None = None,
    ) -> None:
        super().__init__()
        if query_chunk_size is not None and query_chunk_size < 1:
            raise ValueError(f"query_chunk_size must be positive or None, got {query_chunk_size}")
        self.in_dim = in_dim
        self.projection = None if projection_dim is None else nn.Conv2d(in_dim, projection_dim, 1)
        self.normalize = normalize
        self.temperature = temperature
        self.query_chunk_size = query_chunk_size
        self.occ_linear = nn.Linear(3, 2)
        self.criterion = loss or ChronoLoss()
        self.window: Tensor
        self.register_buffer("window", _disc(radius), persistent=False)

    def forward(self, features: Tensor, queries: Tensor) -> HeadOutput:
        """Track through a clip; see :meth:`Head.forward`.

        Returns:
            Besides the tracks, ``extra`` holds the logits "occlusion" and "expected_dist" (B, N, T), "grid",
            the cells (h, w), and where the loss asks for them "cell_logits" (B, N, T, h*w).
        """
        T, _, h, w = features.shape[1:]
        with torch.autocast(features.device.type, enabled=False):
            features = self._prepare(features.flatten(0, 1)).unflatten(0, features.shape[:2])
            queries = queries.to(features.dtype)
            query_features = sample_trilinear(features, *queries.unbind(-1))
            match = self._match(query_features, features)
            xy, logits = match.xy.transpose(1, 2), match.logits.transpose(1, 2)
            time = torch.arange(T, device=queries.device)
            on_query_frame = queries[..., :1].round() == time
            xy = torch.where(on_query_frame[..., None], queries[..., None, 1:], xy)
            occlusion, expected_dist = logits.unbind(-1)
            visibility, visible = _visibility(logits)
            extra = {"occlusion": occlusion, "expected_dist": expected_dist, "grid": (h, w)}
            if self._keeps_cost:
                extra["cell_logits"] = self.temperature * match.cost.transpose(1, 2)
        return HeadOutput(xy=xy, visibility=visibility, visible=visible, extra=extra)

    def loss(self, output: HeadOutput, target: Target) -> dict[str, Tensor]:
        """The weighted terms of :class:`ChronoLoss`."""
        extra = output["extra"]
        return self.criterion(
            output["xy"],
            extra["occlusion"],
            extra["expected_dist"],
            target,
            extra["grid"],
            cell_logits=extra.get("cell_logits"),
        )

    def sample(self, features: Tensor, xy: Tensor) -> Tensor:
        """Query features (B, N, D) of points xy (B, N, 2), in cells, on features (B, C, h, w)."""
        with torch.autocast(features.device.type, enabled=False):
            features = self._prepare(features)
            x, y = xy.to(features.dtype).unbind(-1)
            return sample_trilinear(features[:, None], torch.zeros_like(x), x, y)

    def start(self, batch_size: int) -> CorrelationState:
        """A stream without points."""
        return CorrelationState(frame=0, query_features=None, queries=torch.zeros(batch_size, 0, 3))

    def add(self, state: CorrelationState, query_features: Tensor, queries: Tensor) -> None:
        """Let points enter; see :meth:`Head.add`."""
        if state.query_features is None:
            state.query_features, state.queries = query_features, queries
        else:
            state.query_features = torch.cat([state.query_features, query_features], dim=1)
            state.queries = torch.cat([state.queries, queries], dim=1)

    def drop(self, state: CorrelationState, keep: Tensor) -> None:
        """Keep only the points where ``keep`` (N,) is True."""
        if state.query_features is not None:
            state.query_features = state.query_features[:, keep]
            state.queries = state.queries[:, keep]

    def step(self, state: CorrelationState, features: Tensor) -> FrameOutput:
        """Match one frame (B, C, h, w)."""
        frame, state.frame = state.frame, state.frame + 1
        if state.query_features is None:
            none = features.new_zeros(len(features), 0)
            return FrameOutput(none[..., None].expand(-1, -1, 2), none, none.bool())
        with torch.autocast(features.device.type, enabled=False):
            match = self._match(state.query_features, self._prepare(features)[:, None])
            queries = state.queries.to(match.xy.dtype)
            xy = torch.where(queries[..., :1].round() == frame, queries[..., 1:], match.xy[:, 0])
            return FrameOutput(xy, *_visibility(match.logits[:, 0]))

    def _prepare(self, features: Tensor) -> Tensor:
        """Maps (n, C, h, w) of the backbone -> maps (n, D, h, w) to match in, in float32."""
        if features.shape[1] != self.in_dim:
            raise ValueError(f"features have {features.shape[1]} channels, expected in_dim = {self.in_dim}")
        features = features.to(self.occ_linear.weight.dtype)
        if self.projection is not None:
            features = self.projection(features)
        if self.normalize:
            features = normalize_length(features)
        return features

    def _match(self, query_features: Tensor, features: Tensor) -> _Match:
        """Query features (B, N, D) against maps (B, T, D, h, w), in pieces of a bounded cost volume."""
        B, N = query_features.shape[:2]
        limit = COSTS_PER_CHUNK_CPU if features.device.type == "cpu" else COSTS_PER_CHUNK
        pairs = max(1, limit // (B * math.prod(features.shape[-2:])))  # of a query with a frame
        frames, queries = max(1, pairs // max(1, N)), min(pairs, self.query_chunk_size or pairs)
        rows = [
            _join([self._match_piece(part, maps) for part in query_features.split(queries, dim=1)], dim=2)
            for maps in features.split(frames, dim=1)
        ]
        return _join(rows, dim=1)

    @property
    def _keeps_cost(self) -> bool:
        return self.criterion.matching_weight > 0 and torch.is_grad_enabled()

    def _match_piece(self, query_features: Tensor, features: Tensor) -> _Match:
        h, w = features.shape[-2:]
        cost = query_features[:, None] @ features.flatten(3)  # (B, T, n, h*w)
        with torch.no_grad():
            highest, best = cost.max(dim=-1)
            statistics = torch.stack([cost.mean(dim=-1), highest, cost.amin(dim=-1)], dim=-1)
            best_xy = torch.stack([best % w, best // w], dim=-1)
            cells = best_xy[..., None, :] + self.window  # (B, T, n, K, 2)
            x, y = cells.unbind(-1)
            outside = (x < 0) | (x >= w) | (y < 0) | (y >= h)
            index = (y * w + x).masked_fill(outside, 0)
        # softmax over all cells, cut to the window and divided by what is left, is softmax over the window
        near = cost.gather(-1, index.flatten(3)).view_as(index) * self.temperature
        weights = F.softmax(near.masked_fill(outside, float("-inf")), dim=-1)
        shift = weights @ self.window.to(weights.dtype)
        kept = cost if self._keeps_cost else cost.new_empty(*cost.shape[:3], 0)  # no view: it would keep the costs
        return _Match(best_xy + 0.5 + shift, self.occ_linear(statistics), kept)


def _join(parts: list[_Match], dim: int) -> _Match:
    return parts[0] if len(parts) == 1 else _Match(*(torch.cat(x, dim=dim) for x in zip(*parts, strict=True)))


def sample_trilinear(features: Tensor, t: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """Trilinear samples with border clamping.

    Args:
        features: (B, T, D, h, w).
        t: (B, N) frames; between two frames they are blended.
        x: (B, N) in cells, the centre of the first cell is 0.5; likewise ``y``.
        y: (B, N).

    Returns:
        (B, N, D).
    """
    T, _, h, w = features.shape[1:]
    batch = torch.arange(len(features), device=features.device)[:, None]
    frames, rows, columns = _neighbours(t, T), _neighbours(y - 0.5, h), _neighbours(x - 0.5, w)
    samples = features.new_zeros(*t.shape, features.shape[2])
    for (frame, in_time), (row, in_y), (column, in_x) in product(frames, rows, columns):
        weight = (in_time * in_y * in_x)[..., None]
        samples = samples + weight * features[batch, frame, :, row, column]
    return samples


def _neighbours(index: Tensor, length: int) -> list[tuple[Tensor, Tensor]]:
    """The two whole indices around each index, clamped to [0, length - 1], with their linear weights."""
    index = index.clamp(0, length - 1)
    low = index.floor()
    share = index - low
    low = low.long()
    return [(low, 1 - share), ((low + 1).clamp(max=length - 1), share)]


def _disc(radius: float) -> Tensor:
    """Offsets (K, 2) as (x, y) of the cells closer than ``radius``."""
    side = torch.arange(-int(radius), int(radius) + 1)
    y, x = torch.meshgrid(side, side, indexing="ij")
    offsets = torch.stack([x.flatten(), y.flatten()], dim=-1)
    return offsets[offsets.square().sum(dim=-1) < radius**2]


def _visibility(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Logits (..., 2) of occlusion and expected distance -> visibility in [0, 1] and the decision."""
    occluded, off = logits.sigmoid().unbind(-1)
    visibility = (1 - occluded) * (1 - off)
    return visibility, ~(1 - visibility > 0.5)
