"""Autoencoders on a GPU: losses, codes and gradients against the dense formulas in float64 on the CPU."""

import copy

import dense_sae
import pytest
import torch
from small_sae import FEATURES, D, relative, shaken, vectors

from vaelab.sae.model import SAE, VARIANTS, SAEConfig
from vaelab.sae.train import SAEObjective, SAESpec, train_saes
from vaelab.training.loop import TrainConfig

pytestmark = pytest.mark.cuda
SCREENED = ["topk", "k_sae", "matryoshka"]


def with_dead(sae, count):
    sae.inactive_for[torch.randperm(FEATURES, generator=torch.Generator().manual_seed(1))[:count]] = (
        sae.config.dead_after
    )
    return sae


def expected_of(sae, x):
    """Loss, codes and gradients of the dense formulas."""
    loss, auxiliary, codes, weights = dense_sae.losses(sae, x)
    loss.backward()
    return loss.item(), auxiliary.item(), codes, {name: weight.grad for name, weight in weights.items()}


@pytest.mark.parametrize("dead", [0, 12, 150], ids=["none dead", "a block of dead", "many dead"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_losses_and_gradients_in_float32_are_those_of_the_formula(device, variant, dead):
    sae, x = with_dead(shaken(variant=variant), dead), vectors()
    loss, auxiliary, codes, gradients = expected_of(sae, x)
    sae = copy.deepcopy(sae).to(device)
    found = sae.losses(x.to(device))
    found.loss.backward()
    assert found.loss.item() == pytest.approx(loss, rel=1e-5)
    assert found.auxiliary.item() == pytest.approx(auxiliary, rel=1e-4)
    assert found.l0.item() == pytest.approx((codes != 0).sum(1).double().mean().item())
    for name, weight in sae.named_parameters():
        assert weight.grad.device.type == device.type
        assert relative(weight.grad.cpu(), gradients[name]) < 5e-5, name


@pytest.mark.parametrize("dead", [0, 12])
@pytest.mark.parametrize("variant", SCREENED)
def test_with_the_bfloat16_screen_losses_and_gradients_are_those_of_the_formula(device, variant, dead):
    sae, x = with_dead(shaken(variant=variant), dead), vectors(200)
    loss, _, _, gradients = expected_of(sae, x)
    sae = copy.deepcopy(sae).to(device)
    found = sae.losses(x.to(device), screen=True)
    found.loss.backward()
    assert found.loss.item() == pytest.approx(loss, rel=1e-3 if dead else 1e-5)
    for name, weight in sae.named_parameters():
        assert relative(weight.grad.cpu(), gradients[name]) < (1e-2 if dead else 5e-5), name


@pytest.mark.parametrize("stored", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("variant", VARIANTS)
def test_codes_of_vectors_in_any_stored_type(device, variant, stored):
    sae, x = shaken(variant=variant), vectors().to(stored)
    expected = copy.deepcopy(sae).double()
    codes, reference = sae.to(device).encode(x.to(device)), expected.encode(x.double())
    torch.testing.assert_close(codes.dense(FEATURES).cpu().double(), reference.dense(FEATURES), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(sae.decode(codes).cpu().double(), expected.decode(reference), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("shape", [(0, D), (3, 5, D)])
def test_codes_of_no_vector_and_of_maps(device, shape):
    sae = shaken().to(device)
    x = torch.randn(shape, device=device)
    codes = sae.encode(x)
    assert codes.indices.device.type == device.type
    assert sae.decode(codes).shape == shape


def test_more_features_and_vectors_than_a_tile_holds(device):
    sae = SAE(SAEConfig(32, 9000, k=4), seed=1)
    x = torch.randn(700, 32, generator=torch.Generator().manual_seed(2))
    pre = (x.double() - sae.pre_bias.double()) @ sae.encoder.double().T + sae.latent_bias.double()
    values, indices = pre.topk(4)
    expected = torch.zeros(700, 9000, dtype=torch.float64).scatter_(1, indices, values.relu())
    found = sae.to(device).encode(x.to(device)).dense(9000).cpu().double()
    torch.testing.assert_close(found, expected.detach(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("precision", ["float32", "bfloat16", "float16"])
def test_training_ends_near_where_it_does_on_the_cpu_and_resumes(device, precision, tmp_path):
    specs = {name: SAESpec("block", shaken(variant=name).config) for name in ("topk", "batchtopk", "jumprelu")}
    x = vectors(2000)

    def batches(start=0, rank=0, world=1):
        number = start
        while True:
            yield {"block": x[torch.randperm(len(x), generator=torch.Generator().manual_seed(number))[:128]]}
            number += 1

    def trained(where, steps, precision, folder=None):
        config = TrainConfig(
            steps, learning_rate=1e-3, clip_norm=0, log_every=1, device=str(where), precision=precision, horizon=8,
            schedule="cosine", checkpoint_every=4,
        )  # fmt: skip
        return train_saes(specs, batches, config, folder=folder)

    reference, found = trained("cpu", 8, "float32"), trained(device, 8, precision)
    for column, near in (("explained_variance", 0.02), ("l0", 0.3)):
        assert (found.history[column] - reference.history[column]).abs().max() < near
    assert found.history["loss"].iloc[-3:].sum() < found.history["loss"].iloc[:3].sum()
    whole = trained(device, 8, precision, tmp_path / "whole")
    pd_columns = ["loss", "explained_variance", "l0"]
    assert (whole.history[pd_columns] - found.history[pd_columns]).abs().max().max() < 1e-3
    assert all(sae.device.type == device.type for sae in whole.saes.values())


def test_gradients_under_autocast_are_the_formulas(device):
    sae = shaken()
    objective = SAEObjective({"one": SAESpec("block", sae.config)})
    objective.saes[0].load_state_dict(sae.state_dict())
    objective.saes[0].normalise()
    plain = copy.deepcopy(objective.saes[0])
    x = vectors(200)
    loss, _, _, gradients = expected_of(plain, x)
    objective = objective.to(device)
    with torch.autocast(device.type, torch.bfloat16):
        found = objective({"block": x.to(device)})
    found["loss"].backward()
    assert found["loss"].item() == pytest.approx(loss, rel=1e-5)
    (trained,) = objective.saes
    for name in ("encoder", "latent_bias", "pre_bias"):
        assert relative(getattr(trained, name).grad.cpu(), gradients[name]) < 5e-5
    tangent = gradients["decoder"] - (gradients["decoder"] * plain.decoder).sum(1, keepdim=True) * plain.decoder
    assert relative(trained.decoder.grad.cpu(), tangent) < 5e-5
