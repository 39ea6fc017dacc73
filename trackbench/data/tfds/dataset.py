"""A split of a data set in a TFDS directory, example by example, in any order."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from trackbench.data.tfds.example import read_features
from trackbench.data.tfds.features import Feature, Value, parse_features
from trackbench.data.tfds.shards import (
    INDEX_SUFFIX,
    ArrayRecordShard,
    Record,
    RemoteTfRecordShard,
    Shard,
    TfRecordShard,
)
from trackbench.data.tfds.storage import Place, RemotePath, place

log = logging.getLogger(__name__)
_VERSION = re.compile(r"\d+\.\d+\.\d+")
_CONFIG = re.compile(r"\d+x\d+")  # of MOVi
_FORMATS = ("tfrecord", "array_record")  # the first allows to read parts of a record
_TEMPLATE = "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}"


class Example:
    """An open record.

    Args:
        record: its bytes.
        features: what can be read of it.

    Attributes:
        record: as it is stored.
    """

    def __init__(self, record: Record, features: Mapping[str, Feature]) -> None:
        self.record = record
        self._features = features

    def read(self, names: Iterable[str], images: Collection[int] | None = None) -> dict[str, Value]:
        """Some features, by name: see :meth:`Feature.decode`.

        Args:
            names: of the features.
            images: the only ones to decode of each feature's images; the others stay zero. None: all.

        Raises:
            ValueError: the record is no ``tf.train.Example``, or does not fit ``features.json``.
        """
        features = [self._features[name] for name in names]
        stored = read_features(self.record, {name for feature in features for name in feature.stored})
        return {feature.name: feature.decode(stored, images) for feature in features}


class TfdsDataset:
    """A split of a data set as TFDS writes it: ``dataset_info.json``, ``features.json`` and shards of records.

    Opening reads the two descriptions; an example is read when it is asked for, and of it only the wanted
    features, in local TFRecord files also from the disk. TensorFlow is not needed.

    Behind a URL such as ``gs://bucket/movi_f`` an example of a TFRecord file is read by one request, see
    :class:`~trackbench.data.tfds.shards.RemoteTfRecordShard`, and an ArrayRecord file is copied as a whole when
    it is first needed, see :func:`~trackbench.data.tfds.storage.local_copy`.

    Args:
        path: the directory of a version, such as ``movi_f/512x512/1.0.0``, or a directory above it, or its URL:
            see :func:`find_version`.
        split: such as ``train``.
        features: names of those to read, such as ``camera/positions``.
        verify: compare the checksum of each record (TFRecord; ArrayRecord's package always does).

    Attributes:
        features: what is known of the wanted features.
        name: of the data set.

    Raises:
        FileNotFoundError: there is no such directory, or a shard is missing.
        ImportError: the package for the URL's protocol is not installed.
        OSError: a storage failed several times.
        ValueError: a description is damaged, or lacks the split or a feature; unknown protocol of a URL.
    """

    def __init__(self, path: str | Place, split: str, features: Iterable[str], verify: bool = False) -> None:
        folder = find_version(path)
        if folder is None:
            raise FileNotFoundError(f"{path}: expected features.json and dataset_info.json of a TFDS data set")
        self.folder = folder
        self.features = _read_features(folder / "features.json", features)
        self.split = split
        self._shards, lengths = _shards(folder, split, verify)
        self._starts = np.concatenate([[0], np.cumsum(lengths)])

    def __len__(self) -> int:
        return int(self._starts[-1])

    @property
    def shards(self) -> list[tuple[Shard, int]]:
        """The files in their order, and how many examples are in each."""
        return list(zip(self._shards, np.diff(self._starts).tolist(), strict=True))

    def __getitem__(self, index: int) -> dict[str, Value]:
        """All wanted features of an example, by name; errors as of :meth:`open`."""
        with self.open(index) as example:
            return example.read(self.features)

    @contextmanager
    def open(self, index: int) -> Iterator[Example]:
        """An example, to read parts of it while the context is open.

        A ValueError in the context gets the shard and the number of the record in front of its message.

        Raises:
            FileNotFoundError: the shard is gone.
            ImportError: the shard is of ArrayRecord, whose package is not installed.
            IndexError: no such example.
            OSError: a storage failed several times.
            ValueError: the record is missing or damaged.
        """
        shard, number = self._place(index)
        try:
            with shard.record(number) as record:
                yield Example(record, self.features)
        except ValueError as error:
            raise ValueError(f"{shard.path}: record {number}: {error}") from error
        except FileNotFoundError:
            raise
        except OSError as error:
            raise OSError(f"{shard.path}: record {number}: {error}") from error

    def _place(self, index: int) -> tuple[Shard, int]:
        if not 0 <= index < len(self):
            raise IndexError(f"{self.folder}: example {index} of {len(self)} in {self.split}")
        shard = int(np.searchsorted(self._starts, index, side="right")) - 1
        return self._shards[shard], index - int(self._starts[shard])


def find_version(path: str | Place) -> Place | None:
    """The directory with ``features.json`` at or under a path or URL; None where there is none.

    Looks at ``path``, and under it in directories named as data sets, configurations (``512x512``) and versions
    (``1.0.0``) are, so that a folder of other things is not searched. Of several versions the newest.

    Raises:
        ImportError: the package for the URL's protocol is not installed.
        OSError: a storage failed several times.
        ValueError: there are several data sets or configurations; unknown protocol of a URL.
    """
    path = place(path)
    newest: dict[Place, Place] = {}
    for version in sorted(_versions(path, depth=3), key=_number):
        newest[version.parent] = version
    if len(newest) > 1:
        raise ValueError(f"{path}: give one of {', '.join(sorted(map(str, newest.values())))}")
    return next(iter(newest.values()), None)


def _versions(path: Place, depth: int) -> list[Place]:
    if isinstance(path, RemotePath):
        entries = path.entries()
        described = "features.json" in entries
        inside: Iterable[Place] = (path / name for name, entry in entries.items() if entry["type"] == "directory")
    else:
        described = (path / "features.json").is_file()
        inside = path.iterdir() if depth and not described and path.is_dir() else ()
    if described or not depth:
        return [path] if described else []
    below = [p for p in inside if _VERSION.fullmatch(p.name) or _CONFIG.fullmatch(p.name) or "movi_" in p.name]
    return [version for inner in below for version in _versions(inner, depth - 1)]


def _number(version: Place) -> tuple[int, ...]:
    return tuple(int(n) for n in version.name.split(".")) if _VERSION.fullmatch(version.name) else ()


def _read_features(file: Place, names: Iterable[str]) -> dict[str, Feature]:
    try:
        known = parse_features(_read_json(file))
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from error
    missing = [name for name in names if name not in known]
    if missing:
        raise ValueError(f"{file}: lacks {', '.join(missing)}, or they are of an unknown kind")
    return {name: known[name] for name in names}


def _shards(folder: Place, split: str, verify: bool) -> tuple[list[Shard], list[int]]:
    """The shards of a split, and how many records are in each."""
    file = folder / "dataset_info.json"
    try:
        info = _read_json(file)
        dataset = str(info["name"])
        splits = {str(entry["name"]): entry for entry in info["splits"]}
        formats = [info.get("fileFormat") or "tfrecord", *info.get("alternativeFileFormats", ())]
        if split not in splits:
            raise ValueError(f"has no split {split!r}, only {', '.join(map(repr, splits)) or 'none'}")
        lengths = [int(n) for n in splits[split].get("shardLengths", ())]
        template = str(splits[split].get("filepathTemplate") or _TEMPLATE)
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{file}: not a description of a data set: {error!r}") from error
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from error
    if not lengths or min(lengths) < 0 or not sum(lengths):
        raise ValueError(f"{file}: split {split!r} has no examples, its shards hold {lengths}")
    known = [suffix for suffix in _FORMATS if suffix in formats]
    if not known:
        raise ValueError(f"{file}: expected shards of {' or '.join(_FORMATS)}, got {', '.join(map(str, formats))}")
    entries = folder.entries() if isinstance(folder, RemotePath) else {}  # one request for all
    fewest: list[str] | None = None
    # other formats last: shards that were converted without a word in the description
    for suffix in [*known, *(other for other in _FORMATS if other not in known)]:
        shards = [
            _shard_name(file, template, dataset, split, suffix, k, len(lengths)) for k in range(len(lengths))
        ]
        missing = [
            name
            for name in shards
            if name not in entries and not (isinstance(folder, Path) and (folder / name).is_file())
        ]
        if not missing:
            return _opened(folder, suffix, shards, lengths, verify, entries), lengths
        fewest = missing if fewest is None or len(missing) < len(fewest) else fewest
    assert fewest
    raise FileNotFoundError(
        f"{folder / fewest[0]}: no such file; {len(fewest)} of {len(lengths)} shards are missing"
    )


def _opened(
    folder: Place,
    suffix: str,
    names: list[str],
    lengths: list[int],
    verify: bool,
    entries: dict[str, dict[str, Any]],
) -> list[Shard]:
    if suffix == "array_record":
        return [
            ArrayRecordShard(folder / name, n, entries.get(name)) for name, n in zip(names, lengths, strict=True)
        ]
    if isinstance(folder, Path):
        return [TfRecordShard(folder / name, n, verify) for name, n in zip(names, lengths, strict=True)]
    indices = [folder / (name + INDEX_SUFFIX) if name + INDEX_SUFFIX in entries else None for name in names]
    if None in indices:
        log.warning(
            "%s: %d of %d shards have no index, so each process asks for all headers before a record: write_index "
            "makes one",
            folder,
            indices.count(None),
            len(names),
        )
    return [
        RemoteTfRecordShard(folder / name, n, verify, entries[name].get("size"), index)
        for name, n, index in zip(names, lengths, indices, strict=True)
    ]


def _shard_name(file: Place, template: str, dataset: str, split: str, suffix: str, index: int, count: int) -> str:
    values = {
        "DATASET": dataset,
        "SPLIT": split,
        "FILEFORMAT": suffix,
        "SHARD_INDEX": f"{index:05}",
        "NUM_SHARDS": f"{count:05}",
        "SHARD_X_OF_Y": f"{index:05}-of-{count:05}",
    }
    name = template
    for key, value in values.items():
        name = name.replace(f"{{{key}}}", value)
    if Path(name).name != name or "\\" in name:
        raise ValueError(f"{file}: shards must lie beside it, got the name {name!r}")
    return name


def _read_json(file: Place) -> Any:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ValueError("no such file") from error
    except RecursionError as error:
        raise ValueError("nested too deeply") from error
