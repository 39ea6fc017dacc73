"""Scenes with tracks written in the folder format of CoTracker and Track-On."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from uuid import uuid4

import cv2
import numpy as np
from numpy.typing import NDArray

from trackbench.data.clip import Clip, Size
from trackbench.data.prepare.resumable import Piece
from trackbench.data.prepare.shards import spread
from trackbench.data.tfds.scenes import MoviScenes
from trackbench.data.tfds.sequences import NUM_TRACKS, published_clip
from trackbench.data.tfds.storage import Place
from trackbench.files import folder_written_whole, sha256
from trackbench.jobs import advance

_PNG_LEVEL = 3  # of zlib: 7 % larger than Pillow's 6 in a third of the time
_BLOCK = 4096  # bytes of a disk that a file fills to the next multiple


@dataclass(frozen=True)
class FrameConversion:
    """Each scene of a TFDS directory to ``NAME/frames/000.png``, ... and ``NAME/NAME.npy``.

    The settings are those of CoTracker's MOVi-F (its issue 8), see
    :class:`~trackbench.data.tfds.SceneSequences`, of which the result is what a folder holds: it is the same in
    every run. ``NAME.npy`` holds a dict, as a pickled array of objects: ``coords`` (N, T, 2) float32, pixels, and
    ``visibility`` (N, T) bool, True where a point is *occluded*, as in the published files.

    Attributes:
        source: the directory of a version.
        splits: to convert; of several each in a folder of its name.
        num_tracks: per sequence, at most.
        size: (height, width) of the frames; None: as the scenes.
        sequences: of each split: the first scenes, or, if more than those, scenes again with other crops, as the
            published 11,000 are made from fewer scenes; None: one of each scene.
        official_quirks: see :func:`~trackbench.data.kubric.sample_tracks`.
        skip_bad: leave out scenes that cannot be read.
        run: of what is remembered of the source in each process.

    Raises:
        FileNotFoundError: a shard is missing.
        ValueError: a description is damaged, or lacks a split or a feature; a number below 1.
    """

    source: Place
    splits: tuple[str, ...]
    num_tracks: int = NUM_TRACKS
    size: Size | None = None
    sequences: int | None = None
    official_quirks: bool = False
    skip_bad: bool = False
    run: str = field(default_factory=lambda: uuid4().hex)  # a source may change between runs of one process

    def __post_init__(self) -> None:
        if min(self.num_tracks, *(self.size or (1,)), 1 if self.sequences is None else self.sequences) < 1:
            raise ValueError(
                "num_tracks, size and sequences must be at least 1, "
                f"got {self.num_tracks}, {self.size}, {self.sequences}"
            )
        for split in self.splits:
            _scenes(self, split)

    def items(self) -> dict[str, int]:
        """The folders of the sequences, each one piece of work."""
        return dict.fromkeys(_places(self), 1)

    def describe(self) -> str:
        """What there is to convert, one line."""
        scenes = ", ".join(f"{len(_scenes(self, split))} scenes of {split}" for split in self.splits)
        return f"{scenes} to {len(self.items())} sequences"

    def folders(self) -> tuple[str, ...]:
        """Folders that are written to, under that of the result."""
        return self.splits if len(self.splits) > 1 else ()

    def bytes_needed(self) -> int:
        """Estimated from a few sequences of each split.

        Raises:
            ValueError: none of them can be read.
        """
        total = 0
        for split in self.splits:
            scenes = _scenes(self, split)
            numbers = [number for place, number in _places(self).values() if place == split]
            sizes, error = [], None
            for index in spread(len(numbers)):
                try:
                    sizes.append(_bytes_of(self._clip(scenes, numbers[index])))
                except ValueError as reason:  # reported when its turn comes
                    error = reason
            if error is not None and not sizes:
                raise error
            total += len(numbers) * sum(sizes) // max(len(sizes), 1)
        return total

    def make(self, out: Path, item: str) -> Piece:
        """Write a sequence.

        Raises:
            OSError: the source cannot be read, or the result not written.
        """
        split, number = _places(self)[item]
        advance()
        try:
            clip = self._clip(_scenes(self, split), number)
        except ValueError as error:
            shutil.rmtree(out / item, ignore_errors=True)  # what an earlier run may have written
            return Piece(item, {}, {}, (str(error),))
        with folder_written_whole(out / item) as folder:
            write_sequence(folder, clip, (out / item).name)
        files = sorted(path for path in (out / item).rglob("*") if path.is_file())
        return Piece(item, {path.relative_to(out).as_posix(): sha256(path) for path in files})

    def finish(self, out: Path, pieces: Mapping[str, Piece]) -> list[str]:
        """Nothing stands beside the sequences."""
        return []

    def _clip(self, scenes: MoviScenes, number: int) -> Clip:
        return published_clip(scenes, number, self.num_tracks, self.size, self.official_quirks)


def write_sequence(folder: Path, clip: Clip, name: str) -> None:
    """Write ``frames/000.png``, ... and ``NAME.npy`` into an existing folder."""
    (folder / "frames").mkdir()
    for t, frame in enumerate(clip.frames):
        (folder / "frames" / f"{t:03}.png").write_bytes(_png(frame))
    content = {"coords": clip.xy.astype(np.float32), "visibility": ~clip.visible}  # its name notwithstanding
    np.save(folder / f"{name}.npy", np.array(content, dtype=object), allow_pickle=True)


def _png(frame: NDArray[np.uint8]) -> bytes:
    parameters = [cv2.IMWRITE_PNG_COMPRESSION, _PNG_LEVEL]
    done, content = cv2.imencode(".png", cv2.cvtColor(frame, cv2.COLOR_RGB2BGR), parameters)
    if not done:
        raise ValueError(f"cannot write a frame of {frame.shape} as PNG")
    return content.tobytes()


def _bytes_of(clip: Clip) -> int:
    sizes = [len(_png(frame)) for frame in clip.frames]
    sizes.append(clip.xy.size * 4 + clip.visible.size)
    return sum(-(-size // _BLOCK) * _BLOCK for size in sizes)


@lru_cache(maxsize=8)
def _scenes(conversion: FrameConversion, split: str) -> MoviScenes:
    return MoviScenes(conversion.source, split, verify=True)


@lru_cache(maxsize=2)
def _places(conversion: FrameConversion) -> dict[str, tuple[str, int]]:
    """Split and number of each sequence."""
    places = {}
    for split in conversion.splits:
        count = len(_scenes(conversion, split)) if conversion.sequences is None else conversion.sequences
        digits = max(4, len(str(count - 1)))
        for number in range(count):
            name = f"{number:0{digits}}"
            places[f"{split}/{name}" if len(conversion.splits) > 1 else name] = (split, number)
    return places
