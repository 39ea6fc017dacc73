"""Shards of records, written: TFRecord directly, ArrayRecord through its package."""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from trackbench.data.tfds.crc32c import masked_crc32c

_HEADER = struct.Struct("<QI")  # length, its checksum
_FOOTER = struct.Struct("<I")  # checksum of the record
FORMATS = ("tfrecord", "array_record")


@contextmanager
def shard_writer(path: Path, file_format: str) -> Iterator[Callable[[bytes], None]]:
    """A function that appends a record to a new file.

    Args:
        path: the file.
        file_format: ``tfrecord`` or ``array_record``, as TFDS has them in ``dataset_info.json``.

    Raises:
        ImportError: the package array-record is not installed.
        OSError: the file cannot be written.
    """
    with _WRITERS[file_format](path) as write:
        yield write


@contextmanager
def _tfrecord(path: Path) -> Iterator[Callable[[bytes], None]]:
    with path.open("wb") as file:

        def write(record: bytes) -> None:
            length = struct.pack("<Q", len(record))
            file.write(_HEADER.pack(len(record), masked_crc32c(length)))
            file.write(record)
            file.write(_FOOTER.pack(masked_crc32c(record)))

        yield write


@contextmanager
def _array_record(path: Path) -> Iterator[Callable[[bytes], None]]:
    writer = array_record_module().ArrayRecordWriter(str(path), "group_size:1")  # as TFDS, for random access

    def write(record: bytes) -> None:
        try:
            writer.write(record)
        except RuntimeError as error:
            raise OSError(f"{path}: {error}") from error

    try:
        yield write
    finally:
        try:
            writer.close()
        except RuntimeError as error:
            raise OSError(f"{path}: {error}") from error


_WRITERS = {"tfrecord": _tfrecord, "array_record": _array_record}


def array_record_module() -> Any:
    """The module of the package array-record.

    Raises:
        ImportError: it is not installed.
    """
    try:
        from array_record.python import array_record_module as module
    except ImportError as error:
        raise ImportError(
            'to write ArrayRecord files, install the package array-record: pip install "trackbench[movi]"'
        ) from error
    return module
