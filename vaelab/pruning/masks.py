"""The importance predictor over latent channels, its masks, and the joint objective with VAE and denoiser.

From "PeLAP-A: Adaptive Latent Pruning for Lightweight Latent Diffusion Models": the latent z of the VAE is
multiplied, channel by channel, by a mask m(z) before it enters the denoiser. In the paper's own form
nothing holds the mask open: reconstruction never uses it, and the noise of a smaller latent is easier to
predict. With ``normalised``, ``topk`` or ``decoder_reads="masked"`` a closed mask costs something.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from vaelab import models
from vaelab.core.validate import at_least, one_of

MASKS = ("none", "soft", "normalised", "topk")
DECODER_READS = ("latent", "masked")
INITIAL_BIAS = 3.0
GAIN_DECAY = 0.95


@dataclass(frozen=True)
class LatentConfig:
    """The mask between encoder and denoiser, and the terms of the training loss."""

    mask: str = "soft"
    """``none``; ``soft``, the paper's; ``normalised``, the same made to keep the latent's variance;
    ``topk``, ones and zeros with a straight-through gradient."""
    sparsity: float = 0.0
    """lambda, the weight of the mean mask."""
    sparsity_warmup: int = 0
    """Steps over which lambda rises linearly from 0, after ``mask_from``."""
    mask_from: int = 0
    """Steps before the mask is used and lambda counts: a curriculum."""
    keep: int = 1
    """k, the channels that ``topk`` keeps."""
    shared: bool = False
    """One mask for a whole batch, instead of one a picture: only then can a channel be removed for good."""
    hidden: int = 32
    """Width of the predictor's hidden layer."""
    decoder_reads: str = "latent"
    """What the decoder is trained on: the ``latent``, as in the paper, or the ``masked`` one."""
    standardise: bool = False
    """Whether each channel is brought to mean 0 and variance 1 before the mask."""
    stop_gradient: bool = False
    """Whether the denoiser's gradient ends before the VAE."""
    reconstruction_weight: float = 1.0
    """Of the squared error summed over a picture's values."""
    kl_weight: float = 1e-3
    """Of the KL divergence summed over the latent's entries."""

    def __post_init__(self) -> None:
        one_of("mask", self.mask, MASKS)
        one_of("decoder_reads", self.decoder_reads, DECODER_READS)
        for name in ("sparsity", "sparsity_warmup", "mask_from", "reconstruction_weight", "kl_weight"):
            at_least(name, getattr(self, name), 0)
        at_least("keep", self.keep, 1)
        at_least("hidden", self.hidden, 1)

    def sparsity_at(self, step: int) -> float:
        """lambda in step ``step``, which counts from 1."""
        if step <= self.mask_from:
            return 0.0
        return self.sparsity * min(1.0, (step - self.mask_from) / max(1, self.sparsity_warmup))


class ImportancePredictor(nn.Module):
    """m = sigmoid(W2 relu(W1 mean(z) + b1) + b2): one importance a channel from the pooled latent.

    4 channels and a hidden width of 32 are the paper's 292 parameters. The last layer begins at a
    bias of ``INITIAL_BIAS`` and small weights: every importance is near 0.95.
    """

    def __init__(self, channels: int, hidden: int = 32):
        super().__init__()
        self.first, self.second = nn.Linear(channels, hidden), nn.Linear(hidden, channels)
        nn.init.normal_(self.second.weight, std=0.01)
        nn.init.constant_(self.second.bias, INITIAL_BIAS)

    def forward(self, latents: Tensor) -> Tensor:
        """Importances (B, c) in (0, 1) of latents (B, c, h, w)."""
        return torch.sigmoid(self.second(torch.relu(self.first(latents.mean((2, 3))))))


def straight_through_topk(importance: Tensor, keep: int) -> Tensor:
    """1 for the ``keep`` most important channels of importance (B, c), 0 for the others; the gradient is
    that of the importances (straight-through, Bengio et al. 2013).

    Raises:
        ValueError: more channels kept than there are.
    """
    channels = importance.shape[-1]
    if not 1 <= keep <= channels:
        raise ValueError(f"keep: must be from 1 to the latent's {channels} channels, got {keep}")
    hard = torch.zeros_like(importance).scatter(-1, importance.topk(keep).indices, 1.0)
    return hard + (importance - importance.detach())


def variance_gain(latents: Tensor, mask: Tensor) -> Tensor:
    """The factor on a masked latent that restores its variance: the square root of the channels' summed
    variances before the mask, over those after it. Means do not count, so a constant cannot replace variance.

    Args:
        latents: (B, c, h, w); the variance is over pictures and places.
        mask: (B, c).
    """
    # in float32 under autocast too: a variance in half precision is off by percents
    latents = latents.to(torch.promote_types(latents.dtype, torch.float32))
    masked = mask[..., None, None] * latents
    before, after = (values.var((0, 2, 3), correction=0).sum() for values in (latents, masked))
    return (before / after.clamp_min(torch.finfo(after.dtype).tiny)).sqrt()


class MaskedLatents(NamedTuple):
    """A masked latent, the denoiser's input."""

    latents: Tensor
    """(B, c, h, w)."""
    mask: Tensor
    """(B, c), the factors of the channels, the gain included."""


class ChannelMask(nn.Module):
    """Multiplies the channels of a latent by a mask of one of the kinds :data:`MASKS`."""

    def __init__(self, channels: int, config: LatentConfig):
        super().__init__()
        if config.mask == "topk" and config.keep > channels:
            raise ValueError(f"keep: must be from 1 to the latent's {channels} channels, got {config.keep}")
        self.predict = ImportancePredictor(channels, config.hidden)
        self.predict.requires_grad_(config.mask != "none")
        self._config, self.enabled = config, True
        self.register_buffer("running_gain", torch.ones(()))
        self.register_buffer("gains", torch.zeros(()))

    def forward(self, latents: Tensor) -> MaskedLatents:
        """Mask latents (B, c, h, w). In evaluation the gain is the running mean of training's, so that a
        picture's mask does not depend on the rest of its batch."""
        mask = self.mask(latents)
        if self._config.mask == "normalised":
            now = variance_gain(latents, mask) if self.training else self.running_gain
            if self.training:
                self.gains += 1
                self.running_gain.lerp_(
                    now.detach().to(self.running_gain), torch.clamp(1 / self.gains, min=1 - GAIN_DECAY)
                )
            mask = now * mask
        if not self.enabled:
            mask = torch.ones_like(mask) + 0 * mask
        return MaskedLatents(mask[..., None, None] * latents, mask)

    def mask(self, latents: Tensor) -> Tensor:
        """The mask (B, c) before any gain."""
        if self._config.mask == "none":
            return latents.new_ones(latents.shape[:2])
        importance = self.predict(latents)
        if self._config.shared:
            importance = importance.mean(0, keepdim=True).expand_as(importance)
        return straight_through_topk(importance, self._config.keep) if self._config.mask == "topk" else importance


class PruningObjective(nn.Module):
    """L = w MSE + beta KL + E||eps - eps_theta(z_t, t)||^2 + lambda mean(m), for VAE, predictor and
    denoiser together.

    ``sparsity`` and ``masks.enabled`` are set from outside where they change over the training.
    """

    def __init__(self, vae: nn.Module, unet: nn.Module, scheduler: Any, config: LatentConfig):
        super().__init__()
        channels = vae.config.latent_channels
        if unet.config.in_channels != channels:
            raise ValueError(
                f"latent_channels: the VAE's latent has {channels}, the denoiser expects {unet.config.in_channels}"
            )
        self.vae, self.unet, self.masks = vae, unet, ChannelMask(channels, config)
        self.standard = nn.BatchNorm2d(channels, affine=False) if config.standardise else nn.Identity()
        self.scheduler, self.config, self.sparsity = scheduler, config, config.sparsity

    def latents(self, pixels: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """A sample of the posterior (B, c, h, w), scaled as the VAE's configuration says."""
        return models.scale_latents(self.vae, models.posterior(self.vae, pixels).sample(generator))

    def denoiser_input(self, latents: Tensor) -> MaskedLatents:
        """Scaled latents (B, c, h, w) standardised, if ``standardise`` is set, and masked."""
        return self.masks(self.standard(latents))

    def decode(self, latents: Tensor, shape: torch.Size) -> Tensor:
        """Pictures of ``shape`` from the denoiser's latents (B, c, h, w)."""
        return models.decode_latents(self.vae, self.to_vae_latents(latents), shape)

    def to_vae_latents(self, latents: Tensor) -> Tensor:
        """The denoiser's latents (B, c, h, w) as the VAE's decoder takes them: neither standardised nor scaled."""
        if self.config.standardise:
            norm = self.standard
            mean, variance = (moment[:, None, None] for moment in (norm.running_mean, norm.running_var))
            latents = latents * (variance + norm.eps).sqrt() + mean
        return models.unscale_latents(self.vae, latents)

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Losses of a batch with ``pixels`` (B, 3, R, R) in [-1, 1]; ``reconstruction`` is summed over a
        picture's values, ``diffusion`` a mean over the latent's, ``scale`` the standard deviation of
        what the denoiser gets."""
        pixels = batch["pixels"]
        posterior = models.posterior(self.vae, pixels)
        latents = posterior.sample()
        standard = self.standard(models.scale_latents(self.vae, latents))
        masked = self.masks(standard.detach() if self.config.stop_gradient else standard)
        noise = torch.randn_like(masked.latents)
        steps = self.scheduler.config.num_train_timesteps
        timesteps = torch.randint(0, steps, (len(pixels),), device=pixels.device)
        noisy = self.scheduler.add_noise(masked.latents, noise, timesteps)
        diffusion = nn.functional.mse_loss(self.unet(noisy, timesteps).sample.float(), noise.float())
        if self.config.decoder_reads == "masked":
            reaching_the_vae = self.masks(standard) if self.config.stop_gradient else masked
            decoded = self.decode(reaching_the_vae.latents, pixels.shape)
        else:
            decoded = models.decode_latents(self.vae, latents, pixels.shape)
        reconstruction = (decoded.float() - pixels).square().sum((1, 2, 3)).mean()
        kl, mean_mask = posterior.kl().mean(), masked.mask.mean()
        loss = (
            self.config.reconstruction_weight * reconstruction
            + self.config.kl_weight * kl
            + diffusion
            + self.sparsity * mean_mask
        )
        scale = masked.latents.detach().float().var((0, 2, 3), correction=0).mean().sqrt()
        return {"loss": loss, "reconstruction": reconstruction, "kl": kl, "diffusion": diffusion,
                "mean_mask": mean_mask, "scale": scale}  # fmt: skip
