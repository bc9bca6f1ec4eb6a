import pytest
import torch

from vaelab.sae.model import SAE, SAEConfig
from vaelab.sae.synthetic import SyntheticSparseData, dictionary_recovery


def test_vectors_are_sparse_sums_of_the_dictionary():
    planted = SyntheticSparseData(d=40, n_features=30, active=4, noise=0.0, length=3.0)
    x = (planted.vectors(200) - planted.mean()) / 3.0
    amounts = torch.linalg.lstsq(planted.features().T.double(), x.T.double()).solution.T
    active = amounts.abs() > 1e-3
    assert (active.sum(1) == 4).all()
    assert 0.499 < amounts[active].min() < 0.55 and 1.45 < amounts[active].max() < 1.501
    assert active.float().mean(0).min() > 0.05
    torch.testing.assert_close(planted.features().norm(dim=1), torch.ones(30))


def test_noise_is_as_large_as_asked_and_batches_are_fixed_by_seed_and_number():
    planted, without = SyntheticSparseData(noise=0.1, length=5.0), SyntheticSparseData(noise=0.0, length=5.0)
    assert (planted.vectors(500) - without.vectors(500)).std() == pytest.approx(0.5, rel=0.05)
    stream = planted.batches(8)
    first, second = next(stream()), next(stream(start=1))
    assert list(first) == ["planted"] and not torch.equal(first["planted"], second["planted"])
    assert torch.equal(second["planted"], planted.vectors(8, 1))
    assert torch.equal(next(stream(start=1, rank=1, world=2))["planted"], planted.vectors(8, 3))
    assert not torch.equal(SyntheticSparseData(seed=1).vectors(8), SyntheticSparseData(seed=0).vectors(8))


def test_recovery_is_the_mean_best_cosine():
    truth = torch.tensor([[1.0, 0, 0], [0, 2.0, 0]])
    assert dictionary_recovery(truth, torch.tensor([[0, 5.0, 0], [3.0, 0, 0], [1, 1, 1]])) == pytest.approx(1)
    assert dictionary_recovery(truth, torch.tensor([[0, 1.0, 0], [0, 3.0, 4.0]])) == pytest.approx(0.5)


def test_nothing_untrained_knows_the_dictionary():
    for seed in range(3):
        assert (
            dictionary_recovery(SyntheticSparseData(seed=seed).features(), SAE(SAEConfig(128, 512), seed).features())
            < 0.45
        )
