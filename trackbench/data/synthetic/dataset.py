"""Clips with exact tracks, made when they are asked for."""

from __future__ import annotations

from typing import Literal

import numpy as np
import torch
from torch.utils.data import Dataset

from trackbench.data.synthetic.compose import SceneSettings, random_scene
from trackbench.data.synthetic.motion import FloatArray
from trackbench.data.synthetic.render import render
from trackbench.data.synthetic.scene import BoolArray, IntArray, Scene
from trackbench.data.synthetic.textures import Split
from trackbench.structures import VideoBatch

QueryTime = Literal["first", "random", "start"]
SPLITS: tuple[Split, ...] = ("train", "val")
QUERY_TIMES: tuple[QueryTime, ...] = ("first", "random", "start")


class SyntheticDataset(Dataset[VideoBatch]):
    """Textured objects in front of a wall, under a moving camera. Clip i depends on (seed, split, i) alone.

    The ground truth is in closed form (see :mod:`trackbench.data.synthetic.scene`, which also says when
    exactly a point counts as visible). Tracks continue, with their true positions, where points are hidden or
    out of frame.

    Args:
        num_frames: T.
        height: H, pixels.
        width: W, pixels.
        num_points: N per clip; each is visible in at least one frame.
        seed: non-negative.
        length: number of clips; None: endless, and ``len`` raises TypeError.
        split: ``"train"`` or ``"val"``: different clips, of different photographs.
        objects: least and most number of objects per clip.
        photos: use scikit-image's photographs besides procedural textures.
        query_time: the frame of a point's query: the ``"first"`` in which it is visible, a ``"random"`` one
            in which it is visible, or ``"start"``: frame 0, with points that are visible there.
        motion: speed relative to the default; 0: nothing moves.
        object_share: share of the points that lie on objects, as far as objects are in sight.
        blur: share of clips with a slight lens blur.
        noise: share of clips with sensor noise.

    Raises:
        ValueError: an argument is outside its range.
    """

    def __init__(
        self,
        num_frames: int = 24,
        height: int = 256,
        width: int = 256,
        num_points: int = 256,
        seed: int = 0,
        length: int | None = None,
        split: Split = "train",
        objects: tuple[int, int] = (3, 8),
        photos: bool = True,
        query_time: QueryTime = "random",
        motion: float = 1.0,
        object_share: float = 0.5,
        blur: float = 0.3,
        noise: float = 0.5,
    ) -> None:
        if split not in SPLITS:
            raise ValueError(f"split must be one of {SPLITS}, got {split!r}")
        if query_time not in QUERY_TIMES:
            raise ValueError(f"query_time must be one of {QUERY_TIMES}, got {query_time!r}")
        for key, value, least in (
            ("num_frames", num_frames, 1),
            ("height", height, 8),
            ("width", width, 8),
            ("num_points", num_points, 1),
            ("seed", seed, 0),
            ("length", 0 if length is None else length, 0),
            ("motion", motion, 0),
        ):
            if value < least:
                raise ValueError(f"{key} must be at least {least}, got {value}")
        for key, share in (("object_share", object_share), ("blur", blur), ("noise", noise)):
            if not 0 <= share <= 1:
                raise ValueError(f"{key} must be in [0, 1], got {share}")
        if len(objects) != 2 or not 0 <= objects[0] <= objects[1]:
            raise ValueError(f"objects must be (least, most) with 0 <= least <= most, got {tuple(objects)}")
        self.settings = SceneSettings(
            num_frames=num_frames,
            height=height,
            width=width,
            objects=(int(objects[0]), int(objects[1])),
            photos=photos,
            motion=motion,
            blur=blur,
            noise=noise,
            split=split,
        )
        self.num_points = num_points
        self.seed = seed
        self.length = length
        self.query_time = query_time
        self.object_share = object_share

    def __len__(self) -> int:
        """Number of clips; TypeError if there is no end of them."""
        if self.length is None:
            raise TypeError("an endless SyntheticDataset has no length")
        return self.length

    def scene(self, index: int) -> tuple[Scene, np.random.Generator]:
        """The scene of clip ``index``, and the generator from which its noise and points are drawn next."""
        if index < 0 or (self.length is not None and index >= self.length):
            raise IndexError(f"clip {index} of {'endless' if self.length is None else self.length}")
        rng = np.random.default_rng([self.seed, SPLITS.index(self.settings.split), index])
        return random_scene(rng, self.settings), rng

    def __getitem__(self, index: int) -> VideoBatch:
        """Clip ``index`` as a batch of one."""
        scene, rng = self.scene(index)
        video = render(scene, rng)
        exact_xy, visible = sample_tracks(
            scene, rng, self.num_points, self.object_share, from_start=self.query_time == "start"
        )
        xy = exact_xy.astype(np.float32)
        time = query_times(rng, visible, self.query_time)
        at = np.take_along_axis(xy, time[:, None, None], axis=1)[:, 0]
        queries = np.concatenate([time[:, None].astype(np.float32), at], axis=1)
        return VideoBatch(
            video=torch.from_numpy(np.ascontiguousarray(video.transpose(0, 3, 1, 2)))[None],
            queries=torch.from_numpy(queries)[None],
            xy=torch.from_numpy(xy)[None],
            visible=torch.from_numpy(visible)[None],
            names=[f"synthetic/{self.settings.split}/{self.seed}/{index}"],
        )


def sample_tracks(
    scene: Scene, rng: np.random.Generator, num_points: int, object_share: float, from_start: bool
) -> tuple[FloatArray, BoolArray]:
    """Tracks of random visible points.

    Points are what is seen at random positions of random frames (of frame 0, if ``from_start``), chosen so
    that ``object_share`` of them lie on objects and the others on the wall, or as near to that as the scene
    allows.

    Returns:
        xy (N, T, 2) and visible (N, T), each point visible at least once.
    """
    count = 8 * num_points
    frame = rng.integers(1 if from_start else scene.num_frames, size=count)
    xy = rng.uniform((0.5, 0.5), (scene.width - 0.5, scene.height - 0.5), (count, 2))
    layer = scene.top_layer(xy, frame)
    chosen = _choose(layer, num_points, object_share)
    points = np.empty((num_points, 2))
    for index in np.unique(layer[chosen]):
        mine = chosen[layer[chosen] == index]
        points[layer[chosen] == index] = scene.layers[index].to_texture(xy[mine], frame[mine])
    tracks, visible = scene.tracks(layer[chosen], points)
    # true by construction, but rounding may put a point that was drawn on an edge on its other side
    visible[np.arange(num_points), frame[chosen]] = True
    return tracks, visible


def _choose(layer: IntArray, num_points: int, object_share: float) -> IntArray:
    """Indices of ``num_points`` candidates, ``object_share`` of them on objects if there are as many."""
    on_object, on_wall = np.flatnonzero(layer > 0), np.flatnonzero(layer == 0)
    wanted = min(round(object_share * num_points), len(on_object))
    wanted = max(wanted, num_points - len(on_wall))
    # in the order in which they were drawn, so that any part of the points is a mixture as well
    return np.sort(np.concatenate([on_object[:wanted], on_wall[: num_points - wanted]]))


def query_times(rng: np.random.Generator, visible: BoolArray, query_time: QueryTime) -> IntArray:
    """A frame (N,) for each point's query, in which it is visible (N, T)."""
    if query_time == "start":
        return np.zeros(len(visible), np.int64)
    if query_time == "first":
        return visible.argmax(axis=1)
    return np.where(visible, rng.random(visible.shape), -1.0).argmax(axis=1)
