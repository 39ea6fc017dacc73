"""What every head offers: feature maps and queries in, tracks out, for a clip at once or frame by frame.

Heads work in *cells* of the feature map: x in [0, w], y in [0, h], the centre of the first cell is 0.5. The
tracker converts pixels to cells and back, so a head never needs to know the size of the image or the stride.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple, TypedDict

from torch import Tensor, nn


class FrameOutput(NamedTuple):
    """One frame of a stream: xy (B, N, 2) in cells, visibility (B, N) in [0, 1], visible (B, N) bool."""

    xy: Tensor
    visibility: Tensor
    visible: Tensor


class HeadOutput(TypedDict):
    """A clip: what every head returns; heads add what their loss needs under further keys.

    xy (B, N, T, 2) in cells, visibility (B, N, T) in [0, 1], visible (B, N, T) bool.
    """

    xy: Tensor
    visibility: Tensor
    visible: Tensor
    extra: dict[str, Any]


class Target(NamedTuple):
    """Ground truth in cells: queries (B, N, 3), xy (B, N, T, 2), visible (B, N, T), labelled (B, N, T)."""

    queries: Tensor
    xy: Tensor
    visible: Tensor
    labelled: Tensor


class Head(nn.Module):
    """Feature maps + queries -> tracks.

    Attributes:
        causal: the state runs forward in time, so frames before a query are better tracked by a second,
            time-reversed run (False: every frame is matched on its own and needs no second run).
    """

    causal: bool

    def forward(self, features: Tensor, queries: Tensor) -> HeadOutput:
        """Track through a clip.

        Args:
            features: (B, T, C, h, w).
            queries: (B, N, 3), (t, x, y) with x, y in cells; query times differ freely within the batch.
        """
        raise NotImplementedError  # abstract

    def loss(self, output: HeadOutput, target: Target) -> dict[str, Tensor]:
        """Named loss terms (scalars, already weighted); their sum is what is back-propagated."""
        raise NotImplementedError  # abstract

    def sample(self, features: Tensor, xy: Tensor) -> Tensor:
        """Query features (B, N, D) of points xy (B, N, 2), in cells, on one frame's features (B, C, h, w)."""
        raise NotImplementedError  # abstract

    def start(self, batch_size: int) -> Any:
        """A new, empty streaming state."""
        raise NotImplementedError  # abstract

    def add(self, state: Any, query_features: Tensor, queries: Tensor) -> None:
        """Let points enter a stream, before the step of any frame.

        Args:
            state: from :meth:`start`; changed in place.
            query_features: (B, N, D) from :meth:`sample`.
            queries: (B, N, 3), (t, x, y); t may lie in the future (the points count as started from there).
        """
        raise NotImplementedError  # abstract

    def drop(self, state: Any, keep: Tensor) -> None:
        """Keep only the points where ``keep`` (N,) is True. ``state`` is changed in place."""
        raise NotImplementedError  # abstract

    def step(self, state: Any, features: Tensor) -> FrameOutput:
        """Advance by one frame, features (B, C, h, w). ``state`` is changed in place."""
        raise NotImplementedError  # abstract

    def pack_state(self, state: Any) -> dict[str, Any]:
        """A state, a data class of tensors and ints, as a dict of copies.

        Fields that are None are left out, and those with the metadata ``{"cache": True}``: what follows from the
        weights alone.
        """
        content = {name: getattr(state, name) for name in _packed_fields(state)}
        return {
            name: value.detach().clone() if isinstance(value, Tensor) else value
            for name, value in content.items()
            if value is not None
        }

    def unpack_state(self, content: Mapping[str, Any], *, num_points: int) -> Any:
        """The state that :meth:`pack_state` packed, for one video, on the device and with the dtype of this head.

        Args:
            content: what :meth:`pack_state` returned.
            num_points: points in the state, without the support points that a head adds (``num_support``).

        Raises:
            ValueError: names, shapes or types that :meth:`start` of this head would not give.
        """
        state, like = self.start(1), next(self.parameters())
        fresh = {name: getattr(state, name) for name in _packed_fields(state)}
        num_support = content.get("num_support", 0)
        total = num_points + (num_support if isinstance(num_support, int) else 0)
        optional = {name for name, value in fresh.items() if value is None and total == 0}
        if not fresh.keys() - optional <= content.keys() <= fresh.keys():
            raise ValueError(f"head state must hold {sorted(fresh)}, got {sorted(content)}")
        for name, value in content.items():
            setattr(state, name, _unpacked(name, value, fresh[name], total, like))
        return state


def _packed_fields(state: Any) -> list[str]:
    return [field.name for field in dataclasses.fields(state) if not field.metadata.get("cache")]


def _unpacked(name: str, value: Any, fresh: Tensor | int | None, num_points: int, like: Tensor) -> Tensor | int:
    """One field of a state, checked against that of an empty one; tensors are (1, N, ...)."""
    if isinstance(fresh, int):
        if not isinstance(value, int) or isinstance(value, bool) or value < 0:
            raise ValueError(f"head state's {name} must be a count, got {value!r}")
        return value
    if not isinstance(value, Tensor):
        raise ValueError(f"head state's {name} must be a tensor, got {type(value).__name__}")
    dtype = like.dtype if fresh is None else fresh.dtype
    rest = value.shape[2:] if fresh is None else fresh.shape[2:]
    if value.shape != (1, num_points, *rest):
        raise ValueError(f"head state's {name} is {tuple(value.shape)}, expected {(1, num_points, *rest)}")
    if value.dtype != dtype and not (value.is_floating_point() and dtype.is_floating_point):
        raise ValueError(f"head state's {name} is {value.dtype}, expected {dtype}")
    return value.detach().to(like.device, dtype, copy=True)
