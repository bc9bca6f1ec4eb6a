"""CLIP: pictures and sentences as vectors whose cosine says how well a sentence describes a picture.

Radford et al., "Learning Transferable Visual Models From Natural Language Supervision" (2021), section 2.3.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vaelab.core import devices, hub
from vaelab.core.finite import all_finite

FILES = (
    "config.json", "preprocessor_config.json", "processor_config.json", "tokenizer*.json", "vocab.json", "merges.txt",
    "special_tokens_map.json", "added_tokens.json", "model.safetensors", "model.safetensors.index.json",
    "model-*-of-*.safetensors",
)  # fmt: skip
"""The files of a CLIP repository that transformers reads; the other files hold the same weights for other
frameworks."""
DERIVED = "position_ids"
"""Ending of the names of buffers that older checkpoints store although the model computes them."""


class Clip:
    """Embeds pictures and sentences in one space."""

    def __init__(self, model: Any, processor: Any, name: str = "clip"):
        """Take a loaded model.

        Args:
            model: a ``transformers.CLIPModel``, or another model with ``get_text_features`` and
                ``get_image_features``.
            processor: the model's processor.
            name: the name under which results mention the model.
        """
        self.model, self.processor, self.name = model.eval(), processor, name

    @torch.no_grad()
    def embed_pictures(self, pixels: Tensor) -> Tensor:
        """Embed pictures (B, 3, H, W) in [-1, 1] as vectors (B, d) of length 1; the processor resizes
        and crops."""
        inputs = self.processor(images=to_images(pixels), return_tensors="pt")["pixel_values"]
        return _unit_length(self.model.get_image_features(pixel_values=inputs.to(self.model.device, self.model.dtype)))

    @torch.no_grad()
    def embed_sentences(self, sentences: Sequence[str]) -> Tensor:
        """Embed n sentences as vectors (n, d) of length 1; a sentence is cut at the model's longest length."""
        inputs = self.processor(text=list(sentences), return_tensors="pt", padding=True, truncation=True)
        names = ("input_ids", "attention_mask")
        return _unit_length(
            self.model.get_text_features(**{name: inputs[name].to(self.model.device) for name in names})
        )


def load_clip(name: str, *, device: str = "auto", revision: str | None = None, parameter: str = "clip") -> Clip:
    """Load a CLIP model in float32.

    Args:
        name: an id on the hub, or a folder saved by transformers.
        device: the device that the model runs on.
        revision: the revision on the hub.
        parameter: the parameter that gave the name; errors begin with it.

    Raises:
        ValueError: there is no such folder or id; it holds no CLIP model; or a weight is missing, has another shape or
            is not finite, or the file holds one that the model does not use.
    """
    from safetensors import SafetensorError
    from transformers import AutoProcessor, CLIPModel

    folder = hub.find_folder(name, revision=revision, files=FILES, parameter=parameter)
    try:
        model, report = CLIPModel.from_pretrained(
            folder, dtype=torch.float32, use_safetensors=True, ignore_mismatched_sizes=True, output_loading_info=True
        )
        processor = AutoProcessor.from_pretrained(folder)
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise ValueError(f"{parameter}: {name!r} holds no CLIP model with its processor ({error})") from error
    if getattr(model.config, "model_type", "") != "clip":
        raise ValueError(f"{parameter}: {name!r} holds a {model.config.model_type} model, not CLIP")
    # transformers only logs these, and fills missing weights with random numbers
    for what in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        keys = sorted(str(key if isinstance(key, str) else key[0]) for key in report[what])
        if keys := [key for key in keys if not key.endswith(DERIVED)]:
            listed = ", ".join(keys[:3])
            raise ValueError(f"{parameter}: {name!r} has {len(keys)} {what.replace('_keys', '')} weights: {listed}")
    for key, value in model.state_dict().items():
        if not all_finite(value):
            raise ValueError(f"{parameter}: {name!r} has NaN or infinite values in {key}")
    return Clip(model.to(devices.pick(device)), processor, name)


def to_images(pixels: Tensor) -> list[np.ndarray]:
    """Convert pictures (B, 3, H, W) in [-1, 1] to arrays (H, W, 3) uint8, as image processors take them."""
    rounded = ((pixels.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    return list(rounded.permute(0, 2, 3, 1).cpu().numpy())


def _unit_length(features: Any) -> Tensor:
    """Scale embeddings (n, d) to length 1; transformers 5 returns an output object, version 4 the tensor."""
    vectors = features if isinstance(features, Tensor) else features.pooler_output
    return vectors / vectors.norm(dim=-1, keepdim=True)
