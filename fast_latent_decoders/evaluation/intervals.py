"""What a mean over pictures is worth: bootstrap intervals, plain and paired, and rank correlation.

Values are one per picture, or one per video (`by_group`): the frames and windows of a video are not independent and never
resampled by themselves.
"""

import math
import warnings
from collections.abc import Hashable, Iterable, Sequence
from typing import NamedTuple

import numpy as np

RESAMPLES = 2000


class Interval(NamedTuple):
    """A mean with its interval; `n` values went into it. What is missing, len(values) - n, were NaNs: pictures without a value."""

    mean: float
    low: float
    high: float
    n: int


def interval(values: Sequence[float], level: float = 0.95, seed: int = 0) -> Interval:
    """Mean of one value per picture, NaNs left out, with its BCa bootstrap interval (Efron 1987, scipy's).

    One value has a mean but no interval (NaN bounds); values that are all equal have one of no width.

    Raises:
        ValueError: a value is infinite.
    """
    from scipy.stats import bootstrap

    given = np.asarray(values, dtype=np.float64)
    if np.isinf(given).any():
        raise ValueError("expected finite values or NaN for a picture without one, got an infinite value, which has no mean")
    found = given[~np.isnan(given)]
    n = len(found)
    mean = float(found.mean()) if n else math.nan
    if n < 2:
        return Interval(mean, math.nan, math.nan, n)
    if np.ptp(found) == 0:
        return Interval(mean, mean, mean, n)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of degenerate samples: looked at below
        result = bootstrap(
            (found,), np.mean, confidence_level=level, n_resamples=RESAMPLES, method="BCa", rng=np.random.default_rng(seed),
            batch=max(1, 2**21 // n),  # the jackknife of BCa is n x n at once otherwise
        )  # fmt: skip
    low, high = (float(bound) for bound in result.confidence_interval)
    if math.isnan(low) or math.isnan(high):  # BCa can fail on very few or very uneven values; percentiles cannot
        low, high = np.quantile(result.bootstrap_distribution, [(1 - level) / 2, (1 + level) / 2]).tolist()
    return Interval(mean, low, high, n)


def paired(values: Sequence[float], baseline: Sequence[float], level: float = 0.95, seed: int = 0) -> Interval:
    """Interval of the mean of value - baseline over the same pictures in the same order; a picture counts where both have a value.

    Pictures differ far more than decoders do: the difference of two means says little, the mean of the differences much.

    Raises:
        ValueError: the two are not of the same length.
    """
    if len(values) != len(baseline):
        raise ValueError(f"expected the same pictures on both sides, got {len(values)} values and a baseline of {len(baseline)}")
    return interval(np.asarray(values, dtype=np.float64) - np.asarray(baseline, dtype=np.float64), level, seed)  # type: ignore[arg-type]


def by_group(values: Iterable[float], groups: Iterable[Hashable]) -> dict[Hashable, float]:
    """Mean of each group, such as one value per video of the values of its frames; NaNs left out, NaN where there is nothing else."""
    members: dict[Hashable, list[float]] = {}
    for value, group in zip(values, groups, strict=True):
        kept = members.setdefault(group, [])
        if not math.isnan(value):
            kept.append(value)
    return {group: float(np.mean(kept)) if kept else math.nan for group, kept in members.items()}


def spearman(a: Sequence[float], b: Sequence[float]) -> float:
    """Rank correlation over the pictures where both have a value, in [-1, 1]; NaN where there are fewer than two or all are equal."""
    from scipy.stats import spearmanr

    x, y = (np.asarray(values, dtype=np.float64) for values in (a, b))
    if x.shape != y.shape:
        raise ValueError(f"expected the same pictures on both sides, got {len(x)} and {len(y)} values")
    known = ~(np.isnan(x) | np.isnan(y))
    x, y = x[known], y[known]
    if len(x) < 2 or np.ptp(x) == 0 or np.ptp(y) == 0:
        return math.nan
    return float(spearmanr(x, y).statistic)
