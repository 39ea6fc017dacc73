"""Tracks drawn over a video: dots, trails, errors to the ground truth; contact sheets.

Coordinates are raster coordinates (the centre of the first pixel is 0.5); OpenCV's pixel centres are whole
numbers, which is allowed for here, with sub-pixel precision.
"""

from __future__ import annotations

import colorsys
import math
from collections.abc import Iterable, Iterator, Sequence
from os import PathLike
from pathlib import Path

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from trackbench.structures import Tracks, VideoBatch

Frames = NDArray[np.uint8]
Colour = tuple[int, int, int]

SUBPIXEL_BITS = 4
OUTLINE: Colour = (20, 20, 20)
ERROR: Colour = (255, 255, 255)
HUE_RANGE = 0.83  # from red to violet: the full circle would end in red again


def overlay(
    video: np.ndarray | Tensor,
    tracks: Tracks,
    *,
    gt: Tracks | None = None,
    trail: int = 8,
    radius: float | None = None,
    zoom: int = 1,
) -> Frames:
    """Draw tracks over a video.

    A visible point is a filled dot with a trail, an occluded one a ring. Points have the colours of the
    rainbow, from the top of the frame to its bottom as they were asked. Before its query a point is drawn
    only where it is visible; positions that are not finite are not drawn.

    Args:
        video: (T, H, W, 3) uint8 RGB; not changed.
        tracks: what is drawn, in pixels of ``video``.
        gt: ground truth of the same points: a thin line joins each point that is visible there to where it
            should be.
        trail: frames that a trail goes back; 0: none.
        radius: of the dots in pixels of the result; None: fitting for its size.
        zoom: enlarge the video so many times, for small ones.

    Returns:
        (T, zoom * H, zoom * W, 3) uint8 RGB.

    Raises:
        ValueError: when the shapes do not belong together, or a setting is out of range.
    """
    frames = _as_video(video)
    _points(tracks, len(frames), "tracks")
    drawn = np.empty((len(frames), zoom * frames.shape[1], zoom * frames.shape[2], 3), np.uint8)
    pictures = overlay_frames(frames, tracks, gt=gt, trail=trail, radius=radius, zoom=zoom)
    for t, picture in enumerate(pictures):
        drawn[t] = picture
    return drawn


def overlay_frames(
    frames: Iterable[Frames],
    tracks: Tracks,
    *,
    gt: Tracks | None = None,
    trail: int = 8,
    radius: float | None = None,
    zoom: int = 1,
    colours: Sequence[Colour] | None = None,
) -> Iterator[Frames]:
    """:func:`overlay` of a video that arrives frame by frame; one frame is in memory at a time.

    Args:
        frames: T of (H, W, 3) uint8 RGB; not changed.
        tracks: as for :func:`overlay`, like the settings.
        gt: ground truth.
        trail: frames that a trail goes back.
        radius: of the dots.
        zoom: enlarge.
        colours: of the points; None: the rainbow, from top to bottom.

    Yields:
        (zoom * H, zoom * W, 3) uint8 RGB.

    Raises:
        ValueError: as :func:`overlay`, when the first frame is asked for; at the end, where ``frames`` were not
            as many as the tracks have.
    """
    T = tracks.xy.shape[1]
    xy, visible = _points(tracks, T, "tracks")
    truth = None if gt is None else _points(gt, T, "gt")
    if truth is not None and truth[0].shape != xy.shape:
        raise ValueError(f"gt must hold the points of tracks, {xy.shape}, got {truth[0].shape}")
    if trail < 0 or zoom < 1:
        raise ValueError(f"trail must be >= 0 and zoom >= 1, got {trail} and {zoom}")
    if radius is not None and radius <= 0:
        raise ValueError(f"radius must be > 0, got {radius}")
    colours = rainbow(tracks.queries) if colours is None else colours
    asked = tracks.queries[:, 0].floor().cpu().numpy()
    shown = np.isfinite(xy).all(axis=2) & (visible | (np.arange(T) >= asked[:, None]))
    xy = np.nan_to_num(xy * zoom)
    count = 0
    for t, frame in enumerate(frames):
        if t == T:
            raise ValueError(f"the video has more frames than the tracks, {T}")
        size = radius if radius is not None else max(2.0, 0.013 * zoom * min(frame.shape[:2]))
        limit = 4.0 * zoom * max(frame.shape[:2])  # far outside; OpenCV takes 32-bit integers only
        if t == 0:
            xy = np.clip(xy, -limit, limit)
        picture = _enlarged(frame, zoom)
        picture = picture.copy() if picture is frame else picture
        _draw_trails(picture, xy, visible & shown, t, trail, size, colours)
        if truth is not None:
            _draw_errors(picture, xy[:, t], truth[0][:, t] * zoom, shown[:, t] & truth[1][:, t], limit)
        for point in np.flatnonzero(shown[:, t]).tolist():
            _draw_dot(picture, xy[point, t], size, colours[point], bool(visible[point, t]))
        count += 1
        yield picture
    if count != T:
        raise ValueError(f"the video has {count} frames, the tracks {T}")


def save_overlay(
    path: str | PathLike[str],
    video: np.ndarray | Tensor,
    tracks: Tracks,
    *,
    fps: float = 24,
    gt: Tracks | None = None,
    trail: int = 8,
    zoom: int = 1,
) -> None:
    """Write :func:`overlay` as an ``.mp4`` that browsers play."""
    from trackbench.data.video_io import write_video

    write_video(Path(path), overlay(video, tracks, gt=gt, trail=trail, zoom=zoom), fps=fps)


def ground_truth(batch: VideoBatch, index: int = 0) -> Tracks:
    """The true tracks of one video of a batch; entries that are not labelled become NaN and invisible."""
    xy, visible = batch.xy[index].clone(), batch.visible[index].clone()
    if batch.labelled is not None:
        xy[~batch.labelled[index]] = torch.nan
        visible &= batch.labelled[index]
    return Tracks(xy=xy, visible=visible, visibility=visible.float(), queries=batch.queries[index])


def contact_sheet(frames: np.ndarray, columns: int, *, gap: int = 4, background: int = 255) -> Frames:
    """Lay frames out in rows, from left to right.

    Args:
        frames: (K, H, W, 3) uint8.
        columns: frames per row.
        gap: between frames, in pixels.
        background: grey of the gaps and of missing frames.

    Returns:
        (rows * (H + gap) - gap, columns * (W + gap) - gap, 3) uint8.

    Raises:
        ValueError: without frames or columns, or with a negative gap.
    """
    pictures = _as_video(frames)
    if columns < 1 or gap < 0:
        raise ValueError(f"columns must be >= 1 and gap >= 0, got {columns} and {gap}")
    K, H, W, _ = pictures.shape
    columns = min(columns, K)
    rows = math.ceil(K / columns)
    sheet = np.full((rows * (H + gap) - gap, columns * (W + gap) - gap, 3), background, np.uint8)
    for k, picture in enumerate(pictures):
        top, left = (k // columns) * (H + gap), (k % columns) * (W + gap)
        sheet[top : top + H, left : left + W] = picture
    return sheet


def rainbow(queries: Tensor) -> list[Colour]:
    """One RGB colour per query (N, 3): the rainbow, in the order of y (then x), evenly spread."""
    x, y = queries[:, 1].cpu().numpy(), queries[:, 2].cpu().numpy()
    rank = np.empty(len(y), int)
    rank[np.lexsort((x, y))] = np.arange(len(y))
    colours = spectrum(len(y))
    return [colours[place] for place in rank]


def spectrum(count: int) -> list[Colour]:
    """``count`` RGB colours of the rainbow, evenly spread from red to violet."""
    return [_rgb(HUE_RANGE * place / max(count - 1, 1)) for place in range(count)]


def _rgb(hue: float) -> Colour:
    red, green, blue = colorsys.hsv_to_rgb(hue, 0.85, 1.0)
    return round(255 * red), round(255 * green), round(255 * blue)


def _as_video(video: np.ndarray | Tensor) -> Frames:
    frames = video.cpu().numpy() if isinstance(video, Tensor) else np.asarray(video)
    if frames.ndim != 4 or frames.shape[-1] != 3 or frames.dtype != np.uint8 or not frames.size:
        raise ValueError(f"frames must be uint8 (T, H, W, 3) with pixels, got {frames.dtype} {frames.shape}")
    return frames


def _points(tracks: Tracks, num_frames: int, name: str) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    xy, visible = tracks.xy.cpu().numpy().astype(np.float64), tracks.visible.cpu().numpy()
    if xy.shape[1] != num_frames or visible.shape != xy.shape[:2] or len(tracks.queries) != len(xy):
        raise ValueError(
            f"{name} must be (N, {num_frames}, 2) with visible (N, {num_frames}) and N queries, got "
            f"{xy.shape}, {visible.shape} and {len(tracks.queries)} queries"
        )
    return xy, visible


def _enlarged(frame: Frames, zoom: int) -> Frames:
    if zoom == 1:
        return frame
    return cv2.resize(frame, None, fx=zoom, fy=zoom, interpolation=cv2.INTER_CUBIC).astype(np.uint8, copy=False)


def _draw_trails(
    image: Frames,
    xy: NDArray[np.float64],
    visible: NDArray[np.bool_],
    t: int,
    trail: int,
    radius: float,
    colours: Sequence[Colour],
) -> None:
    """Lines through the frames before ``t`` where a point is visible, fading with age. Changes ``image``."""
    if trail == 0 or t == 0:
        return
    lines, opacity = image.copy(), np.zeros(image.shape[:2], np.uint8)
    thickness = max(1, round(0.6 * radius))
    for before in range(max(0, t - trail), t):
        strength = round(255 * (1 - (t - before - 1) / trail))
        for point in np.flatnonzero(visible[:, before] & visible[:, before + 1]).tolist():
            ends = _fixed(xy[point, before]), _fixed(xy[point, before + 1])
            cv2.line(lines, *ends, colours[point], thickness, cv2.LINE_AA, SUBPIXEL_BITS)
            cv2.line(opacity, *ends, (strength,), thickness, cv2.LINE_AA, SUBPIXEL_BITS)
    share = opacity[..., None].astype(np.uint16)
    image[:] = ((255 - share) * image + share * lines + 127) // 255


def _draw_errors(
    image: Frames, xy: NDArray[np.float64], truth: NDArray[np.float64], shown: NDArray[np.bool_], limit: float
) -> None:
    """Thin lines from points to where they should be. Changes ``image``."""
    for point in np.flatnonzero(shown & np.isfinite(truth).all(axis=1)):
        ends = _fixed(xy[point]), _fixed(np.clip(truth[point], -limit, limit))
        cv2.line(image, *ends, ERROR, 1, cv2.LINE_AA, SUBPIXEL_BITS)


def _draw_dot(image: Frames, xy: NDArray[np.float64], radius: float, colour: Colour, filled: bool) -> None:
    """A dot or a ring, outlined so that it shows on any ground. Changes ``image``."""
    centre = _fixed(xy)
    if filled:
        cv2.circle(image, centre, _fixed_length(radius + 0.8), OUTLINE, cv2.FILLED, cv2.LINE_AA, SUBPIXEL_BITS)
        cv2.circle(image, centre, _fixed_length(radius), colour, cv2.FILLED, cv2.LINE_AA, SUBPIXEL_BITS)
    else:
        thickness = max(1, round(0.3 * radius))
        radius *= 1.15
        cv2.circle(image, centre, _fixed_length(radius), OUTLINE, thickness + 1, cv2.LINE_AA, SUBPIXEL_BITS)
        cv2.circle(image, centre, _fixed_length(radius), colour, thickness, cv2.LINE_AA, SUBPIXEL_BITS)


def _fixed(xy: NDArray[np.float64]) -> tuple[int, int]:
    """Raster coordinates -> OpenCV's fixed point, whose pixel centres are whole numbers."""
    return round((float(xy[0]) - 0.5) * 2**SUBPIXEL_BITS), round((float(xy[1]) - 0.5) * 2**SUBPIXEL_BITS)


def _fixed_length(length: float) -> int:
    return round(length * 2**SUBPIXEL_BITS)
