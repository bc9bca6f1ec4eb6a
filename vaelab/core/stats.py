"""Confidence intervals."""

from typing import Any, NamedTuple

import numpy as np

from vaelab.core.validate import at_least


class Interval(NamedTuple):
    """A mean with its confidence interval."""

    mean: float
    low: float
    high: float


def paired_interval(first: Any, second: Any, level: float = 0.95) -> Interval:
    """Compute the mean of ``second - first`` over pairs, with Student's t interval.

    Args:
        first: (N,) values, N >= 2, in the order of ``second``.
        second: (N,) values.
        level: the interval's coverage if the differences are normally distributed.
    """
    from scipy import stats

    differences = np.asarray(second, dtype=float) - np.asarray(first, dtype=float)
    if differences.ndim != 1 or len(differences) < 2:
        raise ValueError(f"seeds: an interval needs at least two pairs, got {differences.shape}")
    half = stats.t.ppf((1 + level) / 2, len(differences) - 1) * stats.sem(differences)
    mean = float(differences.mean())
    return Interval(mean, mean - float(half), mean + float(half))


def mean_interval(values: Any) -> Interval:
    """Compute the mean of values (N,), such as those of N seeds, with Student's t interval of 95 %; with one value the
    interval's ends are NaN."""
    values = np.asarray(values, dtype=float)
    if len(values) == 1:
        return Interval(float(values[0]), float("nan"), float("nan"))
    return paired_interval(np.zeros(len(values)), values)


def wilson(successes: int, count: int, level: float = 0.95) -> tuple[float, float]:
    """Compute Wilson's confidence interval of a proportion; it stays within [0, 1].

    Args:
        successes: the number of trials that succeeded.
        count: the number of trials, at least 1.
        level: the interval's coverage.
    """
    from scipy import stats

    at_least("count", count, 1)
    interval = stats.binomtest(successes, count).proportion_ci(level, method="wilson")
    return float(interval.low), float(interval.high)
