"""Which points of a Kubric scene to track, and through which window: the rest of Kubric's ``add_tracks``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from trackbench.data.clip import Clip, Size
from trackbench.data.kubric.projection import Scene, Window, check_scene, decode_depth, project_tracks

CROP_ASPECT = (0.5, 2.0)  # width by height
LEAST_AREA = 0.3  # of the frame, in a crop
CROP_ATTEMPTS = 20
OCCLUDER = 0.95  # of a pixel's depth: what is nearer occludes it
SNAPPED = 0.5  # probability


@dataclass(frozen=True)
class SampledTracks:
    """A video with the tracks of sampled points, in its raster pixels (the centre of the first pixel is 0.5).

    Attributes:
        frames: (T, height, width, 3) uint8, RGB.
        queries: (N, 3) float64, (t, x, y). After snapping a query may lie up to a pixel beside its track.
        xy: (N, T, 2) float64.
        visible: (N, T) bool.
        relative_depth: (N, T) float32, distance to the camera by that of the query.
        window: (y0, x0, y1, x1) of the scene's frames that ``frames`` shows.
    """

    frames: NDArray[np.uint8]
    queries: NDArray[np.float64]
    xy: NDArray[np.float64]
    visible: NDArray[np.bool_]
    relative_depth: NDArray[np.float32]
    window: Window

    def clip(self, name: str = "") -> Clip:
        """Frames and tracks, without the queries."""
        return Clip(self.frames, self.xy, self.visible, name)


def sample_tracks(
    scene: Scene,
    num_tracks: int,
    rng: np.random.Generator,
    *,
    size: Size | None = None,
    stride: int = 4,
    max_sampled_frac: float = 0.1,
    random_crop: bool = False,
    snap_to_occluder: bool = False,
    vertical_flip: bool = False,
    official_quirks: bool = False,
) -> SampledTracks:
    """Sample points of a scene, about as many from each object as from the background, and track them.

    Points are drawn, with replacement, from a grid with a random origin in the window; tracks are in order of
    segment, those of the background also of frame.

    Args:
        scene: see :func:`~trackbench.data.kubric.projection.project_tracks`, and ``video`` (T, H, W, 3) uint8.
            Segments may have any number of ids; the published code refuses ids from its ``max_seg_id`` on.
        num_tracks: at most; fewer where ``max_sampled_frac`` of the grid's points are fewer.
        rng: all that is random; the published crop cannot be seeded.
        size: (height, width) of the result; None: as the scene.
        stride: of the grid, in frames, rows and columns, each of which must be a multiple of it.
        max_sampled_frac: at most this share of the grid's points on an object is sampled.
        random_crop: see :func:`random_window`.
        snap_to_occluder: never sample or see a pixel beside a nearer surface, and move some queries on the edge
            of an occluder one pixel off it, so that what is asked for there is the occluder.
        vertical_flip: turn the video upside down.
        official_quirks: do as the published code where it is wrong: the relative depth of points on objects is
            to the depth of another query, and with ``snap_to_occluder`` that of another pixel, which also
            decides about moving queries, even out of the window; fewer tracks are filled up to ``num_tracks``
            with copies of the last but one (if there are two); a flipped y becomes -y; tracks are in pixels of
            the scene's size whatever ``size`` is; the picture of :func:`crop_frames`; and the focal length of
            :func:`~trackbench.data.kubric.projection.project_tracks`.

    Raises:
        ValueError: as there; a setting is out of range, or T, H or W is no multiple of ``stride``.
    """
    if num_tracks < 1 or stride < 1 or not 0 < max_sampled_frac <= 1 or min(size or (1, 1)) < 1:
        raise ValueError(
            "num_tracks, stride and size must be at least 1 and max_sampled_frac in (0, 1], "
            f"got {num_tracks}, {stride}, {size}, {max_sampled_frac}"
        )
    arrays = check_scene(scene, ["segmentations", "depth", "depth_range", "video"])
    T, H, W = arrays["depth"].shape
    if T % stride or H % stride or W % stride:
        raise ValueError(
            f"scene['video']: expected T, H and W to be multiples of stride {stride}, got {(T, H, W)}"
        )
    if snap_to_occluder:
        scene = {**scene, "segmentations": without_edges(scene)}

    window = random_window(rng, H, W) if random_crop else (0, 0, H, W)
    grid = Grid(np.asarray(scene["segmentations"]), rng.integers(stride, size=3), stride, window)
    budget = track_budget(grid.counts, num_tracks, max_sampled_frac)
    segments = np.repeat(np.arange(len(budget)), budget)
    queries = grid.pixels(segments, rng.integers(grid.counts[segments]))
    in_background = queries[: budget[0]]
    queries[: budget[0]] = in_background[np.argsort(in_background[:, 0], kind="stable")]
    tracks = project_tracks(scene, queries, window, official_quirks=official_quirks)

    depth = decode_depth(arrays["depth"][tuple(queries.T)], arrays["depth_range"])
    if snap_to_occluder:
        jitter = rng.integers(-1, 2, size=(len(queries), 2))
        chosen = rng.random(len(queries)) < SNAPPED
        if official_quirks:
            depth = _misread_depth(arrays, queries)
        queries = _snap(arrays, queries, depth, jitter, chosen, (0, 0, H, W) if official_quirks else window)
    elif official_quirks:  # gathered frame by frame within each object, while tracks stay as drawn
        depth = depth[np.lexsort((queries[:, 0], segments))]

    y0, x0, y1, x1 = window
    height, width = size or (H, W)
    scale = np.array([W, H] if official_quirks else [width, height]) / (x1 - x0, y1 - y0)
    xy = (tracks["xy"] - (x0, y0)) * scale
    points = queries[:, [0, 2, 1]].astype(np.float64)
    points[:, 1:] = (points[:, 1:] + 0.5 - (x0, y0)) * scale
    frames = crop_frames(arrays["video"], window, (height, width), official_quirks)
    if vertical_flip:
        frames = frames[:, ::-1]
        bottom = 0 if official_quirks else height
        xy[..., 1] = bottom - xy[..., 1]
        points[:, 2] = bottom - points[:, 2]
    relative_depth = (tracks["distance"] / depth[:, None]).astype(np.float32)
    rows = np.arange(len(points))
    if official_quirks and 1 < len(rows) < num_tracks:
        rows = np.pad(rows, (0, num_tracks - len(rows)), constant_values=rows[-2])
    return SampledTracks(frames, points[rows], xy[rows], ~tracks["occluded"][rows], relative_depth[rows], window)


def random_window(rng: np.random.Generator, height: int, width: int) -> Window:
    """A crop (y0, x0, y1, x1) of a frame, distributed as TensorFlow's ``sample_distorted_bounding_box``.

    Its aspect is uniform within 0.5 to 2, then its height among those with which it covers 0.3 of the frame at
    least and fits. As there, a crop never touches the bottom or the right edge unless it fills that direction.
    The whole frame where 20 attempts fail.
    """
    for _ in range(CROP_ATTEMPTS):
        aspect = rng.uniform(*CROP_ASPECT)
        least, most = (round(np.sqrt(area * height * width / aspect)) for area in (LEAST_AREA, 1))
        most = min(most, height, int((width + 0.5) / aspect))
        if round(most * aspect) > width:
            most -= 1
        h = int(rng.integers(min(least, most), most, endpoint=True))
        w = round(h * aspect)
        if LEAST_AREA * height * width <= h * w and w <= width:
            y, x = int(rng.integers(max(height - h, 1))), int(rng.integers(max(width - w, 1)))
            return y, x, y + h, x + w
    return 0, 0, height, width


def track_budget(counts: NDArray[Any], num_tracks: int, max_sampled_frac: float = 0.1) -> NDArray[np.int64]:
    """How many points (segments,) to sample on each segment, by its pixels ``counts`` (segments,) on the grid.

    From the smallest to the largest, each gets its equal share of the tracks that remain, limited to
    ``max_sampled_frac`` of its pixels. Rounds to even, in single precision, as the published code does.
    """
    budget = np.zeros(len(counts), np.int64)
    remaining = num_tracks
    for done, segment in enumerate(np.argsort(counts, kind="stable")):
        share = np.rint(np.float32(remaining) * np.float32(1 / (len(counts) - done)))
        limit = np.rint(np.float32(counts[segment]) * np.float32(max_sampled_frac))
        budget[segment] = min(share, limit)
        remaining -= budget[segment]
    return budget


def without_edges(scene: Scene) -> NDArray[np.int16]:
    """Segmentations (T, H, W) with -1 for pixels that have a nearer surface beside them.

    These are pixels with a neighbour, of eight, of less than 0.95 of their own depth.
    """
    arrays = check_scene(scene, ["segmentations", "depth", "depth_range"])
    depth, depth_range = arrays["depth"], arrays["depth_range"]
    segmentations = arrays["segmentations"].astype(np.int16)
    for frame, segments in zip(depth, segmentations, strict=True):
        nearest = np.asarray(cv2.erode(frame, np.ones((3, 3), np.uint8)))
        segments[decode_depth(nearest, depth_range) < OCCLUDER * decode_depth(frame, depth_range)] = -1
    return segmentations


def crop_frames(video: NDArray[Any], window: Window, size: Size, official_quirks: bool = False) -> NDArray[Any]:
    """The window (y0, x0, y1, x1) of frames (T, H, W, 3), resized to (height, width), bilinear without smoothing.

    Keeps the type, uint8 or float32. The published code resizes by corners, not by centres: pixel i shows what is
    at i * scale, so the picture lies up to (1 / scale - 1) / 2 pixels beside the tracks; ``official_quirks`` does
    that.
    """
    y0, x0, y1, x1 = window
    frames = video[:, y0:y1, x0:x1]
    if frames.shape[1:3] == size:
        return frames
    resized = np.empty((len(video), *size, 3), video.dtype)
    if official_quirks:
        for axis, length in enumerate(size, start=1):
            frames = _by_corners(frames, axis, length)
        resized[:] = np.rint(frames) if video.dtype == np.uint8 else frames
        return resized
    for frame, source in zip(resized, frames, strict=True):
        cv2.resize(source, size[::-1], dst=frame, interpolation=cv2.INTER_LINEAR)
    return resized


def _by_corners(frames: NDArray[Any], axis: int, length: int) -> NDArray[np.float32]:
    """Resize one axis of frames (T, H, W, 3), taking pixel i for what is at i."""
    before = frames.shape[axis]
    at = np.arange(length) * (before / length)
    low = at.astype(np.intp)
    lower, upper = (
        frames.take(index, axis).astype(np.float32) for index in (low, np.minimum(low + 1, before - 1))
    )
    share = (at - low).astype(np.float32).reshape([-1 if i == axis else 1 for i in range(4)])
    return np.asarray(lower + (upper - lower) * share)


class Grid:
    """The pixels on a grid over a window, by segment.

    Args:
        segmentations: (T, H, W) integers; negative ones are left out.
        start: (3,), of the grid within the window: frame, row and column.
        stride: in each direction.
        window: (y0, x0, y1, x1).

    Attributes:
        counts: (segments,), pixels of each; at least that of segment 0.
    """

    def __init__(self, segmentations: NDArray[Any], start: NDArray[Any], stride: int, window: Window) -> None:
        y0, x0, y1, x1 = window
        self._start = np.add(start, (0, y0, x0))
        self._stride = stride
        t, y, x = self._start
        segments = segmentations[t::stride, y:y1:stride, x:x1:stride]
        self._shape = segments.shape
        segments = segments.reshape(-1)
        self._order = np.argsort(segments, kind="stable")[np.count_nonzero(segments < 0) :]
        self.counts = np.bincount(segments[self._order].astype(np.intp), minlength=1)

    def pixels(self, segments: NDArray[Any], indices: NDArray[Any]) -> NDArray[np.intp]:
        """The pixels (n, 3), (t, y, x): of each of segments (n,) the one of an index (n,) below its count.

        The pixels of a segment are counted frame by frame, row by row.
        """
        first = np.cumsum(self.counts) - self.counts
        on_grid = np.unravel_index(self._order[first[segments] + indices], self._shape)
        return np.asarray(np.stack(on_grid, axis=1) * self._stride + self._start, np.intp)


def _snap(
    arrays: dict[str, NDArray[Any]],
    queries: NDArray[np.intp],
    depth: NDArray[np.float32],
    jitter: NDArray[Any],
    chosen: NDArray[np.bool_],
    window: Window,
) -> NDArray[np.intp]:
    """Queries (n, 3) of a depth (n,), the chosen moved by jitter (n, 2), rows and columns, where they occlude."""
    y0, x0, y1, x1 = window
    beside = queries.copy()
    beside[:, 1:] = np.clip(queries[:, 1:] + jitter, (y0, x0), (y1 - 1, x1 - 1))
    occluded = decode_depth(arrays["depth"][tuple(beside.T)], arrays["depth_range"])
    return np.where((chosen & (depth < OCCLUDER * occluded))[:, None], beside, queries)


def _misread_depth(arrays: dict[str, NDArray[Any]], queries: NDArray[np.intp]) -> NDArray[np.float32]:
    """The published code's depth of queries (n, 3), which takes rows for columns in row t."""
    _, H, W = arrays["depth"].shape
    t, y, _ = queries.T
    stored = arrays["depth"].reshape(-1).take(t * (H * W) + t * W + y, mode="clip")
    return decode_depth(stored, arrays["depth_range"])
