"""Random scenes: textured cards at different depths, moving in front of a far wall, under a moving camera.

Every object is a plane in 3-D with its own path, spin and tilt, so parallax, perspective and change of scale
come from one pinhole camera and need no model of their own. Lengths on the screen are given in units of
``sqrt(H * W)``, so that clips of any size show the same motion relative to their size.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from trackbench.data.synthetic.motion import Camera, FloatArray, Ripple, rotation, wander
from trackbench.data.synthetic.scene import Layer, Scene
from trackbench.data.synthetic.shapes import random_outline, texture_size
from trackbench.data.synthetic.textures import Split, random_texture

WALL_DEPTH = 3.0
OBJECT_DEPTHS = (1.3, 2.5)
OBJECT_RADII = (0.11, 0.32)  # of sqrt(H W), as seen at rest
SLOW, QUICK, SHAKE = (48.0, 140.0), (20.0, 48.0), (5.0, 12.0)  # periods in frames


@dataclass(frozen=True)
class SceneSettings:
    """What random scenes look like.

    Attributes:
        num_frames: T.
        height: H, pixels.
        width: W, pixels.
        objects: least and most number of objects.
        photos: use photographs besides procedural textures.
        motion: speed relative to the default; 0: nothing moves.
        blur: share of clips with a slight lens blur.
        noise: share of clips with sensor noise.
        split: which photographs to use.
    """

    num_frames: int
    height: int
    width: int
    objects: tuple[int, int] = (3, 8)
    photos: bool = True
    motion: float = 1.0
    blur: float = 0.3
    noise: float = 0.5
    split: Split = "train"

    @property
    def frames(self) -> FloatArray:
        """The frame numbers, (T,)."""
        return np.arange(self.num_frames, dtype=np.float64)

    @property
    def unit(self) -> float:
        """The length, in pixels, that motion and sizes on the screen are relative to."""
        return float(np.sqrt(self.height * self.width))

    @property
    def focal(self) -> float:
        """Focal length at rest, in pixels: a field of view of 45 degrees along the longer side."""
        return 1.2 * max(self.height, self.width)


def random_scene(rng: np.random.Generator, settings: SceneSettings) -> Scene:
    """A random scene; a function of the state of ``rng`` and the settings alone."""
    time = settings.motion * settings.frames
    exposure = 1 + wander(rng, settings.frames, rng.uniform(0, 0.1), SLOW)
    camera = _random_camera(rng, settings, time)
    layers = [_random_wall(rng, settings, time, camera, exposure)]
    count = int(rng.integers(settings.objects[0], settings.objects[1] + 1))
    for depth in np.sort(rng.uniform(*OBJECT_DEPTHS, count))[::-1]:
        layers.append(_random_object(rng, settings, time, camera, exposure, float(depth)))
    return Scene(
        height=settings.height,
        width=settings.width,
        layers=tuple(layers),
        blur=rng.uniform(0.4, 0.8) if rng.random() < settings.blur else 0.0,
        noise=rng.uniform(1.0, 6.0) if rng.random() < settings.noise else 0.0,
    )


def _random_camera(rng: np.random.Generator, settings: SceneSettings, time: FloatArray) -> Camera:
    """Anything from a tripod to a walk: pan, tilt, roll, zoom and travel, plus the tremor of a hand."""
    shift = settings.unit / settings.focal  # radians that move the picture by one unit
    # squared, so that calm cameras are more frequent than wild ones
    strength = rng.random(7) ** 2
    travel = strength[:3] * WALL_DEPTH * np.array([0.17 * shift, 0.17 * shift, 0.15])
    turn = strength[3:6] * np.array([0.15 * shift, 0.15 * shift, 0.2])
    tremor = rng.random() ** 2 * 0.004 * shift
    position = np.stack([wander(rng, time, amplitude, SLOW) for amplitude in travel], axis=-1)
    yaw, pitch, roll = (
        wander(rng, time, amplitude, SLOW) + wander(rng, time, tremor, SHAKE) for amplitude in turn
    )
    return Camera(
        position=position,
        orientation=rotation(yaw, pitch, roll),
        focal=settings.focal * np.exp(wander(rng, time, 0.2 * strength[6], SLOW)),
        centre=(settings.width / 2, settings.height / 2),
    )


def _random_wall(
    rng: np.random.Generator, settings: SceneSettings, time: FloatArray, camera: Camera, exposure: FloatArray
) -> Layer:
    height, width = round(1.6 * settings.height), round(1.6 * settings.width)
    lean, spin = rng.uniform(-0.35, 0.35, 2), rng.uniform(-0.3, 0.3)
    still = np.zeros_like(time)
    homography = camera.homographies(
        position=np.stack([still, still, still + WALL_DEPTH], axis=-1),
        orientation=rotation(still + lean[0], still + lean[1], still + spin),
        origin=(width / 2, height / 2),
        texel=WALL_DEPTH / settings.focal,
    )
    ripple = _random_ripple(rng, time, size=0.5 * settings.unit, steepest=0.12) if rng.random() < 0.3 else None
    texture = random_texture(rng, height, width, settings.photos, settings.split)
    return Layer(texture, None, homography, ripple, exposure)


def _random_object(
    rng: np.random.Generator,
    settings: SceneSettings,
    time: FloatArray,
    camera: Camera,
    exposure: FloatArray,
    depth: float,
) -> Layer:
    radius = settings.unit * float(np.exp(rng.uniform(*np.log(OBJECT_RADII))))
    world = depth / settings.focal  # world units per pixel of the screen at this depth
    frame_size = np.array([settings.width, settings.height])
    home = rng.uniform(-0.35, 0.35, 2) * frame_size
    roam = rng.random(2) * 0.35 * settings.unit
    path = [
        home[axis]
        + wander(rng, time, roam[axis], SLOW)
        + wander(rng, time, rng.random() * 0.03 * settings.unit, QUICK)
        for axis in range(2)
    ]
    away = depth * (1 + wander(rng, time, rng.uniform(0, 0.15), SLOW))
    lean = [wander(rng, time, rng.uniform(0, 0.6), SLOW) for _ in range(2)]
    spin = rng.uniform(-1, 1) ** 3 * 0.08 * time + wander(rng, time, rng.uniform(0, 0.5), SLOW)
    side = texture_size(radius)
    homography = camera.homographies(
        position=np.stack([world * path[0], world * path[1], away], axis=-1),
        orientation=rotation(lean[0], lean[1], spin),
        origin=(side / 2, side / 2),
        texel=world,
    )
    ripple = _random_ripple(rng, time, size=2 * radius, steepest=0.5) if rng.random() < 0.6 else None
    flicker = 1 + wander(rng, settings.frames, rng.uniform(0, 0.08), SLOW)
    return Layer(
        texture=random_texture(rng, side, side, settings.photos, settings.split),
        outline=random_outline(rng, radius),
        homography=homography,
        ripple=ripple,
        gain=exposure * flicker,
    )


def _random_ripple(rng: np.random.Generator, time: FloatArray, size: float, steepest: float) -> Ripple:
    """Swelling, travelling waves: 0.5 to 1.5 of them across ``size`` texels, of slope up to ``steepest``."""
    rates = rng.uniform(0.5, 1.5, 2) * 2 * np.pi / size
    slopes = rng.uniform(0.2, 1.0, 2) * steepest
    amplitudes = [wander(rng, time, slope / rate, SLOW) for slope, rate in zip(slopes, rates, strict=True)]
    phases = [rng.uniform(0, 2 * np.pi) + rng.uniform(-0.12, 0.12) * time for _ in range(2)]
    return Ripple(amplitudes[0], phases[0], amplitudes[1], phases[1], float(rates[0]), float(rates[1]))
