"""The files of a data set, shards of records: TFRecord read directly, ArrayRecord through its package."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from contextlib import closing, contextmanager
from io import FileIO
from pathlib import Path
from typing import Any, Protocol

from trackbench.data.tfds.crc32c import masked_crc32c

_HEADER = struct.Struct("<QI")  # length, its checksum
_FOOTER = struct.Struct("<I")  # checksum of the record


class Record(Protocol):
    """A record of ``size`` bytes."""

    size: int

    def read(self, start: int, stop: int) -> bytes:
        """The bytes from ``start`` to ``stop``; ValueError where the record ends before."""
        ...


class Shard(Protocol):
    """A file of records."""

    path: Path

    def record(self, index: int) -> Any:
        """A context that gives :class:`Record` ``index``; ValueError where it is damaged."""
        ...


class TfRecordShard:
    """A TFRecord file: ``[u64 length][u32 checksum][record][u32 checksum]`` again and again.

    Where records lie is read from their headers, up to the record that is asked for, and remembered: a shard
    holds tens of records, so that takes less time than to decode one and needs no index file. Of a record only
    the parts that are asked for are read.

    Args:
        path: the file; it need not exist before a record is asked for.
        count: records that it should hold.
        verify: read each record whole and compare its checksum, before it is used.
    """

    def __init__(self, path: Path, count: int, verify: bool = False) -> None:
        self.path = path
        self.count = count
        self.verify = verify
        self._spans: list[tuple[int, int]] = []

    @contextmanager
    def record(self, index: int) -> Iterator[Record]:
        """Record ``index``, while the context is open.

        Raises:
            ValueError: a header before it or its own is damaged, the file ends within it, or, with ``verify``,
                its checksum is another.
        """
        with FileIO(self.path) as file:
            start, stop = self._span(file, index)
            if self.verify:
                content = _read(file, start, stop + _FOOTER.size)
                if _FOOTER.unpack(content[-_FOOTER.size :])[0] != masked_crc32c(content[: -_FOOTER.size]):
                    raise ValueError("damaged: its checksum is not that of its bytes")
                yield RecordInMemory(content[: -_FOOTER.size])
            else:
                yield _RecordInFile(file, start, stop)

    def _span(self, file: FileIO, index: int) -> tuple[int, int]:
        end_of_file = file.seek(0, 2)
        while len(self._spans) <= index:
            number = len(self._spans)
            at = self._spans[-1][1] + _FOOTER.size if self._spans else 0
            if at == end_of_file:
                raise ValueError(f"missing: the file holds {number} records, expected {self.count}")
            if at + _HEADER.size > end_of_file:
                raise ValueError(f"missing: the file is cut off in the header of record {number}")
            header = _read(file, at, at + _HEADER.size)
            length, checksum = _HEADER.unpack(header)
            if masked_crc32c(header[:8]) != checksum:
                raise ValueError(f"out of reach: the header of record {number} is damaged")
            start = at + _HEADER.size
            if start + length + _FOOTER.size > end_of_file:
                raise ValueError(
                    f"missing: the file is cut off in record {number}, at byte {end_of_file} "
                    f"of at least {start + length + _FOOTER.size}"
                )
            self._spans.append((start, start + length))
        return self._spans[index]


class ArrayRecordShard:
    """An ArrayRecord file, read by the package ``array-record`` (the extra ``movi``).

    Args:
        path: the file; it need not exist before a record is asked for.
        count: records that it should hold.
    """

    def __init__(self, path: Path, count: int) -> None:
        self.path = path
        self.count = count

    @contextmanager
    def record(self, index: int) -> Iterator[Record]:
        """Record ``index``.

        Raises:
            ValueError: the file is damaged.
            ImportError: the package is not installed.
        """
        try:
            from array_record.python.array_record_module import ArrayRecordReader
        except ImportError as error:
            raise ImportError(
                f'{self.path}: ArrayRecord files need the package array-record: pip install "trackbench[movi]"'
            ) from error
        try:
            with closing(ArrayRecordReader(str(self.path))) as reader:  # closing reports damage, too
                if reader.num_records() <= index:
                    raise ValueError(
                        f"missing: the file holds {reader.num_records()} records, expected {self.count}"
                    )
                content = reader.read([index])[0]
        except (RuntimeError, IndexError) as error:
            raise ValueError(f"damaged: {error}") from error
        yield RecordInMemory(content)


class RecordInMemory:
    """A record that was read as a whole."""

    def __init__(self, content: bytes) -> None:
        self.content = content
        self.size = len(content)

    def read(self, start: int, stop: int) -> bytes:
        """As :meth:`Record.read`."""
        if not 0 <= start <= stop <= self.size:
            raise ValueError(f"ends at byte {self.size}, expected at least {stop}")
        return self.content[start:stop]


class _RecordInFile:
    def __init__(self, file: FileIO, start: int, stop: int) -> None:
        self._file, self._start = file, start
        self.size = stop - start

    def read(self, start: int, stop: int) -> bytes:
        if not 0 <= start <= stop <= self.size:
            raise ValueError(f"ends at byte {self.size}, expected at least {stop}")
        return _read(self._file, self._start + start, self._start + stop)


def _read(file: FileIO, start: int, stop: int) -> bytes:
    file.seek(start)
    content = file.read(stop - start)
    if content is None or len(content) != stop - start:
        raise ValueError(f"the file ends before byte {stop}")
    return content
