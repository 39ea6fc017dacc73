"""Run a tracker over a benchmark: one row of numbers per video."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import numpy as np
import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from torch import Tensor

from trackbench.metrics import tapvid, to_metric_raster
from trackbench.structures import QueryMode, Tracks, VideoBatch

Row = dict[str, Any]
HEAD_SETTINGS = ("memory_size", "visibility_threshold", "support_grid")  # need no other weights


class Tracker(Protocol):
    """What the evaluation asks of a tracker; learned ones and baselines alike have it."""

    @property
    def causal(self) -> bool:
        """Whether tracks run forward in time only."""

    def track(self, video: Tensor, queries: Tensor, *, both_directions: bool = ...) -> Tracks:
        """Track (N, 3) queries through a (T, H, W, 3) uint8 video."""


class Benchmark(Protocol):
    """Videos by index, each a :class:`VideoBatch` with B = 1 and the video's name.

    It may have ``names``, the names of all, and ``about``, columns that every row gets (see
    :data:`trackbench.evaluation.results.ABOUT`).
    """

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> VideoBatch: ...


class EvaluationError(RuntimeError):
    """Some videos failed; the others were evaluated.

    Attributes:
        rows: the rows of the videos that did not fail.
        failures: video name -> what went wrong.
    """

    def __init__(self, rows: list[Row], failures: dict[str, Exception]) -> None:
        self.rows = rows
        self.failures = failures
        reasons = "; ".join(f"{name}: {type(e).__name__}: {e}" for name, e in failures.items())
        super().__init__(f"{len(failures)} of {len(rows) + len(failures)} videos failed: {reasons}")


def evaluate(
    tracker: Tracker,
    dataset: Benchmark,
    query_mode: QueryMode = "first",
    *,
    model: str,
    benchmark: str,
    tags: Mapping[str, Any] | None = None,
    skip: Callable[[str], bool] | None = None,
    on_row: Callable[[Row], None] | None = None,
    on_video: Callable[[VideoBatch, Tracks], None] | None = None,
    limit: int | None = None,
    show_progress: bool = True,
) -> list[Row]:
    """Score a tracker on every video of a benchmark, one video in memory at a time.

    In the mode ``"strided"`` trackers that run forward in time are run in both directions, since the frames
    before a query count as well (TAP-Vid, Doersch et al. 2022, section 4). Scores are taken on the
    256 x 256 raster.

    Args:
        tracker: what is evaluated.
        dataset: the videos.
        query_mode: ``"first"`` or ``"strided"``: which frames count; the queries are the dataset's.
        model: name of the tracker in the rows.
        benchmark: name of the dataset in the rows.
        tags: further columns that every row gets.
        skip: video name -> True where it need not be run (it is in the results already). Datasets with an
            attribute ``names`` do not load such videos.
        on_row: called with each row as soon as it is there.
        on_video: called with each video and its tracks, for pictures.
        limit: only the first so many videos.
        show_progress: draw a progress bar with the name of the video.

    Returns:
        One row per video that was run: ``model``, ``benchmark``, ``video``, ``query_mode``, ``tags``, the
        dataset's ``about``, the metrics of :func:`trackbench.metrics.tapvid`, ``num_points``, ``num_frames``,
        ``height``, ``width``, ``seconds``.

    Raises:
        EvaluationError: after the last video, where some failed.
        ValueError: an unknown ``query_mode``.
    """
    if query_mode not in ("first", "strided"):
        raise ValueError(f"query_mode must be 'first' or 'strided', got {query_mode!r}")
    both_directions = query_mode == "strided" and tracker.causal
    rows: list[Row] = []
    failures: dict[str, Exception] = {}
    names = _known_names(dataset)
    count = len(dataset) if limit is None else min(limit, len(dataset))
    with _progress_bar(show_progress) as bar:
        task = bar.add_task(f"{model} on {benchmark}", total=count, video="")
        for index in range(count):
            name = names[index] if names else f"video {index}"
            try:
                if names and skip is not None and skip(name):
                    continue
                bar.update(task, video=name)
                batch = dataset[index]
                name = batch.names[0] if batch.names else name
                if skip is not None and skip(name):
                    continue
                bar.update(task, video=name)
                tracks, seconds = _track(tracker, batch, both_directions)
                row = {
                    "model": model,
                    "benchmark": benchmark,
                    "video": name,
                    "query_mode": query_mode,
                    **(tags or {}),
                    **getattr(dataset, "about", {}),
                    **score(batch, tracks, query_mode),
                    **_size(batch),
                    "seconds": seconds,
                }
                if on_video is not None:
                    on_video(batch, tracks)
                del batch, tracks
            except Exception as error:  # one bad video must not cost the results of the others
                failures[name] = error
                bar.console.print(f"failed: {name}: {type(error).__name__}: {error}", style="red", markup=False)
                continue
            finally:
                bar.advance(task)
            rows.append(row)
            if on_row is not None:
                on_row(row)
    if failures:
        raise EvaluationError(rows, failures) from next(iter(failures.values()))
    return rows


def head_settings_for(
    tracker: object, published: Mapping[str, Any] | None, *, keep: Collection[str] = ()
) -> dict[str, Any]:
    """Which settings of a benchmark a tracker's head takes.

    Args:
        tracker: any tracker; heads without these settings, and trackers without a head, take none.
        published: values of ``HEAD_SETTINGS``; ``when`` names attributes of the head, and the values they must
            have for the rest to apply.
        keep: names that the user has set, dotted (``head.memory_size``) or not; they stay.

    Raises:
        ValueError: an unknown setting, or a condition on something that heads with these settings do not have.
    """
    values = dict(published or {})
    conditions = dict(values.pop("when", None) or {})
    unknown = sorted(set(values) - set(HEAD_SETTINGS))
    if unknown:
        raise ValueError(
            f"head_settings: unknown {', '.join(unknown)}; expected {', '.join(HEAD_SETTINGS)} or when"
        )
    head = getattr(tracker, "head", None)
    if not all(hasattr(head, name) for name in HEAD_SETTINGS):
        return {}
    missing = sorted(name for name in conditions if not hasattr(head, name))
    if missing:
        raise ValueError(f"head_settings.when: {type(head).__name__} has no {', '.join(missing)}")
    if any(getattr(head, name) != value for name, value in conditions.items()):
        return {}
    kept = {name.rsplit(".", 1)[-1] for name in keep}
    return {name: value for name, value in values.items() if name not in kept}


@contextmanager
def use_head_settings(tracker: object, settings: Mapping[str, Any]) -> Iterator[str]:
    """Give a tracker's head other settings for a while.

    Args:
        tracker: its head must have what ``settings`` names.
        settings: from :func:`head_settings_for`.

    Yields:
        All of ``HEAD_SETTINGS`` as they are in force, as text; empty for heads without them.
    """
    head = getattr(tracker, "head", None)
    before = {name: getattr(head, name) for name in settings}
    try:
        for name, value in settings.items():
            setattr(head, name, value)
        yield ", ".join(
            f"{name}={'as trained' if getattr(head, name) is None else getattr(head, name)}"
            for name in HEAD_SETTINGS
            if hasattr(head, name)
        )
    finally:
        for name, value in before.items():
            setattr(head, name, value)


def score(batch: VideoBatch, tracks: Tracks, query_mode: QueryMode) -> dict[str, float]:
    """TAP-Vid metrics of one video's tracks, on the 256 x 256 raster."""
    if not bool(torch.isfinite(tracks.xy).all()):
        raise ValueError(f"tracks of {batch.names} hold NaN or infinity")
    H, W = batch.video.shape[-2:]
    metrics = tapvid(
        batch.queries,
        to_metric_raster(batch.xy, H, W),
        batch.visible,
        to_metric_raster(tracks.xy[None], H, W),
        tracks.visible[None],
        query_mode=query_mode,
        labelled=batch.labelled,
    )
    return {name: float(values[0]) for name, values in metrics.items()}


def _track(tracker: Tracker, batch: VideoBatch, both_directions: bool) -> tuple[Tracks, float]:
    if batch.video.shape[0] != 1:
        raise ValueError(f"benchmarks give one video at a time, got a batch of {batch.video.shape[0]}")
    video = batch.video[0].permute(0, 2, 3, 1)
    start = time.perf_counter()
    tracks = tracker.track(video, batch.queries[0], both_directions=both_directions)
    return tracks, time.perf_counter() - start


def _size(batch: VideoBatch) -> dict[str, int]:
    return {
        "num_points": batch.queries.shape[1],
        "num_frames": batch.video.shape[1],
        "height": batch.video.shape[-2],
        "width": batch.video.shape[-1],
    }


def _known_names(dataset: Benchmark) -> Sequence[str] | None:
    names = getattr(dataset, "names", None)
    return names if isinstance(names, Sequence) and len(names) == len(dataset) else None


def _progress_bar(visible: bool) -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[video]}", markup=False),
        disable=not visible,
    )


def average(rows: Sequence[Row], keys: Sequence[str]) -> dict[str, float]:
    """Plain mean of the columns ``keys`` over the videos that have a value (the convention of TAP-Vid)."""
    means = {}
    for key in keys:
        values = np.array([row[key] for row in rows], dtype=np.float64)
        values = values[~np.isnan(values)]
        means[key] = float(values.mean()) if len(values) else math.nan
    return means


def iterate_groups(rows: Sequence[Row], *keys: str) -> Iterator[tuple[tuple[Any, ...], list[Row]]]:
    """Rows that agree in ``keys``, in the order in which they first appear."""
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        groups.setdefault(tuple(row[key] for key in keys), []).append(row)
    yield from groups.items()
