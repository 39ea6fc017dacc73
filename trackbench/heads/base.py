"""What every head offers: feature maps and queries in, tracks out, for a clip at once or frame by frame.

Heads work in *cells* of the feature map: x in [0, w], y in [0, h], the centre of the first cell is 0.5. The
tracker converts pixels to cells and back, so a head never needs to know the size of the image or the stride.
"""

from __future__ import annotations

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
