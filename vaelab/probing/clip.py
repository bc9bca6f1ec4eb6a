"""Zero-shot classification by CLIP: a picture's class is the one whose text is nearest to the picture.

Radford et al., "Learning Transferable Visual Models From Natural Language Supervision" (2021), section 3.1.2. Kim et
al. ("Revelio", section 4.7 and appendix A) put the inferred class into the denoiser's prompt.
"""

import re
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from vaelab.models.clip import Clip

PLACEHOLDER = re.compile(r"\{(\w+)\}")


class ZeroShotClip:
    """Classifies pictures by CLIP, for one or several factors (sets of classes) at once."""

    def __init__(self, clip: Clip, texts: Mapping[str, Sequence[str]]):
        """Embed the classes' texts.

        Args:
            clip: the model.
            texts: for each factor one text per class.

        Raises:
            ValueError: a factor has fewer than two classes.
        """
        for factor, each in texts.items():
            if len(each) < 2:
                raise ValueError(f"classes: CLIP needs two or more classes to choose from, {factor} has {len(each)}")
        self.clip = clip
        self.texts = {factor: list(each) for factor, each in texts.items()}
        self._embedded = {factor: clip.embed_sentences(each) for factor, each in self.texts.items()}

    @torch.no_grad()
    def logits(self, pixels: Tensor) -> dict[str, Tensor]:
        """Compute by factor the logits (B, C): CLIP's scale times the cosine similarity of B pictures and C texts.

        Args:
            pixels: the pictures, (B, 3, H, W) in [-1, 1].
        """
        embedded, scale = self.clip.embed_pictures(pixels), self.clip.model.logit_scale.exp()
        return {factor: embedded @ texts.T * scale for factor, texts in self._embedded.items()}

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
