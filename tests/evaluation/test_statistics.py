"""Bootstrap intervals against closed forms, coverage and hand-made pairs."""

from __future__ import annotations

import numpy as np
import pytest

from trackbench.evaluation.statistics import bootstrap_mean, paired_difference


def test_width_is_that_of_the_normal_approximation() -> None:
    values = np.random.default_rng(0).normal(0.6, 0.1, 400)
    interval = bootstrap_mean(values)
    half_width = 1.96 * values.std() / np.sqrt(len(values))
    assert interval.mean == pytest.approx(values.mean())
    assert interval.high - interval.mean == pytest.approx(half_width, rel=0.05)
    assert interval.mean - interval.low == pytest.approx(half_width, rel=0.05)
    assert interval.num_videos == 400


def test_intervals_cover_the_truth_as_often_as_promised() -> None:
    generator = np.random.default_rng(1)
    covered = 0
    for seed in range(200):
        interval = bootstrap_mean(generator.normal(0, 1, 40), num_resamples=400, confidence=0.9, seed=seed)
        covered += interval.low <= 0 <= interval.high
    assert 165 <= covered <= 193  # 180 expected, standard deviation 4.2


def test_the_seed_decides() -> None:
    values = np.random.default_rng(2).random(20)
    assert bootstrap_mean(values, seed=3) == bootstrap_mean(values, seed=3)
    assert bootstrap_mean(values, seed=3) != bootstrap_mean(values, seed=4)


def test_pairing_finds_a_small_gain_between_videos_that_differ_much() -> None:
    generator = np.random.default_rng(3)
    base = {f"v{i}": value for i, value in enumerate(generator.uniform(0.1, 0.9, 30))}
    better = {video: value + 0.01 + generator.normal(0, 0.005) for video, value in base.items()}
    difference = paired_difference(base, dict(reversed(better.items())))
    assert difference.excludes_zero
    assert difference.mean == pytest.approx(0.01, abs=0.003)
    assert paired_difference(better, base).mean == pytest.approx(-difference.mean)
    assert bootstrap_mean(list(base.values())).high > bootstrap_mean(list(better.values())).low


def test_equal_models_do_not_differ() -> None:
    scores = {"a": 0.1, "b": 0.7}
    difference = paired_difference(scores, scores)
    assert (difference.mean, difference.low, difference.high) == (0, 0, 0)
    assert not difference.excludes_zero


def test_one_video_has_no_width() -> None:
    assert bootstrap_mean([0.4])[:3] == (0.4, 0.4, 0.4)


def test_unpaired_videos_are_named() -> None:
    with pytest.raises(ValueError, match=r"only one has \['b', 'c'\]"):
        paired_difference({"a": 1.0, "b": 1.0}, {"a": 1.0, "c": 1.0})


@pytest.mark.parametrize("values", [[], [0.5, float("nan")], [[0.5]]])
def test_what_is_no_sample_is_refused(values: list[float]) -> None:
    with pytest.raises(ValueError, match="one per video"):
        bootstrap_mean(values)
