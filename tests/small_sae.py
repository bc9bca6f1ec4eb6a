"""A small autoencoder with nothing symmetric about it, and vectors for it."""

import torch

from vaelab.sae.model import SAE, SAEConfig

D, FEATURES, K = 24, 256, 3


def shaken(seed=0, **changes):
    """Weights moved away from their start, and thresholds that most values do not pass."""
    config = SAEConfig(**{"d": D, "n_features": FEATURES, "k": K, "k_aux": 5, "dead_after": 100, **changes})
    sae, generator = SAE(config, seed), torch.Generator().manual_seed(seed + 100)
    with torch.no_grad():
        for weight in sae.parameters():
            weight.add_(0.05 * torch.randn(weight.shape, generator=generator))
        if changes.get("variant") == "jumprelu":
            sae.set_thresholds(1.5 + 0.05 * torch.randn(FEATURES, generator=generator))
        if changes.get("variant") == "batchtopk":
            sae.set_thresholds(1.5)
    return sae


def vectors(count=40, seed=0):
    return torch.randn(count, D, generator=torch.Generator().manual_seed(seed)) + 0.3


def relative(found, expected):
    return float((found.double() - expected).norm() / expected.norm())
