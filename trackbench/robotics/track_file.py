"""Tracks of one camera as a file: ``cam0.tracks.npz``, and the same as a table. No pickles, read with checks."""

from __future__ import annotations

import csv
import zipfile
import zlib
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from trackbench.files import written_whole
from trackbench.structures import Tracks

LARGEST_FILE = 2**30  # bytes, unpacked: 8 hours of 30 points at 30 fps


@dataclass(frozen=True)
class CameraTracks:
    """Tracks of the K keypoints of a camera through the T frames of an episode.

    Attributes:
        names: (K,) of the keypoints.
        queries: (K, 3) float32, (t, x, y) as they were annotated.
        xy: (K, T, 2) float32, pixels of the camera's image.
        visible: (K, T) bool.
        visibility: (K, T) float32 in [0, 1], the confidence behind ``visible``.
        error: (K, T) float32, forward-backward error in pixels; NaN where it was not measured.
        corrections: (n, 4) float64, (point, t, x, y): places that a reviewer gave, in the order of giving.
        model: name of the tracker.
        weights_sha256: of its checkpoint; "" for a tracker without one.
        annotation_sha256: ``Keypoints.digest`` of the annotation.
        trackbench_version: that tracked.
    """

    names: tuple[str, ...]
    queries: NDArray[np.float32]
    xy: NDArray[np.float32]
    visible: NDArray[np.bool_]
    visibility: NDArray[np.float32]
    error: NDArray[np.float32]
    corrections: NDArray[np.float64]
    model: str
    weights_sha256: str
    annotation_sha256: str
    trackbench_version: str

    def __post_init__(self) -> None:
        K, T = len(self.names), self.visible.shape[-1]
        shapes = {"queries": (K, 3), "xy": (K, T, 2), "visible": (K, T), "visibility": (K, T), "error": (K, T)}
        for key, shape in {**shapes, "corrections": (len(self.corrections), 4)}.items():
            if getattr(self, key).shape != shape:
                raise ValueError(f"{key} must be {shape}, got {getattr(self, key).shape}")
        if not np.isin(self.corrections[:, 0], np.arange(K)).all():
            raise ValueError(f"corrections must name points in 0 ... {K - 1}")

    @property
    def num_frames(self) -> int:
        """T."""
        return self.visible.shape[1]

    def known_places(self, point: int) -> dict[int, NDArray[np.float64]]:
        """Frame -> (2,) pixels where a person put the point: its annotation and corrections, by time."""
        places = {int(self.queries[point, 0]): self.queries[point, 1:].astype(np.float64)}
        for row, t, *xy in self.corrections:
            if row == point:
                places[int(t)] = np.array(xy)
        return dict(sorted(places.items()))

    def drawable(self) -> Tracks:
        """What :func:`trackbench.visualization.overlay` takes."""
        return Tracks(*map(torch.from_numpy, (self.xy, self.visible, self.visibility, self.queries)))


_KINDS = {
    "names": "U",
    "queries": "f",
    "xy": "f",
    "visible": "b",
    "visibility": "f",
    "error": "f",
    "corrections": "f",
    "model": "U",
    "weights_sha256": "U",
    "annotation_sha256": "U",
    "trackbench_version": "U",
}
assert set(_KINDS) == {field.name for field in fields(CameraTracks)}


def read_tracks(path: Path) -> CameraTracks:
    """Read a file of tracks.

    Raises:
        ValueError: it is none, damaged, or its shapes do not belong together.
        FileNotFoundError: there is no such file.
    """
    values = {}
    try:
        with zipfile.ZipFile(path) as archive:
            size = sum(entry.file_size for entry in archive.infolist())
        if size > LARGEST_FILE:
            raise ValueError(f"unpacks to {size / 2**20:.0f} MiB")
        with np.load(path, allow_pickle=False) as file:
            for key, kind in _KINDS.items():
                value = file[key]
                if value.dtype.kind != kind:
                    raise ValueError(f"{key} has dtype {value.dtype}")
                values[key] = value
        text = {key: str(value) for key, value in values.items() if value.ndim == 0}
        names = tuple(map(str, values["names"].tolist()))
        return CameraTracks(**{**values, **text, "names": names})
    except (ValueError, TypeError, KeyError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(f"{path}: not a file of tracks: {error}") from None


def write_tracks(path: Path, tracks: CameraTracks) -> None:
    """Write a file of tracks; it appears whole, and the same tracks give the same bytes."""
    values = {field.name: getattr(tracks, field.name) for field in fields(tracks)}
    values["names"] = np.array(tracks.names, dtype=np.str_)
    with written_whole(path) as unfinished:
        np.savez_compressed(unfinished, **values)


def write_table(path: Path, tracks: CameraTracks) -> None:
    """One row per point and frame: point, name, t, x, y, visible, visibility, error."""
    with written_whole(path) as unfinished, unfinished.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["point", "name", "t", "x", "y", "visible", "visibility", "error"])
        for k, name in enumerate(tracks.names):
            for t in range(tracks.num_frames):
                x, y = tracks.xy[k, t]
                seen, sure, apart = tracks.visible[k, t], tracks.visibility[k, t], tracks.error[k, t]
                error = f"{apart:.3f}" if np.isfinite(apart) else ""
                writer.writerow([k, name, t, f"{x:.3f}", f"{y:.3f}", int(seen), f"{sure:.4f}", error])
