"""Videos without files and trackers without weights."""

from __future__ import annotations

import torch
from torch import Tensor

from trackbench.structures import FrameTracks, Tracks, VideoBatch


def moving_points(
    name: str, *, seed: int = 0, frames: int = 8, points: int = 5, height: int = 64, width: int = 96
) -> VideoBatch:
    """A noise video with points that move straight and hide at times, queried when first seen."""
    generator = torch.Generator().manual_seed(seed)
    size = torch.tensor([width, height])
    start = (0.2 + 0.6 * torch.rand(points, 1, 2, generator=generator)) * size
    velocity = 0.02 * (torch.rand(points, 1, 2, generator=generator) - 0.5) * size
    xy = start + velocity * torch.arange(frames)[:, None]
    visible = torch.rand(points, frames, generator=generator) > 0.3
    visible[:, seed % 3] = True
    first = visible.int().argmax(dim=1)
    at_query = xy[torch.arange(points), first]
    video = torch.randint(256, (1, frames, 3, height, width), dtype=torch.uint8, generator=generator)
    return VideoBatch(
        video=video,
        queries=torch.cat([first[:, None].float(), at_query], dim=1)[None],
        xy=xy[None],
        visible=visible[None],
        names=[name],
    )


class Videos:
    """A benchmark in memory that counts what is read from it."""

    def __init__(self, batches: list[VideoBatch]) -> None:
        self.batches = batches
        self.names = [batch.names[0] for batch in batches]
        self.read: list[str] = []

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, index: int) -> VideoBatch:
        self.read.append(self.names[index])
        return self.batches[index]


class Oracle:
    """Knows the ground truth of the videos it is given; remembers how it was asked."""

    def __init__(self, batches: list[VideoBatch], *, causal: bool = False) -> None:
        self.causal = causal
        self.batches = batches
        self.directions: list[bool] = []

    def track(self, video: Tensor, queries: Tensor, *, both_directions: bool = False) -> Tracks:
        self.directions.append(both_directions)
        for batch in self.batches:
            if torch.equal(batch.video[0].permute(0, 2, 3, 1), video):
                visible = batch.visible[0]
                return Tracks(batch.xy[0], visible, visible.float(), queries)
        raise LookupError("a video that the oracle never saw")


class Constant:
    """Points stay; each frame of a stream waits for ``lag`` later ones (None: for the end of the video)."""

    causal = False

    def __init__(self, lag: int | None = 0) -> None:
        self.lag = lag

    def track(self, video: Tensor, queries: Tensor, *, both_directions: bool = False) -> Tracks:
        shape = (len(queries), len(video))
        xy = queries[:, None, 1:].expand(*shape, 2)
        return Tracks(xy, torch.ones(shape, dtype=torch.bool), torch.ones(shape), queries)

    def stream(self) -> ConstantStream:
        return ConstantStream(self.lag)


class ConstantStream:
    def __init__(self, lag: int | None) -> None:
        self.lag = lag
        self.xy = torch.empty(0, 2)
        self.pushed = 0

    def add(self, points_xy: Tensor) -> Tensor:
        first = len(self.xy)
        self.xy = torch.cat([self.xy, points_xy])
        return torch.arange(first, len(self.xy))

    def step(self, frame: Tensor) -> FrameTracks | None:
        self.pushed += 1
        if self.lag is None or self.pushed <= self.lag:
            return None
        return self._points(self.pushed - 1 - self.lag)

    def finish(self) -> list[FrameTracks]:
        waiting = self.pushed if self.lag is None else min(self.lag, self.pushed)
        return [self._points(t) for t in range(self.pushed - waiting, self.pushed)]

    def _points(self, frame: int) -> FrameTracks:
        n = len(self.xy)
        return FrameTracks(frame, torch.arange(n), self.xy, torch.ones(n, dtype=torch.bool), torch.ones(n))
