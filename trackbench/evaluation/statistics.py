"""Is the difference between two models real? Bootstrap confidence intervals over videos."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray


class Interval(NamedTuple):
    """A mean over videos with its confidence interval."""

    mean: float
    low: float
    high: float
    num_videos: int

    @property
    def excludes_zero(self) -> bool:
        """Whether zero lies outside the interval: for a difference, whether it is real at this level."""
        return self.low > 0 or self.high < 0


def bootstrap_mean(
    values: Sequence[float] | NDArray[np.floating],
    *,
    confidence: float = 0.95,
    num_resamples: int = 10_000,
    seed: int = 0,
) -> Interval:
    """Percentile bootstrap of a mean (Efron and Tibshirani, "An Introduction to the Bootstrap", chapter 13).

    Args:
        values: one number per video.
        confidence: probability that the interval is to cover.
        num_resamples: how often the videos are drawn anew, with replacement.
        seed: of the draws; the same seed gives the same interval.

    Raises:
        ValueError: without values, with values that are not finite, or with a confidence outside (0, 1).
    """
    sample = np.asarray(values, dtype=np.float64)
    if sample.ndim != 1 or not len(sample) or not np.isfinite(sample).all():
        raise ValueError(f"values must be finite numbers, one per video, got shape {sample.shape}: {sample}")
    if not 0 < confidence < 1 or num_resamples < 1:
        raise ValueError(f"expected confidence in (0, 1) and resamples >= 1, got {confidence}, {num_resamples}")
    draws = np.random.default_rng(seed).integers(len(sample), size=(num_resamples, len(sample)))
    means = sample[draws].mean(axis=1)
    tail = (1 - confidence) / 2
    low, high = np.quantile(means, [tail, 1 - tail])
    return Interval(float(sample.mean()), float(low), float(high), len(sample))


def paired_difference(
    first: Mapping[str, float],
    second: Mapping[str, float],
    *,
    confidence: float = 0.95,
    num_resamples: int = 10_000,
    seed: int = 0,
) -> Interval:
    """Mean of ``second - first`` over the videos, with a paired bootstrap confidence interval.

    Pairing by video removes what makes a video hard for both models, so that the interval is narrower than
    the two models' own intervals suggest.

    Args:
        first: video -> score of the model that is compared with.
        second: video -> score of the model in question.
        confidence: see :func:`bootstrap_mean`.
        num_resamples: see :func:`bootstrap_mean`.
        seed: see :func:`bootstrap_mean`.

    Raises:
        ValueError: when the two were not evaluated on the same videos.
    """
    if first.keys() != second.keys():
        unpaired = sorted(first.keys() ^ second.keys())
        raise ValueError(f"the models were not evaluated on the same videos; only one has {unpaired[:5]}")
    differences = [second[video] - first[video] for video in sorted(first)]
    return bootstrap_mean(differences, confidence=confidence, num_resamples=num_resamples, seed=seed)
