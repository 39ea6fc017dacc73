"""Augmented pixels and augmented tracks must still belong together; what is drawn is as published.

Two kinds of frames tell where a pixel came from: colours that encode the position, and a bright dot.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from folder_fakes import dot_frames, wander
from PIL import Image, ImageEnhance

from trackbench.data import augmentation as aug
from trackbench.data.augmentation import TrackOnAugmentation
from trackbench.data.clip import Clip, hide_outside

SIZE = (64, 80)
CROP = (40, 48)
STILL: dict[str, Any] = {
    "erased": 0,
    "replaced": 0,
    "jittered": 0,
    "blurred": 0,
    "max_pad": 0,
    "scale": (1.0, 1.0),
    "scale_step": 0,
    "crop_step": 0,
    "flipped": 0,
}
GEOMETRY = {key: STILL[key] for key in ("erased", "replaced", "jittered", "blurred")}


def encoded_clip(num_frames: int = 5, size: tuple[int, int] = SIZE) -> Clip:
    """Red is 3 x, green is 3 y of the pixel's centre, blue 255 (padding has none); tracks wander."""
    y, x = np.meshgrid(np.arange(size[0]) + 0.5, np.arange(size[1]) + 0.5, indexing="ij")
    frame = np.stack([3 * x, 3 * y, np.full_like(x, 255)], axis=-1).round().astype(np.uint8)
    xy = wander(np.random.default_rng(0), 60, num_frames, size)
    inside = ((xy >= 0) & (xy < size[::-1])).all(axis=2)
    return Clip(np.repeat(frame[None], num_frames, axis=0), xy, inside, "encoded")


def dot_clip(seed: int, num_frames: int = 5, dim: int = 0) -> Clip:
    xy = wander(np.random.default_rng(seed), 1, num_frames, SIZE)
    inside = ((xy >= 0) & (xy < SIZE[::-1])).all(axis=2)
    return Clip(dot_frames(xy[0], SIZE, dim=dim, seed=seed), xy, inside, "dot")


def bilinear(frame: np.ndarray, xy: np.ndarray) -> np.ndarray:
    """Colours (n, 3) at raster positions (n, 2), at least one pixel inside."""
    u, v = (xy - 0.5).T
    x, y = np.floor(u).astype(int), np.floor(v).astype(int)
    a, b = (u - x)[:, None], (v - y)[:, None]
    f = frame.astype(np.float64)
    upper = (1 - a) * f[y, x] + a * f[y, x + 1]
    return (1 - b) * upper + b * ((1 - a) * f[y + 1, x] + a * f[y + 1, x + 1])


def position_errors(before: Clip, after: Clip, margin: float = 2.0) -> np.ndarray:
    """Where the pixels under visible points came from, less where those points were; in pixels of ``before``."""
    H, W = after.size
    errors = []
    for t in range(len(after.frames)):
        at, was = after.xy[:, t], before.xy[:, t]
        inner = (at > margin).all(axis=1) & (at < np.subtract((W, H), margin)).all(axis=1)
        inner &= (was > margin).all(axis=1) & (was < np.subtract(before.size[::-1], margin)).all(axis=1)
        assert after.visible[inner & before.visible[:, t], t].all()
        if inner.any():
            errors.append(bilinear(after.frames[t], at[inner])[:, :2] / 3 - was[inner])
    return np.abs(np.concatenate(errors))


ONE_BY_ONE = {
    "crop": {},
    "pad": {"max_pad": 24},
    "scale": {"scale": (0.75, 1.25), "scale_step": 0.05},
    "crop drift": {"crop_step": 15},
    "flips": {"flipped": 0.5},
}


@pytest.mark.parametrize("name", list(ONE_BY_ONE))
def test_each_change_of_geometry_moves_points_with_their_pixels(name: str) -> None:
    clip = encoded_clip()
    augment = TrackOnAugmentation(CROP, **{**STILL, **ONE_BY_ONE[name]})
    errors = np.concatenate([position_errors(clip, augment(clip, np.random.default_rng(i))) for i in range(20)])
    assert len(errors) > 1000
    assert errors.max() < 0.4  # 8 bits and 3 levels a pixel


def test_all_of_geometry_together_is_exact_and_the_quirk_is_not() -> None:
    clip = encoded_clip(num_frames=12)
    exact = TrackOnAugmentation(CROP, **GEOMETRY)
    quirk = replace(exact, official_quirks=True)
    seeds = range(60)
    errors = np.concatenate([position_errors(clip, exact(clip, np.random.default_rng(i))) for i in seeds])
    assert len(errors) > 5000
    assert errors.max() < 0.4
    off = np.concatenate([position_errors(clip, quirk(clip, np.random.default_rng(i))) for i in seeds])
    assert off.mean() > errors.mean() + 0.02
    assert off.max() < 1.2


def test_a_dot_is_where_its_track_says_under_colours_blur_and_geometry() -> None:
    augment = TrackOnAugmentation(CROP, erased=0, replaced=0, jittered=1, blurred=1)
    distances = []
    for seed in range(150):
        clip = dot_clip(seed)
        after = augment(clip, np.random.default_rng(seed))
        for t, frame in enumerate(after.frames):
            at, was = after.xy[0, t], clip.xy[0, t]
            whole = (was > 6).all() and (was < np.subtract(SIZE[::-1], 6)).all()  # an edge cuts the dot's centroid
            if not (whole and (at > 8).all() and (at < np.subtract(CROP[::-1], 8)).all()):
                continue
            assert after.visible[0, t]
            weight = frame.sum(axis=-1).astype(np.float64)
            y, x = np.arange(CROP[0])[:, None] + 0.5, np.arange(CROP[1]) + 0.5
            near = weight * ((x - at[0]) ** 2 + (y - at[1]) ** 2 < 8**2)
            found = np.array([(near * x).sum(), (near * y).sum()]) / near.sum()
            distances.append(np.linalg.norm(found - at))
    assert len(distances) > 200
    assert max(distances) < 0.3


@pytest.mark.parametrize("quirks", [False, True])
def test_a_visible_dot_is_seen_under_everything_together(quirks: bool) -> None:
    """Boxes only take away what they mark as hidden: the pixel of a visible point still shows the dot."""
    augment = TrackOnAugmentation(CROP, official_quirks=quirks)
    seen, hidden = [], 0
    for seed in range(250):
        clip = dot_clip(seed, dim=30)
        after = augment(clip, np.random.default_rng(seed))
        x, y = np.clip(np.floor(after.xy[0]).astype(int), 0, np.subtract(CROP[::-1], 1)).T
        inside = ((after.xy[0] > 1) & (after.xy[0] < np.subtract(CROP[::-1], 1))).all(axis=1)
        light = after.frames[np.arange(5), y, x].max(axis=-1)
        seen.extend(light[after.visible[0] & inside].tolist())
        hidden += int((~after.visible[0] & clip.visible[0] & inside).sum())
    assert len(seen) > 150
    assert hidden > 100
    # a box that cuts the dot beside its centre, or blur, may dim it; background is below 40
    assert np.mean(np.array(seen) > 120) > 0.97


@pytest.mark.parametrize("cover", [aug.erase, aug.replace_boxes])
def test_boxes_hide_exactly_the_points_in_them(cover: Any) -> None:
    """Every pixel carries a point: those whose pixel changed are hidden, the others are not."""
    H, W, T = 50, 60, 40
    frames = np.random.default_rng(0).integers(0, 256, (T, H, W, 3)).astype(np.uint8)
    y, x = (grid.ravel() for grid in np.mgrid[:H, :W])
    inside = np.stack([x, y], axis=1) + np.random.default_rng(1).uniform(0, 0.999, (H * W, 2))
    clip = Clip(frames, np.repeat(inside[:, None], T, axis=1), np.ones((H * W, T), bool))
    before = frames.copy()
    after = cover(clip, np.random.default_rng(2), 1.0)
    np.testing.assert_array_equal(frames, before)
    changed = (after.frames != frames).any(axis=-1)[:, y, x].T
    assert not (changed & after.visible).any()
    assert (~changed & ~after.visible).sum() < 0.002 * changed.sum()  # a patch may hold the same colour
    assert after.visible[:, 0].all()
    assert 0.1 < changed[:, 1:].mean() < 0.9


def test_an_erased_box_has_its_mean_colour() -> None:
    clip = encoded_clip(num_frames=2)
    for seed in range(40):
        rng = np.random.default_rng(seed)
        after = aug.erase(clip, rng, 1.0)
        twin = np.random.default_rng(seed)
        twin.random()
        boxes = aug.random_boxes(twin, SIZE)
        if len(boxes) == 1:
            x0, y0, x1, y1 = boxes[0]
            colours = after.frames[1, y0:y1, x0:x1].reshape(-1, 3)
            expected = clip.frames[1, y0:y1, x0:x1].reshape(-1, 3).mean(axis=0)
            np.testing.assert_array_equal(colours, np.broadcast_to(np.floor(expected), colours.shape))
            return
    pytest.fail("no seed with one box")


def test_share_of_frames_and_clips_that_each_step_changes() -> None:
    """Probabilities: 0.5 per frame after the first for boxes; 0.25 per clip for colours, and for blur."""
    rng = np.random.default_rng(0)
    frames = rng.integers(0, 256, (41, 24, 24, 3)).astype(np.uint8)
    clip = Clip(frames, np.zeros((0, 41, 2)), np.zeros((0, 41), bool))
    for cover in (aug.erase, aug.replace_boxes):
        changed = np.mean([(cover(clip, rng).frames != frames).any(axis=(1, 2, 3)) for _ in range(25)], axis=0)
        assert changed[0] == 0
        assert abs(changed[1:].mean() - 0.5) < 0.05  # 1000 frames: 0.016
    short = Clip(frames[:2], np.zeros((0, 2, 2)), np.zeros((0, 2), bool))
    defaults = TrackOnAugmentation((14, 14))
    for key, expected in (("jittered", 0.25), ("blurred", 0.25)):
        augment = TrackOnAugmentation((14, 14), **{**STILL, key: getattr(defaults, key)})
        plain = TrackOnAugmentation((14, 14), **STILL)(short, rng).frames
        shares = [bool((augment(short, rng).frames != plain).any(axis=(1, 2, 3)).all()) for _ in range(800)]
        assert abs(np.mean(shares) - expected) < 0.05  # 800 clips: 0.015
    encoded = encoded_clip(2, (24, 24))
    flips = []
    for _ in range(400):
        flipped = aug.flip(encoded, rng).frames[0].astype(int)
        flips.append((flipped[0, 0, 0] > flipped[0, -1, 0], flipped[0, 0, 1] > flipped[-1, 0, 1]))
    both = np.mean(flips, axis=0)
    assert np.abs(both - 0.5).max() < 0.09
    assert abs(np.corrcoef(np.array(flips).T)[0, 1]) < 0.2


def test_boxes_are_drawn_as_published() -> None:
    rng = np.random.default_rng(0)
    draws = [aug.random_boxes(rng, (400, 500)) for _ in range(3000)]
    counts = np.bincount([len(boxes) for boxes in draws], minlength=11)
    assert counts[0] == 0
    assert len(counts) == 11
    assert np.abs(counts[1:] / 3000 - 0.1).max() < 0.025
    boxes = np.concatenate(draws)
    assert boxes.min() == 0
    assert boxes[:, 2].max() == 499
    assert boxes[:, 3].max() == 399
    inner = boxes[(boxes[:, 0] > 0) & (boxes[:, 2] < 499)]
    width = inner[:, 2] - inner[:, 0]
    assert width.min() == 2
    assert width.max() in (98, 99, 100)  # rounding half to even makes odd sides even
    assert abs(width.mean() - 50) < 2
    centre = boxes[:, [0, 2]].mean(axis=1)
    assert np.abs(np.histogram(centre, 5, (0, 500))[0] / len(boxes) - 0.2).max() < 0.02


def test_padding_is_drawn_as_published() -> None:
    rng = np.random.default_rng(0)
    clip = Clip(np.full((2, 6, 7, 3), 9, np.uint8), np.ones((1, 2, 2)), np.ones((1, 2), bool))
    sides = []
    for _ in range(1500):
        after = aug.pad(clip, rng)
        left, top = (after.xy[0, 0] - 1).astype(int)
        height, width = after.size
        assert (after.frames[:, top : top + 6, left : left + 7] == 9).all()
        assert after.frames.astype(int).sum() == clip.frames.astype(int).sum()
        sides.append((left, top, width - 7 - left, height - 6 - top))
    for side in np.array(sides).T:
        assert (side.min(), side.max()) == (0, 24)
        assert abs(side.mean() - 12) < 0.8


class Recorder:
    """A generator that keeps every number it has drawn."""

    def __init__(self, seed: int) -> None:
        self.rng = np.random.default_rng(seed)
        self.drawn: list[float] = []

    def uniform(self, *arguments: Any) -> Any:
        return self.keep(self.rng.uniform(*arguments))

    def integers(self, *arguments: Any, **options: Any) -> Any:
        return self.keep(self.rng.integers(*arguments, **options))

    def keep(self, values: Any) -> Any:
        self.drawn.extend(np.atleast_1d(values).tolist())
        return values


@pytest.mark.parametrize("quirks", [0, 1])
@pytest.mark.parametrize("seed", range(5))
def test_the_scale_drifts_as_described_step_by_step(quirks: int, seed: int) -> None:
    recorder: Any = Recorder(seed)
    T, (H, W), crop = 24, (530, 520), (384, 512)
    sizes = aug.drifting_sizes(recorder, T, (H, W), crop, official_quirks=bool(quirks))
    drawn = iter(recorder.drawn)
    scale_y = scale_x = next(drawn)
    assert 0.75 <= scale_x <= 1.25
    step_y = step_x = 0.0
    for t in range(T):
        if t == 1:
            step_y, step_x = next(drawn), next(drawn)
        elif t > 1:
            step_y = 0.8 * step_y + 0.2 * next(drawn)
            step_x = 0.8 * step_x + 0.2 * next(drawn)
        assert max(abs(step_x), abs(step_y)) <= 0.05
        scale_y, scale_x = scale_y + step_y, scale_x + step_x
        mean = (scale_y + scale_x) / 2
        scale_y, scale_x = (scale_y + mean) / 2, (scale_x + mean) / 2
        scale_y, scale_x = min(max(scale_y, 0.2), 2.0), min(max(scale_x, 0.2), 2.0)
        h, w = max(int(H * scale_y), crop[0] + 10), max(int(W * scale_x), crop[1] + 10)
        assert (sizes[t] == (h, w)).all()
        scale_y, scale_x = (h - quirks) / (H - quirks), (w - quirks) / (W - quirks)
    assert next(drawn, None) is None


@pytest.mark.parametrize("seed", range(5))
def test_the_crop_drifts_as_described_step_by_step(seed: int) -> None:
    recorder: Any = Recorder(seed)
    crop, sizes = (384, 512), np.array([[430 + 3 * t, 560 - t] for t in range(24)])
    corners = aug.drifting_corners(recorder, sizes, crop, np.array([300.7, 201.2]))
    drawn = iter(recorder.drawn)
    x, y = int(300.7 - 256), int(201.2 - 192)
    dx = dy = 0
    for t, (h, w) in enumerate(sizes):
        if t == 1:
            dx, dy = int(next(drawn)), int(next(drawn))
            assert -15 <= min(dx, dy) <= max(dx, dy) <= 14
        elif t > 1:
            new_x, new_y = next(drawn), next(drawn)
            assert max(abs(new_x), abs(new_y)) <= 15
            dx, dy = int(0.8 * dx + 0.2 * new_x), int(0.8 * dy + 0.2 * new_y)
        x = min(max(0, x + dx), w - 512 - 1)
        y = min(max(0, y + dy), h - 384 - 1)
        assert corners[t].tolist() == [x, y]
    assert next(drawn, None) is None


def test_the_crop_starts_at_the_points_that_are_visible_first() -> None:
    frames = np.zeros((1, 200, 200, 3), np.uint8)
    xy = np.array([[[60.0, 120.0]], [[80.0, 140.0]], [[5.0, 5.0]]])
    clip = Clip(frames, xy, np.array([[True], [True], [False]]))
    still = {"scale": (1.0, 1.0), "scale_step": 0.0, "crop_step": 0}
    after = aug.scale_and_crop(clip, np.random.default_rng(0), (40, 60), **still)
    np.testing.assert_array_equal(after.xy - clip.xy, np.broadcast_to((-40.0, -110.0), (3, 1, 2)))
    nothing = replace(clip, visible=np.zeros((3, 1), bool))
    after = aug.scale_and_crop(nothing, np.random.default_rng(0), (40, 60), **still)
    np.testing.assert_array_equal(after.xy - clip.xy, np.broadcast_to((-30.0, -20.0), (3, 1, 2)))


@pytest.mark.parametrize("amount", [0.8, 0.93, 1.0, 1.2])
@pytest.mark.parametrize(
    ("what", "enhance"),
    [
        ("brightness", ImageEnhance.Brightness),
        ("contrast", ImageEnhance.Contrast),
        ("saturation", ImageEnhance.Color),
    ],
)
def test_colours_change_as_in_pillow(what: Any, enhance: Any, amount: float) -> None:
    frame = np.random.default_rng(0).integers(0, 256, (32, 40, 3)).astype(np.uint8)
    expected = np.array(enhance(Image.fromarray(frame)).enhance(amount)).astype(int)
    assert np.abs(aug.adjust(frame, what, amount) - expected).max() <= 2


@pytest.mark.parametrize("amount", [-0.0796, 0.01, 0.0796])
def test_hue_turns_as_in_pillow(amount: float) -> None:
    frame = np.random.default_rng(0).integers(0, 256, (32, 40, 3)).astype(np.uint8)
    hsv = np.array(Image.fromarray(frame).convert("HSV"))
    hsv[..., 0] = (hsv[..., 0].astype(int) + int(amount * 255)) % 256
    expected = np.array(Image.fromarray(hsv, "HSV").convert("RGB")).astype(int)
    difference = np.abs(aug.adjust(frame, "hue", amount) - expected)
    assert difference.mean() < 2  # both round hue and saturation to 8 bits
    assert np.quantile(difference, 0.99) <= 8


def test_blur_is_a_gaussian_of_11_pixels() -> None:
    frames = np.random.default_rng(0).integers(0, 256, (6, 30, 34, 3)).astype(np.uint8)
    blurred = aug.blur(frames, np.random.default_rng(5))
    sigmas = np.random.default_rng(5).uniform(0.1, 2.0, 6)
    offsets = np.arange(-5, 6)
    for frame, result, sigma in zip(frames, blurred, sigmas, strict=True):
        kernel = np.exp(-(offsets**2) / (2 * sigma**2))
        kernel /= kernel.sum()
        padded = np.pad(frame.astype(np.float64), ((5, 5), (5, 5), (0, 0)), mode="reflect")
        rows = sum(k * padded[i : i + 30] for i, k in enumerate(kernel))
        expected = sum(k * rows[:, i : i + 34] for i, k in enumerate(kernel))
        assert np.abs(result - expected).max() <= 2


def test_one_seed_one_clip_and_the_global_generator_is_left_alone() -> None:
    clip = encoded_clip()
    frames, xy, visible = clip.frames.copy(), clip.xy.copy(), clip.visible.copy()
    augment = TrackOnAugmentation(CROP)
    state = np.random.get_state()[1].copy()  # type: ignore[union-attr]
    first, again, other = (augment(clip, np.random.default_rng(seed)) for seed in (3, 3, 4))
    for key in ("frames", "xy", "visible"):
        np.testing.assert_array_equal(getattr(first, key), getattr(again, key))
        assert (getattr(first, key) != getattr(other, key)).any()
    assert first.frames.shape == (5, *CROP, 3)
    np.testing.assert_array_equal(np.random.get_state()[1], state)  # type: ignore[arg-type]
    for kept, value in ((frames, clip.frames), (xy, clip.xy), (visible, clip.visible)):
        np.testing.assert_array_equal(kept, value)


def test_points_outside_are_hidden_and_the_border_is_a_quirk() -> None:
    frames = np.zeros((1, 40, 48, 3), np.uint8)
    xy = np.array([[[24.0, 20.0]], [[-0.01, 20.0]], [[48.0, 20.0]], [[47.99, 0.0]], [[20.0, 40.0]]])
    for quirks, expected in ((False, [1, 0, 0, 1, 0]), (True, [1, 0, 1, 1, 1])):
        clip = Clip(frames, xy, np.ones((5, 1), bool))
        hidden = hide_outside(clip, with_border=quirks)
        assert hidden.visible[:, 0].astype(int).tolist() == expected
