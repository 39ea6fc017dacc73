"""Chrono's training augmentation: colours of a whole clip, as in TAPIR (Doersch et al., ICCV 2023)."""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray

_GREY = np.array([0.2989, 0.587, 0.114], np.float32)  # TensorFlow's weights of R, G and B
_POSITIVE = 2.0  # added before and taken away after: HSV wants no negative colours, and its hue does not mind
_TINY = np.float32(1e-12)


@dataclass(frozen=True)
class ColourAugmentation:
    """Changes the colours of all frames alike, or takes them away; no track moves.

    With probability ``changed``: brightness, saturation, contrast and hue, in this order, then a cut to what can
    be shown. Then, with probability ``dropped``, grey. Each clip has its own draw; the published code draws once
    for a batch over all ranks, which for one clip is the same distribution.

    Attributes:
        changed: probability.
        dropped: probability.
        brightness: most that is added or taken away, of 1.
        saturation: least and most factor of HSV's saturation.
        contrast: least and most factor of the difference to a frame's mean.
        hue: most turn, of a circle.
    """

    changed: float = 0.8
    dropped: float = 0.2
    brightness: float = 32 / 255
    saturation: tuple[float, float] = (0.6, 1.4)
    contrast: tuple[float, float] = (0.6, 1.4)
    hue: float = 0.2

    def __call__(self, frames: NDArray[np.uint8], rng: np.random.Generator) -> NDArray[np.uint8]:
        """New frames (T, H, W, 3); the same ones where nothing is drawn. Rounded to 8 bits at the end."""
        amounts = (
            rng.uniform(-self.brightness, self.brightness),
            rng.uniform(*self.saturation),
            rng.uniform(*self.contrast),
            rng.uniform(-self.hue, self.hue),
        )
        changed, dropped = rng.random(2) < (self.changed, self.dropped)
        if not changed and not dropped:
            return frames
        result = np.empty_like(frames)
        for frame, new in zip(frames, result, strict=True):  # one by one: they stay in the cache
            colours = frame.astype(np.float32) / np.float32(255)
            if changed:
                colours = change_colours(colours, *amounts).clip(0, 1)
            if dropped:
                colours = np.broadcast_to((colours @ _GREY)[..., None], colours.shape)
            new[:] = np.rint(colours * np.float32(255))
        return result


def change_colours(
    frame: NDArray[np.float32], brightness: float, saturation: float, contrast: float, hue: float
) -> NDArray[np.float32]:
    """A frame (H, W, 3) of values in [0, 1], changed as by TensorFlow's ``tf.image``, not cut to [0, 1].

    Args:
        frame: RGB.
        brightness: is added.
        saturation: factor of HSV's saturation, which stays at most 1.
        contrast: factor of each channel's difference to its mean.
        hue: turn, of a circle.
    """
    planes = [plane + np.float32(brightness) for plane in cv2.split(frame)]
    value = np.maximum(np.maximum(planes[0], planes[1]), planes[2])
    span = value - np.minimum(np.minimum(planes[0], planes[1]), planes[2])
    factor = np.minimum(span * np.float32(saturation), np.maximum(value, 0)) / np.maximum(span, _TINY)
    for plane in planes:
        plane[:] = value - (value - plane) * factor
        mean = plane.mean(dtype=np.float64)
        plane *= np.float32(contrast)
        plane += np.float32(mean * (1 - contrast) + _POSITIVE)
    hsv = cv2.cvtColor(cv2.merge(planes), cv2.COLOR_RGB2HSV)
    turned = hsv[..., 0] + np.float32(hue % 1 * 360)
    hsv[..., 0] = np.where(turned >= 360, turned - 360, turned)
    return np.asarray(cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB)) - np.float32(_POSITIVE)
