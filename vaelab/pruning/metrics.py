"""Evaluate a trained VAE, mask and denoiser on held-out pictures.

PeLAP-A ("Adaptive Latent Pruning for Lightweight Latent Diffusion Models") reports two measures: the diffusion loss and
the reconstruction error. Further measures are added here that do not improve when the latent is scaled to zero.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from vaelab import models
from vaelab.core.validate import at_least
from vaelab.data.images import Images
from vaelab.pruning import noise_loss
from vaelab.pruning.fid import FIDReference, ancestral_samples
from vaelab.pruning.masks import PruningObjective
from vaelab.training import evaluation_mode
from vaelab.vae.objective import evaluate_reconstruction

EVALUATION_BATCH = 64


@dataclass(frozen=True)
class EvaluationConfig:
    """How a trained objective is evaluated."""

    loss_timesteps: int = 25
    """Number of timesteps, spread over the schedule, at which the denoiser is evaluated."""
    fid_images: int = 0
    """Number of pictures sampled for the Frechet distance; 0 leaves the distance out."""
    sampler_steps: int = 1000
    """Steps of the sampler, spread over the whole schedule."""

    def __post_init__(self) -> None:
        at_least("loss_timesteps", self.loss_timesteps, 1)
        at_least("fid_images", self.fid_images, 0)
        at_least("sampler_steps", self.sampler_steps, 1)


class PruningMetrics(NamedTuple):
    """Measures of a trained objective on held-out pictures."""

    diffusion_loss: float
    """Mean squared error of the predicted noise, over the whole schedule."""
    closed_form_loss: float
    """The diffusion loss of the best linear prediction for channels with the same variances."""
    recon_mse: float
    """Squared error of reconstructions from unmasked latents, summed over a picture's values."""
    masked_recon_mse: float
    """The same from masked latents."""
    psnr: float
    """Peak signal-to-noise ratio of reconstructions from unmasked latents, in dB."""
    masked_psnr: float
    """The same from masked latents."""
    ssim: float
    """Structural similarity of reconstructions from unmasked latents."""
    masked_ssim: float
    """The same from masked latents."""
    mean_mask: float
    """Mean over pictures and channels of the mask, its gain included."""
    inactive_channels: int
    """Channels whose signal is below the noise at every timestep; see
    :func:`vaelab.pruning.noise_loss.above_noise_floor`."""
    latent_scale: float
    """Standard deviation of the latents before the mask, over pictures and positions (root mean square over
    channels)."""
    scale: float
    """The same of the masked latents, which are the denoiser's input."""
    kl: float
    """KL divergence of the posterior, summed over a latent's entries, in nats."""
    fid: float | None
    """Frechet distance of decoded samples to the reference pictures; None if it was not measured."""


@torch.no_grad()
def sample_latents(objective: PruningObjective, images: Images, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Sample the latents of all ``images``, in evaluation mode, so that no running statistic changes.

    Returns:
        Three tensors: samples of the posteriors (N, c, h, w), standardised if the objective does so; the same samples
        masked, as the denoiser gets them; and their masks (N, c).
    """
    generator, device = torch.Generator().manual_seed(seed), next(objective.parameters()).device
    parts = []
    with evaluation_mode(objective):
        for batch in images.batches(EVALUATION_BATCH):
            latents = objective.latents(batch["pixels"].to(device), generator)
            parts.append((objective.standard(latents), *objective.denoiser_input(latents)))
    before, masked, mask = (torch.cat(part).float() for part in zip(*parts, strict=True))
    return before, masked, mask


def evaluate_pruning(
    objective: PruningObjective,
    images: Images,
    config: EvaluationConfig,
    seed: int,
    fid_reference: FIDReference | None = None,
) -> tuple[PruningMetrics, list[dict[str, float]]]:
    """Evaluate a trained objective on held-out pictures; ``seed`` determines the randomness, and every module keeps its
    mode.

    Returns:
        The metrics, and the loss by signal-to-noise ratio: one row per timestep and channel with ``timestep``,
        ``channel``, ``snr``, ``error`` and ``closed_form``.
    """
    with evaluation_mode(objective):
        return _evaluated(objective, images, config, seed, fid_reference)


def _evaluated(
    objective: PruningObjective,
    images: Images,
    config: EvaluationConfig,
    seed: int,
    fid_reference: FIDReference | None,
) -> tuple[PruningMetrics, list[dict[str, float]]]:
    before, masked_latents, mask = sample_latents(objective, images, seed)
    scheduler = objective.scheduler
    timesteps = noise_loss.spread_timesteps(scheduler, config.loss_timesteps)
    errors = noise_loss.noise_errors(
        noise_loss.noise_predictor(objective.unet),
        masked_latents,
        scheduler,
        timesteps,
        batch_size=EVALUATION_BATCH,
        seed=seed,
    )
    variance, abar = noise_loss.channel_variances(masked_latents).cpu(), noise_loss.alpha_bar(scheduler, timesteps)
    closed = noise_loss.closed_form_error(variance, abar)
    plain = evaluate_reconstruction(objective.vae, images.batches(EVALUATION_BATCH))
    masked = evaluate_reconstruction(_MaskedVAE(objective).eval(), images.batches(EVALUATION_BATCH))
    values, fid = 3 * images.resolution**2, None
    if config.fid_images and fid_reference:
        shape = tuple(masked_latents.shape[1:])
        fid = fid_reference.distance(sample_pictures(objective, config, shape, images.resolution, seed))
    metrics = PruningMetrics(
        float(errors.mean()), float(closed.mean()), values * plain.mse, values * masked.mse, plain.psnr, masked.psnr,
        plain.ssim, masked.ssim, float(mask.mean()), int((~noise_loss.above_noise_floor(variance, scheduler)).sum()),
        float(noise_loss.channel_variances(before).mean().sqrt()), float(variance.mean().sqrt()), plain.kl, fid,
    )  # fmt: skip
    spectrum = [
        {"timestep": int(timestep), "channel": channel, "snr": float(variance[channel] * share / (1 - share)),
         "error": float(errors[row, channel]), "closed_form": float(closed[row, channel])}
        for row, (timestep, share) in enumerate(zip(timesteps, abar, strict=True))
        for channel in range(len(variance))
    ]  # fmt: skip
    return metrics, spectrum


@torch.no_grad()
def sample_pictures(
    objective: PruningObjective, config: EvaluationConfig, shape: tuple[int, ...], resolution: int, seed: int
) -> Tensor:
    """Sample ``config.fid_images`` latents with the denoiser and decode them to pictures (N, 3, R, R) on the CPU."""
    with evaluation_mode(objective):
        latents = ancestral_samples(
            objective.unet, objective.scheduler, shape, config.fid_images, steps=config.sampler_steps,
            batch_size=EVALUATION_BATCH, seed=seed,
        )  # fmt: skip
        sizes = (torch.Size((len(part), 3, resolution, resolution)) for part in latents.split(EVALUATION_BATCH))
        parts = [
            objective.decode(part, size) for part, size in zip(latents.split(EVALUATION_BATCH), sizes, strict=True)
        ]
    return torch.cat(parts).float().clamp(-1, 1).cpu()


class _MaskedVAE(nn.Module):
    """The VAE of an objective, with a decoder that gets the masked latents."""

    def __init__(self, objective: PruningObjective):
        super().__init__()
        self._objective = objective
        self.encode = objective.vae.encode

    def decode(self, latents: Tensor) -> Any:
        vae = self._objective.vae
        masked = self._objective.denoiser_input(models.scale_latents(vae, latents)).latents
        return vae.decode(self._objective.to_vae_latents(masked))
