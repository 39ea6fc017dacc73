"""Independent pieces of long work in several processes, with a progress bar; a failure ends its piece alone."""

from __future__ import annotations

import multiprocessing
import os
import threading
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

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

POLL = 0.2  # seconds between looks at how far other processes are


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
    total: int | None = None,
) -> Iterator[Outcome[Item, Result]]:
    """Call ``work`` on every item, in the order in which they finish; a progress bar goes to standard error.

    Bad input (ValueError, OSError) fails its item alone, as does a killed process (items that were begun beside it
    are begun again); other errors are defects and end the run.

    Args:
        work: a function of a module, or a ``functools.partial`` of one: it goes to other processes.
        items: picklable.
        workers: processes; 1 works in this one.
        description: what the progress bar says.
        console: where it goes; None: standard error.
        total: count what ``work`` reports to :func:`advance`, so much in all, rather than items.
    """
    if workers < 1:
        raise ValueError(f"workers must be at least 1, got {workers}")
    with progress_bar(console) as progress:
        task = progress.add_task(description, total=len(items) if total is None else total)
        count = (lambda n: progress.advance(task, n)) if total is not None else lambda n: None
        for outcome in _outcomes(work, items, workers, count):
            if total is None:
                progress.advance(task)
            yield outcome


def collect(outcomes: Iterable[Outcome[Any, Result]], console: Console) -> tuple[list[Result], int]:
    """What was done, and how many items failed; each failure is a line on ``console`` as soon as it happens."""
    done, failed = [], 0
    for outcome in outcomes:
        if outcome.result is None:
            failed += 1
            console.print(f"{outcome.item}: {outcome.error}", markup=False)
        else:
            done.append(outcome.result)
    return done, failed


def advance(n: int = 1) -> None:
    """To be called by the work of :func:`run_jobs`: so many more units of it are done."""
    _count(n)


def _unheard(n: int) -> None:
    """Nobody listens."""


_count: Callable[[int], None] = _unheard


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
    work: Callable[[Item], Result], items: Sequence[Item], workers: int, count: Callable[[int], None]
) -> Iterator[Outcome[Item, Result]]:
    if workers == 1 or len(items) < 2:
        for item in items:
            with _listening(count):
                outcome = _outcome(item, lambda item=item: work(item))  # type: ignore[misc]
            yield outcome
        return
    remaining = list(items)
    while remaining:
        left = yield from _pool(work, remaining, min(workers, len(remaining)), count)
        # a process was killed, which breaks its pool: it was at one of the first of those left; they go on alone
        suspects, remaining = left[:workers], left[workers:]
        for item in suspects:
            if (yield from _pool(work, [item], 1, count)):
                yield Outcome(item, None, "its process was killed (out of memory, or by damaged data?)")


def _pool(
    work: Callable[[Item], Result], items: Sequence[Item], workers: int, count: Callable[[int], None]
) -> Generator[Outcome[Item, Result], None, list[Item]]:
    """Yield outcomes; return the items, in their order, that have none because a process was killed."""
    context = multiprocessing.get_context("spawn")  # forks of a process with threads can hang
    done, seen = context.Value("q", 0), 0
    left: list[int] = []
    with ProcessPoolExecutor(workers, mp_context=context, initializer=_report_to, initargs=(done,)) as pool:
        futures: dict[Future[Result], int] = {}
        for number, item in enumerate(items):
            try:
                futures[pool.submit(work, item)] = number
            except BrokenProcessPool:
                left.append(number)
        remaining = set(futures)
        try:
            while remaining:
                finished, remaining = wait(remaining, timeout=POLL, return_when=FIRST_COMPLETED)
                seen, before = done.value, seen
                count(seen - before)
                for future in finished:
                    if isinstance(future.exception(), BrokenProcessPool):
                        left.append(futures[future])
                    else:
                        yield _outcome(items[futures[future]], future.result)
        finally:
            pool.shutdown(wait=True, cancel_futures=True)
    return [items[number] for number in sorted(left)]


@contextmanager
def _listening(count: Callable[[int], None]) -> Iterator[None]:
    global _count
    before, _count = _count, count
    try:
        yield
    finally:
        _count = before


def _report_to(done: Any) -> None:
    """In another process: :func:`advance` adds to a number that the first process looks at."""
    global _count
    threading.Thread(target=_end_with_parent, daemon=True).start()

    def count(n: int) -> None:
        with done.get_lock():
            done.value += n

    _count = count


def _end_with_parent() -> None:
    """A worker that outlives a killed run would write beside the next one."""
    parent = multiprocessing.parent_process()
    assert parent
    parent.join()
    os._exit(1)


def _outcome(item: Item, result: Callable[[], Result]) -> Outcome[Item, Result]:
    try:
        return Outcome(item, result(), None)
    except (ValueError, OSError) as error:
        return Outcome(item, None, " ".join(str(error).split()) or type(error).__name__)
