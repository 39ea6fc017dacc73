"""The review database: nothing is lost, nothing is rewritten, several processes share it."""

from __future__ import annotations

import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import pytest

from trackbench.robotics import store
from trackbench.robotics.store import Decisions

ONE, TWO = "1" * 64, "2" * 64


@pytest.fixture
def decisions(tmp_path: Path) -> Decisions:
    return Decisions(tmp_path / "new" / "review.sqlite")


def test_what_was_never_written_reads_as_empty_and_makes_no_file(decisions: Decisions) -> None:
    assert decisions.current("a") is None
    assert decisions.all_current() == {}
    assert decisions.history() == []
    assert not decisions.path.parent.exists()


def test_the_newest_decision_is_current_and_history_keeps_all(decisions: Decisions) -> None:
    decisions.decide("day/a", "reject", {0: ONE, 1: TWO}, reason="滑了 slipped")
    decisions.decide("b", "reject", {0: ONE})
    decisions.decide("day/a", "accept", {0: ONE, 1: TWO})
    current = decisions.current("day/a")
    assert current is not None
    assert (current.verdict, current.reason, current.tracks_sha256) == ("accept", "", {0: ONE, 1: TWO})
    assert [event.content["reason"] for event in decisions.history("day/a")] == ["滑了 slipped", ""]
    assert {name: decision.verdict for name, decision in decisions.all_current().items()} == {
        "day/a": "accept",
        "b": "reject",
    }


def test_a_decision_on_other_tracks_does_not_hold(decisions: Decisions) -> None:
    decision = decisions.decide("a", "accept", {0: ONE, 1: TWO})
    assert decision.holds({1: TWO, 0: ONE})
    assert not decision.holds({0: ONE, 1: ONE})
    assert not decision.holds({0: ONE})
    assert not decision.holds({})


def test_undo_brings_back_what_was_before_and_is_itself_in_the_history(decisions: Decisions) -> None:
    first = decisions.decide("a", "reject", {0: ONE}, "blurred")
    second = decisions.decide("a", "accept", {0: ONE})
    decisions.decide("b", "accept", {0: ONE})
    with pytest.raises(ValueError, match="cannot be undone now, the newest one is 2"):
        decisions.undo(first.event)
    undo = decisions.undo(second.event)
    assert (undo.kind, undo.undoes, undo.episode) == ("undo", second.event, "a")
    assert decisions.current("a") == first
    with pytest.raises(ValueError, match="the newest one is 1"):
        decisions.undo(second.event)
    decisions.undo(first.event)
    assert decisions.current("a") is None
    assert decisions.undoable("a") is None
    with pytest.raises(ValueError, match="nothing is left to undo"):
        decisions.undo(first.event)
    with pytest.raises(ValueError, match="no event 99"):
        decisions.undo(99)
    assert [(event.kind, event.undone) for event in decisions.history("a")] == [
        ("decision", True),
        ("decision", True),
        ("undo", False),
        ("undo", False),
    ]
    third = decisions.decide("a", "accept", {0: TWO})
    assert decisions.current("a") == third


def test_rows_can_be_neither_changed_nor_deleted(decisions: Decisions) -> None:
    decisions.decide("a", "accept", {0: ONE})
    with sqlite3.connect(decisions.path) as connection:
        for statement in ("UPDATE events SET episode = 'b'", "DELETE FROM events"):
            with pytest.raises(sqlite3.IntegrityError, match="only grows"):
                connection.execute(statement)
        assert connection.execute("PRAGMA journal_mode").fetchone() == ("wal",)


@pytest.mark.parametrize(
    ("verdict", "hashes", "reason", "message"),
    [
        ("maybe", {0: ONE}, "", "verdict must be one of"),
        ("accept", {}, "", "nothing is tracked"),
        ("accept", {0: ONE, 1: "abc"}, "", "camera 1"),
        ("accept", {0: ONE}, "x" * 2001, "2001 characters"),
    ],
)
def test_decisions_that_make_no_sense_are_refused(
    decisions: Decisions, verdict: str, hashes: dict[int, str], reason: str, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        decisions.decide("a", verdict, hashes, reason)  # type: ignore[arg-type]
    assert decisions.history() == []


def test_other_files_are_refused_and_left_as_they_are(tmp_path: Path) -> None:
    text = tmp_path / "text.sqlite"
    text.write_text("no database at all " * 100)
    with pytest.raises(ValueError, match=r"text\.sqlite: not a review database"):
        Decisions(text).current("a")
    foreign, newer = tmp_path / "foreign.sqlite", tmp_path / "newer.sqlite"
    with sqlite3.connect(foreign) as connection:
        connection.execute("CREATE TABLE events (id)")
    Decisions(newer).decide("a", "accept", {0: ONE})
    with sqlite3.connect(newer) as connection:
        connection.execute("PRAGMA user_version = 2")
    for path, message in ((foreign, "not a review database"), (newer, "format 2, this version")):
        before = path.read_bytes()
        with pytest.raises(ValueError, match=message):
            Decisions(path).history()
        with pytest.raises(ValueError, match=message):
            Decisions(path).decide("a", "accept", {0: ONE})
        assert path.read_bytes() == before


def test_an_error_inside_a_write_leaves_nothing_behind(decisions: Decisions) -> None:
    decisions.decide("a", "accept", {0: ONE})
    with pytest.raises(TypeError):
        decisions.record("a", "correction", {"x": object()})
    with pytest.raises(ValueError, match="not JSON compliant"):
        decisions.record("a", "correction", {"x": float("nan")})
    with pytest.raises(ValueError, match="expected an episode and one of"):
        decisions.record("a", "undo", {})
    assert len(decisions.history()) == 1


_DECIDE_OFTEN = """
import runpy, sys
decisions = runpy.run_path(sys.argv[1])["Decisions"](sys.argv[2])
for turn in range(25):
    decisions.decide(f"shared{turn % 3}", "accept", {0: "1" * 64}, reason=f"{sys.argv[3]}-{turn}")
    decisions.all_current()
"""


def test_processes_that_write_at_once_lose_nothing(tmp_path: Path) -> None:
    path = tmp_path / "review.sqlite"
    command = [
        sys.executable,
        "-c",
        _DECIDE_OFTEN,
        store.__file__,
        str(path),
    ]  # without the package: it starts fast
    workers = [subprocess.Popen([*command, str(worker)]) for worker in range(4)]
    assert [worker.wait(timeout=60) for worker in workers] == [0] * 4
    reasons = [event.content["reason"] for event in Decisions(path).history()]
    assert sorted(reasons) == sorted(f"{worker}-{turn}" for worker in range(4) for turn in range(25))


def test_a_killed_writer_leaves_a_database_that_goes_on(tmp_path: Path) -> None:
    path = tmp_path / "review.sqlite"
    endless = _DECIDE_OFTEN.replace("range(25)", "range(10**9)")
    worker = subprocess.Popen([sys.executable, "-c", endless, store.__file__, str(path), "0"])
    deadline = time.monotonic() + 60
    while len(Decisions(path).history()) < 20:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    worker.kill()
    worker.wait()
    decisions = Decisions(path)
    reasons = [event.content["reason"] for event in decisions.history()]
    assert reasons == [f"0-{turn}" for turn in range(len(reasons))]
    assert decisions.decide("a", "reject", {0: ONE}).event == len(reasons) + 1
