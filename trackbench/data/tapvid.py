"""Evaluation data: the TAP-Vid benchmarks in their published files, and annotated clips in ``.npz`` files.

Every item is one video as a :class:`~trackbench.structures.VideoBatch` with B = 1. The files store points in
[0, 1]; here they become pixels, 1.0 being the right or lower edge (x = W), as in the official loaders.
"""

from __future__ import annotations

import itertools
import logging
from collections import Counter
from collections.abc import Iterable, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as pl
import numpy as np
from numpy.typing import NDArray
from torch.utils.data import DataLoader, Dataset

from trackbench.data.evaluation_clip import (
    Frames,
    Resolution,
    as_flags,
    as_resolution,
    decode_image,
    evaluation_item,
    read_npz,
    resized,
    stack_frames,
)
from trackbench.data.loading import evaluation_loader, ranks
from trackbench.data.manifest import Manifest
from trackbench.data.safe_pickle import PickledArray, PickledBytes, load_pickle
from trackbench.structures import QueryMode, VideoBatch

log = logging.getLogger(__name__)

TapVidName = Literal["davis", "rgb_stacking", "kinetics", "robotap"]

FILES: dict[str, str] = {
    "davis": "tapvid_davis.pkl",
    "rgb_stacking": "tapvid_rgb_stacking.pkl",
    "kinetics": "[0-9][0-9][0-9][0-9]_of_[0-9][0-9][0-9][0-9].pkl",
    "robotap": "robotap_split*.pkl",
}


class TapVidDataset(Dataset[VideoBatch]):
    """TAP-Vid DAVIS, RGB-Stacking and Kinetics (Doersch et al., NeurIPS 2022) and RoboTAP.

    **Memory.** Opening reads where each video lies in its file, not the videos; an item then reads one video.
    So one video is in memory at a time, for the shards of Kinetics too. Frames are decoded and resized one by
    one.

    **Order.** Files by name; in a file, dicts by key and lists by index. A video's name is its key, or
    ``FILE:INDEX`` where the file has no keys; a key that occurs in two files becomes ``FILE:KEY``. Kinetics
    from ``trackbench prepare kinetics`` has its YouTube ids and times as names, from its manifest.

    Args:
        dataset: ``davis``, ``rgb_stacking``, ``kinetics`` or ``robotap``.
        path: one of its ``.pkl`` files, or the folder that holds them.
        query_mode: ``first`` or ``strided``, see :func:`~trackbench.data.queries.sample_queries`. In
            ``strided`` a track is repeated for each of its queries.
        resolution: (height, width) that videos and points are scaled to, (256, 256) being the benchmark's;
            None keeps the videos as they are.

    Attributes:
        names: the name of each video.
        about: what every result must state, see :class:`~trackbench.data.manifest.Manifest`; empty without one.

    Raises:
        FileNotFoundError: nothing at ``path``, or no file of this data set in it.
        UnsafePickleError: a file asks for anything but plain data and numpy arrays.
        ValueError: a damaged file, one of another structure, or shards that are not those of their manifest.
            Also when an item is read: a video that does not fit its points, a frame that is not an image, or,
            in mode ``first``, a video without any visible point.
    """

    def __init__(
        self,
        dataset: TapVidName,
        path: str | Path,
        query_mode: QueryMode = "first",
        resolution: Sequence[int] | None = (256, 256),
    ) -> None:
        if dataset not in FILES:
            raise ValueError(f"dataset must be one of {', '.join(FILES)}, got {dataset!r}")
        self.dataset = dataset
        self.query_mode: QueryMode = query_mode
        self.resolution = as_resolution(resolution)
        files = _find_files(Path(path), FILES[dataset])
        entries = [entry for file in files for entry in _videos_in(file)]
        how_often = Counter(key for _, key, _ in entries)
        self.names = [
            str(key) if isinstance(key, str) and how_often[key] == 1 else f"{file.stem}:{key}"
            for file, key, _ in entries
        ]
        self.about: dict[str, int | str] = {}
        manifest = Manifest.read(files[0].parent) if dataset == "kinetics" else None
        if manifest is not None and (Path(path).is_dir() or files[0].name in manifest.files):
            of_videos = [file for file, _, _ in entries]
            self.names = manifest.names_of(files, of_videos, complete=Path(path).is_dir())
            self.about = manifest.about
            log.info("%s: %d of the %d videos of the benchmark", path, len(entries), manifest.num_annotated)
        self._videos = [(f"{file}: video {key!r}", video) for file, key, video in entries]

    def __len__(self) -> int:
        return len(self._videos)

    def __getitem__(self, index: int) -> VideoBatch:
        where, video = self._videos[index]
        missing = {"video", "points", "occluded"} - video.keys()
        if missing:
            raise ValueError(f"{where} lacks {', '.join(sorted(missing))}")
        return _evaluation_item(
            where,
            self.names[index],
            _frames(video["video"], where),
            points=_loaded(video["points"]),
            occluded=_loaded(video["occluded"]),
            labelled=None,
            query_mode=self.query_mode,
            resolution=self.resolution,
        )


class TapVidFilesDataset(Dataset[VideoBatch]):
    """Clips with point annotations, one ``.npz`` file each; one clip is in memory at a time.

    A file holds ``jpeg_blob`` uint8 and ``jpeg_offsets`` (T + 1,): frame t is the JPEG, colour or grey, at
    ``jpeg_blob[jpeg_offsets[t]:jpeg_offsets[t + 1]]``; ``points`` (N, T, 2), x and y in [0, 1]; ``occluded``
    (N, T) bool; and perhaps ``labelled`` (N, T) bool, the entries that were annotated: only they are queried
    and scored. A clip's name is that of its file.

    Args:
        path: an ``.npz`` file, or a folder of them (in order of name).
        query_mode: as for :class:`TapVidDataset`.
        resolution: as for :class:`TapVidDataset`.

    Attributes:
        names: the name of each clip.

    Raises:
        FileNotFoundError: nothing at ``path``, or no ``.npz`` file in it.
        ValueError: when an item is read: a damaged file, a missing array, arrays that do not belong together,
            or, in mode ``first``, no point that is ever labelled and visible.
    """

    def __init__(
        self,
        path: str | Path,
        query_mode: QueryMode = "first",
        resolution: Sequence[int] | None = (256, 256),
    ) -> None:
        self.query_mode: QueryMode = query_mode
        self.resolution = as_resolution(resolution)
        self.files = _find_files(Path(path), "*.npz")
        self.names = [file.stem for file in self.files]

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> VideoBatch:
        file = self.files[index]
        arrays = read_npz(
            file, required=("jpeg_blob", "jpeg_offsets", "points", "occluded"), optional=("labelled",)
        )
        return _evaluation_item(
            str(file),
            self.names[index],
            _decode_all(_cut(arrays["jpeg_blob"], arrays["jpeg_offsets"], file), str(file)),
            points=arrays["points"],
            occluded=arrays["occluded"],
            labelled=arrays.get("labelled"),
            query_mode=self.query_mode,
            resolution=self.resolution,
        )


class TapVidDataModule(pl.LightningDataModule):
    """An evaluation data set for ``Trainer.validate``, ``test`` and ``predict``, one video per batch.

    With several processes the videos are shared out here, so the trainer must not do it again: give it
    ``use_distributed_sampler=False``.

    Args:
        dataset: ``davis``, ``rgb_stacking``, ``kinetics``, ``robotap``, or ``files`` for annotated clips.
        path: as for :class:`TapVidDataset` or :class:`TapVidFilesDataset`.
        query_mode: ``first`` or ``strided``.
        resolution: (height, width), or None to keep the videos as they are.
        num_workers: processes that read ahead; each holds up to two videos more.
    """

    def __init__(
        self,
        dataset: TapVidName | Literal["files"],
        path: str | Path,
        query_mode: QueryMode = "first",
        resolution: Sequence[int] | None = (256, 256),
        num_workers: int = 0,
    ) -> None:
        super().__init__()
        self.dataset = dataset
        self.path = path
        self.query_mode: QueryMode = query_mode
        self.resolution = as_resolution(resolution)
        self.num_workers = num_workers
        self.videos: TapVidDataset | TapVidFilesDataset | None = None

    def setup(self, stage: str | None = None) -> None:
        """Open the files."""
        if self.videos is not None:
            return
        if self.dataset == "files":
            self.videos = TapVidFilesDataset(self.path, self.query_mode, self.resolution)
        else:
            self.videos = TapVidDataset(self.dataset, self.path, self.query_mode, self.resolution)

    def val_dataloader(self) -> DataLoader[VideoBatch]:
        """One video per batch, in the order of the data set; each process reads its own videos."""
        self.setup()
        assert self.videos is not None
        rank, world_size = ranks(self.trainer)
        return evaluation_loader(self.videos, num_workers=self.num_workers, rank=rank, world_size=world_size)

    def test_dataloader(self) -> DataLoader[VideoBatch]:
        """As :meth:`val_dataloader`."""
        return self.val_dataloader()

    def predict_dataloader(self) -> DataLoader[VideoBatch]:
        """As :meth:`val_dataloader`."""
        return self.val_dataloader()


def resize_uint8_video(frames: Frames, resolution: Resolution) -> NDArray[np.uint8]:
    """Resize as the official TAP-Vid loaders do: Pillow's Lanczos filter on 8 bits, aspect not kept.

    Args:
        frames: (T, H, W, 3) uint8, or any iterable of (H, W, 3) frames, taken one at a time.
        resolution: (height, width).

    Returns:
        (T, height, width, 3) uint8; frames of that size already are left as they are.
    """
    return np.stack([resized(frame, resolution) for frame in frames])


def _evaluation_item(
    where: str,
    name: str,
    frames: Frames,
    points: NDArray[Any],
    occluded: NDArray[Any],
    labelled: NDArray[Any] | None,
    query_mode: QueryMode,
    resolution: Resolution | None,
) -> VideoBatch:
    if points.ndim != 3 or points.shape[2] != 2 or points.dtype.kind != "f":
        raise ValueError(f"{where}: points must be float (N, T, 2), got {points.dtype} {points.shape}")
    visible = ~as_flags(occluded, points.shape[:2], f"{where}: occluded")
    if labelled is not None:
        labelled = as_flags(labelled, points.shape[:2], f"{where}: labelled")
    video = stack_frames(frames, points.shape[1], resolution, where)
    return evaluation_item(where, name, video, points, visible, labelled, query_mode)


def _find_files(path: Path, pattern: str) -> list[Path]:
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise FileNotFoundError(f"{path}: no such file or folder")
    files = sorted(path.glob(pattern))
    if not files:
        raise FileNotFoundError(f"{path}: no file {pattern} in this folder")
    return files


def _videos_in(file: Path) -> list[tuple[Path, str | int, dict[str, Any]]]:
    content = load_pickle(file, lazy=True)
    videos: list[tuple[str | int, Any]]
    if isinstance(content, dict):
        videos = [(str(key), content[key]) for key in sorted(content, key=str)]
    elif isinstance(content, list):
        videos = list(enumerate(content))
    else:
        raise ValueError(f"{file}: expected a dict or a list of videos, got {type(content).__name__}")
    for key, video in videos:
        if not isinstance(video, dict):
            raise ValueError(f"{file}: video {key!r} must be a dict, got {type(video).__name__}")
    return [(file, key, video) for key, video in videos]


def _loaded(value: Any) -> NDArray[Any]:
    return value.load() if isinstance(value, PickledArray) else np.asarray(value)


def _frames(video: Any, where: str) -> Frames:
    """A video as the files have it: (T, H, W, 3) uint8, or T JPEG files as a list or an array of bytes."""
    array = video.load() if isinstance(video, PickledArray) else video
    if isinstance(array, np.ndarray) and array.dtype == np.uint8:
        if array.ndim != 4 or array.shape[3] != 3:
            raise ValueError(f"{where}: frames must be (T, H, W, 3), got {array.shape}")
        return array
    if isinstance(array, np.ndarray) and array.dtype.kind in "SO" and array.ndim == 1:
        return _decode_all(array, where)
    if isinstance(array, list):
        return _decode_all(array, where)
    kind = f"{array.dtype} {array.shape}" if isinstance(array, np.ndarray) else type(array).__name__
    raise ValueError(f"{where}: frames must be uint8 (T, H, W, 3) or T JPEG files, got {kind}")


def _decode_all(files: Iterable[Any], where: str) -> Frames:
    """JPEG files -> (H, W, 3) frames, one by one; grey becomes three equal channels."""
    for t, data in enumerate(files):
        content = data.load() if isinstance(data, PickledBytes) else data
        if not isinstance(content, bytes):
            raise ValueError(f"{where}: frame {t} must be the bytes of a JPEG, got {type(content).__name__}")
        yield decode_image(BytesIO(content), f"{where}: frame {t}")


def _cut(blob: NDArray[Any], offsets: NDArray[Any], file: Path) -> Iterable[bytes]:
    if blob.dtype != np.uint8 or blob.ndim != 1:
        raise ValueError(f"{file}: jpeg_blob must be uint8 with one axis, got {blob.dtype} {blob.shape}")
    in_order = (
        offsets.ndim == 1
        and offsets.dtype.kind in "iu"
        and len(offsets) >= 2
        and offsets[0] >= 0
        and offsets[-1] <= len(blob)
        and bool((offsets[:-1] < offsets[1:]).all())
    )
    if not in_order:
        raise ValueError(
            f"{file}: jpeg_offsets must be T + 1 growing integers within jpeg_blob ({len(blob)} bytes)"
        )
    return (blob[start:end].tobytes() for start, end in itertools.pairwise(offsets))
