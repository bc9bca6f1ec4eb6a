"""What CLIP takes a picture for: of classes the one whose text is nearest to it.

Radford et al., "Learning Transferable Visual Models From Natural Language Supervision" (2021), section 3.1.2;
in Kim et al. ("Revelio", section 4.7 and appendix A) it names the class that a prompt then tells the denoiser.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vaelab.core import devices, hub

HOLE = re.compile(r"\{(\w+)\}")


class ClipNames:
    """Names pictures; ``names(pixels)`` gives of each the number of its class, by factor."""

    def __init__(self, model: Any, processor: Any, texts: Mapping[str, Sequence[str]]):
        """Embed the texts.

        Args:
            model: a ``transformers.CLIPModel``, or another with ``get_text_features`` and ``get_image_features``.
            processor: its processor.
            texts: for each factor one a class.

        Raises:
            ValueError: a factor of fewer than two classes.
        """
        for factor, each in texts.items():
            if len(each) < 2:
                raise ValueError(f"classes: CLIP chooses among two or more, {factor} has {len(each)}")
        self.model, self.processor, self.texts = (
            model.eval(),
            processor,
            {key: list(each) for key, each in texts.items()},
        )
        self._embedded = {factor: self._texts(each) for factor, each in self.texts.items()}

    @torch.no_grad()
    def logits(self, pixels: Tensor) -> dict[str, Tensor]:
        """For each factor (B, C): the cosines of B pictures (B, 3, H, W) in [-1, 1] and C texts, times CLIP's scale."""
        rounded = ((pixels.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
        images = [np.asarray(one) for one in rounded.permute(0, 2, 3, 1).cpu()]
        given = self.processor(images=images, return_tensors="pt")["pixel_values"]
        seen = _unit(self.model.get_image_features(pixel_values=given.to(self.model.device, self.model.dtype)))
        return {factor: seen @ texts.T * self.model.logit_scale.exp() for factor, texts in self._embedded.items()}

    def __call__(self, pixels: Tensor) -> list[dict[str, int]]:
        """The classes of B pictures (B, 3, H, W) in [-1, 1]; each is named by itself."""
        chosen = {factor: each.argmax(1).tolist() for factor, each in self.logits(pixels).items()}
        return [{factor: each[i] for factor, each in chosen.items()} for i in range(len(pixels))]

    @torch.no_grad()
    def _texts(self, texts: list[str]) -> Tensor:
        given = self.processor(text=texts, return_tensors="pt", padding=True, truncation=True)
        names = ("input_ids", "attention_mask")
        return _unit(self.model.get_text_features(**{name: given[name].to(self.model.device) for name in names}))


def load(
    name: str, texts: Mapping[str, Sequence[str]], *, device: str = "auto", revision: str | None = None
) -> ClipNames:
    """A CLIP model, in float32, with its texts.

    Args:
        name: an id on the hub, or a folder saved by transformers.
        texts: for each factor one a class.
        device: where it runs.
        revision: on the hub.

    Raises:
        ValueError: no such folder or id, one that holds no CLIP model, or what :class:`ClipNames` refuses.
    """
    from transformers import AutoProcessor, CLIPModel

    folder = hub.find(name, revision=revision, parameter="clip")
    try:
        model = CLIPModel.from_pretrained(folder, dtype=torch.float32)
        processor = AutoProcessor.from_pretrained(folder)
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"clip: {name!r} holds no CLIP model with its processor ({error})") from error
    if getattr(model.config, "model_type", "") != "clip":
        raise ValueError(f"clip: {name!r} holds a {model.config.model_type} model, not CLIP")
    return ClipNames(model.to(devices.pick(device)), processor, texts)


def texts(prompt: str, classes: Mapping[str, Sequence[str]]) -> dict[str, list[str]]:
    """The texts of each factor that a prompt has in braces: the prompt with the class's name, without the other
    factors in braces. ``a photo of a {label}`` gives ``{"label": ["a photo of a cat", ...]}``.

    Args:
        prompt: with one or more of the factors in braces.
        classes: their names, by factor; an underscore is read as a space.

    Raises:
        ValueError: no factor in braces, or an unknown one.
    """
    holes = list(dict.fromkeys(HOLE.findall(prompt)))
    if not holes or not set(holes) <= set(classes):
        raise ValueError(f"prompt: with clip it has one or more of {', '.join(classes)} in braces, got {prompt!r}")
    made = {}
    for factor in holes:
        alone = HOLE.sub(lambda hole, factor=factor: hole[0] if hole[1] == factor else "", prompt)
        alone = " ".join(alone.split())
        made[factor] = [alone.replace(f"{{{factor}}}", name.replace("_", " ")) for name in classes[factor]]
    return made


def _unit(features: Any) -> Tensor:
    """Embeddings of unit length; transformers 5 gives them in an output, 4 as they are."""
    made = features if isinstance(features, Tensor) else features.pooler_output
    return made / made.norm(dim=-1, keepdim=True)
