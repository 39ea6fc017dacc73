"""What a tracker costs: latency, frames per second, memory, parameters, operations.

Latency is end to end: from a uint8 frame in main memory to tracks, with resizing and the copy to the device.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from time import perf_counter
from typing import Any, Generic, Protocol, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from trackbench.evaluation.memory import MIB, peak_memory
from trackbench.evaluation.runner import Row
from trackbench.structures import FrameTracks, Tracks

Cost = TypeVar("Cost")
Shape = Sequence[int]


class Stream(Protocol):
    """Frame-by-frame tracking."""

    def add(self, points_xy: Tensor, /) -> Tensor:
        """Let points (n, 2) enter at the next frame; their ids."""

    def step(self, frame: Tensor, /) -> FrameTracks | None:
        """Take the next frame (H, W, 3) uint8; the points of a frame that became ready."""

    def finish(self) -> list[FrameTracks]:
        """The video has ended: the frames that still waited."""


class StreamingTracker(Protocol):
    """A tracker that takes clips and streams."""

    def track(self, video: Tensor, queries: Tensor, /) -> Tracks:
        """Track (N, 3) queries through a (T, H, W, 3) uint8 video."""

    def stream(self) -> Stream:
        """A new stream."""


@dataclass(frozen=True)
class Timing:
    """How long the frames of a clip took.

    Attributes:
        mode: ``"stream"``: each frame timed on its own; ``"clip"``: the tracker needs the whole clip, whose
            time is divided by its frames.
        seconds: time per frame, one for each timed frame (stream) or clip (clip).
        lag: frames that must arrive after a frame before its points are known.
    """

    mode: str
    seconds: list[float]
    lag: int


@dataclass(frozen=True)
class Run(Generic[Cost]):
    """What the calls of a tracker cost.

    Attributes:
        mode: as in :class:`Timing`.
        costs: one for each call that counts: a frame (stream) or a clip (clip).
        frames: frames per call.
        lag: as in :class:`Timing`.
    """

    mode: str
    costs: list[Cost]
    frames: int
    lag: int


def measure_speed(
    tracker: StreamingTracker,
    points: Sequence[int] = (1, 64, 256),
    *,
    model: str,
    num_frames: int = 32,
    height: int = 256,
    width: int = 256,
    warmup: int = 5,
    repeats: int = 3,
    device: torch.device | str = "cpu",
    count_operations: bool = True,
) -> list[Row]:
    """Measure a tracker on a moving texture, once per number of points; all points enter at the first frame.

    A tracker whose stream yields points before the video ends is timed frame by frame: the first ``warmup``
    frames do not count. One that needs the whole clip is timed clip by clip, after one clip to warm up.

    Args:
        tracker: what is measured, on ``device``.
        points: numbers of points.
        model: name of the tracker in the rows.
        num_frames: frames of the video.
        height: of the frames, in pixels.
        width: of the frames, in pixels.
        warmup: frames that are not timed.
        repeats: clips that are timed where the tracker needs whole clips.
        device: device of the tracker.
        count_operations: run once more under a FLOP counter.

    Returns:
        One row per number of points: ``model``, ``device``, ``num_points``, ``num_frames``, ``height``,
        ``width``, ``mode``, ``lag_frames``, ``latency_ms`` (median), ``latency_p95_ms``, ``fps`` (frames
        divided by the sum of their times), ``peak_memory_mib`` (above what was in use before),
        ``peak_total_mib``, ``memory_kind``, ``parameters``, ``trainable_parameters``, ``gflops_per_frame``
        (None: not counted).

    Raises:
        ValueError: when no frame would be left to be timed.
    """
    if not 0 <= warmup < num_frames or repeats < 1:
        raise ValueError(f"{num_frames} frames with {warmup} to warm up and {repeats} repeats time nothing")
    device = torch.device(device)
    generator = torch.Generator().manual_seed(0)
    video = moving_texture(num_frames, height, width, generator)
    rows = []
    for count in points:
        xy = scattered_points(count, height, width, generator)
        with peak_memory(device) as peak:
            timing = time_frames(tracker, video, xy, warmup=warmup, repeats=repeats, device=device)
        milliseconds = 1000 * np.asarray(timing.seconds)
        rows.append(
            {
                "model": model,
                "device": str(device),
                "num_points": count,
                "num_frames": num_frames,
                "height": height,
                "width": width,
                "mode": timing.mode,
                "lag_frames": timing.lag,
                "latency_ms": float(np.median(milliseconds)),
                "latency_p95_ms": float(np.quantile(milliseconds, 0.95)),
                "fps": 1000 / float(milliseconds.mean()),
                "peak_memory_mib": None if peak.added is None else peak.added / MIB,
                "peak_total_mib": None if peak.total is None else peak.total / MIB,
                "memory_kind": peak.kind,
                **count_parameters(tracker),
                "gflops_per_frame": flops_per_frame(tracker, video, xy) / 1e9 if count_operations else None,
            }
        )
    return rows


def time_frames(
    tracker: StreamingTracker,
    video: Tensor,
    xy: Tensor,
    *,
    warmup: int,
    repeats: int,
    device: torch.device,
) -> Timing:
    """Time a stream over ``video`` (T, H, W, 3) uint8 with points ``xy`` (N, 2); else whole clips.

    See :func:`measure_speed`.
    """
    run = measure_calls(
        tracker, video, xy, lambda call: timed(call, device), warmup=warmup, clips=repeats, warmup_clips=1
    )
    return Timing(run.mode, [seconds / run.frames for seconds in run.costs], run.lag)


def measure_calls(
    tracker: StreamingTracker,
    video: Tensor,
    xy: Tensor,
    measure: Callable[[Callable[[], Any]], tuple[Any, Cost]],
    *,
    warmup: int,
    clips: int,
    warmup_clips: int,
) -> Run[Cost]:
    """Measure each frame of a stream, or whole clips where a stream yields nothing before the video ends.

    Args:
        tracker: the tracker.
        video: (T, H, W, 3) uint8.
        xy: (N, 2) points that enter at the first frame.
        measure: calls what it is given; returns the result and what it cost.
        warmup: frames of a stream that do not count.
        clips: clips that count.
        warmup_clips: clips before them that do not.
    """
    stream = tracker.stream()
    stream.add(xy)
    costs: list[Cost] = []
    lag: int | None = None
    for index, frame in enumerate(video):
        result, cost = measure(partial(stream.step, frame))
        if result is None:
            continue
        lag = index - result.frame
        if index >= warmup:
            costs.append(cost)
    if lag is not None and costs:
        stream.finish()
        return Run("stream", costs, 1, lag)
    queries = _queries(xy)
    costs = [measure(partial(tracker.track, video, queries))[1] for _ in range(warmup_clips + clips)]
    return Run("clip", costs[warmup_clips:], len(video), len(video) - 1)


def count_parameters(tracker: object) -> dict[str, int]:
    """``parameters`` and ``trainable_parameters``; both 0 for what is no module."""
    parameters = list(tracker.parameters()) if isinstance(tracker, nn.Module) else []
    return {
        "parameters": sum(p.numel() for p in parameters),
        "trainable_parameters": sum(p.numel() for p in parameters if p.requires_grad),
    }


def flops_per_frame(tracker: StreamingTracker, video: Tensor, xy: Tensor) -> float:
    """Floating-point operations per frame of a clip, as PyTorch counts them.

    See :func:`counted_operations` for what counts.

    Args:
        tracker: the tracker.
        video: (T, H, W, 3) uint8.
        xy: (N, 2) points that enter at the first frame.
    """
    with counted_operations() as counter:
        tracker.track(video, _queries(xy))
    return counter.get_total_flops() / len(video)


@contextmanager
def counted_operations() -> Iterator[FlopCounterMode]:
    """Count floating-point operations for a while.

    Matrix products, convolutions and attention count, two for each multiply-add; element-wise operations, sampling
    and what runs outside PyTorch do not.
    """
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)  # one opaque operation
    fused = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention_operations}
    try:
        with FlopCounterMode(display=False, custom_mapping=fused) as counter:
            yield counter
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)


def scattered_points(count: int, height: int, width: int, generator: torch.Generator) -> Tensor:
    """(count, 2) points away from the borders of a frame, in pixels."""
    return (0.1 + 0.7 * torch.rand(count, 2, generator=generator)) * torch.tensor([width, height])


def moving_texture(num_frames: int, height: int, width: int, generator: torch.Generator) -> Tensor:
    """(T, H, W, 3) uint8 that moves by a pixel a frame: trackers that give up on lost points keep theirs."""
    coarse = torch.rand(1, 3, max(2, height // 8), max(2, width // 8), generator=generator)
    texture = F.interpolate(coarse, size=(height, width), mode="bicubic", align_corners=False)
    image = (255 * texture[0].clamp(0, 1)).permute(1, 2, 0).to(torch.uint8)
    return torch.stack([image.roll(t, dims=1) for t in range(num_frames)])


def _queries(xy: Tensor) -> Tensor:
    return torch.cat([torch.zeros(len(xy), 1), xy], dim=1)


def timed(call: Callable[[], Any], device: torch.device) -> tuple[Any, float]:
    """What a call returns, and the seconds until the device is done with it."""
    _synchronize(device)
    start = perf_counter()
    result = call()
    _synchronize(device)
    return result, perf_counter() - start


def _synchronize(device: torch.device) -> None:
    """Wait for a device that works in the background."""
    if device.type in ("cuda", "mps", "xpu"):
        getattr(torch, device.type).synchronize()


def _attention_operations(query: Shape, key: Shape, value: Shape, *_: Any, **__: Any) -> int:
    """Of the CPU's fused attention, which the counter does not know; shapes are (B, heads, length, channels)."""
    B, heads, length, channels = query
    return 2 * B * heads * length * key[2] * (channels + value[3])
