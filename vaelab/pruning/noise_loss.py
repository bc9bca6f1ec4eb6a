"""How the noise-prediction loss depends on the scale of the latent.

The loss E||eps - eps_theta(z_t, t)||^2 with z_t = sqrt(abar) z + sqrt(1 - abar) eps (Ho et al. 2020, eq. 14) falls when
z gets smaller, whatever the denoiser has learned: with z = 0 the input is the noise itself, up to a known factor. If z
has the variance s^2, the best linear prediction has an error of abar s^2 / (abar s^2 + 1 - abar) per entry. No denoiser
does better on a Gaussian latent with independent entries; only structure in the latent can lower the error.

This module computes that closed form, the measured error by signal-to-noise ratio, and the loss of one trained
denoiser on rescaled latents without further training.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from vaelab.core.devices import to_float64
from vaelab.core.validate import at_least

BISECTIONS = 80

NoisePredictor = Callable[[Tensor, Tensor], Tensor]
"""Predicts the noise in noisy latents (B, c, h, w) at a timestep (a scalar, not always a whole number)."""


def noise_predictor(unet: nn.Module) -> NoisePredictor:
    """Make a :data:`NoisePredictor` from a diffusers U-Net without conditioning."""
    return lambda noisy, timestep: unet(noisy, timestep).sample


def spread_timesteps(scheduler: Any, count: int) -> Tensor:
    """Choose ``count`` timesteps (count,) int64: the midpoints of equal parts of the whole schedule.

    Raises:
        ValueError: ``count`` is larger than the schedule's number of timesteps.
    """
    total = scheduler.config.num_train_timesteps
    at_least("loss_timesteps", count, 1)
    if count > total:
        raise ValueError(f"loss_timesteps: the schedule has {total}, got {count}")
    return ((torch.arange(count) + 0.5) * total / count).long()


def alpha_bar(scheduler: Any, timesteps: Tensor | None = None) -> Tensor:
    """Return the schedule's cumulative product abar at given timesteps (T,) (None means all), in float64 on the CPU."""
    shares = scheduler.alphas_cumprod.double().cpu()
    return shares if timesteps is None else shares[timesteps.cpu()]


def channel_variances(latents: Tensor) -> Tensor:
    """Compute the variance (c,) of every channel of latents (N, c, h, w) about its mean, in float64."""
    return to_float64(latents).var((0, 2, 3), correction=0)


def closed_form_error(variance: Tensor, abar: Tensor) -> Tensor:
    """Compute the error of the best linear prediction of the noise, abar s^2 / (abar s^2 + 1 - abar).

    Args:
        variance: (c,), s^2 of each channel; a channel's mean has no effect, since it can be subtracted.
        abar: (T,), below 1.

    Returns:
        (T, c), mean squared errors per entry, between 0 and 1.
    """
    signal = abar[:, None] * variance
    return signal / (signal + 1 - abar[:, None])


def above_noise_floor(variance: Tensor, scheduler: Any) -> Tensor:
    """Find which channels (c,) bool have more signal than noise at some timestep, that is, s^2 abar / (1 - abar) > 1 at
    the least noisy timestep. The other channels are inactive at every timestep."""
    least_noisy = alpha_bar(scheduler).max()
    return variance * least_noisy > 1 - least_noisy


@torch.no_grad()
def noise_errors(
    predict: NoisePredictor, latents: Tensor, scheduler: Any, timesteps: Tensor, *, batch_size: int = 256, seed: int = 0
) -> Tensor:
    """Measure the mean squared error of the predicted noise for every timestep and channel: (T, c) float64.

    Args:
        predict: the denoiser, see :func:`noise_predictor`.
        latents: clean latents (N, c, h, w).
        scheduler: the scheduler whose ``add_noise`` is the forward process.
        timesteps: (T,) whole numbers; every latent is noised to each of them.
        batch_size: latents per pass.
        seed: determines the noise, which is the same for every denoiser and every scale of the latents.
    """
    rows = []
    for timestep in timesteps.tolist():
        generator = torch.Generator().manual_seed(seed * 1_000_003 + timestep)
        total = torch.zeros(latents.shape[1], dtype=torch.float64)
        for part in latents.split(batch_size):
            noise = torch.randn(part.shape, generator=generator).to(part)
            noisy = scheduler.add_noise(part, noise, torch.full((len(part),), timestep, device=part.device))
            predicted = predict(noisy, torch.tensor(float(timestep), device=part.device))
            total += to_float64(predicted - noise).square().sum((0, 2, 3)).cpu()
        rows.append(total / (latents[:, 0].numel()))
    return torch.stack(rows)


def predictor_of_scaled_latents(predict: NoisePredictor, scheduler: Any, factor: float) -> NoisePredictor:
    """Turn a denoiser of z into an equally good denoiser of ``factor`` z, without any training.

    Noisy ``factor`` z at abar is, up to a known factor, noisy z at the abar' that has the same
    signal-to-noise ratio, abar' = k^2 abar / (k^2 abar + 1 - abar); the denoiser is evaluated at the timestep of abar'.
    Beyond either end of its schedule it is evaluated at that end.
    """
    at_least("scales", factor, 0)
    shares = alpha_bar(scheduler)
    ratios = torch.log(shares / (1 - shares)).numpy()

    def predict_scaled(noisy: Tensor, timestep: Tensor) -> Tensor:
        abar = float(shares[int(timestep)])
        power, noise = factor**2 * abar, 1 - abar
        ratio = np.log(power / noise) if power else -np.inf
        other = float(np.interp(-ratio, -ratios, np.arange(len(ratios))))
        # the root of (1 - abar') / (1 - abar)
        return predict((power + noise) ** -0.5 * noisy, torch.tensor(other, device=noisy.device))

    return predict_scaled


def equivalent_scale(loss: float, scheduler: Any) -> float:
    """Find the standard deviation of the latent without structure whose closed-form loss, averaged over the whole
    schedule, is ``loss``.

    Raises:
        ValueError: ``loss`` is below 0, or not below 1, so that no such latent exists.
    """
    if not 0 <= loss < 1:
        raise ValueError(f"loss: a latent without structure has one from 0 to below 1, got {loss!r}")
    return factor_for_loss(torch.ones(1, dtype=torch.float64), loss, alpha_bar(scheduler))


def factor_for_loss(variance: Tensor, loss: float, abar: Tensor) -> float:
    """Find the common factor on all channels, which have the given variances (c,), for which the closed-form loss
    averaged over abar (T,) is ``loss``."""
    low, high = -40.0, 40.0
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        below = closed_form_error(variance * np.exp(2 * middle), abar).mean() < loss
        low, high = (middle, high) if below else (low, middle)
    return float(np.exp(low)) if loss > 0 else 0.0
