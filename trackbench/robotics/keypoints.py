"""Named keypoints of a camera, in labelme's JSON (github.com/wkentaro/labelme, 5.x and 6.x).

A keypoint is a shape of type ``point``; its label is its name. Two more keys of a shape are ours, and labelme
keeps them: ``frame``, the frame that was annotated (0 where it is missing), and ``confidence`` in [0, 1] of a
point that a machine placed. labelme's canvas has trackbench's convention: the centre of the first pixel is 0.5.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trackbench.files import written_whole

LABELME_VERSION = "5.5.0"  # whose format is written
LARGEST_FILE = 64 * 2**20  # bytes; embedded images take some
LONGEST_NAME = 100
LOW_CONFIDENCE = 0.5  # below it a point gets labelme's flag "low_confidence"


@dataclass(frozen=True)
class Keypoints:
    """Named points of one camera.

    Attributes:
        names: K different ones.
        xy: (K, 2) float64, pixels.
        frame: (K,) int64, the frame that each was annotated on; None stands for frame 0 and becomes zeros.
        confidence: (K,) float64 in [0, 1]; None where a person placed the points.
    """

    names: tuple[str, ...]
    xy: NDArray[np.float64]
    frame: NDArray[np.int64] = None  # type: ignore[assignment]
    confidence: NDArray[np.float64] | None = None

    def __post_init__(self) -> None:
        K = len(self.names)
        object.__setattr__(self, "xy", np.array(self.xy, np.float64).reshape(-1, 2))
        frame = np.zeros(K, np.int64) if self.frame is None else np.array(self.frame, np.int64)
        object.__setattr__(self, "frame", frame)
        if self.confidence is not None:
            object.__setattr__(self, "confidence", np.array(self.confidence, np.float64))
        for values in (self.xy, self.frame, self.confidence):
            if values is not None and len(values) != K:
                raise ValueError(f"{K} names need xy ({K}, 2), frame ({K},) and confidence ({K},)")

    @property
    def digest(self) -> str:
        """SHA-256 of names, places and frames: the same however and in whichever order a file writes them."""
        content = sorted(zip(self.names, self.xy.tolist(), self.frame.tolist(), strict=True))
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()

    def in_order_of(self, names: tuple[str, ...]) -> Keypoints:
        """The same points in another order.

        Raises:
            ValueError: the names are not the same ones.
        """
        if set(names) != set(self.names):
            missing, extra = sorted(set(names) - set(self.names)), sorted(set(self.names) - set(names))
            parts = [f"misses {', '.join(missing)}"] * bool(missing) + [f"adds {', '.join(extra)}"] * bool(extra)
            raise ValueError(" and ".join(parts))
        order = [self.names.index(name) for name in names]
        confidence = None if self.confidence is None else self.confidence[order]
        return Keypoints(names, self.xy[order], self.frame[order], confidence)


def read_annotation(path: Path, height: int, width: int, num_frames: int = 1) -> Keypoints:
    """Read a labelme file; the image inside it is not looked at.

    Args:
        path: the file.
        height: of the frames, pixels.
        width: of the frames, pixels.
        num_frames: of the episode; keypoints may stand on any of them.

    Raises:
        ValueError: no labelme file, larger than 64 MiB, of an image of another size; no keypoint at all, a shape
            that is no point (it is not ignored: it may be a keypoint drawn with the wrong tool), a name twice, a
            point outside the frame. One line that names the file.
        FileNotFoundError: there is no such file.
    """
    content = _json(path)
    if not isinstance(content, dict) or not isinstance(content.get("shapes"), list):
        raise ValueError(f"{path}: not a labelme file: expected an object with a list `shapes`")
    for key, side in (("imageHeight", height), ("imageWidth", width)):
        if content.get(key) is not None and content[key] != side:
            raise ValueError(f"{path}: {key} is {_short(content[key])}, the frames of the episode have {side}")
    if not content["shapes"]:
        raise ValueError(f"{path}: no keypoints: `shapes` is empty")
    names, xy, frames, confidence = [], [], [], []
    for index, shape in enumerate(content["shapes"]):
        where = f"{path}: shape {index}"
        if not isinstance(shape, dict):
            raise ValueError(f"{where}: expected an object, got {_short(shape)}")
        name = _name(shape.get("label"), where)
        where += f" {name!r}"
        kind = shape.get("shape_type")
        if kind != "point":
            raise ValueError(f"{where} has shape_type {_short(kind)}, expected 'point': redraw or delete it")
        if name in names:
            raise ValueError(f"{where}: this name stands there twice; keypoints need different names")
        x, y = _point(shape.get("points"), where)
        if not (0 <= x <= width and 0 <= y <= height):
            raise ValueError(f"{where} at ({x:g}, {y:g}) lies outside the frame, {width} x {height}")
        frame = shape.get("frame", 0)
        if not _is_int(frame) or not 0 <= frame < num_frames:
            raise ValueError(
                f"{where}: frame must be a whole number in [0, {num_frames - 1}], got {_short(frame)}"
            )
        names.append(name)
        xy.append((x, y))
        frames.append(frame)
        confidence.append(_confidence(shape.get("confidence"), where))
    placed = [value for value in confidence if value is not None]
    known = np.array([1.0 if value is None else value for value in confidence]) if placed else None
    return Keypoints(tuple(names), np.array(xy), np.array(frames), known)


def write_annotation(
    path: Path,
    keypoints: Keypoints,
    *,
    image: str,
    height: int,
    width: int,
    origin: dict[str, Any] | None = None,
) -> None:
    """Write a file that labelme opens; it appears whole, and replaces what is there.

    Args:
        path: where to.
        keypoints: the points; their confidence, where they have one, is written out in ``description``, and those
            below ``LOW_CONFIDENCE`` get the flag ``low_confidence``.
        image: name of the picture in the same folder.
        height: of the picture, pixels.
        width: of the picture, pixels.
        origin: how the points came about, kept under the key ``trackbench``.
    """
    shapes = []
    for index, name in enumerate(keypoints.names):
        shape: dict[str, Any] = {
            "label": name,
            "points": [keypoints.xy[index].tolist()],
            "group_id": None,
            "description": "",
            "shape_type": "point",
            "flags": {},
            "mask": None,
        }
        if keypoints.frame[index]:
            shape["frame"] = int(keypoints.frame[index])
        if keypoints.confidence is not None:
            value = float(keypoints.confidence[index])
            shape["confidence"] = value
            shape["description"] = f"confidence {value:.2f}"
            shape["flags"] = {"low_confidence": value < LOW_CONFIDENCE}
        shapes.append(shape)
    content: dict[str, Any] = {
        "version": LABELME_VERSION,
        "flags": {},
        "shapes": shapes,
        "imagePath": image,
        "imageData": None,
        "imageHeight": height,
        "imageWidth": width,
    }
    if origin is not None:
        content["trackbench"] = origin
    with written_whole(path) as unfinished:
        unfinished.write_text(json.dumps(content, ensure_ascii=False, indent=2), encoding="utf-8")


def read_origin(path: Path) -> dict[str, Any]:
    """What :func:`write_annotation` was told about how the points came about; {} where nothing is written."""
    content = _json(path)
    origin = content.get("trackbench") if isinstance(content, dict) else None
    return origin if isinstance(origin, dict) else {}


def _json(path: Path) -> Any:
    size = path.stat().st_size
    if size > LARGEST_FILE:
        raise ValueError(f"{path}: {size / 2**20:.0f} MiB is too large for an annotation, at most 64 MiB")
    try:
        return json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:  # not UTF-8, not JSON, nested without end
        raise ValueError(f"{path}: not JSON: {error}") from None


def _name(label: Any, where: str) -> str:
    if not isinstance(label, str) or not label.strip() or len(label) > LONGEST_NAME or not label.isprintable():
        raise ValueError(
            f"{where}: label must be a printable name of at most {LONGEST_NAME} characters, got {_short(label)}"
        )
    return label


def _point(points: Any, where: str) -> tuple[float, float]:
    if (
        not isinstance(points, list)
        or len(points) != 1
        or not isinstance(points[0], list)
        or len(points[0]) != 2
        or not all(_is_number(value) for value in points[0])
    ):
        raise ValueError(f"{where}: points must be [[x, y]], got {_short(points)}")
    return float(points[0][0]), float(points[0][1])


def _confidence(value: Any, where: str) -> float | None:
    if value is not None and not (_is_number(value) and 0 <= value <= 1):
        raise ValueError(f"{where}: confidence must lie in [0, 1], got {_short(value)}")
    return None if value is None else float(value)


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    if isinstance(value, float):
        return bool(np.isfinite(value))
    return _is_int(value) and abs(value) < 2**53


def _short(value: Any) -> str:
    """What a file holds, for a message: files can hold anything."""
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
