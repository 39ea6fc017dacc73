"""Textures with detail at several scales: procedural ones, and photographs that come with scikit-image.

Every function draws from the generator it is given and from nothing else, so that one seed gives one texture.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from importlib.resources import as_file, files
from typing import Literal

import cv2
import numpy as np
import numpy.typing as npt
from PIL import Image

Split = Literal["train", "val"]
ByteImage = npt.NDArray[np.uint8]
FloatImage = npt.NDArray[np.float32]

PHOTOGRAPHS: dict[Split, tuple[str, ...]] = {
    "train": (
        "astronaut.png",
        "brick.png",
        "camera.png",
        "coins.png",
        "grass.png",
        "ihc.png",
        "motorcycle_left.png",
        "page.png",
        "rocket.jpg",
        "text.png",
    ),
    "val": ("chelsea.png", "coffee.png", "gravel.png"),
}
"""Files inside the installed scikit-image, none of which it has to download. Validation has its own."""


@cache
def photograph(name: str) -> ByteImage:
    """One of scikit-image's photographs, decoded once per process.

    Args:
        name: file name in ``skimage/data``, for example ``"coffee.png"``.

    Returns:
        (H, W, 3) RGB, read-only.

    Raises:
        FileNotFoundError: the installed scikit-image does not ship the file.
    """
    resource = files("skimage").joinpath("data", name)
    if not resource.is_file():
        raise FileNotFoundError(f"the installed scikit-image ships no data/{name}; synthetic photos need it")
    with as_file(resource) as path, Image.open(path) as image:
        pixels = np.array(image.convert("RGB"))
    pixels.setflags(write=False)
    return pixels


def random_texture(
    rng: np.random.Generator, height: int, width: int, photos: bool = True, split: Split = "train"
) -> ByteImage:
    """A random texture: a photograph (every second one, if ``photos``) or a procedural pattern.

    Returns:
        (height, width, 3) uint8 RGB.
    """
    if photos and rng.random() < 0.5:
        image = _photo_texture(rng, height, width, split).astype(np.float32) / np.float32(255)
        grain_strength = rng.uniform(0.02, 0.07)
    else:
        pattern = PATTERNS[int(rng.integers(len(PATTERNS)))](rng, height, width)
        grey = pattern.mean(axis=2, keepdims=True)
        image = grey + np.float32(rng.uniform(0.3, 1.0)) * (pattern - grey)
        grain_strength = rng.uniform(0.08, 0.2)
    # fine grain everywhere: a point in a flat region could not be told from its neighbours
    grain = _fractal_noise(rng, height, width, coarsest=6.0, persistence=0.9, channels=1)
    return _to_bytes(image + np.float32(grain_strength) * grain)


def _photo_texture(rng: np.random.Generator, height: int, width: int, split: Split) -> ByteImage:
    names = PHOTOGRAPHS[split]
    photo = photograph(names[int(rng.integers(len(names)))])
    aspect = width / height
    # the largest crop of the wanted shape, shrunk at random, but not so far that it must be magnified much
    full = min(photo.shape[0], photo.shape[1] / aspect)
    least = min(full, 0.8 * height)
    crop_height = rng.uniform(least, full)
    rows, cols = max(2, round(crop_height)), max(2, round(crop_height * aspect))
    rows, cols = min(rows, photo.shape[0]), min(cols, photo.shape[1])
    tops, lefts = (
        rng.integers(photo.shape[0] - rows + 1, size=3),
        rng.integers(photo.shape[1] - cols + 1, size=3),
    )
    crops = [photo[top : top + rows, left : left + cols] for top, left in zip(tops, lefts, strict=True)]
    crop = max(crops, key=_contrast)  # rather not a piece of empty sky
    interpolation = cv2.INTER_AREA if rows > height else cv2.INTER_CUBIC
    image = np.asarray(cv2.resize(crop, (width, height), interpolation=interpolation), dtype=np.uint8)
    if rng.random() < 0.5:
        image = image[:, ::-1]
    if rng.random() < 0.5:
        image = image[..., rng.permutation(3)]
    return _recolour(rng, np.ascontiguousarray(image))


def _contrast(image: ByteImage) -> float:
    return float(image[::8, ::8, 1].std())


def _recolour(rng: np.random.Generator, image: ByteImage) -> ByteImage:
    """Random gamma, contrast and tint, by a table per channel."""
    levels = np.linspace(0.0, 1.0, 256)
    gain = rng.uniform(0.85, 1.15, 3) * rng.uniform(0.8, 1.2)
    table = levels[:, None] ** rng.uniform(0.7, 1.4) * gain + rng.uniform(-0.08, 0.12)
    table = np.clip(255.0 * table + 0.5, 0, 255).astype(np.uint8)
    return np.asarray(cv2.LUT(image, table[None]), dtype=np.uint8)


def _fractal_noise(
    rng: np.random.Generator,
    height: int,
    width: int,
    coarsest: float,
    persistence: float,
    channels: int = 3,
) -> FloatImage:
    """Octaves of smooth noise from ``coarsest`` texels down to about 2; roughly zero mean, unit spread."""
    total = np.zeros((height, width, channels), np.float32)
    amplitude, power, cell = 1.0, 0.0, coarsest
    while cell >= 1.5:
        shape = (int(height / cell) + 3, int(width / cell) + 3, channels)
        grid = rng.standard_normal(shape, dtype=np.float32)
        octave = cv2.resize(grid, (width, height), interpolation=cv2.INTER_LINEAR)
        total += amplitude * octave.reshape(total.shape)
        power += amplitude**2
        amplitude *= persistence
        cell /= 2.2
    return total / np.float32(max(power, 1.0) ** 0.5 * 0.7)


def _noise_pattern(rng: np.random.Generator, height: int, width: int) -> FloatImage:
    """Clouds: fractal noise through a random colour map."""
    noise = _fractal_noise(rng, height, width, coarsest=max(4.0, min(height, width) / 3), persistence=0.75)
    return _mix_colours(rng, 0.5 + 0.22 * noise)


def _leaves_pattern(rng: np.random.Generator, height: int, width: int) -> FloatImage:
    """Dead leaves: opaque discs, boxes and strokes on top of each other, with sizes from a power law.

    The image model of Lee, Mumford and Huang, "Occlusion models for natural images" (IJCV 2001): it has edges
    at every scale, as photographs have.
    """
    canvas = np.full((height, width, 3), rng.integers(0, 256, 3), np.uint8)
    size = min(height, width)
    count = int(rng.integers(150, 260))
    smallest, largest = max(1.5, 0.015 * size), max(4.0, 0.3 * size)
    # inverse-CDF samples of p(r) ~ r^-2, largest first so that small leaves stay in sight
    radii = np.sort(1 / (1 / smallest + rng.random(count) * (1 / largest - 1 / smallest)))[::-1]
    centres = rng.random((count, 2)) * (width, height)
    palette = rng.integers(0, 256, (int(rng.integers(4, 24)), 3))
    colours = palette[rng.integers(len(palette), size=count)] + rng.integers(-20, 21, (count, 3))
    colours = np.clip(colours, 0, 255)
    kinds, angles = rng.integers(0, 3, count), rng.random(count) * 360
    for radius, (x, y), colour, kind, angle in zip(radii, centres, colours.tolist(), kinds, angles, strict=True):
        if kind == 0:
            cv2.circle(canvas, (int(x), int(y)), int(radius + 0.5), colour, -1, cv2.LINE_AA)
        elif kind == 1:
            box = cv2.boxPoints(((x, y), (2 * radius, 1.4 * radius), angle)).astype(np.int32)
            cv2.fillConvexPoly(canvas, box, colour, cv2.LINE_AA)
        else:
            reach = 2.5 * radius * np.array([np.cos(angle), np.sin(angle)])
            ends = [(int(x - reach[0]), int(y - reach[1])), (int(x + reach[0]), int(y + reach[1]))]
            cv2.line(canvas, ends[0], ends[1], colour, max(1, int(radius / 3)), cv2.LINE_AA)
    return canvas.astype(np.float32) / np.float32(255)


def _cells_pattern(rng: np.random.Generator, height: int, width: int) -> FloatImage:
    """Voronoi cells of random colours with dark seams."""
    count = int(rng.integers(20, 90))
    seeds = np.full((height, width), 255, np.uint8)
    seeds[rng.integers(height, size=count), rng.integers(width, size=count)] = 0
    distance, label = cv2.distanceTransformWithLabels(
        seeds, cv2.DIST_L2, cv2.DIST_MASK_5, labelType=cv2.DIST_LABEL_PIXEL
    )
    colours = rng.random((count + 1, 3), dtype=np.float32)
    shade = 1 - 0.5 * np.clip(distance / max(1.0, 0.5 * (height * width / count) ** 0.5), 0, 1)
    noise = _fractal_noise(rng, height, width, coarsest=max(4.0, min(height, width) / 8), persistence=0.8)
    return colours[label] * shade[..., None] + 0.08 * noise


def _weave_pattern(rng: np.random.Generator, height: int, width: int) -> FloatImage:
    """Checks or stripes of uneven colour, broken up by coarse noise so that no two cells are alike."""
    period = rng.uniform(0.06, 0.2, 2) * min(height, width)
    if rng.random() < 0.4:
        period[int(rng.integers(2))] = 4.0 * max(height, width)
    rows = (np.arange(height) / period[0]).astype(np.int64)
    cols = (np.arange(width) / period[1]).astype(np.int64)
    ink, paper = _two_colours(rng)
    parity = ((rows[:, None] + cols[None]) % 2)[..., None].astype(np.float32)
    tint = 0.12 * rng.standard_normal((rows[-1] + 1, cols[-1] + 1, 3), dtype=np.float32)
    noise = _fractal_noise(rng, height, width, coarsest=max(4.0, min(height, width) / 3), persistence=0.8)
    return paper + parity * (ink - paper) + tint[rows[:, None], cols[None]] + 0.1 * noise


def _print_pattern(rng: np.random.Generator, height: int, width: int) -> FloatImage:
    """Random letters of many sizes on paper."""
    ink, paper = _two_colours(rng)
    noise = _fractal_noise(rng, height, width, coarsest=max(4.0, min(height, width) / 3), persistence=0.8)
    canvas = _to_bytes(paper + 0.08 * noise)
    for _ in range(int(rng.integers(30, 70))):
        word = "".join(chr(c) for c in rng.integers(33, 127, int(rng.integers(1, 5))))
        place = (int(rng.integers(-10, width)), int(rng.integers(0, height + 10)))
        colour = np.clip(255 * (ink + rng.uniform(-0.25, 0.25, 3)), 0, 255).tolist()
        scale = float(rng.uniform(0.3, 1.0)) * min(height, width) / 150 + 0.15
        cv2.putText(canvas, word, place, cv2.FONT_HERSHEY_SIMPLEX, scale, colour, 1 + int(2 * scale), cv2.LINE_AA)
    return canvas.astype(np.float32) / np.float32(255)


def _two_colours(rng: np.random.Generator) -> tuple[FloatImage, FloatImage]:
    """Two colours of clearly different brightness."""
    dark = rng.random(3, dtype=np.float32) * np.float32(0.45)
    light = np.float32(0.55) + rng.random(3, dtype=np.float32) * np.float32(0.45)
    return (dark, light) if rng.random() < 0.5 else (light, dark)


def _mix_colours(rng: np.random.Generator, image: FloatImage) -> FloatImage:
    """The image in random colours: a random matrix about mid grey."""
    matrix = rng.uniform(-0.4, 1.2, (3, 3)).astype(np.float32)
    matrix /= np.abs(matrix).sum(axis=1, keepdims=True) * np.float32(0.7)
    offset = rng.uniform(0.35, 0.65, 3)
    return np.asarray((image - np.float32(0.5)) @ matrix.T + offset.astype(np.float32), dtype=np.float32)


def _to_bytes(image: FloatImage) -> ByteImage:
    return np.clip(255 * image + 0.5, 0, 255).astype(np.uint8)


PATTERNS: tuple[Callable[[np.random.Generator, int, int], FloatImage], ...] = (
    _noise_pattern,
    _leaves_pattern,
    _cells_pattern,
    _weave_pattern,
    _print_pattern,
)
