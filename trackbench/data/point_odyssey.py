"""PointOdyssey: long synthetic videos, each with points that are tracked from its first frame to its last."""

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

ANNOTATIONS = ("anno.npz", "annotations.npz", "annot.npz")  # of version 1.2, and of earlier ones
LEAST_VISIBLE = 8  # frames in which a point must be seen to be evaluated
BORDER = (1, 2)  # pixels: nearer than that to the left and upper, right and lower border a point does not count


class PointOdysseyDataset(Dataset[VideoBatch]):
    """PointOdyssey (Zheng et al., ICCV 2023) as published, with the points that its own evaluation takes.

    **Files.** ``<path>/<split>/<sequence>/rgbs/rgb_00000.jpg``, ... and ``<sequence>/anno.npz`` with
    ``trajs_2d`` (T, N, 2), ``visibs`` and ``valids`` (T, N). Earlier versions have no ``valids``, and flags (named
    ``visibs`` or ``visibilities``) 0 hidden, 1 visible and 2 invalid; they are read as well. Nothing else in
    the files is read.

    **Points**, as ``pointodysseydataset_fullseq.py`` of ``aharley/pips2`` takes them: entries that are not
    valid, not finite, or at the border (x < 1, x > W - 2, the same for y) do not count; a point must be visible
    in frame 0, where it is asked for, and in 8 frames; of these, ``num_points`` evenly spread over their
    order. One version of that loader also drops points that move by 512 pixels in a frame; here they stay.

    **Coordinates** are raster pixels already: the points are projected with the principal point at W / 2
    (``render_single.py`` of ``y-zheng18/point_odyssey``), and pixel floor(x) is looked up for x
    (``utils/gen_tracking.py``).

    **Which published number this compares with.** ``average_pts_within_thresh`` is what Track-On's evaluation
    calls ``d_vis_avg`` (its ``evaluate_po``: 256 points, frames of 384 x 512, visible entries after the
    query). ``d_avg`` of PIPs++, which also counts hidden entries, its survival and median errors are not
    computed. Occlusion accuracy and average Jaccard are not published for this data set.

    **Memory.** Annotations of one sequence, and its frames once they are resized: 0.6 MB a frame of 384 x 512.

    Args:
        path: the folder that holds the splits.
        split: ``test``, ``val``, ``train`` or ``sample``.
        query_mode: ``first`` as published, or ``strided``.
        resolution: (height, width) that frames and points are scaled to; None: as they are.
        num_points: at most; None: all.
        max_frames: only so many from the beginning, for a quick look; None, as published: all.

    Attributes:
        names: the name of each sequence.

    Raises:
        FileNotFoundError: no such split, or no sequence in it.
        ValueError: an option out of range. When an item is read: annotations or frames that are missing,
            damaged or do not fit each other, or no point to evaluate.
    """

    def __init__(
        self,
        path: str | Path,
        split: str = "test",
        query_mode: QueryMode = "first",
        resolution: Sequence[int] | None = (384, 512),
        num_points: int | None = 256,
        max_frames: int | None = None,
    ) -> None:
        if num_points is not None and num_points < 1:
            raise ValueError(f"num_points must be at least 1, got {num_points}")
        self.query_mode: QueryMode = query_mode
        self.resolution = as_resolution(resolution)
        self.num_points = num_points
        self.max_frames = as_max_frames(max_frames)
        self.folders = sequence_folders(Path(path) / split, ANNOTATIONS)
        self.names = [folder.name for folder in self.folders]

    def __len__(self) -> int:
        return len(self.folders)

    def __getitem__(self, index: int) -> VideoBatch:
        folder = self.folders[index]
        file = next((folder / name for name in ANNOTATIONS if (folder / name).is_file()), folder / ANNOTATIONS[0])
        tracks, visible, valid = _read_annotations(file)
        files = numbered_frames(folder / "rgbs", "rgb_", 0, len(tracks))[: self.max_frames]
        T = len(files)
        tracks, visible, valid = tracks[:T], visible[:T], valid[:T]

        H, W = image_size(files[0])
        x, y = tracks[..., 0], tracks[..., 1]  # NaN and infinity fail the comparisons
        near, far = BORDER
        valid &= (x >= near) & (x <= W - far) & (y >= near) & (y <= H - far)
        visible &= valid
        chosen = np.flatnonzero(visible[0] & (visible.sum(axis=0) >= min(LEAST_VISIBLE, T)))
        if not len(chosen):
            raise ValueError(
                f"{file}: none of the {tracks.shape[1]} points is visible in frame 0 and in {LEAST_VISIBLE} frames"
            )
        if self.num_points is not None:
            chosen = chosen[np.linspace(0, len(chosen) - 1, min(len(chosen), self.num_points)).astype(np.int64)]

        labelled = valid[:, chosen].T
        points = tracks[:, chosen].swapaxes(0, 1) / np.array([W, H], np.float64)
        frames = (decode_image(image, str(image)) for image in files)
        return evaluation_item(
            str(file),
            self.names[index],
            stack_frames(frames, T, self.resolution, str(folder / "rgbs")),
            np.where(labelled[..., None], points, 0),
            visible[:, chosen].T,
            labelled,
            self.query_mode,
        )


def _read_annotations(file: Path) -> tuple[NDArray[Any], NDArray[np.bool_], NDArray[np.bool_]]:
    """Positions (T, N, 2), visible (T, N), valid (T, N)."""
    arrays = read_npz(file, ("trajs_2d",), ("visibs", "visibilities", "valids"), what="annotation of points")
    tracks = arrays["trajs_2d"]
    flags = arrays.get("visibs", arrays.get("visibilities"))
    if flags is None:
        raise ValueError(f"{file}: lacks visibs")
    if tracks.ndim != 3 or tracks.shape[2] != 2 or tracks.dtype.kind != "f":
        raise ValueError(f"{file}: trajs_2d must be float (T, N, 2), got {tracks.dtype} {tracks.shape}")
    for name, values in (("visibs", flags), ("valids", arrays.get("valids", flags))):
        if values.shape != tracks.shape[:2] or values.dtype.kind not in "biuf":
            raise ValueError(f"{file}: {name} must be {tracks.shape[:2]}, got {values.dtype} {values.shape}")
    return tracks, flags == 1, arrays["valids"] == 1 if "valids" in arrays else flags < 2
