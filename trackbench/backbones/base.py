"""What every backbone offers: frames in, feature maps out, for a clip at once or frame by frame."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor, nn


class FrameSequence(Protocol):
    """One tensor per frame of a clip, read in order or by index. It may be made only when it is read."""

    def __len__(self) -> int:
        """The number of frames."""

    def __getitem__(self, index: int, /) -> Tensor:
        """Raises IndexError."""

    def __iter__(self) -> Iterator[Tensor]:
        """All frames in order."""


class FeatureStream(Protocol):
    """Frame-by-frame encoding with the results of :meth:`Backbone.forward`."""

    def push(self, frame: Tensor) -> list[Tensor]:
        """Take the next frame (B, 3, H, W); return the feature maps (B, C, h, w) that became ready, in order."""

    def flush(self) -> Iterable[Tensor]:
        """The video has ended: return the feature maps that were still waiting for later frames."""

    def state_dict(self) -> dict[str, Any]:
        """What was kept of earlier frames: nested dicts and lists of tensors (copies) and ints."""

    def load_state_dict(self, content: Mapping[str, Any]) -> None:
        """Go on from ``content``, on the device of the backbone. Raises ValueError where it does not fit."""


class Backbone(nn.Module):
    """Video -> feature maps. It knows nothing of queries.

    Attributes:
        dim: channels C of the feature maps.
        stride: input pixels per feature cell (nominal; heads work in cells and never need it).
        context: frames on each side that a frame's features depend on; 0: frame by frame; None: the whole clip.
        lookahead: later frames that must have arrived before a frame's features are known; None: all of them.
    """

    dim: int
    stride: float
    context: int | None = 0
    lookahead: int | None = 0

    def forward(self, video: Tensor) -> Tensor:
        """Encode a clip.

        Args:
            video: (B, T, 3, H, W) float RGB in [0, 1]. Each backbone applies its own normalisation.

        Returns:
            (B, T, C, h, w).
        """
        raise NotImplementedError  # abstract

    def encode_clip(self, frames: FrameSequence) -> FrameSequence:
        """:meth:`forward` for clips whose frames or maps need not be in memory all at once.

        Args:
            frames: (B, 3, H, W) in [0, 1] each.

        Returns:
            Maps (B, C, h, w) of the frames. Where frames do not depend on each other, each is made whenever it
            is read.
        """
        if self.context == 0:
            return _FrameMaps(self, frames)
        return self(torch.stack(list(frames), dim=1)).unbind(dim=1)

    def stream(self) -> FeatureStream:
        """A new frame-by-frame encoder; equal to :meth:`forward` on the same frames."""
        return _FrameStream(self) if self.context == 0 else _ClipStream(self)


class _FrameMaps:
    """Maps of a backbone without temporal context, made when they are read."""

    def __init__(self, backbone: Backbone, frames: FrameSequence) -> None:
        self.backbone = backbone
        self.frames = frames

    def __len__(self) -> int:
        return len(self.frames)

    def __getitem__(self, index: int) -> Tensor:
        return self.backbone(self.frames[index][:, None])[:, 0]

    def __iter__(self) -> Iterator[Tensor]:
        return (self[index] for index in range(len(self)))


class _FrameStream:
    """Backbones without temporal context: a frame's features are ready at once."""

    def __init__(self, backbone: Backbone) -> None:
        self.backbone = backbone

    def push(self, frame: Tensor) -> list[Tensor]:
        return [self.backbone(frame[:, None])[:, 0]]

    def flush(self) -> list[Tensor]:
        return []

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, content: Mapping[str, Any]) -> None:
        if content:
            raise ValueError(f"a frame-by-frame backbone keeps nothing of earlier frames, got {sorted(content)}")


class _ClipStream:
    """Backbones whose features need the whole clip: frames wait until the end of the video."""

    def __init__(self, backbone: Backbone) -> None:
        self.backbone = backbone
        self.frames: list[Tensor] = []

    def push(self, frame: Tensor) -> list[Tensor]:
        self.frames.append(frame)
        return []

    def flush(self) -> Iterable[Tensor]:
        frames, self.frames = self.frames, []
        return self.backbone.encode_clip(frames) if frames else []

    def state_dict(self) -> dict[str, Any]:
        return {"frames": [frame.detach().clone() for frame in self.frames]}

    def load_state_dict(self, content: Mapping[str, Any]) -> None:
        frames = content.get("frames")
        if content.keys() != {"frames"} or not isinstance(frames, list):
            raise ValueError(f"feature state must hold the list 'frames', got {sorted(content)}")
        for frame in frames:
            if not isinstance(frame, Tensor) or frame.ndim != 4 or frame.shape != frames[0].shape:
                raise ValueError("feature state's frames must be tensors (B, 3, H, W) of one shape")
        device = next(self.backbone.parameters()).device
        self.frames = [frame.detach().to(device, copy=True) for frame in frames]
