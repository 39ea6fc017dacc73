"""The few data classes that cross rooms. Shapes and units are said here once.

Coordinates are raster coordinates in pixels: x in [0, W], y in [0, H], the centre of the first pixel is 0.5
(the convention of TAP-Vid). B videos, T frames, N query points.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor

QueryMode = Literal["first", "strided"]  # TAP-Vid's two ways to ask: at the first visible frame, or every 5th


@dataclass
class VideoBatch:
    """A batch of videos with ground truth. ``__post_init__`` refuses shapes that do not belong together.

    Attributes:
        video: (B, T, 3, H, W), RGB, uint8 in [0, 255].
        queries: (B, N, 3) float32, (t, x, y): frame index and pixels.
        xy: (B, N, T, 2) float32, ground-truth tracks in pixels.
        visible: (B, N, T) bool, ground-truth visibility.
        labelled: (B, N, T) bool, entries that count in losses and metrics; None: all of them.
        names: one name per video.
    """

    video: Tensor
    queries: Tensor
    xy: Tensor
    visible: Tensor
    labelled: Tensor | None = None
    names: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        if self.video.ndim != 5 or self.video.shape[2] != 3:
            raise ValueError(f"video must be (B, T, 3, H, W), got {tuple(self.video.shape)}")
        B, T = self.video.shape[:2]
        if self.queries.ndim != 3 or self.queries.shape[0] != B or self.queries.shape[2] != 3:
            raise ValueError(f"queries must be ({B}, N, 3) as (t, x, y), got {tuple(self.queries.shape)}")
        N = self.queries.shape[1]
        if self.xy.shape != (B, N, T, 2):
            raise ValueError(f"xy must be {(B, N, T, 2)}, got {tuple(self.xy.shape)}")
        for key in ("visible", "labelled"):
            value = getattr(self, key)
            if value is not None and (value.shape != (B, N, T) or value.dtype != torch.bool):
                raise ValueError(f"{key} must be bool {(B, N, T)}, got {value.dtype} {tuple(value.shape)}")

    def to(self, device: torch.device | str, non_blocking: bool = False) -> VideoBatch:
        """The same batch on ``device``."""
        moved: dict[str, Any] = {
            key: value.to(device, non_blocking=non_blocking)
            for key, value in vars(self).items()
            if isinstance(value, Tensor)
        }
        return replace(self, **moved)

    def pin_memory(self) -> VideoBatch:
        """The same batch in pinned memory (called by the DataLoader)."""
        pinned: dict[str, Any] = {k: v.pin_memory() for k, v in vars(self).items() if isinstance(v, Tensor)}
        return replace(self, **pinned)

    @staticmethod
    def collate(samples: list[VideoBatch]) -> VideoBatch:
        """Concatenate batches along B, cut to the smallest number of points among them."""
        n = min(sample.queries.shape[1] for sample in samples)
        has_labels = any(sample.labelled is not None for sample in samples)
        labelled = [
            torch.ones_like(sample.visible) if sample.labelled is None else sample.labelled for sample in samples
        ]
        return VideoBatch(
            video=torch.cat([sample.video for sample in samples]),
            queries=torch.cat([sample.queries[:, :n] for sample in samples]),
            xy=torch.cat([sample.xy[:, :n] for sample in samples]),
            visible=torch.cat([sample.visible[:, :n] for sample in samples]),
            labelled=torch.cat([mask[:, :n] for mask in labelled]) if has_labels else None,
            names=[name for sample in samples for name in sample.names],
        )


@dataclass
class Tracks:
    """Tracks of one video.

    Attributes:
        xy: (N, T, 2) float32, pixels of the input video.
        visible: (N, T) bool.
        visibility: (N, T) float32 in [0, 1], the confidence behind ``visible``.
        queries: (N, 3) float32, (t, x, y) as they were asked.
    """

    xy: Tensor
    visible: Tensor
    visibility: Tensor
    queries: Tensor


@dataclass
class FrameTracks:
    """The points of one frame, as a stream gives them.

    Attributes:
        frame: index of the frame that the points belong to.
        ids: (N,) int64, the ids that ``TrackerStream.add`` returned.
        xy: (N, 2) float32, pixels of the input frame.
        visible: (N,) bool.
        visibility: (N,) float32 in [0, 1].
    """

    frame: int
    ids: Tensor
    xy: Tensor
    visible: Tensor
    visibility: Tensor
