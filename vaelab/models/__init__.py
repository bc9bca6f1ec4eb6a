"""Autoencoders and pipelines by one name, and the short names of their blocks."""

from vaelab.models.block_names import blocks
from vaelab.models.loading import (
    check_precision,
    decode,
    latent,
    load_pipeline,
    load_vae,
    posterior,
    put_in_place,
    reconstruct,
    refuse_unshipped,
    require_groupnorm,
    ship,
)
from vaelab.models.registry import embedded_dit_path, embedded_path, embedded_vae_path, identity

__all__ = [
    "blocks",
    "check_precision",
    "decode",
    "embedded_dit_path",
    "embedded_path",
    "embedded_vae_path",
    "identity",
    "latent",
    "load_pipeline",
    "load_vae",
    "posterior",
    "put_in_place",
    "reconstruct",
    "refuse_unshipped",
    "require_groupnorm",
    "ship",
]
