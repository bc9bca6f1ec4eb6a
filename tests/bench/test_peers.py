import pytest
import torch

from vaelab.bench.peers import Dense, StepConfig, peer_step
from vaelab.sae.model import SAE, SAEConfig

SMALL = StepConfig(d=16, n_features=64, k=3, batch_size=32, dead=10)


def test_a_setting_is_fixed_by_its_seed():
    assert torch.equal(SMALL.batch(5), SMALL.batch(1)) and SMALL.batch(0).shape == (32, 16)
    assert len(set(SMALL.dead_features.tolist())) == 10
    again = StepConfig(d=16, n_features=64, k=3, batch_size=32, dead=10)
    assert torch.equal(again.dead_features, SMALL.dead_features) and torch.equal(again.batch(2), SMALL.batch(2))
    with pytest.raises(ValueError, match="dead: 64 of 64"):
        StepConfig(n_features=64, dead=64)
    with pytest.raises(ValueError, match="batch_size"):
        StepConfig(batch_size=0)


@pytest.mark.parametrize("dead", [False, True])
def test_the_dense_step_minimises_what_ours_does(dead):
    ours, dense = SAE(SAEConfig(16, 64, 3)), Dense(SMALL)
    with torch.no_grad():
        ours.encoder.copy_(dense.encoder), ours.decoder.copy_(dense.decoder.T)
        for one in (ours, dense):
            one.pre_bias.copy_(torch.linspace(-1, 1, 16)), one.latent_bias.copy_(torch.linspace(-1, 1, 64))
    asleep = torch.zeros(64)
    if dead:
        asleep[SMALL.dead_features] = 1
        ours.inactive_for[SMALL.dead_features] = 10**8
    x = SMALL.batch(0)
    assert dense(x, asleep).item() == pytest.approx(ours.losses(x).loss.item(), rel=1e-5)


@pytest.mark.parametrize("dead", [False, True])
def test_the_dense_step_learns_and_keeps_features_of_unit_length(dead, monkeypatch):
    from vaelab.bench import peers

    made = []
    monkeypatch.setattr(peers, "Dense", lambda setting: made.append(Dense(setting)) or made[0])
    step = peer_step("dense", SMALL, dead=dead)
    (sae,) = made
    before = sae(SMALL.batch(0), torch.zeros(64)).item()
    for number in range(0, 200, 4):
        step(number)
    assert sae(SMALL.batch(0), torch.zeros(64)).item() < before - 1e-3
    torch.testing.assert_close(sae.decoder.norm(dim=0), torch.ones(64))


@pytest.mark.parametrize("name", ["sparsify", "sae_lens", "dictionary_learning"])
def test_the_others_take_a_step_where_they_are_installed(name):
    pytest.importorskip(name)
    for dead in (False, True):
        peer_step(name, SMALL, dead=dead)(0)


def test_an_unknown_peer_is_refused():
    with pytest.raises(ValueError, match=r"peers: unknown name 'sparsfy'.*sparsify"):
        peer_step("sparsfy", SMALL)
