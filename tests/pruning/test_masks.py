import copy

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, DDPMScheduler
from small_latents import small_unet

from vaelab.pruning.masks import (
    MASKS,
    ChannelMask,
    ImportancePredictor,
    LatentConfig,
    PruningObjective,
    straight_through_topk,
    variance_gain,
)


@pytest.fixture
def latents():
    torch.manual_seed(3)
    return torch.randn(6, 4, 5, 5) * torch.tensor([2.0, 1.0, 0.3, 0.7])[:, None, None] + 0.5


@pytest.fixture
def objective(tiny_vae):
    def make(channels=4, **changes):
        return PruningObjective(
            tiny_vae, small_unet(channels), DDPMScheduler(clip_sample=False), LatentConfig(**changes)
        )

    return make


def batch(count=6):
    return {"pixels": torch.rand(count, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1}


def loss_of(objective, key="loss"):
    torch.manual_seed(7)
    return objective(batch())[key]


def test_the_predictor_has_the_papers_292_parameters():
    assert sum(one.numel() for one in ImportancePredictor(4, 32).parameters()) == 292


def test_importance_is_its_formula_in_float64(latents):
    predictor = ImportancePredictor(4, 32).double()
    torch.nn.init.normal_(predictor.second.weight)
    w1, b1, w2, b2 = (one.detach().numpy() for one in predictor.parameters())
    pooled = latents.double().numpy().mean((2, 3))
    hidden = np.maximum(0, pooled @ w1.T + b1)
    expected = 1 / (1 + np.exp(-(hidden @ w2.T + b2)))
    np.testing.assert_allclose(predictor(latents.double()).detach().numpy(), expected, rtol=1e-12)


def test_importance_begins_nearly_open(latents):
    importance = ImportancePredictor(4, 32)(10 * latents)
    assert ((importance > 0.9) & (importance < 1)).all()


def test_a_soft_mask_multiplies_every_channel(latents):
    masks = ChannelMask(4, LatentConfig())
    masked = masks(latents)
    torch.testing.assert_close(masked.mask, masks.predict(latents))
    for picture in range(6):
        for channel in range(4):
            expected = masked.mask[picture, channel] * latents[picture, channel]
            torch.testing.assert_close(masked.latents[picture, channel], expected)


def test_the_normalised_mask_keeps_the_summed_variance(latents):
    masks = ChannelMask(4, LatentConfig(mask="normalised")).train().double()
    torch.nn.init.normal_(masks.predict.second.weight)
    torch.nn.init.constant_(masks.predict.second.bias, -3.0)
    masked = masks(latents.double())
    variances = [one.detach().double().var((0, 2, 3), correction=0) for one in (latents, masked.latents)]
    assert float(variances[1].sum()) == pytest.approx(float(variances[0].sum()), rel=1e-10)
    assert (variances[1] - variances[0]).abs().max() > 0.1
    importance = masks.predict(latents.double())
    np.testing.assert_allclose((masked.mask / importance).detach().std(), 0, atol=1e-12)


def test_scaling_all_masks_changes_nothing_under_the_gain(latents):
    mask = torch.rand(6, 4)
    for factor in (1.0, 1e-3, 50.0):
        torch.testing.assert_close(
            variance_gain(latents, factor * mask) * factor * mask, variance_gain(latents, mask) * mask
        )


def test_a_constant_cannot_stand_for_variance():
    latents = torch.cat([torch.full((3, 1, 4, 4), 9.0), torch.randn(3, 1, 4, 4)], 1)
    keeps_the_constant = torch.tensor([[1.0, 1e-3]]).expand(3, 2)
    assert float(variance_gain(latents, keeps_the_constant)) == pytest.approx(1e3, rel=1e-3)


def test_in_evaluation_the_running_gain_makes_pictures_independent(latents):
    masks = ChannelMask(4, LatentConfig(mask="normalised"))
    torch.nn.init.constant_(masks.predict.second.bias, 0.0)  # every importance about a half, the gain about 2
    now = variance_gain(latents, masks.train().mask(latents)).item()
    for _ in range(2):
        masks(latents)
    masks.eval()
    assert 1.9 < now < 2.1 and float(masks.running_gain) == pytest.approx(now, rel=1e-6)
    for _ in range(300):
        masks.train()(3 * latents[:3])
    other = variance_gain(latents[:3], masks.mask(3 * latents[:3])).item()
    assert float(masks.eval().running_gain) == pytest.approx(other, rel=1e-5)
    torch.testing.assert_close(masks(latents).latents[:2], masks(latents[:2]).latents)


def test_top_k_keeps_exactly_k_and_its_gradient_is_straight_through():
    importance = torch.rand(50, 7, requires_grad=True)
    for keep in range(1, 8):
        mask = straight_through_topk(importance, keep)
        assert set(mask.detach().unique().tolist()) <= {0.0, 1.0}
        assert (mask.sum(1) == keep).all()
        kept = importance.gather(1, mask.detach().topk(keep).indices).min(1).values
        left = importance.masked_fill(mask.detach() == 1, -1).max(1).values
        assert (kept >= left).all()
    weight = torch.randn(50, 7)
    (gradient,) = torch.autograd.grad((weight * straight_through_topk(importance, 3)).sum(), importance)
    torch.testing.assert_close(gradient, weight)
    assert (straight_through_topk(torch.full((2, 4), 0.5), 2).sum(1) == 2).all()


@pytest.mark.parametrize("keep", [0, 5])
def test_more_channels_kept_than_there_are_is_refused(keep):
    with pytest.raises(ValueError, match="keep: must be from 1 to the latent's 4 channels, got"):
        straight_through_topk(torch.rand(2, 4), keep)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sparsity": -0.1}, "sparsity: must be at least 0, got -0.1"),
        ({"sparsity": float("nan")}, "sparsity: must be at least 0"),
        ({"mask": "sof"}, "mask: unknown name 'sof'.*soft"),
        ({"keep": 0}, "keep: must be at least 1"),
        ({"decoder_reads": "mask"}, "decoder_reads: .*masked"),
    ],
)
def test_a_wrong_configuration_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        LatentConfig(**changes)


def test_a_mask_or_a_denoiser_of_other_channels_is_refused(objective):
    with pytest.raises(ValueError, match="keep: must be from 1 to the latent's 4 channels, got 5"):
        objective(mask="topk", keep=5)
    with pytest.raises(ValueError, match="latent_channels: the VAE's latent has 4, the denoiser expects 3"):
        objective(channels=3)


def test_a_shared_mask_is_one_for_the_batch():
    masks = ChannelMask(4, LatentConfig(mask="topk", keep=2, shared=True))
    with torch.no_grad():  # the importance follows the channel's own mean
        masks.predict.first.weight.copy_(torch.eye(4).repeat(8, 1))
        masks.predict.second.weight.copy_(torch.eye(4).repeat(1, 8))
    latents = torch.randn(40, 4, 1, 1).expand(-1, -1, 5, 5)
    own = ChannelMask(4, LatentConfig(mask="topk", keep=2))
    own.load_state_dict(masks.state_dict())
    assert len(masks(latents).mask.unique(dim=0)) == 1
    assert len(own(latents).mask.unique(dim=0)) > 1


def test_lambda_waits_for_the_mask_and_then_rises():
    config = LatentConfig(sparsity=0.8, mask_from=10, sparsity_warmup=4)
    assert [config.sparsity_at(step) for step in (1, 10, 11, 12, 14, 99)] == pytest.approx([0, 0, 0.2, 0.4, 0.8, 0.8])
    assert LatentConfig(sparsity=0.8).sparsity_at(1) == 0.8


def test_a_mask_that_is_not_used_yet_is_1_and_trains_nothing(objective):
    one = objective(sparsity=1.0)
    one.masks.enabled = False
    losses = one(batch())
    assert losses["mean_mask"] == 1
    losses["loss"].backward()
    assert all((p.grad is None) or not p.grad.any() for p in one.masks.predict.parameters())


def test_the_loss_is_the_weighted_sum_of_its_parts(objective):
    one = objective(sparsity=0.3, reconstruction_weight=0.5, kl_weight=0.01)
    torch.manual_seed(7)
    parts = one(batch())
    expected = 0.5 * parts["reconstruction"] + 0.01 * parts["kl"] + parts["diffusion"] + 0.3 * parts["mean_mask"]
    torch.testing.assert_close(parts["loss"], expected)


def test_reconstruction_is_summed_over_a_picture_and_ignores_the_mask_unless_told(objective):
    one, other = objective(), objective(decoder_reads="masked")
    other.masks.load_state_dict(one.masks.state_dict())
    for masks in (one.masks, other.masks):
        torch.nn.init.constant_(masks.predict.second.bias, -2.0)
    torch.manual_seed(7)
    latents = one.vae.encode(batch()["pixels"]).latent_dist.sample().detach()
    scaled = one.vae.config.scaling_factor * latents
    mask = one.masks.predict(scaled)[..., None, None].detach()
    for found, seen in ((one, latents), (other, mask * latents)):
        decoded = found.vae.decode(seen).sample.detach()
        by_hand = np.mean([((d - p) ** 2).sum().item() for d, p in zip(decoded, batch()["pixels"], strict=True)])
        assert loss_of(found, "reconstruction").item() == pytest.approx(by_hand, rel=1e-4)


@pytest.mark.parametrize("stopped", [False, True])
@pytest.mark.parametrize("decoder_reads", ["latent", "masked"])
def test_stop_gradient_ends_the_denoisers_gradient_before_the_vae(objective, stopped, decoder_reads):
    one = objective(
        stop_gradient=stopped, decoder_reads=decoder_reads, reconstruction_weight=0.0, kl_weight=0.0, sparsity=0.5
    )
    loss_of(one).backward()
    reached = any(p.grad is not None and p.grad.abs().sum() > 0 for p in one.vae.parameters())
    assert reached is not stopped
    assert all(p.grad.abs().sum() > 0 for p in one.masks.predict.second.parameters())


def test_stop_gradient_leaves_the_reconstructions_gradient(objective):
    one = objective(stop_gradient=True, decoder_reads="masked", kl_weight=0.0)
    loss_of(one, "reconstruction").backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in one.vae.encoder.conv_in.parameters())
    assert one.masks.predict.second.bias.grad.abs().sum() > 0


def test_standardised_latents_have_variance_1_and_decode_as_before(objective):
    one = objective(standardise=True, mask="none").train()
    with torch.no_grad():
        latents = one.latents(batch()["pixels"], torch.Generator().manual_seed(0))
    for _ in range(100):
        one.standard(latents)
    seen = one.standard(latents)
    torch.testing.assert_close(seen.var((0, 2, 3), correction=0), torch.ones(4), rtol=1e-2, atol=1e-3)
    one.eval()
    with torch.no_grad():
        plain = one.vae.decode(latents / one.vae.config.scaling_factor).sample
        torch.testing.assert_close(
            one.decode(one.denoiser_input(latents).latents, plain.shape), plain, rtol=1e-3, atol=1e-4
        )


def test_a_vaes_scaling_factor_is_applied_and_undone():
    torch.manual_seed(0)
    vae = AutoencoderKL(block_out_channels=(8,), norm_num_groups=4, scaling_factor=0.25).eval()
    one = PruningObjective(vae, small_unet(), DDPMScheduler(), LatentConfig(mask="none")).eval()
    pixels = batch(2)["pixels"]
    with torch.no_grad():
        scaled = one.latents(pixels, torch.Generator().manual_seed(1))
        raw = vae.encode(pixels).latent_dist.sample(torch.Generator().manual_seed(1))
        torch.testing.assert_close(scaled, 0.25 * raw)
        torch.testing.assert_close(one.decode(scaled, pixels.shape), vae.decode(raw).sample)


@pytest.mark.parametrize("decoder_reads", ["latent", "masked"])
def test_latents_are_standardized_by_the_vaes_own_mean_and_deviation(decoder_reads):
    torch.manual_seed(0)
    mean, std, factor = [1.0, -2.0, 0.5, 3.0], [0.5, 2.0, 1.0, 4.0], 0.7
    vae = AutoencoderKL(
        block_out_channels=(8,), norm_num_groups=4, scaling_factor=factor, latents_mean=mean, latents_std=std
    ).eval()
    one = PruningObjective(vae, small_unet(), DDPMScheduler(), LatentConfig(decoder_reads=decoder_reads)).eval()
    torch.nn.init.constant_(one.masks.predict.second.bias, -1.0)
    pixels = batch(2)["pixels"]
    with torch.no_grad():
        raw = vae.encode(pixels).latent_dist.sample(torch.Generator().manual_seed(1))
        mean, std = (np.array(values)[:, None, None] for values in (mean, std))
        expected = (raw.double().numpy() - mean) / std * factor
        scaled = one.latents(pixels, torch.Generator().manual_seed(1))
        np.testing.assert_allclose(scaled.numpy(), expected, rtol=1e-5, atol=1e-6)
        plain = vae.decode(raw).sample
        torch.testing.assert_close(one.decode(scaled, pixels.shape), plain, rtol=1e-4, atol=1e-5)
        torch.manual_seed(7)
        found = one({"pixels": pixels})["reconstruction"]
        torch.manual_seed(7)
        raw = vae.encode(pixels).latent_dist.sample()
        if decoder_reads == "masked":
            scaled = (raw.double().numpy() - mean) / std * factor
            importance = one.masks.predict(torch.from_numpy(scaled).float()).double().numpy()[..., None, None]
            raw = torch.from_numpy(importance * scaled / factor * std + mean).float()
        by_hand = (vae.decode(raw).sample - pixels).square().sum((1, 2, 3)).mean()
    torch.testing.assert_close(found, by_hand, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("mask", MASKS)
def test_a_training_step_under_autocast_has_the_losses_of_float32(objective, mask, dtype):
    objective = objective(mask=mask, keep=2, standardise=True).train()
    batch = {"pixels": torch.rand(4, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1}
    losses = {}
    for enabled in (False, True):
        torch.manual_seed(0)
        with torch.autocast("cpu", dtype, enabled=enabled):
            losses[enabled] = copy.deepcopy(objective)(batch)
    losses[True]["loss"].backward()
    for name, value in losses[False].items():
        assert losses[True][name].item() == pytest.approx(value.item(), rel=0.1), name
