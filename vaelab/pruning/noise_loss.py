"""What a noise-prediction loss is worth: its closed form for a latent of a given scale, its course over
the signal-to-noise ratio, and one denoiser's loss on scaled latents without any training.

A loss E||eps - eps_theta(z_t, t)||^2 with z_t = sqrt(abar) z + sqrt(1 - abar) eps (Ho et al. 2020, eq. 14)
falls when z gets smaller, whatever the denoiser has learned: of z = 0 the noise can be read off. For z of
variance s^2 the best linear prediction has the error abar s^2 / (abar s^2 + 1 - abar) an entry. A Gaussian
latent whose entries are independent attains it, and only structure in the latent can lower it.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from vaelab.core.validate import at_least

BISECTIONS = 80

Predict = Callable[[Tensor, Tensor], Tensor]
"""From noisy latents (B, c, h, w) and a timestep (a scalar, not always whole) to the noise in them."""


def predictor(unet: nn.Module) -> Predict:
    """A diffusers U-Net without conditioning as a :data:`Predict`."""
    return lambda noisy, timestep: unet(noisy, timestep).sample


def grid(scheduler: Any, count: int) -> Tensor:
    """``count`` timesteps (count,), the middles of equal parts of the whole schedule.

    Raises:
        ValueError: more than the schedule has.
    """
    total = scheduler.config.num_train_timesteps
    at_least("loss_timesteps", count, 1)
    if count > total:
        raise ValueError(f"loss_timesteps: the schedule has {total}, got {count}")
    return ((torch.arange(count) + 0.5) * total / count).long()


def signal_share(scheduler: Any, timesteps: Tensor | None = None) -> Tensor:
    """The schedule's abar at some timesteps (T,), or at all of them, in float64."""
    shares = scheduler.alphas_cumprod.double().cpu()
    return shares if timesteps is None else shares[timesteps.cpu()]


def variances(latents: Tensor) -> Tensor:
    """The variance (c,) of every channel of latents (N, c, h, w) about its mean, in float64."""
    return latents.double().var((0, 2, 3), correction=0)


def closed_form(variance: Tensor, abar: Tensor) -> Tensor:
    """The error of the best linear prediction of the noise, abar s^2 / (abar s^2 + 1 - abar).

    Args:
        variance: (c,) s^2 of each channel; the mean does not matter, it can be taken away.
        abar: (T,) below 1.

    Returns:
        (T, c) mean squared errors of an entry, between 0 and 1.
    """
    signal = abar[:, None] * variance
    return signal / (signal + 1 - abar[:, None])


def audible(variance: Tensor, scheduler: Any) -> Tensor:
    """Which channels (c,) bool rise above the noise at any timestep at all: s^2 abar / (1 - abar) > 1 at
    the schedule's least noisy one. The others are off, for every timestep and in every unit."""
    least_noisy = signal_share(scheduler).max()
    return variance * least_noisy > 1 - least_noisy


@torch.no_grad()
def errors(
    predict: Predict, latents: Tensor, scheduler: Any, timesteps: Tensor, *, batch_size: int = 256, seed: int = 0
) -> Tensor:
    """The mean squared error of a predicted noise (T, c), a row a timestep, a column a channel.

    Args:
        predict: the denoiser, see :func:`predictor`.
        latents: (N, c, h, w), what it is to denoise.
        scheduler: whose ``add_noise`` is the forward process.
        timesteps: (T,) whole numbers; every latent is noised to each of them.
        batch_size: latents at a time.
        seed: fixes the noise, which is the same for every denoiser and every scale of the latents.
    """
    rows = []
    for timestep in timesteps.tolist():
        generator = torch.Generator().manual_seed(seed * 1_000_003 + timestep)
        total = torch.zeros(latents.shape[1], dtype=torch.float64)
        for part in latents.split(batch_size):
            noise = torch.randn(part.shape, generator=generator).to(part)
            noisy = scheduler.add_noise(part, noise, torch.full((len(part),), timestep, device=part.device))
            predicted = predict(noisy, torch.tensor(float(timestep), device=part.device))
            total += (predicted - noise).double().square().sum((0, 2, 3)).cpu()
        rows.append(total / (latents[:, 0].numel()))
    return torch.stack(rows)


def at_scale(predict: Predict, scheduler: Any, factor: float) -> Predict:
    """The denoiser of z as a denoiser of ``factor`` z, exactly as good, without any training.

    Noisy ``factor`` z at abar is, up to a known factor, noisy z at the abar' that has the same
    signal-to-noise ratio, abar' = k^2 abar / (k^2 abar + 1 - abar): that is where it is asked. Beyond
    either end of its schedule it is asked at that end.
    """
    at_least("scales", factor, 0)
    shares = signal_share(scheduler)
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
    """The standard deviation of the latent, without structure, whose closed form is ``loss``, a mean
    over the whole schedule.

    Raises:
        ValueError: a loss that no such latent has: it must lie between 0 and 1.
    """
    if not 0 <= loss < 1:
        raise ValueError(f"loss: a latent without structure has one from 0 to below 1, got {loss!r}")
    return equal_factor(torch.ones(1, dtype=torch.float64), loss, signal_share(scheduler))


def equal_factor(variance: Tensor, loss: float, abar: Tensor) -> float:
    """The one factor on all channels of variance (c,) that brings the closed form's mean over abar (T,)
    to ``loss``."""
    low, high = -40.0, 40.0
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        below = closed_form(variance * np.exp(2 * middle), abar).mean() < loss
        low, high = (middle, high) if below else (low, middle)
    return float(np.exp(low)) if loss > 0 else 0.0
