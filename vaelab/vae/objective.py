"""The training objective of a VAE, and measures of its reconstructions.

From Shi, Wang and Roshka ("Investigating the Functional Role of Learned Channel Suppression in
Diffusion VAEs"), sections 4.1 and 5.
"""

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from vaelab import models
from vaelab.core.validate import at_least
from vaelab.training.evaluation import evaluation_mode


class Reconstruction(NamedTuple):
    """Reconstruction quality, with pixels in [-1, 1], the range of the paper's Table 1."""

    mse: float
    """Mean squared error over all pixel values."""
    psnr: float
    """10 log10(4 / MSE) over the whole set, in dB."""
    ssim: float
    """Structural similarity, mean over pictures."""
    kl: float
    """KL divergence to a standard normal, summed over latent entries, mean over pictures, in nats."""
    kl_per_entry: float
    """The same per latent entry, which does not depend on the resolution."""


class VAEObjective(nn.Module):
    """Computes L = MSE + kl_weight KL (section 4.1), with one sample of the posterior per picture."""

    def __init__(self, vae: nn.Module, kl_weight: float):
        super().__init__()
        at_least("kl_weight", kl_weight, 0)
        self.vae, self.kl_weight = vae, kl_weight

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Compute the losses of a batch with ``pixels`` (B, 3, R, R) in [-1, 1]."""
        pixels = batch["pixels"]
        posterior = models.posterior(self.vae, pixels)
        decoded = models.decode_latents(self.vae, posterior.sample(), pixels.shape)
        reconstruction = nn.functional.mse_loss(decoded.float(), pixels)
        kl = posterior.kl().mean()
        return {"loss": reconstruction + self.kl_weight * kl, "reconstruction": reconstruction, "kl": kl}


@torch.no_grad()
def evaluate_reconstruction(vae: nn.Module, batches: Iterable[dict[str, Tensor]]) -> Reconstruction:
    """Measure reconstructions from the posterior's mean, in evaluation mode.

    Args:
        vae: an autoencoder with a Gaussian posterior.
        batches: dicts with ``pixels`` (B, 3, R, R) in [-1, 1].
    """
    from torchmetrics.image import PeakSignalNoiseRatio, StructuralSimilarityIndexMeasure
    from torchmetrics.regression import MeanSquaredError

    parameter = next(vae.parameters())
    mse = MeanSquaredError().to(parameter.device)
    psnr = PeakSignalNoiseRatio(data_range=2.0).to(parameter.device)
    ssim = StructuralSimilarityIndexMeasure(data_range=2.0).to(parameter.device)
    kl, pictures, entries = 0.0, 0, 1
    with evaluation_mode(vae):
        for batch in batches:
            pixels = batch["pixels"].to(parameter.device)
            posterior = models.posterior(vae, pixels.to(parameter.dtype))
            decoded = models.decode_latents(vae, posterior.mode(), pixels.shape).float()
            for metric in (mse, psnr, ssim):
                metric.update(decoded.contiguous(), pixels)
            kl += posterior.kl().sum().item()
            pictures += len(pixels)
            entries = posterior.mean[0].numel()
    if not pictures:
        raise ValueError("batches: no picture to evaluate on")
    values = (metric.compute().item() for metric in (mse, psnr, ssim))
    return Reconstruction(*values, kl / pictures, kl / pictures / entries)


@torch.no_grad()
def latent_scale(vae: nn.Module, batches: Iterable[dict[str, Tensor]]) -> float:
    """Compute diffusers' ``scaling_factor``: 1 / (standard deviation of the latents), so that scaled latents have unit
    variance (Rombach et al. 2022, section G of the supplement)."""
    parameter = next(vae.parameters())
    with evaluation_mode(vae):
        posteriors = [models.posterior(vae, batch["pixels"].to(parameter.device, parameter.dtype)) for batch in batches]
    means, variances = (
        torch.cat([getattr(posterior, moment).cpu().double().flatten() for posterior in posteriors])
        for moment in ("mean", "var")
    )
    # Var z = Var E[z|x] + E Var[z|x] needs no sample and therefore no seed
    return float((means.var() + variances.mean()) ** -0.5)
