"""A digest of all that an HDF5 file holds, for telling whether two files hold the same.

It covers groups, links of every kind as links, attributes, types, shapes, storage (chunks, filters, fill values)
and data: compressed chunks as they are stored, without unpacking. Where in the file things lie plays no part. What
lies in other files (external links, external and virtual storage) counts by its name and is not read.
"""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Collection, Iterator
from typing import Any

import numpy as np

from trackbench.robotics.episodes import import_h5py

_BLOCK = 2**24  # bytes of unpacked data in memory at a time


class _Digest:
    """SHA-256 of a sequence of fields, each with its length, so that no two sequences run together alike.

    ``places``: paths of groups and datasets by address, for what references mean.
    """

    def __init__(self, places: dict[int, str]) -> None:
        self.places = places
        self._hash = hashlib.sha256()

    def add(self, *fields: Any) -> None:
        for field in fields:
            data = (
                field if isinstance(field, bytes | memoryview) else repr(field).encode("utf-8", "surrogateescape")
            )
            self._hash.update(b"%d:" % len(data))
            self._hash.update(data)

    def hex(self) -> str:
        return self._hash.hexdigest()


def content_sha256(file: Any, leave_out: Collection[int] = ()) -> str:
    """Hex digest of what a file holds.

    Args:
        file: an open ``h5py.File``.
        leave_out: addresses (:func:`address`) of groups and datasets that do not count, nor links to them.
    """
    places = _places(file, leave_out)
    digest = _Digest(places)
    for path in places.values():
        item = file[path]
        digest.add("object", path)
        _describe(digest, item)
        if not hasattr(item, "keys"):
            continue
        for name, kind, target in _links(item):
            if kind != "hard":
                digest.add(kind, name, target)
            elif address(item[name]) not in leave_out:
                digest.add(kind, name, places[address(item[name])])
    return digest.hex()


def _places(file: Any, leave_out: Collection[int]) -> dict[int, str]:
    """Address -> one path through hard links, for all groups and datasets, in an order that the links decide."""
    found = {address(file["/"]): "/"}
    waiting = deque(["/"])
    while waiting:
        path = waiting.popleft()
        group = file[path]
        for name, kind, _ in _links(group) if hasattr(group, "keys") else ():
            place = address(group[name]) if kind == "hard" else None
            if place is not None and place not in leave_out and place not in found:
                found[place] = f"{path.rstrip('/')}/{name}"
                waiting.append(found[place])
    return found


def address(item: Any) -> int:
    """Where a group or dataset lies in its file: the same for all links to it, stable while the file is open."""
    return int(import_h5py().h5o.get_info(item.id).addr)


def _links(group: Any) -> Iterator[tuple[str, str, Any]]:
    """Name, kind and target of all links, sorted by name."""
    h5py = import_h5py()
    kinds = {h5py.h5l.TYPE_HARD: "hard", h5py.h5l.TYPE_SOFT: "soft", h5py.h5l.TYPE_EXTERNAL: "external"}
    for name in sorted(group):
        kind = kinds.get(group.id.links.get_info(name.encode("utf-8", "surrogateescape")).type, "other")
        link = group.get(name, getlink=True) if kind in ("soft", "external") else None
        yield name, kind, (getattr(link, "filename", ""), getattr(link, "path", ""))


def _describe(digest: _Digest, item: Any) -> None:
    h5py = import_h5py()
    digest.add(type(item).__name__)
    for name in sorted(item.attrs):
        attribute = h5py.h5a.open(item.id, name.encode("utf-8", "surrogateescape"))
        digest.add("attribute", name, _type(attribute), attribute.get_space().encode())
        if attribute.shape is None:
            continue
        if _by_value(attribute):
            _add_value(digest, item, item.attrs[name])
        else:
            raw = np.empty(attribute.shape, f"V{attribute.get_type().get_size()}")
            attribute.read(raw, mtype=attribute.get_type())
            digest.add(raw.tobytes())
    if isinstance(item, h5py.Datatype):
        digest.add(item.id.encode())
    elif isinstance(item, h5py.Dataset):
        _describe_dataset(digest, item)
    else:
        made = item.id.get_create_plist() if hasattr(item.id, "get_create_plist") else None
        digest.add(made and (made.get_link_creation_order(), made.get_attr_creation_order()))


def _describe_dataset(digest: _Digest, dataset: Any) -> None:
    h5py = import_h5py()
    made = dataset.id.get_create_plist()
    digest.add(_type(dataset.id), dataset.id.get_space().encode(), dataset.chunks, made.get_layout())
    digest.add([_filter(*made.get_filter(index)) for index in range(made.get_nfilters())], made.get_fill_time())
    if made.fill_value_defined() == h5py.h5d.FILL_VALUE_USER_DEFINED:
        _add_value(digest, dataset, dataset.fillvalue)
    if dataset.external or dataset.is_virtual:
        sources = dataset.virtual_sources() if dataset.is_virtual else ()
        digest.add(
            dataset.external,
            [(s.file_name, s.dset_name, s.vspace.encode(), s.src_space.encode()) for s in sources],
        )
    elif dataset.shape is None or 0 in dataset.shape:
        return
    elif _by_value(dataset.id):
        for rows in _blocks(dataset):
            _add_value(digest, dataset, dataset[rows])
    elif dataset.chunks is not None:
        stored: list[tuple[Any, int]] = []
        dataset.id.chunk_iter(lambda chunk: stored.append((chunk.chunk_offset, chunk.filter_mask)))
        for offset, mask in sorted(stored):
            digest.add(offset, mask, dataset.id.read_direct_chunk(offset)[1])
    else:
        for rows in _blocks(dataset):
            _add_raw(digest, dataset, rows)


def _filter(code: int, flags: int, values: tuple[int, ...], name: bytes) -> tuple[Any, ...]:
    """A filter and what its user set; HDF5 appends facts about type and shape, and some bytes of no meaning."""
    h5z = import_h5py().h5z
    computed = code in (h5z.FILTER_SZIP, h5z.FILTER_NBIT, h5z.FILTER_SCALEOFFSET)
    return code, flags, values[:2] if computed else values, name


def _blocks(dataset: Any) -> Iterator[Any]:
    """Selections of rows that together are the dataset, of about ``_BLOCK`` bytes each."""
    if not dataset.shape:
        yield ()
        return
    row = dataset.id.get_type().get_size() * int(np.prod(dataset.shape[1:], dtype=np.int64))
    step = max(1, _BLOCK // max(1, row))
    for start in range(0, dataset.shape[0], step):
        yield slice(start, min(start + step, dataset.shape[0]))


def _add_raw(digest: _Digest, dataset: Any, rows: Any) -> None:
    """The bytes of some rows, in the type that they have in the file."""
    h5py = import_h5py()
    shape = dataset.shape
    selected = dataset.id.get_space()
    if shape:
        shape = (rows.stop - rows.start, *shape[1:])
        selected.select_hyperslab((rows.start, *[0] * (len(shape) - 1)), shape)
    memory = h5py.h5s.create_simple(shape) if shape else h5py.h5s.create(h5py.h5s.SCALAR)
    raw = np.empty(shape, f"V{dataset.id.get_type().get_size()}")
    dataset.id.read(memory, selected, raw, mtype=dataset.id.get_type())
    digest.add(raw.tobytes())


def _type(holder: Any) -> bytes:
    return bytes(holder.get_type().encode())


def _by_value(holder: Any) -> bool:
    """Whether its bytes hold addresses (texts of variable length, references) in place of what they mean."""
    try:
        return bool(holder.dtype.hasobject)
    except TypeError:  # a type without counterpart in numpy
        return False


def _add_value(digest: _Digest, item: Any, value: Any) -> None:
    h5py = import_h5py()
    if isinstance(value, np.ndarray) and value.dtype.hasobject:
        digest.add("array", value.shape)
        for element in value.ravel():
            _add_value(digest, item, element)
    elif isinstance(value, np.void) and value.dtype.names:
        for name in value.dtype.names:
            _add_value(digest, item, value[name])
    elif isinstance(value, h5py.Reference):
        digest.add("reference", *_referred(value, item, digest.places))
    elif isinstance(value, str):
        digest.add("text", value.encode("utf-8", "surrogateescape"))
    elif isinstance(value, bytes):
        digest.add("bytes", bytes(value))
    else:
        array = np.asarray(value)
        digest.add("values", array.dtype.str, array.shape, array.tobytes())


def _referred(reference: Any, item: Any, places: dict[int, str]) -> tuple[Any, ...]:
    """What a reference means: the path of its object, and the region."""
    h5py = import_h5py()
    if not reference:
        return (None,)
    try:
        place = h5py.h5o.get_info(h5py.h5r.dereference(reference, item.id)).addr
        if isinstance(reference, h5py.RegionReference):
            return places.get(place, "?"), h5py.h5r.get_region(reference, item.id).encode()
    except (ValueError, RuntimeError, KeyError):
        return ("to nothing",)
    return (places.get(place, "?"),)
