"""Pieces of work in several processes: all are done, failures are told apart."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console

from trackbench.jobs import advance, run_jobs


def work(number: int) -> int:
    if number == 3:
        raise ValueError("three is\nbad")
    if number == 5:
        raise FileNotFoundError(2, "no such file", "five")
    if number == 9:
        raise KeyError("a defect")
    return number * number


def dies(number: int) -> int:
    if number == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    return number


@pytest.mark.parametrize("workers", [1, 2])
def test_a_failure_ends_its_piece_alone(workers: int) -> None:
    shown = StringIO()
    outcomes = sorted(
        run_jobs(work, range(7), workers, "squaring", Console(file=shown)), key=lambda outcome: outcome.item
    )
    assert [o.result for o in outcomes] == [0, 1, 4, None, 16, None, 36]
    assert {o.item: o.error for o in outcomes if o.error} == {
        3: "three is bad",
        5: "[Errno 2] no such file: 'five'",
    }
    assert "squaring" in shown.getvalue()
    assert "7/7" in shown.getvalue()


@pytest.mark.parametrize("workers", [1, 2])
def test_defects_end_the_run(workers: int) -> None:
    with pytest.raises(KeyError, match="defect"):
        list(run_jobs(work, [9, 9], workers, console=Console(quiet=True)))


@pytest.mark.parametrize("workers", [2, 3])
def test_a_killed_process_fails_its_item_alone(workers: int) -> None:
    outcomes = list(run_jobs(dies, [1, 2, 3, 4, 2, 5], workers, console=Console(quiet=True)))
    assert sorted(o.item for o in outcomes) == [1, 2, 2, 3, 4, 5]
    assert all(o.result == o.item for o in outcomes if o.item != 2)
    assert all("its process was killed" in str(o.error) for o in outcomes if o.item == 2)


def reports(number: int) -> None:
    for _ in range(number):
        advance(2)


@pytest.mark.parametrize("workers", [1, 2])
def test_the_bar_counts_what_the_work_reports(workers: int) -> None:
    shown = StringIO()
    console = Console(file=shown, force_terminal=True, width=120)
    outcomes = list(run_jobs(reports, [3, 1, 4], workers, console=console, total=16))
    assert len(outcomes) == 3
    assert "16/16" in shown.getvalue()
    advance()  # nobody listens: nothing happens


def test_workers_must_make_sense() -> None:
    with pytest.raises(ValueError, match="at least 1"):
        list(run_jobs(work, [1], 0))


def test_no_worker_outlives_a_killed_run(tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text(
        "import time\n"
        "from trackbench.jobs import advance, run_jobs\n"
        "def work(number):\n"
        "    print('started', flush=True)\n"
        "    time.sleep(600)\n"
        "if __name__ == '__main__':\n"
        "    list(run_jobs(work, range(2), 2))\n"
    )
    with subprocess.Popen(
        [sys.executable, str(program)], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    ) as run:
        assert run.stdout is not None
        assert [run.stdout.readline() for _ in range(2)] == [b"started\n"] * 2
        run.kill()
        assert run.communicate(timeout=60) == (b"", None)  # ends when no worker holds the pipe any more
