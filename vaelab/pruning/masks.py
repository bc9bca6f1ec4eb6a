"""The importance predictor over latent channels, its masks, and the joint objective with VAE and denoiser.

From "PeLAP-A: Adaptive Latent Pruning for Lightweight Latent Diffusion Models": the latent z of the VAE is
multiplied, channel by channel, by a mask m(z) before it enters the denoiser. In the paper's formulation nothing
stops the mask from collapsing to 0: the reconstruction loss does not involve the mask, and noise is easier to
predict when the latent has a small magnitude. Three options prevent this. With ``mask="normalised"`` the masked
latent keeps the latent's variance, so that a smaller mask does not make the latent smaller. With ``mask="topk"``
k channels are always kept. With ``decoder_reads="masked"`` a smaller mask makes the reconstruction worse.
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
    """``none``; ``soft``, the paper's mask of importances; ``normalised``, the soft mask times a gain that restores
    the latent's variance; ``topk``, ones and zeros with a straight-through gradient."""
    sparsity: float = 0.0
    """lambda, the weight of the mean mask in the loss."""
    sparsity_warmup: int = 0
    """Steps over which lambda rises linearly from 0, after ``mask_from``."""
    mask_from: int = 0
    """Number of steps at the start of training without mask and with lambda 0."""
    keep: int = 1
    """k, the number of channels that ``topk`` keeps."""
    shared: bool = False
    """Whether all pictures of a batch share one mask, instead of one mask per picture. Only a channel that is closed
    for every picture can be removed permanently."""
    hidden: int = 32
    """Width of the predictor's hidden layer."""
    decoder_reads: str = "latent"
    """What the decoder is trained on: the unmasked ``latent``, as in the paper, or the ``masked`` latent."""
    standardise: bool = False
    """Whether each channel is brought to mean 0 and variance 1 before the mask."""
    stop_gradient: bool = False
    """Whether the gradient of the denoiser's loss stops before it reaches the VAE."""
    reconstruction_weight: float = 1.0
    """w, the weight of the squared error, which is summed over a picture's values."""
    kl_weight: float = 1e-3
    """beta, the weight of the KL divergence, which is summed over the latent's entries."""

    def __post_init__(self) -> None:
        one_of("mask", self.mask, MASKS)
        one_of("decoder_reads", self.decoder_reads, DECODER_READS)
        for name in ("sparsity", "sparsity_warmup", "mask_from", "reconstruction_weight", "kl_weight"):
            at_least(name, getattr(self, name), 0)
        at_least("keep", self.keep, 1)
        at_least("hidden", self.hidden, 1)

    def sparsity_at(self, step: int) -> float:
        """Compute lambda in step ``step``, which counts from 1."""
        if step <= self.mask_from:
            return 0.0
        return self.sparsity * min(1.0, (step - self.mask_from) / max(1, self.sparsity_warmup))


class ImportancePredictor(nn.Module):
    """Computes one importance per channel from the latent's spatial mean: m = sigmoid(W2 relu(W1 mean(z) + b1) + b2).

    With 4 channels and a hidden width of 32 it has the 292 parameters of the paper. The last layer is initialised
    with the bias ``INITIAL_BIAS`` and small weights, so that every importance starts near 0.95.
    """

    def __init__(self, channels: int, hidden: int = 32):
        super().__init__()
        self.first, self.second = nn.Linear(channels, hidden), nn.Linear(hidden, channels)
        nn.init.normal_(self.second.weight, std=0.01)
        nn.init.constant_(self.second.bias, INITIAL_BIAS)

    def forward(self, latents: Tensor) -> Tensor:
        """Compute importances (B, c) in (0, 1) from latents (B, c, h, w)."""
        return torch.sigmoid(self.second(torch.relu(self.first(latents.mean((2, 3))))))


def straight_through_topk(importance: Tensor, keep: int) -> Tensor:
    """Make a mask (B, c) that is 1 for the ``keep`` most important channels and 0 for the others.

    In the backward pass the mask is treated as the importances themselves (straight-through estimator, Bengio et al.
    2013).

    Args:
        importance: (B, c).
        keep: the number of channels to keep, from 1 to c.

    Raises:
        ValueError: ``keep`` is below 1 or above the number of channels.
    """
    channels = importance.shape[-1]
    if not 1 <= keep <= channels:
        raise ValueError(f"keep: must be from 1 to the latent's {channels} channels, got {keep}")
    hard = torch.zeros_like(importance).scatter(-1, importance.topk(keep).indices, 1.0)
    return hard + (importance - importance.detach())


def variance_gain(latents: Tensor, mask: Tensor) -> Tensor:
    """Compute the factor that restores a masked latent's variance: sqrt(sum of channel variances before masking / sum
    after masking).

    Variances are taken about each channel's mean, so a constant offset does not count as variance.

    Args:
        latents: the latents before the mask, (B, c, h, w); variances are over pictures and positions.
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
    """(B, c), the factor of each channel, including the gain."""


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
        """Mask latents (B, c, h, w).

        In evaluation mode the running mean of the training gains is used, so that a picture's masked latent does not
        depend on the rest of its batch.
        """
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
        """Compute the mask (B, c), without the gain of ``normalised``."""
        if self._config.mask == "none":
            return latents.new_ones(latents.shape[:2])
        importance = self.predict(latents)
        if self._config.shared:
            importance = importance.mean(0, keepdim=True).expand_as(importance)
        return straight_through_topk(importance, self._config.keep) if self._config.mask == "topk" else importance


class PruningObjective(nn.Module):
    """The joint loss of VAE, importance predictor and denoiser:
    L = w MSE + beta KL + E||eps - eps_theta(z_t, t)||^2 + lambda mean(m).

    w is ``reconstruction_weight``, beta is ``kl_weight`` and lambda is ``sparsity`` of :class:`LatentConfig`; eps is
    the noise, eps_theta the denoiser, z_t the noised masked latent and m the mask. The training loop sets the
    attributes ``sparsity`` and ``masks.enabled`` if they change during training
    (:class:`vaelab.pruning.train.SparsitySchedule`).
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
        """Sample latents (B, c, h, w) from the posterior of pictures, scaled as the VAE's configuration says."""
        return models.scale_latents(self.vae, models.posterior(self.vae, pixels).sample(generator))

    def denoiser_input(self, latents: Tensor) -> MaskedLatents:
        """Standardise scaled latents (B, c, h, w), if ``standardise`` is set, and mask them."""
        return self.masks(self.standard(latents))

    def decode(self, latents: Tensor, shape: torch.Size) -> Tensor:
        """Decode the denoiser's latents (B, c, h, w) to pictures of ``shape``."""
        return models.decode_latents(self.vae, self.to_vae_latents(latents), shape)

    def to_vae_latents(self, latents: Tensor) -> Tensor:
        """Convert the denoiser's latents (B, c, h, w) to the VAE's own: undo the standardisation and the scaling."""
        if self.config.standardise:
            norm = self.standard
            mean, variance = (moment[:, None, None] for moment in (norm.running_mean, norm.running_var))
            latents = latents * (variance + norm.eps).sqrt() + mean
        return models.unscale_latents(self.vae, latents)

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Compute the losses of a batch with ``pixels`` (B, 3, R, R) in [-1, 1].

        ``reconstruction`` is the squared error summed over a picture's values, ``diffusion`` the mean squared error of
        the predicted noise over the latent's entries, and ``scale`` the standard deviation of the denoiser's input
        (root mean square over channels).
        """
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
