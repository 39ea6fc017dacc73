"""TAP-Vid metrics against recorded official output, plain loops, and one process against two."""

from __future__ import annotations

import json
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from trackbench.metrics import METRICS, THRESHOLDS, TapVidMetric, tapvid, to_metric_raster

CASES = 26


def reference_case(reference: Any, case: str) -> dict[str, np.ndarray]:
    def given(key: str) -> np.ndarray:
        return reference[f"in/{case}/{key}"]

    return {
        "queries": given("query_points")[..., [0, 2, 1]],
        "gt_xy": given("gt_tracks"),
        "gt_visible": ~given("gt_occluded"),
        "pred_xy": given("pred_tracks"),
        "pred_visible": ~given("pred_occluded"),
    }


def random_case(seed: int, videos: int = 2) -> dict[str, np.ndarray]:
    B, N, T = videos, 7, 9
    rng = np.random.default_rng(seed)
    gt_xy = rng.uniform(0, 256, (B, N, T, 2)).astype(np.float32)
    scale = rng.choice([0.3, 3.0, 20.0], (B, N, T, 1))
    return {
        "queries": np.concatenate([rng.integers(0, T, (B, N, 1)), rng.uniform(0, 256, (B, N, 2))], axis=-1),
        "gt_xy": gt_xy,
        "gt_visible": rng.random((B, N, T)) < 0.7,
        "pred_xy": (gt_xy + rng.normal(size=gt_xy.shape) * scale).astype(np.float32),
        "pred_visible": rng.random((B, N, T)) < 0.6,
    }


def as_tensors(case: dict[str, np.ndarray]) -> dict[str, torch.Tensor]:
    return {key: torch.from_numpy(value) for key, value in case.items()}


@pytest.mark.parametrize("per_track", [False, True])
@pytest.mark.parametrize("query_mode", ["first", "strided"])
@pytest.mark.parametrize("as_torch", [False, True])
def test_equals_the_official_numbers(data_fixtures, query_mode, per_track, as_torch) -> None:
    with np.load(data_fixtures / "metrics.npz", allow_pickle=False) as reference:
        cases = sorted({name.split("/")[1] for name in reference.files if name.startswith("in/")})
        assert len(cases) == CASES
        for case in cases:
            given = reference_case(reference, case)
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                ours = tapvid(
                    **(as_tensors(given) if as_torch else given), query_mode=query_mode, per_track=per_track
                )
            assert set(ours) == set(METRICS)
            kind = "track" if per_track else "video"
            for metric in METRICS:
                official = reference[f"out/{case}/{query_mode}/{kind}/{metric}"]
                np.testing.assert_array_equal(ours[metric], official, err_msg=f"{case} {metric}")


def brute_force(case: dict[str, np.ndarray], query_mode: str, labelled: np.ndarray) -> list[dict[str, float]]:
    results = []
    for b, queries in enumerate(case["queries"]):
        evaluated, right, visible = 0, 0, 0
        within = dict.fromkeys(THRESHOLDS, 0)
        hits = dict.fromkeys(THRESHOLDS, 0)
        false_alarms = dict.fromkeys(THRESHOLDS, 0)
        for n, query in enumerate(queries):
            for t in range(case["gt_xy"].shape[2]):
                skipped = t <= query[0] if query_mode == "first" else t == query[0]
                if skipped or not labelled[b, n, t]:
                    continue
                seen, claimed = case["gt_visible"][b, n, t], case["pred_visible"][b, n, t]
                error = np.hypot(*(case["pred_xy"][b, n, t] - case["gt_xy"][b, n, t]))
                evaluated += 1
                right += seen == claimed
                visible += seen
                for x in THRESHOLDS:
                    within[x] += seen and error < x
                    hits[x] += seen and claimed and error < x
                    false_alarms[x] += claimed and not (seen and error < x)
        row = {"occlusion_accuracy": right / evaluated}
        for x in THRESHOLDS:
            row[f"pts_within_{x}"] = within[x] / visible
            row[f"jaccard_{x}"] = hits[x] / (visible + false_alarms[x])
        row["average_pts_within_thresh"] = sum(row[f"pts_within_{x}"] for x in THRESHOLDS) / 5
        row["average_jaccard"] = sum(row[f"jaccard_{x}"] for x in THRESHOLDS) / 5
        results.append(row)
    return results


@pytest.mark.parametrize("query_mode", ["first", "strided"])
@pytest.mark.parametrize("seed", range(6))
def test_equals_plain_loops(seed, query_mode) -> None:
    case = random_case(seed)
    labelled = np.random.default_rng(seed + 100).random(case["gt_visible"].shape) < (1.0 if seed == 0 else 0.5)
    ours = tapvid(**case, query_mode=query_mode, labelled=labelled)
    for b, row in enumerate(brute_force(case, query_mode, labelled)):
        for metric in METRICS:
            assert ours[metric][b] == pytest.approx(row[metric], abs=1e-12), metric


def test_unlabelled_entries_count_nowhere() -> None:
    case = random_case(1)
    labelled = np.random.default_rng(2).random(case["gt_visible"].shape) < 0.5
    before = tapvid(**case, labelled=labelled)
    case["gt_xy"] = np.where(labelled[..., None], case["gt_xy"], np.nan)
    case["pred_xy"] = np.where(labelled[..., None], case["pred_xy"], np.inf)
    case["gt_visible"] = np.where(labelled, case["gt_visible"], ~case["gt_visible"])
    case["pred_visible"] = np.where(labelled, case["pred_visible"], ~case["pred_visible"])
    after = tapvid(**case, labelled=labelled)
    for metric in METRICS:
        np.testing.assert_array_equal(before[metric], after[metric])


def test_prediction_that_is_not_a_number_is_wrong_and_not_ignored() -> None:
    case = random_case(3)
    case["pred_xy"] = np.full_like(case["pred_xy"], np.nan)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ours = tapvid(**case)
    assert (ours["average_pts_within_thresh"] == 0).all()
    assert (ours["average_jaccard"] == 0).all()


def test_half_precision_is_measured_in_float32() -> None:
    case = as_tensors(random_case(4))
    case["gt_xy"] = case["gt_xy"].bfloat16()
    case["pred_xy"] = case["pred_xy"].bfloat16()
    exact = {key: value.float() if value.dtype == torch.bfloat16 else value for key, value in case.items()}
    np.testing.assert_array_equal(tapvid(**case)["average_jaccard"], tapvid(**exact)["average_jaccard"])


@pytest.mark.parametrize(
    ("key", "change", "message"),
    [
        ("queries", lambda a: a[..., :2], "queries must be"),
        ("queries", lambda a: a + np.array([100, 0, 0]), "query frames must lie in"),
        ("queries", lambda a: a * np.nan, "query frames must lie in"),
        ("gt_xy", lambda a: a[:, :-1], "gt_xy must be"),
        ("pred_xy", lambda a: a[:, :, :-1], "pred_xy must be"),
        ("gt_visible", lambda a: a[..., :-1], "gt_visible must be"),
        ("pred_visible", lambda a: a.astype(np.float32), "pred_visible must be bool"),
    ],
)
def test_refuses_what_does_not_belong_together(key, change, message) -> None:
    case = random_case(5)
    case[key] = change(case[key])
    with pytest.raises(ValueError, match=message):
        tapvid(**case)


def test_refuses_an_unknown_query_mode() -> None:
    with pytest.raises(ValueError, match="query_mode must be 'first' or 'strided', got 'last'"):
        tapvid(**random_case(0), query_mode="last")
    with pytest.raises(ValueError, match="query_mode"):
        TapVidMetric("last")


def test_raster_maps_the_edges_of_the_frame() -> None:
    corners = np.array([[0.0, 0.0], [854.0, 480.0], [427.0, 240.0]])
    expected = [[0, 0], [256, 256], [128, 128]]
    np.testing.assert_allclose(to_metric_raster(corners, 480, 854), expected, atol=1e-12)
    scaled = to_metric_raster(torch.from_numpy(corners).half(), 480, 854)
    assert scaled.dtype == torch.float32
    torch.testing.assert_close(scaled, torch.tensor(expected, dtype=torch.float32))
    with pytest.raises(ValueError, match=r"\(\.\.\., 2\)"):
        to_metric_raster(np.zeros((4, 3)), 10, 10)


def test_metric_is_the_mean_over_videos() -> None:
    metric = TapVidMetric("strided")
    case = random_case(6, videos=5)
    tensors = as_tensors(case)
    metric.update(**{key: value[:2] for key, value in tensors.items()}, ids=["b", "a"])
    metric.update(**{key: value[2:] for key, value in tensors.items()}, ids=["ü c", 7, "e"])
    per_video = tapvid(**case, query_mode="strided")
    means = metric.compute()
    for name in METRICS:
        assert means[name].item() == pytest.approx(per_video[name].mean(), abs=1e-6)
    assert means["videos"] == 5
    assert means["videos_without_score"] == 0
    rows = metric.rows()
    assert list(rows) == ["7", "a", "b", "e", "ü c"]
    for index, video in enumerate(["b", "a", "ü c", "7", "e"]):
        assert rows[video] == {name: per_video[name][index] for name in METRICS}

    metric.reset()
    assert metric.rows() == {}
    with pytest.warns(UserWarning, match="before the ``update`` method"):
        empty = metric.compute()
    assert empty["videos"] == 0
    assert torch.isnan(empty["average_jaccard"])


def test_video_without_a_value_is_left_out_of_that_mean_only() -> None:
    case = random_case(7, videos=3)
    case["gt_visible"][1] = False
    metric = TapVidMetric()
    metric.update(**as_tensors(case), ids=torch.arange(3))
    per_video = tapvid(**case)
    means = metric.compute()
    assert np.isnan(per_video["average_pts_within_thresh"][1])
    assert means["average_pts_within_thresh"].item() == pytest.approx(
        per_video["average_pts_within_thresh"][[0, 2]].mean(), abs=1e-6
    )
    assert means["occlusion_accuracy"].item() == pytest.approx(per_video["occlusion_accuracy"].mean(), abs=1e-6)
    assert means["videos"] == 3
    assert means["videos_without_score"] == 1


def test_repeated_video_counts_once_and_forward_works() -> None:
    case = as_tensors(random_case(8, videos=2))
    once, repeated = TapVidMetric(), TapVidMetric()
    once.update(**case, ids=[0, 1])
    repeated.update(**case, ids=[0, 1])
    repeated(**{key: value[:1] for key, value in case.items()}, ids=[0])
    assert repeated.rows() == once.rows()
    assert repeated.compute() == once.compute()


def test_refuses_ids_that_do_not_fit() -> None:
    case = as_tensors(random_case(9, videos=2))
    with pytest.raises(ValueError, match="expected 2 ids, one per video, got 1"):
        TapVidMetric().update(**case, ids=["a"])
    with pytest.raises(ValueError, match="zero character"):
        TapVidMetric().update(**case, ids=["a", "b\0c"])


ONE_OF_TWO_PROCESSES = """
import json, sys
import numpy as np
import torch
import torch.distributed as dist
from trackbench.metrics import TapVidMetric

rank, store, data, out, splits = int(sys.argv[1]), *sys.argv[2:]
torch.set_num_threads(1)
dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
with np.load(data) as case:
    tensors = {key: torch.from_numpy(case[key]) for key in case.files}
results, metric = [], TapVidMetric()
for split in json.loads(splits):
    for video in split[rank]:
        one = {key: value[video : video + 1] for key, value in tensors.items()}
        metric.update(**one, ids=[f"video-{'x' * video}-{video}"])
    local = len(metric.counts)
    means, rows = metric.compute(), metric.rows()
    assert len(metric.counts) == local  # gathering leaves a process its own videos
    results.append([{name: value.item() for name, value in means.items()}, rows])
    metric.reset()
open(f"{out}{rank}", "w").write(json.dumps(results))
dist.destroy_process_group()
"""


def test_two_processes_give_what_one_gives(tmp_path) -> None:
    case = random_case(10, videos=5)
    case["gt_visible"][3] = False
    np.savez(tmp_path / "case.npz", **case)
    single = TapVidMetric()
    single.update(**as_tensors(case), ids=[f"video-{'x' * video}-{video}" for video in range(5)])
    padded_by_repetition, one_process_without_videos = [[0, 2, 4], [1, 3, 0]], [[0, 1, 2, 3, 4], []]

    arguments = [str(tmp_path / name) for name in ("store", "case.npz", "out")]
    splits = json.dumps([padded_by_repetition, one_process_without_videos])
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", ONE_OF_TWO_PROCESSES, str(rank), *arguments, splits],
            cwd=Path(__file__).resolve().parents[1],
        )
        for rank in range(2)
    ]
    assert [process.wait(timeout=300) for process in processes] == [0, 0]
    for rank in range(2):
        for means, rows in json.loads((tmp_path / f"out{rank}").read_text()):
            np.testing.assert_equal(rows, single.rows())
            expected = {name: value.item() for name, value in single.compute().items()}
            np.testing.assert_equal(means, expected)
