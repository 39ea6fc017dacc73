"""A small panning MOVi-E of the real format and size: rendered scenes in TFRecord files, about 28 MB each.

A dome with a floor and ten to twenty textured ellipsoids, some of which fly, before a panning camera. Depth,
normals, object coordinates and boxes belong together, so that tracks can be made. Images are compressed as
TensorFlow does. The flow, which no recipe reads, has as many bytes as the real one, and is noise.
"""

from __future__ import annotations

import argparse
import sys
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray
from scipy.spatial.transform import Rotation

from trackbench.data.synthetic.textures import random_texture
from trackbench.jobs import run_jobs

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tests" / "data"))
import tfds_fakes as tfds

Array = NDArray[np.float64]
T = 24
DOME = 12.0  # metres
FOCAL_LENGTH, SENSOR_WIDTH = 35.0, 32.0
DEPTH_RANGE = (0.5, 25.0)
BUMPS = 0.15  # of normals: scanned surfaces are rough
NOISE = 1.0  # of 255: the renderer's
SHARD = 8  # scenes
IMAGES = ("video", "segmentations", "depth", "normal", "object_coordinates")
FLOWS = ("forward_flow", "backward_flow")
PNG = (cv2.IMWRITE_PNG_COMPRESSION, 6, cv2.IMWRITE_PNG_FILTER, cv2.IMWRITE_PNG_ALL_FILTERS)


def scene(seed: int, side: int) -> dict[str, NDArray[Any]]:
    """The features of a scene of ``T`` frames of (side, side), as MOVi names and stores them."""
    rng = np.random.default_rng(seed)
    time = np.linspace(0, 1, T)[:, None]
    eye, target = (a + time * (b - a) for a, b in (_eyes(rng), rng.uniform(-2, 2, (2, 3))))
    camera = _looking_at(eye, target)

    count = int(rng.integers(10, 21))
    radii = rng.uniform(0.2, 0.7, (count, 3))
    flies = (np.arange(count) < rng.integers(1, 4))[:, None]
    start = np.concatenate([rng.uniform(-4, 4, (count, 2)), radii.max(axis=1, keepdims=True)], axis=1)
    centres = start[:, None] + (flies * rng.uniform(-3, 3, (count, 3)))[:, None] * time
    centres[..., 2] = np.abs(centres[..., 2])  # bounces
    turns = Rotation.from_rotvec((flies * rng.uniform(-2, 2, (count, 3)))[:, None] * time)
    poses = turns * Rotation.from_rotvec(rng.uniform(-3, 3, (count, 1, 3)).repeat(T, axis=1))
    axes = poses.as_matrix()  # (instances, T, 3, 3)
    corners = np.array(list(product((-1.0, 1.0), repeat=3)))
    boxes = np.einsum("itab,cb,ib->itca", axes, corners, radii) + centres[:, :, None]

    # of the floor and the dome, then of the objects
    textures = [random_texture(rng, 4 * side, 4 * side) for _ in range(2)]
    textures += [random_texture(rng, side, 2 * side) for _ in range(count)]
    rough = cv2.GaussianBlur(rng.standard_normal((2 * side, 2 * side, 3)).astype(np.float32), (0, 0), 1.0)
    frames = [
        _frame(eye[t], camera[t], centres[:, t], axes[:, t], radii, textures, rough, side, rng) for t in range(T)
    ]
    video, segmentations, depth, normal, coordinates = (np.stack(images) for images in zip(*frames, strict=True))
    near, far = DEPTH_RANGE
    return {
        "video": video,
        "segmentations": segmentations[..., None],
        "depth": _sixteen_bits((depth - near) / (far - near))[..., None],
        "normal": _sixteen_bits((normal + 1) / 2),
        "object_coordinates": _sixteen_bits(coordinates),
        **{name: rng.integers(2**14, 2**16, (T, side, side, 2)) for name in FLOWS},  # three bytes a number
        "metadata/depth_range": np.array(DEPTH_RANGE, np.float32),
        "camera/focal_length": np.float32(FOCAL_LENGTH),
        "camera/sensor_width": np.float32(SENSOR_WIDTH),
        "camera/positions": eye.astype(np.float32),
        "camera/quaternions": _wxyz(Rotation.from_matrix(camera)),
        "instances/quaternions": _wxyz(poses),
        "instances/bboxes_3d": boxes.astype(np.float32),
    }


def _frame(
    eye: Array,
    camera: Array,
    centres: Array,
    axes: Array,
    radii: Array,
    textures: list[NDArray[Any]],
    rough: NDArray[Any],
    side: int,
    rng: np.random.Generator,
) -> list[NDArray[Any]]:
    """Colours, segments, distances, normals and object coordinates of one frame, by a ray through each pixel."""
    middle = (np.arange(side) + 0.5) / side - 0.5
    x, y = np.meshgrid(middle, -middle)
    ray = np.stack([x, y, np.full_like(x, -FOCAL_LENGTH / SENSOR_WIDTH)], axis=-1).reshape(-1, 3)
    ray = ray / np.linalg.norm(ray, axis=1, keepdims=True) @ camera.T

    along = ray @ eye
    distance = np.sqrt(along**2 - eye @ eye + DOME**2) - along
    to_floor = np.where(ray[:, 2] < 0, -eye[2] / np.minimum(ray[:, 2], -1e-9), np.inf)
    floor = (to_floor < distance)[:, None]
    distance = np.minimum(distance, to_floor)
    point = eye + distance[:, None] * ray
    normal = np.where(floor, [0.0, 0.0, 1.0], -point / DOME)
    colour = np.where(
        floor, _look_up(textures[0], point[:, :2] * 0.06), _look_up(textures[1], _angles(point) * 0.4)
    )
    segments = np.zeros(len(ray), np.uint8)
    coordinates = np.zeros_like(ray)

    for index, (centre, rotation, size) in enumerate(zip(centres, axes, radii, strict=True)):
        origin, direction = (eye - centre) @ rotation / size, ray @ rotation / size  # where it is the unit ball
        a, b, c = (direction**2).sum(axis=1), direction @ origin, origin @ origin - 1
        root = b * b - a * c
        at = (-b - np.sqrt(root.clip(0))) / a
        hit = (root > 0) & (at > 0) & (at < distance)
        ball = origin + at[hit, None] * direction[hit]
        place = _angles(ball) * 0.3
        facing = ball / size
        facing += BUMPS * np.linalg.norm(facing, axis=1, keepdims=True) * _look_up(rough, place / 2)
        facing = facing / np.linalg.norm(facing, axis=1, keepdims=True) @ rotation.T
        shade = 0.35 + 0.65 * (facing @ [0.4, 0.3, 0.866]).clip(0)
        colour[hit] = _look_up(textures[2 + index], place) * shade[:, None]
        distance[hit], segments[hit], normal[hit], coordinates[hit] = at[hit], index + 1, facing, ball / 2 + 0.5

    colour = (colour + rng.normal(0, NOISE, colour.shape)).clip(0, 255).round().astype(np.uint8)
    flat = (colour, segments, distance, normal, coordinates)
    return [values.reshape(side, side, *values.shape[1:]) for values in flat]


def _angles(point: Array) -> Array:
    radius = np.linalg.norm(point, axis=1)
    return np.stack([np.arctan2(point[:, 1], point[:, 0]), np.arcsin((point[:, 2] / radius).clip(-1, 1))], axis=1)


def _look_up(texture: NDArray[Any], place: Array) -> Array:
    """Colours at places (n, 2), column and row by the texture's height; it repeats without end."""
    column, row = np.floor(place * len(texture)).astype(np.intp).T
    return texture[row % texture.shape[0], column % texture.shape[1]].astype(np.float64)


def _eyes(rng: np.random.Generator) -> Array:
    """Where the camera starts and ends, (2, 3)."""
    angle = rng.uniform(0, 2 * np.pi) + np.array([0, rng.uniform(-0.6, 0.6)])
    return np.stack([7 * np.cos(angle), 7 * np.sin(angle), rng.uniform(1.5, 4.0, 2)], axis=1)


def _looking_at(eye: Array, target: Array) -> Array:
    """Axes of cameras (T, 3, 3), in columns: right, up, backward."""
    back = (eye - target) / np.linalg.norm(eye - target, axis=1, keepdims=True)
    right = np.cross([0.0, 0.0, 1.0], back)
    right /= np.linalg.norm(right, axis=1, keepdims=True)
    return np.stack([right, np.cross(back, right), back], axis=2)


def _wxyz(rotations: Rotation) -> NDArray[np.float32]:
    return np.roll(rotations.as_quat(), 1, axis=-1).astype(np.float32)


def _sixteen_bits(values: Array) -> NDArray[np.uint16]:
    return np.rint(values.clip(0, 1) * 65535).astype(np.uint16)


def record(seed: int, side: int) -> bytes:
    """A scene as a ``tf.train.Example``."""
    content = scene(seed, side)
    stored: dict[str, Any] = {name: value for name, value in content.items() if name not in FLOWS}
    for name in IMAGES:
        stored[name] = [cv2.imencode(".png", image[..., ::-1], PNG)[1].tobytes() for image in content[name]]
    stored["metadata/video_name"] = [f"scene {seed}".encode()]
    flows = b"".join(
        tfds.field(1, tfds.field(1, name.encode()) + tfds.field(2, tfds.field(3, tfds.field(1, varints))))
        for name, varints in ((name, _three_bytes(content[name])) for name in FLOWS)
    )
    return tfds.example(stored) + tfds.field(1, flows)  # messages join by standing one after the other


def _three_bytes(numbers: NDArray[Any]) -> bytes:
    """Varints of numbers in [2^14, 2^21)."""
    flat = numbers.reshape(-1, 1)
    return (flat >> [0, 7, 14] & 0x7F | [0x80, 0x80, 0]).astype(np.uint8).tobytes()


def main() -> None:
    """Write ``panning_movi_e/SIDExSIDE/1.0.0`` under a folder: training scenes, and one for validation."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--scenes", type=int, default=32)
    parser.add_argument("--side", type=int, default=256)
    parser.add_argument("--jobs", type=int, default=1, help="processes")
    options = parser.parse_args()
    outcomes = run_jobs(
        partial(record, side=options.side), range(options.scenes + 1), options.jobs, "rendering scenes"
    )
    records: dict[int, bytes] = {}
    for outcome in outcomes:
        if outcome.result is None:
            raise SystemExit(f"scene {outcome.item}: {outcome.error}")
        records[outcome.item] = outcome.result
    train = [records[seed] for seed in range(options.scenes)]
    description = tfds.movi_features(T, options.side, options.side)
    flow = description["featuresDict"]["features"]
    flow["backward_flow"] = flow["forward_flow"]
    folder = tfds.write_dataset(
        options.out / "panning_movi_e" / f"{options.side}x{options.side}" / "1.0.0",
        {
            "train": [train[start : start + SHARD] for start in range(0, len(train), SHARD)],
            "validation": [[records[options.scenes]]],
        },
        description,
        "panning_movi_e",
    )
    sys.stdout.write(f"{folder}: {len(train)} scenes, {np.mean([len(r) for r in train]) / 1e6:.1f} MB each\n")


if __name__ == "__main__":
    main()
