"""What reviewers decided and changed: one SQLite file that only ever grows.

Every decision, correction, annotation, confirmation and undo is a row of the table ``events``; triggers of the
database refuse to change or delete one. An undo is a row that names the row it takes back, so what holds now
follows from the rows. A decision names the SHA-256 of the tracks it was made on: on other tracks it is stale.
"""

from __future__ import annotations

import json
import re
import sqlite3
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal, get_args

Verdict = Literal["accept", "reject"]
Kind = Literal["decision", "correction", "annotation", "confirmation", "undo"]

FORMAT = 1  # of the database, its user_version
APPLICATION = 0x54424831  # "TBH1", its application_id: another program's database is not written to
LONGEST_REASON = 2000  # characters
WAIT = 30.0  # seconds for another process to finish writing
_SHA256 = re.compile(r"[0-9a-f]{64}")

_SCHEMA = f"""
CREATE TABLE events (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    time TEXT NOT NULL,
    episode TEXT NOT NULL,
    kind TEXT NOT NULL CHECK (kind IN ({", ".join(f"'{kind}'" for kind in get_args(Kind))})),
    content TEXT NOT NULL CHECK (json_valid(content)),
    undoes INTEGER UNIQUE REFERENCES events (id) CHECK ((undoes IS NOT NULL) = (kind = 'undo'))
);
CREATE INDEX events_of_episode ON events (episode, id);
CREATE TRIGGER no_update BEFORE UPDATE ON events BEGIN SELECT RAISE(ABORT, 'history only grows'); END;
CREATE TRIGGER no_delete BEFORE DELETE ON events BEGIN SELECT RAISE(ABORT, 'history only grows'); END;
"""
_ALL = "SELECT id, time, episode, kind, content, undoes, EXISTS (SELECT 1 FROM events u WHERE u.undoes = e.id)"


@dataclass(frozen=True)
class Event:
    """One row of the history.

    Attributes:
        id: grows with time.
        time: ISO 8601, UTC.
        episode: its id.
        kind: what happened.
        content: depends on ``kind``; JSON.
        undoes: the row that an undo takes back.
        undone: whether a later row takes this one back.
    """

    id: int
    time: str
    episode: str
    kind: Kind
    content: dict[str, Any]
    undoes: int | None
    undone: bool


@dataclass(frozen=True)
class Decision:
    """An episode's verdict.

    Attributes:
        event: id of its row.
        episode: its id.
        verdict: "accept" or "reject".
        reason: in the reviewer's words, or empty.
        time: ISO 8601, UTC.
        tracks_sha256: camera -> SHA-256 of the tracks file that was judged.
    """

    event: int
    episode: str
    verdict: Verdict
    reason: str
    time: str
    tracks_sha256: dict[int, str]

    def holds(self, tracks_sha256: Mapping[int, str]) -> bool:
        """Whether these are the tracks that it was made on; if not, it is stale and does not count."""
        return self.tracks_sha256 == dict(tracks_sha256)


class Decisions:
    """The decisions of a work folder with their history; several processes and threads may use one file.

    Args:
        path: ``review.sqlite``; made by the first write, a missing one reads as empty.

    Raises:
        ValueError: (every method) it is not such a database, or one of a newer version.
    """

    def __init__(self, path: Path) -> None:
        self.path = Path(path)

    def current(self, episode: str) -> Decision | None:
        """The newest decision that was not undone; whether it still counts, :meth:`Decision.holds` says."""
        newest = [event for event in self.history(episode) if event.kind == "decision" and not event.undone]
        return _decision(newest[-1]) if newest else None

    def all_current(self) -> dict[str, Decision]:
        """Episode -> its newest decision that was not undone, for all that have one."""
        query = f"{_ALL} FROM events e WHERE kind = 'decision' ORDER BY id"
        return {event.episode: _decision(event) for event in self._read(query) if not event.undone}

    def history(self, episode: str | None = None) -> list[Event]:
        """Everything that happened, oldest first; of one episode or of all."""
        if episode is None:
            return self._read(f"{_ALL} FROM events e ORDER BY id")
        return self._read(f"{_ALL} FROM events e WHERE episode = ? ORDER BY id", episode)

    def undoable(self, episode: str) -> Event | None:
        """The newest event of an episode that was not undone: the one that :meth:`undo` takes back."""
        left = [event for event in self.history(episode) if event.kind != "undo" and not event.undone]
        return left[-1] if left else None

    def decide(
        self, episode: str, verdict: Verdict, tracks_sha256: Mapping[int, str], reason: str = ""
    ) -> Decision:
        """Record a decision.

        Args:
            episode: its id.
            verdict: "accept" or "reject".
            tracks_sha256: of the tracks it is made on, see :func:`trackbench.robotics.review.tracks_sha256`.
            reason: at most 2000 characters.

        Raises:
            ValueError: another verdict, no tracks, something that is no SHA-256, or a longer reason.
        """
        if verdict not in get_args(Verdict):
            raise ValueError(f"{episode}: verdict must be one of {get_args(Verdict)}, got {verdict!r}")
        if len(reason) > LONGEST_REASON:
            raise ValueError(f"{episode}: the reason has {len(reason)} characters, at most {LONGEST_REASON} fit")
        if not tracks_sha256:
            raise ValueError(f"{episode}: nothing is tracked yet, so there is nothing to decide on")
        wrong = [camera for camera, digest in tracks_sha256.items() if not _SHA256.fullmatch(digest)]
        if wrong:
            raise ValueError(f"{episode}: not a SHA-256 of the tracks of camera {wrong[0]}")
        hashes = {str(camera): digest for camera, digest in sorted(tracks_sha256.items())}
        content = {"verdict": verdict, "reason": reason, "tracks_sha256": hashes}
        return _decision(self.record(episode, "decision", content))

    def record(self, episode: str, kind: Kind, content: Mapping[str, Any]) -> Event:
        """Add an event that is not an undo.

        Raises:
            ValueError: an empty episode, an unknown kind, or ``content`` that is not JSON.
        """
        if not episode or kind == "undo" or kind not in get_args(Kind):
            raise ValueError(f"{episode!r}: expected an episode and one of {get_args(Kind)[:-1]}, got {kind!r}")
        return self._add(episode, kind, content, None)

    def undo(self, event: int) -> Event:
        """Take back an event, the newest of its episode that was not undone yet; returns the undo.

        It only says so: what the event did to files is put back by who knows them.

        Raises:
            ValueError: there is no such event, or it is not the newest one left of its episode.
        """
        with self._writing() as connection:
            rows = connection.execute(f"{_ALL} FROM events e WHERE id = ?", (event,)).fetchall()
            if not rows:
                raise ValueError(f"{self.path}: there is no event {event} to undo")
            episode = rows[0][2]
            left = connection.execute(
                "SELECT max(id) FROM events e WHERE episode = ? AND kind != 'undo' "
                "AND NOT EXISTS (SELECT 1 FROM events u WHERE u.undoes = e.id)",
                (episode,),
            ).fetchone()[0]
            if left != event:
                newest = "nothing is left to undo" if left is None else f"the newest one is {left}"
                raise ValueError(f"{episode}: event {event} cannot be undone now, {newest}")
            return _insert(connection, episode, "undo", {}, event)

    def _add(self, episode: str, kind: Kind, content: Mapping[str, Any], undoes: int | None) -> Event:
        with self._writing() as connection:
            return _insert(connection, episode, kind, content, undoes)

    def _read(self, query: str, *values: Any) -> list[Event]:
        if not self.path.exists():
            return []
        with self._connection() as connection:
            if _is_empty(connection):  # another process is about to fill it
                return []
            self._check(connection)
            return [_event(row) for row in connection.execute(query, values)]

    @contextmanager
    def _writing(self) -> Iterator[sqlite3.Connection]:
        """A transaction that keeps other writers out from its start."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self._connection() as connection:
            connection.execute("BEGIN IMMEDIATE")
            with connection:
                if _is_empty(connection):
                    self._create(connection)
            self._check(connection)
            if connection.execute("PRAGMA journal_mode").fetchone()[0] != "wal":
                connection.execute("PRAGMA journal_mode = WAL")  # readers do not wait for writers
            connection.execute("BEGIN IMMEDIATE")
            with connection:
                yield connection

    @contextmanager
    def _connection(self) -> Iterator[sqlite3.Connection]:
        """A connection of this call alone, so that threads and processes share nothing but the file."""
        connection = None
        try:
            connection = sqlite3.connect(self.path, timeout=WAIT, isolation_level=None)
            yield connection
        except sqlite3.OperationalError as error:  # locked, full disk, no permission
            raise OSError(f"{self.path}: {error}") from error
        except sqlite3.DatabaseError as error:
            raise ValueError(f"{self.path}: not a review database: {error}") from error
        finally:
            if connection is not None:
                connection.close()

    def _create(self, connection: sqlite3.Connection) -> None:
        for statement in _statements(_SCHEMA):
            connection.execute(statement)
        connection.execute(f"PRAGMA application_id = {APPLICATION}")
        connection.execute(f"PRAGMA user_version = {FORMAT}")

    def _check(self, connection: sqlite3.Connection) -> None:
        application = connection.execute("PRAGMA application_id").fetchone()[0]
        version = connection.execute("PRAGMA user_version").fetchone()[0]
        if application != APPLICATION:
            raise ValueError(f"{self.path}: not a review database of trackbench")
        if version != FORMAT:
            raise ValueError(f"{self.path}: format {version}, this version of trackbench reads format {FORMAT}")


def _is_empty(connection: sqlite3.Connection) -> bool:
    if connection.execute("PRAGMA application_id").fetchone()[0]:
        return False
    return connection.execute("SELECT count(*) FROM sqlite_master").fetchone()[0] == 0


def _statements(script: str) -> Iterator[str]:
    """The statements of an SQL script (``executescript`` would end the transaction)."""
    statement = ""
    for line in script.splitlines(keepends=True):
        statement += line
        if sqlite3.complete_statement(statement):
            yield statement
            statement = ""


def _insert(
    connection: sqlite3.Connection, episode: str, kind: Kind, content: Mapping[str, Any], undoes: int | None
) -> Event:
    time = datetime.now(UTC).isoformat(timespec="milliseconds")
    text = json.dumps(content, ensure_ascii=False, allow_nan=False)
    cursor = connection.execute(
        "INSERT INTO events (time, episode, kind, content, undoes) VALUES (?, ?, ?, ?, ?)",
        (time, episode, kind, text, undoes),
    )
    assert cursor.lastrowid is not None
    return Event(cursor.lastrowid, time, episode, kind, json.loads(text), undoes, undone=False)


def _event(row: tuple[Any, ...]) -> Event:
    number, time, episode, kind, content, undoes, undone = row
    return Event(number, time, episode, kind, json.loads(content), undoes, bool(undone))


def _decision(event: Event) -> Decision:
    hashes = {int(camera): digest for camera, digest in event.content["tracks_sha256"].items()}
    content = event.content
    return Decision(event.id, event.episode, content["verdict"], content["reason"], event.time, hashes)
