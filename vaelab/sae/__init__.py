"""Sparse autoencoders on the updates of a denoiser's blocks."""

from vaelab.sae.model import SAE, Codes, Losses, SAEConfig

__all__ = ["Codes", "Losses", "SAE", "SAEConfig"]
