"""Smooth trajectories, and the homographies that a moving camera sees of moving planes.

Trajectories are sums of sinusoids: smooth, bounded for any number of frames, and a function of time alone.
The camera is a pinhole with its principal point in the middle of the frame; it looks along +z, y points down.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.float64]


def wander(
    rng: np.random.Generator, time: FloatArray, amplitude: float, period: tuple[float, float]
) -> FloatArray:
    """``amplitude sin(2 pi time / P + phase)``, (T,): a random phase, and P from ``period``, in frames."""
    return amplitude * np.sin(2 * np.pi * (time / rng.uniform(*period) + rng.random()))


def rotation(yaw: FloatArray, pitch: FloatArray, roll: FloatArray) -> FloatArray:
    """Rotations (T, 3, 3): about the viewing axis by ``roll``, about x by ``pitch``, about y by ``yaw``."""
    zero, one = np.zeros_like(roll), np.ones_like(roll)
    matrices = []
    for angle, rows in (
        (yaw, lambda c, s: (c, zero, s, zero, one, zero, -s, zero, c)),
        (pitch, lambda c, s: (one, zero, zero, zero, c, -s, zero, s, c)),
        (roll, lambda c, s: (c, -s, zero, s, c, zero, zero, zero, one)),
    ):
        entries = rows(np.cos(angle), np.sin(angle))
        matrices.append(np.stack(entries, axis=-1).reshape(-1, 3, 3))
    return matrices[0] @ matrices[1] @ matrices[2]


@dataclass(frozen=True)
class Camera:
    """A moving pinhole camera.

    Attributes:
        position: (T, 3) world units.
        orientation: (T, 3, 3), camera to world.
        focal: (T,) pixels.
        centre: (x, y) of the principal point in frame raster coordinates.
    """

    position: FloatArray
    orientation: FloatArray
    focal: FloatArray
    centre: tuple[float, float]

    def homographies(
        self, position: FloatArray, orientation: FloatArray, origin: tuple[float, float], texel: float
    ) -> FloatArray:
        """Maps from the raster coordinates of a textured plane to those of the frames.

        Args:
            position: (T, 3) world position of the plane's ``origin``.
            orientation: (T, 3, 3), plane to world; the texture lies in the plane's x and y.
            origin: (x, y), the texture raster coordinates of the point that sits at ``position``.
            texel: side of a texel in world units.

        Returns:
            (T, 3, 3); the third homogeneous coordinate of a mapped point is its depth, in world units.
        """
        x_axis, y_axis = texel * orientation[:, :, 0], texel * orientation[:, :, 1]
        corner = position - self.position - origin[0] * x_axis - origin[1] * y_axis
        plane = np.swapaxes(self.orientation, 1, 2) @ np.stack([x_axis, y_axis, corner], axis=-1)
        intrinsics = np.zeros_like(plane)
        intrinsics[:, 0, 0] = intrinsics[:, 1, 1] = self.focal
        intrinsics[:, 0, 2], intrinsics[:, 1, 2] = self.centre
        intrinsics[:, 2, 2] = 1
        return intrinsics @ plane


@dataclass(frozen=True)
class Ripple:
    """A deformation of the texture plane by two shear waves, exactly invertible for any amplitude.

    ``x' = x + x_amplitude sin(x_rate y + x_phase)``, then ``y' = y + y_amplitude sin(y_rate x' + y_phase)``.
    A shear moves points along one axis by an amount that depends on the other axis alone, so undoing the two
    in reverse order inverts the map in closed form.

    Attributes:
        x_amplitude: (T,) texels.
        x_phase: (T,) radians.
        y_amplitude: (T,) texels.
        y_phase: (T,) radians.
        x_rate: radians per texel.
        y_rate: radians per texel.
    """

    x_amplitude: FloatArray
    x_phase: FloatArray
    y_amplitude: FloatArray
    y_phase: FloatArray
    x_rate: float
    y_rate: float

    def apply(self, x: FloatArray, y: FloatArray, frame: npt.NDArray[np.int64]) -> tuple[FloatArray, FloatArray]:
        """Texture to deformed texture; ``frame`` broadcasts against ``x`` and ``y``."""
        x = x + self.x_amplitude[frame] * np.sin(self.x_rate * y + self.x_phase[frame])
        y = y + self.y_amplitude[frame] * np.sin(self.y_rate * x + self.y_phase[frame])
        return x, y

    def undo(self, x: FloatArray, y: FloatArray, frame: npt.NDArray[np.int64]) -> tuple[FloatArray, FloatArray]:
        """Deformed texture to texture, the inverse of :meth:`apply`."""
        y = y - self.y_amplitude[frame] * np.sin(self.y_rate * x + self.y_phase[frame])
        x = x - self.x_amplitude[frame] * np.sin(self.x_rate * y + self.x_phase[frame])
        return x, y
