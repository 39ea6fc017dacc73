"""Panning MOVi-E from its TFDS directory, as Chrono trains on it."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import Dataset

from trackbench.data.bad_samples import DEFAULT_LIMIT
from trackbench.data.clip import Size, as_batch
from trackbench.data.colour import ColourAugmentation
from trackbench.data.datamodule import ClipDataModule
from trackbench.data.kubric import SampledTracks
from trackbench.data.loading import VisitOrder
from trackbench.data.tfds import MoviScenes
from trackbench.structures import VideoBatch

log = logging.getLogger(__name__)
_CLIP, _VALIDATION = 1, 2  # keep random streams apart, also from that of the order of visits


class SceneClips(Dataset[VideoBatch]):
    """Endless training clips of Kubric scenes, made as Chrono's loader makes them.

    Clip i depends on (seed, i) alone; the scenes are visited in a new random order each epoch. A random crop of
    a scene is scaled to ``size``, points in it are sampled over all frames and asked for where they were
    sampled, and colours are changed.

    Args:
        scenes: to visit.
        num_frames: T, a multiple of 4. Of longer scenes a random part.
        size: (height, width) of a clip.
        num_points: N. Where fewer can be sampled, the rest is padded and carries no loss, see
            :func:`~trackbench.data.clip.as_batch`.
        augment: the random crop and :class:`~trackbench.data.colour.ColourAugmentation`; False: neither.
        seed: non-negative.
        official_quirks: see :func:`~trackbench.data.kubric.sample_tracks`.

    Raises:
        ValueError: no scene, or a number or size below 1. When a clip is read: a damaged record, a scene of
            fewer than ``num_frames`` frames, or whose frames and sides are no multiples of 4.
    """

    def __init__(
        self,
        scenes: MoviScenes,
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
        self.scenes = scenes
        self.num_frames = num_frames
        self.size = size
        self.num_points = num_points
        self.augmentation = ColourAugmentation() if augment else None
        self.seed = seed
        self.official_quirks = official_quirks
        self.order = VisitOrder(len(scenes), seed)

    def __getitem__(self, index: int) -> VideoBatch:
        """Clip ``index`` as a batch of one."""
        rng = np.random.default_rng([self.seed, _CLIP, index])
        name, tracks = self.scenes.tracks(
            self.order.index(index),
            self.num_points,
            rng,
            self.num_frames,
            size=self.size,
            random_crop=self.augmentation is not None,
            official_quirks=self.official_quirks,
        )
        if self.augmentation is not None:
            tracks = replace(tracks, frames=self.augmentation(tracks.frames, rng))
        return asked_as_sampled(tracks, name, self.num_points)


class ValidationScenes(Dataset[VideoBatch]):
    """Whole frames of scenes with points sampled in them, the same in every run.

    Args:
        scenes: of which the first are read.
        count: scenes, at most.
        num_frames: T.
        size: (height, width).
        num_points: at most; at least 1, which is not labelled where none can be sampled.
    """

    def __init__(self, scenes: MoviScenes, count: int, num_frames: int, size: Size, num_points: int) -> None:
        self.scenes = scenes
        self.count = min(count, len(scenes))
        self.num_frames = num_frames
        self.size = size
        self.num_points = num_points

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> VideoBatch:
        """Scene ``index`` as a batch of one."""
        rng = np.random.default_rng([_VALIDATION, index])
        name, tracks = self.scenes.tracks(index, self.num_points, rng, self.num_frames, size=self.size)
        return asked_as_sampled(tracks, name, max(len(tracks.xy), 1))


class PanningMoviEDataModule(ClipDataModule):
    """Panning MOVi-E with tracks made on the fly: Chrono's training clips, endless; validation on its own split.

    Chrono validates on TAP-Vid DAVIS every 1000 steps: ``validation=tapvid_davis`` does that.

    Args:
        path: the TFDS directory ``panning_movi_e/256x256/1.0.0``, or one above it, or its URL, such as
            ``gs://bucket/panning_movi_e``. Any MOVi-E or MOVi-F serves.
        num_frames: T of training and validation clips.
        height: H of them, pixels.
        width: W of them, pixels.
        num_points: N per training clip; at most, per validation clip.
        batch_size: training clips per batch and rank.
        num_workers: loading processes, for training and for validation.
        augment: see :class:`SceneClips`, as for the next two.
        seed: of the training clips and their order.
        official_quirks: see there.
        split: to train on.
        val_split: to validate on; None: not at all.
        val_videos: validation clips, at most.
        max_bad_samples: see :func:`~trackbench.data.loading.endless_loader`.

    Raises:
        FileNotFoundError: in ``setup``, no data set at ``path``, or shards of it are missing.
        ValueError: in ``setup``, it lacks a split or a feature.
    """

    how_to_validate = "give val_split, or validation=tapvid_davis"

    def __init__(
        self,
        path: str | Path,
        num_frames: int = 24,
        height: int = 256,
        width: int = 256,
        num_points: int = 256,
        batch_size: int = 1,
        num_workers: int = 0,
        augment: bool = True,
        seed: int = 0,
        official_quirks: bool = False,
        split: str = "train",
        val_split: str | None = "validation",
        val_videos: int = 30,
        max_bad_samples: int = DEFAULT_LIMIT,
    ) -> None:
        super().__init__()
        self.path = path
        self.num_frames = num_frames
        self.size = (height, width)
        self.num_points = num_points
        self.batch_size = batch_size
        self.num_workers = num_workers
        self.augment = augment
        self.seed = seed
        self.official_quirks = official_quirks
        self.split = split
        self.val_split = val_split
        self.val_videos = val_videos
        self.max_bad_samples = max_bad_samples
        self.train_clips: SceneClips | None = None
        self.val_clips: ValidationScenes | None = None

    def setup(self, stage: str | None = None) -> None:
        """Read what the directory holds."""
        if self.train_clips is not None:
            return
        if self.val_split is not None:
            scenes = MoviScenes(self.path, self.val_split)
            self.val_clips = ValidationScenes(scenes, self.val_videos, self.num_frames, self.size, self.num_points)
        self.train_clips = SceneClips(
            MoviScenes(self.path, self.split),
            self.num_frames,
            self.size,
            self.num_points,
            augment=self.augment,
            seed=self.seed,
            official_quirks=self.official_quirks,
        )
        log.info("%s: %d scenes to train on", self.path, self.num_training_clips)

    @property
    def num_training_clips(self) -> int:
        """Scenes to train on: clips of an epoch."""
        self.setup()
        assert self.train_clips is not None
        return len(self.train_clips.scenes)


def asked_as_sampled(tracks: SampledTracks, name: str, num_points: int) -> VideoBatch:
    """A batch of one video whose queries are the sampled ones, padded to ``num_points`` by ``as_batch``."""
    batch = as_batch(tracks.clip(name), tracks.queries[:, 0].astype(np.int64), num_points)
    # beside the track by what the scene's 16-bit coordinates are rounded by; exactly on the pixel's centre
    batch.queries[0, : len(tracks.queries)] = torch.from_numpy(tracks.queries).float()
    return batch
