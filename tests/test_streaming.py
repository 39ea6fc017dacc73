"""Streams: points that come and go, saved states, and constant memory, whatever the length of the video."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from trackbench.backbones.base import Backbone
from trackbench.composition import build_tracker, tracker_config
from trackbench.heads.base import Head
from trackbench.heads.correlation import CorrelationHead
from trackbench.heads.memory import MemoryHead
from trackbench.structures import FrameTracks
from trackbench.tracker import PointTracker, TrackerStream

H, W, FRAMES = 40, 56, 12
QUERIES = torch.tensor([[0, 10.0, 12.0], [3, 30.5, 20.25], [7, 50.0, 38.0], [0, 40.0, 8.0], [7, 5.0, 30.0]])


class Patches(Backbone):
    """One strided convolution; counts the frames it encodes."""

    def __init__(self, dim: int = 6, patch: int = 4) -> None:
        super().__init__()
        self.dim, self.stride = dim, float(patch)
        self.conv = nn.Conv2d(3, dim, patch, stride=patch)
        self.encoded = 0

    def forward(self, video: Tensor) -> Tensor:
        self.encoded += video.shape[1]
        return self.conv(video.flatten(0, 1)).unflatten(0, video.shape[:2])


def memory_head(dim: int = 6, **options: Any) -> MemoryHead:
    settings: dict[str, Any] = {
        "in_dim": dim,
        "dim": 8,
        "num_heads": 2,
        "decoder_layers": 1,
        "rerank_layers": 1,
        "offset_layers": 1,
        "num_candidates": 2,
        "levels": 2,
        "grid_size": (10, 14),
        "trained_memory_size": 3,
        "visibility_threshold": 0.5,
        "scrambled_rerank_level": False,
    }
    return MemoryHead(**(settings | options))


def tracker_of(head: Head, backbone: Backbone | None = None, size: tuple[int, int] | None = None) -> PointTracker:
    torch.manual_seed(3)
    tracker = PointTracker(backbone=backbone or Patches(), head=head, input_size=size)
    with torch.no_grad():
        for parameter in tracker.parameters():
            parameter += 0.1 * torch.randn(parameter.shape)
    return tracker.eval()


def tiny(kind: str, **options: Any) -> PointTracker:
    return tracker_of(
        memory_head(**options) if kind == "memory" else CorrelationHead(6, normalize=True, **options)
    )


def clip(frames: int = FRAMES, height: int = H, width: int = W) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (frames, height, width, 3), dtype=np.uint8)


def due(t: int, queries: Tensor = QUERIES) -> Tensor:
    return (queries[:, 0] == t).nonzero()[:, 0]


def run(stream: TrackerStream, frames: np.ndarray) -> list[FrameTracks]:
    results = [stream.step(frame) for frame in frames]
    return [result for result in results if result is not None]


KINDS = [("memory", {}), ("memory", {"memory_size": (5, 2), "support_grid": 3}), ("correlation", {})]


@pytest.mark.parametrize(("kind", "options"), KINDS)
def test_points_that_enter_while_it_runs_get_the_tracks_of_the_clip(kind: str, options: dict[str, Any]) -> None:
    tracker, video = tiny(kind, **options), clip()
    tracks = tracker.track(video, QUERIES)
    stream, place = tracker.stream(), {}
    for t, frame in enumerate(video):
        entering = due(t)
        for row, number in zip(entering.tolist(), stream.add(QUERIES[entering, 1:]).tolist(), strict=True):
            place[number] = row
        result = stream.step(frame)
        assert result is not None
        rows = [place[number] for number in result.ids.tolist()]
        assert sorted(rows) == [row for row in range(5) if QUERIES[row, 0] <= t]
        torch.testing.assert_close(result.xy, tracks.xy[rows, t], atol=1e-4, rtol=0)
        torch.testing.assert_close(result.visibility, tracks.visibility[rows, t], atol=1e-5, rtol=0)


@pytest.mark.parametrize(("kind", "options"), KINDS)
@torch.no_grad()
def test_dropped_points_are_gone_and_the_others_go_on(kind: str, options: dict[str, Any]) -> None:
    """Point 3 leaves before frame 5, point 1 before frame 9; the reference drives the head by hand."""
    tracker, video = tiny(kind, **options), clip()
    maps = [
        tracker.backbone(tracker.prepare(torch.from_numpy(f).permute(2, 0, 1)[None, None]))[:, 0] for f in video
    ]
    cells = QUERIES / torch.tensor([1.0, 4.0, 4.0])
    head = tracker.head
    state, order, expected = head.start(1), list(range(5)), []
    for row in order:
        sampled = head.sample(maps[int(QUERIES[row, 0])], cells[None, row : row + 1, 1:])
        head.add(state, sampled, cells[None, row : row + 1])
    for t, features in enumerate(maps):
        for leaving in [3] if t == 5 else [1] if t == 9 else []:
            head.drop(state, torch.tensor([row != leaving for row in order]))
            order = [row for row in order if row != leaving]
        output = head.step(state, features)
        expected.append({row: 4 * output.xy[0, i] for i, row in enumerate(order) if QUERIES[row, 0] <= t})

    stream, number_of = tracker.stream(), {}
    for t, frame in enumerate(video):
        if t in (5, 9):
            stream.drop([number_of[3 if t == 5 else 1]])
            stream.drop([number_of[3 if t == 5 else 1], 10_000])  # twice, and one that never was
        entering = due(t)
        number_of |= dict(zip(entering.tolist(), stream.add(QUERIES[entering, 1:]).tolist(), strict=True))
        result = stream.step(frame)
        assert result is not None
        found = dict(zip(result.ids.tolist(), result.xy, strict=True))
        assert found.keys() == {number_of[row] for row in expected[t]}
        for row, xy in expected[t].items():
            torch.testing.assert_close(found[number_of[row]], xy, atol=1e-4, rtol=0)


def test_a_point_that_leaves_before_its_frame_comes_never_was() -> None:
    tracker, video = tiny("memory"), clip(4)
    alone, both = tracker.stream(), tracker.stream()
    kept = alone.add([[10.0, 12.0]])
    first, second = both.add([[10.0, 12.0], [40.0, 8.0]]).tolist()
    both.drop(torch.tensor([second]))
    for frame in video:
        expected, result = alone.step(frame), both.step(frame)
        assert expected is not None
        assert result is not None
        assert result.ids.tolist() == [first] == kept.tolist()
        assert torch.equal(result.xy, expected.xy)


def test_a_stream_started_in_training_mode_carries_the_memory_of_evaluation() -> None:
    tracker, video = tiny("memory", memory_size=5), clip()
    expected = tracker.track(video, QUERIES[[0, 3]])
    tracker.train()
    stream = tracker.stream()
    stream.add(QUERIES[[0, 3], 1:])
    results = run(stream, video)
    assert tracker.head.training
    torch.testing.assert_close(torch.stack([r.xy for r in results], 1), expected.xy, atol=1e-4, rtol=0)


def test_frames_and_points_that_do_not_fit_leave_the_stream_as_it_was() -> None:
    tracker, video = tiny("memory"), clip(3)
    stream = tracker.stream()
    outside = stream.add([[W + 1.0, 3.0]])
    for _ in range(2):
        with pytest.raises(ValueError, match=r"outside the frame"):
            stream.step(video[0])
    stream.drop(outside)
    with pytest.raises(TypeError, match="uint8"):
        stream.step(video[0].astype(np.float32))
    with pytest.raises(ValueError, match=r"points must be \(n, 2\)"):
        stream.add(np.zeros((2, 3)))
    stream.add([[10.0, 12.0]])
    mirrored = video[..., ::-1]  # a BGR frame seen as RGB: an array that runs backward
    assert len(run(stream, mirrored)) == 3
    with pytest.raises(ValueError, match=r"frame must be \(40, 56\)"):
        stream.step(clip(1, 40, 48)[0])


@pytest.mark.parametrize(("kind", "options"), KINDS)
def test_a_batch_gives_what_its_videos_give_alone(kind: str, options: dict[str, Any]) -> None:
    tracker = tiny(kind, **options)
    videos = torch.from_numpy(np.stack([clip(), clip()[::-1]])).permute(0, 1, 4, 2, 3)
    queries = torch.stack([QUERIES, QUERIES.flip(0)])
    queries[1, :, 0] = torch.tensor([0, 5, 0, 11, 2])
    asked, shown = queries.clone(), videos.clone()
    with torch.no_grad():
        both = tracker(videos, queries)
    assert torch.equal(queries, asked)
    assert torch.equal(videos, shown)
    for row in range(2):
        alone = tracker.track(videos[row].permute(0, 2, 3, 1), queries[row])
        torch.testing.assert_close(both.xy[row], alone.xy, atol=1e-4, rtol=0)
        torch.testing.assert_close(both.visibility[row], alone.visibility, atol=1e-5, rtol=0)
        assert torch.equal(both.visible[row], alone.visible)


@pytest.mark.parametrize("kind", ["memory", "correlation"])
def test_inputs_of_every_kind_give_the_same_tracks_and_stay_as_they_were(kind: str) -> None:
    tracker, video = tiny(kind), clip()
    whole = np.array([[0, 10, 12], [11, 30, 20], [7, 0, 40]])
    expected = tracker.track(video, whole.astype(np.float64))
    tensor = torch.from_numpy(whole)
    frozen = video.copy()
    for queries in (whole, tensor, tensor.float(), whole.astype(np.float32)[::-1][::-1]):
        before = queries.clone() if isinstance(queries, Tensor) else queries.copy()
        for frames in (video, torch.from_numpy(video), video[::-1].copy()[::-1]):
            tracks = tracker.track(frames, queries, both_directions=True)
            tracks.queries += 1  # the caller's to change, without changing what was passed
            assert torch.equal(tracks.xy[0], expected.xy[0])
        assert (queries == before).all()
    np.testing.assert_array_equal(video, frozen)


@pytest.mark.parametrize("kind", ["memory", "correlation"])
def test_no_points_at_all(kind: str) -> None:
    tracker, video = tiny(kind), clip(3)
    tracks = tracker.track(video, np.zeros((0, 3)), both_directions=True)
    assert tracks.xy.shape == (0, 3, 2)
    assert tracks.queries.shape == (0, 3)
    with torch.no_grad():
        prediction = tracker(torch.from_numpy(video).permute(0, 3, 1, 2)[None], torch.zeros(1, 0, 3))
    assert prediction.xy.shape == (1, 0, 3, 2)
    stream = tracker.stream()
    assert [result.xy.shape for result in run(stream, video)] == [(0, 2)] * 3


@pytest.mark.parametrize(
    ("both", "room", "frames"), [(False, True, 12), (True, True, 12), (True, False, 2 * (12 + 4))]
)
def test_frames_are_encoded_once_while_their_maps_fit(
    both: bool, room: bool, frames: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without room, each direction encodes frame 0 for its size and the three query frames once more."""
    tracker, video = tiny("memory"), clip()
    expected = tracker.track(video, QUERIES, both_directions=both)
    if not room:
        monkeypatch.setattr("trackbench.tracker._ClipFeatures.KEEP_BYTES", 0)
    assert isinstance(tracker.backbone, Patches)
    tracker.backbone.encoded = 0
    tracks = tracker.track(video, QUERIES, both_directions=both)
    assert tracker.backbone.encoded == frames
    assert torch.equal(tracks.xy, expected.xy)


def test_frames_before_the_query_come_from_the_mirrored_run() -> None:
    tracker, video = tiny("memory", support_grid=2), clip()
    both = tracker.track(video, QUERIES, both_directions=True)
    forward = tracker.track(video, QUERIES)
    mirrored = QUERIES.clone()
    mirrored[:, 0] = FRAMES - 1 - QUERIES[:, 0]
    backward = tracker.track(video[::-1].copy(), mirrored)
    for row, query in enumerate(QUERIES):
        t = int(query[0])
        torch.testing.assert_close(both.xy[row, t:], forward.xy[row, t:])
        torch.testing.assert_close(both.xy[row, :t], backward.xy[row].flip(0)[:t])
        torch.testing.assert_close(both.visibility[row, :t], backward.visibility[row].flip(0)[:t])
    assert not torch.allclose(both.xy[2, :7], forward.xy[2, :7], atol=1e-2)


def saved_and_loaded(stream: TrackerStream) -> dict[str, Any]:
    file = io.BytesIO()
    torch.save(stream.state_dict(), file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def plain(value: Any) -> bool:
    if isinstance(value, dict):
        return all(isinstance(key, str) and plain(item) for key, item in value.items())
    if isinstance(value, list):
        return all(plain(item) for item in value)
    return value is None or isinstance(value, Tensor | int | str)


def configured(backbone: str, **overrides: Any) -> PointTracker:
    values = {"backbone": backbone, "input_size": [32, 32], **overrides}
    tracker = build_tracker(tracker_config("trackon_tiny", values))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in tracker.parameters():
            parameter += 0.02 * torch.randn(parameter.shape, generator=generator)
    return tracker.eval()


STREAMS = {
    "memory": lambda: tiny("memory", support_grid=2),
    "correlation": lambda: tiny("correlation"),
    "window": lambda: configured("chrono_vit_tiny", **{"backbone.window": 3}),
    "whole clip": lambda: configured("chrono_vit_tiny", **{"backbone.norm": "clip"}),
}


@pytest.mark.parametrize("kind", STREAMS)
@pytest.mark.parametrize("at", [0, 1, 6])
def test_a_saved_stream_goes_on_bit_for_bit(kind: str, at: int) -> None:
    tracker, video = STREAMS[kind](), clip()

    def drive(stream: TrackerStream, frames: range) -> list[FrameTracks]:
        results = []
        for t in frames:
            if t == 8:
                stream.drop([0])
            entering = due(t + 1)  # a point waits for its frame while the state is saved
            if t == 0:
                stream.add(QUERIES[due(0), 1:])
            results += run(stream, video[t : t + 1])
            if len(entering):
                stream.add(QUERIES[entering, 1:])
        return results

    stream = tracker.stream()
    drive(stream, range(at))
    content = saved_and_loaded(stream)
    assert plain(content)
    expected = drive(stream, range(at, FRAMES)) + stream.finish()

    other = tracker.stream()
    other.add([[1.0, 1.0]])  # what was there before is forgotten
    other.load_state_dict(content)
    results = drive(other, range(at, FRAMES)) + other.finish()
    assert [r.frame for r in results] == [r.frame for r in expected]
    assert results
    for result, wanted in zip(results, expected, strict=True):
        assert result.ids.tolist() == wanted.ids.tolist()
        for name in ("xy", "visible", "visibility"):
            assert torch.equal(getattr(result, name), getattr(wanted, name)), name


def test_a_saved_state_is_a_copy_that_neither_stream_changes() -> None:
    tracker, video = tiny("memory"), clip()
    stream = tracker.stream()
    stream.add(QUERIES[:3, 1:])
    run(stream, video[:4])
    content = stream.state_dict()
    before = {name: value.clone() for name, value in content["head"].items() if isinstance(value, Tensor)}
    other = tracker.stream()
    other.load_state_dict(content)
    run(stream, video[4:])
    run(other, video[4:])
    assert all(torch.equal(content["head"][name], value) for name, value in before.items())
    shared = {value.data_ptr() for value in vars(other._state).values() if isinstance(value, Tensor)}
    assert not shared & {value.data_ptr() for value in before.values()}


def test_a_state_takes_the_dtype_of_its_tracker() -> None:
    tracker, video = tiny("memory"), clip(4)
    stream = tracker.stream()
    stream.add(QUERIES[:2, 1:])
    run(stream, video)
    content = stream.state_dict()
    content["head"]["context"] = content["head"]["context"].half()
    other = tracker.stream()
    other.load_state_dict(content)
    assert other._state.context.dtype == torch.float32


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (lambda: tiny("correlation"), "its head is 'MemoryHead', here 'CorrelationHead'"),
        (lambda: tiny("memory", memory_size=4), r"context is \(1, 2, 3, 8\), expected \(1, 2, 4, 8\)"),
        (lambda: tiny("memory", memory_size=(3, 4)), r"(spatial|hidden) is .*, expected \(1, 2, 4"),
        (lambda: tiny("memory", dim=16), "another tracker: its layout"),
        (lambda: tracker_of(memory_head(dim=7), Patches(7)), "its dim is 6, here 7"),
        (lambda: tracker_of(memory_head(), size=(40, 56)), r"its input_size is \[\], here \[40, 56\]"),
    ],
)
def test_states_of_another_tracker_are_refused(other: Any, message: str) -> None:
    stream = tiny("memory").stream()
    stream.add(QUERIES[:2, 1:])
    run(stream, clip(2))
    with pytest.raises(ValueError, match=message):
        other().stream().load_state_dict(stream.state_dict())


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ({"format_version": 2}, "format_version 2, expected 1"),
        ({"extra": 1}, "must hold"),
        ({"pushed": -1}, "pushed must be a count"),
        ({"yielded": 9}, "yielded 9 frames of 2"),
        ({"frame_size": []}, "frame_size"),
        ({"ids": torch.tensor([0, 7])}, "lie below next_id 2"),
        ({"ids": torch.tensor([0])}, r"expected \(1, 1"),
        ({"waiting": [[0, torch.tensor([1]), torch.zeros(2, 2)]]}, r"must be \(1, 2\)"),
        ({"features": {"frames": []}}, "keeps nothing"),
        ({"head.frame": "2"}, "frame must be a count"),
        ({"head.num_support": "2"}, "num_support must be a count"),
        ({"head.num_support": 2}, "expected"),
        ({"head.query": [1]}, "must be a tensor"),
        ({"head.hidden": torch.zeros(1, 2, 3)}, "is torch.float32, expected torch.bool"),
        ({"head.more": 1}, "must hold"),
    ],
)
def test_damaged_states_are_refused_and_change_nothing(damage: dict[str, Any], message: str) -> None:
    tracker, video = tiny("memory"), clip(4)
    stream, untouched = tracker.stream(), tracker.stream()
    for each in (stream, untouched):
        each.add(QUERIES[:2, 1:])
        run(each, video[:2])
    content = stream.state_dict()
    for key, value in damage.items():
        part, _, name = key.rpartition(".")
        (content[part] if part else content)[name] = value
    with pytest.raises(ValueError, match=message):
        stream.load_state_dict(content)
    for result, wanted in zip(run(stream, video[2:]), run(untouched, video[2:]), strict=True):
        assert torch.equal(result.xy, wanted.xy)


WAITS = ("_local_scalar_dense", "nonzero", "equal", "is_nonzero", "masked_select", "unique")  # for the device


class Waits(TorchDispatchMode):
    """Counts the operations after which the host knows a value that a device has computed."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += any(name in func.__name__.split(".")[0] for name in WAITS)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("kind", "options"), KINDS)
def test_no_frame_waits_for_the_device(kind: str, options: dict[str, Any]) -> None:
    tracker, video = tiny(kind, **options), clip()
    stream = tracker.stream()
    stream.add(QUERIES[:, 1:])
    stream.step(video[0])
    with Waits() as waits:
        run(stream, video[1:])
    assert waits.count == 0
    counts = []
    for frames in (8, 12):
        with Waits() as waits:
            tracker.track(video[:frames], QUERIES, both_directions=True)
        counts.append(waits.count)
    assert counts[0] == counts[1] > 0


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize(("kind", "options"), KINDS)
def test_no_frame_waits_for_a_gpu_and_states_change_devices(kind: str, options: dict[str, Any]) -> None:
    tracker, video = tiny(kind, **options).cuda(), clip()
    stream = tracker.stream()
    stream.add(QUERIES[:, 1:])
    run(stream, video[:4])
    content = stream.state_dict()
    torch.cuda.set_sync_debug_mode("error")
    try:
        results = run(stream, video[4:])
    finally:
        torch.cuda.set_sync_debug_mode("default")
    there = tracker.cpu().stream()
    there.load_state_dict(content)
    for result, wanted in zip(run(there, video[4:]), results, strict=True):
        torch.testing.assert_close(result.xy, wanted.xy.cpu(), atol=1e-2, rtol=0)


def resident_bytes() -> int:
    status = Path("/proc/self/statm")
    if not status.is_file():
        pytest.skip("no /proc/self/statm here")
    return int(status.read_text().split()[1]) * 4096


def tensors_in(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, list) else []
    return [tensor for part in parts for tensor in tensors_in(part)]


@pytest.mark.parametrize(("kind", "num_frames"), [("memory", 10_000), ("correlation", 3_000)])
def test_ten_thousand_frames_take_the_memory_of_a_few(kind: str, num_frames: int) -> None:
    small = {"grid_size": (4, 4), "num_heads": 1, "levels": 1, "support_grid": 2}
    tracker = tiny(kind, **(small if kind == "memory" else {}))
    video = clip(16, 16, 16)
    stream = tracker.stream()
    stream.add([[3.0, 4.0], [8.0, 12.5], [15.0, 1.0]])
    results: list[FrameTracks | None] = []
    sizes, held = [], []
    for t in range(num_frames):
        results = [stream.step(video[t % 16])]
        if t % 100 == 50:  # points come and go
            stream.drop([int(stream.add([[5.0, 5.0]])) - 1] if t > 50 else [])
        if (t >= 1000 and t % 1000 == 0) or t == num_frames - 1:
            sizes.append(resident_bytes())
            held.append(sum(tensor.nbytes for tensor in tensors_in(stream.state_dict())))
    assert results[0] is not None
    assert results[0].frame == num_frames - 1
    assert not results[0].xy.requires_grad
    assert results[0].xy.untyped_storage().nbytes() < 1000
    assert max(held) == min(held)
    assert max(sizes) - sizes[0] < 8 * 2**20
