"""Reviewed tracks as clips for evaluation, in TAP-Vid's terms (Doersch et al., NeurIPS 2022).

Points are parts of the width and the height, x first; a point that is not visible, or outside the frame, is
occluded. ``.npz`` clips hold JPEGs, for ``benchmark=tapvid_files``; pickles hold a dict of one video as TAP-Vid
and RoboTAP publish them, with exact pixels.
"""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from trackbench.files import written_whole
from trackbench.robotics.episodes import EpisodeFile
from trackbench.robotics.track_file import CameraTracks

Container = Literal["npz", "pickle"]

SUFFIXES: dict[Container, str] = {"npz": ".npz", "pickle": ".pkl"}
JPEG_QUALITY = 95
LARGEST_VIDEO = 4 * 2**30  # bytes of a pickle's video, which is in memory at once


def clip_name(episode: str, camera: int) -> str:
    """The name of a camera's clip: a file's name, without folders."""
    return f"{episode.replace('/', '__')}_cam{camera}"


def write_clip(
    path: Path, name: str, episode: EpisodeFile, camera: int, tracks: CameraTracks, container: Container
) -> None:
    """Write a camera's images and tracks as a clip.

    Args:
        path: where to.
        name: of the clip.
        episode: open.
        camera: its index.
        tracks: of the camera.
        container: "npz" (one frame in memory at a time, and all JPEGs), or "pickle" (all frames in memory).

    Raises:
        ValueError: no point is ever visible, an unknown container, damaged images; a pickle of more than 4 GiB.
    """
    if container not in get_args(Container):
        raise ValueError(f"container must be one of {', '.join(get_args(Container))}, got {container!r}")
    size = np.array([episode.width, episode.height], np.float32)
    inside = ((tracks.xy >= 0) & (tracks.xy <= size)).all(axis=-1)
    occluded = ~(tracks.visible & inside)
    if occluded.all():
        raise ValueError(f"cam{camera}: no keypoint is ever visible, so there is nothing to evaluate")
    annotation: dict[str, Any] = {"points": tracks.xy / size, "occluded": occluded}
    with written_whole(path) as unfinished:
        if container == "npz":
            jpegs = [_jpeg(image) for image in episode.frames(camera)]
            np.savez(
                unfinished,
                jpeg_blob=np.frombuffer(b"".join(jpegs), np.uint8),
                jpeg_offsets=np.cumsum([0, *map(len, jpegs)]),
                **annotation,
                names=np.array(tracks.names),
            )
        else:
            video = _stacked(episode, camera)
            with unfinished.open("wb") as file:
                pickle.dump({name: {"video": video, **annotation}}, file, protocol=5)


def _jpeg(image: NDArray[np.uint8]) -> bytes:
    file = BytesIO()
    Image.fromarray(image).save(file, format="JPEG", quality=JPEG_QUALITY, subsampling=0)
    return file.getvalue()


def _stacked(episode: EpisodeFile, camera: int) -> NDArray[np.uint8]:
    shape = (episode.num_frames, episode.height, episode.width, 3)
    if np.prod(shape, dtype=np.int64) > LARGEST_VIDEO:
        raise ValueError(f"{episode.path}: a pickle of {np.prod(shape) / 2**30:.1f} GiB; use the container npz")
    video = np.empty(shape, np.uint8)
    frames: Iterator[Any] = episode.frames(camera)
    for t, image in enumerate(frames):
        video[t] = image
    return video
