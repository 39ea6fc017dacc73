"""Miniatures of PointOdyssey, EgoPoints and Dynamic Replica in their published layouts: a texture that pans."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

STEP = (3.0, -2.0)  # pixels that everything moves from frame to frame


def panning(num_frames: int, size: tuple[int, int], num_points: int, seed: int = 0) -> tuple[Any, Any, Any]:
    """Frames (T, H, W, 3) of a smooth texture, xy (T, N, 2) raster pixels, inside (T, N) with a margin of 8 px."""
    H, W = size
    rng = np.random.default_rng(seed)
    dx, dy = np.arange(num_frames) * STEP[0], np.arange(num_frames) * STEP[1]
    canvas = (H + int(abs(dy).max()) + 1, W + int(abs(dx).max()) + 1)
    noise = Image.fromarray(rng.integers(0, 256, (canvas[0] // 4, canvas[1] // 4, 3), dtype=np.uint8))
    texture = np.asarray(noise.resize(canvas[::-1], Image.Resampling.BICUBIC))
    left, top = (dx.max() - dx).astype(int), (dy.max() - dy).astype(int)
    frames = np.stack([texture[y : y + H, x : x + W] for x, y in zip(left, top, strict=True)])
    start = rng.uniform((8, 8), (W - 8, H - 8), (num_points, 2))
    xy = start + np.stack([dx, dy], axis=1)[:, None]
    inside = ((xy >= 8) & (xy <= (W - 8, H - 8))).all(axis=2)
    return frames, xy.astype(np.float32), inside


def write_jpegs(folder: Path, frames: Any, name: str, first: int) -> None:
    folder.mkdir(parents=True)
    for t, frame in enumerate(frames):
        Image.fromarray(frame).save(folder / name.format(t + first), quality=95)


def write_point_odyssey(
    folder: Path, frames: Any, xy: Any, visible: Any, valid: Any, file: str = "anno.npz"
) -> None:
    """One sequence of version 1.2, with what else lies beside it."""
    write_jpegs(folder / "rgbs", frames, "rgb_{:05}.jpg", 0)
    T, N = visible.shape
    np.savez(
        folder / file,
        trajs_2d=xy,
        trajs_3d=np.array([None]),  # as some sequences have it: must not be read
        visibs=visible,
        valids=valid,
        intrinsics=np.zeros((T, 3, 3)),
        extrinsics=np.zeros((T, 4, 4)),
    )
    np.savez(folder / "info.npz", trajs_2d=np.array([T, N, 2]))
    (folder / "depths").mkdir()


def write_egopoints(folder: Path, frames: Any, **arrays: Any) -> None:
    """One sequence; arrays as in the README of the data set, those not given are 0."""
    write_jpegs(folder / "rgbs", frames, "frame_{:010}.jpg", 1)
    zeros = np.zeros(arrays["valids"].shape)
    names = ("visibs", "vis_valids", "out_of_view", "occluded")
    np.savez(folder / "annot.npz", **{**dict.fromkeys(names, zeros), **arrays})


def write_dynamic_replica(root: Path, sequences: dict[str, tuple[Any, Any, Any]], split: str = "valid") -> None:
    """A split with the left camera of each sequence (frames, xy, visible), and annotations of the right one."""
    annotations = []
    for name, (frames, xy, visible) in sequences.items():
        for camera in ("left", "right"):
            for t, frame in enumerate(frames):
                path = f"{name}_source_{camera}/trajectories/{t:06}.pth"
                annotations.append(
                    {
                        "sequence_name": name,
                        "frame_number": t,
                        "frame_timestamp": t / 30,
                        "image": {
                            "path": f"{name}_source_{camera}/images/{name}_source_{camera}-{t:04}.png",
                            "size": frame.shape[:2],
                        },
                        "camera_name": camera,
                        "trajectories": {"path": path},
                    }
                )
                if camera == "right":
                    continue
                (root / split / path).parent.mkdir(parents=True, exist_ok=True)
                depth = np.ones((xy.shape[1], 1), np.float32)
                content = {
                    "traj_2d": torch.from_numpy(np.concatenate([xy[t], depth], axis=1)),
                    "traj_3d_world": torch.zeros(xy.shape[1], 3),
                    "verts_inds_vis": torch.from_numpy(visible[t].copy()),
                    "img": torch.from_numpy(frame.copy()),
                    "instances": torch.zeros(xy.shape[1]),
                }
                torch.save(content, root / split / path)
    with gzip.open(root / split / f"frame_annotations_{split}.jgz", "wt", encoding="utf-8") as file:
        json.dump(annotations, file)
