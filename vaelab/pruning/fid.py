"""Samples of a trained latent denoiser, and the Frechet distance between two sets of pictures.

The Frechet inception distance (Heusel et al. 2017, eq. 6) depends on the network whose features are compared and on the
number of pictures, so both must be reported with it. ``inception`` is the usual network, whose weights torch-fidelity
downloads. ``embedded`` is the encoder of the small autoencoder shipped with the package; it needs no download, but its
distances can only be compared with each other.
"""

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from vaelab import hooks, models
from vaelab.core.validate import at_least, one_of

FEATURES = ("embedded", "inception")
LAYER = "encoder.conv_norm_out"

Features = Callable[[Tensor], Tensor]
"""Maps pictures (B, 3, R, R) in [-1, 1] to features (B, d)."""


@torch.no_grad()
def ancestral_samples(
    unet: nn.Module, scheduler: Any, shape: tuple[int, int, int], count: int, *, steps: int, batch_size: int, seed: int
) -> Tensor:
    """Sample latents (count, c, h, w) by ancestral sampling over the whole schedule, from its noisiest timestep.

    Args:
        unet: the denoiser, which predicts the noise.
        scheduler: a ``DDPMScheduler``; a copy of it is used.
        shape: (c, h, w), the shape of one latent.
        count: the number of latents.
        steps: the number of sampling steps; if it is smaller than the schedule's, they are spread over all of it.
        batch_size: latents per batch.
        seed: determines the samples.
    """
    at_least("sampler_steps", steps, 1)
    sampler = type(scheduler).from_config(scheduler.config, timestep_spacing="trailing")
    sampler.set_timesteps(steps)
    generator, device = torch.Generator().manual_seed(seed), next(unet.parameters()).device
    parts = []
    for start in range(0, count, batch_size):
        latents = torch.randn(min(batch_size, count - start), *shape, generator=generator).to(device)
        for timestep in sampler.timesteps:
            predicted = unet(latents, timestep.to(device)).sample
            latents = sampler.step(predicted, timestep, latents, generator=generator).prev_sample
        parts.append(latents)
    return torch.cat(parts)


def feature_network(name: str, device: str = "auto") -> Features:
    """Load the feature network of this name.

    Raises:
        ValueError: the name is unknown, or torch-fidelity, which the network needs, is not installed.
    """
    one_of("fid_features", name, FEATURES)
    return _embedded(device) if name == "embedded" else _inception(device)


def fid_reference(
    name: str, batches: Iterable[dict[str, Tensor]], count: int, device: str = "auto"
) -> "FIDReference | None":
    """Compute reference features of the ``pixels`` of ``batches`` with the network ``name``; None if no pictures will
    be compared (``count`` is 0)."""
    return FIDReference(feature_network(name, device), (batch["pixels"] for batch in batches)) if count else None


def feature_statistics(features: Features, batches: Iterable[Tensor]) -> tuple[np.ndarray, np.ndarray]:
    """Compute the mean (d,) and covariance (d, d) of the features of pictures, in float64.

    Raises:
        ValueError: there are not more pictures than features, so the covariance would be singular.
    """
    with torch.no_grad():
        rows = torch.cat([features(batch).cpu() for batch in batches]).double().numpy()
    if len(rows) <= rows.shape[1]:
        raise ValueError(f"fid_images: {len(rows)} pictures for {rows.shape[1]} features; take more than features")
    return rows.mean(0), np.cov(rows, rowvar=False)


def frechet_distance(first: tuple[np.ndarray, np.ndarray], second: tuple[np.ndarray, np.ndarray]) -> float:
    """Compute |mu1 - mu2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2)) from two means (d,) and covariances (d, d)."""
    (mean, covariance), (other_mean, other_covariance) = first, second
    # only the trace of (C1 C2)^(1/2) is needed: the sum of the square roots of the eigenvalues of C1 C2, which are
    # real and not negative, up to rounding
    roots = np.sqrt(np.linalg.eigvals(covariance @ other_covariance).real.clip(0)).sum()
    spread = np.trace(covariance) + np.trace(other_covariance) - 2 * roots
    return float(max(0.0, np.square(mean - other_mean).sum() + spread))


class FIDReference:
    """The features of one set of pictures by one network, to which Frechet distances are measured.

    Args:
        features: the network, from :func:`feature_network`.
        batches: the reference pictures (B, 3, R, R) in [-1, 1].
        batch_size: pictures per pass of the network.
    """

    def __init__(self, features: Features, batches: Iterable[Tensor], batch_size: int = 64):
        self._features, self._size = features, batch_size
        self._real = feature_statistics(features, batches)

    def distance(self, pictures: Tensor) -> float:
        """Compute the Frechet distance of pictures (N, 3, R, R) in [-1, 1] to the reference."""
        return frechet_distance(self._real, feature_statistics(self._features, pictures.split(self._size)))


def _embedded(device: str) -> Features:
    vae = models.load_vae("embedded", device=device)

    def encode(pictures: Tensor) -> Tensor:
        with hooks.capture(vae, LAYER) as seen:
            vae.encode(pictures.to(vae.device, vae.dtype))
        return seen[LAYER][0].mean((2, 3)).float()

    return encode


def _inception(device: str) -> Features:
    from torchmetrics.image.fid import FrechetInceptionDistance

    from vaelab.core import devices

    try:
        network = FrechetInceptionDistance(feature=2048, normalize=True).inception.to(devices.pick(device)).eval()
    except ModuleNotFoundError as error:
        raise ValueError("fid_features: inception needs torch-fidelity (pip install vaelab[fid])") from error
    where = devices.pick(device)
    return lambda pictures: network((pictures.to(where).clamp(-1, 1) * 127.5 + 127.5).round().to(torch.uint8)).float()
