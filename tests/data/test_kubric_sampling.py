"""Sampling points of Kubric scenes, against recorded runs of the official code and their randomness."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import ndimage, stats

from trackbench.data.kubric import sample_tracks, sampling

Scene = dict[str, Any]
RUNS = [(name, run) for name in ("a64", "b96") for run in range(4)]
SNAPPED = 2  # the run with snap_to_occluder


class Recorded:
    """One scene and one run of the official code, which also stands for a generator that draws as that run did."""

    def __init__(self, folder: Path, name: str, run: int) -> None:
        stored = np.load(folder / f"kubric_{name}.npz", allow_pickle=False)
        self.scene: Scene = {key[3:]: stored[key] for key in stored.files if key.startswith("ex_")}
        prefix = f"run{run}_"
        self.run = {key[len(prefix) :]: stored[key] for key in stored.files if key.startswith(prefix)}
        self.window = tuple(self.run["window"].tolist())
        self.settings = {
            "num_tracks": int(self.run["opt_tracks_to_sample"]),
            "size": tuple(self.run["opt_train_size"].tolist()),
            "stride": int(self.run["opt_sampling_stride"]),
            "max_sampled_frac": float(self.run["opt_max_sampled_frac"]),
            "random_crop": bool(self.run["opt_random_crop"]),
            "snap_to_occluder": bool(self.run["opt_snap_to_occluder"]),
        }
        self.found = len(self.run["query_tyx"])

    def integers(self, low: Any, high: Any = None, size: Any = None) -> np.ndarray:
        if high is not None:
            assert (low, high, size) == (-1, 2, (self.found, 2))
            return self.run["snap_jitter"]
        if size is not None:
            assert (low, size) == (self.run["opt_sampling_stride"], 3)
            return self.run["start_vec"]
        np.testing.assert_array_equal(low, self.run["counts"][self.run["pt_seg"]])
        return self.run["sel_idx"]

    def random(self, size: int) -> np.ndarray:
        assert size == self.found
        return self.run["snap_coin"]

    def sample(self, monkeypatch: pytest.MonkeyPatch, **settings: Any) -> sampling.SampledTracks:
        monkeypatch.setattr(sampling, "random_window", lambda *_: self.window)
        return sample_tracks(self.scene, rng=self, **(self.settings | settings))  # type: ignore[arg-type]


@pytest.mark.parametrize(("name", "run"), RUNS)
def test_recorded_draws_give_the_official_output(
    data_fixtures: Path, monkeypatch: pytest.MonkeyPatch, name: str, run: int
) -> None:
    recorded = Recorded(data_fixtures, name, run)
    official = recorded.run
    ours = recorded.sample(monkeypatch, official_quirks=True)
    assert ours.window == recorded.window
    np.testing.assert_allclose(ours.queries[:, [0, 2, 1]], official["out_query_points"], rtol=0, atol=1e-4)
    np.testing.assert_allclose(ours.xy, official["out_target_points"], rtol=0, atol=1e-3)
    np.testing.assert_allclose(ours.relative_depth, official["out_relative_depth"], rtol=1e-4)
    robust = official["occ_robust"]
    robust = np.concatenate([robust, np.repeat(robust[-2:-1], len(ours.xy) - len(robust), axis=0)])
    np.testing.assert_array_equal(~ours.visible[robust], official["out_occluded"][robust])


@pytest.mark.parametrize(("name", "run"), RUNS)
def test_without_quirks_only_the_defects_differ(
    data_fixtures: Path, monkeypatch: pytest.MonkeyPatch, name: str, run: int
) -> None:
    recorded = Recorded(data_fixtures, name, run)
    official, found = recorded.run, recorded.found
    ours = recorded.sample(monkeypatch)
    assert len(ours.xy) == found  # nothing is padded
    np.testing.assert_allclose(ours.xy, official["out_target_points"][:found], rtol=0, atol=1e-3)
    if run != SNAPPED:
        expected = official["out_query_points"][:found]
        np.testing.assert_allclose(ours.queries[:, [0, 2, 1]], expected, rtol=0, atol=1e-4)
    t, y, x = official["query_tyx"].T
    low, high = recorded.scene["depth_range"].astype(np.float64)
    depth = low + recorded.scene["depth"][t, y, x] * ((high - low) / 65535)
    np.testing.assert_allclose(ours.relative_depth, official["raw_depth"] / depth[:, None], rtol=1e-5)
    # a point is where it was asked for, at the depth that is stored there
    np.testing.assert_allclose(ours.relative_depth[np.arange(found), t], 1, atol=0.02)


@pytest.mark.parametrize(("name", "run"), RUNS)
def test_points_on_each_object_are_as_many_as_in_the_official_run(
    data_fixtures: Path, name: str, run: int
) -> None:
    official = Recorded(data_fixtures, name, run).run
    budget = sampling.track_budget(
        official["counts"], int(official["opt_tracks_to_sample"]), float(official["opt_max_sampled_frac"])
    )
    np.testing.assert_array_equal(budget, official["num_to_sample"][: len(budget)])
    assert not official["num_to_sample"][len(budget) :].any()


@pytest.mark.parametrize(("name", "run"), [(name, run) for name, run in RUNS if run in (1, 2)])
def test_cropped_frames_are_the_official_ones(data_fixtures: Path, name: str, run: int) -> None:
    recorded = Recorded(data_fixtures, name, run)
    video, size = recorded.scene["video"], recorded.settings["size"]
    middle = slice(len(video) // 2, len(video) // 2 + 1)
    settings = (recorded.window, size, True)
    exact = sampling.crop_frames(video[middle].astype(np.float32), *settings)
    np.testing.assert_allclose(exact[0] / 127.5 - 1, recorded.run["out_video_mid_frame"], rtol=0, atol=1e-4)
    rounded = sampling.crop_frames(video[middle], *settings)
    assert rounded.dtype == np.uint8
    np.testing.assert_allclose(rounded, exact, rtol=0, atol=0.51)


@pytest.mark.parametrize("size", [(64, 64), (20, 90)])
def test_frames_are_resized_by_pixel_centres(data_fixtures: Path, size: tuple[int, int]) -> None:
    video = Recorded(data_fixtures, "a64", 0).scene["video"][:2]
    y0, x0, y1, x1 = window = (3, 10, 50, 41)
    rows = (np.arange(size[0]) + 0.5) * (y1 - y0) / size[0] - 0.5
    columns = (np.arange(size[1]) + 0.5) * (x1 - x0) / size[1] - 0.5
    at = np.meshgrid(range(2), rows, columns, range(3), indexing="ij")
    expected = ndimage.map_coordinates(video[:, y0:y1, x0:x1].astype(float), at, order=1, mode="nearest")
    exact = sampling.crop_frames(video.astype(np.float32), window, size)
    np.testing.assert_allclose(exact, expected, rtol=0, atol=1e-2)
    np.testing.assert_allclose(sampling.crop_frames(video, window, size), expected, rtol=0, atol=1)


# --- randomness ------------------------------------------------------------------------------------------------


def test_windows_are_distributed_as_the_official_ones(data_fixtures: Path) -> None:
    official = np.load(data_fixtures / "kubric_crop_windows.npz")["windows_256"].astype(np.float64)
    rng = np.random.default_rng(0)
    ours = np.array([sampling.random_window(rng, 256, 256) for _ in range(6000)], np.float64)

    def measures(windows: np.ndarray) -> dict[str, np.ndarray]:
        y0, x0, y1, x1 = windows.T
        h, w = y1 - y0, x1 - x0
        slack_y, slack_x = np.maximum(256 - h, 1), np.maximum(256 - w, 1)
        return {"area": h * w, "height": h, "width": w, "aspect": w / h, "y": y0, "x": x0} | {
            "y of those possible": y0 / slack_y,
            "x of those possible": x0 / slack_x,
        }

    theirs = measures(official)
    for key, values in measures(ours).items():
        assert stats.ks_2samp(values, theirs[key]).pvalue > 0.01, key


@pytest.mark.parametrize("size", [(256, 256), (64, 96), (300, 30), (7, 5), (1, 1)])
def test_windows_fit(size: tuple[int, int]) -> None:
    rng = np.random.default_rng(0)
    for _ in range(500):
        y0, x0, y1, x1 = sampling.random_window(rng, *size)
        assert 0 <= y0 < y1 <= size[0]
        assert 0 <= x0 < x1 <= size[1]
        assert y0 == 0 or y1 < size[0]  # as published, the last possible offset is never drawn
        assert x0 == 0 or x1 < size[1]
        assert (y1 - y0) * (x1 - x0) >= 0.3 * size[0] * size[1]


def test_pixels_of_a_segment_are_equally_likely() -> None:
    scene = flat_scene(shape=(4, 8, 8))
    scene["segmentations"][:, :4] = 1
    draws = [
        sample_tracks(scene, 64, np.random.default_rng(seed), stride=2, max_sampled_frac=1) for seed in range(300)
    ]
    t, x, y = np.concatenate([drawn.queries for drawn in draws]).T
    counts = np.bincount((t * 64 + (y - 0.5) * 8 + x - 0.5).astype(np.int64), minlength=256)
    assert counts.sum() == 300 * 32  # all of the grid, 16 pixels of each
    # drawing with one grid at a time makes pixels of one grid alike, so the bound is wide
    assert stats.chisquare(counts).statistic < 2 * stats.chi2(255).ppf(0.999)


def test_one_seed_gives_one_sample(data_fixtures: Path) -> None:
    scene = Recorded(data_fixtures, "a64", 0).scene

    def sample(seed: int) -> sampling.SampledTracks:
        return sample_tracks(scene, 64, np.random.default_rng(seed), random_crop=True, snap_to_occluder=True)

    first, second, other = sample(3), sample(3), sample(4)
    assert first.window == second.window != other.window
    for key in ("frames", "queries", "xy", "visible", "relative_depth"):
        np.testing.assert_array_equal(getattr(first, key), getattr(second, key))


# --- what is right by default ----------------------------------------------------------------------------------


def flat_scene(shape: tuple[int, int, int] = (4, 32, 32)) -> Scene:
    """A still wall, painted by a ramp in x (red) and in y (green), and one still box without a picture."""
    T, H, W = shape
    video = np.zeros((T, H, W, 3), np.uint8)
    video[..., 0], video[..., 1] = 4 * np.arange(W), 4 * np.arange(H)[:, None]
    return {
        "video": video,
        "segmentations": np.zeros(shape, np.uint8),
        "depth": np.full(shape, 30000, np.uint16),
        "depth_range": np.array([1, 9], np.float32),
        "normal": np.full((*shape, 3), 40000, np.uint16),
        "object_coordinates": np.zeros((*shape, 3), np.uint16),
        "bboxes_3d": np.random.default_rng(0).normal(size=(1, T, 8, 3)),
        "obj_quaternions": np.tile([1.0, 0, 0, 0], (1, T, 1)),
        "cam_positions": np.zeros((T, 3)),
        "cam_quaternions": np.tile([1.0, 0, 0, 0], (T, 1)),
        "focal_length": 35.0,
        "sensor_width": 32.0,
    }


@pytest.mark.parametrize("vertical_flip", [False, True])
@pytest.mark.parametrize("size", [None, (48, 40)])
def test_tracks_lie_where_the_frames_show_their_points(size: tuple[int, int] | None, vertical_flip: bool) -> None:
    scene = flat_scene()
    sample = sample_tracks(
        scene, 200, np.random.default_rng(1), size=size, random_crop=True, vertical_flip=vertical_flip, stride=2
    )
    clip = sample.clip("wall")
    y0, x0, y1, x1 = sample.window
    (H, W), T = clip.size, len(clip.frames)
    assert (size or (32, 32)) == (H, W)
    assert (y1 - y0, x1 - x0) != (32, 32)
    assert clip.visible.all()
    np.testing.assert_allclose(clip.xy, np.broadcast_to(sample.queries[:, None, 1:], clip.xy.shape), atol=1e-3)
    # away from the border the ramp is exact between pixels; its red and green say where the wall's point is
    margin = np.array([W, H]) / (x1 - x0, y1 - y0)
    inner = ((sample.queries[:, 1:] > margin) & (sample.queries[:, 1:] < (W, H) - margin)).all(axis=1)
    on_wall = (
        np.array([x0, y0])
        + ((sample.queries[:, 1:] * (1, -1) + (0, H)) if vertical_flip else sample.queries[:, 1:]) / margin
    )
    for t in range(T):
        shown = [
            ndimage.map_coordinates(
                clip.frames[t, ..., c].astype(float), (clip.xy[inner, t, ::-1] - 0.5).T, order=1
            )
            for c in (0, 1)
        ]
        np.testing.assert_allclose(np.stack(shown, -1) / 4 + 0.5, on_wall[inner], atol=0.2)
    assert inner.sum() > 30


def test_quirks_of_the_coordinates() -> None:
    scene = flat_scene()

    def sample(official_quirks: bool) -> sampling.SampledTracks:
        return sample_tracks(
            scene,
            20,
            np.random.default_rng(0),
            size=(16, 48),
            stride=1,
            random_crop=True,
            vertical_flip=True,
            official_quirks=official_quirks,
        )

    ours, theirs = sample(False), sample(True)
    assert ours.window == theirs.window
    unscaled = np.array([32 / 48, -32 / 16])  # in pixels of the scene's size, and y is -y
    np.testing.assert_allclose(theirs.xy, (ours.xy * (1, -1) + (0, 16)) * unscaled, atol=1e-9)
    np.testing.assert_allclose(theirs.queries[:, 1:], (ours.queries[:, 1:] * (1, -1) + (0, 16)) * unscaled)


@pytest.mark.parametrize("seed", range(5))
def test_snapped_queries_ask_for_the_occluder(data_fixtures: Path, seed: int) -> None:
    scene = Recorded(data_fixtures, "a64", 0).scene
    sample = sample_tracks(scene, 2000, np.random.default_rng(seed), stride=1, snap_to_occluder=True)
    low, high = scene["depth_range"]
    depth = low + scene["depth"] * ((high - low) / 65535)
    t = sample.queries[:, 0].astype(int)
    asked = np.floor(sample.queries[:, :0:-1]).astype(int)  # row, column
    tracked = np.floor(sample.xy[np.arange(len(t)), t, ::-1]).astype(int)
    moved = (asked != tracked).any(axis=1)
    assert 10 < moved.sum() < 500
    assert np.abs(asked - tracked).max() == 1
    near, far = depth[t, tracked[:, 0], tracked[:, 1]], depth[t, asked[:, 0], asked[:, 1]]
    assert (near[moved] < 0.95 * far[moved]).all()


@pytest.mark.parametrize("official_quirks", [False, True])
def test_snapped_queries_stay_in_the_window(monkeypatch: pytest.MonkeyPatch, official_quirks: bool) -> None:
    scene = flat_scene((4, 8, 8))
    scene["depth"][:, :, 4:] = 60000  # far
    monkeypatch.setattr(sampling, "random_window", lambda *_: (0, 0, 8, 4))  # the near half
    settings: dict[str, Any] = {"stride": 1, "max_sampled_frac": 1, "random_crop": True, "snap_to_occluder": True}
    sample = sample_tracks(scene, 500, np.random.default_rng(0), official_quirks=official_quirks, **settings)
    assert (sample.queries[:, 1] > 8).any() == official_quirks


@pytest.mark.parametrize("name", ["a64", "b96"])
def test_edges_are_pixels_beside_a_nearer_one(data_fixtures: Path, name: str) -> None:
    scene = Recorded(data_fixtures, name, 0).scene
    low, high = scene["depth_range"].astype(np.float64)
    depth = low + scene["depth"] * ((high - low) / 65535)
    nearest = ndimage.minimum_filter(depth, size=(1, 3, 3), mode="reflect")
    expected = np.where(nearest < 0.95 * depth, -1, scene["segmentations"].astype(int))
    ours = sampling.without_edges(scene)
    np.testing.assert_array_equal(ours, expected)
    assert 0 < (ours < 0).mean() < 0.5


# --- few points, none, and wrong input -------------------------------------------------------------------------


def test_quirk_of_too_few_points() -> None:
    scene = flat_scene((4, 8, 8))

    def sample(frac: float, official_quirks: bool) -> sampling.SampledTracks:
        rng = np.random.default_rng(0)
        return sample_tracks(scene, 20, rng, stride=2, max_sampled_frac=frac, official_quirks=official_quirks)

    found, padded = sample(0.25, False), sample(0.25, True)  # of 32
    assert len(found.xy) == 8
    assert len(padded.xy) == 20
    np.testing.assert_array_equal(padded.xy, found.xy[[*range(8), *[6] * 12]])
    np.testing.assert_array_equal(padded.queries, found.queries[[*range(8), *[6] * 12]])
    assert len(sample(1 / 32, True).xy) == 1


@pytest.mark.parametrize("official_quirks", [False, True])
@pytest.mark.parametrize("snap_to_occluder", [False, True])
def test_no_point_to_sample(official_quirks: bool, snap_to_occluder: bool) -> None:
    scene = flat_scene((4, 8, 8))
    sample = sample_tracks(
        scene,
        10,
        np.random.default_rng(0),
        random_crop=True,  # windows of a pixel or two on a grid of 4
        snap_to_occluder=snap_to_occluder,
        official_quirks=official_quirks,
    )
    assert sample.queries.shape == (0, 3)
    assert sample.relative_depth.shape == (0, 4)
    assert sample.clip().xy.shape == (0, 4, 2)


def test_an_empty_grid() -> None:
    grid = sampling.Grid(np.full((4, 8, 8), -1), np.array([1, 1, 1]), 2, (0, 0, 8, 8))
    assert grid.counts.tolist() == [0]
    assert sampling.track_budget(grid.counts, 10).tolist() == [0]
    grid = sampling.Grid(np.zeros((4, 8, 8), np.uint8), np.array([3, 3, 3]), 4, (0, 0, 8, 2))
    assert grid.counts.tolist() == [0]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_tracks": 0}, "num_tracks"),
        ({"max_sampled_frac": 0}, "max_sampled_frac"),
        ({"max_sampled_frac": 1.5}, "max_sampled_frac"),
        ({"stride": 0}, "stride"),
        ({"stride": 3}, r"scene\['video'\]: expected T, H and W to be multiples of stride 3, got \(4, 32, 32\)"),
        ({"size": (0, 8)}, "size"),
    ],
)
def test_a_wrong_setting_is_refused(settings: dict[str, Any], message: str) -> None:
    settings = {"num_tracks": 8} | settings
    with pytest.raises(ValueError, match=message):
        sample_tracks(flat_scene(), rng=np.random.default_rng(0), **settings)


def test_a_missing_or_wrong_array_is_named() -> None:
    scene = flat_scene()
    with pytest.raises(ValueError, match=r"scene\['video'\]: expected uint8 \(4, 32, 32, 3\)"):
        sample_tracks(scene | {"video": scene["video"][..., 0]}, 8, np.random.default_rng(0))
    del scene["normal"]
    with pytest.raises(ValueError, match=r"scene lacks 'normal': expected uint16 \(4, 32, 32, 3\)"):
        sample_tracks(scene, 8, np.random.default_rng(0))
