"""A few sequences in the folder format: dim textured frames with one bright dot that its track follows."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image


def dot_frames(
    xy: np.ndarray, size: tuple[int, int], sigma: float = 2.0, dim: int = 0, seed: int = 0
) -> np.ndarray:
    """(T, H, W, 3) uint8: noise up to ``dim``, and a white dot of 2 px at xy (T, 2), raster pixels."""
    H, W = size
    y, x = np.arange(H)[:, None] + 0.5, np.arange(W) + 0.5
    frames = np.random.default_rng(seed).integers(0, dim + 1, (len(xy), H, W, 3)).astype(np.float64)
    for frame, (u, v) in zip(frames, xy, strict=True):
        dot = np.exp(-((x - u) ** 2 + (y - v) ** 2) / (2 * 2.0**2))[..., None]
        frame += (255 - frame) * dot
    return frames.round().astype(np.uint8)


def wander(rng: np.random.Generator, num_tracks: int, num_frames: int, size: tuple[int, int]) -> np.ndarray:
    """(N, T, 2): tracks that start inside and move by up to 3 px a frame, perhaps out of the frame."""
    start = rng.uniform((4, 4), (size[1] - 4, size[0] - 4), (num_tracks, 1, 2))
    return start + np.arange(num_frames)[:, None] * rng.uniform(-3, 3, (num_tracks, 1, 2))


def write_sequence(
    folder: Path, frames: np.ndarray, coords: np.ndarray, occluded: np.ndarray, **extra: object
) -> None:
    """``folder/frames/000.png``, ... and ``folder/NAME.npy``."""
    (folder / "frames").mkdir(parents=True)
    for t, frame in enumerate(frames):
        Image.fromarray(frame).save(folder / "frames" / f"{t:03}.png")
    content = {"coords": coords.astype(np.float32), "visibility": occluded, **extra}
    np.save(folder / f"{folder.name}.npy", np.array(content, dtype=object), allow_pickle=True)


def write_sequences(
    root: Path, count: int = 3, num_tracks: int = 40, num_frames: int = 6, size: tuple[int, int] = (64, 80)
) -> Path:
    """Sequences ``0000``, ...; track 0 is the dot. Points outside the frame are marked as occluded."""
    for number in range(count):
        rng = np.random.default_rng(number)
        xy = wander(rng, num_tracks, num_frames, size)
        outside = ((xy < 0) | (xy >= size[::-1])).any(axis=2)
        write_sequence(root / f"{number:04}", dot_frames(xy[0], size, dim=40, seed=number), xy, outside)
    return root
