import numpy as np
import pytest
import torch
from small_latents import small_config

from vaelab import data
from vaelab.pruning import fid, noise_loss, slimming, sweep
from vaelab.pruning.metrics import EvaluationConfig, evaluate_pruning, sample_latents, sample_pictures
from vaelab.pruning.train import MaskWatcher, build_objective

EVALUATION = EvaluationConfig(loss_timesteps=4, sampler_steps=3)


@pytest.fixture(scope="module")
def images():
    return data.load_images("digits", split="test", resolution=16, max_images=10)


def objective(**latent):
    return build_objective("embedded", small_config(latent=latent), 16).eval()


def test_without_a_mask_the_masked_reconstruction_is_the_other_and_both_are_sums_over_a_picture(images):
    one = objective(mask="none")
    found, _ = evaluate_pruning(one, images, EVALUATION, 0)
    pixels = images.stack()
    with torch.no_grad():
        decoded = one.vae.decode(one.vae.encode(pixels).latent_dist.mode()).sample
    by_hand = np.mean([((d - p) ** 2).sum().item() for d, p in zip(decoded, pixels, strict=True)])
    assert found.recon_mse == pytest.approx(by_hand, rel=1e-4)
    assert found.masked_recon_mse == pytest.approx(found.recon_mse, rel=1e-5)
    assert (found.mean_mask, found.inactive_channels, found.fid) == (1, 0, None)
    assert found.scale == pytest.approx(found.latent_scale, rel=1e-6)


def test_the_masked_reconstruction_is_that_of_what_the_denoiser_gets(images):
    one = objective(mask="topk", keep=1, shared=True)
    found, _ = evaluate_pruning(one, images, EVALUATION, 0)
    pixels = images.stack()
    with torch.no_grad():
        latents = one.vae.encode(pixels).latent_dist.mode()
        kept = one.masks.mask(latents).mean(0).argmax()
        masked = torch.zeros_like(latents)
        masked[:, kept] = latents[:, kept]
        decoded = one.vae.decode(masked).sample
    assert found.masked_recon_mse == pytest.approx(float((decoded - pixels).square().sum() / 10), rel=1e-4)
    assert (found.mean_mask, found.inactive_channels) == (0.25, 3)


@pytest.fixture
def standardizing(tiny_vae, tmp_path):
    """Masked objective of a VAE whose configuration gives mean and deviation of its latents."""
    tiny_vae.register_to_config(latents_mean=[1.0, -2.0, 0.5, 3.0], latents_std=[0.5, 2.0, 1.0, 4.0])
    tiny_vae.save_pretrained(tmp_path / "vae")
    config = small_config(latent={"mask": "topk", "keep": 1, "shared": True}, autoencoder="frozen", vae_channels=())
    name = str(tmp_path / "vae")
    return build_objective(name, config, 16).eval(), config, name


def test_a_channel_off_is_the_mean_of_a_vae_that_gives_one(images, standardizing):
    one, config, _ = standardizing
    found, _ = evaluate_pruning(one, images, EVALUATION, 0)
    pixels, (mean, std) = images.stack(), (torch.tensor(one.vae.config[f"latents_{name}"]) for name in ("mean", "std"))
    with torch.no_grad():
        raw = one.vae.encode(pixels).latent_dist.mode()
        scaled = (raw - mean[:, None, None]) / std[:, None, None] * one.vae.config.scaling_factor
        kept = one.masks.mask(scaled)[0].argmax()
        masked = mean[None, :, None, None].expand_as(raw).clone()
        masked[:, kept] = raw[:, kept]
        decoded = one.vae.decode(masked).sample
        plain = one.vae.decode(raw).sample
    by_hand = float((decoded - pixels).square().sum() / len(pixels))
    assert found.masked_recon_mse == pytest.approx(by_hand, rel=1e-4)
    assert found.recon_mse == pytest.approx(float((plain - pixels).square().sum() / len(pixels)), rel=1e-4)
    rows = sweep.picture_rows({"a": one}, images, config, count=3)
    torch.testing.assert_close(rows["a, masked"], decoded[:3], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(rows["a, latent"], plain[:3], rtol=1e-4, atol=1e-4)
    watcher = MaskWatcher(one, images, 1)
    watcher.measure(0)
    tracked = {row["channel"]: row["mask"] for row in watcher.rows if row["class"] == "all"}
    assert tracked == {channel: float(channel == kept) for channel in range(4)}


def test_a_vae_from_scratch_leaves_its_latents_unscaled(standardizing):
    _, _, name = standardizing
    scratch = build_objective(name, small_config(vae_channels=()), 16).eval()
    latents = torch.randn(2, 4, 8, 8)
    assert torch.equal(scratch.to_vae_latents(latents), latents)


def test_the_losses_are_those_of_noise_loss_and_the_spectrum_averages_to_them(images):
    one = objective()
    found, spectrum = evaluate_pruning(one, images, EVALUATION, 5)
    seen, timesteps = sample_latents(one, images, 5)[1], noise_loss.spread_timesteps(one.scheduler, 4)
    expected = noise_loss.noise_errors(lambda x, t: one.unet(x, t).sample, seen, one.scheduler, timesteps, seed=5)
    assert found.diffusion_loss == pytest.approx(float(expected.mean()), rel=1e-5)
    closed = noise_loss.closed_form_error(
        noise_loss.channel_variances(seen), noise_loss.alpha_bar(one.scheduler, timesteps)
    )
    assert found.closed_form_loss == pytest.approx(float(closed.mean()), rel=1e-6)
    assert len(spectrum) == 4 * 4
    for measured, name in ((found.diffusion_loss, "error"), (found.closed_form_loss, "closed_form")):
        assert measured == pytest.approx(np.mean([row[name] for row in spectrum]), rel=1e-6)
    for row in spectrum:
        assert row["closed_form"] == pytest.approx(row["snr"] / (1 + row["snr"]), rel=1e-6)


def test_a_mask_of_almost_nothing_is_seen_in_the_scale_and_in_the_closed_form(images):
    one, closed = objective(), objective()
    torch.nn.init.constant_(closed.masks.predict.second.bias, np.log(0.003 / 0.997))
    before, after = (evaluate_pruning(each, images, EVALUATION, 0)[0] for each in (one, closed))
    assert after.mean_mask == pytest.approx(0.003, rel=0.2)
    assert after.latent_scale == before.latent_scale and after.recon_mse == before.recon_mse
    assert after.scale < 0.01 * before.scale
    assert after.closed_form_loss < 0.1 * before.closed_form_loss
    assert after.inactive_channels == 4


def test_the_same_seed_gives_the_same_numbers(images):
    one = objective()
    assert evaluate_pruning(one, images, EVALUATION, 1) == evaluate_pruning(one, images, EVALUATION, 1)
    assert evaluate_pruning(one, images, EVALUATION, 1)[0] != evaluate_pruning(one, images, EVALUATION, 2)[0]


def test_samples_are_decoded_and_judged(images):
    one, asked = objective(), EvaluationConfig(loss_timesteps=2, fid_images=70, sampler_steps=2)
    made = sample_pictures(one, asked, (4, 8, 8), 16, 3)
    assert made.shape == (70, 3, 16, 16) and made.abs().max() <= 1
    real = torch.rand(80, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    reference = fid.fid_reference("embedded", [{"pixels": real}], 70, "cpu")
    assert evaluate_pruning(one, images, asked, 3, reference)[0].fid == reference.distance(made)
    assert reference.distance(made) > 0


def test_a_wrong_configuration_is_refused():
    for name, value in (("loss_timesteps", 0), ("fid_images", -1), ("sampler_steps", 0)):
        with pytest.raises(ValueError, match=f"{name}: must be at least"):
            EvaluationConfig(**{name: value})


@pytest.mark.parametrize(
    "evaluate",
    [
        lambda one, images: evaluate_pruning(one, images, EVALUATION, 0),
        lambda one, images: sample_latents(one, images, 0),
        lambda one, images: sample_pictures(one, EvaluationConfig(fid_images=2, sampler_steps=1), (4, 8, 8), 16, 0),
        lambda one, images: sweep.picture_rows({"a": one}, images, small_config(), count=2),
        lambda one, images: slimming.measure_savings(one, images, 1, 0),
        lambda one, images: MaskWatcher(one, images, 1).measure(0),
    ],
    ids=["evaluate_pruning", "sample_latents", "sample_pictures", "picture_rows", "measure_savings", "MaskWatcher"],
)
def test_evaluation_learns_nothing_and_leaves_every_module_in_its_mode(images, evaluate):
    one = objective(mask="normalised", standardise=True).train()
    one.vae.eval()  # as who freezes a part of it has it
    modes = [part.training for part in one.modules()]
    before = {name: value.clone() for name, value in one.state_dict().items()}
    evaluate(one, images)
    assert [part.training for part in one.modules()] == modes
    assert all(torch.equal(value, before[name]) for name, value in one.state_dict().items())
