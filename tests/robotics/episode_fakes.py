"""Small episode files, written without the code under test."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import h5py
import numpy as np

T, V, H, W = 6, 2, 24, 32


def pixels(t: int, camera: int, height: int = H, width: int = W) -> np.ndarray:
    """(H, W, 3) uint8: smooth, so that encoding keeps it, and different for every frame, camera and channel."""
    y, x = np.mgrid[:height, :width]
    planes = [60 + 20 * c + 4 * t + 30 * camera + (2 + c) * x + 2 * y for c in range(3)]
    return np.clip(np.stack(planes, axis=-1), 0, 255).astype(np.uint8)


def step_images(t: int, cameras: int = V, height: int = H, width: int = W) -> np.ndarray:
    """(1, V, 3, H, W) uint8."""
    return np.stack([pixels(t, camera, height, width).transpose(2, 0, 1) for camera in range(cameras)])[None]


def write_episode(
    path: Path,
    numbers: Iterable[int] = range(T),
    *,
    name: str = "step_{}",
    key: str = "obs/image",
    change: Callable[[np.ndarray], np.ndarray] = lambda images: images,
    fps: float | None = None,
    height: int = H,
    width: int = W,
    cameras: int = V,
    **storage: Any,
) -> Path:
    """An episode: frame t is that of :func:`pixels`, whatever the step's number; ``change`` makes the layout."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with h5py.File(path, "w") as file:
        if fps is not None:
            file.attrs["fps"] = fps
        for t, number in enumerate(numbers):
            step = file.create_group(name.format(number))
            images = change(step_images(t, cameras, height, width))
            step.create_dataset(key, data=images, **storage)
            step["action"] = np.arange(3.0) + t
    return path
