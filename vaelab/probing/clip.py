"""Zero-shot classification by CLIP: a picture's class is the one whose text is nearest to the picture.

Radford et al., "Learning Transferable Visual Models From Natural Language Supervision" (2021), section 3.1.2. Kim et
al. ("Revelio", section 4.7 and appendix A) put the inferred class into the denoiser's prompt.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vaelab.core import devices, hub

PLACEHOLDER = re.compile(r"\{(\w+)\}")
FILES = (
    "config.json", "preprocessor_config.json", "processor_config.json", "tokenizer*.json", "vocab.json", "merges.txt",
    "special_tokens_map.json", "added_tokens.json", "model.safetensors", "model.safetensors.index.json",
    "model-*-of-*.safetensors",
)  # fmt: skip
"""The files of a CLIP repository that transformers reads; the other files hold the same weights for other
frameworks."""
DERIVED = "position_ids"
"""Ending of the names of buffers that older checkpoints store although the model computes them."""


class ZeroShotClip:
    """Classifies pictures by CLIP, for one or several factors (sets of classes) at once."""

    def __init__(self, model: Any, processor: Any, texts: Mapping[str, Sequence[str]]):
        """Embed the classes' texts.

        Args:
            model: a ``transformers.CLIPModel``, or another model with ``get_text_features`` and
                ``get_image_features``.
            processor: the model's processor.
            texts: for each factor one text per class.

        Raises:
            ValueError: a factor has fewer than two classes.
        """
        for factor, each in texts.items():
            if len(each) < 2:
                raise ValueError(f"classes: CLIP needs two or more classes to choose from, {factor} has {len(each)}")
        self.model, self.processor = model.eval(), processor
        self.texts = {factor: list(each) for factor, each in texts.items()}
        self._embedded = {factor: self._embed(each) for factor, each in self.texts.items()}

    @torch.no_grad()
    def logits(self, pixels: Tensor) -> dict[str, Tensor]:
        """Compute by factor the logits (B, C): CLIP's scale times the cosine similarity of B pictures and C texts.

        Args:
            pixels: the pictures, (B, 3, H, W) in [-1, 1].
        """
        rounded = ((pixels.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
        images = [np.asarray(image) for image in rounded.permute(0, 2, 3, 1).cpu()]
        inputs = self.processor(images=images, return_tensors="pt")["pixel_values"]
        embedded = _unit_length(
            self.model.get_image_features(pixel_values=inputs.to(self.model.device, self.model.dtype))
        )
        return {factor: embedded @ texts.T * self.model.logit_scale.exp() for factor, texts in self._embedded.items()}

    def classify(self, pixels: Tensor) -> list[dict[str, int]]:
        """Predict for each of B pictures (B, 3, H, W) in [-1, 1] its class index by factor.

        Raises:
            FloatingPointError: a logit is not finite.
        """
        logits = self.logits(pixels)
        for factor, each in logits.items():
            if not each.isfinite().all():
                raise FloatingPointError(f"clip: the logits of {factor} are not finite")
        predicted = {factor: each.argmax(1).tolist() for factor, each in logits.items()}
        return [{factor: each[i] for factor, each in predicted.items()} for i in range(len(pixels))]

    @torch.no_grad()
    def _embed(self, texts: list[str]) -> Tensor:
        inputs = self.processor(text=texts, return_tensors="pt", padding=True, truncation=True)
        names = ("input_ids", "attention_mask")
        return _unit_length(
            self.model.get_text_features(**{name: inputs[name].to(self.model.device) for name in names})
        )


def load_clip(
    name: str, texts: Mapping[str, Sequence[str]], *, device: str = "auto", revision: str | None = None
) -> ZeroShotClip:
    """Load a CLIP model in float32 and embed its texts.

    Args:
        name: an id on the hub, or a folder saved by transformers.
        texts: for each factor one text per class.
        device: the device that the model runs on.
        revision: the revision on the hub.

    Raises:
        ValueError: there is no such folder or id; it holds no CLIP model; a weight is missing, has another shape or is
            not finite, or the file holds one that the model does not use; or a factor has fewer than two classes.
    """
    from safetensors import SafetensorError
    from transformers import AutoProcessor, CLIPModel

    folder = hub.find_folder(name, revision=revision, files=FILES, parameter="clip")
    try:
        model, report = CLIPModel.from_pretrained(
            folder, dtype=torch.float32, use_safetensors=True, ignore_mismatched_sizes=True, output_loading_info=True
        )
        processor = AutoProcessor.from_pretrained(folder)
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise ValueError(f"clip: {name!r} holds no CLIP model with its processor ({error})") from error
    if getattr(model.config, "model_type", "") != "clip":
        raise ValueError(f"clip: {name!r} holds a {model.config.model_type} model, not CLIP")
    # transformers only logs these, and fills missing weights with random numbers
    for what in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        keys = sorted(str(key if isinstance(key, str) else key[0]) for key in report[what])
        if keys := [key for key in keys if not key.endswith(DERIVED)]:
            listed = ", ".join(keys[:3])
            raise ValueError(f"clip: {name!r} has {len(keys)} {what.replace('_keys', '')} weights: {listed}")
    for key, value in model.state_dict().items():
        if not value.isfinite().all():
            raise ValueError(f"clip: {name!r} has NaN or infinite values in {key}")
    return ZeroShotClip(model.to(devices.pick(device)), processor, texts)


def prompt_texts(prompt: str, classes: Mapping[str, Sequence[str]]) -> dict[str, list[str]]:
    """Make CLIP's text of each class, for every factor that a prompt has in braces; other factors' braces are removed.

    ``a photo of a {label}`` gives ``{"label": ["a photo of a cat", ...]}``.

    Args:
        prompt: the prompt, with one or more factors in braces.
        classes: the class names of each factor; an underscore is read as a space.

    Raises:
        ValueError: the prompt has no factor in braces, or an unknown one.
    """
    factors = list(dict.fromkeys(PLACEHOLDER.findall(prompt)))
    if not factors or not set(factors) <= set(classes):
        raise ValueError(
            f"prompt: with clip it must have one or more of {', '.join(classes)} in braces, got {prompt!r}"
        )
    texts = {}
    for factor in factors:
        single = PLACEHOLDER.sub(lambda match, factor=factor: match[0] if match[1] == factor else "", prompt)
        single = " ".join(single.split())
        texts[factor] = [single.replace(f"{{{factor}}}", name.replace("_", " ")) for name in classes[factor]]
    return texts


def _unit_length(features: Any) -> Tensor:
    """Scale embeddings (n, d) to length 1; transformers 5 returns an output object, version 4 the tensor."""
    vectors = features if isinstance(features, Tensor) else features.pooler_output
    return vectors / vectors.norm(dim=-1, keepdim=True)
