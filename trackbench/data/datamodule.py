"""Training data of one family beside validation data of another."""

from __future__ import annotations

import lightning.pytorch as pl
from torch.utils.data import DataLoader, Dataset

from trackbench.structures import VideoBatch


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
        from trackbench.data.loading import evaluation_loader

        trainer = self.trainer
        rank, world = (trainer.global_rank, trainer.world_size) if trainer is not None else (0, 1)
        return evaluation_loader(self.validation, rank=rank, world_size=world, num_workers=self.num_workers)
