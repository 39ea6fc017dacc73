"""PointTracker = Backbone x Head: the one class users meet. Pixels in, pixels out; clips and streams alike."""

from __future__ import annotations

import dataclasses
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property
from os import PathLike
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from trackbench.backbones.base import Backbone, FrameSequence
from trackbench.heads.base import Head, HeadOutput, Target
from trackbench.structures import FrameTracks, Tracks, VideoBatch

Progress = Callable[[int, int], None]
STREAM_FORMAT = 1  # of TrackerStream.state_dict


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

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """Let ``torch.compile`` take the backbone and the head; arguments are those of ``torch.compile``.

        Shapes depend on the number of points and the size of the maps only, so a video costs one compilation each,
        and ``mode="reduce-overhead"`` (CUDA graphs) works frame by frame.
        """
        self.backbone.compile(*args, **{"dynamic": False, **kwargs})
        self.head.compile(*args, **kwargs)

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
            features = _ClipFeatures(self, video)
            tracks = self._run(features, queries, tick, keep=backward)
            if backward:
                reversed_queries = torch.cat([T - 1 - start[:, None], queries[:, 1:]], dim=1)
                features = features.reversed()
                mirrored = self._run(features, reversed_queries, tick)
                before = torch.arange(T) < start.cpu()[:, None]
                tracks.xy = torch.where(before[..., None], mirrored.xy.flip(1), tracks.xy)
                tracks.visible = torch.where(before, mirrored.visible.flip(1), tracks.visible)
                tracks.visibility = torch.where(before, mirrored.visibility.flip(1), tracks.visibility)
        return tracks

    def stream(self) -> TrackerStream:
        """Track frame by frame: ``add`` points, ``step`` frames, ``finish`` at the end of the video."""
        return TrackerStream(self)

    def _run(
        self, features: _ClipFeatures, queries: Tensor, tick: Callable[[], None], *, keep: bool = False
    ) -> Tracks:
        """One run forward in time: the head steps through the clip's features.

        ``keep``: another run follows, so maps are kept for it as far as there is room.
        """
        T, N = features.num_frames, queries.shape[0]
        asked = queries.detach().to("cpu", torch.float32, copy=True)
        if N == 0:
            empty = torch.zeros(0, T)
            return Tracks(empty[..., None].expand(0, T, 2), empty.bool(), empty, asked)
        points = queries.to(self.device, torch.float32)
        if self.causal:
            points = torch.cat([points[:, :1].floor(), points[:, 1:]], dim=1)
        scale = _cells_per_pixel(features.get(0, again=True).shape[-2:], features.frame_size, self.device)
        cells = _to_cells(points[None], scale)
        state = self.head.start(1)
        self.head.add(state, self._query_features(features, cells), cells)
        outputs = []
        for t in range(T):
            outputs.append(self.head.step(state, features.get(t, again=keep)))
            tick()
        xy, visibility, visible = (torch.stack(parts, dim=2)[0] for parts in zip(*outputs, strict=True))
        return Tracks(
            xy=(xy.float() / scale).cpu(),
            visible=visible.cpu(),
            visibility=visibility.float().cpu(),
            queries=asked,
        )

    def _query_features(self, features: _ClipFeatures, cells: Tensor) -> Tensor:
        """Sampled at each query's own frame; a fractional time blends the frames around it."""
        time, xy = cells[0, :, 0], cells[..., 1:]
        last = features.num_frames - 1
        around = torch.cat([time.floor(), time.ceil()]).long().clamp(0, last)
        parts = []
        for t in torch.unique(around).tolist():
            weight = (1 - (time - t).abs()).clamp(min=0)
            weight = torch.where((time >= last) & (t == last), torch.ones_like(weight), weight)
            parts.append(self.head.sample(features.get(t, again=True), xy) * weight[None, :, None])
        return sum(parts[1:], start=parts[0])


class TrackerStream:
    """A video that arrives frame by frame, with points that come and go. Made by :meth:`PointTracker.stream`.

    Time and memory per frame do not depend on how many frames came before, where the backbone looks at a limited
    number of frames. Points that are there from their own frame on get the tracks of
    :meth:`PointTracker.track`. In heads whose points see each other, a point that was dropped leaves its mark
    in what the others remember of the frames before.
    """

    def __init__(self, tracker: PointTracker) -> None:
        self.tracker = tracker
        self._features = tracker.backbone.stream()
        with _evaluating(tracker):  # heads may carry more in evaluation than in training
            self._state = tracker.head.start(1)
        self._size: tuple[int, int] | None = None
        self._scale: Tensor | None = None
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

        Raises:
            ValueError: points of another shape, with NaN, or outside the frame.
        """
        points = _as_tensor(points_xy).detach().to("cpu", torch.float32, copy=True)
        if points.numel() == 0:
            points = points.reshape(0, 2)
        if points.ndim != 2 or points.shape[1] != 2:
            raise ValueError(f"points must be (n, 2) as (x, y), got {tuple(points.shape)}")
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
        """Forget points: no result from now on holds them, not even of a frame that was pushed before.

        Ids that are not there, or no longer, are ignored.
        """
        unwanted = torch.as_tensor(ids, dtype=torch.int64).cpu()
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
        """Take the next frame (H, W, 3) uint8. The host does not wait for the device.

        A frame in pinned memory must stay as it is until its results were read.

        Returns:
            The points of the earliest frame that became ready: this frame, or an earlier one where the backbone
            looks ahead (``tracker.lookahead``), or None while there is none yet.

        Raises:
            ValueError: a frame of another shape than those before; points that lie outside the first one.
            TypeError: a frame that is not uint8.
        """
        image = _as_tensor(frame)
        if image.ndim != 3 or image.shape[2] != 3:
            raise ValueError(f"frame must be (H, W, 3), got {tuple(image.shape)}")
        if image.dtype != torch.uint8:
            raise TypeError(f"frame must be uint8 in [0, 255], got {image.dtype}")
        size = (int(image.shape[0]), int(image.shape[1]))
        if self._size is None:
            for _, _, points in self._waiting:
                _check_inside(points, *size)
            self._size = size
        elif size != self._size:
            raise ValueError(f"frame must be {self._size} like the frames before it, got {size}")
        with _evaluating(self.tracker):
            pixels = _upload(image, self.tracker.device).permute(2, 0, 1)[None, None]
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

    def state_dict(self) -> dict[str, Any]:
        """Everything a stream needs to go on elsewhere: nested dicts and lists of tensors, numbers and names.

        ``torch.save`` writes it and ``torch.load(..., weights_only=True)`` reads it. The tensors are copies. The
        weights are not in it: a stream goes on with those of its tracker.
        """
        return {
            "format_version": STREAM_FORMAT,
            "tracker": _identity(self.tracker),
            "frame_size": list(self._size or ()),
            "pushed": self._pushed,
            "yielded": self._yielded,
            "next_id": self._next_id,
            "ids": self._ids.clone(),
            "waiting": [[frame, ids.clone(), points.clone()] for frame, ids, points in self._waiting],
            "head": self.tracker.head.pack_state(self._state),
            "features": self._features.state_dict(),
        }

    def load_state_dict(self, content: Mapping[str, Any]) -> None:
        """Go on where the stream behind ``content`` was saved; what this stream held is forgotten.

        The tracker must be of the same make; its device may be another. With the same weights, device and
        settings, results are bit for bit those of the stream that was saved.

        Raises:
            ValueError: content of another format or of another tracker (classes, sizes, memory), or damaged.
                This stream is then unchanged.
        """
        version = content.get("format_version")
        if version != STREAM_FORMAT:
            raise ValueError(f"stream state has format_version {version!r}, expected {STREAM_FORMAT}")
        expected = self.state_dict().keys()
        if content.keys() != expected:
            raise ValueError(f"stream state must hold {sorted(expected)}, got {sorted(content)}")
        saved = content["tracker"] if isinstance(content["tracker"], Mapping) else {}
        for key, value in _identity(self.tracker).items():
            if saved.get(key) != value:
                raise ValueError(
                    f"stream state of another tracker: its {key} is {saved.get(key)!r}, here {value!r}"
                )
        pushed, yielded, next_id = (_count(content, key) for key in ("pushed", "yielded", "next_id"))
        if yielded > pushed:
            raise ValueError(f"stream state yielded {yielded} frames of {pushed}")
        size = content["frame_size"]
        if not isinstance(size, list | tuple) or len(size) not in ((2,) if pushed else (0, 2)):
            raise ValueError(f"stream state's frame_size must be [H, W], got {size!r}")
        frame_size = (int(size[0]), int(size[1])) if size else None
        ids = _stored_ids(content["ids"], next_id)
        waiting = [_stored_waiting(entry, next_id) for entry in content["waiting"]]
        with _evaluating(self.tracker):
            state = self.tracker.head.unpack_state(content["head"], num_points=len(ids))
        features = self.tracker.backbone.stream()
        features.load_state_dict(content["features"])
        self._features, self._state = features, state
        self._size, self._scale = frame_size, None
        self._pushed, self._yielded, self._next_id = pushed, yielded, next_id
        self._ids, self._waiting = ids, waiting

    def _advance(self, features: Tensor) -> FrameTracks:
        assert self._size is not None
        head, device = self.tracker.head, self.tracker.device
        if self._scale is None:  # once: making a tensor on a device waits for it
            self._scale = _cells_per_pixel(features.shape[-2:], self._size, device)
        while self._waiting and self._waiting[0][0] <= self._yielded:
            _, ids, points = self._waiting.pop(0)
            xy = _upload(points, device)[None]
            time = torch.full_like(xy[..., :1], self._yielded)
            cells = _to_cells(torch.cat([time, xy], dim=2), self._scale)
            head.add(self._state, head.sample(features, cells[..., 1:]), cells)
            self._ids = torch.cat([self._ids, ids])
        output = head.step(self._state, features)
        result = FrameTracks(
            frame=self._yielded,
            ids=self._ids.clone(),
            xy=output.xy[0].float() / self._scale,
            visible=output.visible[0],
            visibility=output.visibility[0].float(),
        )
        self._yielded += 1
        return result


class _ClipFeatures:
    """Feature maps of a clip that is there already, in the order of the run.

    Where frames are encoded one by one, maps that are wanted again are kept, query frames first, while they fit
    into ``KEEP_BYTES``: no frame is encoded twice unless room runs out. Other backbones keep what they need.
    """

    KEEP_BYTES = 2**29

    def __init__(self, tracker: PointTracker, video: Tensor, *, flipped: bool = False) -> None:
        self._tracker = tracker
        self._video = video
        self._flipped = flipped
        self._frame_by_frame = tracker.backbone.context == 0
        self._maps: dict[int, Tensor] = {}  # by the frame of the video
        self.num_frames = video.shape[0]
        self.frame_size = video.shape[-2:]

    @cached_property
    def _clip(self) -> FrameSequence:
        frames = _PreparedFrames(self._tracker, self._video, self._flipped)
        return self._tracker.backbone.encode_clip(frames)

    def get(self, t: int, *, again: bool) -> Tensor:
        """(1, C, h, w) of frame ``t``; ``again``: it will be wanted once more."""
        if self._clip is None:
            self._clip = self._tracker.backbone.encode_clip(
                _PreparedFrames(self._tracker, self._video, self._flipped)
            )
        if not self._frame_by_frame:
            return self._clip[t]
        frame = self.num_frames - 1 - t if self._flipped else t
        features = self._maps.get(frame)
        if features is None:
            features = self._clip[t]
            if again and features.nbytes * (len(self._maps) + 1) <= self.KEEP_BYTES:
                self._maps[frame] = features
        elif not again:
            del self._maps[frame]
        return features

    def reversed(self) -> _ClipFeatures:
        """The clip backward in time; where frames are encoded one by one, with the maps kept so far."""
        backward = _ClipFeatures(self._tracker, self._video, flipped=not self._flipped)
        backward._maps = self._maps
        return backward


class _PreparedFrames:
    """Frames of a clip as the backbone takes them, (1, 3, H, W) each, made when they are read."""

    def __init__(self, tracker: PointTracker, video: Tensor, flipped: bool) -> None:
        self._tracker = tracker
        self._video = video
        self._flipped = flipped

    def __len__(self) -> int:
        return len(self._video)

    def __getitem__(self, index: int) -> Tensor:
        frame = self._video[len(self) - 1 - index if self._flipped else index]
        return self._tracker.prepare(_upload(frame, self._tracker.device)[None, None])[:, 0]

    def __iter__(self) -> Iterator[Tensor]:
        return (self[index] for index in range(len(self)))


def check_queries(queries: np.ndarray | Tensor, num_frames: int, height: int, width: int) -> Tensor:
    """(N, 3) float32 queries as (t, x, y), a copy; ValueError where they do not lie inside the video."""
    points = _as_tensor(queries)
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
    frames = _as_tensor(video)
    if frames.ndim != 4 or frames.shape[-1] != 3:
        raise ValueError(f"video must be (T, H, W, 3), got {tuple(frames.shape)}")
    if frames.dtype != torch.uint8:
        raise TypeError(f"video must be uint8 in [0, 255], got {frames.dtype}")
    if 0 in frames.shape:
        raise ValueError(f"video has no pixels: its shape is {tuple(frames.shape)}")
    return frames


def _as_tensor(values: Any) -> Tensor:
    """Shares memory where it can; arrays that run backward, such as a BGR image turned to RGB, are copied."""
    return values if isinstance(values, Tensor) else torch.as_tensor(np.ascontiguousarray(values))


def _upload(values: Tensor, device: torch.device) -> Tensor:
    """To the device, where CUDA lets it without waiting for what the device does."""
    return values.to(device, non_blocking=device.type == "cuda")


def _identity(tracker: PointTracker) -> dict[str, Any]:
    """What two trackers have in common when one can go on with a stream of the other."""
    layout = sorted((name, tuple(value.shape)) for name, value in tracker.state_dict().items())
    return {
        "backbone": type(tracker.backbone).__qualname__,
        "head": type(tracker.head).__qualname__,
        "dim": int(tracker.backbone.dim),
        "input_size": list(tracker.input_size or ()),
        "layout": zlib.crc32(repr(layout).encode()),  # names and shapes of all weights
    }


def _count(content: Mapping[str, Any], key: str) -> int:
    value = content[key]
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise ValueError(f"stream state's {key} must be a count, got {value!r}")
    return value


def _stored_ids(ids: Any, next_id: int) -> Tensor:
    if not isinstance(ids, Tensor) or ids.ndim != 1 or ids.dtype != torch.int64:
        raise ValueError(f"stream state's ids must be (n,) int64, got {getattr(ids, 'shape', ids)!r}")
    copy = ids.detach().to("cpu", copy=True)
    if len(copy.unique()) != len(copy) or not bool(((copy >= 0) & (copy < next_id)).all()):
        raise ValueError(f"stream state's ids must differ and lie below next_id {next_id}, got {copy.tolist()}")
    return copy


def _stored_waiting(entry: Any, next_id: int) -> tuple[int, Tensor, Tensor]:
    if not isinstance(entry, list | tuple) or len(entry) != 3 or not isinstance(entry[0], int):
        raise ValueError("stream state's waiting must hold [frame, ids, points] each")
    ids, points = _stored_ids(entry[1], next_id), entry[2]
    if not isinstance(points, Tensor) or points.shape != (len(ids), 2) or not points.is_floating_point():
        raise ValueError(f"stream state's waiting points must be ({len(ids)}, 2), got {points!r}")
    return entry[0], ids, points.detach().to("cpu", torch.float32, copy=True)


def _cells_per_pixel(grid: tuple[int, ...], size: tuple[int, ...], device: torch.device) -> Tensor:
    return torch.tensor([grid[1] / size[1], grid[0] / size[0]], dtype=torch.float32, device=device)


def _to_cells(queries: Tensor, scale: Tensor) -> Tensor:
    return torch.cat([queries[..., :1], queries[..., 1:] * scale], dim=-1).float()


@contextmanager
def _evaluating(module: nn.Module) -> Iterator[None]:
    """Evaluation mode for a while; every submodule's mode before comes back, also after an error."""
    training = [part for part in module.modules() if part.training] if module.training else []
    if training:
        module.eval()
    try:
        yield
    finally:
        for part in training:
            part.training = True
