"""Tracks of given pixels of Kubric scenes: official output, closed forms, and one point at a time."""

from __future__ import annotations

from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from trackbench.data.kubric import project_tracks
from trackbench.data.kubric.sampling import without_edges

Scene = dict[str, Any]
RUNS = [(name, run) for name in ("a64", "b96") for run in range(4)]
SNAPPED = 2  # the run with snap_to_occluder

FOCAL = 1.5  # by sensor width
BOX = np.array([2.0, 2.0, 0.002])  # of the rendered plate, metres
PLATE = np.stack(list(product(*[(-0.5, 0.5)] * 3))) * BOX


def load(folder: Path, name: str) -> tuple[Scene, Any]:
    stored = np.load(folder / f"kubric_{name}.npz", allow_pickle=False)
    return {key[3:]: stored[key] for key in stored.files if key.startswith("ex_")}, stored


@pytest.mark.parametrize(("name", "run"), RUNS)
def test_tracks_are_those_of_the_official_code(data_fixtures: Path, name: str, run: int) -> None:
    scene, stored = load(data_fixtures, name)
    if run == SNAPPED:
        scene["segmentations"] = without_edges(scene)
    queries = stored[f"run{run}_query_tyx"]
    tracks = project_tracks(scene, queries, stored[f"run{run}_window"])
    np.testing.assert_allclose(tracks["xy"], stored[f"run{run}_raw_xy"], rtol=0, atol=1e-3)
    np.testing.assert_allclose(tracks["distance"], stored[f"run{run}_raw_depth"], rtol=1e-5)
    robust = stored[f"run{run}_occ_robust"]
    expected = stored[f"run{run}_out_occluded"][: len(queries)]
    np.testing.assert_array_equal(tracks["occluded"][robust], expected[robust])


@pytest.mark.parametrize("name", ["a64", "b96"])
def test_window_hides_what_is_outside_and_nothing_else(data_fixtures: Path, name: str) -> None:
    scene, stored = load(data_fixtures, name)
    queries = stored["run3_query_tyx"]
    whole, part = project_tracks(scene, queries), project_tracks(scene, queries, (10, 5, 50, 40))
    np.testing.assert_array_equal(whole["xy"], part["xy"])
    x, y = np.moveaxis(whole["xy"], -1, 0)
    outside = (x < 5) | (x > 40) | (y < 10) | (y > 50)
    np.testing.assert_array_equal(part["occluded"], whole["occluded"] | outside)


def test_queries_follow_their_order_and_may_repeat(data_fixtures: Path) -> None:
    scene, stored = load(data_fixtures, "a64")
    queries = stored["run3_query_tyx"]
    order = np.random.default_rng(0).integers(len(queries), size=300)
    whole, shuffled = project_tracks(scene, queries), project_tracks(scene, queries[order].astype(np.uint8))
    for key in ("xy", "occluded", "distance"):
        np.testing.assert_allclose(shuffled[key], whole[key][order], rtol=1e-12)


def test_tensors_are_taken_as_arrays(data_fixtures: Path) -> None:
    scene, stored = load(data_fixtures, "a64")
    tensors = {key: torch.from_numpy(np.asarray(value)) for key, value in scene.items()}
    queries = stored["run0_query_tyx"]
    given, wanted = project_tracks(tensors, torch.from_numpy(queries)), project_tracks(scene, queries)
    np.testing.assert_array_equal(given["xy"], wanted["xy"])


# --- one point at a time ---------------------------------------------------------------------------------------


def noise(seed: int, shape: tuple[int, int, int] = (5, 12, 12)) -> Scene:
    """A scene of noise, in which every test of occlusion decides about something."""
    rng = np.random.default_rng(seed)
    T, H, W = shape
    unit = rng.normal(size=(3, T, 4))
    unit /= np.linalg.norm(unit, axis=-1, keepdims=True)
    corners = np.stack(list(product((-0.5, 0.5), repeat=3)))
    boxes = corners @ rng.normal(size=(2, T, 3, 3)) * 3 + rng.normal(size=(2, T, 1, 3)) * 4
    normal = rng.integers(0, 65536, size=(T, H, W, 3))
    normal[:, :, : W // 2] = normal[:, :1, :1]  # smooth on the left
    depth = rng.integers(0, 65536, size=(T, H, W))
    return {
        "segmentations": rng.integers(0, 3, size=(T, H, W)).astype(np.uint8),
        "depth": depth.astype(np.uint16),
        "depth_range": np.array([3.0, 9.0], np.float32),
        "normal": normal.astype(np.uint16),
        "object_coordinates": rng.integers(0, 65536, size=(T, H, W, 3)).astype(np.uint16),
        "bboxes_3d": (boxes + rng.normal(size=boxes.shape) * 0.2).astype(np.float32),  # not quite boxes
        "obj_quaternions": unit[1:].astype(np.float32),
        "cam_positions": rng.normal(size=(T, 3)).astype(np.float32),
        "cam_quaternions": unit[0].astype(np.float32),
        "focal_length": np.float32(20),
        "sensor_width": np.float32(32),
    }


def rotation(quaternion: np.ndarray) -> np.ndarray:
    """By the rotation of each axis, q v q*."""
    w, v = float(quaternion[0]), np.asarray(quaternion[1:], np.float64)
    columns = [e + 2 * np.cross(v, np.cross(v, e) + w * e) for e in np.eye(3)]
    return np.stack(columns, axis=1)


def one_point(scene: Scene, query: tuple[int, int, int], window: tuple[int, ...]) -> list[tuple[Any, ...]]:
    """(x, y, distance, occluded) of each frame, after the description of Kubric's steps."""
    t, row, col = query
    T, H, W = scene["segmentations"].shape
    low, high = scene["depth_range"]
    metres = low + scene["depth"] * ((high - low) / 65535.0)
    normals = scene["normal"] / 65535.0 * 2 - 1
    focal = scene["focal_length"] / scene["sensor_width"]
    intrinsics = np.array([[focal, 0, -0.5], [0, -focal * W / H, -0.5], [0, 0, -1]])
    segment = int(scene["segmentations"][query])

    if segment:
        p = np.append(scene["object_coordinates"][query] / 65535.0 - 0.5, 1)
        cube = np.array([[*corner, 1] for corner in product((-0.5, 0.5), repeat=3)])
        world = [p @ np.linalg.lstsq(cube, scene["bboxes_3d"][segment - 1, f], rcond=None)[0] for f in range(T)]
    else:
        ray = np.linalg.inv(intrinsics) @ [(col + 0.5) / W, (row + 0.5) / H, 1]
        ray *= metres[query] / np.linalg.norm(ray)
        world = [rotation(scene["cam_quaternions"][t]) @ ray + scene["cam_positions"][t]] * T

    def faces_away(f: int) -> bool:
        turn = rotation(scene["obj_quaternions"][segment - 1, f])
        turn = turn @ rotation(scene["obj_quaternions"][segment - 1, t]).T
        return bool(turn @ normals[query] @ (world[f] - scene["cam_positions"][f]) > 0)

    rough = 0
    for i, j in product((row - 1, row + 1), (col - 1, col + 1)):
        neighbour = normals[t, i, j] if 0 <= i < H and 0 <= j < W else np.zeros(3)
        rough += np.sum((neighbour - normals[query]) ** 2) > 0.0025
    tested = segment > 0 and rough <= 2 and not faces_away(t)

    track = []
    for f in range(T):
        offset = world[f] - scene["cam_positions"][f]
        u, v, w = intrinsics @ rotation(scene["cam_quaternions"][f]).T @ offset
        x, y, distance = u / w * W, v / w * H, np.linalg.norm(offset)
        rows = [int(np.clip(np.floor(y - 0.5) + k, 0, H - 1)) for k in (0, 1)]
        cols = [int(np.clip(np.floor(x - 0.5) + k, 0, W - 1)) for k in (0, 1)]
        around = [(f, i, j) for i in rows for j in cols]
        occluded = (
            w < 0
            or x < window[1]
            or y < window[0]
            or x > window[3]
            or y > window[2]
            or all(scene["segmentations"][pixel] != segment for pixel in around)
            or max(metres[pixel] for pixel in around) < 0.99 * distance
            or (tested and faces_away(f))
        )
        track.append((x, y, distance, occluded))
    return track


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("window", [None, (2, 0, 12, 9)])
def test_every_point_is_as_one_alone(seed: int, window: tuple[int, ...] | None) -> None:
    scene = noise(seed, (5, 12, 12) if seed % 2 else (4, 8, 16))
    rng = np.random.default_rng(seed)
    H, W = scene["depth"].shape[1:]
    if window is not None:
        window = (2, 0, H, 9)
    queries = rng.integers(0, scene["depth"].shape, size=(150, 3))
    tracks = project_tracks(scene, queries, window)
    expected = np.array([one_point(scene, tuple(query), window or (0, 0, H, W)) for query in queries])
    np.testing.assert_allclose(tracks["xy"], expected[..., :2], rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(tracks["distance"], expected[..., 2], rtol=1e-5)
    np.testing.assert_array_equal(tracks["occluded"], expected[..., 3].astype(bool))
    assert 0.01 < tracks["occluded"].mean() < 0.99


# --- a plate and an occluder, rendered -------------------------------------------------------------------------


def rotation_about_y(angle: float) -> tuple[np.ndarray, np.ndarray]:
    c, s = np.cos(angle), np.sin(angle)
    quaternion = np.array([np.cos(angle / 2), 0, np.sin(angle / 2), 0])
    return np.array([[c, 0, s], [0, 1, 0], [-s, 0, c]]), quaternion


def render(
    positions: list[Any],
    angles: list[float] | None = None,
    cameras: list[Any] | None = None,
    size: tuple[int, int] = (32, 32),
    wall: float = -20.0,
    screen: float | None = None,
) -> Scene:
    """A plate that moves in front of a wall at z = ``wall``; a camera that looks along -z.

    ``screen`` is a static wall at z = -3 that covers x > ``screen``, part of the background.
    """
    T, (H, W) = len(positions), size
    positions = np.asarray(positions, np.float64)
    cameras = np.zeros((T, 3)) if cameras is None else np.asarray(cameras, np.float64)
    turns = [rotation_about_y(angle) for angle in angles or [0.0] * T]
    v, u = np.meshgrid((np.arange(H) + 0.5) - H / 2, (np.arange(W) + 0.5) - W / 2, indexing="ij")
    rays = np.stack([u / W / FOCAL, -v / W / FOCAL, -np.ones(size)], axis=-1)  # square pixels
    rays /= np.linalg.norm(rays, axis=-1, keepdims=True)

    depth = np.empty((T, H, W))
    segmentations = np.zeros((T, H, W), np.uint8)
    normal = np.tile([0.0, 0.0, 1.0], (T, H, W, 1))
    coordinates = np.zeros((T, H, W, 3))
    for f, (turn, _) in enumerate(turns):
        depth[f] = (wall - cameras[f, 2]) / rays[..., 2]
        origin, directions = turn.T @ (cameras[f] - positions[f]), rays @ turn
        with np.errstate(divide="ignore", invalid="ignore"):
            slabs = np.stack([(side * BOX / 2 - origin) / directions for side in (-1, 1)])
        near, far = slabs.min(axis=0), slabs.max(axis=0).min(axis=-1)
        entry, face = near.max(axis=-1), near.argmax(axis=-1)
        hit = (entry < far) & (entry > 0)
        local = origin + entry[..., None] * directions
        outward = -np.sign(np.take_along_axis(directions, face[..., None], -1)) * np.eye(3)[face]
        depth[f][hit], segmentations[f][hit] = entry[hit], 1
        normal[f][hit] = (outward @ turn.T)[hit]
        coordinates[f][hit] = np.clip(local / BOX + 0.5, 0, 1)[hit]
        if screen is not None:
            reach = (-3 - cameras[f, 2]) / rays[..., 2]
            covers = (cameras[f, 0] + reach * rays[..., 0] > screen) & (reach < depth[f])
            depth[f][covers], segmentations[f][covers], normal[f][covers] = reach[covers], 0, (0, 0, 1)
            coordinates[f][covers] = 0
    low, high = depth.min(), depth.max()
    return {
        "segmentations": segmentations,
        "depth": np.rint((depth - low) / (high - low) * 65535).astype(np.uint16),
        "depth_range": np.array([low, high], np.float32),
        "normal": np.rint((normal + 1) / 2 * 65535).astype(np.uint16),
        "object_coordinates": np.rint(coordinates * 65535).astype(np.uint16),
        "bboxes_3d": np.stack([PLATE @ R.T + p for (R, _), p in zip(turns, positions, strict=True)])[None],
        "obj_quaternions": np.stack([q for _, q in turns])[None],
        "cam_positions": cameras,
        "cam_quaternions": np.tile([1.0, 0, 0, 0], (T, 1)),
        "focal_length": np.float64(FOCAL),
        "sensor_width": np.float64(1),
    }


def to_pixels(world: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Closed form of the camera at the origin."""
    H, W = size
    return FOCAL * W * world[..., :2] / -world[..., 2:] * (1, -1) + (W / 2, H / 2)


def on_plate(scene: Scene, frame: int) -> np.ndarray:
    rows, columns = np.nonzero(scene["segmentations"][frame])
    return np.column_stack([np.full(len(rows), frame), rows, columns])


@pytest.mark.parametrize("size", [(32, 32), (24, 40)])
def test_points_of_a_translating_box(size: tuple[int, int]) -> None:
    positions = np.array([(-1 + 0.3 * f, 0.2 * f, -8 + 0.5 * f) for f in range(5)])
    scene = render(list(positions), size=size)
    queries = on_plate(scene, 2)
    tracks = project_tracks(scene, queries)
    # where the query's ray meets the plate's face
    z = positions[2, 2] + BOX[2] / 2
    raster = queries[:, :0:-1] + 0.5
    hit = np.column_stack(
        [(raster - (size[1] / 2, size[0] / 2)) * (1, -1) / size[1] / FOCAL * -z, np.full(len(raster), z)]
    )
    world = hit[:, None] + (positions - positions[2])
    np.testing.assert_allclose(tracks["xy"], to_pixels(world, size), rtol=0, atol=1e-3)
    np.testing.assert_allclose(tracks["distance"], np.linalg.norm(world, axis=-1), rtol=1e-4)
    np.testing.assert_array_equal(tracks["occluded"], to_pixels(world, size)[..., 1] < 0)
    quirky = project_tracks(scene, queries, official_quirks=True)
    assert np.allclose(quirky["xy"], tracks["xy"]) == (size[0] == size[1])


def test_points_of_the_wall_stand_still_while_the_camera_moves() -> None:
    cameras = np.array([(0.1 * f, -0.2 * f, 0.5 * f) for f in range(4)])
    scene = render([(0, 0, 5)] * 4, cameras=list(cameras), size=(16, 24))  # the plate is behind the camera
    queries = np.array([(0, y, x) for y in range(16) for x in range(24)])
    tracks = project_tracks(scene, queries)
    raster = queries[:, :0:-1] + 0.5
    wall = np.column_stack([(raster - (12, 8)) * (1, -1) / 24 / FOCAL * 20, np.full(len(raster), -20)])
    expected = to_pixels(wall[:, None] - cameras, (16, 24))
    np.testing.assert_allclose(tracks["xy"], expected, rtol=0, atol=2e-3)
    x, y = np.moveaxis(expected, -1, 0)
    np.testing.assert_array_equal(tracks["occluded"], (x < 0) | (y < 0) | (x > 24) | (y > 16))


def test_a_screen_hides_what_passes_behind_it() -> None:
    positions = [(-1.0 + 0.5 * f, 0, -6) for f in range(6)]
    scene = render(positions, screen=0.2)
    queries = on_plate(scene, 0)
    tracks = project_tracks(scene, queries)
    edge = FOCAL * 32 * 0.2 / 3 + 16
    x, y = np.moveaxis(tracks["xy"], -1, 0)
    clear = (np.abs(x - edge) > 1.5) & (x > 0) & (x < 32) & (y > 0) & (y < 32)
    np.testing.assert_array_equal(tracks["occluded"][clear], (x > edge)[clear])
    assert tracks["occluded"][clear].any()
    assert not tracks["occluded"][:, 0].any()


def test_a_face_that_turns_away_is_hidden_by_its_normal_alone() -> None:
    scene = render([(0, 0, -6)] * 5, angles=[0, 0.5, 1.0, 2.2, np.pi])
    queries = on_plate(scene, 0)
    inner = queries[(np.abs(queries[:, 1:] - 15.5) < 5).all(axis=1)]
    tracks = project_tracks(scene, inner)
    np.testing.assert_array_equal(tracks["occluded"], np.tile([False] * 3 + [True] * 2, (len(inner), 1)))
    # from behind, the other face is seen as well
    turned = project_tracks(scene, np.array([(4, 15, 15)]))
    assert turned["occluded"].tolist() == [[True, True, True, False, False]]


def test_a_normal_that_is_wrong_at_the_query_or_rough_is_not_tested() -> None:
    scene = render([(0, 0, -6)] * 2, angles=[0, np.pi])
    query = np.array([(0, 15, 15)])
    assert project_tracks(scene, query)["occluded"].tolist() == [[False, True]]
    wrong = {**scene, "normal": scene["normal"].copy()}
    wrong["normal"][0] = 65535 - wrong["normal"][0]
    assert not project_tracks(wrong, query)["occluded"].any()
    rough = {**scene, "normal": scene["normal"].copy()}
    rough["normal"][0, ::2, ::2] = 0
    assert not project_tracks(rough, query)["occluded"].any()


def test_a_box_that_leaves_the_view_or_passes_behind_the_camera_is_occluded() -> None:
    positions = [(0, 0, -6), (30, 0, -6), (0, 0, 6), (0, 0, -BOX[2] / 2), (0, 0, -6)]
    scene = render(positions)
    tracks = project_tracks(scene, on_plate(scene, 0))
    assert np.isfinite(tracks["xy"]).all()
    np.testing.assert_array_equal(tracks["occluded"].all(axis=0), [False, True, True, True, False])
    np.testing.assert_array_equal(tracks["occluded"].any(axis=0), [False, True, True, True, False])


# --- nothing, and wrong input ----------------------------------------------------------------------------------


@pytest.mark.parametrize("queries", [np.zeros((0, 3), np.int64), np.zeros((0, 3))])
def test_no_query(queries: np.ndarray) -> None:
    tracks = project_tracks(noise(0), queries)
    assert tracks["xy"].shape == (0, 5, 2)
    assert tracks["occluded"].shape == tracks["distance"].shape == (0, 5)
    assert tracks["occluded"].dtype == bool


def test_a_scene_without_objects() -> None:
    scene = noise(0)
    scene["segmentations"][:] = 0
    scene["bboxes_3d"], scene["obj_quaternions"] = np.zeros((0, 5, 8, 3)), np.zeros((0, 5, 4))
    queries = np.random.default_rng(0).integers(0, scene["depth"].shape, size=(50, 3))
    expected = np.array([one_point(scene, tuple(query), (0, 0, 12, 12)) for query in queries])
    np.testing.assert_array_equal(project_tracks(scene, queries)["occluded"], expected[..., 3].astype(bool))


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("depth", np.zeros((5, 12, 11), np.uint16), r"scene\['depth'\]: expected uint16 \(5, 12, 12\)"),
        (
            "depth",
            np.zeros((5, 12, 12), np.float32),
            r"scene\['depth'\]: expected uint16 \(5, 12, 12\), got float32",
        ),
        (
            "segmentations",
            np.zeros((5, 12, 12, 1), np.uint8),
            r"scene\['segmentations'\]: expected integer \(T, H, W",
        ),
        ("normal", np.zeros((5, 12, 12), np.uint16), r"scene\['normal'\]: expected uint16 \(5, 12, 12, 3\)"),
        ("bboxes_3d", np.zeros((2, 4, 8, 3)), r"scene\['bboxes_3d'\]: expected float \(instances, 5, 8, 3\)"),
        ("obj_quaternions", np.ones((3, 5, 4)), r"scene\['obj_quaternions'\]: expected float \(2, 5, 4\)"),
        ("obj_quaternions", np.ones((2, 5, 4)), r"scene\['obj_quaternions'\]: expected unit quaternions"),
        ("cam_quaternions", np.zeros((5, 4)), r"scene\['cam_quaternions'\]: expected unit quaternions"),
        ("cam_positions", np.full((5, 3), np.nan), r"scene\['cam_positions'\]: expected finite"),
        ("focal_length", np.zeros(()), r"scene\['focal_length'\]: expected a positive number"),
        ("segmentations", np.full((5, 12, 12), 3), r"scene\['segmentations'\] is 3 at a query: expected 0 to 2"),
        ("segmentations", np.full((5, 12, 12), -1), r"scene\['segmentations'\] is -1 at a query"),
        ("depth_range", None, r"scene lacks 'depth_range': expected float \(2\)"),
    ],
)
def test_a_wrong_array_is_named(key: str, value: Any, message: str) -> None:
    scene = noise(0) | {key: value}
    if value is None:
        del scene[key]
    with pytest.raises(ValueError, match=message):
        project_tracks(scene, np.array([[0, 1, 2]]))


@pytest.mark.parametrize(
    ("queries", "window", "message"),
    [
        ([[0.0, 1.0, 2.0]], None, r"queries_tyx: expected integer \(n, 3\), got float64 \(1, 3\)"),
        ([0, 1, 2], None, r"queries_tyx: expected integer \(n, 3\)"),
        ([[0, 1, 2], [5, 1, 2]], None, r"queries_tyx: expected .* below \(5, 12, 12\), got \[5, 1, 2\]"),
        ([[0, -1, 2]], None, r"queries_tyx"),
        ([[0, 1, 2]], (0, 0, 12, 13), r"window: expected .* x1 <= 12"),
        ([[0, 1, 2]], (3, 0, 3, 4), r"window"),
        ([[0, 1, 2]], (0, 0, 12), r"window"),
        ([[0, 1, 2]], (0, 0, 12.5, 12), r"window"),
    ],
)
def test_a_wrong_query_or_window_is_refused(queries: Any, window: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        project_tracks(noise(0), queries, window)
