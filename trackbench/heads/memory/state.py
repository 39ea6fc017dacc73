"""What Track-On carries from frame to frame: plain tensors of a fixed size per point."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass
class MemoryState:
    """The state of a stream with N points, the support points first.

    Memories are first in, first out: the newest slot is last.

    Attributes:
        query: (B, N, D), features of the points at their query frames.
        start: (B, N) int64, the frame from which a point counts as started.
        context: (B, N, slots, D), context memory: what the query decoder reads.
        spatial: (B, N, slots, D), spatial memory: what the query updater reads.
        hidden: (B, N, slots of the larger memory) bool, slots from before the point's start.
        occluded: same shape, bool, slots of frames where the point was predicted to be occluded.
        frame: index of the next frame.
        num_support: support points among the N.
        position: (1, h * w, D), the position embedding of the maps; made at the first frame.
    """

    query: Tensor
    start: Tensor
    context: Tensor
    spatial: Tensor
    hidden: Tensor
    occluded: Tensor
    frame: int = 0
    num_support: int = 0
    position: Tensor | None = field(default=None, metadata={"cache": True})

    @staticmethod
    def empty(batch_size: int, dim: int, context_slots: int, spatial_slots: int, like: Tensor) -> MemoryState:
        """A state without points, on the device and with the dtype of ``like``."""
        slots = max(context_slots, spatial_slots)
        no_slots = torch.ones(batch_size, 0, slots, dtype=torch.bool, device=like.device)
        return MemoryState(
            query=like.new_zeros(batch_size, 0, dim),
            start=torch.zeros(batch_size, 0, dtype=torch.int64, device=like.device),
            context=like.new_zeros(batch_size, 0, context_slots, dim),
            spatial=like.new_zeros(batch_size, 0, spatial_slots, dim),
            hidden=no_slots,
            occluded=no_slots,
        )

    @property
    def waiting(self) -> Tensor:
        """(B, N) bool: points whose query frame still lies in the future."""
        return self.start > self.frame

    def recent_context(self, *, whole: bool) -> tuple[Tensor, Tensor]:
        """What the query decoder reads.

        Args:
            whole: all slots, so that shapes stay the same from frame to frame; else only those that a frame of
                this stream has written.

        Returns:
            Slots (B, N, n, D), newest last, and (B, N, n) bool, those from before the point's start.
        """
        n = self._num_recent(self.context, whole)
        return self.context[:, :, self.context.shape[2] - n :], self.hidden[:, :, self.hidden.shape[2] - n :]

    def recent_spatial(self, *, whole: bool) -> tuple[Tensor, Tensor]:
        """What the query updater reads: as above, but slots where the point was occluded count as hidden too."""
        n = self._num_recent(self.spatial, whole)
        ignored = self.hidden | self.occluded
        return self.spatial[:, :, self.spatial.shape[2] - n :], ignored[:, :, ignored.shape[2] - n :]

    def _num_recent(self, memory: Tensor, whole: bool) -> int:
        return memory.shape[2] if whole else min(self.frame, memory.shape[2])

    def add(self, query: Tensor, start: Tensor, *, support: bool = False) -> None:
        """Append points with empty memories, or put support points in front."""
        B, n, _ = query.shape
        new = MemoryState(
            query=query,
            start=start,
            context=self.context.new_zeros(B, n, *self.context.shape[2:]),
            spatial=self.spatial.new_zeros(B, n, *self.spatial.shape[2:]),
            hidden=self.hidden.new_ones(B, n, self.hidden.shape[2]),
            occluded=self.occluded.new_ones(B, n, self.occluded.shape[2]),
        )
        first, second = (new, self) if support else (self, new)
        for name in _PER_POINT:
            setattr(self, name, torch.cat([getattr(first, name), getattr(second, name)], dim=1))
        self.num_support += n if support else 0

    def drop(self, keep: Tensor) -> None:
        """Keep the support points and, of the others, those where ``keep`` (N,) is True."""
        support = keep.new_ones(self.num_support)
        kept = torch.cat([support, keep]).nonzero()[:, 0]
        for name in _PER_POINT:
            setattr(self, name, getattr(self, name).index_select(1, kept))

    def remember(self, context: Tensor, spatial: Tensor, occluded: Tensor) -> None:
        """Write the current frame's slots, (B, N, D), (B, N, D) and (B, N), and go on to the next frame."""
        self.context = _push(self.context, context)
        self.spatial = _push(self.spatial, spatial)
        self.hidden = _push(self.hidden, self.waiting)
        self.occluded = _push(self.occluded, occluded)
        self.frame += 1


_PER_POINT = ("query", "start", "context", "spatial", "hidden", "occluded")


def _push(slots: Tensor, new: Tensor) -> Tensor:
    return torch.cat([slots[:, :, 1:], new[:, :, None].to(slots.dtype)], dim=2)
