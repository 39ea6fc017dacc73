"""A folder that a long conversion fills piece by piece: what is finished is known by its content, and kept."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.filesize import decimal

from trackbench.files import inside, is_unfinished, remove_unfinished, sha256, written_whole
from trackbench.jobs import advance, run_jobs

STATE = "prepare.jsonl"
SUMS = "SHA256SUMS"


@dataclass(frozen=True)
class Piece:
    """A finished part of the conversion.

    Attributes:
        item: its name.
        files: the SHA-256 of each of its files, by path under the folder, with ``/``.
        facts: what the conversion needs to know at the end; of JSON's types.
        bad: what could not be converted, a line for each; then only the rest is in ``files``.
    """

    item: str
    files: Mapping[str, str]
    facts: Mapping[str, Any] = field(default_factory=dict)
    bad: tuple[str, ...] = ()


class PreparedFolder:
    """A folder with ``prepare.jsonl``: in its first line the settings, then a line for each finished piece.

    Args:
        path: the folder; it need not exist.
        settings: all that the content depends on, of JSON's types.

    Attributes:
        pieces: those that are finished, by item.

    Raises:
        ValueError: the folder holds something else, or was prepared with other settings.
    """

    def __init__(self, path: Path, settings: Mapping[str, Any]) -> None:
        self.path = path
        self.settings = json.loads(json.dumps(settings))
        self.pieces: dict[str, Piece] = {}
        state = path / STATE
        if state.is_file():
            self._read(state)
        elif path.exists() and (not path.is_dir() or not all(is_unfinished(file) for file in path.iterdir())):
            raise ValueError(f"{path} holds something else: give a new or empty folder, or one to resume")

    def start(self, folders: Iterable[str] = ()) -> None:
        """Write down the settings, and remove what a killed run left here and in ``folders`` under it."""
        for folder in (self.path, *(self.path / name for name in folders)):
            remove_unfinished(folder)
        self._write()

    def add(self, piece: Piece) -> None:
        """Write down a finished piece."""
        self.pieces[piece.item] = piece
        with (self.path / STATE).open("a", encoding="utf-8") as file:
            file.write(_line(asdict(piece)))
            file.flush()
            os.fsync(file.fileno())

    def finish(self, names: Iterable[str]) -> None:
        """Write ``SHA256SUMS`` of all pieces and of the files ``names`` beside them."""
        self._write()
        sums = {name: sha256(self.path / name) for name in (STATE, *names)}
        for piece in self.pieces.values():
            sums |= piece.files
        with written_whole(self.path / SUMS) as file:
            lines = (f"{digest}  {name}\n" for name, digest in sorted(sums.items()))
            file.write_text("".join(lines), encoding="utf-8", newline="\n")

    def _write(self) -> None:
        pieces = [asdict(self.pieces[item]) for item in sorted(self.pieces)]
        with written_whole(self.path / STATE) as file:
            lines = (_line(content) for content in (self.settings, *pieces))
            file.write_text("".join(lines), encoding="utf-8", newline="\n")

    def _read(self, state: Path) -> None:
        lines = state.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True)
        try:
            settings = json.loads(lines[0])
            for line in lines[1:]:
                if line.endswith("\n"):  # a kill may have cut the last one off
                    content = json.loads(line)
                    piece = Piece(
                        content["item"], dict(content["files"]), dict(content["facts"]), tuple(content["bad"])
                    )
                    self.pieces[piece.item] = piece
        except (ValueError, IndexError, KeyError, TypeError) as error:
            raise ValueError(f"{state}: damaged ({error!r}): prepare into another folder") from error
        if settings != self.settings:
            before = settings if isinstance(settings, dict) else {}
            changed = sorted(
                key for key in before.keys() | self.settings.keys() if before.get(key) != self.settings.get(key)
            )
            raise ValueError(
                f"{self.path} was prepared otherwise: "
                + "; ".join(f"{key} was {before.get(key)}, now {self.settings.get(key)}" for key in changed)
            )


def fill(
    folder: PreparedFolder,
    items: Mapping[str, int],
    make: Callable[[Path, str], Piece],
    workers: int,
    description: str,
    console: Console,
    skip_bad: bool = False,
) -> tuple[int, list[str]]:
    """Make all pieces that are not there with the content that was written.

    Args:
        folder: to fill; ``start`` was called.
        items: the pieces, and of how many units each is.
        make: makes the piece of an item in the folder, and reports its units to
            :func:`~trackbench.jobs.advance`; picklable. Where something is bad it must leave its files
            out, unless bad things are to be skipped.
        workers: processes.
        description: of the progress bar.
        console: of the progress bar.
        skip_bad: whether a piece with something bad is finished, too. Even then the next run tries it again.

    Returns:
        How many were kept from before, and what failed, a line for each.
    """
    kept, failed = 0, []
    jobs = [(item, folder.pieces.get(item), units) for item, units in items.items()]
    work, total = partial(_made, folder.path, make), sum(items.values())
    for outcome in run_jobs(work, jobs, workers, description, console, total):
        if outcome.result is None:
            failed.append(f"{outcome.item[0]}: {outcome.error}")
            continue
        piece, is_new = outcome.result
        if piece.bad and not skip_bad:
            failed += piece.bad
        elif is_new:
            folder.add(piece)
        else:
            kept += 1
    return kept, sorted(failed)


def _made(
    folder: Path, make: Callable[[Path, str], Piece], job: tuple[str, Piece | None, int]
) -> tuple[Piece, bool]:
    item, known, units = job
    if known is not None and not known.bad and all(_is_whole(folder, *file) for file in known.files.items()):
        advance(units)
        return known, False
    return make(folder, item), True


def _is_whole(folder: Path, name: str, digest: str) -> bool:
    path = inside(folder, name)
    return path.is_file() and sha256(path) == digest


def size_of(folder: PreparedFolder) -> int:
    """Bytes of the files of finished pieces."""
    paths = (inside(folder.path, name) for piece in folder.pieces.values() for name in piece.files)
    return sum(path.stat().st_size for path in paths if path.is_file())


def check_room(path: Path, needed: int) -> str:
    """A line that says what room is needed and there.

    Raises:
        ValueError: the disk has less.
    """
    there = path.absolute()
    while not there.exists():
        there = there.parent
    free = shutil.disk_usage(there).free
    line = f"needs about {decimal(needed)} at {path}, {decimal(free)} are free"
    if needed > free:
        raise ValueError(line)
    return line


def verify(path: Path, workers: int, console: Console) -> list[str]:
    """Compare all files of a prepared folder with its checksums; what is wrong, a line for each.

    Raises:
        ValueError: ``SHA256SUMS`` is missing, since the folder was never finished, or damaged.
    """
    file = path / SUMS
    if not file.is_file():
        raise ValueError(f"{file}: no such file; it is written when everything is prepared")
    jobs = []
    for line in file.read_text(encoding="utf-8", errors="replace").splitlines():
        digest, _, name = line.partition("  ")
        if len(digest) != 64 or not name:
            raise ValueError(f"{file}: expected lines of a SHA-256, two spaces and a name, got {line[:100]!r}")
        inside(path, name)
        jobs.append((name, digest))
    outcomes = run_jobs(partial(_check, path), jobs, workers, "verifying", console)
    return sorted(outcome.error for outcome in outcomes if outcome.error is not None)


def _check(folder: Path, job: tuple[str, str]) -> None:
    name, digest = job
    if not (folder / name).is_file():
        raise ValueError(f"{folder / name}: missing")
    if not _is_whole(folder, name, digest):
        raise ValueError(f"{folder / name}: changed since it was written")


def _line(content: Any) -> str:
    return json.dumps(content, sort_keys=True) + "\n"
