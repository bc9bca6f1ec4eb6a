"""A denoiser's features, of prompts or of pictures."""

from vaelab.activations.denoiser import (
    Features,
    Sampling,
    from_pictures,
    from_prompts,
    generate,
    generate_all,
    passes,
    validate_size,
)

__all__ = [
    "Features",
    "Sampling",
    "from_pictures",
    "from_prompts",
    "generate",
    "generate_all",
    "passes",
    "validate_size",
]
