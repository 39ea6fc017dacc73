"""Files that appear whole or not at all, and names that stay in their folder."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from uuid import uuid4

_UNFINISHED = re.compile(r"\.[0-9a-f]{8}\.part-.+")


@contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """A path beside ``path`` to write to, which takes its place when the block ends without an error.

    It keeps the suffix, for libraries that look at that. What is there is replaced; its folder is made if needed.
    An error, a kill or a full disk leaves ``path`` as it was; :func:`remove_unfinished` clears what a kill left.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{uuid4().hex[:8]}.part-{path.name}")
    try:
        yield unfinished
        with unfinished.open("rb+") as file:  # on the disk before it has the name
            os.fsync(file.fileno())
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)


@contextmanager
def folder_written_whole(path: Path) -> Iterator[Path]:
    """As :func:`written_whole`, for a folder: one to fill, which takes the place of ``path``.

    What is there is removed just before, so a kill may leave nothing at ``path``, but never a mixture.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{uuid4().hex[:8]}.part-{path.name}")
    unfinished.mkdir()
    try:
        yield unfinished
        if path.exists():
            shutil.rmtree(path)
        unfinished.replace(path)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def is_unfinished(path: Path) -> bool:
    """Whether a file or folder is one that :func:`written_whole` or :func:`folder_written_whole` fills."""
    return _UNFINISHED.fullmatch(path.name) is not None


def remove_unfinished(folder: Path) -> None:
    """Remove what killed runs left of :func:`written_whole` in ``folder`` itself; no run may be writing there."""
    for path in folder.iterdir() if folder.is_dir() else ():
        if not is_unfinished(path):
            continue
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def link_or_copy(source: Path, target: Path) -> None:
    """Give a file a second name, or copy it where the file system cannot; makes the folder if needed."""
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(source, target)
    except FileExistsError:
        raise
    except OSError:  # another file system, or one without hard links
        shutil.copyfile(source, target)


def sha256(path: Path) -> str:
    """Hex digest of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def natural_order(name: str) -> list[tuple[int, str]]:
    """Sorting key in which runs of digits count as numbers: "2" before "10"; the name itself decides ties."""
    parts = re.split(r"(\d+)", name)
    return [*((int(part), "") if part.isdecimal() else (-1, part) for part in parts), (-1, name)]


def inside(root: Path, name: str) -> Path:
    """The path of ``name``, which comes from elsewhere, under ``root``.

    Raises:
        ValueError: it is empty, absolute, holds ``..``, a backslash, a colon or a NUL, or leads out of ``root``
            through a link.
    """
    parts = PurePosixPath(name).parts
    if not parts or name.startswith("/") or ".." in parts or any(sign in name for sign in "\\:\0"):
        raise ValueError(f"{name!r}: expected a relative name that stays in {root}")
    path = root.joinpath(*parts)
    if not path.resolve().is_relative_to(root.resolve()):
        raise ValueError(f"{name!r} leads out of {root}")
    return path
