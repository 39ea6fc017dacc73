"""PointTracker = Backbone x Head: the one class users meet. Pixels in, pixels out; clips and streams alike."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from os import PathLike

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from trackbench.backbones.base import Backbone
from trackbench.heads.base import Head, HeadOutput, Target
from trackbench.structures import FrameTracks, Tracks, VideoBatch

Progress = Callable[[int, int], None]


@dataclasses.dataclass
class Prediction:
    """What :meth:`PointTracker.forward` returns, in pixels of the input video.

    Attributes:
        xy: (B, N, T, 2) float32.
        visible: (B, N, T) bool.
        visibility: (B, N, T) float32 in [0, 1].
        output: the head's own output, in cells, with what its loss needs.
        cells_per_pixel: (2,) float32, (w / W, h / H).
    """

    xy: Tensor
    visible: Tensor
    visibility: Tensor
    output: HeadOutput
    cells_per_pixel: Tensor


class PointTracker(nn.Module):
    """A tracker: a backbone under a head, at one input size.

    Args:
        backbone: video -> feature maps.
        head: feature maps and queries -> tracks, in cells.
        input_size: (height, width) that every frame is resized to (bilinear, half-pixel centres, without
            antialiasing; the aspect ratio is not kept); None: frames enter as they are.
    """

    def __init__(self, *, backbone: Backbone, head: Head, input_size: tuple[int, int] | list[int] | None) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = head
        self.input_size = None if input_size is None else (int(input_size[0]), int(input_size[1]))

    @property
    def causal(self) -> bool:
        """Whether tracks run forward in time only (frames before a query want a second, reversed run)."""
        return self.head.causal

    @property
    def lookahead(self) -> int | None:
        """Frames that must arrive after a frame before a stream yields it; None: the whole video."""
        return self.backbone.lookahead

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.parameters()).device

    def prepare(self, video: Tensor) -> Tensor:
        """(B, T, 3, H, W) uint8 in [0, 255] -> float in [0, 1] at the input size."""
        if video.dtype != torch.uint8:
            raise TypeError(f"video must be uint8 in [0, 255], got {video.dtype}")
        frames = rearrange(video, "b t c h w -> (b t) c h w").to(torch.get_default_dtype()) / 255
        if self.input_size is not None and tuple(frames.shape[-2:]) != self.input_size:
            frames = F.interpolate(frames, size=self.input_size, mode="bilinear", align_corners=False)
        return rearrange(frames, "(b t) c h w -> b t c h w", b=video.shape[0])

    def forward(self, video: Tensor, queries: Tensor) -> Prediction:
        """Track through clips, with what training needs.

        Args:
            video: (B, T, 3, H, W) uint8.
            queries: (B, N, 3) as (t, x, y), pixels of ``video``; not changed.
        """
        features = self.backbone(self.prepare(video))
        scale = _cells_per_pixel(features.shape[-2:], video.shape[-2:], video.device)
        output = self.head(features, _to_cells(queries, scale))
        return Prediction(
            xy=output["xy"].float() / scale,
            visible=output["visible"],
            visibility=output["visibility"].float(),
            output=output,
            cells_per_pixel=scale,
        )

    def loss(self, prediction: Prediction, batch: VideoBatch) -> dict[str, Tensor]:
        """The head's named loss terms for ground truth in pixels."""
        scale = prediction.cells_per_pixel
        labelled = torch.ones_like(batch.visible) if batch.labelled is None else batch.labelled
        target = Target(_to_cells(batch.queries, scale), batch.xy * scale, batch.visible, labelled)
        return self.head.loss(prediction.output, target)

    def track(
        self,
        video: np.ndarray | Tensor | str | PathLike[str],
        queries: np.ndarray | Tensor,
        *,
        both_directions: bool = False,
        progress: Progress | None = None,
    ) -> Tracks:
        """Track query points through a video.

        Args:
            video: (T, H, W, 3) uint8 RGB, or the path of a video file.
            queries: (N, 3) as (t, x, y), frame index and pixels of ``video``.
            both_directions: also run causal trackers backward in time, and take the frames before each query
                from that run (trackers that are not causal need no second run and ignore this).
            progress: called with (frames done, frames in all).

        Raises:
            ValueError: shapes that do not fit, a video without frames, queries with NaN or outside the video.
            TypeError: a video that is not uint8.
        """
        frames = _as_video(video)
        points = check_queries(queries, frames.shape[0], frames.shape[1], frames.shape[2])
        return self.track_tensor(
            frames.permute(0, 3, 1, 2), points, both_directions=both_directions, progress=progress
        )

    @torch.no_grad()
    def track_tensor(
        self,
        video: Tensor,
        queries: Tensor,
        *,
        both_directions: bool = False,
        progress: Progress | None = None,
    ) -> Tracks:
        """:meth:`track` without checks, for (T, 3, H, W) uint8 and (N, 3) queries on any device."""
        T = video.shape[0]
        start = queries[:, 0].floor()
        backward = both_directions and self.causal and bool((start > 0).any())
        total = T * (2 if backward else 1)
        ticks = iter(range(1, total + 1))

        def tick() -> None:
            if progress is not None:
                progress(next(ticks), total)

        with _evaluating(self):
            tracks = self._run(video, queries, tick)
            if backward:
                reversed_queries = torch.cat([T - 1 - start[:, None], queries[:, 1:]], dim=1)
                mirrored = self._run(video.flip(0), reversed_queries, tick)
                before = torch.arange(T) < start.cpu()[:, None]
                tracks.xy = torch.where(before[..., None], mirrored.xy.flip(1), tracks.xy)
                tracks.visible = torch.where(before, mirrored.visible.flip(1), tracks.visible)
                tracks.visibility = torch.where(before, mirrored.visibility.flip(1), tracks.visibility)
        return tracks

    def stream(self) -> TrackerStream:
        """Track frame by frame: ``add`` points, ``step`` frames, ``finish`` at the end of the video."""
        return TrackerStream(self)

    def _run(self, video: Tensor, queries: Tensor, tick: Callable[[], None]) -> Tracks:
        """One run forward in time: the head steps through the clip's features."""
        T, N = video.shape[0], queries.shape[0]
        if N == 0:
            empty = torch.zeros(0, T)
            return Tracks(empty[..., None].expand(0, T, 2), empty.bool(), empty, queries.cpu().float())
        points = queries.to(self.device, torch.float32)
        if self.causal:
            points = torch.cat([points[:, :1].floor(), points[:, 1:]], dim=1)
        features = _ClipFeatures(self, video, points[:, 0])
        scale = _cells_per_pixel(features[0].shape[-2:], video.shape[-2:], self.device)
        cells = _to_cells(points[None], scale)
        state = self.head.start(1)
        self.head.add(state, self._query_features(features, cells), cells)
        outputs = []
        for t in range(T):
            outputs.append(self.head.step(state, features[t]))
            tick()
        xy, visibility, visible = (torch.stack(parts, dim=2)[0] for parts in zip(*outputs, strict=True))
        return Tracks(
            xy=(xy.float() / scale).cpu(),
            visible=visible.cpu(),
            visibility=visibility.float().cpu(),
            queries=queries.detach().cpu().float(),
        )

    def _query_features(self, features: _ClipFeatures, cells: Tensor) -> Tensor:
        """Sampled at each query's own frame; a fractional time blends the frames around it."""
        time, xy = cells[0, :, 0], cells[..., 1:]
        last = features.num_frames - 1
        sampled: Tensor | None = None
        for t in features.query_frames:
            weight = (1 - (time - t).abs()).clamp(min=0)
            weight = torch.where((time >= last) & (t == last), torch.ones_like(weight), weight)
            part = self.head.sample(features[t], xy) * weight[None, :, None]
            sampled = part if sampled is None else sampled + part
        if sampled is None:
            raise ValueError("queries hold no frame to sample")
        return sampled


class TrackerStream:
    """A video that arrives frame by frame, with points that come and go. Made by :meth:`PointTracker.stream`."""

    def __init__(self, tracker: PointTracker) -> None:
        self.tracker = tracker
        self._features = tracker.backbone.stream()
        self._state = tracker.head.start(1)
        self._size: tuple[int, int] | None = None
        self._pushed = 0
        self._yielded = 0
        self._next_id = 0
        self._ids = torch.zeros(0, dtype=torch.int64)
        self._waiting: list[tuple[int, Tensor, Tensor]] = []

    def add(self, points_xy: np.ndarray | Tensor) -> Tensor:
        """Let points enter at the frame that the next :meth:`step` brings.

        Args:
            points_xy: (n, 2), pixels.

        Returns:
            (n,) int64, the ids of the points in the results.
        """
        points = torch.as_tensor(points_xy, dtype=torch.float32).reshape(-1, 2).clone()
        if not bool(torch.isfinite(points).all()):
            raise ValueError("points must be finite, got NaN or infinity")
        if self._size is not None:
            _check_inside(points, *self._size)
        ids = torch.arange(self._next_id, self._next_id + len(points))
        self._next_id += len(points)
        if len(points):
            self._waiting.append((self._pushed, ids, points))
        return ids

    def drop(self, ids: Tensor | list[int]) -> None:
        """Forget points."""
        unwanted = torch.as_tensor(ids, dtype=torch.int64)
        keep = ~torch.isin(self._ids, unwanted)
        if len(self._ids) and not bool(keep.all()):
            self.tracker.head.drop(self._state, keep.to(self.tracker.device))
            self._ids = self._ids[keep]
        remaining = []
        for frame, waiting_ids, points in self._waiting:
            wanted = ~torch.isin(waiting_ids, unwanted)
            if bool(wanted.any()):
                remaining.append((frame, waiting_ids[wanted], points[wanted]))
        self._waiting = remaining

    @torch.no_grad()
    def step(self, frame: np.ndarray | Tensor) -> FrameTracks | None:
        """Take the next frame (H, W, 3) uint8.

        Returns:
            The points of the earliest frame that became ready: this frame, or an earlier one where the backbone
            looks ahead (``tracker.lookahead``), or None while there is none yet.
        """
        image = torch.as_tensor(np.asarray(frame) if not isinstance(frame, Tensor) else frame)
        if image.ndim != 3 or image.shape[2] != 3:
            raise ValueError(f"frame must be (H, W, 3), got {tuple(image.shape)}")
        size = (int(image.shape[0]), int(image.shape[1]))
        if self._size is None:
            self._size = size
            for _, _, points in self._waiting:
                _check_inside(points, *size)
        elif size != self._size:
            raise ValueError(f"frame must be {self._size} like the frames before it, got {size}")
        with _evaluating(self.tracker):
            pixels = image.permute(2, 0, 1)[None, None].to(self.tracker.device)
            ready = self._features.push(self.tracker.prepare(pixels)[:, 0])
            self._pushed += 1
            results = [self._advance(features) for features in ready]
        if len(results) > 1:
            raise RuntimeError("a backbone's stream returned more than one frame for one push")
        return results[0] if results else None

    @torch.no_grad()
    def finish(self) -> list[FrameTracks]:
        """The video has ended: the frames that still waited for later ones."""
        with _evaluating(self.tracker):
            return [self._advance(features) for features in self._features.flush()]

    def _advance(self, features: Tensor) -> FrameTracks:
        assert self._size is not None
        head, device = self.tracker.head, self.tracker.device
        scale = _cells_per_pixel(features.shape[-2:], self._size, device)
        while self._waiting and self._waiting[0][0] <= self._yielded:
            _, ids, points = self._waiting.pop(0)
            xy = points.to(device)[None]
            time = torch.full_like(xy[..., :1], self._yielded)
            cells = _to_cells(torch.cat([time, xy], dim=2), scale)
            head.add(self._state, head.sample(features, cells[..., 1:]), cells)
            self._ids = torch.cat([self._ids, ids])
        output = head.step(self._state, features)
        result = FrameTracks(
            frame=self._yielded,
            ids=self._ids.clone(),
            xy=output.xy[0].float() / scale,
            visible=output.visible[0],
            visibility=output.visibility[0].float(),
        )
        self._yielded += 1
        return result


class _ClipFeatures:
    """Feature maps of a clip that is there already: each frame is encoded once.

    Frame-by-frame backbones encode on demand and keep only the maps of query frames, up to a limit; others
    encode the clip at once.
    """

    KEEP = 64

    def __init__(self, tracker: PointTracker, video: Tensor, times: Tensor) -> None:
        self._tracker = tracker
        self._video = video
        self.num_frames = video.shape[0]
        around = torch.cat([times.floor(), times.ceil()]).long().clamp(0, self.num_frames - 1)
        self.query_frames: list[int] = torch.unique(around).tolist()
        self._pinned = set(self.query_frames[: self.KEEP])
        self._maps: dict[int, Tensor] = {}
        if tracker.backbone.context != 0:
            clip = tracker.backbone(tracker.prepare(video[None].to(tracker.device)))[0]
            self._maps = {t: clip[t : t + 1] for t in range(self.num_frames)}

    def __getitem__(self, t: int) -> Tensor:
        """(1, C, h, w) of frame ``t``."""
        if t in self._maps:
            return self._maps[t]
        frame = self._video[t][None, None].to(self._tracker.device)
        features = self._tracker.backbone(self._tracker.prepare(frame))[:, 0]
        if t in self._pinned or t == 0:
            self._maps[t] = features
        return features


def check_queries(queries: np.ndarray | Tensor, num_frames: int, height: int, width: int) -> Tensor:
    """(N, 3) float32 queries as (t, x, y), a copy; ValueError where they do not lie inside the video."""
    points = torch.as_tensor(queries)
    if points.ndim != 2 or points.shape[1] != 3:
        raise ValueError(f"queries must be (N, 3) as (t, x, y), got {tuple(points.shape)}")
    points = points.detach().to("cpu", torch.float32, copy=True)
    finite = torch.isfinite(points).all(dim=1)
    if not bool(finite.all()):
        raise ValueError(f"query {int((~finite).nonzero()[0])} is not finite: {points[~finite][0].tolist()}")
    upper = torch.tensor([num_frames - 1, width, height], dtype=torch.float32)
    inside = ((points >= 0) & (points <= upper)).all(dim=1)
    if not bool(inside.all()):
        first = int((~inside).nonzero()[0])
        raise ValueError(
            f"query {first} (t, x, y) = {points[first].tolist()} lies outside the video: expected t in "
            f"[0, {num_frames - 1}], x in [0, {width}], y in [0, {height}]"
        )
    return points


def _check_inside(points: Tensor, height: int, width: int) -> None:
    inside = ((points >= 0) & (points <= torch.tensor([width, height]))).all(dim=1)
    if not bool(inside.all()):
        first = int((~inside).nonzero()[0])
        raise ValueError(
            f"point {first} (x, y) = {points[first].tolist()} lies outside the frame: expected x in "
            f"[0, {width}], y in [0, {height}]"
        )


def _as_video(video: np.ndarray | Tensor | str | PathLike[str]) -> Tensor:
    if isinstance(video, str | PathLike):
        from trackbench.data.video_io import read_video

        video = read_video(video)
    frames = torch.as_tensor(video)
    if frames.ndim != 4 or frames.shape[-1] != 3:
        raise ValueError(f"video must be (T, H, W, 3), got {tuple(frames.shape)}")
    if frames.dtype != torch.uint8:
        raise TypeError(f"video must be uint8 in [0, 255], got {frames.dtype}")
    if 0 in frames.shape:
        raise ValueError(f"video has no pixels: its shape is {tuple(frames.shape)}")
    return frames


def _cells_per_pixel(grid: tuple[int, ...], size: tuple[int, ...], device: torch.device) -> Tensor:
    return torch.tensor([grid[1] / size[1], grid[0] / size[0]], dtype=torch.float32, device=device)


def _to_cells(queries: Tensor, scale: Tensor) -> Tensor:
    return torch.cat([queries[..., :1], queries[..., 1:] * scale], dim=-1).float()


@contextmanager
def _evaluating(module: nn.Module) -> Iterator[None]:
    """Evaluation mode for a while; the mode before comes back, also after an error."""
    was_training = module.training
    if was_training:
        module.eval()
    try:
        yield
    finally:
        if was_training:
            module.train()
