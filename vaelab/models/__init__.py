"""Autoencoders and pipelines by one name, and the short names of their blocks."""

from vaelab.models.block_names import blocks
from vaelab.models.checks import check_blocks, check_timesteps
from vaelab.models.checksums import save_with_checksums
from vaelab.models.loading import (
    decode_latents,
    denoiser_without_weights,
    encode_latents,
    load_pipeline,
    load_vae,
    posterior,
    reconstruct,
    replace_embedded,
    require_finite,
    require_groupnorm,
    save_in_float16,
    scale_latents,
    unscale_latents,
    vae_without_weights,
    validate_embedded_names,
    validate_precision,
)
from vaelab.models.registry import embedded_dit_path, embedded_path, embedded_vae_path, identity

__all__ = [
    "blocks",
    "check_blocks",
    "check_timesteps",
    "decode_latents",
    "denoiser_without_weights",
    "embedded_dit_path",
    "embedded_path",
    "embedded_vae_path",
    "encode_latents",
    "identity",
    "load_pipeline",
    "load_vae",
    "posterior",
    "reconstruct",
    "replace_embedded",
    "require_finite",
    "require_groupnorm",
    "save_in_float16",
    "save_with_checksums",
    "scale_latents",
    "unscale_latents",
    "vae_without_weights",
    "validate_embedded_names",
    "validate_precision",
]
