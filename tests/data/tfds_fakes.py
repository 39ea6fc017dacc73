"""TFDS directories written byte by byte, after the specifications of PNG, protobuf and TFRecord; small scenes."""

from __future__ import annotations

import json
import struct
import zlib
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np

Example = dict[str, Any]

T, SIDE = 8, 32  # frames, pixels
PLATE = (6, 8, 16, 18)  # of the first scene: left, top, right, bottom pixel edges in frame 0
NEAR, FAR = 5.0, 10.0  # metres: planes of the plate and of the wall
RANGE = (4.0, 16.0)


# --- bytes ---------------------------------------------------------------------------------------------------


def crc32c(data: bytes) -> int:
    """Bit by bit, after RFC 3720."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = (crc >> 1) ^ (0x82F63B78 if crc & 1 else 0)
    return crc ^ 0xFFFFFFFF


def masked(data: bytes) -> bytes:
    crc = crc32c(data)
    return struct.pack("<I", (((crc >> 15) | (crc << 17)) + 0xA282EAD8) & 0xFFFFFFFF)


def tfrecord(records: Sequence[bytes], checksums: bool = False) -> bytes:
    """Records' own checksums are zero unless asked for: bit by bit they take a second for a megabyte."""
    parts = []
    for record in records:
        length = struct.pack("<Q", len(record))
        parts += [length, masked(length), record, masked(record) if checksums else bytes(4)]
    return b"".join(parts)


def png(image: np.ndarray) -> bytes:
    """(H, W, C) of 8 or 16 bits, with C 1 or 3, not filtered."""
    H, W, C = image.shape

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    rows = image.astype(">u2" if image.itemsize == 2 else "u1").reshape(H, -1)
    lines = b"".join(b"\0" + row.tobytes() for row in rows)
    header = struct.pack(">IIBBBBB", W, H, 8 * image.itemsize, {1: 0, 3: 2}[C], 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(lines, 1))
        + chunk(b"IEND", b"")
    )


def varint(value: int) -> bytes:
    value &= 2**64 - 1
    out = bytearray()
    while value >= 0x80:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*out, value])


def field(number: int, content: bytes) -> bytes:
    return varint(number << 3 | 2) + varint(len(content)) + content


def feature(value: Any, packed: bool = True) -> bytes:
    """A Feature: of bytes for a list of bytes, else of floats or integers by the array's type."""
    if isinstance(value, list):
        return field(1, b"".join(field(1, item) for item in value))
    flat = np.asarray(value).reshape(-1)
    if flat.dtype.kind == "f":
        items = [struct.pack("<f", number) for number in flat]
        return field(2, field(1, b"".join(items)) if packed else b"".join(varint(1 << 3 | 5) + i for i in items))
    items = [varint(int(number)) for number in flat]
    return field(3, field(1, b"".join(items)) if packed else b"".join(varint(1 << 3) + i for i in items))


def example(content: Example, packed: bool = True, key_first: bool = True) -> bytes:
    entries = []
    for name, value in content.items():
        parts = [field(1, name.encode()), field(2, feature(value, packed))]
        entries.append(field(1, b"".join(parts if key_first else parts[::-1])))
    return field(1, b"".join(entries))


# --- descriptions --------------------------------------------------------------------------------------------

_CLASS = "tensorflow_datasets.core.features."


def _shape(*shape: int | None) -> dict[str, Any]:
    return {"shape": {"dimensions": [str(-1 if n is None else n) for n in shape]}} if shape else {"shape": {}}


def tensor(dtype: str, *shape: int | None) -> dict[str, Any]:
    content = {**_shape(*shape), "dtype": dtype, "encoding": "none"}
    return {"pythonClassName": f"{_CLASS}tensor_feature.Tensor", "tensor": content}


def images(dtype: str, *shape: int | None) -> dict[str, Any]:
    content = {**_shape(*shape), "dtype": dtype, "encodingFormat": "png"}
    return {"pythonClassName": f"{_CLASS}video_feature.Video", "video": content}


def sequence(inner: dict[str, Any], length: int = -1) -> dict[str, Any]:
    content = {"feature": inner, "length": str(length)}
    return {"pythonClassName": f"{_CLASS}sequence_feature.Sequence", "sequence": content}


def sequence_of_images(dtype: str, length: int, *shape: int) -> dict[str, Any]:
    content = {**_shape(*shape), "dtype": dtype}
    return sequence({"pythonClassName": f"{_CLASS}image_feature.Image", "image": content}, length)


def text() -> dict[str, Any]:
    return {"pythonClassName": f"{_CLASS}text_feature.Text", "text": {}}


def features(**inner: dict[str, Any]) -> dict[str, Any]:
    return {"pythonClassName": f"{_CLASS}features_dict.FeaturesDict", "featuresDict": {"features": inner}}


def in_old_layout(node: dict[str, Any]) -> dict[str, Any]:
    """As TFDS wrote it before 4.5."""
    kind = node["pythonClassName"]
    name, content = next((k, dict(v)) for k, v in node.items() if isinstance(v, dict))
    if name == "featuresDict":
        return {"type": kind, "content": {k: in_old_layout(v) for k, v in content["features"].items()}}
    if name == "sequence":
        length = None if content["length"] == "-1" else int(content["length"])
        return {"type": kind, "content": {"feature": in_old_layout(content["feature"]), "length": length}}
    if "shape" in content:
        content["shape"] = [None if n == "-1" else int(n) for n in content["shape"].get("dimensions", ())]
    if "encodingFormat" in content:
        content["encoding_format"] = content.pop("encodingFormat")
    return {"type": kind, "content": content}


def movi_features(frames: int = T, height: int = SIDE, width: int = SIDE) -> dict[str, Any]:
    """What tracks are made from, and flow, which they are not made from."""
    return features(
        video=images("uint8", frames, height, width, 3),
        segmentations=sequence_of_images("uint8", frames, height, width, 1),
        depth=sequence_of_images("uint16", frames, height, width, 1),
        normal=images("uint16", frames, height, width, 3),
        object_coordinates=images("uint16", frames, height, width, 3),
        forward_flow=sequence(tensor("uint16", height, width, 2), frames),
        metadata=features(video_name=text(), depth_range=tensor("float32", 2)),
        camera=features(
            focal_length=tensor("float32"),
            sensor_width=tensor("float32"),
            positions=tensor("float32", frames, 3),
            quaternions=tensor("float32", frames, 4),
        ),
        instances=sequence(
            features(quaternions=tensor("float32", frames, 4), bboxes_3d=tensor("float32", frames, 8, 3))
        ),
    )


def write_dataset(
    folder: Path,
    splits: dict[str, list[list[bytes]]],
    description: dict[str, Any],
    name: str = "movi_f",
    checksums: bool = False,
) -> Path:
    """``features.json``, ``dataset_info.json`` and the shards, each a list of records, of each split."""
    folder.mkdir(parents=True)
    (folder / "features.json").write_text(json.dumps(description))
    info = {
        "name": name,
        "version": "1.0.0",
        "fileFormat": "tfrecord",
        "splits": [
            {
                "name": split,
                "shardLengths": [str(len(records)) for records in shards],
                "filepathTemplate": "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}",
            }
            for split, shards in splits.items()
        ],
    }
    (folder / "dataset_info.json").write_text(json.dumps(info))
    for split, shards in splits.items():
        for index, records in enumerate(shards):
            file = folder / f"{name}-{split}.tfrecord-{index:05}-of-{len(shards):05}"
            file.write_bytes(tfrecord(records, checksums))
    return folder


# --- scenes --------------------------------------------------------------------------------------------------


def scene(number: int = 0) -> dict[str, np.ndarray]:
    """A plate that moves by one pixel a frame to the right, in front of a wall; the camera stands still.

    The camera is at the origin and looks along -z; its focal length is its sensor's width, so that a metre at
    distance z is SIDE / z pixels.
    """
    rng = np.random.default_rng(number)
    left, top, right, bottom = np.add(PLATE, number % 3)
    y, x = np.meshgrid(np.arange(SIDE), np.arange(SIDE), indexing="ij")
    ray = np.stack([(x + 0.5) / SIDE - 0.5, 0.5 - (y + 0.5) / SIDE, -np.ones_like(x, float)], axis=-1)
    stretch = np.linalg.norm(ray, axis=-1)
    wall = rng.integers(0, 256, (SIDE, SIDE, 3))
    paint = rng.integers(0, 256, (bottom - top, right - left, 3))

    segmentations = np.zeros((T, SIDE, SIDE), np.uint8)
    metres = np.broadcast_to(FAR * stretch, (T, SIDE, SIDE)).copy()
    video = np.broadcast_to(wall, (T, SIDE, SIDE, 3)).astype(np.uint8)
    coordinates = np.zeros((T, SIDE, SIDE, 3))
    corners = np.empty((1, T, 8, 3))
    to_metres = NEAR / SIDE
    size = np.array([(right - left) * to_metres, (bottom - top) * to_metres, 0.002])
    for t in range(T):
        on = np.s_[t, top:bottom, left + t : right + t]
        segmentations[on] = 1
        metres[on] = NEAR * stretch[on[1:]]
        video[on] = paint
        u = (x[on[1:]] + 0.5 - left - t) / (right - left)
        v = (bottom - y[on[1:]] - 0.5) / (bottom - top)
        coordinates[on] = np.stack([u, v, np.full_like(u, 0.5)], axis=-1)
        middle = [
            ((left + right) / 2 + t - SIDE / 2) * to_metres,
            (SIDE / 2 - (top + bottom) / 2) * to_metres,
            -NEAR,
        ]
        corners[0, t] = np.array(list(product((-0.5, 0.5), repeat=3))) * size + middle
    normal = np.broadcast_to([32768, 32768, 65535], (T, SIDE, SIDE, 3))  # all face the camera
    upright = np.array([1.0, 0, 0, 0], np.float32)
    return {
        "video": video,
        "segmentations": segmentations[..., None],
        "depth": np.rint((metres - RANGE[0]) / (RANGE[1] - RANGE[0]) * 65535).astype(np.uint16)[..., None],
        "normal": normal.astype(np.uint16),
        "object_coordinates": np.rint(coordinates * 65535).astype(np.uint16),
        "forward_flow": rng.integers(0, 65536, (T, SIDE, SIDE, 2)).astype(np.uint16),
        "metadata/depth_range": np.array(RANGE, np.float32),
        "camera/focal_length": np.float32(32),
        "camera/sensor_width": np.float32(32),
        "camera/positions": np.zeros((T, 3), np.float32),
        "camera/quaternions": np.tile(upright, (T, 1)),
        "instances/quaternions": np.tile(upright, (1, T, 1)),
        "instances/bboxes_3d": corners.astype(np.float32),
    }


IMAGES = ("video", "segmentations", "depth", "normal", "object_coordinates")


def scene_record(content: dict[str, np.ndarray], name: str, **how: bool) -> bytes:
    stored: Example = {key: [png(i) for i in value] if key in IMAGES else value for key, value in content.items()}
    return example({**stored, "metadata/video_name": [name.encode()]}, **how)


def write_movi(
    folder: Path,
    shards: Sequence[int] = (2, 3),
    validation: int = 2,
    name: str = "movi_f",
    checksums: bool = False,
) -> Path:
    """Scenes ``scene 0``, ... in shards of these lengths, and ``scene 100``, ... for validation."""
    names = iter(range(sum(shards)))
    train = [[scene_record(scene(i), f"scene {i}") for _, i in zip(range(n), names, strict=False)] for n in shards]
    held_out = [[scene_record(scene(i), f"scene {i}") for i in range(100, 100 + validation)]]
    return write_dataset(folder, {"train": train, "validation": held_out}, movi_features(), name, checksums)
