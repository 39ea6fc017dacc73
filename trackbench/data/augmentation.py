"""Track-On's training augmentation (Aydemir et al., ICLR 2025), after CoTracker's, with exact tracks.

Each step takes a :class:`~trackbench.data.clip.Clip` and a generator, and gives a new clip: pixels, positions
and visibility change together. What is drawn is what the published loader draws, in its order. Where that
loader moves points otherwise than pixels, the points here follow the pixels; ``official_quirks`` of
:class:`TrackOnAugmentation` restores it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import cv2
import numpy as np
from numpy.typing import NDArray

from trackbench.data.clip import Clip, Size, hide_outside

Frame = NDArray[np.uint8]
Boxes = NDArray[np.int64]
Adjustment = Literal["brightness", "contrast", "saturation", "hue"]

ADJUSTMENTS: tuple[Adjustment, ...] = ("brightness", "contrast", "saturation", "hue")

BOXES = (1, 10)  # least and most boxes on a frame
BOX_SIDE = (2, 99)  # pixels
JITTER = 0.2  # of brightness, contrast and saturation
HUE = 0.25 / 3.14  # of a turn
BLUR_SIDE = 11  # pixels
BLUR_SIGMA = (0.1, 2.0)
LEAST_MARGIN = 10  # pixels that a scaled frame is larger than the crop
SCALE_LIMITS = (0.2, 2.0)
KEPT, ADDED = 0.8, 0.2  # of the last and of a new step, in both drifts


@dataclass(frozen=True)
class TrackOnAugmentation:
    """The published augmentation, in its order: what hides points, then colours, then geometry.

    1. :func:`erase`, 2. :func:`replace_boxes`, 3. :func:`jitter_colours` and 4. :func:`blur`, each for some
    clips, 5. :func:`pad`, 6. and 7. :func:`scale_and_crop`, 8. :func:`flip`; then points outside the crop
    become invisible.

    Attributes:
        size: (height, width) of the result.
        erased: probability that a frame after the first is erased in part.
        replaced: probability that a frame after the first is covered in part.
        jittered: probability that a clip's colours are changed.
        blurred: probability that a clip is blurred.
        max_pad: pixels, at most, that are added on a side.
        scale: least and most scale of the first frame.
        scale_step: most change of the scale from the first frame to the second.
        crop_step: most movement of the crop from the first frame to the second, pixels.
        flipped: probability of each flip.
        official_quirks: move points as the published loader does: by (new - 1) / (old - 1) under scaling,
            where the pixels move by new / old (off by up to 1 - new / old pixels); and count x = W and y = H
            as inside.
    """

    size: Size
    erased: float = 0.5
    replaced: float = 0.5
    jittered: float = 0.25
    blurred: float = 0.25
    max_pad: int = 24
    scale: tuple[float, float] = (0.75, 1.25)
    scale_step: float = 0.05
    crop_step: int = 15
    flipped: float = 0.5
    official_quirks: bool = False

    def __call__(self, clip: Clip, rng: np.random.Generator) -> Clip:
        """An augmented clip (T, height, width, 3), with all its tracks.

        The clip itself is not changed. Pixels are rounded to 8 bits after each step.
        """
        clip = erase(clip, rng, self.erased)
        clip = replace_boxes(clip, rng, self.replaced)
        if rng.random() < self.jittered:
            clip = replace(clip, frames=jitter_colours(clip.frames, rng))
        if rng.random() < self.blurred:
            clip = replace(clip, frames=blur(clip.frames, rng))
        clip = pad(clip, rng, self.max_pad)
        clip = scale_and_crop(
            clip, rng, self.size, self.scale, self.scale_step, self.crop_step, self.official_quirks
        )
        clip = flip(clip, rng, self.flipped)
        return hide_outside(clip, with_border=self.official_quirks)


def erase(clip: Clip, rng: np.random.Generator, probability: float = 0.5) -> Clip:
    """Boxes on frames after the first, filled with their mean colour; what is in them becomes invisible."""
    frames, visible = clip.frames.copy(), clip.visible.copy()
    for t in range(1, len(frames)):
        if rng.random() >= probability:
            continue
        boxes = random_boxes(rng, clip.size)
        for x0, y0, x1, y1 in boxes:
            box = frames[t, y0:y1, x0:x1]
            box[:] = box.mean(axis=(0, 1))
        visible[:, t] &= ~_in_any(clip.xy[:, t], boxes)
    return replace(clip, frames=frames, visible=visible)


def replace_boxes(clip: Clip, rng: np.random.Generator, probability: float = 0.5) -> Clip:
    """Boxes on frames after the first, filled from a random place of a random frame of the clip.

    Patches come from a copy whose colours were jittered twice. What is in the boxes becomes invisible.
    """
    (H, W), T = clip.size, len(clip.frames)
    covered = [t for t in range(1, T) if rng.random() < probability]
    if not covered:
        return clip
    source = jitter_colours(jitter_colours(clip.frames, rng), rng)
    frames, visible = clip.frames.copy(), clip.visible.copy()
    for t in covered:
        boxes = random_boxes(rng, clip.size)
        for x0, y0, x1, y1 in boxes:
            height, width = y1 - y0, x1 - x0
            y, x, from_frame = rng.integers(0, (H - height, W - width, T))
            frames[t, y0:y1, x0:x1] = source[from_frame, y : y + height, x : x + width]
        visible[:, t] &= ~_in_any(clip.xy[:, t], boxes)
    return replace(clip, frames=frames, visible=visible)


def random_boxes(rng: np.random.Generator, size: Size) -> Boxes:
    """1 to 10 boxes (k, 4), (x0, y0, x1, y1), upper ends excluded: around any pixel, 2 to 99 pixels a side.

    They are clipped to the frame, without its last row and column.
    """
    H, W = size
    count = rng.integers(*BOXES, endpoint=True)
    centre = rng.integers(0, (W, H), (count, 2))
    side = rng.integers(*BOX_SIDE, size=(count, 2), endpoint=True)
    ends = np.concatenate([centre - side / 2, centre + side / 2], axis=1)
    return np.clip(ends, 0, (W - 1, H - 1) * 2).round().astype(np.int64)


def jitter_colours(frames: Frame, rng: np.random.Generator) -> Frame:
    """Change brightness, contrast, saturation and hue of each frame (T, H, W, 3), in a random order."""
    return np.stack([_jittered(frame, rng) for frame in frames])


def blur(frames: Frame, rng: np.random.Generator) -> Frame:
    """Gaussian blur of 11 x 11 pixels, with another width for each frame (T, H, W, 3)."""
    sigmas = rng.uniform(*BLUR_SIGMA, len(frames))
    side = (BLUR_SIDE, BLUR_SIDE)
    return np.stack(
        [
            cv2.GaussianBlur(frame, side, sigma, borderType=cv2.BORDER_REFLECT_101)
            for frame, sigma in zip(frames, sigmas, strict=True)
        ]
    ).astype(np.uint8, copy=False)


def pad(clip: Clip, rng: np.random.Generator, max_pad: int = 24) -> Clip:
    """Add 0 to ``max_pad`` black rows or columns on each side, the same on all frames."""
    left, right, top, bottom = rng.integers(0, max_pad, 4, endpoint=True)
    frames = np.pad(clip.frames, ((0, 0), (top, bottom), (left, right), (0, 0)))
    return replace(clip, frames=frames, xy=clip.xy + np.array((left, top)))


def scale_and_crop(
    clip: Clip,
    rng: np.random.Generator,
    size: Size,
    scale: tuple[float, float] = (0.75, 1.25),
    scale_step: float = 0.05,
    crop_step: int = 15,
    official_quirks: bool = False,
) -> Clip:
    """Zoom and stretch the frames by a scale that drifts, and cut a crop out that drifts.

    Args:
        clip: of any size: frames are scaled to be larger than the crop.
        rng: of all draws.
        size: (height, width) of the crop.
        scale: see :func:`drifting_sizes`, as for the next one.
        scale_step: see there.
        crop_step: see :func:`drifting_corners`.
        official_quirks: scale points by (new - 1) / (old - 1).
    """
    T, (H, W) = len(clip.frames), clip.size
    quirk = int(official_quirks)
    sizes = drifting_sizes(rng, T, clip.size, size, scale, scale_step, official_quirks)
    xy = clip.xy * ((sizes[:, ::-1] - quirk) / np.subtract((W, H), quirk))
    in_sight = clip.visible[:, 0]
    # without a visible point the published loader starts at (width, height)
    middle = xy[in_sight, 0].mean(axis=0) if in_sight.any() else np.array(size[::-1], np.float64)
    corners = drifting_corners(rng, sizes, size, middle, crop_step)
    frames = np.empty((T, *size, 3), np.uint8)
    for t, ((h, w), (x, y)) in enumerate(zip(sizes.tolist(), corners.tolist(), strict=True)):
        scaled = cv2.resize(clip.frames[t], (w, h), interpolation=cv2.INTER_LINEAR)
        frames[t] = scaled[y : y + size[0], x : x + size[1]]
    return replace(clip, frames=frames, xy=xy - corners)


def drifting_sizes(
    rng: np.random.Generator,
    num_frames: int,
    size: Size,
    crop: Size,
    scale: tuple[float, float] = (0.75, 1.25),
    scale_step: float = 0.05,
    official_quirks: bool = False,
) -> NDArray[np.int64]:
    """The (height, width) that each frame is scaled to, (T, 2).

    From the second frame on each axis changes its scale by a step: uniform within ``scale_step`` at first,
    then 0.8 of the last step and 0.2 of a new one. The two axes are pulled halfway to their mean, and a frame
    is at least 10 pixels larger than the crop.
    """
    old = np.array(size, np.float64)
    quirk = int(official_quirks)
    now = np.full(2, rng.uniform(*scale))
    step = np.zeros(2)
    sizes = np.empty((num_frames, 2), np.int64)
    for t in range(num_frames):
        if t:
            new_step = rng.uniform(-scale_step, scale_step, 2)
            step = new_step if t == 1 else KEPT * step + ADDED * new_step
        now = now + step
        now = np.clip((now + now.mean()) / 2, *SCALE_LIMITS)
        sizes[t] = np.maximum((old * now).astype(np.int64), np.add(crop, LEAST_MARGIN))
        now = (sizes[t] - quirk) / (old - quirk)  # the next frame starts from the scale that was possible
    return sizes


def drifting_corners(
    rng: np.random.Generator,
    sizes: NDArray[np.int64],
    crop: Size,
    middle: NDArray[np.float64],
    crop_step: int = 15,
) -> NDArray[np.int64]:
    """The upper left corner (x, y) of each frame's crop, (T, 2), the first centred on ``middle`` (x, y).

    From the second frame on the corner moves by whole pixels: uniform in [-crop_step, crop_step) at first,
    then 0.8 of the last movement and 0.2 of a new one, rounded towards zero. It stays within the frames.
    """
    corner = np.trunc(middle - np.floor_divide(crop, 2)[::-1]).astype(np.int64)
    movement = np.zeros(2, np.int64)
    corners = np.empty((len(sizes), 2), np.int64)
    for t, largest in enumerate((sizes - crop - 1)[:, ::-1]):
        if t == 1 and crop_step:
            movement = rng.integers(-crop_step, crop_step, 2)
        elif t > 1:
            new = rng.integers(-crop_step, crop_step, 2, endpoint=True)
            movement = np.trunc(KEPT * movement + ADDED * new).astype(np.int64)
        corner = np.clip(corner + movement, 0, largest)
        corners[t] = corner
    return corners


def flip(clip: Clip, rng: np.random.Generator, probability: float = 0.5) -> Clip:
    """Mirror all frames left to right, and upside down, each with ``probability``."""
    H, W = clip.size
    frames, xy = clip.frames, clip.xy.copy()
    if rng.random() < probability:
        frames, xy[..., 0] = frames[:, :, ::-1], W - xy[..., 0]
    if rng.random() < probability:
        frames, xy[..., 1] = frames[:, ::-1], H - xy[..., 1]
    return replace(clip, frames=frames, xy=xy)


def adjust(frame: Frame, what: Adjustment, amount: float) -> Frame:
    """One change of colour of a frame (H, W, 3), as Pillow's ``ImageEnhance`` makes it.

    ``brightness``, ``contrast`` and ``saturation`` blend with black, the frame's mean grey, and each pixel's
    grey: ``amount`` 1 changes nothing, 0 leaves only those. ``hue`` turns the hue by ``amount`` of a circle.
    """
    if what == "hue":
        hsv = cv2.cvtColor(frame, cv2.COLOR_RGB2HSV_FULL)
        hsv[..., 0] += np.uint8(int(amount * 255) % 256)  # hue wraps around as 8 bits do
        return cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB_FULL).astype(np.uint8, copy=False)
    if what == "saturation":
        grey_frame = cv2.cvtColor(cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY), cv2.COLOR_GRAY2RGB)
        return cv2.addWeighted(frame, amount, grey_frame, 1 - amount, 0).astype(np.uint8, copy=False)
    grey = 0 if what == "brightness" else int(cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY).mean() + 0.5)
    table = np.clip(amount * np.arange(256) + (1 - amount) * grey, 0, 255).round().astype(np.uint8)
    return cv2.LUT(frame, table).astype(np.uint8, copy=False)


def _jittered(frame: Frame, rng: np.random.Generator) -> Frame:
    amounts = [*rng.uniform(1 - JITTER, 1 + JITTER, 3), rng.uniform(-HUE, HUE)]
    for step in rng.permutation(len(ADJUSTMENTS)):
        frame = adjust(frame, ADJUSTMENTS[step], amounts[step])
    return frame


def _in_any(xy: NDArray[np.float64], boxes: Boxes) -> NDArray[np.bool_]:
    """Which points (N, 2) lie in one of the boxes (k, 4); pixel i covers [i, i + 1)."""
    x, y = xy[:, :1], xy[:, 1:]
    x0, y0, x1, y1 = boxes.T
    inside: NDArray[np.bool_] = (x >= x0) & (x < x1) & (y >= y0) & (y < y1)
    return np.logical_or.reduce(inside, axis=1)
