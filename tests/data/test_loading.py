"""The order of training data: complete, the same for any number of workers, and resumable."""

from __future__ import annotations

from collections import Counter
from functools import partial
from itertools import islice
from pathlib import Path

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, Dataset

from trackbench.data.loading import (
    EndlessBatches,
    VisitOrder,
    endless_loader,
    evaluation_loader,
    next_batch,
    ranks,
)
from trackbench.structures import VideoBatch


class Numbered(Dataset[VideoBatch]):
    """Tiny videos that carry their index as their name and as their query time."""

    def __init__(self, length: int | None = None) -> None:
        self.length = length

    def __len__(self) -> int:
        if self.length is None:
            raise TypeError("endless")
        return self.length

    def __getitem__(self, index: int) -> VideoBatch:
        return VideoBatch(
            video=torch.zeros(1, 2, 3, 4, 4, dtype=torch.uint8),
            queries=torch.full((1, 1, 3), float(index)),
            xy=torch.zeros(1, 1, 2, 2),
            visible=torch.ones(1, 1, 2, dtype=torch.bool),
            names=[str(index)],
        )


def jitter(sample: VideoBatch, rng: np.random.Generator) -> VideoBatch:
    sample.xy += rng.random()
    return sample


def names(loader: DataLoader[VideoBatch], batches: int | None = None) -> list[list[int]]:
    return [[int(name) for name in batch.names] for batch in islice(loader, batches)]


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("batch_size", [1, 4])
def test_every_sample_once_per_epoch_over_all_ranks(world_size: int, batch_size: int) -> None:
    length = 20
    per_rank = 3 * length  # batches; enough for several epochs
    ranks = [
        names(endless_loader(Numbered(length), batch_size, seed=1, rank=r, world_size=world_size), per_rank)
        for r in range(world_size)
    ]
    visited = [index for step in zip(*ranks, strict=True) for batch in step for index in batch]
    epochs = [visited[start : start + length] for start in range(0, len(visited) - length + 1, length)]
    assert len(epochs) >= 3
    for epoch in epochs:
        assert Counter(epoch) == Counter(range(length))
    assert epochs[0] != epochs[1]


def test_seed_decides_the_order() -> None:
    first, again, other = (names(endless_loader(Numbered(50), 5, seed=s), 10) for s in (0, 0, 1))
    assert first == again
    assert first != other
    in_order = names(endless_loader(Numbered(6), 4, shuffle=False), 3)
    assert in_order == [[0, 1, 2, 3], [4, 5, 0, 1], [2, 3, 4, 5]]


def test_endless_dataset_is_read_consecutively_across_ranks() -> None:
    for rank, expected in ((0, [[0, 1], [4, 5], [8, 9]]), (1, [[2, 3], [6, 7], [10, 11]])):
        assert names(endless_loader(Numbered(), 2, rank=rank, world_size=2), 3) == expected


@pytest.mark.parametrize("length", [7, None])
def test_resuming_continues_the_sequence(length: int | None) -> None:
    whole = list(islice(endless_loader(Numbered(length), 3, seed=2, transform=jitter), 12))
    rest = list(islice(endless_loader(Numbered(length), 3, seed=2, transform=jitter, start_batch=5), 7))
    for a, b in zip(whole[5:], rest, strict=True):
        assert a.names == b.names
        assert torch.equal(a.xy, b.xy)


def test_start_is_asked_for_whenever_an_iteration_starts() -> None:
    start = 0
    loader = endless_loader(Numbered(), 1, start_batch=lambda: start)
    assert names(loader, 2) == [[0], [1]]
    start = 40
    assert names(loader, 2) == [[40], [41]]


def test_workers_change_nothing() -> None:
    alone, together = (
        list(islice(endless_loader(Numbered(9), 2, num_workers=n, seed=3, transform=jitter), 8)) for n in (0, 2)
    )
    for a, b in zip(alone, together, strict=True):
        assert a.names == b.names
        assert torch.equal(a.xy, b.xy)


def test_augmentation_differs_at_every_visit() -> None:
    batches = list(islice(endless_loader(Numbered(2), 2, transform=jitter), 6))
    values = torch.cat([batch.xy[:, 0, 0, 0] for batch in batches])
    assert len(values.unique()) == 12


def test_loading_leaves_the_global_random_state_alone() -> None:
    before = torch.get_rng_state()
    names(endless_loader(Numbered(5), 2), 3)
    names(evaluation_loader(Numbered(5)))
    assert torch.equal(before, torch.get_rng_state())


def test_training_loader_has_no_length() -> None:
    with pytest.raises(TypeError):
        len(endless_loader(Numbered(5), 2))


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_validation_reads_each_video_once(world_size: int) -> None:
    parts = [
        [
            index
            for batch in names(evaluation_loader(Numbered(8), 3, rank=r, world_size=world_size))
            for index in batch
        ]
        for r in range(world_size)
    ]
    assert sorted(index for part in parts for index in part) == list(range(8))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


def test_mistakes_are_named() -> None:
    with pytest.raises(ValueError, match="empty"):
        endless_loader(Numbered(0), 1)
    with pytest.raises(ValueError, match="batch_size"):
        endless_loader(Numbered(3), 0)
    with pytest.raises(ValueError, match="rank 2 of 2"):
        EndlessBatches(1, rank=2, world_size=2)
    with pytest.raises(ValueError, match="rank 2 of 2"):
        evaluation_loader(Numbered(3), rank=2, world_size=2)
    with pytest.raises(ValueError, match="endless"):
        evaluation_loader(Numbered())


def test_order_of_a_large_dataset_is_a_permutation() -> None:
    order = VisitOrder(1000, seed=4)
    assert sorted(order.index(position) for position in range(2000, 3000)) == list(range(1000))


# --- under Lightning ------------------------------------------------------------------------------


class Recorder(pl.LightningModule):
    """Writes down what it is trained on."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.seen: list[str] = []

    def training_step(self, batch: VideoBatch, batch_idx: int) -> torch.Tensor:
        self.seen += batch.names
        return self.weight * batch.queries.mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class NumberedData(pl.LightningDataModule):
    def __init__(self, workers: int) -> None:
        super().__init__()
        self.workers = workers

    def train_dataloader(self) -> DataLoader[VideoBatch]:
        rank, world_size = ranks(self.trainer)
        start = partial(next_batch, self.trainer)
        return endless_loader(Numbered(7), 2, self.workers, start_batch=start, rank=rank, world_size=world_size)


def train(folder: Path, steps: int, workers: int = 0, resume: Path | None = None, **overrides) -> list[str]:
    module = Recorder()
    trainer = pl.Trainer(
        max_steps=steps,
        accelerator="cpu",
        default_root_dir=folder,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        **overrides,
    )
    trainer.fit(module, NumberedData(workers), ckpt_path=resume)
    trainer.save_checkpoint(folder / "last.ckpt")
    return module.seen


@pytest.mark.parametrize("workers", [0, 2])
def test_a_resumed_run_sees_what_an_uninterrupted_one_sees(tmp_path: Path, workers: int) -> None:
    whole = train(tmp_path, 8, accumulate_grad_batches=2)
    assert len(whole) == 8 * 2 * 2
    begun = train(tmp_path, 3, workers, accumulate_grad_batches=2)
    resumed = train(tmp_path, 8, workers, tmp_path / "last.ckpt", accumulate_grad_batches=2)
    assert begun + resumed == whole


def test_short_epochs_continue_the_stream(tmp_path: Path) -> None:
    assert train(tmp_path, 9, limit_train_batches=3) == train(tmp_path, 9)
