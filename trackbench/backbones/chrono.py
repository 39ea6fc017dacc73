"""Chrono's backbone: a frozen trunk with temporal adapters between its stages.

"Exploring Temporally-Aware Features for Point Tracking" (Kim et al., CVPR 2025).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from trackbench.backbones.base import Backbone, FeatureStream
from trackbench.backbones.staged import StagedBackbone
from trackbench.layers.temporal import AdapterNorm, TemporalAdapter


class ChronoBackbone(Backbone):
    """A staged trunk with a temporal adapter after each of its stages but the last.

    A new one gives exactly the trunk's features. The published models are ``DinoV2(token_grid=64,
    normalize_features=True, frozen=True)`` with the defaults below.

    Args:
        trunk: the backbone that computes each frame's features; frozen or not.
        hidden: channels inside the adapters.
        heads: attention heads of the adapters.
        window: frames that a frame sees in each adapter.
        pool: cells per side that the adapters pool; one number, or one per adapter.
        norm: "clip" (published) or "frame", which allows streaming; see :class:`TemporalAdapter`.
        causal: no frame sees a later one (with norm "frame").
    """

    def __init__(
        self,
        trunk: StagedBackbone,
        hidden: int = 128,
        heads: int = 4,
        window: int = 13,
        pool: int | Sequence[int] = 4,
        norm: AdapterNorm = "clip",
        causal: bool = False,
    ) -> None:
        super().__init__()
        dims = trunk.stage_dims[:-1]
        pools = [pool] * len(dims) if isinstance(pool, int) else list(pool)
        if len(pools) != len(dims):
            raise ValueError(f"pool has {len(pools)} numbers for {len(dims)} adapters")
        self.trunk = trunk
        self.adapters = nn.ModuleList(
            TemporalAdapter(dim, hidden, heads, window, side, norm, causal)
            for dim, side in zip(dims, pools, strict=True)
        )
        self.dim = trunk.dim
        self.stride = trunk.stride
        self.context = None if norm == "clip" else len(dims) * (window // 2)
        self.lookahead = 0 if causal else self.context

    def forward(self, video: Tensor) -> Tensor:
        """(B, T, 3, H, W) in [0, 1] -> (B, T, C, h, w)."""
        states = [self.trunk.begin(images) for images in self.trunk.chunks(video)]
        for index in range(len(self.trunk.stage_dims)):
            for chunk, state in enumerate(states):
                states[chunk] = self.trunk.run_stage(index, state)
            if index < len(self.adapters):
                adapter = cast(TemporalAdapter, self.adapters[index])
                deltas = adapter.in_chunks([self.trunk.get_map(state) for state in states], len(video))
                for chunk, delta in enumerate(deltas):
                    states[chunk] = self.trunk.add_map(states[chunk], delta)
        return torch.cat([self.trunk.finish(state) for state in states]).unflatten(0, video.shape[:2])

    def stream(self) -> FeatureStream:
        """Frame by frame in constant time and memory; with norm "clip" all at the end of the clip."""
        return super().stream() if self.context is None else _ChronoStream(self)


class _ChronoStream:
    """Every adapter holds the states that wait for later frames; a ready one goes on to the next stage."""

    def __init__(self, backbone: ChronoBackbone) -> None:
        self.trunk = backbone.trunk
        self.adapters = [cast(TemporalAdapter, adapter).stream() for adapter in backbone.adapters]
        self.waiting: list[deque[Any]] = [deque() for _ in self.adapters]

    def push(self, frame: Tensor) -> list[Tensor]:
        return self._advance(0, self.trunk.begin(frame))

    def flush(self) -> list[Tensor]:
        ready = []
        for index, adapter in enumerate(self.adapters):
            for delta in adapter.flush():
                ready += self._resume(index, delta)
        return ready

    def _advance(self, index: int, state: Any) -> list[Tensor]:
        state = self.trunk.run_stage(index, state)
        if index == len(self.adapters):
            return [self.trunk.finish(state)]
        self.waiting[index].append(state)
        ready = []
        for delta in self.adapters[index].push(self.trunk.get_map(state)):
            ready += self._resume(index, delta)
        return ready

    def _resume(self, index: int, delta: Tensor) -> list[Tensor]:
        state = self.trunk.add_map(self.waiting[index].popleft(), delta)
        return self._advance(index + 1, state)
