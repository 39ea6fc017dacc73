"""What evaluation data sets share: frames at the size of the benchmark, and an item with its queries."""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Iterable, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

import mediapy
import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from trackbench.data.queries import sample_queries
from trackbench.structures import QueryMode, VideoBatch

Resolution = tuple[int, int]
Frames = Iterable[NDArray[np.uint8]]


def as_resolution(sides: Sequence[int] | None) -> Resolution | None:
    """(height, width), also from the list that a config file gives."""
    if sides is None:
        return None
    if len(sides) != 2 or min(sides) < 1:
        raise ValueError(f"resolution must be (height, width) in pixels, got {sides}")
    return int(sides[0]), int(sides[1])


def as_max_frames(count: int | None) -> int | None:
    """A number of frames to keep of a video, or None for all."""
    if count is not None and count < 1:
        raise ValueError(f"max_frames must be at least 1, got {count}")
    return count


def resized(frame: NDArray[np.uint8], resolution: Resolution | None) -> NDArray[np.uint8]:
    """An (H, W, 3) frame at (height, width) by Pillow's Lanczos filter; None leaves it as it is."""
    if resolution is None or frame.shape[:2] == resolution:
        return frame
    return mediapy.resize_image(frame, resolution)


def stack_frames(frames: Frames, num_frames: int, resolution: Resolution | None, where: str) -> Tensor:
    """(T, 3, height, width) uint8 from (H, W, 3) frames, taken one at a time; only resized ones are kept.

    Raises:
        ValueError: there are not ``num_frames`` of them, or they differ in size before they are resized.
    """
    video: Tensor | None = None
    count, size = 0, (0, 0)
    for frame in frames:
        count += 1
        size = size if count > 1 else frame.shape[:2]
        if frame.shape[:2] != size:
            raise ValueError(f"{where}: expected frames of one size, got {size} and {frame.shape[:2]}")
        if count > num_frames:
            continue  # how many there are is said below
        image = resized(frame, resolution)
        if video is None:
            video = torch.empty((num_frames, 3, *image.shape[:2]), dtype=torch.uint8)
        video[count - 1] = torch.from_numpy(image).permute(2, 0, 1)
    if video is None or count != num_frames:
        raise ValueError(f"{where}: expected {num_frames} frames as in its points, got {count}")
    return video


def evaluation_item(
    where: str,
    name: str,
    video: Tensor,
    points: NDArray[Any],
    visible: NDArray[np.bool_],
    labelled: NDArray[np.bool_] | None,
    query_mode: QueryMode,
) -> VideoBatch:
    """One video of a benchmark with its queries.

    Args:
        where: file of the annotations, for errors.
        name: of the video.
        video: (T, 3, H, W) uint8.
        points: (N, T, 2) floating point, x and y as parts of the width and the height: 1.0 is the right or
            lower edge.
        visible: (N, T).
        labelled: (N, T), what is queried and scored; None: everything.
        query_mode: see :func:`~trackbench.data.queries.sample_queries`.

    Raises:
        ValueError: there is no point to query in the mode ``first``.
    """
    H, W = video.shape[2:]
    xy = points.astype(np.float64) * (W, H)
    try:
        queries, tracks = sample_queries(xy, visible, query_mode, labelled=labelled)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error
    return VideoBatch(
        video=video[None],
        queries=torch.from_numpy(queries.astype(np.float32))[None],
        xy=torch.from_numpy(xy[tracks].astype(np.float32))[None],
        visible=torch.from_numpy(visible[tracks])[None],
        labelled=None if labelled is None else torch.from_numpy(labelled[tracks])[None],
        names=[name],
    )


def as_flags(values: NDArray[Any], shape: tuple[int, ...], what: str) -> NDArray[np.bool_]:
    """Bool from bool or integers of that shape."""
    if values.shape != shape or values.dtype.kind not in "biu":
        raise ValueError(f"{what} must be bool {shape}, got {values.dtype} {values.shape}")
    return values.astype(bool)


def decode_image(source: Path | BytesIO, where: str) -> NDArray[np.uint8]:
    """(H, W, 3) from a JPEG or PNG; grey becomes three equal channels.

    Raises:
        ValueError: it is damaged or something else.
    """
    try:
        with Image.open(source, formats=("JPEG", "PNG")) as image:
            return np.array(image.convert("RGB"))
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:  # Pillow's for damaged files
        raise ValueError(f"{where} is not a readable JPEG: {error}") from error


def image_size(file: Path) -> Resolution:
    """(H, W) of an image, from its header.

    Raises:
        ValueError: as :func:`decode_image`.
    """
    try:
        with Image.open(file, formats=("JPEG", "PNG")) as image:
            return image.height, image.width
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"{file} is not a readable JPEG: {error}") from error


def read_npz(
    file: Path, required: Sequence[str], optional: Sequence[str] = (), what: str = "annotated clip"
) -> dict[str, NDArray[Any]]:
    """Arrays of an ``.npz`` file; the others in it are not read, and no pickle is.

    Raises:
        ValueError: it is missing or damaged, or lacks one of ``required``.
    """
    try:
        with file.open("rb") as opened, np.lib.npyio.NpzFile(opened, allow_pickle=False) as archive:
            missing = sorted(set(required) - set(archive.files))
            if missing:
                raise ValueError(f"it lacks {', '.join(missing)}")
            return {key: archive[key] for key in (*required, *optional) if key in archive.files}
    except (OSError, RuntimeError, ValueError, zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(f"{file}: not a readable {what}: {error}") from error


def numbered_frames(folder: Path, prefix: str, first: int, num_frames: int) -> list[Path]:
    """``PREFIX<number>.jpg`` in ``folder``, by number, which counts from ``first``.

    Raises:
        ValueError: a file of another name, a gap, or other than ``num_frames`` files.
    """
    numbers: dict[int, Path] = {}
    for file in folder.glob("*.jpg"):
        number = file.stem.removeprefix(prefix)
        if not (file.stem.startswith(prefix) and number.isascii() and number.isdigit()):
            raise ValueError(f"{file}: expected a name such as {prefix}{first:05}.jpg")
        numbers[int(number)] = file
    if len(numbers) != num_frames or not numbers:
        raise ValueError(f"{folder}: expected {num_frames} frames as in the annotations, got {len(numbers)}")
    missing = next((number for number in range(first, first + num_frames) if number not in numbers), None)
    if missing is not None:
        raise ValueError(f"{folder}: expected frames {first} to {first + num_frames - 1}, got no {missing}")
    return [numbers[number] for number in sorted(numbers)]


def sequence_folders(folder: Path, annotations: Sequence[str]) -> list[Path]:
    """The folders in ``folder``, one per sequence, in order of name.

    Args:
        folder: of the sequences.
        annotations: names that a sequence's annotation file may have.

    Raises:
        FileNotFoundError: no such folder, or none of them has a file of a name in ``annotations``.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such folder")
    folders = sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
    if not any((sequence / name).is_file() for sequence in folders for name in annotations):
        raise FileNotFoundError(f"{folder}: expected folders SEQUENCE with SEQUENCE/{annotations[0]}")
    return folders
