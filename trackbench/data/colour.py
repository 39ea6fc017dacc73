"""Chrono's training augmentation: colours of a whole clip, as in TAPIR (Doersch et al., ICCV 2023)."""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray

_TO_GREY = np.tile(np.array([0.2989, 0.587, 0.114], np.float32), (3, 1))  # TensorFlow's weights of R, G and B
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
            colours = np.divide(frame, np.float32(255))
            if changed:
                colours = change_colours(colours, *amounts)
            if dropped:
                colours = np.asarray(cv2.transform(colours.clip(0, 1), _TO_GREY), np.float32)
            cv2.addWeighted(colours, 255, colours, 0, 0, dst=new, dtype=cv2.CV_8U)  # rounds, and cuts to 0 and 255
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
    planes = [np.asarray(plane, np.float32) for plane in cv2.split(frame)]
    value = np.maximum(np.maximum(planes[0], planes[1]), planes[2])
    span = value - np.minimum(np.minimum(planes[0], planes[1]), planes[2])
    for plane in planes:
        np.subtract(value, plane, out=plane)  # brightness does not change it
    value += np.float32(brightness)
    factor = np.minimum(span * np.float32(saturation), np.maximum(value, 0))
    factor /= np.maximum(span, _TINY)
    for plane in planes:
        plane *= factor
        np.subtract(value, plane, out=plane)
        mean = cv2.mean(plane)[0]
        plane *= np.float32(contrast)
        plane += np.float32(mean * (1 - contrast) + _POSITIVE)
    hsv = np.asarray(cv2.cvtColor(cv2.merge(planes), cv2.COLOR_RGB2HSV), np.float32)
    hsv[..., 0] += np.float32(hue % 1 * 360)  # below two circles, which OpenCV takes as one
    return np.asarray(cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB), np.float32) - np.float32(_POSITIVE)
