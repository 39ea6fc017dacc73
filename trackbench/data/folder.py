"""Sequences in the folder format in which CoTracker and Track-On publish Kubric's MOVi-F with tracks."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from trackbench.data.clip import Clip
from trackbench.data.safe_pickle import PickledArray, load_npy_dict


@dataclass(frozen=True)
class TrackedSequence:
    """One sequence, its frames still in their files.

    Attributes:
        folder: where it lies; its name is the sequence's.
        files: T PNG files, in order.
        xy: (N, T, 2) floating point as it is stored, pixels.
        visible: (N, T) bool.
    """

    folder: Path
    files: list[Path]
    xy: NDArray[np.floating[Any]]
    visible: NDArray[np.bool_]

    @property
    def num_frames(self) -> int:
        """T."""
        return len(self.files)

    def clip(self, start: int, num_frames: int) -> Clip:
        """Decode the frames from ``start`` on.

        Raises:
            ValueError: the sequence is too short, a frame is not a readable PNG, or frames differ in size.
        """
        stop = start + num_frames
        if not 0 <= start < stop <= len(self.files):
            raise ValueError(
                f"{self.folder}: expected at least {stop} frames from {start} on, it has {len(self.files)}"
            )
        first = _read_png(self.files[start])
        frames = np.empty((num_frames, *first.shape), np.uint8)
        frames[0] = first
        for t in range(1, num_frames):
            file = self.files[start + t]
            frame = _read_png(file)
            if frame.shape != first.shape:
                raise ValueError(
                    f"{file}: is {frame.shape[:2]} (height, width), the frames before it are {first.shape[:2]}"
                )
            frames[t] = frame
        xy = self.xy[:, start:stop].astype(np.float64)
        return Clip(frames, xy, self.visible[:, start:stop], self.folder.name)


class TrackFolder:
    """The sequences under ``<root>``, each a folder ``<name>``, in order of name.

    ``<name>/frames/*.png`` are the frames, numbered without a gap (``000.png``, ...), and ``<name>/<name>.npy``
    holds a dict with ``coords`` (N, T, 2), x and y in pixels, and ``visibility`` (N, T) bool. Despite its name
    ``visibility`` is True where a point is *occluded*: so it is in the data of CoTracker and of Track-On, and
    both loaders negate it. The pickle inside the ``.npy`` is parsed, not run.

    CoTracker3's Kubric set (``facebook/CoTracker3_Kubric`` on the Hugging Face hub: 5869 sequences of 120
    frames, 512x512, 32768 tracks) has the same layout, one archive ``NAME.tar.gz`` per sequence: unpack each,
    ``for file in *.tar.gz; do tar -xzf "$file"; done``. What it has more (``camera``, ``depth``,
    ``segmentations`` and ``coords_depth`` in the dict, ``NAME/depths/*.npy``) stays in the files; of the frames
    only those of a clip are decoded.

    Args:
        root: the folder of sequences.

    Raises:
        FileNotFoundError: there is no such folder, or no folder in it, as before its archives are unpacked.
        ValueError: when a sequence is read: its annotations are missing, damaged or of another shape, or there
            is not one frame for each of their T.
    """

    def __init__(self, root: str | Path) -> None:
        self.root = Path(root)
        if not self.root.is_dir():
            raise FileNotFoundError(f"{self.root}: no such folder")
        self.names = sorted(
            path.name for path in self.root.iterdir() if path.is_dir() and not path.name.startswith(".")
        )
        if not self.names:
            packed = ", got archives: unpack each of them first" if any(self.root.glob("*.tar*")) else ""
            raise FileNotFoundError(
                f"{self.root}: expected folders NAME with NAME/frames and NAME/NAME.npy{packed}"
            )

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> TrackedSequence:
        name = self.names[index]
        folder = self.root / name
        xy, visible = _read_annotations(folder / f"{name}.npy")
        files = _numbered(folder / "frames")
        if len(files) != xy.shape[1]:
            raise ValueError(
                f"{folder / 'frames'}: expected {xy.shape[1]} frames as in {name}.npy, got {len(files)}"
            )
        return TrackedSequence(folder, files, xy, visible)


def _read_annotations(file: Path) -> tuple[NDArray[np.floating[Any]], NDArray[np.bool_]]:
    try:
        content = load_npy_dict(file, lazy=True)
    except FileNotFoundError as error:
        raise ValueError(f"{file}: no such file; expected a dict of coords and visibility") from error
    missing = {"coords", "visibility"} - content.keys()
    if missing:
        raise ValueError(f"{file}: lacks {', '.join(sorted(missing))}")
    coords, occluded = (
        value.load() if isinstance(value, PickledArray) else np.asarray(value)
        for value in (content["coords"], content["visibility"])
    )
    if coords.ndim != 3 or coords.shape[2] != 2 or coords.dtype.kind != "f":
        raise ValueError(f"{file}: coords must be float (N, T, 2), got {coords.dtype} {coords.shape}")
    if occluded.shape != coords.shape[:2] or occluded.dtype.kind not in "biu":
        raise ValueError(
            f"{file}: visibility must be bool {coords.shape[:2]}, got {occluded.dtype} {occluded.shape}"
        )
    visible = ~occluded.astype(bool)
    finite = np.isfinite(coords).all(axis=2)
    if (visible & ~finite).any():
        raise ValueError(f"{file}: coords of visible points must be finite, got NaN or infinity")
    coords[~finite] = 0  # an unseen point may have no position (behind the camera); no loss looks at it
    return coords, visible


def _numbered(folder: Path) -> list[Path]:
    """The PNG files of a folder by number."""
    files = {file: file.stem for file in folder.glob("*.png")}
    for file, stem in files.items():
        if not (stem.isascii() and stem.isdigit()):
            raise ValueError(f"{file}: expected a number as its name, such as 000.png")
    ordered = sorted(files, key=lambda file: int(file.stem))
    if not ordered:
        raise ValueError(f"{folder}: expected frames 000.png, 001.png, ..., got none")
    numbers = [int(file.stem) for file in ordered]
    for file, number, before in zip(ordered[1:], numbers[1:], numbers, strict=False):
        if number != before + 1:
            raise ValueError(f"{file}: expected frame {before + 1} after frame {before}, got {number}")
    return ordered


def _read_png(file: Path) -> NDArray[np.uint8]:
    try:
        with Image.open(file, formats=("PNG",)) as image:
            return np.array(image.convert("RGB"))
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:  # Pillow's for damaged files
        raise ValueError(f"{file}: not a readable PNG: {error}") from error
