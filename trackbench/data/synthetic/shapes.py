"""Outlines of objects: star-shaped regions, given by a radius for every direction.

The same closed form paints the alpha channel and decides what hides what, so that both agree exactly.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.float64]

DIRECTIONS = 720


@dataclass(frozen=True)
class Outline:
    """A star-shaped region about ``centre``, optionally with a star-shaped hole.

    Attributes:
        centre: (x, y) in texture raster coordinates.
        radius: (720,) distance of the edge, in texels, in directions evenly spaced over the full turn;
            linear in angle between them.
        softness: width of the ramp of alpha across the edge, in texels, measured along the radius.
        hole: the edge of the hole as a fraction of ``radius``; 0: no hole.
    """

    centre: tuple[float, float]
    radius: FloatArray
    softness: float = 1.0
    hole: float = 0.0

    def alpha(self, points: npt.NDArray[np.floating]) -> FloatArray:
        """Opacity in [0, 1] at points (..., 2) in texture raster coordinates; 0.5 on the edge."""
        x, y = points[..., 0] - self.centre[0], points[..., 1] - self.centre[1]
        step = np.arctan2(y, x) * (DIRECTIONS / (2 * np.pi))
        below = np.floor(step)
        first = below.astype(np.int64) % DIRECTIONS
        start, end = self.radius[first], self.radius[(first + 1) % DIRECTIONS]
        edge = start + (step - below) * (end - start)
        distance = np.hypot(x, y)
        inside = edge - distance
        if self.hole:
            inside = np.minimum(inside, distance - self.hole * edge)
        return np.clip(0.5 + inside / self.softness, 0.0, 1.0)


def random_outline(rng: np.random.Generator, radius: float) -> Outline:
    """A random blob, polygon or superellipse with a largest radius of ``radius`` texels, amid its texture."""
    maker = (_blob, _polygon, _superellipse)[int(rng.integers(3))]
    angle = np.linspace(0.0, 2 * np.pi, DIRECTIONS, endpoint=False)
    shape = np.maximum(maker(rng, angle), 0.12)
    profile: FloatArray = shape * (radius / shape.max())
    soft_edge = rng.random() < 0.2
    softness = rng.uniform(2.0, 5.0) if soft_edge else rng.uniform(1.0, 1.5)
    hole = rng.uniform(0.45, 0.7) if rng.random() < 0.12 else 0.0
    half = texture_size(radius) / 2
    return Outline((half, half), profile, softness, hole)


def texture_size(radius: float) -> int:
    """Side, in texels, of a square texture that holds an outline of ``radius`` texels and its soft edge."""
    return 2 * (int(np.ceil(radius)) + 5)


def _blob(rng: np.random.Generator, angle: FloatArray) -> FloatArray:
    """A circle with a few random harmonics."""
    profile = np.ones_like(angle)
    for harmonic in range(2, 7):
        profile += rng.uniform(0, 0.5) / harmonic * np.cos(harmonic * angle + rng.uniform(0, 2 * np.pi))
    return profile


def _polygon(rng: np.random.Generator, angle: FloatArray) -> FloatArray:
    """A polygon of 3 to 9 corners about the centre, convex or with notches like a star."""
    corners = int(rng.integers(3, 10))
    at = (np.arange(corners) + rng.uniform(-0.2, 0.2, corners)) * (2 * np.pi / corners)
    at -= at[0]
    reach = rng.uniform(0.45, 1.0, corners)
    turn = (angle + rng.uniform(0, 2 * np.pi)) % (2 * np.pi)
    after = np.searchsorted(at, turn) % corners
    before = after - 1
    # the point of the chord between two corners that lies in direction `turn`
    span = (at[after] - at[before]) % (2 * np.pi)
    part = (turn - at[before]) % (2 * np.pi)
    a, b = reach[before], reach[after]
    return a * b * np.sin(span) / (a * np.sin(part) + b * np.sin(span - part))


def _superellipse(rng: np.random.Generator, angle: FloatArray) -> FloatArray:
    """From a diamond over an ellipse to nearly a box, up to four times as long as wide."""
    exponent = rng.uniform(1.2, 6.0)
    aspect = rng.uniform(1.0, 4.0)
    turned = angle + rng.uniform(0, 2 * np.pi)
    return (np.abs(np.cos(turned)) ** exponent + np.abs(aspect * np.sin(turned)) ** exponent) ** (-1 / exponent)
