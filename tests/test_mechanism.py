import numpy as np
import pandas as pd
import pytest
from scipy import integrate, stats

from vaelab import mechanism


@pytest.mark.parametrize("mean", [-2.0, -0.1, 0.0, 0.7, 5.0])
@pytest.mark.parametrize("std", [0.01, 0.5, 3.0])
def test_folded_normal_mean_equals_quadrature(mean, std):
    grid = np.linspace(mean - 12 * std, mean + 12 * std, 40001)
    expected = integrate.trapezoid(np.abs(grid) * stats.norm.pdf(grid, mean, std), grid)
    np.testing.assert_allclose(mechanism.folded_normal_mean(np.array(mean), np.array(std)), expected, rtol=1e-6)


@pytest.mark.filterwarnings("error")
def test_folded_normal_mean_without_deviation_is_the_magnitude():
    np.testing.assert_array_equal(mechanism.folded_normal_mean(np.array([-2.0, 0.0, 3.0]), np.zeros(3)), [2, 0, 3])


def test_normal_channels_are_predicted_by_gamma_and_beta():
    rng = np.random.default_rng(0)
    gamma, beta = rng.uniform(-2, 2, 30), rng.uniform(-1, 1, 30)
    mean_abs = np.abs(rng.standard_normal((20000, 30)) * gamma + beta).mean(0)
    relation = mechanism.scale_relation(pd.DataFrame({"mean_abs": mean_abs, "gamma": gamma, "beta": beta}), 0.3)
    assert relation["predicted.r2"] > 0.999
    assert relation["spearman.gamma"] == pytest.approx(stats.spearmanr(mean_abs, np.abs(gamma))[0])
    assert relation["spearman.beta"] == pytest.approx(stats.spearmanr(mean_abs, np.abs(beta))[0])


def test_channels_that_gamma_does_not_explain():
    table = pd.DataFrame({"mean_abs": [3.0, 2.0, 1.0], "gamma": [0.1, 1.0, 4.0], "beta": [0.0, 0.0, 0.0]})
    relation = mechanism.scale_relation(table, 0.5)
    predicted = np.abs(table["gamma"]) * np.sqrt(2 / np.pi)
    assert relation["predicted.r2"] == pytest.approx(1 - ((table["mean_abs"] - predicted) ** 2).sum() / 2)
    assert relation["spearman.gamma"] == pytest.approx(-1)


def test_counts_below_the_threshold():
    table = pd.DataFrame(
        {"mean_abs": [0.1, 0.1, 0.5, 0.9], "gamma": [-0.2, 0.9, -0.1, 0.5], "beta": [0.0, 0.1, 0.2, 0.3]}
    )
    relation = mechanism.scale_relation(table, 0.5)
    assert (relation["low.activity"], relation["low.gamma"], relation["low.both"]) == (2, 2, 1)
