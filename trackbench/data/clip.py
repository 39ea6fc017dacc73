"""A training clip on its way from a file to a batch: all its tracks, and the choice among them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from trackbench.structures import VideoBatch

Size = tuple[int, int]


@dataclass(frozen=True)
class Clip:
    """One video with its tracks, in raster coordinates (the centre of the first pixel is 0.5).

    Attributes:
        frames: (T, H, W, 3) uint8, RGB.
        xy: (N, T, 2) float64, pixels.
        visible: (N, T) bool.
        name: for messages and logs.
    """

    frames: NDArray[np.uint8]
    xy: NDArray[np.float64]
    visible: NDArray[np.bool_]
    name: str = ""

    def __post_init__(self) -> None:
        if self.frames.ndim != 4 or self.frames.shape[3] != 3 or self.frames.dtype != np.uint8:
            raise ValueError(
                f"{self.name}: frames must be uint8 (T, H, W, 3), got {self.frames.dtype} {self.frames.shape}"
            )
        T, N = len(self.frames), len(self.xy)
        if self.xy.shape != (N, T, 2):
            raise ValueError(f"{self.name}: xy must be (N, {T}, 2), got {self.xy.shape}")
        if self.visible.shape != (N, T) or self.visible.dtype != bool:
            raise ValueError(
                f"{self.name}: visible must be bool {(N, T)}, got {self.visible.dtype} {self.visible.shape}"
            )

    @property
    def size(self) -> Size:
        """(H, W)."""
        return self.frames.shape[1], self.frames.shape[2]


def centre_crop(clip: Clip, size: Size) -> Clip:
    """The middle (height, width) of the frames; half a pixel of an odd margin goes right and down.

    Raises:
        ValueError: the frames are smaller.
    """
    (H, W), (height, width) = clip.size, size
    if height > H or width > W:
        raise ValueError(f"{clip.name}: frames of {H}x{W} are smaller than the crop of {height}x{width}")
    top, left = (H - height) // 2, (W - width) // 2
    frames = clip.frames[:, top : top + height, left : left + width]
    return replace(clip, frames=frames, xy=clip.xy - (left, top))


def hide_outside(clip: Clip, with_border: bool = False) -> Clip:
    """Points outside the frame become invisible.

    Pixel i covers [i, i + 1), so x = W is outside; ``with_border`` counts it as inside, as Track-On does.
    """
    H, W = clip.size
    x, y = clip.xy[..., 0], clip.xy[..., 1]
    inside = (x >= 0) & (y >= 0) & ((x <= W) & (y <= H) if with_border else (x < W) & (y < H))
    return replace(clip, visible=clip.visible & inside)


def choose_points(clip: Clip, num_points: int, rng: np.random.Generator | None) -> Clip:
    """Up to ``num_points`` of the tracks that are visible in frame 0: at random, or the first without ``rng``."""
    chosen = np.flatnonzero(clip.visible[:, 0])
    if rng is not None:
        chosen = rng.permutation(chosen)
    chosen = chosen[:num_points]
    return replace(clip, xy=clip.xy[chosen], visible=clip.visible[chosen])


def as_batch(clip: Clip, query_frames: NDArray[Any], num_points: int) -> VideoBatch:
    """A batch of one video with ``num_points`` points.

    Points that are missing are padded: invisible, at (0, 0), not labelled, so that they carry no loss, and
    asked for in the last frame, so that a head that lets queries see each other does not show them to the
    rest before.

    Args:
        clip: with N <= ``num_points`` tracks.
        query_frames: (N,), the frame of each track's query.
        num_points: of the batch.

    Returns:
        ``labelled`` is None where nothing was padded.
    """
    N, T = clip.visible.shape
    xy = np.zeros((num_points, T, 2), np.float32)
    visible = np.zeros((num_points, T), bool)
    queries = np.zeros((num_points, 3), np.float32)
    xy[:N], visible[:N] = clip.xy, clip.visible
    queries[:N, 0], queries[N:, 0] = query_frames, T - 1
    queries[:N, 1:] = xy[np.arange(N), query_frames]
    labelled = np.broadcast_to(np.arange(num_points)[:, None] < N, (num_points, T))
    return VideoBatch(
        video=torch.from_numpy(np.ascontiguousarray(clip.frames.transpose(0, 3, 1, 2)))[None],
        queries=torch.from_numpy(queries)[None],
        xy=torch.from_numpy(xy)[None],
        visible=torch.from_numpy(visible)[None],
        labelled=None if num_points == N else torch.from_numpy(labelled.copy())[None],
        names=[clip.name],
    )
