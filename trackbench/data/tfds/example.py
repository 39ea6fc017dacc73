"""``tf.train.Example`` in protobuf's wire format: a map from names to lists of bytes, floats or integers."""

from __future__ import annotations

from collections.abc import Container, Iterator

import numpy as np
from numpy.typing import NDArray

from trackbench.data.tfds.shards import Record, RecordInMemory

_VARINT, _FIXED64, _LENGTH, _FIXED32 = 0, 1, 2, 5  # wire types
_MAX_VARINT = 10  # bytes
_HEAD = 2 * _MAX_VARINT  # most bytes of a field before its content
_FEATURES = 1  # field of Example
_ENTRY = 1  # field of Features
_KEY, _VALUE = 1, 2  # fields of an entry
_BYTES, _FLOATS, _INTS = 1, 2, 3  # fields of Feature
_KIND = {_BYTES: "bytes", _FLOATS: "floats", _INTS: "integers"}
_ITEM = 1  # field of each list


def read_features(record: Record, wanted: Container[str]) -> dict[str, bytes]:
    """The wanted features of an Example, each a Feature message; nothing else of the record is read.

    Raises:
        ValueError: the record is not an Example.
    """
    found = {}
    for field, start, stop in _fields(record, 0, record.size):
        if field != _FEATURES:
            continue
        for inner, entry, end in _fields(record, start, stop):
            if inner != _ENTRY:
                continue
            parts = {number: (a, b) for number, a, b in _fields(record, entry, end)}
            key = record.read(*parts.get(_KEY, (0, 0))).decode(errors="replace")
            if key in wanted:
                found[key] = record.read(*parts.get(_VALUE, (0, 0)))
    return found


def select_features(record: Record, wanted: Container[str]) -> tuple[bytes, set[str]]:
    """The record with only the wanted features, their bytes as they are, in their order; and their names.

    Raises:
        ValueError: the record is not an Example.
    """
    entries, names = [], set()
    for field, start, stop in _fields(record, 0, record.size):
        if field != _FEATURES:
            continue
        for inner, entry, end in _fields(record, start, stop):
            if inner != _ENTRY:
                continue
            keys = [(a, b) for number, a, b in _fields(record, entry, end) if number == _KEY]
            key = record.read(*keys[-1]).decode(errors="replace") if keys else ""
            if key in wanted:
                entries.append(_field(_ENTRY, record.read(entry, end)))
                names.add(key)
    return _field(_FEATURES, b"".join(entries)), names


def _field(number: int, content: bytes) -> bytes:
    """A field of a message, ``number`` below 16."""
    length, left = bytearray(), len(content)
    while left >= 0x80:
        length.append(left & 0x7F | 0x80)
        left >>= 7
    return bytes([number << 3 | _LENGTH, *length, left]) + content


def bytes_list(feature: bytes) -> list[bytes]:
    """The values of a Feature of bytes."""
    return _items(feature, _BYTES)


def float_list(feature: bytes) -> NDArray[np.float32]:
    """The values of a Feature of floats."""
    packed = b"".join(_items(feature, _FLOATS))  # packed or one by one, the bytes are the same
    if len(packed) % 4:
        raise ValueError(f"a list of floats has {len(packed)} bytes, expected a multiple of 4")
    return np.frombuffer(packed, "<f4").astype(np.float32)


def int_list(feature: bytes) -> NDArray[np.int64]:
    """The values of a Feature of integers."""
    return _varints(b"".join(_items(feature, _INTS)))


def _items(feature: bytes, wanted: int) -> list[bytes]:
    """The contents of the list in a Feature; none where the Feature has no list."""
    message = RecordInMemory(feature)
    items = []
    for number, start, stop in _fields(message, 0, message.size):
        if number in _KIND and number != wanted:
            raise ValueError(f"holds {_KIND[number]}, expected {_KIND[wanted]}")
        if number == wanted:
            content = RecordInMemory(message.read(start, stop))
            items += [content.read(a, b) for item, a, b in _fields(content, 0, content.size) if item == _ITEM]
    return items


def _fields(record: Record, at: int, end: int) -> Iterator[tuple[int, int, int]]:
    """The fields of a message: number, and where the content starts and stops."""
    while at < end:
        head = record.read(at, min(at + _HEAD, end))
        tag, used = _varint(head, 0)
        number, wire_type = tag >> 3, tag & 7
        if wire_type == _LENGTH:
            length, used = _varint(head, used)
        elif wire_type == _VARINT:
            length = _varint(head, used)[1] - used
        elif wire_type in (_FIXED32, _FIXED64):
            length = 4 if wire_type == _FIXED32 else 8
        else:
            raise ValueError(f"not a tf.train.Example: wire type {wire_type} at byte {at}")
        start, stop = at + used, at + used + length
        if number == 0 or stop > end:
            raise ValueError(f"not a tf.train.Example: field {number} at byte {at} ends at {stop}, beyond {end}")
        yield number, start, stop
        at = stop


def _varint(data: bytes, at: int) -> tuple[int, int]:
    """The number at a place, and the place after it."""
    value = 0
    for used, byte in enumerate(data[at : at + _MAX_VARINT]):
        value |= (byte & 0x7F) << (7 * used)
        if byte < 0x80:
            return value, at + used + 1
    raise ValueError("not a tf.train.Example: a number has no end")


def _varints(packed: bytes) -> NDArray[np.int64]:
    """All numbers of a packed list at once."""
    data = np.frombuffer(packed, np.uint8)
    if not len(data):
        return np.zeros(0, np.int64)
    last = np.flatnonzero(data < 0x80)
    if not len(last) or last[-1] != len(data) - 1:
        raise ValueError("a list of integers is cut off")
    first = np.concatenate([[0], last[:-1] + 1])
    lengths = last - first + 1
    if lengths.max() > _MAX_VARINT:
        raise ValueError("a list of integers holds a number of more than 64 bits")
    values = np.zeros(len(last), np.uint64)
    for place in range(int(lengths.max())):
        long_enough = lengths > place
        part = (data[first[long_enough] + place] & 0x7F).astype(np.uint64)
        values[long_enough] |= part << np.uint64(7 * place)
    return values.view(np.int64)
