"""The files of a data set, shards of records: TFRecord read directly, ArrayRecord through its package."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from functools import partial
from io import FileIO
from itertools import pairwise
from pathlib import Path
from typing import Any, Protocol

from trackbench.data.tfds.crc32c import masked_crc32c
from trackbench.data.tfds.storage import Place, RemotePath, local_copy
from trackbench.files import written_whole

INDEX_SUFFIX = ".index"  # after the name of a TFRecord shard
_HEADER = struct.Struct("<QI")  # length, its checksum
_FOOTER = struct.Struct("<I")  # checksum of the record
_INDEX_FORMAT = "trackbench TFRecord index 1"

ReadBytes = Callable[[int, int], bytes]


class Record(Protocol):
    """A record of ``size`` bytes."""

    size: int

    def read(self, start: int, stop: int) -> bytes:
        """The bytes from ``start`` to ``stop``; ValueError where the record ends before."""
        ...


class Shard(Protocol):
    """A file of records."""

    @property
    def path(self) -> Place:
        """The file."""
        ...

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
            start, stop = _find(self._spans, index, partial(_read, file), file.seek(0, 2), self.count)
            if self.verify:
                content = _read(file, start, stop + _FOOTER.size)
                _compare_checksum(content[: -_FOOTER.size], content[-_FOOTER.size :])
                yield RecordInMemory(content[: -_FOOTER.size])
            else:
                yield _RecordInFile(file, start, stop)


class RemoteTfRecordShard:
    """A TFRecord file in a storage: a record is one request.

    Where records lie is read from the file's index (see :func:`write_index`) when a process first needs it.
    Without an index it is read from the headers, as of :class:`TfRecordShard`: a request for each record before
    the wanted one, once for each process.

    Args:
        path: the file.
        count: records that it should hold.
        verify: compare the checksum of each record, before it is used.
        size: of the file in bytes; None: to be asked for.
        index: of the file; None: there is none.
    """

    def __init__(
        self,
        path: RemotePath,
        count: int,
        verify: bool = False,
        size: int | None = None,
        index: RemotePath | None = None,
    ) -> None:
        self.path = path
        self.count = count
        self.verify = verify
        self.index = index
        self._size = size
        self._spans: list[tuple[int, int]] = []

    @contextmanager
    def record(self, index: int) -> Iterator[Record]:
        """Record ``index``, which is read as a whole.

        Raises:
            FileNotFoundError: the file or its index is gone.
            OSError: the storage failed several times.
            ValueError: as of :meth:`TfRecordShard.record`, and where the index does not fit the file.
        """
        start, stop = self._span(index)
        content = self.path.read(start - _HEADER.size, stop + _FOOTER.size)
        length, checksum = _HEADER.unpack_from(content)
        if length != stop - start or checksum != masked_crc32c(content[:8]):
            cause = f"{self.index} is not the index of this file" if self.index else "the file has changed"
            raise ValueError(f"not at byte {start - _HEADER.size}: {cause}")
        record = RecordInMemory(content, _HEADER.size, len(content) - _FOOTER.size)
        if self.verify:
            _compare_checksum(record.read(0, record.size), content[-_FOOTER.size :])
        yield record

    def _span(self, index: int) -> tuple[int, int]:
        if self._size is None:
            self._size = self.path.size()
        if self.index is not None and not self._spans:
            self._spans = _read_index(self.index, self._size)
        return _find(self._spans, index, self.path.read, self._size, self.count)


class ArrayRecordShard:
    """An ArrayRecord file, read by the package ``array-record`` (the extra ``movi``).

    The package reads local files only: of a file in a storage, :func:`~trackbench.data.tfds.storage.local_copy`
    makes a copy when a process first needs it.

    Args:
        path: the file; it need not exist before a record is asked for.
        count: records that it should hold.
        entry: of a file in a storage, see there.
    """

    def __init__(self, path: Place, count: int, entry: dict[str, Any] | None = None) -> None:
        self.path = path
        self.count = count
        self.entry = entry or {}

    @contextmanager
    def record(self, index: int) -> Iterator[Record]:
        """Record ``index``.

        Raises:
            ValueError: the file is damaged.
            ImportError: the package is not installed.
            OSError: the file cannot be copied from its storage.
        """
        try:
            from array_record.python.array_record_module import ArrayRecordReader
        except ImportError as error:
            raise ImportError(
                f'{self.path}: ArrayRecord files need the package array-record: pip install "trackbench[movi]"'
            ) from error
        file = self.path if isinstance(self.path, Path) else local_copy(self.path, self.entry)
        try:
            with closing(ArrayRecordReader(str(file))) as reader:  # closing reports damage, too
                if reader.num_records() <= index:
                    raise ValueError(
                        f"missing: the file holds {reader.num_records()} records, expected {self.count}"
                    )
                content = reader.read([index])[0]
        except (RuntimeError, IndexError) as error:
            raise ValueError(f"damaged: {error}") from error
        yield RecordInMemory(content)


class RecordInMemory:
    """A record that was read as a whole: the bytes from ``begin`` to ``end``, None for all, of ``content``."""

    def __init__(self, content: bytes, begin: int = 0, end: int | None = None) -> None:
        self.content = content
        self._begin = begin
        self.size = (len(content) if end is None else end) - begin

    def read(self, start: int, stop: int) -> bytes:
        """As :meth:`Record.read`."""
        if not 0 <= start <= stop <= self.size:
            raise ValueError(f"ends at byte {self.size}, expected at least {stop}")
        return self.content[self._begin + start : self._begin + stop]


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


def write_index(shard: Path, out: Path | None = None) -> Path:
    """Write where the records of a local TFRecord file start, for reading it from a storage.

    The index is JSON, belongs beside the shard, and is named as it with ``.index`` behind: a shard read from a
    storage without one costs a request for each record before the wanted one.

    Args:
        shard: of which all headers are read.
        out: the index; None: beside the shard.

    Returns:
        The index's path.

    Raises:
        FileNotFoundError: no such shard.
        ValueError: the shard is cut off or damaged.
    """
    offsets = []
    with FileIO(shard) as file:
        size, at = file.seek(0, 2), 0
        while at < size:
            offsets.append(at)
            try:
                at = _next_span(partial(_read, file), size, at, len(offsets) - 1)[1] + _FOOTER.size
            except ValueError as error:
                raise ValueError(f"{shard}: record {len(offsets) - 1}: {error}") from error
    out = shard.with_name(shard.name + INDEX_SUFFIX) if out is None else out
    with written_whole(out) as unfinished:
        content = {"format": _INDEX_FORMAT, "shard": shard.name, "size": size, "offsets": offsets}
        unfinished.write_text(json.dumps(content), encoding="utf-8")
    return out


def _read_index(file: RemotePath, size: int) -> list[tuple[int, int]]:
    """Start and stop of each record of a shard of ``size`` bytes."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        if content["format"] != _INDEX_FORMAT:
            raise ValueError(f"format {content['format']!r}, expected {_INDEX_FORMAT!r}")
        made_for, offsets = int(content["size"]), [int(offset) for offset in content["offsets"]]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"{file}: not an index: {error!r}") from error
    if made_for != size:
        raise ValueError(f"{file}: made for a file of {made_for} bytes, it has {size}: write the index anew")
    least = _HEADER.size + _FOOTER.size
    ends = [*offsets, size]
    if ends[0] != 0 or any(b - a < least for a, b in pairwise(ends)):
        raise ValueError(
            f"{file}: not an index: expected offsets from 0 to {size - least}, {least} apart at least"
        )
    return [(a + _HEADER.size, b - _FOOTER.size) for a, b in pairwise(ends)]


def _find(
    spans: list[tuple[int, int]], index: int, read: ReadBytes, end_of_file: int, expected: int
) -> tuple[int, int]:
    """Start and stop of record ``index``; ``spans`` holds those found so far."""
    while len(spans) <= index:
        at = spans[-1][1] + _FOOTER.size if spans else 0
        if at == end_of_file:
            raise ValueError(f"missing: the file holds {len(spans)} records, expected {expected}")
        spans.append(_next_span(read, end_of_file, at, len(spans)))
    return spans[index]


def _next_span(read: ReadBytes, end_of_file: int, at: int, number: int) -> tuple[int, int]:
    """Start and stop of record ``number``, whose header is at byte ``at``."""
    if at + _HEADER.size > end_of_file:
        raise ValueError(f"missing: the file is cut off in the header of record {number}")
    header = read(at, at + _HEADER.size)
    length, checksum = _HEADER.unpack(header)
    if masked_crc32c(header[:8]) != checksum:
        raise ValueError(f"out of reach: the header of record {number} is damaged")
    start = at + _HEADER.size
    if start + length + _FOOTER.size > end_of_file:
        raise ValueError(
            f"missing: the file is cut off in record {number}, at byte {end_of_file} "
            f"of at least {start + length + _FOOTER.size}"
        )
    return start, start + length


def _compare_checksum(record: bytes, stored: bytes) -> None:
    if _FOOTER.unpack(stored)[0] != masked_crc32c(record):
        raise ValueError("damaged: its checksum is not that of its bytes")
