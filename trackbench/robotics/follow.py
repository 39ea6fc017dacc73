"""Points followed through an episode from places that are known, frame by frame, with a check in reverse.

Frames are read one at a time and in either order, so that the length of an episode costs no memory beyond its
tracks. A stretch is the part of a point's track between two known places (an annotation, a correction), or between
one and the end of the episode.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from trackbench.robotics.track_file import CameraTracks
from trackbench.structures import FrameTracks

CLIP_FRAMES = 600  # how many a tracker that looks at whole videos may hold: 0.5 GiB at 480 x 640
TOGETHER = 32  # frames whose results leave the device at once

Place = tuple[int, NDArray[np.float64]]  # frame, (2,) pixels
Part = tuple[
    NDArray[np.float32], NDArray[np.bool_], NDArray[np.float32]
]  # xy (n, 2), visible (n,), visibility (n,)


class FrameSource(Protocol):
    """Frames of one camera, in any order."""

    num_frames: int
    height: int
    width: int

    def frames(self, order: range) -> Iterator[NDArray[np.uint8]]:
        """(H, W, 3) uint8 RGB, contiguous, one in memory at a time."""


@dataclass(frozen=True)
class Stretch:
    """What is to be tracked, or checked, of one point: frames from ``begin`` up to, not including, ``end``.

    Attributes:
        point: its row.
        begin: the known place that it starts from; None: it is followed backward from ``end`` to frame 0.
        end: the known place that comes next; None: to the end of the episode.
        keep: leave the track as it is and measure its error only.
        join: take the later part from following backward from ``end``, from the frame on where that meets the
            track best.
    """

    point: int
    begin: Place | None
    end: Place | None
    keep: bool = False
    join: bool = False


@dataclass(frozen=True)
class _Run:
    """One point in one pass: from a place to the frame ``stop``, which may lie before it."""

    frame: int
    xy: NDArray[np.float64]
    stop: int


def stretches(tracks: CameraTracks, point: int) -> list[Stretch]:
    """The whole track of a point, from the places that are known of it."""
    places = list(tracks.known_places(point).items())
    ends: list[Place | None] = [*places[1:], None]
    parts = [Stretch(point, begin, end) for begin, end in zip(places, ends, strict=True)]
    return [Stretch(point, None, places[0]), *parts] if places[0][0] > 0 else parts


def follow(
    tracker: Any,
    source: FrameSource,
    tracks: CameraTracks,
    wanted: Sequence[Stretch],
    *,
    clip_frames: int = CLIP_FRAMES,
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Track stretches and measure their forward-backward error.

    Where a stretch is followed from one side, the check starts from its other side: from the known place there, or
    else from the last frame where the point is visible. Known places are taken as they are, and visible. A joined
    stretch keeps the distance of both directions as error: where they differ, either may be wrong.

    Args:
        tracker: any tracker of the project; those that look a limited number of frames ahead go frame by frame.
        source: the frames.
        tracks: its arrays ``xy``, ``visible``, ``visibility`` and ``error`` are changed in place.
        wanted: the stretches.
        clip_frames: how many frames a tracker that looks at whole videos may hold at once.
        progress: called with (frames done, frames in all).

    Raises:
        ValueError: such a tracker, and more frames than that.
    """
    runs = _Passes(tracker, source, clip_frames, wanted, progress)
    after = [stretch for stretch in wanted if stretch.begin is not None]
    before = [stretch for stretch in wanted if stretch.begin is None]
    tracked = [stretch for stretch in after if not stretch.keep]
    for stretch, part in zip(tracked, runs.go([_forward(stretch, source) for stretch in tracked], 1), strict=True):
        _put(tracks, stretch, part)
    _set_known(tracks, wanted)
    backward = runs.go(
        [_check_of(stretch, tracks) for stretch in after] + [_lead_in(stretch) for stretch in before], -1
    )
    for stretch, part in zip(after, backward, strict=False):
        _compare(tracks, stretch, part)
    for stretch, part in zip(before, backward[len(after) :], strict=True):
        _put(tracks, stretch, part)
    _set_known(tracks, wanted)
    for stretch, part in zip(before, runs.go([_check_of(stretch, tracks) for stretch in before], 1), strict=True):
        _compare(tracks, stretch, part)


class _Passes:
    """Passes over the frames, each in one direction, with progress over all of them."""

    def __init__(
        self,
        tracker: Any,
        source: FrameSource,
        clip_frames: int,
        wanted: Sequence[Stretch],
        progress: Callable[[int, int], None] | None,
    ) -> None:
        self.tracker = tracker
        self.source = source
        self.clip_frames = clip_frames
        self._progress = progress
        spans = [_span(stretch, source.num_frames) for stretch in wanted]
        forward = [
            span for span, part in zip(spans, wanted, strict=True) if part.begin is not None and not part.keep
        ]
        lead_ins = [span for span, part in zip(spans, wanted, strict=True) if part.begin is None]
        self.total = sum(_length(group) for group in (forward, spans, lead_ins))
        self.done = 0

    def go(self, runs: Sequence[_Run], direction: int) -> list[Part]:
        """One pass; for each run its results from its own frame to its last."""
        if not runs:
            return []
        first = min(runs, key=lambda run: direction * run.frame).frame
        last = max(runs, key=lambda run: direction * run.stop).stop
        order = range(first, last + direction, direction)
        whole = getattr(self.tracker, "lookahead", 0) is None
        return (self._clip if whole else self._stream)(runs, order)

    def _stream(self, runs: Sequence[_Run], order: range) -> list[Part]:
        parts = [_empty_part(run) for run in runs]
        entering: dict[int, list[int]] = {}
        for index, run in enumerate(runs):
            entering.setdefault(run.frame, []).append(index)
        stream = self.tracker.stream()
        run_of_id: list[int] = []
        waiting: list[FrameTracks] = []
        for t, frame in zip(order, self.source.frames(order), strict=True):
            if t in entering:
                stream.add(np.stack([self._inside(runs[index].xy) for index in entering[t]]))
                run_of_id += entering[t]
            result = stream.step(frame)
            waiting += [] if result is None else [result]
            if len(waiting) == TOGETHER:
                _collect(waiting, order, runs, run_of_id, parts)
            self._tick()
        waiting += stream.finish()
        _collect(waiting, order, runs, run_of_id, parts)
        return parts

    def _clip(self, runs: Sequence[_Run], order: range) -> list[Part]:
        if len(order) > self.clip_frames:
            size = len(order) * self.source.height * self.source.width * 3 / 2**20
            raise ValueError(
                f"this tracker looks at whole videos, and {len(order)} frames ({size:.0f} MiB) are more than the "
                f"{self.clip_frames} of --clip-frames: raise it, or take a tracker that looks a few frames ahead"
            )
        step = order.step
        queries = np.stack([[step * (run.frame - order[0]), *self._inside(run.xy)] for run in runs])
        video = np.stack(list(self.source.frames(order)))
        tracks = self.tracker.track(video, queries)
        self._tick(len(order))
        parts = []
        for row, run in enumerate(runs):
            steps = slice(step * (run.frame - order[0]), step * (run.stop - order[0]) + 1)
            parts.append(
                tuple(part[row, steps].numpy() for part in (tracks.xy, tracks.visible, tracks.visibility))
            )
        return parts

    def _inside(self, xy: NDArray[np.float64]) -> NDArray[np.float32]:
        return np.clip(xy, 0, (self.source.width, self.source.height)).astype(np.float32)

    def _tick(self, n: int = 1) -> None:
        self.done = min(self.done + n, self.total)
        if self._progress is not None:
            self._progress(self.done, self.total)


def _collect(
    waiting: list[FrameTracks], order: range, runs: Sequence[_Run], run_of_id: list[int], parts: list[Part]
) -> None:
    """Results of some frames into the parts that they belong to; ``waiting`` is empty afterwards."""
    if not waiting:
        return
    ids = torch.cat([result.ids for result in waiting]).tolist()
    frames = [order[result.frame] for result in waiting for _ in range(len(result.ids))]
    values = [
        torch.cat([getattr(result, key) for result in waiting]).cpu().numpy()
        for key in ("xy", "visible", "visibility")
    ]
    for row, (index, t) in enumerate(zip(ids, frames, strict=True)):
        run = runs[run_of_id[index]]
        place = abs(t - run.frame)
        if place <= abs(run.stop - run.frame):
            for part, value in zip(parts[run_of_id[index]], values, strict=True):
                part[place] = value[row]
    waiting.clear()


def _forward(stretch: Stretch, source: FrameSource) -> _Run:
    assert stretch.begin is not None
    frame, xy = stretch.begin
    return _Run(frame, xy, _span(stretch, source.num_frames)[1])


def _lead_in(stretch: Stretch) -> _Run:
    assert stretch.end is not None
    frame, xy = stretch.end
    return _Run(frame, xy, 0)


def _check_of(stretch: Stretch, tracks: CameraTracks) -> _Run:
    """In reverse: from the known place at the other side, or the outermost frame where the point is visible."""
    first, last = _span(stretch, tracks.num_frames)
    if stretch.begin is None:
        start = first + int(np.argmax(tracks.visible[stretch.point, first : last + 1]))
        return _Run(start, tracks.xy[stretch.point, start].astype(np.float64), last)
    if stretch.end is not None:
        return _Run(*stretch.end, first)
    start = last - int(np.argmax(tracks.visible[stretch.point, first : last + 1][::-1]))
    return _Run(start, tracks.xy[stretch.point, start].astype(np.float64), first)


def _put(tracks: CameraTracks, stretch: Stretch, part: Part) -> None:
    """A pass's results as the track."""
    first, last = _span(stretch, tracks.num_frames)
    values = part if stretch.begin is not None else tuple(value[::-1] for value in part)
    for array, value in zip((tracks.xy, tracks.visible, tracks.visibility), values, strict=True):
        array[stretch.point, first : last + 1] = value[: last + 1 - first]


def _set_known(tracks: CameraTracks, wanted: Sequence[Stretch]) -> None:
    for stretch in wanted:
        for place in (stretch.begin, stretch.end):
            if place is not None:
                tracks.xy[stretch.point, place[0]] = place[1]
                tracks.visible[stretch.point, place[0]] = True
                tracks.visibility[stretch.point, place[0]] = 1


def _compare(tracks: CameraTracks, stretch: Stretch, part: Part) -> None:
    """The error of a stretch from its check; a stretch that is joined changes."""
    first, last = _span(stretch, tracks.num_frames)
    point = stretch.point
    tracks.error[point, first : last + 1] = np.nan
    xy, visible, visibility = part if stretch.begin is None else tuple(value[::-1] for value in part)
    if stretch.begin is None:
        span = slice(last + 1 - len(xy), last + 1)
    else:
        span = slice(first, min(first + len(xy), last + 1))
        xy, visible, visibility = (value[: span.stop - span.start] for value in (xy, visible, visibility))
    apart = np.linalg.norm(tracks.xy[point, span] - xy, axis=1)
    tracks.error[point, span] = apart
    if stretch.join and stretch.end is not None:
        seam = int(np.argmin(apart))
        later = slice(first + seam, span.stop)
        for array, value in zip(
            (tracks.xy, tracks.visible, tracks.visibility), (xy, visible, visibility), strict=True
        ):
            array[point, later] = value[seam:]


def _span(stretch: Stretch, num_frames: int) -> tuple[int, int]:
    """First and last frame that belong to a stretch; of one that leads to a place, the place is the last."""
    if stretch.begin is None:
        assert stretch.end is not None
        return 0, stretch.end[0]
    return stretch.begin[0], num_frames - 1 if stretch.end is None else stretch.end[0] - 1


def _length(spans: Sequence[tuple[int, int]]) -> int:
    return max(last for _, last in spans) - min(first for first, _ in spans) + 1 if spans else 0


def _empty_part(run: _Run) -> Part:
    n = abs(run.stop - run.frame) + 1
    return np.zeros((n, 2), np.float32), np.zeros(n, bool), np.zeros(n, np.float32)
