"""The order in which training data is visited, and the loaders over it. Shared by all datamodules.

Training data is one endless stream of positions 0, 1, 2, ... Batch k of rank r takes the positions from
``(k * world_size + r) * batch_size`` on, and what stands at a position depends on the seed and the position
alone. So the stream does not depend on the number of workers, and a resumed run continues it exactly where it
stopped.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sized
from dataclasses import dataclass
from functools import lru_cache
from itertools import count
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt
import torch
from lightning import Trainer
from torch.utils.data import DataLoader, Dataset, DistributedSampler, Sampler

from trackbench.data.bad_samples import DEFAULT_LIMIT, BadSamples
from trackbench.structures import VideoBatch

Transform = Callable[[VideoBatch, np.random.Generator], VideoBatch]
_ORDER, _TRANSFORM = 0, 1  # keep the random streams of one seed apart


@dataclass(frozen=True)
class VisitOrder:
    """Which sample stands at a position of the endless stream.

    A finite dataset is passed through once per epoch, in a new random order each time; epochs follow each
    other without a gap, so over all ranks every sample is visited once per epoch and none is dropped at its
    end.

    Attributes:
        length: number of samples; None: an endless dataset, visited in the order 0, 1, 2, ...
        seed: of the random orders, non-negative.
        shuffle: False: every epoch in the order 0, 1, 2, ...
    """

    length: int | None
    seed: int = 0
    shuffle: bool = True

    def __post_init__(self) -> None:
        if self.length is not None and self.length < 1:
            raise ValueError("cannot train on an empty dataset")

    def index(self, position: int) -> int:
        """Index of the sample at ``position``."""
        if self.length is None:
            return position
        epoch, place = divmod(position, self.length)
        return int(_permutation(self.seed, epoch, self.length)[place]) if self.shuffle else place


@lru_cache(maxsize=4)
def _permutation(seed: int, epoch: int, length: int) -> npt.NDArray[np.int64]:
    return np.random.default_rng([seed, _ORDER, epoch]).permutation(length)


class EndlessBatches(Sampler[list[int]]):
    """Batches of stream positions of one rank, without end and therefore without a length.

    Args:
        batch_size: positions per batch of one rank.
        start_batch: the batch that iteration starts with, or a function that is asked for it whenever an
            iteration starts.
        rank: of this process.
        world_size: number of processes.
    """

    def __init__(
        self,
        batch_size: int,
        start_batch: int | Callable[[], int] = 0,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        if not 0 <= rank < world_size:
            raise ValueError(f"rank must be in [0, world_size), got rank {rank} of {world_size}")
        self.batch_size = batch_size
        self.start_batch = start_batch
        self.rank = rank
        self.world_size = world_size

    def batch(self, number: int) -> list[int]:
        """The positions of batch ``number``."""
        first = (number * self.world_size + self.rank) * self.batch_size
        return list(range(first, first + self.batch_size))

    def __iter__(self) -> Iterator[list[int]]:
        """Batches from ``start_batch`` on."""
        start = self.start_batch if isinstance(self.start_batch, int) else self.start_batch()
        return map(self.batch, count(start))


class _Stream(Dataset[VideoBatch]):
    """The dataset as an endless stream: indexed by position, with the randomness of that visit."""

    def __init__(
        self, dataset: Dataset[VideoBatch], order: VisitOrder, transform: Transform | None, bad: BadSamples
    ) -> None:
        self.dataset = dataset
        self.order = order
        self.transform = transform
        self.bad = bad

    def __getitem__(self, position: int) -> VideoBatch:
        return self.bad.good(self._read, position)

    def _read(self, position: int) -> VideoBatch:
        sample = self.dataset[self.order.index(position)]
        if self.transform is None:
            return sample
        return self.transform(sample, np.random.default_rng([self.order.seed, _TRANSFORM, position]))


def endless_loader(
    dataset: Dataset[VideoBatch],
    batch_size: int,
    num_workers: int = 0,
    seed: int = 0,
    start_batch: int | Callable[[], int] = 0,
    rank: int = 0,
    world_size: int = 1,
    shuffle: bool = True,
    transform: Transform | None = None,
    max_bad_samples: int = DEFAULT_LIMIT,
) -> DataLoader[VideoBatch]:
    """A training loader without end: batch k is a function of (seed, k, rank, world_size) alone.

    Args:
        dataset: map-style, ``dataset[i]`` a :class:`VideoBatch` and a function of i alone; endless if it has
            no ``len``.
        batch_size: samples per batch of one rank.
        num_workers: processes that load; no influence on the data.
        seed: of the order of visits and of ``transform``, non-negative.
        start_batch: where to start, a number or a function that is asked whenever an iteration starts (with
            :func:`next_batch` of a trainer, every iteration goes on where training is).
        rank: of this process.
        world_size: number of processes.
        shuffle: visit a finite dataset in a new random order each epoch. An endless one is read in its order.
        transform: random augmentation, ``transform(sample, rng)``, run in the worker; the generator differs
            for every visit.
        max_bad_samples: so many different samples of this rank that cannot be read are replaced by others, see
            :class:`~trackbench.data.bad_samples.BadSamples`; the next one ends the run.

    Returns:
        A loader of :class:`VideoBatch`. It has no ``len``.

    Raises:
        ValueError: an empty dataset, or a batch size or rank that makes no sense; while iterating, too many bad
            samples.
    """
    order = VisitOrder(_length(dataset), seed, shuffle)
    batches = EndlessBatches(batch_size, start_batch, rank, world_size)
    return DataLoader(
        _Stream(dataset, order, transform, BadSamples(max_bad_samples)),
        batch_sampler=batches,
        generator=torch.Generator().manual_seed(seed),
        **_loader_settings(num_workers),
    )


class OwnShare(DistributedSampler[Any]):
    """Every ``world_size``-th sample, none twice. Lightning leaves a ``DistributedSampler`` as it is.

    With fewer samples than ranks the ranks beyond get one of another's: Lightning cannot validate on nothing, and
    :class:`~trackbench.metrics.TapVidMetric` counts a video once.
    """

    def __init__(self, dataset: Dataset[VideoBatch], length: int, rank: int, world_size: int) -> None:
        super().__init__(dataset, num_replicas=world_size, rank=rank, shuffle=False)
        self.share = range(rank, length, world_size) or range(rank % max(length, 1), length, world_size)

    def __iter__(self) -> Iterator[Any]:
        return iter(self.share)

    def __len__(self) -> int:
        return len(self.share)


def evaluation_loader(
    dataset: Dataset[VideoBatch],
    batch_size: int = 1,
    num_workers: int = 0,
    rank: int = 0,
    world_size: int = 1,
) -> DataLoader[VideoBatch]:
    """A validation loader: each sample once, in order, every ``world_size``-th of them on this rank.

    No sample is repeated to even out the ranks, so the last ranks may have one sample less; only a rank that
    would have none repeats one. Batches are cut
    to the smallest number of points among their samples (:meth:`VideoBatch.collate`): leave ``batch_size`` at
    1 where videos differ in that.

    Raises:
        ValueError: a dataset without a length, or a rank that makes no sense.
    """
    if not 0 <= rank < world_size:
        raise ValueError(f"rank must be in [0, world_size), got rank {rank} of {world_size}")
    length = _length(dataset)
    if length is None:
        raise ValueError("cannot validate on an endless dataset: give it a length")
    return DataLoader(
        dataset,
        batch_size=batch_size,
        sampler=OwnShare(dataset, length, rank, world_size),
        generator=torch.Generator().manual_seed(0),
        **_loader_settings(num_workers),
    )


def bad_training_samples(loader: object) -> int:
    """How many different samples an :func:`endless_loader` could not read so far, on this rank."""
    stream = getattr(loader, "dataset", None)
    return stream.bad.count if isinstance(stream, _Stream) else 0


def ranks(trainer: Trainer | None) -> tuple[int, int]:
    """(rank, world_size) of a trainer; (0, 1) without one."""
    return (0, 1) if trainer is None else (trainer.global_rank, trainer.world_size)


def next_batch(trainer: Trainer | None) -> int:
    """The batch that training needs next, after all that the optimiser has seen; 0 without a trainer."""
    return 0 if trainer is None else trainer.global_step * trainer.accumulate_grad_batches


def single_thread(worker: int = 0) -> None:
    """Keep a worker process to one thread; workers run side by side already."""
    cv2.setNumThreads(0)
    torch.set_num_threads(1)


def _loader_settings(num_workers: int) -> dict[str, Any]:
    return {
        "num_workers": num_workers,
        "collate_fn": VideoBatch.collate,
        "worker_init_fn": single_thread,
        "persistent_workers": num_workers > 0,
        "pin_memory": torch.cuda.is_available(),
    }


def _length(dataset: Dataset[VideoBatch]) -> int | None:
    if not isinstance(dataset, Sized):
        return None
    try:
        return len(dataset)
    except TypeError:  # how a dataset says that it has a length in some configurations only
        return None
