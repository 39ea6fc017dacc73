"""Speed: operations against a hand formula, memory against a known tensor, timing against known sleeps."""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from evaluation_fakes import Constant, ConstantStream
from torch import Tensor, nn

from trackbench.baselines import LucasKanade
from trackbench.evaluation import speed
from trackbench.evaluation.memory import MIB, peak_memory
from trackbench.evaluation.speed import count_parameters, flops_per_frame, measure_speed
from trackbench.structures import FrameTracks, Tracks

SMALL: dict[str, Any] = {"model": "m", "num_frames": 6, "height": 16, "width": 24, "warmup": 2, "repeats": 2}


class Attentive(nn.Module):
    """One convolution and one attention layer per frame; the points are the queries."""

    def __init__(self, fused: bool = True) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 32, 4, stride=4)
        self.project = nn.Linear(2, 32)
        self.attention = nn.MultiheadAttention(32, 4, batch_first=True)
        self.project.weight.requires_grad_(False)
        self.fused = fused
        self.eval()

    @torch.no_grad()
    def track(self, video: Tensor, queries: Tensor) -> Tracks:
        points = self.project(queries[None, :, 1:])
        for frame in video:
            tokens = self.patches(frame.permute(2, 0, 1)[None].float() / 255).flatten(2).mT
            if self.fused:
                F.scaled_dot_product_attention(points, tokens, tokens)
            else:
                self.attention(points, tokens, tokens, need_weights=False)
        return Constant().track(video, queries)

    def stream(self) -> ConstantStream:
        return ConstantStream(0)


@pytest.mark.parametrize("fused", [True, False])
def test_operations_match_the_hand_formula(fused: bool) -> None:
    frames, tokens, points, dim = 3, (16 // 4) * (24 // 4), 7, 32
    convolution = 2 * tokens * dim * 3 * 4 * 4
    attention = 2 * 2 * points * tokens * dim
    projections = 0 if fused else 2 * dim * dim * (2 * points + 2 * tokens)
    once = 2 * points * 2 * dim
    expected = convolution + attention + projections + once / frames
    video = torch.zeros(frames, 16, 24, 3, dtype=torch.uint8)
    assert flops_per_frame(Attentive(fused), video, torch.rand(points, 2)) == expected
    assert torch.backends.mha.get_fastpath_enabled()


def test_parameters() -> None:
    tracker = Attentive()
    attention = 4 * 32 * 32 + 4 * 32
    convolution = 32 * 3 * 16 + 32
    assert count_parameters(tracker) == {
        "parameters": attention + convolution + 2 * 32 + 32,
        "trainable_parameters": attention + convolution + 32,
    }
    assert count_parameters(LucasKanade()) == {"parameters": 0, "trainable_parameters": 0}


class Clock:
    """Time that passes only when told."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


class Slow(Constant):
    """Frame t of a stream takes ``milliseconds[t]``, a clip one second more each time."""

    def __init__(self, lag: int | None, clock: Clock, milliseconds: list[float]) -> None:
        super().__init__(lag)
        self.clock = clock
        self.milliseconds = milliseconds
        self.clips = 0

    def track(self, *args: Any, **kwargs: Any) -> Tracks:
        self.clips += 1
        self.clock.now += self.clips
        return super().track(*args, **kwargs)

    def stream(self) -> ConstantStream:
        tracker = self

        class Stream(ConstantStream):
            def step(self, frame: Tensor) -> FrameTracks | None:
                tracker.clock.now += tracker.milliseconds[self.pushed] / 1000
                return super().step(frame)

        return Stream(self.lag)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(speed, "perf_counter", clock)
    return clock


def test_warm_up_frames_do_not_count(clock: Clock) -> None:
    tracker = Slow(0, clock, [900, 800, 10, 30, 20, 100])
    row = measure_speed(tracker, [3], **SMALL, count_operations=False)[0]
    assert row["latency_ms"] == pytest.approx(25)
    assert row["latency_p95_ms"] == pytest.approx(30 + 0.85 * 70)
    assert row["fps"] == pytest.approx(4 / 0.160)
    assert row["gflops_per_frame"] is None


def test_clips_are_timed_after_one_to_warm_up(clock: Clock) -> None:
    row = measure_speed(Slow(None, clock, [1] * 6), [3], **SMALL, count_operations=False)[0]
    assert row["latency_ms"] == pytest.approx(1000 * (2 + 3) / 2 / 6)  # clips of 2 s and 3 s with 6 frames
    assert row["fps"] == pytest.approx(12 / 5)


@pytest.mark.parametrize(("lag", "mode", "frames"), [(0, "stream", 0), (3, "stream", 3), (None, "clip", 5)])
def test_look_ahead_is_told(lag: int | None, mode: str, frames: int) -> None:
    row = measure_speed(Constant(lag), [2], **SMALL)[0]
    assert (row["mode"], row["lag_frames"]) == (mode, frames)
    assert row["latency_ms"] > 0


def test_one_row_per_number_of_points() -> None:
    rows = measure_speed(LucasKanade(), [1, 5], **SMALL)
    assert [row["num_points"] for row in rows] == [1, 5]
    assert all(row["gflops_per_frame"] == 0 for row in rows)
    assert rows[0].keys() == rows[1].keys()


def test_nothing_left_to_time() -> None:
    with pytest.raises(ValueError, match="time nothing"):
        measure_speed(Constant(), [1], **{**SMALL, "warmup": 6})


def test_peak_memory_sees_a_tensor_that_is_gone_again() -> None:
    size = 150 * MIB
    for _ in range(2):  # the second time the allocator could reuse what the first left behind
        with peak_memory(torch.device("cpu")) as peak:
            tensor = torch.ones(size, dtype=torch.uint8)
            time.sleep(0.05)
            del tensor
        if peak.kind == "unknown":
            pytest.skip("this system does not tell the resident set of a process")
        assert peak.added is not None
        assert peak.total is not None
        assert size <= peak.added + 2 * MIB < size + 40 * MIB
        assert peak.total > peak.added


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_peak_memory_on_cuda() -> None:
    device = torch.device("cuda")
    with peak_memory(device) as peak:
        torch.ones(150 * MIB, dtype=torch.uint8, device=device)
    assert peak.added == 150 * MIB
    assert peak.kind == "cuda allocator"
