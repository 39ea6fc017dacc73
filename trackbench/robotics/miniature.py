"""Miniature episodes with exact keypoints: an arm of two links over a table, seen by several cameras.

Every part is a textured card in 3-D (:mod:`trackbench.data.synthetic`), so where a keypoint is in each image, and
whether something hides it, is known in closed form. All episodes of a seed show the same things; what moves, how
and from where differs.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, get_args

import cv2
import numpy as np
from numpy.typing import NDArray
from rich.console import Console

from trackbench.data.synthetic.motion import Camera, FloatArray, rotation, wander
from trackbench.data.synthetic.render import paint
from trackbench.data.synthetic.scene import Layer, Scene
from trackbench.data.synthetic.shapes import DIRECTIONS, Outline, texture_size
from trackbench.data.synthetic.textures import ByteImage, random_texture
from trackbench.files import written_whole
from trackbench.jobs import run_jobs
from trackbench.robotics.episodes import import_h5py

KEYPOINTS = ("gripper", "elbow", "cup", "box", "table")
ImageType = Literal["uint8", "float32", "float32_255"]  # float32 in [0, 1] or in [0, 255]
Compression = Literal["gzip", "lzf", "none"]

_TABLE = 3.0  # depth of the table, world units; the cameras are at 0
_TRIES = 200


@dataclass(frozen=True)
class MiniatureSettings:
    """What miniature episodes look like.

    Attributes:
        steps: T.
        cameras: V.
        height: pixels.
        width: pixels.
        image_type: type and range of the images.
        compression: of the images.
        image_key: name of the images within a step.
        channels_last: images are (1, V, H, W, 3) instead of (1, V, 3, H, W).
        fps: steps per second, an attribute of the file.
        noise: standard deviation of the sensor noise in grey levels.
        seed: of the things and their motion.
    """

    steps: int = 120
    cameras: int = 2
    height: int = 480
    width: int = 640
    image_type: ImageType = "uint8"
    compression: Compression = "gzip"
    image_key: str = "obs/image"
    channels_last: bool = False
    fps: float = 30.0
    noise: float = 2.0
    seed: int = 0

    def __post_init__(self) -> None:
        for key, least in (("steps", 1), ("cameras", 1), ("height", 48), ("width", 48), ("seed", 0)):
            if getattr(self, key) < least:
                raise ValueError(f"{key} must be at least {least}, got {getattr(self, key)}")
        for key, values in (("image_type", get_args(ImageType)), ("compression", get_args(Compression))):
            if getattr(self, key) not in values:
                raise ValueError(f"{key} must be one of {values}, got {getattr(self, key)!r}")


@dataclass(frozen=True)
class Truth:
    """Where the keypoints of an episode are.

    Attributes:
        names: (K,).
        xy: (V, K, T, 2) float32, pixels (first pixel centre 0.5), also where hidden.
        visible: (V, K, T) bool.
    """

    names: tuple[str, ...]
    xy: NDArray[np.float32]
    visible: NDArray[np.bool_]


def make_episodes(
    folder: Path,
    episodes: int = 8,
    settings: MiniatureSettings | None = None,
    workers: int = 1,
    console: Console | None = None,
) -> list[Path]:
    """Write ``episode_0.h5``, ... to a folder, and the truth about them to ``truth/episode_0.npz``, ...

    Files that are there are replaced; the same settings give the same files.

    Returns:
        the episodes' files.

    Raises:
        ValueError: ``episodes`` below 1, or an episode could not be made.
    """
    if episodes < 1:
        raise ValueError(f"episodes must be at least 1, got {episodes}")
    work = partial(write_episode, Path(folder), settings=settings or MiniatureSettings())
    for outcome in run_jobs(work, range(episodes), workers, "making episodes", console):
        if outcome.error is not None:
            raise ValueError(f"episode {outcome.item}: {outcome.error}")
    return [Path(folder) / f"episode_{index}.h5" for index in range(episodes)]


def write_episode(folder: Path, index: int, settings: MiniatureSettings) -> None:
    """Write one episode and its truth; see :func:`make_episodes`."""
    h5py = import_h5py()
    scenes, truth, states = _make_scenes(settings, index)
    rng = np.random.default_rng([settings.seed, index, 1])
    with written_whole(folder / f"episode_{index}.h5") as path, h5py.File(path, "w") as file:
        for t in range(settings.steps):
            images = np.stack([_noisy(paint(scene, t), settings.noise, rng) for scene in scenes])
            _write_step(file, t, images, states, settings)
        _write_rest(file, states, settings, index)
    with written_whole(folder / "truth" / f"episode_{index}.npz") as path:
        np.savez_compressed(path, xy=truth.xy, visible=truth.visible, names=np.array(truth.names))


def read_truth(path: Path) -> Truth:
    """Read what :func:`make_episodes` wrote to ``truth``."""
    with np.load(path, allow_pickle=False) as file:
        return Truth(tuple(file["names"].tolist()), file["xy"], file["visible"])


def _write_step(file: Any, t: int, images: ByteImage, states: FloatArray, settings: MiniatureSettings) -> None:
    stored: NDArray[Any] = images if settings.channels_last else images.transpose(0, 3, 1, 2)
    if settings.image_type != "uint8":
        white = 255 if settings.image_type == "float32" else 1
        stored = stored.astype(np.float32) / np.float32(white)
    step = file.create_group(f"step_{t}")
    step.attrs["timestamp"] = t / settings.fps
    packing: dict[str, Any] = {"chunks": (1, 1, *stored.shape[1:]), "compression": settings.compression}
    if settings.compression == "gzip":
        packing["compression_opts"] = 1
    step.create_dataset(
        settings.image_key, data=stored[None], **({} if settings.compression == "none" else packing)
    )
    step["obs"].create_dataset("state", data=states[None, t].astype(np.float32))
    # what is to be reached next, checksummed, as recorders like to store it
    following = states[min(t + 1, settings.steps - 1)]
    step.create_dataset("action", data=following[None], chunks=(1, 4), fletcher32=True)


def _write_rest(file: Any, states: FloatArray, settings: MiniatureSettings, index: int) -> None:
    """What recorders put beside the steps: attributes, a table, links, scales, references."""
    h5py = import_h5py()
    file.attrs["fps"] = settings.fps
    file.attrs["robot"] = "miniature arm"
    file.attrs["task"] = "push the cup beside the box"
    file.attrs["seed"] = np.array([settings.seed, index])
    table = file.create_group("trajectory")
    joints = table.create_dataset("state", data=states, compression="gzip", shuffle=True)
    joints.attrs.create("units", ["rad", "rad", "m", "m"], dtype=h5py.string_dtype())
    time = table.create_dataset("time", data=np.arange(settings.steps) / settings.fps)
    time.make_scale("seconds")
    joints.dims[0].attach_scale(time)
    events = np.array([(0, 0.5), (settings.steps - 1, 1.0)], dtype=[("step", "<i4"), ("progress", "<f8")])
    table.create_dataset("events", data=events)
    ends = [file["step_0"].ref, file[f"step_{settings.steps - 1}"].ref]
    table.create_dataset("ends", data=ends, dtype=h5py.ref_dtype)
    table["notes"] = h5py.Empty("f4")
    file["first"] = h5py.SoftLink("/step_0")
    file["trajectory/times"] = file["trajectory/time"]  # a second hard link


def _make_scenes(settings: MiniatureSettings, index: int) -> tuple[list[Scene], Truth, FloatArray]:
    """The scene as each camera sees it, the keypoints' truth, and the arm's states (T, 4).

    Motions are drawn until all keypoints are in sight at first, most of the time later, and something is hidden
    at some time (in episodes long enough for it).
    """
    things = _make_things(settings)
    rng = np.random.default_rng([settings.seed, index])
    best: tuple[float, list[Scene], Truth, FloatArray] | None = None
    for _ in range(_TRIES):
        scenes, states = _draw_motion(settings, things, rng)
        layers = np.array([thing.layer for thing in things])
        points = np.array([thing.keypoint for thing in things])
        tracks = [scene.tracks(layers, points) for scene in scenes]
        xy = np.stack([pair[0] for pair in tracks]).astype(np.float32)
        visible = np.stack([pair[1] for pair in tracks])
        score = float(visible[..., 0].mean() + visible.mean() + visible.mean(axis=-1).min())
        if best is None or score > best[0]:
            best = score, scenes, Truth(KEYPOINTS, xy, visible), states
        some_hidden = settings.steps < 60 or not visible.all()
        if visible[..., 0].all() and visible.mean(axis=-1).min() > 0.75 and some_hidden:
            return scenes, Truth(KEYPOINTS, xy, visible), states
    assert best is not None
    return best[1:]


@dataclass(frozen=True)
class _Thing:
    """A card: its texture and outline, its depth, its keypoint (x, y) on the texture, and its layer."""

    texture: ByteImage
    outline: Outline | None
    depth: float
    keypoint: FloatArray
    layer: int


def _make_things(settings: MiniatureSettings) -> list[_Thing]:
    """What is in all episodes of a seed, one per keypoint: ``KEYPOINTS``."""
    rng = np.random.default_rng(settings.seed)
    unit = min(settings.height, settings.width)
    # half length and width on the screen, where the keypoint is wanted (-1 to 1), depth, layer, colour
    cards: dict[str, tuple[float, float, float, float, int, tuple[int, int, int]]] = {
        "gripper": (0.085, 0.07, 0.0, 1.9, 5, (95, 95, 105)),
        "elbow": (0.24, 0.06, 0.25, 2.05, 3, (215, 130, 60)),
        "cup": (0.1, 0.09, 0.0, 2.6, 2, (80, 125, 190)),
        "box": (0.14, 0.11, 0.0, 2.7, 1, (130, 165, 100)),
    }
    made = {}
    for name, (length, width, wanted, depth, layer, colour) in cards.items():
        outline = _rounded_box(length * unit, width * unit)
        side = texture_size(length * unit)
        texture = _tinted(random_texture(rng, side, side, photos=False), colour, contrast=0.6)
        target = np.array(outline.centre) + np.array([wanted * length * unit, 0.0])
        keypoint = _strong_corner(texture, outline, target, reach=0.06 * unit, margin=0.04 * unit)
        made[name] = _Thing(texture, outline, depth, keypoint, layer)
    rows, columns = round(1.5 * settings.height), round(1.5 * settings.width)
    texture = _tinted(random_texture(rng, rows, columns, photos=False), (165, 140, 115), contrast=0.35)
    target = np.array([columns / 2 - 0.33 * settings.width, rows / 2 + 0.25 * settings.height])
    keypoint = _strong_corner(texture, None, target, reach=0.08 * unit, margin=0.0)
    made["table"] = _Thing(texture, None, _TABLE, keypoint, 0)
    return [made[name] for name in KEYPOINTS]


def _tinted(texture: ByteImage, colour: tuple[int, int, int], contrast: float) -> ByteImage:
    """The texture in muted colours about ``colour``, as things of one material have."""
    image = texture.astype(np.float32)
    image = np.array(colour, np.float32) + np.float32(contrast) * (image - image.mean(axis=(0, 1)))
    return np.clip(image + np.float32(0.5), 0, 255).astype(np.uint8)


def _rounded_box(length: float, width: float) -> Outline:
    """A box with round corners, ``2 length`` by ``2 width`` texels, amid its texture."""
    angle = np.linspace(0.0, 2 * np.pi, DIRECTIONS, endpoint=False)
    radius = (np.abs(np.cos(angle) / length) ** 6 + np.abs(np.sin(angle) / width) ** 6) ** (-1 / 6)
    half = texture_size(length) / 2
    return Outline((half, half), radius)


def _strong_corner(
    texture: ByteImage, outline: Outline | None, target: FloatArray, reach: float, margin: float
) -> FloatArray:
    """The centre (x, y) of the texel near ``target`` that is the best corner (Shi, Tomasi)."""
    grey = cv2.GaussianBlur(cv2.cvtColor(texture, cv2.COLOR_RGB2GRAY), (0, 0), 1.0)
    strength = cv2.cornerMinEigenVal(grey, 7)
    x, y = np.meshgrid(np.arange(texture.shape[1]) + 0.5, np.arange(texture.shape[0]) + 0.5)
    allowed = np.hypot(x - target[0], y - target[1]) <= max(reach, 2.0)
    if outline is not None:
        inner = Outline(outline.centre, np.maximum(outline.radius - margin, 1.0))
        allowed &= inner.alpha(np.stack([x, y], axis=-1)) > 0.5
    row, column = np.unravel_index(np.argmax(np.where(allowed, strength, -1.0)), strength.shape)
    return np.array([column + 0.5, row + 0.5])


def _draw_motion(
    settings: MiniatureSettings, things: list[_Thing], rng: np.random.Generator
) -> tuple[list[Scene], FloatArray]:
    """A motion of the arm, the cup and the box; the scene per camera, and the arm's states (T, 4)."""
    time = np.arange(settings.steps, dtype=np.float64)
    thing = dict(zip(KEYPOINTS, things, strict=True))
    unit = min(settings.height, settings.width)
    focal = 1.2 * settings.width
    still = np.zeros_like(time)

    def world(pixels: FloatArray, depth: float) -> FloatArray:
        """(T, 2) pixels from the middle of a camera in front to (T, 3) world units."""
        return np.concatenate([pixels * depth / focal, np.full((len(pixels), 1), depth)], axis=1)

    # angles about the viewing axis, from the x axis; the arm hangs from the upper edge and reaches down
    shoulder = 0.5 * np.pi + rng.uniform(0.05, 0.15) + wander(rng, time, rng.uniform(0.15, 0.3), (70, 160))
    elbow = shoulder - rng.uniform(0.3, 0.5) + wander(rng, time, rng.uniform(0.15, 0.4), (60, 140))
    base = np.array([0.0, -0.5 * unit]) + rng.uniform(-0.03, 0.03, 2) * unit
    reach = 0.42 * unit

    def along(angle: FloatArray, distance: float) -> FloatArray:
        return distance * np.stack([np.cos(angle), np.sin(angle)], axis=-1)

    joint = base + along(shoulder, reach)
    hand = joint + along(elbow, 0.8 * reach)
    push = 0.5 - 0.5 * np.cos(np.pi * np.clip(time / rng.uniform(60, 140), 0, 1))
    places = {
        "cup": np.array([-0.22, 0.22]) * unit
        + rng.uniform(-0.02, 0.02, 2) * unit
        + push[:, None] * rng.uniform((-0.12, -0.04), (0.28, 0.08)) * unit,
        "box": np.array([0.32, 0.2]) * unit
        + rng.uniform(-0.02, 0.02, 2) * unit
        + np.stack([wander(rng, time, 0.03 * unit, (80, 160)), still], axis=-1),
        "gripper": hand,
    }
    turns = {
        "cup": push * rng.uniform(-0.5, 0.5),
        "box": rng.uniform(-0.1, 0.1) + wander(rng, time, 0.06, (80, 160)),
        "gripper": elbow - 0.25 * np.pi,
    }
    scenes = []
    for number in range(settings.cameras):
        camera = _camera(settings, number, focal, time)

        def place(card: _Thing, at: FloatArray, depth: float, roll: FloatArray, camera: Camera = camera) -> Layer:
            height, width = card.texture.shape[:2]
            homography = camera.homographies(
                position=world(at, depth),
                orientation=rotation(still, still, roll),
                origin=(width / 2, height / 2),
                texel=depth / focal,
            )
            return Layer(card.texture, card.outline, homography, None, still + 1)

        link = thing["elbow"]
        layers = [
            place(thing["table"], np.zeros((len(time), 2)), _TABLE, still),
            place(thing["box"], places["box"], thing["box"].depth, turns["box"]),
            place(thing["cup"], places["cup"], thing["cup"].depth, turns["cup"]),
            place(link, base + along(shoulder, 0.5 * reach), link.depth, shoulder),
            place(link, joint + along(elbow, 0.4 * reach), link.depth - 0.05, elbow + np.pi),
            place(thing["gripper"], places["gripper"], thing["gripper"].depth, turns["gripper"]),
        ]
        scenes.append(Scene(settings.height, settings.width, tuple(layers), blur=0.5))
    return scenes, np.stack([shoulder, elbow, *world(hand, 1.9)[:, :2].T], axis=-1)


def _camera(settings: MiniatureSettings, number: int, focal: float, time: FloatArray) -> Camera:
    """Camera 0 looks straight at the table; the others stand to the sides, look at its middle and sway."""
    side = (number + 1) // 2 * (1 if number % 2 else -1)
    position = np.stack([0.8 * side + 0 * time, -0.35 * abs(side) + 0 * time, 0 * time], axis=-1)
    if number:
        position[:, 0] += 0.03 * np.sin(2 * np.pi * time / 150)
    to_middle = np.array([0.0, 0.0, 2.5]) - position
    yaw = np.arctan2(to_middle[:, 0], to_middle[:, 2])
    pitch = -np.arctan2(to_middle[:, 1], np.hypot(to_middle[:, 0], to_middle[:, 2]))
    return Camera(
        position, rotation(yaw, pitch, 0 * time), focal + 0 * time, (settings.width / 2, settings.height / 2)
    )


def _noisy(image: ByteImage, sigma: float, rng: np.random.Generator) -> ByteImage:
    if not sigma:
        return image
    noise = np.empty(image.shape, np.int8)
    cv2.setRNGSeed(int(rng.integers(2**31)))
    cv2.randn(noise, np.zeros(3), np.full(3, sigma))
    return np.asarray(cv2.add(image, noise, dtype=cv2.CV_8U), np.uint8)


def add_command(stages: Any) -> None:
    """Add ``trackbench h5 example``."""
    parser: argparse.ArgumentParser = stages.add_parser(
        "example", help="make miniature episodes with known keypoints"
    )
    parser.add_argument("output", type=Path, metavar="OUT", help="folder to write to")
    parser.add_argument("--episodes", type=int, default=8, help="number of episodes (default: 8)")
    parser.add_argument("--steps", type=int, default=120, help="steps per episode (default: 120)")
    parser.add_argument("--cameras", type=int, default=2, help="cameras (default: 2)")
    parser.add_argument(
        "--size",
        type=int,
        nargs=2,
        default=(480, 640),
        metavar=("H", "W"),
        help="of the images (default: 480 640)",
    )
    parser.add_argument(
        "--compression", choices=get_args(Compression), default="gzip", help="of the images (default: gzip)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the things and their motion (default: 0)")
    parser.add_argument("--workers", type=int, default=1, help="processes (default: 1)")
    parser.set_defaults(run=_run)


def _run(options: argparse.Namespace) -> int:
    settings = MiniatureSettings(
        steps=options.steps,
        cameras=options.cameras,
        height=options.size[0],
        width=options.size[1],
        compression=options.compression,
        seed=options.seed,
    )
    made = make_episodes(options.output, options.episodes, settings, options.workers)
    Console(stderr=True, highlight=False, soft_wrap=True).print(
        f"{len(made)} episodes -> {options.output}, truth -> {options.output / 'truth'}", markup=False
    )
    return 0
