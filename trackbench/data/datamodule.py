"""What data modules share: loaders for every rank, and validation on data of another family."""

from __future__ import annotations

from functools import partial

import lightning.pytorch as pl
from torch.utils.data import DataLoader, Dataset

from trackbench.data.bad_samples import DEFAULT_LIMIT
from trackbench.data.loading import endless_loader, evaluation_loader, next_batch, ranks
from trackbench.structures import VideoBatch


class ClipDataModule(pl.LightningDataModule):
    """Endless training clips and finite validation clips, of which each rank reads its own.

    A family of data sets both in its ``__init__`` or in ``setup``.

    Attributes:
        train_clips: endless, by number.
        val_clips: with a length; None: nothing to validate on.
        batch_size: training clips per batch and rank.
        val_batch_size: validation clips per batch.
        num_workers: loading processes, for training and for validation.
        seed: of the loader's workers and the order of the clips.
        max_bad_samples: see :func:`~trackbench.data.loading.endless_loader`.
        how_to_validate: what to do about a missing ``val_clips``, for the error.
    """

    train_clips: Dataset[VideoBatch] | None = None
    val_clips: Dataset[VideoBatch] | None = None
    batch_size: int = 1
    val_batch_size: int = 1
    num_workers: int = 0
    seed: int = 0
    max_bad_samples: int = DEFAULT_LIMIT
    how_to_validate: str = "give val_clips"

    def train_dataloader(self) -> DataLoader[VideoBatch]:
        """Training batches from where the trainer is, on this rank."""
        self.setup("fit")
        assert self.train_clips is not None
        rank, world_size = ranks(self.trainer)
        return endless_loader(
            self.train_clips,
            self.batch_size,
            self.num_workers,
            seed=self.seed,
            start_batch=partial(next_batch, self.trainer),
            rank=rank,
            world_size=world_size,
            max_bad_samples=self.max_bad_samples,
        )

    def val_dataloader(self) -> DataLoader[VideoBatch]:
        """This rank's part of the validation clips.

        Raises:
            ValueError: there are none.
        """
        self.setup("validate")
        if self.val_clips is None:
            raise ValueError(f"nothing to validate on: {self.how_to_validate}")
        rank, world_size = ranks(self.trainer)
        return evaluation_loader(self.val_clips, self.val_batch_size, self.num_workers, rank, world_size)

    def test_dataloader(self) -> DataLoader[VideoBatch]:
        """The same clips as for validation."""
        return self.val_dataloader()


class TrainAndValidate(pl.LightningDataModule):
    """Trains on ``train``'s data, validates on ``validation``, one video at a time.

    Args:
        train: a datamodule with a ``train_dataloader``.
        validation: a dataset of :class:`~trackbench.structures.VideoBatch` items.
        num_workers: workers of the validation loader.
    """

    def __init__(
        self, train: pl.LightningDataModule, validation: Dataset[VideoBatch], num_workers: int = 0
    ) -> None:
        super().__init__()
        self.train = train
        self.validation = validation
        self.num_workers = num_workers

    def setup(self, stage: str) -> None:
        """The trainer is known here: the training data needs it to resume and to split over ranks."""
        self.train.trainer = self.trainer
        self.train.setup(stage)

    def train_dataloader(self) -> DataLoader[VideoBatch]:
        """The training data's own loader."""
        return self.train.train_dataloader()

    def val_dataloader(self) -> DataLoader[VideoBatch]:
        """Each rank reads its own videos; none is read twice."""
        rank, world_size = ranks(self.trainer)
        return evaluation_loader(self.validation, rank=rank, world_size=world_size, num_workers=self.num_workers)
