"""How far tracks can be trusted without knowing the truth: numbers that rank episodes for review.

A point's score is a product of three parts, each in [0, 1]::

    score = 1 / (1 + (forward_backward_px / tolerance)^2)  *  1 / (1 + jumps)  *  (1 - lost)

with ``tolerance`` = 1% of the frame's diagonal (8 px at 480 x 640). An episode's score is the mean of its worst
point's score and of the average over all points and cameras: the worst point decides most, and every point counts.

The forward-backward error is that of Kalal et al., "Forward-Backward Error: Automatic Detection of Tracking
Failures", ICPR 2010.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

TOLERANCE = 0.01  # of the diagonal: a forward-backward error of so much halves a score
ERROR_SHARE = 90  # percentile of the error over the visible frames: drift shows on some of them only
JUMP_FACTOR = 6.0  # times the usual motion around a frame
JUMP_FLOOR = 0.02  # of the diagonal: no shorter step is a jump
JUMP_WINDOW = 15  # frames whose steps say what motion is usual


@dataclass(frozen=True)
class PointQuality:
    """Quality of one point in one camera.

    Attributes:
        name: of the keypoint.
        score: in [0, 1]; 1: nothing speaks against it.
        forward_backward_px: 90th percentile, over the frames where it is visible, of the distance to where
            tracking in the other direction puts it, pixels.
        jumps: number of steps far beyond the usual motion around them.
        lost: share of frames where it is not visible.
    """

    name: str
    score: float
    forward_backward_px: float
    jumps: int
    lost: float


def rate_points(
    names: Sequence[str],
    xy: NDArray[np.float32],
    visible: NDArray[np.bool_],
    error: NDArray[np.float32],
    height: int,
    width: int,
) -> list[PointQuality]:
    """Rate the points of a camera.

    Args:
        names: K names.
        xy: (K, T, 2), pixels.
        visible: (K, T).
        error: (K, T) forward-backward error, pixels; NaN where it was not measured.
        height: of the frames, pixels.
        width: of the frames, pixels.

    Raises:
        ValueError: shapes that do not belong together.
    """
    K, T = visible.shape
    if xy.shape != (K, T, 2) or error.shape != (K, T) or len(names) != K:
        raise ValueError(
            f"expected {K} names, xy {(K, T, 2)}, error {(K, T)}; got {len(names)}, {xy.shape}, {error.shape}"
        )
    diagonal = math.hypot(height, width)
    rated = []
    for name, path, seen, apart in zip(names, xy, visible, error, strict=True):
        measured = apart[seen & np.isfinite(apart)]
        drift = float(np.percentile(measured, ERROR_SHARE)) if len(measured) else 0.0
        jumps = len(jump_frames(path, seen, diagonal))
        lost = 1 - float(seen.mean())
        score = 1 / (1 + (drift / (TOLERANCE * diagonal)) ** 2) / (1 + jumps) * (1 - lost)
        rated.append(PointQuality(name, score, drift, jumps, lost))
    return rated


def jump_frames(xy: NDArray[np.float32], visible: NDArray[np.bool_], diagonal: float) -> NDArray[np.int64]:
    """Frames at which a point arrived by a jump.

    A step leads from one visible frame to the next visible one; its length per frame counts. It is a jump where
    it is longer than 2% of the diagonal and than six times the median of the steps around it (15 frames).

    Args:
        xy: (T, 2), pixels.
        visible: (T,).
        diagonal: of the frames, pixels.
    """
    frames = np.flatnonzero(visible & np.isfinite(xy).all(axis=1))
    if len(frames) < 2:
        return np.empty(0, np.int64)
    speed = np.linalg.norm(np.diff(xy[frames].astype(np.float64), axis=0), axis=1) / np.diff(frames)
    half = JUMP_WINDOW // 2
    padded = np.pad(speed, half, constant_values=np.nan)
    usual = np.nanmedian(np.lib.stride_tricks.sliding_window_view(padded, JUMP_WINDOW), axis=1)
    return frames[1:][speed > np.maximum(JUMP_FACTOR * usual, JUMP_FLOOR * diagonal)]


def episode_score(points: Sequence[PointQuality]) -> float:
    """The score that ranks an episode, from the points of all its cameras; see the top of this module."""
    if not points:
        raise ValueError("an episode without points has no score")
    scores = [point.score for point in points]
    return (min(scores) + sum(scores) / len(scores)) / 2
