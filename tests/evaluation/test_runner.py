"""The runner: scores, directions, failures, skipping, one video in memory at a time."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch
from evaluation_fakes import Constant, Oracle, Videos, moving_points

from trackbench.baselines import Static
from trackbench.evaluation.runner import EvaluationError, average, evaluate
from trackbench.metrics import METRICS
from trackbench.structures import Tracks, VideoBatch

BATCHES = [moving_points(f"clip_{seed}", seed=seed) for seed in range(3)]
NAMES = {"model": "m", "benchmark": "b", "show_progress": False}


def test_a_perfect_tracker_scores_one() -> None:
    rows = evaluate(Oracle(BATCHES), Videos(BATCHES), **NAMES, tags={"checkpoint": "none"})
    assert [row["video"] for row in rows] == ["clip_0", "clip_1", "clip_2"]
    for row in rows:
        assert all(row[name] == 1.0 for name in METRICS)
        assert row["query_mode"] == "first"
        assert row["checkpoint"] == "none"
        assert (row["num_points"], row["num_frames"], row["height"], row["width"]) == (5, 8, 64, 96)
        assert row["seconds"] > 0


def test_errors_are_measured_on_the_256_raster() -> None:
    """A shift by 3 px of a 96 px wide video is one by 8 px of the raster: not within 8, but within 16."""

    class Shifted(Oracle):
        def track(self, *args: Any, **kwargs: Any) -> Tracks:
            tracks = super().track(*args, **kwargs)
            return Tracks(tracks.xy + torch.tensor([3.01, 0.0]), tracks.visible, tracks.visibility, tracks.queries)

    row = evaluate(Shifted(BATCHES), Videos(BATCHES[:1]), **NAMES)[0]
    assert row["pts_within_8"] == 0
    assert row["pts_within_16"] == 1
    assert row["average_pts_within_thresh"] == pytest.approx(1 / 5)
    assert row["occlusion_accuracy"] == 1


@pytest.mark.parametrize(
    ("causal", "query_mode", "both"),
    [(True, "strided", True), (True, "first", False), (False, "strided", False)],
)
def test_causal_trackers_run_both_ways_when_strided(causal: bool, query_mode: Any, both: bool) -> None:
    oracle = Oracle(BATCHES, causal=causal)
    evaluate(oracle, Videos(BATCHES), query_mode, **NAMES)
    assert oracle.directions == [both] * 3


def test_a_failing_video_is_named_and_the_others_run() -> None:
    seen: list[str] = []
    with pytest.raises(EvaluationError, match="1 of 3 videos failed: clip_1: LookupError: a video") as caught:
        evaluate(
            Oracle([BATCHES[0], BATCHES[2]]),
            Videos(BATCHES),
            **NAMES,
            on_row=lambda row: seen.append(row["video"]),
        )
    assert seen == ["clip_0", "clip_2"] == [row["video"] for row in caught.value.rows]
    assert isinstance(caught.value.failures["clip_1"], LookupError)


def test_nan_tracks_fail() -> None:
    class Broken(Constant):
        def track(self, video: torch.Tensor, queries: torch.Tensor, **kwargs: Any) -> Tracks:
            tracks = super().track(video, queries)
            return Tracks(tracks.xy * torch.nan, tracks.visible, tracks.visibility, queries)

    with pytest.raises(EvaluationError, match=r"clip_0: ValueError: tracks of .* NaN"):
        evaluate(Broken(), Videos(BATCHES[:1]), **NAMES)


def test_skipped_videos_are_not_even_read() -> None:
    videos = Videos(BATCHES)
    rows = evaluate(Static(), videos, **NAMES, skip=lambda name: name != "clip_1")
    assert [row["video"] for row in rows] == ["clip_1"]
    assert videos.read == ["clip_1"]


def test_limit_and_pictures() -> None:
    pictures: list[tuple[str, tuple[int, ...]]] = []
    rows = evaluate(
        Static(),
        Videos(BATCHES),
        **NAMES,
        limit=2,
        on_video=lambda batch, tracks: pictures.append((batch.names[0], tuple(tracks.xy.shape))),
    )
    assert [row["video"] for row in rows] == ["clip_0", "clip_1"]
    assert pictures == [("clip_0", (5, 8, 2)), ("clip_1", (5, 8, 2))]


def test_one_video_in_memory_at_a_time() -> None:
    alive: list[weakref.ref[torch.Tensor]] = []

    class Fresh(Videos):
        def __getitem__(self, index: int) -> VideoBatch:
            gc.collect()
            assert not [ref for ref in alive if ref() is not None], "the video before is still in memory"
            batch = moving_points(self.names[index], seed=index)
            alive.append(weakref.ref(batch.video))
            return batch

    evaluate(Static(), Fresh(BATCHES), **NAMES)
    assert len(alive) == 3


def test_the_same_run_twice_gives_the_same_scores() -> None:
    runs = [evaluate(Static(), Videos(BATCHES), **NAMES) for _ in range(2)]
    for rows in runs:
        for row in rows:
            row.pop("seconds")
    assert runs[0] == runs[1]


def test_unknown_query_mode() -> None:
    with pytest.raises(ValueError, match="'first' or 'strided', got 'last'"):
        evaluate(Static(), Videos(BATCHES), "last", **NAMES)


def test_average_leaves_out_videos_without_a_value() -> None:
    rows = [{"a": 1.0, "b": float("nan")}, {"a": 2.0, "b": 0.5}, {"a": 6.0, "b": float("nan")}]
    assert average(rows, ["a", "b"]) == {"a": 3.0, "b": 0.5}
