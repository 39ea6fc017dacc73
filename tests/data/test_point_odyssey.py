"""PointOdyssey in its published layouts: which points count, the published metric, and what is refused."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from benchmark_fakes import panning, write_jpegs, write_point_odyssey
from folder_fakes import dot_frames
from PIL import Image

from trackbench.baselines import Static
from trackbench.composition import compose_config
from trackbench.data.point_odyssey import PointOdysseyDataset
from trackbench.evaluation.main import evaluate_models
from trackbench.evaluation.runner import score

T, N, SIZE = 12, 60, (60, 90)


def annotated(seed: int = 0) -> tuple[Any, Any, Any, Any]:
    """Frames, tracks, visibs and valids with every kind of entry."""
    rng = np.random.default_rng(seed)
    frames = rng.integers(0, 256, (T, *SIZE, 3), dtype=np.uint8)
    xy = rng.uniform((-1, -1), (SIZE[1] + 1, SIZE[0] + 1), (1, N, 2)) + rng.normal(0, 2, (T, N, 2)).cumsum(0)
    xy[0, :5] = [(1, 30), (0.9, 30), (88, 30), (88.1, 30), (45, 58)]
    xy[3, 10], xy[4, 11, 0] = np.inf, np.nan
    return frames, xy.astype(np.float32), rng.random((T, N)) < 0.9, rng.random((T, N)) < 0.95


def published(xy: Any, visible: Any, valid: Any, num_points: int) -> tuple[list[int], Any, Any]:
    """Points, visible and valid entries, one by one, as the loader of PIPs++ describes them."""
    visible, valid = visible.copy(), valid.copy()
    for t in range(T):
        for n in range(N):
            x, y = xy[t, n]
            if not (np.isfinite(x) and np.isfinite(y)) or x < 1 or x > SIZE[1] - 2 or y < 1 or y > SIZE[0] - 2:
                visible[t, n] = valid[t, n] = False
    good = visible & valid
    kept = [n for n in range(N) if good[0, n] and good[:, n].sum() >= 8]
    count = min(len(kept), num_points)
    return [kept[int(i)] for i in np.linspace(0, len(kept) - 1, count)], good, valid


@pytest.mark.parametrize("num_points", [7, 1000])
def test_points_are_the_published_ones(tmp_path: Path, num_points: int) -> None:
    frames, xy, visible, valid = annotated()
    write_point_odyssey(tmp_path / "test" / "a", frames, xy, visible, valid)
    chosen, good, valid = published(xy, visible, valid, num_points)
    assert 7 <= len(chosen) < N
    batch = PointOdysseyDataset(tmp_path, num_points=num_points, resolution=None)[0]
    assert batch.names == ["a"]
    assert batch.labelled is not None
    np.testing.assert_array_equal(batch.labelled[0], valid[:, chosen].T)
    np.testing.assert_array_equal(batch.visible[0], good[:, chosen].T)
    expected = np.where(valid[:, chosen, None], xy[:, chosen], 0).swapaxes(0, 1)
    np.testing.assert_allclose(batch.xy[0], expected, atol=1e-4)
    assert (batch.queries[0, :, 0] == 0).all()
    np.testing.assert_allclose(batch.queries[0, :, 1:], xy[0, chosen], atol=1e-4)

    other = PointOdysseyDataset(tmp_path, num_points=num_points, resolution=(30, 180))[0]
    assert other.video.shape == (1, T, 3, 30, 180)
    torch.testing.assert_close(other.xy, batch.xy * torch.tensor([2.0, 0.5]))


def test_earlier_versions_say_the_same_with_one_flag(tmp_path: Path) -> None:
    frames, xy, visible, valid = annotated()
    write_point_odyssey(tmp_path / "test" / "new", frames, xy, visible & valid, valid)
    old = tmp_path / "test" / "old"
    write_jpegs(old / "rgbs", frames, "rgb_{:05}.jpg", 0)
    flags = np.where(valid, visible.astype(np.float16), np.float16(2))
    np.savez(old / "annotations.npz", trajs_2d=xy, visibilities=flags)
    new, old_batch = PointOdysseyDataset(tmp_path)
    for key in ("video", "queries", "xy", "visible", "labelled"):
        assert torch.equal(getattr(new, key), getattr(old_batch, key))


def test_score_is_the_published_d_vis_avg(tmp_path: Path) -> None:
    frames, xy, visible, valid = annotated(1)
    write_point_odyssey(tmp_path / "test" / "a", frames, xy, visible, valid)
    chosen, good, _ = published(xy, visible, valid, 256)
    batch = PointOdysseyDataset(tmp_path)[0]
    tracks = Static().track(batch.video[0].permute(0, 2, 3, 1), batch.queries[0])
    per_256 = xy[:, chosen] * 256 / np.array(SIZE[::-1])
    errors = np.linalg.norm(per_256[1:] - per_256[:1], axis=2)[good[1:, chosen]]
    expected = np.mean([(errors < threshold).mean() for threshold in (1, 2, 4, 8, 16)])
    assert score(batch, tracks, "first")["average_pts_within_thresh"] == pytest.approx(expected, abs=1e-6)
    assert 0.1 < expected < 0.9


def test_coordinates_are_raster_pixels_and_frames_in_order(tmp_path: Path) -> None:
    path = np.array([(20.0, 15.0), (30.5, 25.0), (41.0, 30.5)])
    frames = dot_frames(path, SIZE)
    xy = np.repeat(path[:, None], 2, axis=1)
    ones = np.ones((3, 2), bool)
    write_point_odyssey(tmp_path / "test" / "a", frames, xy.astype(np.float32), ones, ones)
    batch = PointOdysseyDataset(tmp_path, resolution=None)[0]
    light = batch.video[0].float().mean(dim=1)
    light = light * (light > 30)  # of the dot, not of the compression
    for t in range(3):
        total = light[t].sum()
        x = (light[t].sum(0) * (torch.arange(SIZE[1]) + 0.5)).sum() / total
        y = (light[t].sum(1) * (torch.arange(SIZE[0]) + 0.5)).sum() / total
        torch.testing.assert_close(torch.stack([x, y]), batch.xy[0, 0, t], atol=0.1, rtol=0)


def test_only_the_beginning(tmp_path: Path) -> None:
    frames, xy, visible, valid = annotated()
    visible[:], valid[:] = True, True
    write_point_odyssey(tmp_path / "test" / "a", frames, xy, visible, valid)
    whole = PointOdysseyDataset(tmp_path, num_points=None)[0]
    part = PointOdysseyDataset(tmp_path, num_points=None, max_frames=9)[0]
    assert torch.equal(part.video, whole.video[:, :9])
    assert part.xy.shape[2] == 9
    with pytest.raises(ValueError, match="max_frames must be at least 1, got 0"):
        PointOdysseyDataset(tmp_path, max_frames=0)
    with pytest.raises(ValueError, match="num_points must be at least 1, got 0"):
        PointOdysseyDataset(tmp_path, num_points=0)


def change(folder: Path, **arrays: Any) -> None:
    with np.load(folder / "anno.npz", allow_pickle=False) as file:
        kept = {key: file[key] for key in ("trajs_2d", "visibs", "valids") if arrays.get(key, 0) is not None}
    np.savez(folder / "anno.npz", **{**kept, **{key: value for key, value in arrays.items() if value is not None}})


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda seq: (seq / "anno.npz").unlink(), r"a/anno\.npz: not a readable annotation"),
        (lambda seq: (seq / "anno.npz").write_bytes(b"no"), r"a/anno\.npz: not a readable annotation"),
        (lambda seq: change(seq, visibs=None), r"anno\.npz: lacks visibs"),
        (lambda seq: change(seq, trajs_2d=None), r"anno\.npz: .*lacks trajs_2d"),
        (lambda seq: change(seq, trajs_2d=np.array([None])), r"anno\.npz: not a readable annotation.*pickle"),
        (lambda seq: change(seq, trajs_2d=np.zeros((T, N, 3))), r"anno\.npz: trajs_2d must be float \(T, N, 2\)"),
        (lambda seq: change(seq, valids=np.ones((T, 3))), r"anno\.npz: valids must be \(12, 60\)"),
        (lambda seq: change(seq, visibs=np.zeros((T, N))), r"anno\.npz: none of the 60 points is visible"),
        (lambda seq: change(seq, trajs_2d=np.full((T, N, 2), np.nan)), r"anno\.npz: none of the 60 points"),
        (lambda seq: (seq / "rgbs" / "rgb_00011.jpg").unlink(), "rgbs: expected 12 frames .* got 11"),
        (
            lambda seq: (seq / "rgbs" / "rgb_00003.jpg").rename(seq / "rgbs" / "rgb_00012.jpg"),
            "rgbs: expected frames 0 to 11, got no 3",
        ),
        (lambda seq: (seq / "rgbs" / "x.jpg").touch(), r"x\.jpg: expected a name such as rgb_00000\.jpg"),
        (lambda seq: (seq / "rgbs" / "rgb_00000.jpg").write_bytes(b""), r"rgb_00000\.jpg is not a readable"),
        (lambda seq: (seq / "rgbs" / "rgb_00005.jpg").write_bytes(b"no"), r"rgb_00005\.jpg is not a readable"),
        (
            lambda seq: Image.new("RGB", (8, 8)).save(seq / "rgbs" / "rgb_00004.jpg"),
            r"rgbs: expected frames of one size, got \(60, 90\) and \(8, 8\)",
        ),
    ],
)
def test_damage_is_a_value_error_that_names_the_file(tmp_path: Path, damage: Any, message: str) -> None:
    for name in "ab":
        write_point_odyssey(tmp_path / "test" / name, *annotated())
    damage(tmp_path / "test" / "a")
    with pytest.raises(ValueError, match=message):
        PointOdysseyDataset(tmp_path)[0]


def test_no_sequences(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="test: no such folder"):
        PointOdysseyDataset(tmp_path)
    (tmp_path / "test" / "a").mkdir(parents=True)
    with pytest.raises(FileNotFoundError, match=r"expected folders SEQUENCE with SEQUENCE/anno\.npz"):
        PointOdysseyDataset(tmp_path)


def test_lucas_kanade_follows_the_texture(tmp_path: Path) -> None:
    frames, xy, inside = panning(12, (120, 200), 40)
    write_point_odyssey(tmp_path / "data" / "test" / "a", frames, xy, inside, np.ones_like(inside))
    overrides = ["benchmark=point_odyssey", f"benchmark.path={tmp_path / 'data'}", "report=false"]
    config = compose_config("eval", ["models=[lucas_kanade,static]", *overrides])
    config.output_dir = str(tmp_path / "out")
    evaluate_models(config)
    found = {}
    for path in (tmp_path / "out" / "results").glob("point_odyssey/*.csv"):
        for row in csv.DictReader(path.open()):
            found[row["model"]] = float(row["average_pts_within_thresh"])
    assert found["lucas_kanade"] > 0.97
    assert found["static"] < 0.4
