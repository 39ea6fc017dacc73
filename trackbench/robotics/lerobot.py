"""Episodes as a LeRobot dataset, format v3.0 (github.com/huggingface/lerobot).

Written from the description in LeRobot's documentation (``docs/source/lerobot-dataset-v3.mdx``) and what its
readers ask for (``src/lerobot/datasets``: ``utils.py``, ``io_utils.py``, ``dataset_metadata.py``,
``compute_stats.py``)::

    meta/info.json                               schema, frames per second, where files lie
    meta/stats.json                              statistics of every feature, for normalisation
    meta/tasks.parquet                           what is done, in words, and its number
    meta/episodes/chunk-000/file-000.parquet     per episode: length, where its rows and frames lie, statistics
    data/chunk-000/file-000.parquet              a row per frame
    videos/observation.images.cam0/chunk-000/file-000.mp4

A file may hold several episodes; here it holds one, so that videos need not be encoded again.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trackbench.files import link_or_copy, written_whole
from trackbench.robotics.episodes import EpisodeFile
from trackbench.robotics.track_file import CameraTracks
from trackbench.robotics.workspace import EpisodeInfo

VERSION = "v3.0"
CHUNK = 1000  # files per folder
DATA_PATH = "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet"
VIDEO_PATH = "videos/{video_key}/chunk-{chunk_index:03d}/file-{file_index:03d}.mp4"
EPISODES_PATH = "meta/episodes/chunk-000/file-000.parquet"
KEYPOINTS = "observation.keypoints"
VISIBLE = "observation.keypoints_visible"
CONFIDENCE = "observation.keypoints_confidence"
NO_TASK = "unspecified"

QUANTILES = {"q01": 0.01, "q10": 0.1, "q50": 0.5, "q90": 0.9, "q99": 0.99}
LONGEST_VECTOR = 4096  # values per step that are taken without being asked for
SAMPLED_FRAMES, PIXEL_STRIDE = 100, 4  # what image statistics are taken from

_OF_EVERY_DATASET = {
    "timestamp": "float32",
    **dict.fromkeys(("frame_index", "episode_index", "index", "task_index"), "int64"),
}
_OBSERVATION = ("obs", "observation", "observations")

Feature = dict[str, Any]
Statistics = dict[str, list[Any]]


@dataclass(frozen=True)
class Piece:
    """What an episode adds to a dataset, whatever its number in it will be.

    Attributes:
        features: key -> dtype, shape and names, as ``meta/info.json`` has them; without the five that every
            dataset has.
        fps: frames per second.
        task: what is done, in words.
        vectors: key -> (T, N), for the features that are no videos.
        images: key -> statistics, for those that are.
        left_out: datasets of the episode that are not in it, and why.
    """

    features: dict[str, Feature]
    fps: float
    task: str
    vectors: dict[str, NDArray[Any]]
    images: dict[str, Statistics]
    left_out: dict[str, str]

    @property
    def num_frames(self) -> int:
        """T."""
        return len(self.vectors[KEYPOINTS])


def collect(
    episode: EpisodeFile,
    info: EpisodeInfo,
    tracks: Mapping[int, CameraTracks],
    keys: Mapping[str, str],
    task: str | None = None,
) -> Piece:
    """Gather what an episode adds to a dataset.

    Of the other datasets in its steps, vectors of numbers are taken (leading axes of 1 do not count): ``action``
    as ``action``, ``obs/state`` as ``observation.state``, ``gripper/force`` as ``gripper.force``. Floats become
    float32, integers int64.

    Args:
        episode: open.
        info: of it.
        tracks: of each tracked camera.
        keys: dataset -> key of its feature, instead of those above; "" leaves it out. Named so, an array of any
            shape is taken, as one vector.
        task: what is done; None: the file's attribute ``task``, or else ``unspecified``.

    Raises:
        ValueError: two datasets with one key, a key that is LeRobot's own, a dataset in ``keys`` that is not
            there; numbers that are not finite; damaged data.
    """
    height, width = info.height + info.height % 2, info.width + info.width % 2
    features: dict[str, Feature] = {}
    images: dict[str, Statistics] = {}
    for camera in range(info.cameras):
        features[f"observation.images.cam{camera}"] = {
            "dtype": "video",
            "shape": [height, width, 3],
            "names": ["height", "width", "channels"],
            "info": {
                "video.height": height,
                "video.width": width,
                "video.codec": "h264",
                "video.pix_fmt": "yuv420p",
                "video.is_depth_map": False,
                "video.fps": _number(info.fps),
                "video.channels": 3,
                "has_audio": False,
            },
        }
        images[f"observation.images.cam{camera}"] = _image_statistics(episode, camera)
    names = [f"cam{camera}.{name}" for camera, found in tracks.items() for name in found.names]
    xy = np.concatenate([found.xy for found in tracks.values()]).transpose(1, 0, 2).reshape(info.num_frames, -1)
    vectors: dict[str, NDArray[Any]] = {
        KEYPOINTS: xy.astype(np.float32),
        VISIBLE: np.concatenate([found.visible for found in tracks.values()]).T,
        CONFIDENCE: np.concatenate([found.visibility for found in tracks.values()]).T.astype(np.float32),
    }
    named = {KEYPOINTS: [f"{name}.{axis}" for name in names for axis in "xy"], VISIBLE: names, CONFIDENCE: names}
    chosen, left_out = _choose(episode, keys)
    for name, key in chosen.items():
        try:
            vectors[key] = _read(episode, name)
        except ValueError as error:
            if name in keys:
                raise
            left_out[name] = str(error).removeprefix(f"{episode.path}: ")
    for key, values in vectors.items():
        if not np.isfinite(values).all():
            t = int(np.argmin(np.isfinite(values).all(axis=1)))
            raise ValueError(
                f"{episode.path}: {key} of {episode.steps[t]} is not finite; NAME= leaves a dataset out"
            )
        size = values.shape[1]
        features[key] = {
            "dtype": values.dtype.name,
            "shape": [size],
            "names": named.get(key) or [f"{key.rpartition('.')[2]}_{index}" for index in range(size)],
        }
    return Piece(features, info.fps, task or episode.attribute("task") or NO_TASK, vectors, images, left_out)


def difference(piece: Piece, usual: Piece) -> str:
    """How a piece fails to fit into a dataset with another one; "" where it fits."""
    if piece.fps != usual.fps:
        return f"has {piece.fps:g} frames per second, most episodes {usual.fps:g}"
    for key, feature in usual.features.items():
        if key not in piece.features:
            reason = next((f" ({why})" for name, why in piece.left_out.items() if feature_key(name) == key), "")
            return f"has no {key}, which most episodes have{reason}"
        here = piece.features[key]
        for part in ("dtype", "shape", "names"):
            if here[part] != feature[part]:
                return f"{part} of {key} is {_short(here[part])}, of most episodes {_short(feature[part])}"
    extra = sorted(set(piece.features) - set(usual.features))
    return f"has {', '.join(extra)}, which most episodes have not" if extra else ""


def most_usual(pieces: Sequence[Piece]) -> Piece:
    """The first of the pieces that most others fit to."""
    kinds: dict[str, list[int]] = {}
    for index, piece in enumerate(pieces):
        kinds.setdefault(json.dumps([piece.fps, piece.features], sort_keys=True), []).append(index)
    return pieces[max(kinds.values(), key=lambda members: (len(members), -members[0]))[0]]


def write_piece(path: Path, piece: Piece) -> None:
    """Keep a piece for :func:`write_dataset`."""
    content = {key: getattr(piece, key) for key in ("features", "fps", "task", "images", "left_out")}
    with written_whole(path) as unfinished:
        vectors: dict[str, Any] = {f"vector.{key}": values for key, values in piece.vectors.items()}
        np.savez_compressed(unfinished, content=np.array(json.dumps(content)), **vectors)


def read_piece(path: Path, with_vectors: bool = True) -> Piece:
    """Read what :func:`write_piece` wrote; without vectors, little memory is needed."""
    with np.load(path, allow_pickle=False) as file:
        content = json.loads(str(file["content"]))
        names = [name for name in file.files if name != "content"] if with_vectors else []
        return Piece(vectors={name.removeprefix("vector."): file[name] for name in names}, **content)


def write_dataset(
    folder: Path, pieces: Sequence[Path], videos: Sequence[Sequence[Path]], robot_type: str | None = None
) -> None:
    """Write a dataset; one piece is in memory at a time.

    Args:
        folder: an empty one.
        pieces: files of :func:`write_piece` that fit together, in the order of episodes.
        videos: per episode, one per camera; they are linked where the file system can, else copied.
        robot_type: in LeRobot's words, e.g. ``so101_follower``.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    tasks: dict[str, int] = {}
    rows: list[dict[str, Any]] = []
    statistics: list[dict[str, Statistics]] = []
    start, features, fps = 0, {}, 0.0
    for number, (path, files) in enumerate(zip(pieces, videos, strict=True)):
        piece = read_piece(path)
        features, fps, T = piece.features, piece.fps, piece.num_frames
        frame = np.arange(T)
        columns = {
            **piece.vectors,
            "timestamp": (frame / piece.fps).astype(np.float32)[:, None],
            "frame_index": frame[:, None],
            "episode_index": np.full((T, 1), number),
            "index": (start + frame)[:, None],
            "task_index": np.full((T, 1), tasks.setdefault(piece.task, len(tasks))),
        }
        place = {"chunk_index": number // CHUNK, "file_index": number % CHUNK}
        _write_table(folder / DATA_PATH.format(**place), {key: _column(values) for key, values in columns.items()})
        row: dict[str, Any] = {"episode_index": number, "tasks": [piece.task], "length": T}
        row |= {f"data/{key}": value for key, value in place.items()}
        row |= {"dataset_from_index": start, "dataset_to_index": start + T}
        for key, video in zip(piece.images, files, strict=True):
            link_or_copy(video, folder / VIDEO_PATH.format(video_key=key, **place))
            row |= {f"videos/{key}/{name}": value for name, value in place.items()}
            row |= {f"videos/{key}/from_timestamp": 0.0, f"videos/{key}/to_timestamp": T / piece.fps}
        found = {**piece.images, **{key: _statistics(values) for key, values in columns.items()}}
        row |= {f"stats/{key}/{name}": value for key, stats in found.items() for name, value in stats.items()}
        rows.append({**row, "meta/episodes/chunk_index": 0, "meta/episodes/file_index": 0})
        statistics.append(found)
        start += T
    _write_table(folder / EPISODES_PATH, {key: [row[key] for row in rows] for key in rows[0]})
    tasks_table = pa.table(
        {"task_index": pa.array(tasks.values(), pa.int64()), "task": pa.array(tasks, pa.string())}
    )
    pq.write_table(
        tasks_table.replace_schema_metadata({"pandas": json.dumps(_TASKS_BY_TEXT)}), folder / "meta/tasks.parquet"
    )
    _write_json(
        folder / "meta/stats.json", {key: _pooled([found[key] for found in statistics]) for key in statistics[0]}
    )
    _write_json(
        folder / "meta/info.json",
        {
            "codebase_version": VERSION,
            "robot_type": robot_type,
            "total_episodes": len(rows),
            "total_frames": start,
            "total_tasks": len(tasks),
            "chunks_size": CHUNK,
            "data_files_size_in_mb": 100,
            "video_files_size_in_mb": 200,
            "fps": _number(fps),
            "splits": {"train": f"0:{len(rows)}"},
            "data_path": DATA_PATH,
            "video_path": VIDEO_PATH,
            "features": {
                **features,
                **{key: {"dtype": dtype, "shape": [1], "names": None} for key, dtype in _OF_EVERY_DATASET.items()},
            },
        },
    )


def feature_key(name: str) -> str:
    """The key that a dataset of a step gets if nothing else is said."""
    if name in ("action", "actions"):
        return "action"
    head, _, rest = name.partition("/")
    parts = ["observation", *rest.split("/")] if head in _OBSERVATION and rest else name.split("/")
    return ".".join(parts)


# what makes pandas, which LeRobot reads this table with, take the texts as its index
_TASKS_BY_TEXT = {
    "index_columns": ["task"],
    "column_indexes": [],
    "columns": [
        {
            "name": "task_index",
            "field_name": "task_index",
            "pandas_type": "int64",
            "numpy_type": "int64",
            "metadata": None,
        },
        {"name": "task", "field_name": "task", "pandas_type": "unicode", "numpy_type": "object", "metadata": None},
    ],
    "pandas_version": "2.2.0",
}


def _choose(episode: EpisodeFile, keys: Mapping[str, str]) -> tuple[dict[str, str], dict[str, str]]:
    """Datasets to take with their keys; those left out with the reason."""
    for name, key in keys.items():
        if "/" in key:
            raise ValueError(f"{name}={key}: a key of LeRobot has no /")
    there = episode.datasets()
    missing = sorted(set(keys) - set(there))
    if missing:
        raise ValueError(
            f"{episode.path}: {episode.steps[0]} has no {missing[0]}; it has {', '.join(there) or 'nothing'}"
        )
    taken = {KEYPOINTS: "the tracks", VISIBLE: "the tracks", CONFIDENCE: "the tracks"}
    taken |= dict.fromkeys((*_OF_EVERY_DATASET, "task"), "LeRobot")
    chosen, left_out = {}, {}
    for name in sorted(there, key=lambda name: (name not in keys, name)):
        dtype, shape = there[name]
        key = keys.get(name, feature_key(name))
        size = math.prod(shape)
        if name in keys and key == "":
            left_out[name] = "as asked for"
        elif dtype.hasobject or size < 1:
            left_out[name] = "no numbers"
        elif name not in keys and (size > LONGEST_VECTOR or size != max(shape[-1:], default=1)):
            left_out[name] = f"shape {shape} is no vector"
        elif key in taken or key.startswith("observation.images."):
            told = f"its key {key} belongs to {taken.get(key, 'the cameras')}"
            if name in keys:
                raise ValueError(f"{episode.path}: {name}: {told}")
            left_out[name] = told
        else:
            chosen[name], taken[key] = key, name
    return chosen, left_out


def _read(episode: EpisodeFile, name: str) -> NDArray[Any]:
    """(T, N) values of a dataset."""
    values = np.stack([episode.value(t, name).reshape(-1) for t in range(episode.num_frames)])
    return values.astype({"f": np.float32, "i": np.int64, "u": np.int64, "b": np.bool_}[values.dtype.kind])


def _image_statistics(episode: EpisodeFile, camera: int) -> Statistics:
    """Of the channels, in [0, 1], each value of shape (3, 1, 1); from some frames and some of their pixels."""
    frames = np.unique(np.linspace(0, episode.num_frames - 1, SAMPLED_FRAMES).round().astype(int))
    counts = np.zeros((3, 256), np.int64)
    for t in frames:
        pixels = episode.frame(int(t), camera)[::PIXEL_STRIDE, ::PIXEL_STRIDE]
        for channel in range(3):
            counts[channel] += np.bincount(pixels[..., channel].ravel(), minlength=256)
    levels = np.arange(256) / 255
    found: Statistics = {}
    mean = counts @ levels / counts.sum(axis=1)
    per_channel = {
        "min": levels[(counts > 0).argmax(axis=1)],
        "max": levels[255 - (counts[:, ::-1] > 0).argmax(axis=1)],
        "mean": mean,
        "std": np.sqrt(np.maximum(counts @ levels**2 / counts.sum(axis=1) - mean**2, 0)),
    }
    reached = counts.cumsum(axis=1) / counts.sum(axis=1, keepdims=True)
    per_channel |= {name: levels[(reached >= share).argmax(axis=1)] for name, share in QUANTILES.items()}
    for name, values in per_channel.items():
        found[name] = values.reshape(3, 1, 1).tolist()
    return {**found, "count": [len(frames)]}


def _statistics(values: NDArray[Any]) -> Statistics:
    """Of the N columns of (T, N)."""
    numbers = values.astype(np.float64)
    found = {
        "min": numbers.min(axis=0),
        "max": numbers.max(axis=0),
        "mean": numbers.mean(axis=0),
        "std": numbers.std(axis=0),
    }
    found |= dict(zip(QUANTILES, np.quantile(numbers, list(QUANTILES.values()), axis=0), strict=True))
    return {**{name: value.tolist() for name, value in found.items()}, "count": [len(values)]}


def _pooled(parts: Sequence[Statistics]) -> Statistics:
    """Of all episodes together. Quantiles are the means of the episodes', as LeRobot pools them."""
    stacked = {name: np.array([part[name] for part in parts], np.float64) for name in parts[0]}
    count = stacked.pop("count")[:, 0]
    mean = np.average(stacked["mean"], axis=0, weights=count)
    spread = stacked["std"] ** 2 + (stacked["mean"] - mean) ** 2
    pooled = {"min": stacked["min"].min(axis=0), "max": stacked["max"].max(axis=0), "mean": mean}
    pooled["std"] = np.sqrt(np.average(spread, axis=0, weights=count))
    pooled |= {name: np.average(stacked[name], axis=0, weights=count) for name in QUANTILES}
    return {**{name: value.tolist() for name, value in pooled.items()}, "count": [int(count.sum())]}


def _column(values: NDArray[Any]) -> Any:
    """An Arrow column: numbers for N = 1, else lists of N numbers."""
    import pyarrow as pa

    flat = pa.array(np.ascontiguousarray(values).reshape(-1))
    return flat if values.shape[1] == 1 else pa.FixedSizeListArray.from_arrays(flat, values.shape[1])


def _write_table(path: Path, columns: Mapping[str, Any]) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(dict(columns)), path)


def _write_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, indent=4, ensure_ascii=False, allow_nan=False) + "\n", encoding="utf-8")


def _number(value: float) -> float | int:
    """LeRobot's frame rates are integers where they can be."""
    return int(value) if value == int(value) else value


def _short(value: Any) -> str:
    text = ", ".join(map(str, value)) if isinstance(value, list) else str(value)
    return text if len(text) <= 80 else text[:77] + "..."
