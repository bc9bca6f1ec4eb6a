"""Autoencoders and pipelines by one name, and the short names of their blocks."""

from vaelab.models.block_names import blocks
from vaelab.models.loading import (
    check_precision,
    decode_latents,
    encode_latents,
    load_pipeline,
    load_vae,
    posterior,
    put_in_place,
    reconstruct,
    refuse_unshipped,
    require_finite,
    require_groupnorm,
    scale_latents,
    ship,
    unscale_latents,
)
from vaelab.models.registry import embedded_dit_path, embedded_path, embedded_vae_path, identity

__all__ = [
    "blocks",
    "check_precision",
    "decode_latents",
    "embedded_dit_path",
    "embedded_path",
    "embedded_vae_path",
    "encode_latents",
    "identity",
    "load_pipeline",
    "load_vae",
    "posterior",
    "put_in_place",
    "reconstruct",
    "refuse_unshipped",
    "require_finite",
    "require_groupnorm",
    "scale_latents",
    "ship",
    "unscale_latents",
]
