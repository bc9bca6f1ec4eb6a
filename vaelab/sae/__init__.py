"""Sparse autoencoders on the updates of a denoiser's blocks; an update is a block's output minus its input."""

from vaelab.sae.formats import LoadedSAE, load_sae
from vaelab.sae.model import SAE, Codes, Losses, SAEConfig
from vaelab.sae.train import SAESpec, TrainedSAEs, store_batches, train_saes

__all__ = [
    "Codes",
    "LoadedSAE",
    "Losses",
    "SAE",
    "SAEConfig",
    "SAESpec",
    "TrainedSAEs",
    "load_sae",
    "store_batches",
    "train_saes",
]
