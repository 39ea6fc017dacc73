"""Overlays against where the paint must be; contact sheets against their layout."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from trackbench.data.video_io import read_video
from trackbench.structures import Tracks, VideoBatch
from trackbench.visualization import (
    contact_sheet,
    ground_truth,
    overlay,
    overlay_frames,
    rainbow,
    save_overlay,
    spectrum,
)

T, H, W = 5, 60, 80


def make(xy: list[list[list[float]]], visible: list[list[bool]] | None = None, start: int = 0) -> Tracks:
    positions = torch.tensor(xy)
    shown = torch.ones(positions.shape[:2], dtype=torch.bool) if visible is None else torch.tensor(visible)
    queries = torch.cat([torch.full((len(positions), 1), float(start)), positions[:, start]], dim=1)
    return Tracks(positions, shown, shown.float(), queries)


def grey() -> np.ndarray:
    return np.full((T, H, W, 3), 128, np.uint8)


def centroid(picture: np.ndarray) -> tuple[float, float]:
    """Centre of all that was painted, in raster coordinates."""
    weight = np.abs(picture.astype(float) - 128).sum(axis=2)
    y, x = np.mgrid[: picture.shape[0], : picture.shape[1]] + 0.5
    return float((x * weight).sum() / weight.sum()), float((y * weight).sum() / weight.sum())


@pytest.mark.parametrize("visible", [True, False])
@pytest.mark.parametrize(("x", "y", "zoom"), [(20.5, 30.5, 1), (41.25, 17.75, 1), (33.3, 25.0, 3)])
def test_dots_lie_where_the_raster_says(x: float, y: float, zoom: int, visible: bool) -> None:
    drawn = overlay(grey(), make([[[x, y]] * T], [[visible] * T]), radius=5, zoom=zoom)
    assert drawn.shape == (T, zoom * H, zoom * W, 3)
    assert centroid(drawn[2]) == pytest.approx((zoom * x, zoom * y), abs=0.1)


def test_visible_is_filled_and_occluded_is_hollow() -> None:
    tracks = make([[[20.5, 30.5]] * T, [[60.5, 30.5]] * T], [[True] * T, [False] * T])
    drawn = overlay(grey(), tracks, radius=6)
    colours = rainbow(tracks.queries)
    assert tuple(drawn[0, 30, 20]) == colours[0]
    assert tuple(drawn[0, 30, 60]) == (128, 128, 128)
    assert (drawn[0, 30, 50:60] != 128).any()


def test_trails_join_visible_frames_only_and_fade() -> None:
    path = [[10.5 + 14 * t, 30.5] for t in range(T)]
    drawn = overlay(grey(), make([path], [[True, True, False, True, True]]), radius=2, trail=4)[4]
    painted = (drawn[30] != 128).any(axis=1)
    assert painted[54:60].all()  # from frame 3 to 4
    assert not painted[28:50].any()  # frame 2 is occluded
    distance = np.abs(drawn[30].astype(int) - 128).sum(axis=1)
    assert 0 < distance[17] < distance[57]
    without = overlay(grey(), make([path]), radius=2, trail=0)[4]
    assert not (without[30, :60] != 128).any()


def test_errors_join_points_to_the_truth() -> None:
    tracks, truth = make([[[20.5, 30.5]] * T]), make([[[60.5, 30.5]] * T], [[True, False] + [True] * 3])
    drawn = overlay(grey(), tracks, gt=truth, radius=3)
    assert drawn[0, 30, 45].min() > 230
    assert tuple(drawn[1, 30, 45]) == (128, 128, 128)


def test_points_before_their_query_show_only_where_visible() -> None:
    visible = [[False, True, False, False, True]]
    drawn = overlay(grey(), make([[[20.5, 30.5]] * T], visible, start=2), trail=0)
    assert [bool((frame != 128).any()) for frame in drawn] == [False, True, True, True, True]


def test_positions_that_cannot_be_drawn_are_left_out() -> None:
    xy = [[[float("nan"), 1.0]] * T, [[1e30, -1e30]] * T, [[float("inf"), 5.0]] * T]
    tracks = Tracks(torch.tensor(xy), torch.ones(3, T, dtype=torch.bool), torch.ones(3, T), torch.zeros(3, 3))
    assert np.array_equal(overlay(grey(), tracks, gt=tracks), grey())


def test_inputs_stay_as_they_are() -> None:
    video, tracks = torch.from_numpy(grey()), make([[[20.5, 30.5]] * T])
    before = tracks.xy.clone()
    assert not np.array_equal(overlay(video, tracks, gt=tracks, zoom=1), video.numpy())
    assert (video == 128).all()
    assert torch.equal(tracks.xy, before)


def test_no_points() -> None:
    empty = Tracks(torch.empty(0, T, 2), torch.empty(0, T, dtype=torch.bool), torch.empty(0, T), torch.empty(0, 3))
    assert np.array_equal(overlay(grey(), empty), grey())


def test_rainbow_runs_from_the_top_to_the_bottom() -> None:
    colours = rainbow(torch.tensor([[0, 5.0, 50.0], [0, 5.0, 1.0], [0, 5.0, 25.0]]))
    assert len(set(colours)) == 3
    red, green, _ = colours[1]
    assert red == 255 > green  # the topmost is red
    assert colours[0][2] == 255  # the lowest is violet


@pytest.mark.parametrize("change", [{"trail": -1}, {"zoom": 0}, {"radius": 0.0}])
def test_wrong_settings_are_refused(change: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="must be"):
        overlay(grey(), make([[[1.0, 1.0]] * T]), **change)


def test_tracks_of_another_length_are_refused() -> None:
    with pytest.raises(ValueError, match=r"tracks must be \(N, 5, 2\)"):
        overlay(grey(), make([[[1.0, 1.0]] * (T + 1)]))


def test_ground_truth_leaves_out_what_is_not_labelled() -> None:
    xy = torch.rand(1, 2, T, 2)
    labelled = torch.ones(1, 2, T, dtype=torch.bool)
    labelled[0, 1, 3] = False
    batch = VideoBatch(
        torch.zeros(1, T, 3, H, W, dtype=torch.uint8),
        torch.zeros(1, 2, 3),
        xy,
        torch.ones_like(labelled),
        labelled,
    )
    truth = ground_truth(batch)
    assert truth.xy[1, 3].isnan().all()
    assert not truth.visible[1, 3]
    assert int(truth.visible.sum()) == 2 * T - 1
    assert not batch.xy.isnan().any()


def test_contact_sheet_keeps_every_frame() -> None:
    frames = np.random.default_rng(0).integers(256, size=(5, 6, 8, 3), dtype=np.uint8)
    sheet = contact_sheet(frames, 3, gap=2, background=7)
    assert sheet.shape == (2 * 6 + 2, 3 * 8 + 2 * 2, 3)
    for k, frame in enumerate(frames):
        top, left = (k // 3) * 8, (k % 3) * 10
        assert np.array_equal(sheet[top : top + 6, left : left + 8], frame)
    assert (sheet[6:8] == 7).all()
    assert (sheet[8:, 20:] == 7).all()


def test_contact_sheet_of_few_frames_is_not_wider_than_needed() -> None:
    assert contact_sheet(np.zeros((2, 6, 8, 3), np.uint8), 5, gap=0).shape == (6, 16, 3)


def test_saved_overlay_is_a_video(tmp_path: Path) -> None:
    tracks = make([[[20.5, 30.5]] * T])
    save_overlay(tmp_path / "out.mp4", grey(), tracks, fps=10, zoom=2)
    read = read_video(tmp_path / "out.mp4")
    expected = overlay(grey(), tracks, zoom=2)
    assert read.shape == expected.shape
    assert np.abs(read.astype(int) - expected).mean() < 3


def test_frame_by_frame_is_the_same_and_takes_one_frame_at_a_time() -> None:
    tracks = make([[[10.5 + 14 * t, 30.5] for t in range(T)], [[20.5, 10.5]] * T])
    taken: list[int] = []

    def frames() -> Iterator[np.ndarray]:
        for t, frame in enumerate(grey()):
            taken.append(t)
            yield frame

    for t, picture in enumerate(overlay_frames(frames(), tracks, zoom=2)):
        assert taken[-1] == t
        np.testing.assert_array_equal(picture, overlay(grey(), tracks, zoom=2)[t])


def test_points_take_the_colours_that_they_are_given() -> None:
    tracks = make([[[20.5, 40.5]] * T, [[60.5, 10.5]] * T])
    first = next(overlay_frames(grey(), tracks, radius=6, colours=spectrum(2)))
    assert [tuple(first[40, 20]), tuple(first[10, 60])] == spectrum(2)
    assert rainbow(tracks.queries) == spectrum(2)[::-1]


@pytest.mark.parametrize(("count", "told"), [(T - 1, "has 4 frames, the tracks 5"), (T + 1, "more frames than")])
def test_a_video_of_another_length_than_the_tracks_is_refused(count: int, told: str) -> None:
    frames = [np.zeros((H, W, 3), np.uint8)] * count
    with pytest.raises(ValueError, match=told):
        list(overlay_frames(frames, make([[[20.5, 30.5]] * T])))
