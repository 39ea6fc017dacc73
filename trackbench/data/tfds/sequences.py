"""Scenes of a TFDS directory as the sequences that CoTracker and Track-On generate from them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from trackbench.data.clip import Clip, Size
from trackbench.data.tfds.scenes import MoviScenes

NUM_TRACKS = 2048
_TRACKS = 3  # keeps this random stream apart


@dataclass(frozen=True)
class SceneSequence:
    """One scene with its tracks.

    Attributes:
        whole: all frames and tracks.
    """

    whole: Clip

    @property
    def num_frames(self) -> int:
        """T of the scene."""
        return len(self.whole.frames)

    def clip(self, start: int, num_frames: int) -> Clip:
        """The frames from ``start`` on.

        Raises:
            ValueError: the scene is too short.
        """
        stop = start + num_frames
        if not 0 <= start < stop <= self.num_frames:
            raise ValueError(
                f"{self.whole.name}: expected at least {stop} frames from {start} on, it has {self.num_frames}"
            )
        return Clip(
            self.whole.frames[start:stop],
            self.whole.xy[:, start:stop],
            self.whole.visible[:, start:stop],
            self.whole.name,
        )


class SceneSequences:
    """Scenes with the tracks that the published folders hold, made when a sequence is read.

    As in the recipe of CoTracker's MOVi-F (its issue 8): up to 2,048 tracks on a grid of stride 4, at most a
    tenth of the grid's points on an object, through one random crop that is scaled to the scene's size. A scene
    has the same tracks and the same crop whenever it is read, as it would from a folder.

    Args:
        scenes: such as those of MOVi-F.
        num_tracks: per scene, at most.
        official_quirks: see :func:`~trackbench.data.kubric.sample_tracks`.
    """

    def __init__(self, scenes: MoviScenes, num_tracks: int = NUM_TRACKS, official_quirks: bool = False) -> None:
        self.scenes = scenes
        self.num_tracks = num_tracks
        self.official_quirks = official_quirks

    def __len__(self) -> int:
        return len(self.scenes)

    def __getitem__(self, index: int) -> SceneSequence:
        """The sequence of a scene.

        Raises:
            ValueError: see :meth:`MoviScenes.tracks`.
        """
        if not 0 <= index < len(self):
            raise IndexError(f"sequence {index} of {len(self)}")
        return SceneSequence(published_clip(self.scenes, index, self.num_tracks, None, self.official_quirks))


def published_clip(
    scenes: MoviScenes,
    number: int,
    num_tracks: int = NUM_TRACKS,
    size: Size | None = None,
    official_quirks: bool = False,
) -> Clip:
    """A scene with the tracks of CoTracker's recipe, the same for the same number: see :class:`SceneSequences`.

    Args:
        scenes: such as those of MOVi-F.
        number: of the sequence. From ``len(scenes)`` on scenes come again, with another crop and other tracks.
        num_tracks: at most.
        size: (height, width) of the clip; None: as the scene.
        official_quirks: see :func:`~trackbench.data.kubric.sample_tracks`.

    Raises:
        ValueError: see :meth:`MoviScenes.tracks`.
    """
    name, tracks = scenes.tracks(
        number % len(scenes),
        num_tracks,
        np.random.default_rng([_TRACKS, number]),
        random_crop=True,
        size=size,
        official_quirks=official_quirks,
    )
    return tracks.clip(name)
