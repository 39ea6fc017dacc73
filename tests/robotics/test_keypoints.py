"""labelme's files: what labelme writes is read, what we write has its fields, anything else is one clear line."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from trackbench.robotics.keypoints import Keypoints, read_annotation, read_origin, write_annotation

H, W, T = 48, 64, 10


def shape(label: Any = "tip", points: Any = None, **more: Any) -> dict[str, Any]:
    """As labelme 5 writes one."""
    return {
        "label": label,
        "points": [[10.5, 20.25]] if points is None else points,
        "group_id": None,
        "description": "",
        "shape_type": "point",
        "flags": {},
        "mask": None,
        **more,
    }


def labelme(shapes: Any, **more: Any) -> dict[str, Any]:
    picture = base64.b64encode(b"\x89PNG, which nobody reads").decode()
    head = {"version": "5.5.0", "flags": {}, "shapes": shapes, "imagePath": "cam0.png", "imageData": picture}
    return {**head, "imageHeight": H, "imageWidth": W, **more}


def read(tmp_path: Path, content: Any) -> Keypoints:
    path = tmp_path / "cam0.json"
    path.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
    return read_annotation(path, H, W, T)


def test_reads_what_labelme_writes(tmp_path: Path) -> None:
    content = labelme([shape("夹爪", [[0, 48]]), shape("tip", [[63.5, 0.25]], frame=9)])
    found = read(tmp_path, content)
    assert found.names == ("夹爪", "tip")
    np.testing.assert_array_equal(found.xy, [[0, 48], [63.5, 0.25]])
    assert found.frame.tolist() == [0, 9]
    assert found.confidence is None


def test_writes_what_it_reads_and_what_labelme_opens(tmp_path: Path) -> None:
    points = Keypoints(("a", "夹爪"), np.array([[1 / 3, 2.5], [40, 30]]), np.array([0, 3]), np.array([0.2, 0.9]))
    path = tmp_path / "cam0.proposal.json"
    write_annotation(path, points, image="cam0.png", height=H, width=W, origin={"template": "e"})
    found = read_annotation(path, H, W, T)
    assert found.names == points.names
    np.testing.assert_array_equal(found.xy, points.xy)
    np.testing.assert_array_equal(found.frame, points.frame)
    np.testing.assert_array_equal(found.confidence, points.confidence)
    assert read_origin(path) == {"template": "e"}
    content = json.loads(path.read_bytes())
    required = {"version", "flags", "shapes", "imagePath", "imageData", "imageHeight", "imageWidth"}
    assert required <= content.keys()
    for written, low in zip(content["shapes"], (True, False), strict=True):
        assert shape().keys() <= written.keys()
        assert written["flags"] == {"low_confidence": low}  # labelme refuses flags that are not bool
        assert isinstance(written["description"], str)
    assert "0.20" in content["shapes"][0]["description"]


def test_the_digest_is_of_what_was_annotated_only(tmp_path: Path) -> None:
    first = read(tmp_path, labelme([shape("a", [[1, 2]]), shape("b", [[3, 4]])]))
    again = read(
        tmp_path, labelme([shape("b", [[3, 4]]), shape("a", [[1.0, 2.0]], description="x")], imageData=None)
    )
    moved = read(tmp_path, labelme([shape("b", [[3, 4]]), shape("a", [[1.0, 2.5]])]))
    assert first.digest == again.digest != moved.digest


def test_other_orders_are_put_in_order_and_other_names_refused() -> None:
    points = Keypoints(("a", "b", "c"), np.arange(6).reshape(3, 2), np.array([0, 1, 2]))
    turned = points.in_order_of(("c", "a", "b"))
    np.testing.assert_array_equal(turned.xy, [[4, 5], [0, 1], [2, 3]])
    assert turned.frame.tolist() == [2, 0, 1]
    with pytest.raises(ValueError, match="misses d and adds b"):
        points.in_order_of(("a", "c", "d"))


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"", "not JSON"),
        (b"\xff\xfe{", "not JSON"),
        (b"[" * 100_000, "not JSON"),
        (b"9" * 10_000, "not JSON"),
        ([], "not a labelme file"),
        ({"shapes": {}}, "not a labelme file"),
        (labelme([]), "no keypoints"),
        (labelme([shape()], imageHeight=480), "imageHeight is 480, the frames of the episode have 48"),
        (labelme([shape()], imageWidth="64"), "imageWidth is '64'"),
        (labelme([3]), "shape 0: expected an object"),
        (labelme([shape(label=None)]), "label must be a printable name"),
        (labelme([shape(label="a\nb")]), "label must be a printable name"),
        (labelme([shape(label="a" * 101)]), "label must be a printable name"),
        (
            labelme([shape(), shape("box", [[1, 2], [3, 4]], shape_type="rectangle")]),
            "shape_type 'rectangle'",
        ),
        (labelme([shape(), shape()]), "shape 1 'tip': this name stands there twice"),
        (labelme([shape(points=[[1, 2], [3, 4]])]), r"points must be \[\[x, y\]\]"),
        (labelme([shape(points=[["1", 2]])]), "points must be"),
        (labelme([shape(points=[[True, 2]])]), "points must be"),
        (labelme([shape(points=[[float("nan"), 2]])]), "points must be"),
        (labelme([shape(points=[[10**400, 2]])]), "points must be"),
        (labelme([shape(points=[[64.1, 2]])]), r"\(64.1, 2\) lies outside the frame, 64 x 48"),
        (labelme([shape(points=[[1, -0.1]])]), "lies outside the frame"),
        (labelme([shape(frame=10)]), r"frame must be a whole number in \[0, 9\]"),
        (labelme([shape(frame=1.5)]), "frame must be a whole number"),
        (labelme([shape(confidence=2)]), "confidence must lie in"),
    ],
)
def test_anything_else_is_one_clear_line(tmp_path: Path, content: Any, told: str) -> None:
    with pytest.raises(ValueError, match=told) as caught:
        read(tmp_path, content)
    message = str(caught.value)
    assert "cam0.json" in message
    assert "\n" not in message
    assert len(message) < 400


def test_a_file_without_end_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "cam0.json"
    with path.open("wb") as file:
        file.truncate(65 * 2**20)
    with pytest.raises(ValueError, match="65 MiB is too large"):
        read_annotation(path, H, W)


def test_arrays_that_do_not_belong_together_are_refused() -> None:
    with pytest.raises(ValueError, match="2 names need"):
        Keypoints(("a", "b"), np.zeros((1, 2)))
