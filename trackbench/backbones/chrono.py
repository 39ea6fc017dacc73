"""Chrono's backbone: a frozen trunk with temporal adapters between its stages.

"Exploring Temporally-Aware Features for Point Tracking" (Kim et al., CVPR 2025).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from trackbench.backbones.activations import ActivationPlace, ActivationStore, check_place
from trackbench.backbones.base import Backbone, FeatureStream
from trackbench.backbones.staged import StagedBackbone
from trackbench.layers.local_attention import AttentionBackend
from trackbench.layers.temporal import AdapterNorm, Moments, TemporalAdapter, check_keys, checkpointed


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
        norm: "clip" (published), "frame" or "running", which allow streaming; see :class:`TemporalAdapter`.
        causal: no frame sees a later one (not with norm "clip").
        attention_backend: of the attention along time, see
            :func:`~trackbench.layers.local_attention.local_attention`.
        activations: where one layer's activations of the clip lie in inference: "device", "cpu" or "disk" (a
            memory-mapped temporary file). Everything else that a clip takes does not grow with its length.
            With gradients they stay on the device.
        activations_dir: where that file lies; None: the system's directory for temporary files.
        checkpointing: in training, keep one state per stage and compute the rest again in the backward pass.
            Not for trunks with dropout, or with batch norms whose statistics are learned.
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
        attention_backend: AttentionBackend = "auto",
        activations: ActivationPlace = "device",
        activations_dir: str | Path | None = None,
        checkpointing: bool = False,
    ) -> None:
        super().__init__()
        check_place(activations)
        dims = trunk.stage_dims[:-1]
        pools = [pool] * len(dims) if isinstance(pool, int) else list(pool)
        if len(pools) != len(dims):
            raise ValueError(f"pool has {len(pools)} numbers for {len(dims)} adapters")
        self.trunk = trunk
        self.adapters = nn.ModuleList(
            TemporalAdapter(dim, hidden, heads, window, side, norm, causal, attention_backend, checkpointing)
            for dim, side in zip(dims, pools, strict=True)
        )
        self.dim = trunk.dim
        self.stride = trunk.stride
        self.context = len(dims) * (window // 2) if norm == "frame" else None
        self.lookahead = None if norm == "clip" else 0 if causal else len(dims) * (window // 2)
        self.activations: ActivationPlace = activations
        self.activations_dir = activations_dir
        self.checkpointing = checkpointing

    def forward(self, video: Tensor) -> Tensor:
        """(B, T, 3, H, W) in [0, 1] -> (B, T, C, h, w)."""
        store, _ = self._run(video.unbind(1))
        features = [
            self.trunk.finish(store.pop(index)).unflatten(0, (len(video), -1)) for index in range(len(store))
        ]
        return torch.cat(features, dim=1)

    def encode_clip(self, frames: Iterable[Tensor]) -> EncodedClip:
        """:meth:`forward` for long clips: frames are taken one after another and features made as they are read.

        Memory is one layer's activations of the clip, wherever ``activations`` says, and a constant.

        Args:
            frames: (B, 3, H, W) in [0, 1] each. ``trunk.frames_per_chunk`` of them run at once.

        Raises:
            ValueError: no frames, or ``activations_dir`` is not a directory.
        """
        return EncodedClip(self.trunk, *self._run(frames))

    def _run(self, frames: Iterable[Tensor]) -> tuple[ActivationStore, list[tuple[int, int]]]:
        """All stages, layer by layer: the last states in pieces, and (samples, frames) of each piece."""
        store = ActivationStore(self.activations, self.activations_dir)
        sizes: list[tuple[int, int]] = []
        moments = Moments()
        for images in self._chunks(frames):
            sizes.append((images.shape[0], images.shape[1]))
            state = checkpointed(self.checkpointing, self._begin, images.flatten(0, 1))
            self._count(0, moments, state, sizes[-1])
            store.append(state)
        if not sizes:
            raise ValueError("a clip without frames")
        for index, adapter in enumerate(self._adapter(i) for i in range(len(self.adapters))):
            clip, moments = moments, Moments()
            maps = (self.trunk.get_map(store[piece]).unflatten(0, size) for piece, size in enumerate(sizes))
            # the adapter has read the pieces that its window reaches when their states are replaced
            for piece, pooled in enumerate(adapter.attend_chunks(maps, clip)):
                state = checkpointed(self.checkpointing, self._next, index, store[piece], pooled)
                self._count(index + 1, moments, state, sizes[piece])
                store[piece] = state
        return store, sizes

    def _chunks(self, frames: Iterable[Tensor]) -> Iterator[Tensor]:
        """Frames (B, 3, H, W) in pieces (B, n, 3, H, W) to run at once."""
        waiting = iter(frames)
        limit = self.trunk.frames_per_chunk
        while chunk := list(islice(waiting, 1)):
            more = None if limit is None else max(1, limit // len(chunk[0])) - 1
            yield torch.stack([*chunk, *islice(waiting, more)], dim=1)

    def _begin(self, images: Tensor) -> Any:
        return self.trunk.run_stage(0, self.trunk.begin(images))

    def _next(self, index: int, state: Any, pooled: Tensor) -> Any:
        """Add what adapter ``index`` made of a state, and run the stage after it."""
        h, w = self.trunk.get_map(state).shape[-2:]
        delta = self._adapter(index).decode(pooled, h, w).flatten(0, 1)
        return self.trunk.run_stage(index + 1, self.trunk.add_map(state, delta))

    def _count(self, index: int, moments: Moments, state: Any, size: tuple[int, int]) -> None:
        """The statistics that adapter ``index`` needs of the whole clip before it can start."""
        if index < len(self.adapters) and self._adapter(index).norm_over == "clip":
            moments.update(self.trunk.get_map(state).unflatten(0, size))

    def _adapter(self, index: int) -> TemporalAdapter:
        return cast(TemporalAdapter, self.adapters[index])

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """Let ``torch.compile`` take what the trunk offers; clips and streams run through its stages."""
        self.trunk.compile(*args, **kwargs)

    def stream(self) -> FeatureStream:
        """Frame by frame in constant time and memory; with norm "clip" all at the end of the clip."""
        return super().stream() if self.lookahead is None else _ChronoStream(self)


class EncodedClip:
    """A clip's features, made from the states after the last stage. See :meth:`ChronoBackbone.encode_clip`."""

    def __init__(self, trunk: StagedBackbone, store: ActivationStore, sizes: list[tuple[int, int]]) -> None:
        self._trunk = trunk
        self._store = store
        self._places = [(piece, frame) for piece, (_, n) in enumerate(sizes) for frame in range(n)]
        self._sizes = sizes

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, index: int) -> Tensor:
        """Features (B, C, h, w) of a frame; computed at every call. Raises IndexError."""
        piece, frame = self._places[index]
        samples = slice(frame, None, self._sizes[piece][1])  # they come one after another
        return self._trunk.finish(self._store.frames(piece, samples))

    def __iter__(self) -> Iterator[Tensor]:
        """:meth:`__getitem__` of every frame in order."""
        return (self[index] for index in range(len(self)))


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

    def state_dict(self) -> dict[str, Any]:
        return {
            "adapters": [adapter.state_dict() for adapter in self.adapters],
            "waiting": [[self.trunk.pack(state) for state in states] for states in self.waiting],
        }

    def load_state_dict(self, content: Mapping[str, Any]) -> None:
        check_keys(content, {"adapters", "waiting"}, "feature")
        adapters, waiting = content["adapters"], content["waiting"]
        if len(adapters) != len(self.adapters) or len(waiting) != len(self.adapters):
            raise ValueError(
                f"feature state must hold {len(self.adapters)} adapters with the states that wait at each, "
                f"got {len(adapters)} and {len(waiting)}"
            )
        states = [deque(self.trunk.unpack(state) for state in part) for part in waiting]
        for adapter, part in zip(self.adapters, adapters, strict=True):
            adapter.load_state_dict(part)
        held = [adapter.num_waiting for adapter in self.adapters]
        if [len(part) for part in states] != held:
            raise ValueError(
                f"adapters hold {held} frames that wait, but {[len(part) for part in states]} states do"
            )
        self.waiting = states

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
