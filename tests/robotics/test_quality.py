"""Scores against their formula worked out by hand, and against what a damaged track must do to a ranking."""

from __future__ import annotations

import numpy as np
import pytest

from trackbench.robotics.quality import episode_score, jump_frames, rate_points

H, W, T = 480, 640, 60  # the diagonal is 800 px, so 1% is 8 px


def smooth(points: int = 3) -> np.ndarray:
    t = np.arange(T)
    return np.stack(
        [np.stack([100 * k + 2 * t, 200 + 10 * np.sin(t / 8 + k)], axis=1) for k in range(1, points + 1)]
    ).astype(np.float32)


def rate(xy: np.ndarray, visible: np.ndarray | None = None, error: np.ndarray | None = None) -> list:
    visible = np.ones(xy.shape[:2], bool) if visible is None else visible
    error = np.zeros(xy.shape[:2], np.float32) if error is None else error
    return rate_points([f"p{k}" for k in range(len(xy))], xy, visible, error, H, W)


def test_a_clean_track_has_the_full_score() -> None:
    assert [(point.score, point.jumps, point.lost) for point in rate(smooth())] == [(1, 0, 0)] * 3


def test_the_score_is_the_product_of_its_parts() -> None:
    xy, visible, error = smooth(1), np.ones((1, T), bool), np.zeros((1, T), np.float32)
    visible[0, 45:] = False  # a quarter is lost
    error[0] = 8  # the tolerance: half
    error[0, 45:] = 500  # not where it is lost
    xy[0, 20] += 60  # away and back: two jumps, a third
    (point,) = rate(xy, visible, error)
    assert (point.jumps, point.lost, point.forward_backward_px) == (2, 0.25, 8)
    assert point.score == pytest.approx(0.5 / 3 * 0.75)


def test_unmeasured_frames_do_not_count() -> None:
    error = np.full((1, T), np.nan, np.float32)
    assert rate(smooth(1), error=error)[0].forward_backward_px == 0
    error[0, :30] = 4
    assert rate(smooth(1), error=error)[0].forward_backward_px == 4


def test_a_point_that_is_never_seen_scores_nothing() -> None:
    (point,) = rate(smooth(1), np.zeros((1, T), bool))
    assert (point.score, point.lost) == (0, 1)


def test_jumps_are_steps_far_beyond_the_motion_around_them() -> None:
    xy, visible = smooth(1)[0], np.ones(T, bool)
    fast = xy * 9  # 18 px a frame and more, all along: motion, no jumps
    assert jump_frames(fast, visible, 800).tolist() == []
    xy[30:] += 40
    assert jump_frames(xy, visible, 800).tolist() == [30]
    visible[25:35] = False  # ten frames are time enough for 40 px
    assert jump_frames(xy, visible, 800).tolist() == []
    xy[30:] += 400
    assert jump_frames(xy, visible, 800).tolist() == [35]


@pytest.mark.parametrize("damage", ["jump", "lost", "drift"])
@pytest.mark.parametrize("point", [0, 2])
def test_damage_lowers_the_rank_of_an_episode(damage: str, point: int) -> None:
    xy, visible = smooth(), np.ones((3, T), bool)
    error = np.random.default_rng(0).uniform(0, 2, (3, T)).astype(np.float32)
    visible[0, :6] = False  # the worst point is another one than the damaged one, or the same
    untouched = episode_score(rate(xy, visible, error))
    if damage == "jump":
        xy[point, 30:] += 50
    elif damage == "lost":
        visible[point, 40:50] = False
    else:
        error[point, 20:] += 15
    assert episode_score(rate(xy, visible, error)) < untouched - 0.01


def test_an_episode_is_judged_by_its_worst_point_and_by_all() -> None:
    points = rate(smooth(2), np.array([[True] * T, [True] * 30 + [False] * 30]))
    assert episode_score(points) == pytest.approx((0.5 + 0.75) / 2)
    with pytest.raises(ValueError, match="no score"):
        episode_score([])


def test_shapes_that_do_not_belong_together_are_refused() -> None:
    with pytest.raises(ValueError, match="expected 1 names"):
        rate_points(["a", "b"], smooth(1), np.ones((1, T), bool), np.zeros((1, T)), H, W)
