import numpy as np
import pytest
from scipy import stats

from vaelab.core import stats as core_stats


@pytest.mark.parametrize("level", [0.95, 0.8])
def test_paired_interval_is_that_of_the_paired_t_test(level):
    rng = np.random.default_rng(0)
    first = rng.normal(size=5)
    second = first + rng.normal(0.3, 0.1, size=5)
    expected = stats.ttest_rel(second, first).confidence_interval(level)
    got = core_stats.paired_interval(first, second, level)
    assert (got.low, got.high) == pytest.approx((expected.low, expected.high), rel=1e-12)
    assert got.mean == pytest.approx(np.mean(second - first))


@pytest.mark.parametrize("values", [[1.0], [[1.0, 2.0]]])
def test_interval_of_one_pair_is_refused(values):
    with pytest.raises(ValueError, match="at least two pairs"):
        core_stats.paired_interval(values, values)


@pytest.mark.parametrize(("right", "count"), [(0, 5), (5, 5), (3, 8), (970, 1000)])
def test_wilson_interval_solves_its_equation(right, count):
    """Each end p solves (share - p)^2 = z^2 p (1 - p) / n."""
    z = stats.norm.ppf(0.975)
    for p in core_stats.wilson(right, count):
        assert (right / count - p) ** 2 == pytest.approx(z**2 * p * (1 - p) / count, abs=1e-12)
    low, high = core_stats.wilson(right, count)
    assert 0 <= low <= right / count <= high <= 1 and low < high


def test_wilson_interval_needs_a_trial():
    with pytest.raises(ValueError, match="count: must be at least 1"):
        core_stats.wilson(0, 0)
