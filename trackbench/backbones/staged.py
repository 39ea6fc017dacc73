"""Image backbones that run stage by stage, so that something can be added to their maps in between."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, get_type_hints

import torch
from torch import Tensor

from trackbench.backbones.base import Backbone


class StagedBackbone(Backbone):
    """A frame-by-frame backbone in stages.

    A state holds n frames on their way; it is not changed in place, every method returns a new one. It is a
    dataclass, the type that :meth:`begin` says it returns, of integers, tensors whose first dimension is n, and
    tuples of them.

    Args:
        dim: channels of the features.
        stride: input pixels per feature cell.
        stage_dims: channels of the map that each stage leaves.
        frames_per_chunk: frames that go through the network at once: activations do not grow with T in
            inference. None: all at once.
    """

    def __init__(self, dim: int, stride: float, stage_dims: list[int], frames_per_chunk: int | None) -> None:
        super().__init__()
        if frames_per_chunk is not None and frames_per_chunk < 1:
            raise ValueError(f"frames_per_chunk must be positive or None, got {frames_per_chunk}")
        self.dim = dim
        self.stride = stride
        self.context = 0
        self.lookahead = 0
        self.stage_dims = stage_dims
        self.frames_per_chunk = frames_per_chunk

    def begin(self, images: Tensor) -> Any:
        """Frames (n, 3, H, W) in [0, 1] -> the state before the first stage."""
        raise NotImplementedError  # abstract

    def run_stage(self, index: int, state: Any) -> Any:
        """Run stage ``index``."""
        raise NotImplementedError  # abstract

    def get_map(self, state: Any) -> Tensor:
        """The map (n, stage_dims[index], h, w) that stage ``index``, the last one run, left."""
        raise NotImplementedError  # abstract

    def add_map(self, state: Any, delta: Tensor) -> Any:
        """Add ``delta`` to that map, wherever later stages read it."""
        raise NotImplementedError  # abstract

    def finish(self, state: Any) -> Tensor:
        """The features (n, dim, h, w) after the last stage."""
        raise NotImplementedError  # abstract

    def pack(self, state: Any) -> dict[str, Any]:
        """Copy a state into dicts and lists of tensors and integers."""
        return {field.name: _pack(getattr(state, field.name)) for field in dataclasses.fields(state)}

    def unpack(self, content: Mapping[str, Any]) -> Any:
        """The state behind :meth:`pack`, on the device of this backbone. Raises ValueError where it is none."""
        kind = get_type_hints(type(self).begin)["return"]
        names = {field.name for field in dataclasses.fields(kind)}
        if set(content) != names:
            raise ValueError(f"{kind.__name__} must hold {sorted(names)}, got {sorted(content)}")
        device = next(self.parameters()).device
        return kind(**{name: _unpack(value, device) for name, value in content.items()})

    def chunks(self, video: Tensor) -> list[Tensor]:
        """Frames of (B, T, 3, H, W) in pieces (n, 3, H, W) to run at once, sample by sample."""
        frames = video.flatten(0, 1)
        return list(frames.split(self.frames_per_chunk or len(frames)))

    def forward(self, video: Tensor) -> Tensor:
        """(B, T, 3, H, W) in [0, 1] -> (B, T, dim, h, w)."""
        features = [self._encode(images) for images in self.chunks(video)]
        return torch.cat(features).unflatten(0, video.shape[:2])

    def _encode(self, images: Tensor) -> Tensor:
        state = self.begin(images)
        for index in range(len(self.stage_dims)):
            state = self.run_stage(index, state)
        return self.finish(state)


def _pack(value: Any) -> Any:
    if isinstance(value, tuple):
        return [_pack(item) for item in value]
    return value.detach().clone() if isinstance(value, Tensor) else value


def _unpack(value: Any, device: torch.device) -> Any:
    if isinstance(value, list):
        return tuple(_unpack(item, device) for item in value)
    return value.detach().to(device, copy=True) if isinstance(value, Tensor) else value
