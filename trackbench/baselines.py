"""Classical baselines with the interface of a tracker: pyramidal Lucas-Kanade, and standing still.

Both need neither weights nor a GPU. They say what a benchmark is worth: a learned tracker that does not beat
Lucas-Kanade has learned little, and a score near that of standing still says nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from os import PathLike
from pathlib import Path
from typing import Literal

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from trackbench.structures import FrameTracks, Tracks
from trackbench.tracker import Progress, check_queries

Video = np.ndarray | Tensor | str | PathLike[str]
Points = np.ndarray | Tensor
FloatArray = NDArray[np.float32]
BoolArray = NDArray[np.bool_]
_Follow = Callable[
    [NDArray[np.uint8], NDArray[np.uint8], FloatArray, BoolArray], tuple[FloatArray, BoolArray, BoolArray]
]

PIXEL_CENTRE = 0.5  # OpenCV puts the centre of the first pixel at 0, the raster convention at 0.5


class BaselineStream:
    """Frame-by-frame tracking, with points that come and go, as a learned tracker offers it.

    Args:
        follow: (frame before, frame, xy (n, 2), active (n,) bool) -> (xy, visible, active) in the frame; all
            NumPy, frames uint8 (H, W, 3), xy in pixels. An inactive point never moves again.
    """

    def __init__(self, follow: _Follow) -> None:
        self._follow = follow
        self._before: NDArray[np.uint8] | None = None
        self._frame = 0
        self._next_id = 0
        self._ids = np.empty(0, np.int64)
        self._xy = np.empty((0, 2), np.float32)
        self._active = np.empty(0, bool)
        self._new = 0  # points at the end of the arrays that enter with the next frame

    def add(self, points_xy: Points) -> Tensor:
        """Let points (n, 2), in pixels, enter at the frame of the next :meth:`step`; returns ids (n,)."""
        points = torch.as_tensor(points_xy, dtype=torch.float32).cpu()
        if points.ndim != 2 or points.shape[1] != 2 or not bool(points.isfinite().all()):
            raise ValueError(f"points must be finite (n, 2), got {tuple(points.shape)}")
        n = len(points)
        ids = np.arange(self._next_id, self._next_id + n)
        self._next_id += n
        self._new += n
        self._ids = np.concatenate([self._ids, ids])
        self._xy = np.concatenate([self._xy, points.numpy()])
        self._active = np.concatenate([self._active, np.ones(n, bool)])
        return torch.from_numpy(ids)

    def drop(self, ids: Tensor | list[int]) -> None:
        """Forget points."""
        keep = ~np.isin(self._ids, np.asarray(ids))
        self._new = int(keep[len(keep) - self._new :].sum())
        self._ids, self._xy, self._active = self._ids[keep], self._xy[keep], self._active[keep]

    def step(self, frame: np.ndarray | Tensor) -> FrameTracks:
        """Advance by one frame (H, W, 3) uint8; the points of that frame."""
        image = _as_frame(frame)
        visible = np.ones(len(self._ids), bool)
        old = slice(0, len(self._ids) - self._new)
        if self._before is not None:
            if image.shape != self._before.shape:
                raise ValueError(f"frame is {image.shape}, the frames before it were {self._before.shape}")
            self._xy[old], visible[old], self._active[old] = self._follow(
                self._before, image, self._xy[old], self._active[old]
            )
        self._before, self._new = image, 0
        self._frame += 1
        seen = torch.from_numpy(visible)
        return FrameTracks(
            frame=self._frame - 1,
            ids=torch.from_numpy(self._ids.copy()),
            xy=torch.from_numpy(self._xy.copy()),
            visible=seen,
            visibility=seen.float(),
        )

    def finish(self) -> list[FrameTracks]:
        """The video has ended: nothing was held back, so this is empty."""
        return []


class Static:
    """Every point stays where it was asked, and is always visible: the floor of any benchmark."""

    causal = False

    def track(
        self,
        video: Video,
        queries: Points,
        *,
        both_directions: bool = False,
        progress: Progress | None = None,
    ) -> Tracks:
        """Repeat each query position over the video; see :meth:`LucasKanade.track` for shapes.

        ``both_directions`` changes nothing: frames before a query get its position as well.
        """
        frames = _as_frames(video)
        asked = check_queries(queries, *frames.shape[:3])
        xy = asked[:, None, 1:].expand(-1, len(frames), -1).clone()
        if progress is not None:
            progress(len(frames), len(frames))
        visible = torch.ones(xy.shape[:2], dtype=torch.bool)
        return Tracks(xy=xy, visible=visible, visibility=visible.float(), queries=asked)

    def stream(self) -> BaselineStream:
        """A new stream of points that stand still."""
        return BaselineStream(lambda before, frame, xy, active: (xy, np.ones(len(xy), bool), active))


class LucasKanade:
    """Pyramidal Lucas-Kanade with a forward-backward check, by OpenCV.

    Each point is followed from frame to frame at the full size of the video. It counts as visible where
    following it back lands within ``max_error`` pixels of its start.

    Bouguet, "Pyramidal Implementation of the Lucas Kanade Feature Tracker", 2000; the check is that of
    Kalal et al., "Forward-Backward Error", ICPR 2010.

    Args:
        window: side of the square search window, in pixels.
        levels: pyramid levels above the full image.
        max_error: largest forward-backward error of a visible point, in pixels of the video.
        when_lost: what happens to a point that fails the check. ``"follow"``: it is hidden in this frame,
            keeps moving with the flow, and shows again when the check holds again; ``"hold"``: it stays
            where it last was and is hidden to the end.

    Raises:
        ValueError: when an argument is out of range.
    """

    causal = True

    def __init__(
        self,
        window: int = 21,
        levels: int = 4,
        max_error: float = 1.5,
        when_lost: Literal["follow", "hold"] = "follow",
    ) -> None:
        if window < 3 or levels < 0 or max_error <= 0:
            raise ValueError(
                f"window must be >= 3, levels >= 0, max_error > 0, got {window}, {levels}, {max_error}"
            )
        if when_lost not in ("follow", "hold"):
            raise ValueError(f"when_lost must be 'follow' or 'hold', got {when_lost!r}")
        self.window = window
        self.levels = levels
        self.max_error = max_error
        self.when_lost = when_lost

    def track(
        self,
        video: Video,
        queries: Points,
        *,
        both_directions: bool = False,
        progress: Progress | None = None,
    ) -> Tracks:
        """Track points through a clip.

        Args:
            video: (T, H, W, 3) uint8 RGB, or the path of a video.
            queries: (N, 3), (t, x, y) in frames and pixels.
            both_directions: also run backwards in time for the frames before each query. Otherwise a point
                stands at its query, invisible, until its time has come.
            progress: called with (frames done, frames in all).

        Returns:
            Tracks in pixels of ``video``, float32, on the CPU.

        Raises:
            ValueError: when a shape is wrong or a query lies outside the clip.
        """
        frames = _as_frames(video)
        asked = check_queries(queries, *frames.shape[:3])
        start = asked[:, :1].floor()
        runs = 2 if both_directions and bool((start > 0).any()) else 1
        tracks = self._run(frames, asked, _part_of(progress, 0, runs))
        if runs == 2:
            mirrored = torch.cat([len(frames) - 1 - start, asked[:, 1:]], dim=1)
            backward = self._run(frames[::-1], mirrored, _part_of(progress, 1, runs))
            before = torch.arange(len(frames)) < start
            tracks.xy = torch.where(before[..., None], backward.xy.flip(1), tracks.xy)
            tracks.visible = torch.where(before, backward.visible.flip(1), tracks.visible)
            tracks.visibility = tracks.visible.float()
        return tracks

    def stream(self) -> BaselineStream:
        """A new stream; equal to :meth:`track` forwards in time."""
        return BaselineStream(self._follow)

    def _run(self, frames: NDArray[np.uint8], queries: Tensor, progress: Progress | None) -> Tracks:
        T = len(frames)
        xy = queries[:, None, 1:].repeat(1, T, 1)
        visible = torch.zeros(xy.shape[:2], dtype=torch.bool)
        stream = self.stream()
        row_of_id = torch.empty(0, dtype=torch.int64)
        for t in range(T):
            rows = torch.nonzero(queries[:, 0].floor() == t)[:, 0]
            if len(rows):
                stream.add(queries[rows, 1:])
                row_of_id = torch.cat([row_of_id, rows])
            points = stream.step(frames[t])
            xy[row_of_id, t] = points.xy
            visible[row_of_id, t] = points.visible
            if progress is not None:
                progress(t + 1, T)
        return Tracks(xy=xy, visible=visible, visibility=visible.float(), queries=queries)

    def _follow(
        self, before: NDArray[np.uint8], frame: NDArray[np.uint8], xy: FloatArray, active: BoolArray
    ) -> tuple[FloatArray, BoolArray, BoolArray]:
        """One step of :class:`BaselineStream`."""
        xy, visible, active = xy.copy(), np.zeros(len(xy), bool), active.copy()
        rows = np.flatnonzero(active)
        if not len(rows):
            return xy, visible, active
        H, W = frame.shape[:2]
        moved, error = self._flow(_grey(before), _grey(frame), xy[rows] - PIXEL_CENTRE)
        moved += PIXEL_CENTRE
        found = (error < self.max_error) & ((moved >= 0) & (moved <= (W, H))).all(axis=1)
        if self.when_lost == "hold":
            active[rows[~found]] = False
            rows, moved = rows[found], moved[found]
            visible[rows] = True
        else:
            visible[rows] = found
        xy[rows] = moved
        return xy, visible, active

    def _flow(
        self, before: NDArray[np.uint8], after: NDArray[np.uint8], xy: FloatArray
    ) -> tuple[FloatArray, FloatArray]:
        """Points (n, 2), first pixel centre 0, in the next frame, and their forward-backward error (n,)."""
        start = xy[:, None]
        size = (self.window, self.window)
        # without a flag OpenCV ignores the initial guess that its type stubs insist on
        moved, there, _ = cv2.calcOpticalFlowPyrLK(
            before, after, start, start.copy(), winSize=size, maxLevel=self.levels
        )
        returned, back, _ = cv2.calcOpticalFlowPyrLK(
            after, before, moved, moved.copy(), winSize=size, maxLevel=self.levels
        )
        error = np.linalg.norm((returned - start)[:, 0], axis=1)
        error[(there[:, 0] != 1) | (back[:, 0] != 1)] = np.inf
        return moved[:, 0].astype(np.float32), error.astype(np.float32)


def _as_frames(video: Video) -> NDArray[np.uint8]:
    if isinstance(video, str | PathLike):
        from trackbench.data.video_io import read_video

        return read_video(Path(video))
    frames = video.cpu().numpy() if isinstance(video, Tensor) else np.asarray(video)
    if frames.ndim != 4 or frames.shape[-1] != 3 or frames.dtype != np.uint8 or not frames.size:
        raise ValueError(f"video must be uint8 (T, H, W, 3) with pixels, got {frames.dtype} {frames.shape}")
    return frames


def _as_frame(frame: np.ndarray | Tensor) -> NDArray[np.uint8]:
    image = frame.cpu().numpy() if isinstance(frame, Tensor) else np.asarray(frame)
    if image.ndim != 3 or image.shape[-1] != 3 or image.dtype != np.uint8:
        raise ValueError(f"frame must be uint8 (H, W, 3), got {image.dtype} {image.shape}")
    return np.ascontiguousarray(image)


def _grey(image: NDArray[np.uint8]) -> NDArray[np.uint8]:
    return cv2.cvtColor(image, cv2.COLOR_RGB2GRAY).astype(np.uint8, copy=False)


def _part_of(progress: Progress | None, part: int, parts: int) -> Progress | None:
    """Report one of several equal runs as a part of the whole."""
    if progress is None:
        return None
    return lambda done, total: progress(part * total + done, parts * total)
