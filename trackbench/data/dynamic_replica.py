"""Dynamic Replica: synthetic rooms with people and animals that move, and tracks of points on their meshes."""

from __future__ import annotations

import gzip
import json
import operator
import os
import pickle
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import Dataset

from trackbench.data.evaluation_clip import as_max_frames, as_resolution, evaluation_item, stack_frames
from trackbench.files import inside
from trackbench.structures import QueryMode, VideoBatch

CAMERA = "left"
LEAST_VISIBLE = 11  # frames in which a point must be seen to be evaluated


class DynamicReplicaDataset(Dataset[VideoBatch]):
    """Dynamic Replica (Karaev et al., CVPR 2023) as published, evaluated as CoTracker and Track-On do.

    **Files.** ``<path>/<split>/frame_annotations_<split>.jgz``, a gzipped JSON list with ``sequence_name``,
    ``frame_number``, ``camera_name`` and ``trajectories.path`` of each frame. The path, relative to
    ``<path>/<split>``, is that of a ``.pth`` file with ``img`` (H, W, 3) uint8, ``traj_2d`` (N, 2 or more) and
    ``verts_inds_vis`` (N,) bool; its tensors are read and no other pickle is run (``weights_only``). Other
    files of the data set need not be there.

    **Points**, as ``dr_dataset.py`` of ``facebookresearch/co-tracker`` takes them: the left camera; the first
    300 frames; ``num_points`` of all points at random; outside of the frame (x < 0, x > W - 1, the same for y)
    they are hidden; those that are seen in more than 10 frames are kept. Which points are drawn depends on
    ``seed`` and the sequence; the published draw is not reproducible.

    **Coordinates** are raster pixels already: the cameras have their principal point at W / 2 (loaders of
    ``facebookresearch/dynamic_stereo``), and public code that projects the points with them reports to find
    ``traj_2d`` within 0.000 pixels.

    **Which published number this compares with.** ``average_pts_within_thresh`` is CoTracker's
    ``accuracy_vis``, but for two things. There each point is asked for in frame 0, even where it is hidden or
    off screen; here where it is first seen, since no tracker can find what it was not shown. And there
    distances are scaled by 255 / (W - 1), here by 256 / W (0.3 % more). So expect published numbers to be
    lower. ``accuracy_occ``, ``accuracy`` and ``survival`` are not computed.

    **Memory.** One frame at its full size, the drawn points, and frames once they are resized: 0.6 MB a frame of
    384 x 512.

    Args:
        path: the folder that holds the splits.
        split: ``valid`` as published, ``test`` or ``train``.
        query_mode: ``first`` or ``strided``.
        resolution: (height, width) that frames and points are scaled to; None: as they are.
        num_points: that are drawn, before those are dropped that are hardly seen; None: all.
        max_frames: of a sequence, from its beginning; None: all.
        seed: of the draw.

    Attributes:
        names: the name of each sequence, in the order of the annotations.

    Raises:
        FileNotFoundError: no annotations of this split.
        ValueError: an option out of range, or damaged annotations. When an item is read: a ``.pth`` file that is
            missing, damaged, of another structure or outside ``path``, a visible point without a position, or
            no point to evaluate.
    """

    def __init__(
        self,
        path: str | Path,
        split: str = "valid",
        query_mode: QueryMode = "first",
        resolution: Sequence[int] | None = (384, 512),
        num_points: int | None = 256,
        max_frames: int | None = 300,
        seed: int = 0,
    ) -> None:
        if num_points is not None and num_points < 1:
            raise ValueError(f"num_points must be at least 1, got {num_points}")
        self.root = Path(path) / split
        self.query_mode: QueryMode = query_mode
        self.resolution = as_resolution(resolution)
        self.num_points = num_points
        self.max_frames = as_max_frames(max_frames)
        self.seed = seed
        self.annotations = self.root / f"frame_annotations_{split}.jgz"
        self._sequences = _read_annotations(self.annotations)
        self.names = list(self._sequences)

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> VideoBatch:
        name = self.names[index]
        try:
            files = [inside(self.root, file) for file in self._sequences[name][: self.max_frames]]
        except ValueError as error:
            raise ValueError(f"{self.annotations}: {error}") from error
        where = f"{self.annotations}: {name}"
        positions: list[NDArray[np.float64]] = []
        flags: list[NDArray[np.bool_]] = []
        size = (0, 0)

        def frames() -> Iterator[NDArray[np.uint8]]:
            nonlocal size
            chosen = np.empty(0, np.int64)
            num_points = 0
            for file in files:
                image, xy, visible = _read_frame(file)
                if not positions:
                    size, num_points = image.shape[:2], len(xy)
                    order = np.random.default_rng([self.seed, index]).permutation(num_points)
                    chosen = np.sort(order[: self.num_points])
                if len(xy) != num_points:
                    raise ValueError(f"{file}: expected {num_points} points as in frame 0, got {len(xy)}")
                positions.append(xy[chosen])
                flags.append(visible[chosen])
                yield image

        video = stack_frames(frames(), len(files), self.resolution, where)
        xy, visible = np.stack(positions, axis=1), np.stack(flags, axis=1)
        H, W = size
        visible &= ((xy >= 0) & (xy <= (W - 1, H - 1))).all(axis=2)
        kept = visible.sum(axis=1) >= min(LEAST_VISIBLE, len(files))
        if not kept.any():
            raise ValueError(f"{where}: none of {len(kept)} points is seen in {LEAST_VISIBLE} frames")
        points, visible = xy[kept] / (W, H), visible[kept]
        return evaluation_item(where, name, video, points, visible, None, self.query_mode)


def _read_annotations(file: Path) -> dict[str, list[str]]:
    """Sequence -> the paths of its trajectories, one per frame of the left camera, in order."""
    try:
        with gzip.open(file, "rt", encoding="utf-8") as opened:
            frames = json.load(opened)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{file}: no such file; expected the annotations of a split") from error
    except (OSError, EOFError, ValueError, zlib.error) as error:
        raise ValueError(f"{file}: not readable annotations of frames: {error}") from error
    sequences: dict[str, dict[int, str]] = {}
    try:
        for frame in frames:
            if frame["camera_name"] == CAMERA:
                paths = sequences.setdefault(frame["sequence_name"], {})
                paths[operator.index(frame["frame_number"])] = os.fspath(frame["trajectories"]["path"])
    except (KeyError, TypeError) as error:
        raise ValueError(
            f"{file}: expected a list of frames with sequence_name, frame_number, camera_name and "
            f"trajectories.path, got {error!r}"
        ) from error
    if not sequences:
        raise ValueError(f"{file}: no frame of the {CAMERA} camera")
    for name, paths in sequences.items():
        if sorted(paths) != list(range(len(paths))):
            raise ValueError(f"{file}: {name} must have the frames 0 to {len(paths) - 1}, one or more are missing")
    return {name: [paths[number] for number in sorted(paths)] for name, paths in sequences.items()}


def _read_frame(file: Path) -> tuple[NDArray[np.uint8], NDArray[np.float64], NDArray[np.bool_]]:
    """Image (H, W, 3), positions (N, 2), 0 where a hidden point has none, visible (N,)."""
    try:
        content: Any = torch.load(file, map_location="cpu", weights_only=True)
        image, xy, visible = (content[name].numpy() for name in ("img", "traj_2d", "verts_inds_vis"))
    except (  # damaged, a pickle of other things, or something else inside
        *(OSError, RuntimeError, EOFError, ValueError, pickle.UnpicklingError),
        *(KeyError, TypeError, IndexError, AttributeError),
    ) as error:
        raise ValueError(
            f"{file}: not a readable frame with img, traj_2d and verts_inds_vis: {error!r}"
        ) from error
    if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8:
        raise ValueError(f"{file}: img must be uint8 (H, W, 3), got {image.dtype} {image.shape}")
    if xy.ndim != 2 or xy.shape[1] < 2 or xy.dtype.kind != "f":
        raise ValueError(f"{file}: traj_2d must be float (N, 2 or more), got {xy.dtype} {xy.shape}")
    if visible.shape != xy.shape[:1] or visible.dtype.kind not in "biu":
        raise ValueError(
            f"{file}: verts_inds_vis must be bool {xy.shape[:1]}, got {visible.dtype} {visible.shape}"
        )
    xy, visible = xy[:, :2].astype(np.float64), visible.astype(bool)
    finite = np.isfinite(xy).all(axis=1)
    if (visible & ~finite).any():
        raise ValueError(f"{file}: traj_2d of visible points must be finite, got NaN or infinity")
    return image, np.where(finite[:, None], xy, 0), visible
