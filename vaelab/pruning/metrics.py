"""What held-out pictures say of a trained latent, mask and denoiser: the two numbers of PeLAP-A ("Adaptive
Latent Pruning for Lightweight Latent Diffusion Models"), and beside them those that a latent scaled to
zero does not improve."""

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from vaelab.core.validate import at_least
from vaelab.data.images import Images
from vaelab.pruning import fid as pruning_fid
from vaelab.pruning import noise_loss
from vaelab.pruning.masks import PruningObjective
from vaelab.training import evaluation_mode
from vaelab.vae.objective import evaluate_reconstruction

AT_ONCE = 64


@dataclass(frozen=True)
class MeasuringConfig:
    """How a trained setting is measured."""

    loss_timesteps: int = 25
    """At how many timesteps, spread over the schedule, the denoiser is measured."""
    fid_images: int = 0
    """Pictures drawn for the Frechet distance; 0 draws none."""
    sampler_steps: int = 1000
    """Steps of the sampler, spread over the whole schedule."""

    def __post_init__(self) -> None:
        at_least("loss_timesteps", self.loss_timesteps, 1)
        at_least("fid_images", self.fid_images, 0)
        at_least("sampler_steps", self.sampler_steps, 1)


class Measures(NamedTuple):
    """What held-out pictures say of a trained setting."""

    diffusion_loss: float
    """Mean squared error of the predicted noise, over the whole schedule."""
    closed_form_loss: float
    """The same of the best linear prediction for channels of the same variances."""
    recon_mse: float
    """Squared error of reconstructions from unmasked latents, summed over a picture's values."""
    masked_recon_mse: float
    """The same from masked latents."""
    psnr: float
    """Of reconstructions from unmasked latents, in dB."""
    masked_psnr: float
    ssim: float
    masked_ssim: float
    mean_mask: float
    """Mean of all that the latents are multiplied by."""
    channels_off: int
    """Channels that are below the noise at every timestep, see :func:`vaelab.pruning.noise_loss.audible`."""
    latent_scale: float
    """Standard deviation of the latents before the mask, over pictures and places, root mean square
    over channels."""
    scale: float
    """The same of what the denoiser gets."""
    kl: float
    """Of the posterior, summed over a latent's entries, in nats."""
    fid: float | None
    """Frechet distance of decoded samples to held-out pictures."""


@torch.no_grad()
def latents_of(objective: PruningObjective, images: Images, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Samples of the posteriors of all ``images`` (N, c, h, w), the same as the denoiser gets them, and their
    masks (N, c); in evaluation mode, in which neither the standardisation nor the usual gain learns from them."""
    generator, device = torch.Generator().manual_seed(seed), next(objective.parameters()).device
    parts = []
    with evaluation_mode(objective):
        for batch in images.batches(AT_ONCE):
            latents = objective.latents(batch["pixels"].to(device), generator)
            parts.append((objective.standard(latents), *objective.seen(latents)))
    before, seen, mask = (torch.cat(part).float() for part in zip(*parts, strict=True))
    return before, seen, mask


def measure(
    objective: PruningObjective,
    images: Images,
    config: MeasuringConfig,
    seed: int,
    judge: pruning_fid.Judge | None = None,
) -> tuple[Measures, list[dict[str, float]]]:
    """Measure a trained objective on held-out pictures, with randomness fixed by ``seed``.

    Returns:
        The measures, and the loss over the signal-to-noise ratio: a row a timestep and channel with
        ``timestep``, ``channel``, ``snr``, ``error``, ``closed_form``.
    """
    with evaluation_mode(objective):
        return _evaluated(objective, images, config, seed, judge)


def _evaluated(
    objective: PruningObjective, images: Images, config: MeasuringConfig, seed: int, judge: pruning_fid.Judge | None
) -> tuple[Measures, list[dict[str, float]]]:
    before, seen, mask = latents_of(objective, images, seed)
    scheduler = objective.scheduler
    timesteps = noise_loss.grid(scheduler, config.loss_timesteps)
    errors = noise_loss.errors(
        noise_loss.predictor(objective.unet), seen, scheduler, timesteps, batch_size=AT_ONCE, seed=seed
    )
    variance, abar = noise_loss.variances(seen).cpu(), noise_loss.signal_share(scheduler, timesteps)
    closed = noise_loss.closed_form(variance, abar)
    plain = evaluate_reconstruction(objective.vae, images.batches(AT_ONCE))
    masked = evaluate_reconstruction(_ThroughTheMask(objective).eval(), images.batches(AT_ONCE))
    values, fid = 3 * images.resolution**2, None
    if config.fid_images and judge:
        fid = judge.distance(drawn(objective, config, tuple(seen.shape[1:]), images.resolution, seed))
    found = Measures(
        float(errors.mean()), float(closed.mean()), values * plain.mse, values * masked.mse, plain.psnr, masked.psnr,
        plain.ssim, masked.ssim, float(mask.mean()), int((~noise_loss.audible(variance, scheduler)).sum()),
        float(noise_loss.variances(before).mean().sqrt()), float(variance.mean().sqrt()), plain.kl, fid,
    )  # fmt: skip
    spectrum = [
        {"timestep": int(timestep), "channel": channel, "snr": float(variance[channel] * share / (1 - share)),
         "error": float(errors[row, channel]), "closed_form": float(closed[row, channel])}
        for row, (timestep, share) in enumerate(zip(timesteps, abar, strict=True))
        for channel in range(len(variance))
    ]  # fmt: skip
    return found, spectrum


@torch.no_grad()
def drawn(
    objective: PruningObjective, config: MeasuringConfig, shape: tuple[int, ...], resolution: int, seed: int
) -> Tensor:
    """``config.fid_images`` pictures (N, 3, R, R) decoded from samples of the denoiser, on the CPU."""
    with evaluation_mode(objective):
        latents = pruning_fid.draw(
            objective.unet, objective.scheduler, shape, config.fid_images, steps=config.sampler_steps,
            batch_size=AT_ONCE, seed=seed,
        )  # fmt: skip
        sizes = (torch.Size((len(part), 3, resolution, resolution)) for part in latents.split(AT_ONCE))
        parts = [objective.decode(part, size) for part, size in zip(latents.split(AT_ONCE), sizes, strict=True)]
    return torch.cat(parts).float().clamp(-1, 1).cpu()


class _ThroughTheMask(nn.Module):
    """An objective's VAE that decodes what the denoiser gets."""

    def __init__(self, objective: PruningObjective):
        super().__init__()
        self._objective = objective
        self.encode = objective.vae.encode

    def decode(self, latents: Tensor) -> Any:
        seen = self._objective.seen(latents * self._objective.vae.config.scaling_factor).latents
        return self._objective.vae.decode(self._objective.unscaled(seen))
