"""EgoPoints: egocentric kitchen videos with points annotated by hand in some of their frames."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import Dataset

from trackbench.data.evaluation_clip import (
    as_max_frames,
    as_resolution,
    decode_image,
    evaluation_item,
    image_size,
    numbered_frames,
    read_npz,
    sequence_folders,
    stack_frames,
)
from trackbench.structures import QueryMode, VideoBatch

ANNOTATIONS = "annot.npz"


class EgoPointsDataset(Dataset[VideoBatch]):
    """EgoPoints (Darkhalil et al., WACV 2025) as published.

    **Files.** ``<path>/<sequence>/rgbs/frame_0000000001.jpg``, ... and ``<sequence>/annot.npz`` with ``trajs_2d``
    (T, N, 2) and, each (T, N) with 0 or 1, ``valids`` (a position is annotated), ``visibs``, ``vis_valids``
    (``visibs`` is annotated), and ``out_of_view``, ``occluded`` and ``dynamic_obj_tracks``, which are not read
    (README of ``AhmadDarKhalil/EgoPoints``).

    **Points.** All of them. An entry with a position counts as visible, whatever ``visibs`` says, as in the
    benchmark's and AllTracker's evaluations, which score all positions. An entry that is annotated as not
    visible counts as hidden. Every other entry is not labelled. A point is asked for where it has its first
    position; the benchmark asks for all of them in frame 0.

    **Coordinates** are taken as raster pixels, since the benchmark scales them by width / width. That
    annotation put the centre of the first pixel at 0.5, and not at 0, is not documented.

    **Which published number this compares with.** ``average_pts_within_thresh`` is the benchmark's ``d_avg``
    (frames of 384 x 512, thresholds 1 to 16 on 256 x 256, all positions after frame 0), where each point has a
    position in frame 0. Its ``d_avg*``, re-identification, in-view and out-of-view accuracies and median
    errors are not computed; its visibility accuracy counts other entries than occlusion accuracy does here.

    Args:
        path: the folder of sequences.
        query_mode: ``first`` as published, or ``strided``.
        resolution: (height, width) that frames and points are scaled to; None: as they are.
        max_frames: only so many from the beginning, for a quick look; None, as published: all.

    Attributes:
        names: the name of each sequence.

    Raises:
        FileNotFoundError: no such folder, or no sequence in it.
        ValueError: an option out of range. When an item is read: annotations or frames that are missing,
            damaged or do not fit each other, a position that is not finite, or no point with a position.
    """

    def __init__(
        self,
        path: str | Path,
        query_mode: QueryMode = "first",
        resolution: Sequence[int] | None = (384, 512),
        max_frames: int | None = None,
    ) -> None:
        self.query_mode: QueryMode = query_mode
        self.resolution = as_resolution(resolution)
        self.max_frames = as_max_frames(max_frames)
        self.folders = sequence_folders(Path(path), (ANNOTATIONS,))
        self.names = [folder.name for folder in self.folders]

    def __len__(self) -> int:
        return len(self.folders)

    def __getitem__(self, index: int) -> VideoBatch:
        folder = self.folders[index]
        file = folder / ANNOTATIONS
        positions, visible, labelled = _read_annotations(file)
        files = numbered_frames(folder / "rgbs", "frame_", 1, len(positions))[: self.max_frames]
        T = len(files)
        H, W = image_size(files[0])
        frames = (decode_image(image, str(image)) for image in files)
        return evaluation_item(
            str(file),
            self.names[index],
            stack_frames(frames, T, self.resolution, str(folder / "rgbs")),
            positions[:T].swapaxes(0, 1) / np.array([W, H], np.float64),
            visible[:T].T,
            labelled[:T].T,
            self.query_mode,
        )


def _read_annotations(file: Path) -> tuple[NDArray[Any], NDArray[np.bool_], NDArray[np.bool_]]:
    """Positions (T, N, 2), 0 where there is none, visible (T, N), labelled (T, N)."""
    names = ("valids", "visibs", "vis_valids")
    arrays = read_npz(file, ("trajs_2d", *names), what="annotation of points")
    positions = arrays["trajs_2d"]
    if positions.ndim != 3 or positions.shape[2] != 2 or positions.dtype.kind not in "fiu":
        raise ValueError(f"{file}: trajs_2d must be (T, N, 2), got {positions.dtype} {positions.shape}")
    for name in names:
        flags = arrays[name]
        if flags.shape != positions.shape[:2] or not np.isin(flags, (0, 1)).all():
            raise ValueError(f"{file}: {name} must be 0 or 1, {positions.shape[:2]}, got {flags.shape}")
    valid, seen, judged = (arrays[name].astype(bool) for name in names)
    if not np.isfinite(positions[valid]).all():
        raise ValueError(f"{file}: trajs_2d must be finite where valids is 1, got NaN or infinity")
    return np.where(valid[..., None], positions, 0), valid, valid | (judged & ~seen)
