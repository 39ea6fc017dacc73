"""Kubric's MOVi scenes in TFDS directories, with what their point tracks are computed from."""

from __future__ import annotations

from collections.abc import Collection
from copy import deepcopy
from typing import Any

import numpy as np

from trackbench.data.kubric import SampledTracks, sample_tracks
from trackbench.data.tfds.dataset import Example, TfdsDataset
from trackbench.data.tfds.storage import Place

# what trackbench.data.kubric calls them, and TFDS
_FRAMES = {"video": "video", "segmentations": "segmentations", "depth": "depth"}
_SURFACES = {"normal": "normal", "object_coordinates": "object_coordinates"}
_NUMBERS = {
    "depth_range": "metadata/depth_range",
    "bboxes_3d": "instances/bboxes_3d",
    "obj_quaternions": "instances/quaternions",
    "cam_positions": "camera/positions",
    "cam_quaternions": "camera/quaternions",
    "focal_length": "camera/focal_length",
    "sensor_width": "camera/sensor_width",
    "name": "metadata/video_name",
}
TRACK_FEATURES = tuple((_NUMBERS | _FRAMES | _SURFACES).values())
_OF_CAMERA = ("cam_positions", "cam_quaternions")
_OF_INSTANCES = ("bboxes_3d", "obj_quaternions")


class MoviScenes:
    """The scenes of a split of MOVi-E, panning MOVi-E or MOVi-F (Greff et al., CVPR 2022), as published.

    Only what tracks need is read: without the optical flow that is two thirds of a record.

    Args:
        path: or URL, see :class:`~trackbench.data.tfds.dataset.TfdsDataset`, as for the others.
        split: ``train``, ``validation`` or ``test``.
        verify: see there.

    Raises:
        FileNotFoundError: see there.
        ImportError: see there.
        OSError: see there.
        ValueError: see there.
    """

    def __init__(self, path: str | Place, split: str = "train", verify: bool = False) -> None:
        self._examples = TfdsDataset(path, split, TRACK_FEATURES, verify)

    def __len__(self) -> int:
        return len(self._examples)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """A scene as :func:`~trackbench.data.kubric.sample_tracks` takes it, and its ``name``.

        Raises:
            ValueError: a damaged record, or one that does not fit ``features.json``.
        """
        with self._examples.open(index) as example:
            return _read(example, _NUMBERS | _FRAMES | _SURFACES)

    def tracks(
        self, index: int, num_tracks: int, rng: np.random.Generator, num_frames: int | None = None, **options: Any
    ) -> tuple[str, SampledTracks]:
        """Name and sampled tracks of a scene, with no more decoded than they need.

        Args:
            index: of the scene.
            num_tracks: see :func:`~trackbench.data.kubric.sample_tracks`, as for ``options``.
            rng: of all that is random.
            num_frames: T, a random part of a longer scene; None: all of it.
            options: of ``sample_tracks``.

        Raises:
            ValueError: also where the scene is shorter, or its content makes no sense.
        """
        with self._examples.open(index) as example:
            scene = _read(example, _NUMBERS)
            frames = _part(len(scene["cam_positions"]), num_frames, rng)
            scene |= _read(example, _FRAMES, range(frames.start, frames.stop))
            # What is drawn does not depend on surfaces, and these are looked at in frames with a query only, one
            # of four. So a first run, which costs little, tells which of them to decode.
            nothing = np.broadcast_to(np.uint16(0), scene["video"].shape)
            blank = _cut({**scene, **dict.fromkeys(_SURFACES, nothing)}, frames)
            queries = sample_tracks(blank, num_tracks, deepcopy(rng), **{**options, "size": (1, 1)}).queries
            scene |= _read(example, _SURFACES, {int(t) + frames.start for t in queries[:, 0]})
            return scene["name"], sample_tracks(_cut(scene, frames), num_tracks, rng, **options)


def _read(example: Example, names: dict[str, str], images: Collection[int] | None = None) -> dict[str, Any]:
    values = example.read(names.values(), images)
    scene: dict[str, Any] = {key: values[name] for key, name in names.items()}
    for key in {"segmentations", "depth"} & scene.keys():
        scene[key] = scene[key][..., 0]
    return scene


def _cut(scene: dict[str, Any], frames: slice) -> dict[str, Any]:
    of_frames = {key: scene[key][frames] for key in (*_FRAMES, *_SURFACES, *_OF_CAMERA)}
    return {**scene, **of_frames, **{key: scene[key][:, frames] for key in _OF_INSTANCES}}


def _part(length: int, num_frames: int | None, rng: np.random.Generator) -> slice:
    """Which frames of a scene, one after the other."""
    if num_frames is None:
        return slice(0, length)
    if num_frames > length:
        raise ValueError(f"expected at least {num_frames} frames, the scene has {length}")
    start = int(rng.integers(length - num_frames, endpoint=True))
    return slice(start, start + num_frames)
