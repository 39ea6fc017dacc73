"""Damaged training samples: replaced by others, counted once, reported, up to a limit."""

from __future__ import annotations

import logging
import shutil
from itertools import islice
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor
from torch.utils.data import Dataset

from tests.data.test_loading import Numbered
from trackbench.data.bad_samples import BadSamples
from trackbench.data.loading import bad_training_samples, endless_loader
from trackbench.data.panning_movi_e import PanningMoviEDataModule
from trackbench.lightning.callbacks import BadSampleCount
from trackbench.structures import VideoBatch


class Damaged(Dataset[VideoBatch]):
    """Samples 0 to ``length`` - 1, of which some cannot be read."""

    def __init__(self, length: int, bad: set[int]) -> None:
        self.samples, self.bad = Numbered(length), bad

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> VideoBatch:
        if index in self.bad:
            raise ValueError(f"scene {index}: damaged")
        return self.samples[index]


def read(dataset: Dataset[VideoBatch], batches: int, **settings: int) -> tuple[list[str], int]:
    loader = endless_loader(dataset, 2, **settings)
    return [name for batch in islice(loader, batches) for name in batch.names], bad_training_samples(loader)


def test_others_take_their_place_and_everything_else_stays() -> None:
    whole, none = read(Numbered(10), 15)
    names, count = read(Damaged(10, {3, 7}), 15)
    assert (none, count) == (0, 2)
    assert not {"3", "7"} & set(names)
    assert [n for n, w in zip(names, whole, strict=True) if w not in "37"] == [w for w in whole if w not in "37"]


def test_the_same_for_any_number_of_workers_and_when_resumed() -> None:
    dataset = Damaged(10, {3, 7})
    names, count = read(dataset, 15)
    assert read(dataset, 15, num_workers=2) == (names, count)
    assert read(dataset, 10, start_batch=5)[0] == names[10:]


def test_a_sample_counts_once_however_often_it_is_visited(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        assert read(Damaged(4, {2}), 40, max_bad_samples=1)[1] == 1
    assert caplog.messages == ["training sample skipped (1 of at most 1): scene 2: damaged"]


@pytest.mark.parametrize("workers", [0, 2])
def test_the_limit_ends_the_run_and_names_the_sample(workers: int) -> None:
    with pytest.raises(ValueError, match=r"3 training samples could not be read.*allows 2.*scene \d: damaged"):
        read(Damaged(10, {1, 2, 3, 4}), 200, num_workers=workers, max_bad_samples=2)
    with pytest.raises(ValueError, match="1 training samples"):
        read(Damaged(2, {0, 1}), 1, max_bad_samples=0)


def test_nothing_readable_ends_too() -> None:
    with pytest.raises(ValueError, match="in a row"):
        read(Damaged(2, {0, 1}), 1)
    with pytest.raises(ValueError, match="at least 0"):
        BadSamples(-1)


class Defect(Numbered):
    def __getitem__(self, index: int) -> VideoBatch:
        raise KeyError("a defect of the program")


def test_defects_are_not_taken_for_bad_data() -> None:
    with pytest.raises(KeyError, match="defect"):
        read(Defect(3), 1)


class Reads(pl.LightningModule):
    """Counts what it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.names: list[str] = []

    def training_step(self, batch: VideoBatch, batch_idx: int) -> Tensor:
        self.names += batch.names
        return self.weight * batch.xy.mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def test_a_damaged_record_does_not_end_training(data_fixtures: Path, tmp_path: Path) -> None:
    folder = tmp_path / "panning_movi_e" / "32x32" / "1.0.0"
    shutil.copytree(
        data_fixtures / "tfds_tfrecord/panning_movi_e/32x32/1.0.0", folder, copy_function=shutil.copyfile
    )
    (shard,) = folder.glob("*train*")
    with shard.open("rb+") as file:  # cut off in its last record
        file.truncate(shard.stat().st_size - 4000)
    data = PanningMoviEDataModule(folder, height=32, width=32, num_points=16, val_split=None)
    module = Reads()
    trainer = pl.Trainer(
        accelerator="cpu",
        max_steps=8,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        default_root_dir=tmp_path,
        callbacks=[BadSampleCount()],
    )
    with pytest.warns(UserWarning, match="1 training samples could not be read"):
        trainer.fit(module, datamodule=data)
    assert len(module.names) == 8
    assert len(set(module.names)) == 1
    assert trainer.callback_metrics["train/bad_samples"] == 1
