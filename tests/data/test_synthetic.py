"""Synthetic clips: do the pixels agree with the ground truth, and is that what it claims to be?"""

from __future__ import annotations

from dataclasses import replace

import cv2
import numpy as np
import pytest
import torch

from trackbench.data.synthetic import SyntheticDataModule, SyntheticDataset
from trackbench.data.synthetic.motion import Camera, rotation
from trackbench.data.synthetic.render import render
from trackbench.data.synthetic.scene import Layer, Scene
from trackbench.data.synthetic.shapes import random_outline
from trackbench.data.synthetic.textures import PATTERNS, PHOTOGRAPHS, photograph
from trackbench.structures import VideoBatch


def small(**overrides) -> SyntheticDataset:
    settings = {"num_frames": 6, "height": 96, "width": 96, "num_points": 40, **overrides}
    return SyntheticDataset(**settings)


def same(a: VideoBatch, b: VideoBatch) -> bool:
    return all(torch.equal(getattr(a, key), getattr(b, key)) for key in ("video", "queries", "xy", "visible"))


# --- pixels against tracks ------------------------------------------------------------------------


def with_dot(layer: Layer, point: np.ndarray) -> Layer:
    """The layer in black, with a white Gaussian dot at a texture point and no change of brightness."""
    height, width = layer.texture.shape[:2]
    x, y = np.arange(width) + 0.5, np.arange(height)[:, None] + 0.5
    dot = 255 * np.exp(-((x - point[0]) ** 2 + (y - point[1]) ** 2) / (2 * 1.5**2))
    texture = np.repeat(np.round(dot).astype(np.uint8)[..., None], 3, axis=2)
    return replace(layer, texture=texture, gain=np.ones_like(layer.gain))


def dot_errors(scene: Scene, index: int, point: np.ndarray) -> list[np.ndarray]:
    """(x, y) from a dot's track to where it is painted, in the frames that show all of it."""
    layer = with_dot(scene.layers[index], point)
    wall = scene.layers[0]
    black = replace(wall, texture=np.zeros_like(wall.texture))
    alone = (layer,) if index == 0 else (black, layer)
    video = render(Scene(scene.height, scene.width, alone), np.random.default_rng(0))
    xy, visible = Scene(scene.height, scene.width, alone).tracks(np.array([len(alone) - 1]), point[None])
    errors = []
    for frame, (x, y), seen in zip(video[..., 0].astype(float), xy[0], visible[0], strict=True):
        if not seen or not (8 < x < scene.width - 8 and 8 < y < scene.height - 8):
            continue
        # what is this far from the dot is a mirror image of it, on a wall that is mirrored beyond its borders
        rows, cols = np.mgrid[: scene.height, : scene.width] + 0.5
        weight = frame * (np.hypot(cols - x, rows - y) < 8)
        centroid = np.array([(weight * cols).sum(), (weight * rows).sum()]) / weight.sum()
        errors.append(centroid - (x, y))
    return errors


@pytest.mark.parametrize("size", [(128, 128), (96, 160)])
def test_a_dot_is_painted_where_its_track_says(size: tuple[int, int]) -> None:
    dataset = SyntheticDataset(num_frames=6, height=size[0], width=size[1], seed=3, blur=0, noise=0)
    wall_errors, object_errors = [], []
    for clip in range(6):
        scene, rng = dataset.scene(clip)
        for index, layer in enumerate(scene.layers):
            texture_size = np.array(layer.texture.shape[1::-1])
            points = texture_size * rng.uniform(0.35, 0.65, (4, 2))
            if layer.outline is not None:  # the whole dot inside the outline
                ring = 6 * np.stack([np.cos(np.arange(8)), np.sin(np.arange(8))], axis=-1)
                inside = (layer.outline.alpha(points[:, None] + ring) == 1).all(axis=1)
                points = points[inside]
            for point in points[:2]:
                errors = dot_errors(scene, index, point)
                (object_errors if index else wall_errors).extend(errors)
    assert len(wall_errors) > 40
    assert len(object_errors) > 80
    for errors in (wall_errors, object_errors):
        # perspective and ripples shift the centroid of an extended dot a little, but not always the same way
        assert np.abs(np.mean(errors, axis=0)).max() < 0.015
        assert np.linalg.norm(errors, axis=1).max() < 0.15


def painted_ids(scene: Scene, frame: int) -> np.ndarray:
    """Which layer is on top of each pixel, by filling the outlines as polygons, from back to front."""
    ids = np.zeros((scene.height, scene.width), np.uint8)
    angle = np.linspace(0, 2 * np.pi, 4 * 720, endpoint=False)
    for index, layer in enumerate(scene.layers[1:], start=1):
        outline = layer.outline
        assert outline is not None
        radius = np.interp(angle, np.arange(721) * np.pi / 360, np.append(outline.radius, outline.radius[0]))
        rings = []
        for share in (1.0, outline.hole) if outline.hole else (1.0,):
            edge = share * radius[:, None] * np.stack([np.cos(angle), np.sin(angle)], axis=-1)
            xy = layer.to_frame(edge + outline.centre, np.array(frame))
            rings.append(np.round((xy - 0.5) * 16).astype(np.int32))  # pixel centres at integers, 4 binary places
        cv2.fillPoly(ids, rings, index, shift=4)
    return ids


def test_visibility_agrees_with_outlines_filled_as_polygons() -> None:
    compared = hidden_by_objects = 0
    for clip in range(12):
        dataset = SyntheticDataset(num_frames=6, height=120, width=144, seed=5, objects=(5, 9), motion=2.0)
        scene, rng = dataset.scene(clip)
        frame = rng.integers(6, size=300)
        position = rng.uniform(0, 1, (300, 2)) * (144, 120)
        layer = scene.top_layer(position, frame)
        points = np.stack(
            [scene.layers[k].to_texture(p, f) for k, p, f in zip(layer, position, frame, strict=True)]
        )
        xy, visible = scene.tracks(layer, points)
        for t in range(6):
            ids = painted_ids(scene, t)
            near = np.ones((5, 5), np.uint8)
            certain = cv2.erode(ids, near) == cv2.dilate(ids, near)
            inside = ((xy[:, t] >= 0) & (xy[:, t] < (144, 120))).all(axis=1)
            assert not visible[~inside, t].any()
            col, row = np.floor(xy[inside, t]).astype(int).T
            sure = certain[row, col]
            expected = ids[row, col] == layer[inside]
            np.testing.assert_array_equal(visible[inside, t][sure], expected[sure])
            compared += int(sure.sum())
            hidden_by_objects += int((~expected[sure]).sum())
    assert compared > 10_000
    assert hidden_by_objects > 500


def test_static_clip_without_noise_repeats_its_first_frame() -> None:
    clip = small(motion=0.0, noise=0.0, objects=(0, 0))[1]
    step = (clip.video[0].int() - clip.video[0, :1].int()).abs()
    assert step.max() <= 255 * 0.2 + 1  # brightness may change, the picture may not
    assert torch.equal(clip.xy, clip.xy[:, :, :1].expand_as(clip.xy))
    assert clip.visible.all()


# --- geometry -------------------------------------------------------------------------------------


def test_texture_and_frame_maps_invert_each_other() -> None:
    scene, rng = small(objects=(8, 8)).scene(0)
    frame = np.arange(6)
    rippling = 0
    for layer in scene.layers:
        points = rng.uniform(0, 1, (50, 1, 2)) * layer.texture.shape[1::-1]
        back = layer.to_texture(layer.to_frame(points, frame), frame)
        np.testing.assert_allclose(back, np.broadcast_to(points, back.shape), atol=1e-8)
        rippling += layer.ripple is not None
    assert rippling > 0


def test_homography_is_the_pinhole_projection_of_the_plane() -> None:
    rng = np.random.default_rng(0)
    turn = [rng.uniform(-0.3, 0.3, 4) for _ in range(6)]
    camera = Camera(
        position=rng.uniform(-0.2, 0.2, (4, 3)),
        orientation=rotation(*turn[:3]),
        focal=rng.uniform(200, 300, 4),
        centre=(128.0, 96.0),
    )
    place = np.array([0, 0, 3.0]) + rng.uniform(-0.5, 0.5, (4, 3))
    plane = rotation(*turn[3:])
    homography = camera.homographies(place, plane, origin=(20.0, 30.0), texel=0.01)
    point = np.array([25.0, 70.0])
    for t in range(4):
        world = place[t] + plane[t] @ np.array([0.01 * (25 - 20), 0.01 * (70 - 30), 0.0])
        seen = np.linalg.inv(camera.orientation[t]) @ (world - camera.position[t])
        expected = camera.focal[t] * seen[:2] / seen[2] + (128, 96)
        mapped = homography[t] @ np.array([*point, 1.0])
        np.testing.assert_allclose(mapped[:2] / mapped[2], expected, atol=1e-9)
        np.testing.assert_allclose(mapped[2], seen[2], atol=1e-12)


def test_rotations_are_rotations() -> None:
    angle = np.linspace(-1, 1, 5)
    matrix = rotation(angle, 0.5 * angle, 2 * angle)
    np.testing.assert_allclose(
        matrix @ np.swapaxes(matrix, 1, 2), np.broadcast_to(np.eye(3), (5, 3, 3)), atol=1e-12
    )
    np.testing.assert_allclose(np.linalg.det(matrix), 1)
    quarter = rotation(np.zeros(1), np.zeros(1), np.array([np.pi / 2]))[0]
    np.testing.assert_allclose(
        quarter @ [1, 0, 0], [0, 1, 0], atol=1e-12
    )  # y points down: clockwise on the screen


def test_nearer_planes_move_more_under_a_travelling_camera() -> None:
    still = np.zeros(2)
    camera = Camera(
        np.array([[0.0, 0, 0], [0.1, 0, 0]]), rotation(still, still, still), np.full(2, 100.0), (0.0, 0.0)
    )
    shifts = []
    for depth in (1.0, 2.0, 4.0):
        place = np.array([[0.0, 0, depth]] * 2)
        h = camera.homographies(place, rotation(still, still, still), (0.0, 0.0), 0.01)
        origin = h[:, :2, 2] / h[:, 2:, 2]
        shifts.append((origin[1] - origin[0])[0])
    np.testing.assert_allclose(shifts, [-10.0, -5.0, -2.5])


def test_outlines_stay_inside_their_texture() -> None:
    rng = np.random.default_rng(0)
    for _ in range(60):
        outline = random_outline(rng, radius := rng.uniform(6, 60))
        assert outline.radius.max() == pytest.approx(radius)
        side = round(2 * outline.centre[0])
        border = np.concatenate([np.stack([np.linspace(0, side, 200), np.full(200, k)], -1) for k in (0.0, side)])
        assert outline.alpha(border).max() == 0
        assert outline.alpha(border[:, ::-1]).max() == 0


# --- the dataset ----------------------------------------------------------------------------------


@pytest.mark.parametrize("query_time", ["first", "random", "start"])
def test_queries_lie_on_visible_track_points(query_time: str) -> None:
    dataset = small(query_time=query_time, motion=3.0, height=80, width=112, num_frames=9)
    for index in range(5):
        clip = dataset[index]
        assert clip.video.shape == (1, 9, 3, 80, 112)
        assert clip.video.dtype == torch.uint8
        assert clip.queries.dtype == clip.xy.dtype == torch.float32
        time = clip.queries[0, :, 0].long()
        points = torch.arange(40)
        assert torch.equal(clip.queries[0, :, 0], time.float())
        assert torch.equal(clip.queries[0, :, 1:], clip.xy[0, points, time])
        assert clip.visible[0, points, time].all()
        if query_time == "first":
            assert torch.equal(time, clip.visible[0].int().argmax(dim=1))
        if query_time == "start":
            assert not time.any()
        inside = ((clip.xy >= 0) & (clip.xy < torch.tensor([112, 80]))).all(-1)
        assert inside[clip.visible].all()


def test_random_queries_use_all_frames() -> None:
    times = torch.cat([small(num_points=200)[i].queries[0, :, 0] for i in range(4)])
    assert torch.bincount(times.long(), minlength=6).min() > 40


def test_a_clip_is_a_function_of_seed_split_and_index_alone() -> None:
    clip = small(seed=1)[7]
    other = small(seed=1)
    other[0]
    np.random.seed(5)
    torch.manual_seed(99)
    assert same(clip, other[7])
    for different in (small(seed=2)[7], small(seed=1, split="val")[7], small(seed=1)[8]):
        assert not torch.equal(clip.video, different.video)
        assert not torch.equal(clip.xy, different.xy)
    assert clip.names == ["synthetic/train/1/7"]


def test_points_are_shared_between_objects_and_wall() -> None:
    dataset = small(objects=(4, 6), num_points=100, num_frames=1, object_share=0.3)
    for index in range(4):
        scene, _ = dataset.scene(index)
        clip = dataset[index]
        layer = scene.top_layer(clip.xy[0, :, 0].double().numpy(), np.zeros(100, np.int64))
        assert abs((layer > 0).sum() - 30) <= 1
    wall_only = small(objects=(0, 0))[0]
    assert wall_only.xy.shape[1] == 40


def test_default_clips_move_and_hide_as_much_as_they_should() -> None:
    clips = [SyntheticDataset(num_points=128)[i] for i in range(24)]
    hidden = 1 - np.mean([clip.visible.float().mean().item() for clip in clips])
    assert 0.1 < hidden < 0.3
    returns = np.mean(
        [((~clip.visible[0, :, :-1]) & clip.visible[0, :, 1:]).any(1).float().mean() for clip in clips]
    )
    assert returns > 0.03
    static = []
    for clip in clips:
        after = clip.visible[0] & (torch.arange(24) > clip.queries[0, :, :1])
        error = (clip.xy[0] - clip.queries[0, :, None, 1:]).norm(dim=-1)[after]
        static.append(np.mean([(error < pixels).float().mean() for pixels in (1, 2, 4, 8, 16)]))
    assert 0.15 < np.mean(static) < 0.35


def test_textures_have_detail_everywhere() -> None:
    dataset = small(height=128, width=128, noise=0, blur=0, objects=(0, 0))
    for index in range(12):
        frame = dataset[index].video[0, 0].float()
        blocks = frame.unfold(1, 32, 32).unfold(2, 32, 32).flatten(3)
        assert blocks.std(dim=-1).amax(dim=0).min() > 1


@pytest.mark.parametrize("maker", PATTERNS)
def test_patterns_take_any_shape(maker) -> None:
    for height, width in ((17, 90), (90, 17), (64, 64)):
        pattern = maker(np.random.default_rng(0), height, width)
        assert pattern.shape == (height, width, 3)
        assert pattern.dtype == np.float32
        assert pattern.std() > 0.02


def test_photographs_come_with_scikit_image() -> None:
    assert not set(PHOTOGRAPHS["train"]) & set(PHOTOGRAPHS["val"])
    for name in PHOTOGRAPHS["train"] + PHOTOGRAPHS["val"]:
        photo = photograph(name)
        assert photo.ndim == 3
        assert photo.shape[2] == 3
    with pytest.raises(FileNotFoundError, match=r"data/no_such\.png"):
        photograph("no_such.png")


def test_without_photographs_none_is_opened(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(name: str) -> None:
        raise AssertionError(name)

    monkeypatch.setattr("trackbench.data.synthetic.textures.photograph", refuse)
    for index in range(4):
        small(photos=False)[index]


def test_length() -> None:
    with pytest.raises(TypeError, match="endless"):
        len(small())
    assert small()[10**9].video.shape == (1, 6, 3, 96, 96)
    finite = small(length=3)
    assert len(finite) == 3
    with pytest.raises(IndexError, match="clip 3 of 3"):
        finite[3]


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        ("num_frames", 0),
        ("height", 4),
        ("num_points", 0),
        ("seed", -1),
        ("motion", -0.5),
        ("objects", (5, 3)),
        ("split", "test"),
        ("query_time", "last"),
        ("noise", 1.5),
    ],
)
def test_bad_arguments_are_named(argument: str, value: object) -> None:
    with pytest.raises(ValueError, match=argument):
        small(**{argument: value})


# --- the datamodule -------------------------------------------------------------------------------


def module(**overrides) -> SyntheticDataModule:
    settings = {
        "num_frames": 4,
        "height": 64,
        "width": 64,
        "num_points": 16,
        "val_videos": 3,
        "val_num_points": 8,
    }
    return SyntheticDataModule(**{**settings, **overrides})


def test_training_batches_are_the_same_for_any_number_of_workers() -> None:
    batches = []
    for workers in (0, 2):
        loader = iter(module(batch_size=2, num_workers=workers).train_dataloader())
        batches.append([next(loader) for _ in range(3)])
    for alone, together in zip(*batches, strict=True):
        assert alone.names == together.names
        assert same(alone, together)


def test_validation_clips_are_fixed() -> None:
    first, second = (list(module(seed=seed).val_dataloader()) for seed in (0, 1))
    assert [batch.names for batch in first] == [[f"synthetic/val/0/{i}"] for i in range(3)]
    for a, b in zip(first, second, strict=True):
        assert same(a, b)
        assert torch.equal(a.queries[0, :, 0].long(), a.visible[0].int().argmax(dim=1))
    assert len(module(val_batch_size=2).test_dataloader()) == 2
    assert next(iter(module(val_num_frames=7).val_dataloader())).video.shape[1] == 7
