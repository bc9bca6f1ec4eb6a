"""Capture a denoiser's features from prompts or from pictures."""

from vaelab.activations.denoiser import (
    Features,
    Sampling,
    count_passes,
    from_pictures,
    from_prompts,
    generate,
    generate_all,
    maps_at_step,
    validate_size,
)

__all__ = [
    "Features",
    "Sampling",
    "from_pictures",
    "from_prompts",
    "generate",
    "generate_all",
    "maps_at_step",
    "count_passes",
    "validate_size",
]
