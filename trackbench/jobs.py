"""Independent pieces of long work in several processes, with a progress bar; a failure ends its piece alone."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from typing import Generic, TypeVar

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass(frozen=True)
class Outcome(Generic[Item, Result]):
    """What became of an item.

    Attributes:
        item: it.
        result: what the work returned; None where it failed.
        error: why it failed, one line; None where it did not.
    """

    item: Item
    result: Result | None
    error: str | None


def run_jobs(
    work: Callable[[Item], Result],
    items: Sequence[Item],
    workers: int = 1,
    description: str = "working",
    console: Console | None = None,
) -> Iterator[Outcome[Item, Result]]:
    """Call ``work`` on every item, in the order in which they finish; a progress bar goes to standard error.

    Bad input (ValueError, OSError) fails its item alone, as does a killed process; other errors are defects
    and end the run.

    Args:
        work: a function of a module, or a ``functools.partial`` of one: it goes to other processes.
        items: picklable.
        workers: processes; 1 works in this one.
        description: what the progress bar says.
        console: where it goes; None: standard error.
    """
    if workers < 1:
        raise ValueError(f"workers must be at least 1, got {workers}")
    with progress_bar(console) as progress:
        task = progress.add_task(description, total=len(items))
        for outcome in _outcomes(work, items, workers):
            progress.advance(task)
            yield outcome


def progress_bar(console: Console | None = None) -> Progress:
    """The project's progress bar, on standard error: description, bar, done of all, time gone and left."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=console or Console(stderr=True),
    )


def _outcomes(
    work: Callable[[Item], Result], items: Sequence[Item], workers: int
) -> Iterator[Outcome[Item, Result]]:
    if workers == 1 or len(items) < 2:
        for item in items:
            yield _outcome(item, lambda item=item: work(item))  # type: ignore[misc]
        return
    context = multiprocessing.get_context("spawn")  # forks of a process with threads can hang
    with ProcessPoolExecutor(min(workers, len(items)), mp_context=context) as pool:
        futures: dict[Future[Result], Item] = {pool.submit(work, item): item for item in items}
        try:
            for future in as_completed(futures):
                yield _outcome(futures[future], future.result)
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def _outcome(item: Item, result: Callable[[], Result]) -> Outcome[Item, Result]:
    try:
        return Outcome(item, result(), None)
    except BrokenProcessPool:
        return Outcome(item, None, "its process was killed (out of memory?)")
    except (ValueError, OSError) as error:
        return Outcome(item, None, " ".join(str(error).split()) or type(error).__name__)
