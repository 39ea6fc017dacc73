"""TFDS directories converted shard by shard: to fewer features, to another file format."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any
from uuid import uuid4

import numpy as np

from trackbench.data.prepare.resumable import Piece
from trackbench.data.prepare.shard_writer import FORMATS, array_record_module, shard_writer
from trackbench.data.tfds.dataset import TfdsDataset
from trackbench.data.tfds.example import select_features
from trackbench.data.tfds.features import parse_features
from trackbench.data.tfds.scenes import TRACK_FEATURES
from trackbench.data.tfds.shards import Record, write_index
from trackbench.data.tfds.storage import Place
from trackbench.files import sha256, written_whole
from trackbench.jobs import advance

_TEMPLATE = "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}"
_KEPT_GROUPS = ("camera/", "metadata/")  # a few numbers each
_SAMPLES = 4  # records to estimate the size from
# bytes around a record at most: headers, and its place in the index; whole blocks
_PER_RECORD = {"tfrecord": 64, "array_record": 64 * 1024}
_PER_SHARD = {"tfrecord": 256, "array_record": 128 * 1024}


@dataclass(frozen=True)
class ShardConversion:
    """Every shard of a TFDS directory to one shard of another, with the same examples in the same order.

    The bytes of the features that are kept are copied as they are. TFRecord shards get an index beside them.

    Attributes:
        source: the directory of a version.
        splits: to convert.
        file_format: of the result, ``tfrecord`` or ``array_record``.
        all_features: keep all of them, instead of those that tracks are made from, and ``camera`` and
            ``metadata``.
        skip_bad: leave out records that cannot be read.
        run: of what is remembered of the source in each process.

    Raises:
        FileNotFoundError: a shard is missing.
        ImportError: ArrayRecord is to be written, and the package is not installed.
        ValueError: a description is damaged, or lacks a split or a feature.
    """

    source: Place
    splits: tuple[str, ...]
    file_format: str
    all_features: bool = False
    skip_bad: bool = False
    run: str = field(default_factory=lambda: uuid4().hex)  # a source may change between runs of one process

    def __post_init__(self) -> None:
        if self.file_format not in FORMATS:
            raise ValueError(f"file_format must be one of {', '.join(FORMATS)}, got {self.file_format}")
        if self.file_format == "array_record":
            array_record_module()
        _opened(self)

    def items(self) -> dict[str, int]:
        """The names of the new shards, and how many records each holds."""
        opened = _opened(self)
        lengths = {split: [count for _, count in examples.shards] for split, examples in opened.splits.items()}
        return {name: lengths[split][index] for name, (split, index) in opened.places.items()}

    def describe(self) -> str:
        """What there is to convert, one line."""
        splits = _opened(self).splits
        records = ", ".join(f"{len(examples)} of {split}" for split, examples in splits.items())
        return f"{records} in {len(self.items())} shards"

    def folders(self) -> tuple[str, ...]:
        """Folders that are written to, under that of the result."""
        return ()

    def bytes_needed(self) -> int:
        """Estimated from a few records of each split."""
        total = 0
        opened = _opened(self)
        for split, examples in opened.splits.items():
            sizes = []
            for index in spread(len(examples)):
                try:
                    with examples.open(index) as example:
                        sizes.append((example.record.size, len(self._content(example.record))))
                except ValueError:
                    continue  # reported when its turn comes
            whole, kept = np.sum(sizes, axis=0) if sizes else (1, 1)
            described = next(entry for entry in opened.info["splits"] if entry["name"] == split)
            stored = int(described.get("numBytes") or whole / max(len(sizes), 1) * len(examples))
            total += int(stored * kept / whole) + _PER_RECORD[self.file_format] * len(examples)
            total += _PER_SHARD[self.file_format] * len(examples.shards)
        return total

    def make(self, out: Path, item: str) -> Piece:
        """Write a shard.

        Raises:
            OSError: the source cannot be read, or the result not written.
        """
        opened = _opened(self)
        split, index = opened.places[item]
        examples = opened.splits[split]
        lengths = [count for _, count in examples.shards]
        first = sum(lengths[:index])
        size, bad = 0, []
        path = out / item
        try:
            with written_whole(path) as unfinished, shard_writer(unfinished, self.file_format) as write:
                for number in range(first, first + lengths[index]):
                    advance()
                    try:
                        with examples.open(number) as example:
                            content = self._content(example.record)
                    except ValueError as error:
                        bad.append(str(error))
                        continue
                    write(content)
                    size += len(content)
                if bad and not self.skip_bad:
                    raise _BadRecordsError
        except _BadRecordsError:
            return Piece(item, {}, {}, tuple(bad))
        files = [path, *([write_index(path)] if self.file_format == "tfrecord" else [])]
        sums = {file.name: sha256(file) for file in files}
        return Piece(item, sums, {"records": lengths[index] - len(bad), "bytes": size}, tuple(bad))

    def finish(self, out: Path, pieces: Mapping[str, Piece]) -> list[str]:
        """Write the descriptions; returns the names of their files."""
        opened = _opened(self)
        splits = []
        for entry in opened.info["splits"]:
            if (split := entry["name"]) in self.splits:
                made = [pieces[item].facts for item, place in opened.places.items() if place[0] == split]
                lengths = [str(facts["records"]) for facts in made]
                size = str(sum(facts["bytes"] for facts in made))
                splits.append({**entry, "filepathTemplate": _TEMPLATE, "shardLengths": lengths, "numBytes": size})
        info = {key: value for key, value in opened.info.items() if key != "alternativeFileFormats"}
        texts = {
            "dataset_info.json": _as_json({**info, "fileFormat": self.file_format, "splits": splits}),
            "features.json": _as_json(opened.description),
        }
        for name in _label_files(self.source) if self.all_features else ():
            texts[name] = (self.source / name).read_text(encoding="utf-8")
        for name, text in texts.items():
            with written_whole(out / name) as file:
                file.write_text(text, encoding="utf-8", newline="\n")
        return list(texts)

    def _content(self, record: Record) -> bytes:
        if self.all_features:
            return record.read(0, record.size)
        content, found = select_features(record, _opened(self).stored)
        missing = [name for name in TRACK_FEATURES if name not in found and not name.startswith("instances/")]
        if missing:
            raise ValueError(f"lacks {', '.join(missing)}")
        return content


@dataclass(frozen=True)
class _Opened:
    info: dict[str, Any]  # dataset_info.json
    description: Any  # features.json of the result
    stored: frozenset[str]  # what is kept of a record
    splits: dict[str, TfdsDataset]
    places: dict[str, tuple[str, int]]  # split and index of each new shard


@lru_cache(maxsize=2)
def _opened(conversion: ShardConversion) -> _Opened:
    """What a process reads once."""
    source = conversion.source
    splits = {split: TfdsDataset(source, split, TRACK_FEATURES, verify=True) for split in conversion.splits}
    info = json.loads((source / "dataset_info.json").read_text(encoding="utf-8"))
    description = json.loads((source / "features.json").read_text(encoding="utf-8"))
    known = parse_features(description)
    kept = {name for name in known if name in TRACK_FEATURES or name.startswith(_KEPT_GROUPS)}
    places = {}
    for split, examples in splits.items():
        count = len(examples.shards)
        for index in range(count):
            name = f"{info['name']}-{split}.{conversion.file_format}-{index:05}-of-{count:05}"
            if Path(name).name != name or "\\" in name:
                raise ValueError(f"{source}: the name {name!r} of a shard would not lie in its folder")
            places[name] = (split, index)
    return _Opened(
        info,
        description if conversion.all_features else select_descriptions(description, kept),
        frozenset(name for feature in kept for name in known[feature].stored),
        splits,
        places,
    )


class _BadRecordsError(Exception):
    """Leaves a shard unwritten."""


def select_descriptions(description: Any, kept: Collection[str]) -> Any:
    """The content of ``features.json`` without all features but those of the names ``kept``.

    Raises:
        ValueError: it is not of that form, or nothing is left.
    """
    try:
        selected = _selected(description, (), kept)
    except (KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"not a description of features: {error!r}") from error
    if selected is None:
        raise ValueError(f"has none of {', '.join(sorted(kept))}")
    return selected


def _selected(node: Any, path: tuple[str, ...], kept: Collection[str]) -> Any:
    kind = str(node.get("pythonClassName", node.get("type"))).rsplit(".", 1)[-1]
    in_old_layout = "content" in node
    key = "content" if in_old_layout else next((k for k, v in node.items() if isinstance(v, dict)), "")
    if kind == "FeaturesDict":
        children = node[key] if in_old_layout else node[key]["features"]
        inner = {name: _selected(child, (*path, name), kept) for name, child in children.items()}
        inner = {name: child for name, child in inner.items() if child is not None}
        return {**node, key: inner if in_old_layout else {**node[key], "features": inner}} if inner else None
    if kind == "Sequence":
        content = _selected(node[key]["feature"], path, kept)
        return None if content is None else {**node, key: {**node[key], "feature": content}}
    return node if "/".join(path) in kept else None


def _label_files(source: Place) -> list[str]:
    """Names of classes, beside the descriptions."""
    names = [path.name for path in source.iterdir()] if isinstance(source, Path) else [*source.entries()]
    return sorted(name for name in names if name.endswith(".labels.txt"))


def spread(count: int) -> list[int]:
    """A few indices below ``count``."""
    return sorted({k * count // _SAMPLES for k in range(_SAMPLES)})


def _as_json(content: Any) -> str:
    return json.dumps(content, indent=2) + "\n"
