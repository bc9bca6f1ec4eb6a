"""Zero, mean, random dictionary and principal components, against their formulas."""

import numpy as np
import pytest
import torch

from vaelab.sae import baselines

D = 12


def vectors(count=500, far=0.0):
    generator = torch.Generator().manual_seed(1)
    mixed = torch.randn(count, D, generator=generator) @ torch.randn(D, D, generator=generator)
    return mixed + far * torch.arange(D)


def test_moments_are_numpys_in_whatever_batches_they_come():
    x = vectors(far=1000.0)
    found = baselines.moments(x.split(77))
    expected = np.cov(x.double().numpy().T, bias=True)
    assert found.count == 500
    np.testing.assert_allclose(found.mean.numpy(), x.double().mean(0).numpy(), rtol=1e-12)
    np.testing.assert_allclose(found.covariance.numpy(), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("k", [1, 5, D])
def test_pca_is_scikit_learns(k):
    from sklearn.decomposition import PCA

    x = vectors(far=3.0)
    pca = baselines.PrincipalComponents(baselines.moments([x]), k)
    theirs = PCA(k, svd_solver="full").fit(x.double().numpy())
    expected = theirs.inverse_transform(theirs.transform(x.double().numpy()))
    np.testing.assert_allclose(pca.decode(pca.encode(x)).numpy(), expected, atol=2e-4)
    np.testing.assert_allclose(pca.features().abs().numpy(), np.abs(theirs.components_), atol=1e-4)


def test_constants_have_no_codes():
    x = vectors(7)
    one = baselines.ConstantDictionary(torch.arange(D))
    codes = one.encode(x)
    assert codes.values.shape == codes.indices.shape == (7, 0)
    assert torch.equal(one.decode(codes), torch.arange(D).float().expand(7, D))
    assert one.features().shape == (0, D)


def test_the_random_dictionary_is_its_formula_written_densely():
    x, mean = vectors(40), torch.linspace(-1, 1, D)
    one = baselines.RandomDictionary(mean, k=4, n_features=30, seed=2)
    rows = one.features().double()
    products = (x.double() - mean.double()) @ rows.T
    stored = torch.where(products >= products.sort(1).values[:, -4:-3], products.relu(), 0.0)
    torch.testing.assert_close(one.decode(one.encode(x)).double(), stored @ rows + mean.double(), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(rows.norm(dim=1), torch.ones(30).double())
    again, other = (baselines.RandomDictionary(mean, 4, 30, seed=seed).features() for seed in (2, 3))
    assert torch.equal(again, one.features()) and not torch.equal(other, one.features())


def test_it_has_no_negative_values():
    # two rows only, and vectors that both point away from
    one = baselines.RandomDictionary(torch.zeros(D), k=2, n_features=2)
    away = -one.features().sum(0, keepdim=True)
    assert (one.encode(away).values == 0).all()
    assert torch.equal(one.decode(one.encode(away)), torch.zeros(1, D))


def test_the_four_by_name():
    found = baselines.build_baselines(baselines.moments([vectors()]), k=3, n_features=20)
    assert list(found) == ["zero", "mean", "random", "pca"]
    assert [len(one.features()) for one in found.values()] == [0, 0, 20, 3]
    x = vectors(5)
    assert (found["zero"].decode(found["zero"].encode(x)) == 0).all()


@pytest.mark.parametrize(
    ("k", "n_features", "message"),
    [(0, 20, "k: must be at least 1"), (21, 20, r"k: must be at most n_features \(20\), got 21"),
     (13, 20, r"k: must be at most the vectors' width \(12\), got 13")],
)  # fmt: skip
def test_a_wrong_k_is_refused(k, n_features, message):
    with pytest.raises(ValueError, match=message):
        baselines.build_baselines(baselines.moments([vectors()]), k, n_features)


def test_no_vectors_are_refused():
    with pytest.raises(ValueError, match="at least one vector"):
        baselines.moments([])
