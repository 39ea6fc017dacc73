"""Files that appear whole or not at all, and names that stay in their folder."""

from __future__ import annotations

import hashlib
import os
import re
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


def remove_unfinished(folder: Path) -> None:
    """Remove what killed runs left of :func:`written_whole` in ``folder`` itself; no run may be writing there."""
    for file in folder.iterdir() if folder.is_dir() else ():
        if _UNFINISHED.fullmatch(file.name) and file.is_file():
            file.unlink(missing_ok=True)


def sha256(path: Path) -> str:
    """Hex digest of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


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
