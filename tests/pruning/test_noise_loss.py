"""Planted latents: Gaussian ones, whose best denoiser is known, and ones with structure."""

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler

from vaelab.pruning import noise_loss

SCALES = torch.tensor([2.0, 0.5, 0.05, 0.0])


@pytest.fixture(scope="module")
def scheduler():
    return DDPMScheduler(num_train_timesteps=1000, clip_sample=False)


def gaussian(count=600, scales=SCALES, seed=0):
    noise = torch.randn(count, len(scales), 4, 4, generator=torch.Generator().manual_seed(seed))
    return noise * scales[:, None, None]


def best_linear(scheduler, scales=SCALES, stretch=1.0):
    """The denoiser of a Gaussian latent: eps_hat = sqrt(1 - abar) / (abar s^2 + 1 - abar) x."""
    log_ratio = torch.log(scheduler.alphas_cumprod / (1 - scheduler.alphas_cumprod)).double().numpy()

    def predict(noisy, timestep):
        ratio = np.exp(np.interp(float(timestep), np.arange(1000), log_ratio))
        abar = ratio / (1 + ratio)
        weight = (1 - abar) ** 0.5 / (abar * scales.square() + 1 - abar)
        return stretch * weight[:, None, None].to(noisy) * noisy

    return predict


def test_closed_form_is_its_formula_and_between_0_and_1():
    variance, abar = torch.tensor([0.0, 0.01, 4.0]).double(), torch.tensor([0.9999, 0.5, 1e-4]).double()
    found = noise_loss.closed_form_error(variance, abar)
    for row in range(3):
        for column in range(3):
            a, s2 = float(abar[row]), float(variance[column])
            assert float(found[row, column]) == pytest.approx(a * s2 / (a * s2 + 1 - a), rel=1e-12)
    assert (found[:, 0] == 0).all() and (found < 1).all()


def test_the_best_denoiser_of_gaussian_latents_attains_the_closed_form_and_no_other_line_does(scheduler):
    timesteps = noise_loss.spread_timesteps(scheduler, 8)
    latents, abar = gaussian(), noise_loss.alpha_bar(scheduler, timesteps)
    expected = noise_loss.closed_form_error(SCALES.double().square(), abar)
    found = noise_loss.noise_errors(best_linear(scheduler), latents, scheduler, timesteps)
    torch.testing.assert_close(found, expected, rtol=0.06, atol=1e-6)
    assert (found[:, 3] < 1e-10).all()
    for stretch in (0.9, 1.1):
        other = noise_loss.noise_errors(best_linear(scheduler, stretch=stretch), latents, scheduler, timesteps)
        assert (other.mean(0) > found.mean(0)).all()


def test_structure_lowers_the_loss_below_the_closed_form(scheduler):
    latents = gaussian(scales=torch.tensor([1.0]))[:, :, :1, :1].expand(-1, -1, 4, 4).contiguous()
    timesteps = noise_loss.spread_timesteps(scheduler, 4)

    def knows_it_is_flat(noisy, timestep):
        abar = float(scheduler.alphas_cumprod[int(timestep)])
        share = abar / (abar + (1 - abar) / 16)  # sixteen looks at one number
        flat = share * noisy.mean((2, 3), keepdim=True) / abar**0.5
        return (noisy - abar**0.5 * flat) / (1 - abar) ** 0.5

    found = noise_loss.noise_errors(knows_it_is_flat, latents, scheduler, timesteps)
    closed = noise_loss.closed_form_error(
        noise_loss.channel_variances(latents), noise_loss.alpha_bar(scheduler, timesteps)
    )
    assert (found < closed).all() and found.mean() < 0.3 * closed.mean()


@pytest.mark.parametrize("factor", [2.0, 0.5, 0.1, 0.0])
def test_a_denoiser_told_the_scale_is_the_best_one_of_the_scaled_latents(scheduler, factor):
    scales, timesteps = torch.tensor([1.0, 0.3]), noise_loss.spread_timesteps(scheduler, 10)
    told = noise_loss.predictor_of_scaled_latents(best_linear(scheduler, scales), scheduler, factor)
    found = noise_loss.noise_errors(told, factor * gaussian(scales=scales), scheduler, timesteps)
    expected = noise_loss.closed_form_error(
        (factor * scales).double().square(), noise_loss.alpha_bar(scheduler, timesteps)
    )
    torch.testing.assert_close(found, expected, rtol=0.06, atol=1e-4)


def test_at_scale_1_it_is_the_denoiser_itself(scheduler):
    timesteps, latents = noise_loss.spread_timesteps(scheduler, 5), gaussian(8)
    plain = noise_loss.noise_errors(best_linear(scheduler), latents, scheduler, timesteps)
    rescaled = noise_loss.predictor_of_scaled_latents(best_linear(scheduler), scheduler, 1.0)
    told = noise_loss.noise_errors(rescaled, latents, scheduler, timesteps)
    torch.testing.assert_close(told, plain, rtol=1e-4, atol=1e-7)
    huge = noise_loss.predictor_of_scaled_latents(best_linear(scheduler), scheduler, 1e30)
    assert noise_loss.noise_errors(huge, latents, scheduler, timesteps).isfinite().all()


def test_equal_factor_and_equivalent_scale_undo_the_closed_form(scheduler):
    abar = noise_loss.alpha_bar(scheduler)
    variance = torch.tensor([1.0, 0.2]).double()
    loss = float(noise_loss.closed_form_error(0.07**2 * variance, abar).mean())
    assert noise_loss.factor_for_loss(variance, loss, abar) == pytest.approx(0.07, rel=1e-9)
    assert noise_loss.factor_for_loss(variance, 0.0, abar) == 0
    assert noise_loss.equivalent_scale(0.0240, scheduler) == pytest.approx(0.0597, abs=1e-4)
    with pytest.raises(ValueError, match=r"from 0 to below 1, got 1\.5"):
        noise_loss.equivalent_scale(1.5, scheduler)


def test_variance_is_about_the_channels_mean():
    latents = torch.randn(5, 3, 4, 4) * torch.tensor([1.0, 2.0, 0.0])[:, None, None] + 7
    by_hand = [np.var(latents[:, channel].double().numpy()) for channel in range(3)]
    np.testing.assert_allclose(noise_loss.channel_variances(latents), by_hand, rtol=1e-12, atol=1e-20)


def test_a_channel_is_off_where_noise_drowns_it_at_every_timestep(scheduler):
    edge = float(((1 - scheduler.alphas_cumprod[0]) / scheduler.alphas_cumprod[0]) ** 0.5)
    assert edge == pytest.approx(0.01, rel=1e-3)
    variance = torch.tensor([0.99 * edge, 1.01 * edge, 0.0, 1.0]).double().square()
    assert noise_loss.above_noise_floor(variance, scheduler).tolist() == [False, True, False, True]


def test_errors_are_those_of_a_plain_loop_and_do_not_depend_on_the_batch_size(scheduler):
    torch.manual_seed(0)
    layer, latents, timesteps = torch.nn.Conv2d(4, 4, 3, padding=1), gaussian(6), torch.tensor([3, 700])

    def predict(noisy, timestep):
        return layer(noisy)

    found = noise_loss.noise_errors(predict, latents, scheduler, timesteps, batch_size=6, seed=2)
    for row, timestep in enumerate(timesteps.tolist()):
        noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(2 * 1_000_003 + timestep))
        abar = scheduler.alphas_cumprod[timestep]
        wrong = layer(abar.sqrt() * latents + (1 - abar).sqrt() * noise) - noise
        expected = wrong.detach().double().square().mean((0, 2, 3))
        torch.testing.assert_close(found[row], expected, rtol=1e-5, atol=1e-9)
    split = noise_loss.noise_errors(predict, latents, scheduler, timesteps, batch_size=2, seed=2)
    torch.testing.assert_close(split, found, rtol=1e-6, atol=1e-9)


def test_the_grid_covers_the_schedule_in_equal_parts(scheduler):
    assert noise_loss.spread_timesteps(scheduler, 4).tolist() == [125, 375, 625, 875]
    assert noise_loss.spread_timesteps(scheduler, 1000).tolist() == list(range(1000))
    with pytest.raises(ValueError, match="loss_timesteps: the schedule has 1000, got 1001"):
        noise_loss.spread_timesteps(scheduler, 1001)
