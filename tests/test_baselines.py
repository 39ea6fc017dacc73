"""Lucas-Kanade and standing still: known motion, streams, what happens to lost points, real clips."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from trackbench.baselines import LucasKanade, Static
from trackbench.metrics import tapvid, to_metric_raster

HEIGHT, WIDTH, FRAMES = 120, 160, 12
VELOCITY = np.array([0.83, -0.41])  # pixels per frame


def texture(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """A smooth pattern that is known at every position, in raster coordinates."""
    waves = np.random.default_rng(0).uniform(-0.35, 0.35, (24, 2))
    phases = np.random.default_rng(1).uniform(0, 2 * np.pi, 24)
    value = sum(np.sin(a * x + b * y + phase) for (a, b), phase in zip(waves, phases, strict=True))
    return np.clip(128 + 14 * np.asarray(value), 0, 255)


@pytest.fixture(scope="module")
def moving_video() -> np.ndarray:
    y, x = np.mgrid[:HEIGHT, :WIDTH] + 0.5
    frames = [texture(x - VELOCITY[0] * t, y - VELOCITY[1] * t) for t in range(FRAMES)]
    return np.stack([np.repeat(f[..., None], 3, axis=2) for f in frames]).round().astype(np.uint8)


def truth(queries: torch.Tensor) -> torch.Tensor:
    elapsed = torch.arange(FRAMES) - queries[:, :1]
    return queries[:, None, 1:] + elapsed[..., None] * torch.from_numpy(VELOCITY).float()


QUERIES = torch.tensor([[0, 40.3, 60.7], [0, 100.5, 80.25], [5, 60.0, 50.0], [11, 90.0, 70.0]])


def test_lucas_kanade_follows_subpixel_motion(moving_video: np.ndarray) -> None:
    tracks = LucasKanade().track(moving_video, QUERIES)
    since = torch.arange(FRAMES) >= QUERIES[:, :1]
    error = (tracks.xy - truth(QUERIES)).norm(dim=-1)
    assert error[since].max() < 0.1
    assert torch.equal(tracks.visible, since)
    assert torch.equal(tracks.queries, QUERIES)


def test_both_directions_fills_frames_before_the_query(moving_video: np.ndarray) -> None:
    calls: list[tuple[int, int]] = []
    tracks = LucasKanade().track(
        moving_video, QUERIES, both_directions=True, progress=lambda done, total: calls.append((done, total))
    )
    assert (tracks.xy - truth(QUERIES)).norm(dim=-1).max() < 0.1
    assert tracks.visible.all()
    assert calls == [(done, 2 * FRAMES) for done in range(1, 2 * FRAMES + 1)]


@pytest.mark.parametrize("tracker", [LucasKanade(), LucasKanade(when_lost="hold"), Static()])
def test_stream_equals_track(tracker: LucasKanade | Static, moving_video: np.ndarray) -> None:
    clip = tracker.track(torch.from_numpy(moving_video), QUERIES)
    stream = tracker.stream()
    order: list[int] = []
    for t, frame in enumerate(moving_video):
        rows = torch.nonzero(QUERIES[:, 0] == t)[:, 0].tolist()
        if rows:
            ids = stream.add(QUERIES[rows, 1:])
            assert ids.tolist() == list(range(len(order), len(order) + len(rows)))
            order += rows
        points = stream.step(frame)
        assert points.frame == t
        assert points.ids.tolist() == list(range(len(order)))
        assert torch.equal(points.xy, clip.xy[order, t])
        assert torch.equal(points.visible, clip.visible[order, t])
    assert stream.finish() == []


def test_dropped_points_leave_the_others_alone(moving_video: np.ndarray) -> None:
    stream = LucasKanade().stream()
    stream.add(QUERIES[:2, 1:])
    for frame in moving_video[:4]:
        stream.step(frame)
    extra = stream.add(torch.tensor([[30.0, 30.0], [35.0, 35.0]]))
    stream.drop([0, int(extra[0])])
    points = stream.step(moving_video[4])
    assert points.ids.tolist() == [1, int(extra[1])]
    assert (points.xy[0] - truth(QUERIES)[1, 4]).norm() < 0.1
    assert points.xy[1].tolist() == [35.0, 35.0]


def occluded_clip(moving_video: np.ndarray) -> np.ndarray:
    """One frame of noise in the middle: every point is lost there."""
    video = moving_video.copy()
    video[6] = np.random.default_rng(0).integers(256, size=video[6].shape)
    return video


def test_a_held_point_stays_lost(moving_video: np.ndarray) -> None:
    tracks = LucasKanade(when_lost="hold").track(occluded_clip(moving_video), QUERIES[:2])
    assert tracks.visible[:, :6].all()
    assert not tracks.visible[:, 6:].any()
    assert torch.equal(tracks.xy[:, 6:], tracks.xy[:, 5:6].expand(-1, FRAMES - 6, -1))


def test_a_followed_point_shows_again(moving_video: np.ndarray) -> None:
    tracks = LucasKanade().track(occluded_clip(moving_video), QUERIES[:1])
    assert not tracks.visible[:, 6].any()
    assert tracks.visible[:, 8:].all()


def test_points_that_leave_the_frame_are_invisible(moving_video: np.ndarray) -> None:
    query = torch.tensor([[0, WIDTH - 4.0, 60.0]])
    tracks = LucasKanade().track(moving_video, query)
    outside = truth(query)[0, :, 0] > WIDTH + 0.5
    assert outside.any()
    assert not tracks.visible[0, outside].any()


def test_static_stays(moving_video: np.ndarray) -> None:
    tracks = Static().track(moving_video, QUERIES, both_directions=True)
    assert torch.equal(tracks.xy, QUERIES[:, None, 1:].expand(-1, FRAMES, -1))
    assert tracks.visible.all()


@pytest.mark.parametrize("tracker", [LucasKanade(), Static()])
def test_no_points(tracker: LucasKanade | Static, moving_video: np.ndarray) -> None:
    tracks = tracker.track(moving_video, torch.empty(0, 3))
    assert tracks.xy.shape == (0, FRAMES, 2)
    assert tracks.visible.shape == (0, FRAMES)


@pytest.mark.parametrize(
    ("video", "queries", "message"),
    [
        (np.zeros((2, 8, 8, 3), np.float32), [[0, 1, 1]], "uint8"),
        (np.zeros((2, 3, 8, 8), np.uint8), [[0, 1, 1]], r"\(T, H, W, 3\)"),
        (np.zeros((2, 8, 8, 3), np.uint8), [[2, 1, 1]], "outside the video"),
        (np.zeros((2, 8, 8, 3), np.uint8), [[0, np.nan, 1]], "not finite"),
    ],
)
def test_wrong_input_is_named(video: np.ndarray, queries: list[list[float]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LucasKanade().track(video, np.array(queries))


@pytest.mark.parametrize("arguments", [{"window": 1}, {"levels": -1}, {"max_error": 0}, {"when_lost": "give up"}])
def test_wrong_settings_are_refused(arguments: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="got"):
        LucasKanade(**arguments)


# AJ, delta_avg, OA that an independent script measured, for Lucas-Kanade and for standing still
REAL = {
    "camel": ((0.201, 0.327, 0.856), (0.082, 0.138, 0.915)),
    "horsejump-high": ((0.101, 0.201, 0.577), (0.019, 0.038, 0.914)),
    "cmu_house": ((0.775, 0.839, 1.000), (0.146, 0.239, 1.000)),
    "kitchen": ((0.934, 0.967, 0.996), (0.196, 0.310, 0.968)),
}


@pytest.mark.parametrize("clip", REAL)
def test_real_clips_score_as_measured_elsewhere(clip: str, realdata: Path) -> None:
    with np.load(realdata / "annotated" / f"{clip}.npz", allow_pickle=False) as data:
        blob, offsets = data["jpeg_blob"], data["jpeg_offsets"]
        video = np.stack(
            [
                cv2.cvtColor(cv2.imdecode(blob[a:b], cv2.IMREAD_COLOR), cv2.COLOR_BGR2RGB)
                for a, b in pairwise(offsets)
            ]
        )
        visible = ~data["occluded"]
        labelled = data["labelled"] if "labelled" in data else np.ones_like(visible)
        H, W = video.shape[1:3]
        xy = data["points"].astype(np.float64) * (W, H)
    shown = visible & labelled
    used = shown.any(axis=1)
    start = shown.argmax(axis=1)
    queries = np.column_stack([start, xy[np.arange(len(xy)), start]])
    queries, xy, visible, labelled = queries[used], xy[used], visible[used], labelled[used]
    for tracker, expected in zip((LucasKanade(), Static()), REAL[clip], strict=True):
        tracks = tracker.track(video, queries)
        scores = tapvid(
            queries[None],
            to_metric_raster(xy[None], H, W),
            visible[None],
            to_metric_raster(tracks.xy[None], H, W),
            tracks.visible[None],
            labelled=labelled[None],
        )
        measured = [
            scores[key][0] for key in ("average_jaccard", "average_pts_within_thresh", "occlusion_accuracy")
        ]
        np.testing.assert_allclose(measured, expected, atol=0.01)
