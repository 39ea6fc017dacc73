"""Kubric's MOVi-F as Track-On trains on it: in the folder format, or from its TFDS directory."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import Dataset

from trackbench.data.augmentation import TrackOnAugmentation
from trackbench.data.bad_samples import DEFAULT_LIMIT
from trackbench.data.clip import Clip, Size, as_batch, centre_crop, choose_points, hide_outside
from trackbench.data.datamodule import ClipDataModule
from trackbench.data.folder import TrackFolder
from trackbench.data.loading import VisitOrder
from trackbench.data.synthetic.dataset import query_times
from trackbench.data.tapvid import TapVidDataset
from trackbench.data.tfds import MoviScenes, SceneSequences, find_version
from trackbench.data.tfds.storage import place
from trackbench.structures import VideoBatch

log = logging.getLogger(__name__)
_CLIP, _HELD_OUT = 1, 2  # keep random streams apart, also from that of the order of visits


class TrackedFrames(Protocol):
    """A sequence of ``num_frames`` frames with its tracks."""

    @property
    def num_frames(self) -> int:
        """T."""
        ...

    def clip(self, start: int, num_frames: int) -> Clip:
        """Some frames, one after the other."""
        ...


class SequenceSource(Protocol):
    """Sequences by number: a :class:`~trackbench.data.folder.TrackFolder` or ``SceneSequences``."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> TrackedFrames: ...


class TrainingClips(Dataset[VideoBatch]):
    """Endless training clips of sequences, made as Track-On's loader makes them.

    Clip i depends on (seed, i) alone; the sequences are visited in a new random order each epoch. Points that
    are not visible in the clip's frame 0 are dropped, then up to ``num_points`` are kept. The first quarter of
    them is asked for in a random frame in which each is visible, the others in frame 0.

    Args:
        folder: of the sequences.
        indices: which of them to visit.
        num_frames: T. Of longer sequences a random part; without augmentation the first one.
        size: (height, width) of a clip.
        num_points: N. Where fewer are visible, the rest is padded and carries no loss, see
            :func:`~trackbench.data.clip.as_batch`.
        augment: :class:`~trackbench.data.augmentation.TrackOnAugmentation` and a random choice of points;
            False: a centre crop and the first points.
        seed: non-negative.
        official_quirks: do as the published loader where it is not exact: see
            :class:`~trackbench.data.augmentation.TrackOnAugmentation`; the last part of a longer sequence is
            never drawn; nothing is padded, so batches are cut to the fewest points in them.

    Raises:
        ValueError: no sequence, or a number or size below 1. When a clip is read: see
            :class:`~trackbench.data.folder.TrackFolder`, a sequence of fewer than ``num_frames`` frames, or,
            without augmentation, of frames smaller than ``size``.
    """

    def __init__(
        self,
        folder: SequenceSource,
        indices: Sequence[int],
        num_frames: int,
        size: Size,
        num_points: int,
        augment: bool = True,
        seed: int = 0,
        official_quirks: bool = False,
    ) -> None:
        if min(num_frames, num_points, *size) < 1:
            raise ValueError(
                f"num_frames, num_points and size must be at least 1, got {num_frames}, {num_points}, {size}"
            )
        self.folder = folder
        self.indices = indices
        self.num_frames = num_frames
        self.size = size
        self.num_points = num_points
        self.augmentation = TrackOnAugmentation(size, official_quirks=official_quirks) if augment else None
        self.seed = seed
        self.official_quirks = official_quirks
        self.order = VisitOrder(len(indices), seed)

    def __getitem__(self, index: int) -> VideoBatch:
        """Clip ``index`` as a batch of one."""
        rng = np.random.default_rng([self.seed, _CLIP, index])
        sequence = self.folder[self.indices[self.order.index(index)]]
        clip = self._augmented(sequence, rng) if self.augmentation else self._plain(sequence)
        num_points = max(len(clip.xy), 1) if self.official_quirks else self.num_points
        return as_batch(clip, training_query_frames(clip.visible, rng), num_points)

    def _augmented(self, sequence: TrackedFrames, rng: np.random.Generator) -> Clip:
        assert self.augmentation is not None
        last_start = sequence.num_frames - self.num_frames - int(self.official_quirks)
        start = int(rng.integers(max(last_start, 0), endpoint=True))
        clip = self.augmentation(sequence.clip(start, self.num_frames), rng)
        return choose_points(clip, self.num_points, rng)

    def _plain(self, sequence: TrackedFrames) -> Clip:
        return plain_clip(sequence, self.num_frames, self.size, self.num_points, self.official_quirks)


class HeldOutClips(Dataset[VideoBatch]):
    """Validation clips, one per sequence: its first frames, a centre crop, and its first points.

    Only points that are visible in frame 0 are kept, and asked for there.

    Args:
        folder: of the sequences.
        indices: which of them to read.
        num_frames: T.
        size: (height, width).
        num_points: at most; at least 1, which is not labelled where no point is visible.
    """

    def __init__(
        self, folder: SequenceSource, indices: Sequence[int], num_frames: int, size: Size, num_points: int
    ) -> None:
        self.folder = folder
        self.indices = indices
        self.num_frames = num_frames
        self.size = size
        self.num_points = num_points

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> VideoBatch:
        """Clip ``index`` as a batch of one."""
        clip = plain_clip(self.folder[self.indices[index]], self.num_frames, self.size, self.num_points)
        found = len(clip.xy)
        return as_batch(clip, np.zeros(found, np.int64), max(found, 1))


class MoviFDataModule(ClipDataModule):
    """MOVi-F: Track-On's training clips, endless; validation as it is published, or near.

    Track-On validates on TAP-Vid DAVIS (256 x 256, query mode ``first``) after every epoch: ``val_path`` does
    that. Without it, a share of the sequences is held out; which ones does not depend on ``seed``.

    Args:
        path: the folder of sequences, see :class:`~trackbench.data.folder.TrackFolder`, or the TFDS directory
            ``movi_f/512x512/1.0.0``, or one above it, or its URL: then tracks are made on the fly, see
            :class:`~trackbench.data.tfds.SceneSequences`. Crops of scenes of 256 x 256 must be smaller.
        num_frames: T.
        height: H of training and held-out clips, pixels.
        width: W of them, pixels.
        num_points: N per training clip; at most, per held-out clip.
        batch_size: training clips per batch and rank.
        num_workers: loading processes, for training and for validation.
        augment: see :class:`TrainingClips`, as for the next two.
        seed: of the training clips and their order.
        official_quirks: see there.
        val_path: TAP-Vid DAVIS, its ``.pkl`` file or the folder of it; None: held-out sequences.
        val_share: of the sequences (at least one) that is held out where there is no ``val_path``; 0: none.
        split: of a TFDS data set, to train on.
        max_bad_samples: see :func:`~trackbench.data.loading.endless_loader`.

    Raises:
        FileNotFoundError: in ``setup``, nothing at ``path`` or at ``val_path``.
        ValueError: ``val_share`` is not in [0, 1), or leaves nothing to train on.
    """

    how_to_validate = "give val_path, or val_share above 0"

    def __init__(
        self,
        path: str | Path,
        num_frames: int = 24,
        height: int = 384,
        width: int = 512,
        num_points: int = 480,
        batch_size: int = 1,
        num_workers: int = 0,
        augment: bool = True,
        seed: int = 0,
        official_quirks: bool = False,
        val_path: str | Path | None = None,
        val_share: float = 0.01,
        split: str = "train",
        max_bad_samples: int = DEFAULT_LIMIT,
    ) -> None:
        super().__init__()
        if not 0 <= val_share < 1:
            raise ValueError(f"val_share must be in [0, 1), got {val_share}")
        self.path = path
        self.num_frames = num_frames
        self.size = (height, width)
        self.num_points = num_points
        self.batch_size = batch_size
        self.num_workers = num_workers
        self.augment = augment
        self.seed = seed
        self.official_quirks = official_quirks
        self.val_path = val_path
        self.val_share = val_share
        self.split = split
        self.max_bad_samples = max_bad_samples
        self.train_clips: TrainingClips | None = None
        self.val_clips: Dataset[VideoBatch] | None = None

    def setup(self, stage: str | None = None) -> None:
        """List the sequences and open the validation file."""
        if self.train_clips is not None:
            return
        folder = self._sequences()
        train, held_out = self._split(len(folder))
        if self.val_path is not None:
            self.val_clips = TapVidDataset("davis", self.val_path, query_mode="first", resolution=(256, 256))
        elif held_out:
            self.val_clips = HeldOutClips(folder, held_out, self.num_frames, self.size, self.num_points)
        self.train_clips = TrainingClips(
            folder,
            train,
            self.num_frames,
            self.size,
            self.num_points,
            augment=self.augment,
            seed=self.seed,
            official_quirks=self.official_quirks,
        )
        log.info("%s: %d sequences to train on, %d held out", self.path, len(train), len(held_out))

    def _sequences(self) -> SequenceSource:
        path = place(self.path)
        if isinstance(path, Path) and find_version(path) is None:
            return TrackFolder(path)
        scenes = MoviScenes(path, self.split)
        return SceneSequences(scenes, official_quirks=self.official_quirks)

    def _split(self, count: int) -> tuple[list[int], list[int]]:
        """Indices to train on and to hold out."""
        if self.val_path is not None or not self.val_share:
            return list(range(count)), []
        wanted = max(round(self.val_share * count), 1)
        if wanted >= count:
            raise ValueError(f"{self.path}: holding out {wanted} of {count} sequences leaves none to train on")
        held_out = sorted(np.random.default_rng(_HELD_OUT).permutation(count)[:wanted].tolist())
        return sorted(set(range(count)) - set(held_out)), held_out

    @property
    def num_training_clips(self) -> int:
        """Clips of an epoch, one of each sequence, over all ranks; 0 before ``setup``."""
        return 0 if self.train_clips is None else len(self.train_clips.indices)


def plain_clip(
    sequence: TrackedFrames, num_frames: int, size: Size, num_points: int, official_quirks: bool = False
) -> Clip:
    """The first frames, a centre crop, and the first ``num_points`` points that are visible in frame 0."""
    clip = centre_crop(sequence.clip(0, num_frames), size)
    return choose_points(hide_outside(clip, with_border=official_quirks), num_points, None)


def training_query_frames(visible: NDArray[np.bool_], rng: np.random.Generator) -> NDArray[np.int64]:
    """The frame (N,) of each point's query, visible (N, T): random for the first quarter, else the first."""
    is_random = np.arange(len(visible)) < len(visible) // 4
    return np.where(is_random, query_times(rng, visible, "random"), query_times(rng, visible, "first"))
