"""Explained variance, L0, dead and dense features where the truth is planted."""

import numpy as np
import pandas as pd
import pytest
import torch

from vaelab.sae import baselines, metrics
from vaelab.sae.model import Codes

D = 6


def vectors(count=400, far=0.0):
    generator = torch.Generator().manual_seed(4)
    return torch.randn(count, D, generator=generator) * torch.arange(1, D + 1) + far


class Identity:
    """Every vector is its own code."""

    def encode(self, x):
        return Codes(x, torch.arange(D).expand(len(x), D))

    def decode(self, codes):
        return codes.values

    def features(self):
        return torch.eye(D)


class Noisy(Identity):
    """Of every vector what is left after ``error`` is added."""

    def __init__(self, error):
        self.error = error

    def decode(self, codes):
        return codes.values + self.error[: len(codes.values)]


class Scheduled(Identity):
    """Feature 0 active in every vector, 1 in a half, 2 in one in twenty, 3 never; a padded code is 0."""

    def encode(self, x):
        rows = torch.arange(len(x))
        values = torch.stack([torch.ones(len(x)), (rows % 2 == 0).float(), (rows % 20 == 0).float()], 1)
        return Codes(values, torch.tensor([0, 1, 2]).expand(len(x), 3))

    def decode(self, codes):
        return torch.zeros(len(codes.values), D)

    def features(self):
        return torch.eye(4, D)


def test_identity_explains_all_and_the_mean_nothing():
    x = vectors(far=50.0)
    mean = baselines.ConstantDictionary(x.double().mean(0))
    found = metrics.evaluate_dictionaries({"identity": Identity(), "mean": mean}, x.split(64))
    assert found["identity"] == metrics.Fidelity(1.0, 0.0, 1.0, D, 0.0, 1.0)
    assert abs(found["mean"].explained_variance) < 1e-6 and abs(found["mean"].by_channel) < 1e-6
    assert found["mean"].l0 == found["mean"].dead_fraction == 0


def test_zero_far_from_the_mean_is_worse_than_the_mean_but_not_for_the_papers_code():
    x = vectors(far=50.0)
    zero = metrics.evaluate_dictionaries({"zero": baselines.ConstantDictionary(torch.zeros(D))}, [x])["zero"]
    wide = x.double()
    expected = 1 - wide.square().sum() / (wide - wide.mean(0)).square().sum()
    np.testing.assert_allclose(zero.explained_variance, expected, rtol=1e-9)
    assert zero.explained_variance < -10 and abs(zero.by_channel) < 1e-9


def test_both_measures_are_their_formulas_in_float64():
    x = vectors(far=-7.0)
    error = torch.randn(len(x), D, generator=torch.Generator().manual_seed(9)) + 0.5
    found = metrics.evaluate_dictionaries({"noisy": Noisy(error)}, [x])["noisy"]
    residual, wide = (x - (x + error)).double().numpy(), x.double().numpy()
    fvu = (residual**2).sum() / ((wide - wide.mean(0)) ** 2).sum()
    np.testing.assert_allclose([found.fvu, found.explained_variance], [fvu, 1 - fvu], rtol=1e-9)
    np.testing.assert_allclose(found.by_channel, np.mean(1 - residual.var(0) / wide.var(0)), rtol=1e-9)


def test_it_does_not_depend_on_the_batches():
    x = vectors(far=3.0)
    pca = {"pca": baselines.PrincipalComponents(baselines.moments([x]), 2)}
    whole, parts = (
        metrics.evaluate_dictionaries(pca, [x])["pca"],
        metrics.evaluate_dictionaries(pca, x.split(33))["pca"],
    )
    np.testing.assert_allclose(parts, whole, rtol=1e-6)
    spectrum = np.linalg.eigvalsh(np.cov(x.double().numpy().T, bias=True))
    np.testing.assert_allclose(whole.explained_variance, spectrum[-2:].sum() / spectrum.sum(), rtol=1e-5)


def test_planted_active_dead_and_dense_features():
    found = metrics.evaluate_dictionaries({"one": Scheduled()}, [vectors(400)])["one"]
    assert found.l0 == pytest.approx(1 + 1 / 2 + 1 / 20)
    assert found.dead_fraction == 1 / 4 and found.dense_fraction == 2 / 4
    loose = metrics.evaluate_dictionaries({"one": Scheduled()}, [vectors(400)], dense=0.5)["one"]
    assert loose.dense_fraction == 1 / 4


def test_a_channel_that_never_varies_is_left_out():
    x = vectors()
    x[:, 2] = 5.0
    assert metrics.evaluate_dictionaries({"identity": Identity()}, [x])["identity"].by_channel == 1.0


@pytest.mark.parametrize(
    ("batches", "message"),
    [
        ([], "0 vectors without any variance"),
        ([torch.ones(9, D)], "9 vectors without any variance"),
        ([torch.ones(4, D), torch.tensor([[1.0] * D, [float("nan")] * D])], "vector 5 of this pass is not finite"),
    ],
)
def test_what_cannot_be_measured_is_refused(batches, message):
    with pytest.raises(ValueError, match=message):
        metrics.evaluate_dictionaries({"identity": Identity()}, batches)


def test_the_papers_layout():
    found = metrics.evaluate_dictionaries({"identity": Identity()}, [vectors()])["identity"]
    keys = [(block, k, n) for k in (10, 5) for n in (64, 512) for block in ("mid.0", "down.1.1")]
    table = metrics.fidelity_table({key: found._replace(explained_variance=i) for i, key in enumerate(keys)},
                           ["block", "k", "n_features"])  # fmt: skip
    expected = pd.DataFrame({"k": [5, 5, 10, 10], "n_features": [64, 512] * 2, "mid.0": [4, 6, 0, 2],
                             "down.1.1": [5, 7, 1, 3]})  # fmt: skip
    pd.testing.assert_frame_equal(metrics.paper_layout(table), expected, check_names=False)
