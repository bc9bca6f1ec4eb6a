"""The text encoder of the small text-to-image model shipped with the package: CLIP's architecture with its own
tokenizer, and its pretraining.

Stable Diffusion's text encoder has learned to read before the U-Net uses it, from 400 million captioned pictures
(Radford et al. 2021). This one is pretrained only on prompts of the synthetic scene world (:mod:`vaelab.world`), which
describe objects ("things" in the code) on a ground: a small head must predict from its token states which shape, colour
and size a prompt names at each of the nine positions. A factor is such an attribute.
"""

import functools
import itertools
import json
import string
import tempfile
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from vaelab.core.validate import at_least
from vaelab.training.batches import Batches, NumberedBatches
from vaelab.world.scenes import (
    COLOURS,
    FACTORS,
    GROUNDS,
    POSITIONS,
    SCENE_FACTORS,
    SHAPES,
    SIZES,
    TEXTURES,
    Scene,
    sample,
)

if TYPE_CHECKING:
    from transformers import CLIPTextModel, CLIPTokenizer

MAX_TOKENS = 40
SPECIAL_TOKENS = ("<|startoftext|>", "<|endoftext|>")
TOKENIZER_PROMPTS = 5000
"""Number of prompts from which the vocabulary is taken; each word gets one token."""
UNNAMED = -1
"""Label of a factor that a prompt does not name."""
POSITION_FACTORS = {"shape": len(SHAPES) + 1, "colour": len(COLOURS), "size": len(SIZES)}
"""Number of classes of each factor at a position; the last class of ``shape`` means that the position is empty."""
GROUND_FACTORS = {"texture": len(TEXTURES), "ground": len(GROUNDS)}
"""Number of classes of each factor of the ground."""


def new_tokenizer() -> "CLIPTokenizer":
    """Make a byte-pair tokenizer like CLIP's, with one token for every word of the scene world's prompts.

    The merges are computed here, with ties broken by name. The trainer of the tokenizers library breaks ties
    differently in every process, but resumed training needs the same token ids.
    """
    from transformers import CLIPTokenizer

    merges = _merges(_world_words())
    characters = string.ascii_lowercase + string.digits + ".,!?'-"
    tokens = [*SPECIAL_TOKENS, *characters, *(f"{character}</w>" for character in characters), *map("".join, merges)]
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(tokens)}))
        Path(folder, "merges.txt").write_text("\n".join(["#version: 0.2", *map(" ".join, merges)]))
        return CLIPTokenizer.from_pretrained(folder, model_max_length=MAX_TOKENS)


@functools.cache
def _world_words() -> tuple[str, ...]:
    """The words of the scene world's prompts, in alphabetical order; sampling the prompts takes a second."""
    prompts = (sample(seed).prompt for seed in range(TOKENIZER_PROMPTS))
    return tuple(sorted({word for prompt in prompts for word in prompt.replace(",", " ,").split()}))


def _merges(words: Iterable[str]) -> list[tuple[str, str]]:
    """Compute byte-pair merges (Sennrich et al. 2016) until each word is one token; every word counts once."""
    pieces = [[*word[:-1], f"{word[-1]}</w>"] for word in words]
    merges: list[tuple[str, str]] = []
    while counts := Counter(pair for word in pieces for pair in itertools.pairwise(word)):
        best = max(counts, key=lambda pair: (counts[pair], pair))
        merges.append(best)
        for word in pieces:
            for place in reversed(range(len(word) - 1)):
                if tuple(word[place : place + 2]) == best:
                    word[place : place + 2] = ["".join(best)]
    return merges


def tokenize(tokenizer: "CLIPTokenizer", prompts: list[str]) -> Tensor:
    """Convert prompts to token ids (B, L), padded to the tokenizer's length as diffusers' pipelines do.

    Raises:
        ValueError: a prompt is too long. transformers would cut its end off and only log that.
    """
    length = tokenizer.model_max_length
    tokens = tokenizer(prompts, padding="max_length", max_length=length).input_ids
    for prompt, row in zip(prompts, tokens, strict=True):
        if len(row) > length:
            raise ValueError(f"prompts: {prompt!r} has {len(row)} tokens; the tokenizer takes up to {length}")
    return torch.tensor(tokens)


def new_text_encoder(tokenizer: "CLIPTokenizer", width: int, layers: int, seed: int = 0) -> "CLIPTextModel":
    """Make an untrained CLIP text encoder.

    Args:
        tokenizer: the tokenizer, which determines the vocabulary.
        width: the number of channels of the encoder's states.
        layers: the number of transformer layers.
        seed: the seed of the initial weights.
    """
    from transformers import CLIPTextConfig, CLIPTextModel

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return CLIPTextModel(
            CLIPTextConfig(
                vocab_size=len(tokenizer),
                hidden_size=width,
                intermediate_size=4 * width,
                projection_dim=width,
                num_hidden_layers=layers,
                num_attention_heads=4,
                max_position_embeddings=MAX_TOKENS,
                bos_token_id=tokenizer.bos_token_id,
                eos_token_id=tokenizer.eos_token_id,
                pad_token_id=tokenizer.pad_token_id,
            )
        )


class ReadingObjective(nn.Module):
    """Cross-entropy of the factors that a prompt names at each of the nine positions and of the ground.

    The head has one query per position and one for the ground; each attends to the text encoder's states in a single
    attention layer. The head is so small that the text encoder must learn to read, not the head.

    Args:
        text_encoder: the text encoder; it is trained together with the head.
        seed: the seed of the head's initial weights.
    """

    def __init__(self, text_encoder: "CLIPTextModel", seed: int = 0):
        super().__init__()
        width = text_encoder.config.hidden_size
        self.text_encoder = text_encoder
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.queries = nn.Parameter(torch.randn(len(POSITIONS) + 1, width))
            self.attention = nn.MultiheadAttention(width, 4, batch_first=True)
            self.position_head = nn.Linear(width, sum(POSITION_FACTORS.values()))
            self.ground_head = nn.Linear(width, sum(GROUND_FACTORS.values()))

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Compute the loss of a batch.

        Args:
            batch: ``tokens`` (B, L) and the labels of :func:`prompt_labels`.

        Returns:
            Scalars: the ``loss``, summed over factors and positions, and the ``accuracy`` over all named factors.
        """
        states = self.text_encoder(batch["tokens"])[0]
        queries = self.queries.expand(len(states), -1, -1)
        attended, _ = self.attention(queries, states, states, need_weights=False)
        predictions = [
            *self.position_head(attended[:, :-1]).split(list(POSITION_FACTORS.values()), -1),
            *self.ground_head(attended[:, -1]).split(list(GROUND_FACTORS.values()), -1),
        ]
        labels = [*batch["positions"].unbind(-1), *batch["ground"].unbind(-1)]
        loss, correct, count = 0.0, 0, 0
        for logits, truth in zip(predictions, labels, strict=True):
            named = truth != UNNAMED
            if named.any():
                loss = loss + nn.functional.cross_entropy(logits[named].float(), truth[named])
                correct = correct + (logits[named].argmax(-1) == truth[named]).sum()
                count = count + named.sum()
        return {"loss": loss, "accuracy": correct / count}


def prompt_batches(batch_size: int, tokenizer: "CLIPTokenizer") -> Batches:
    """Make endless batches of prompts of training scenes, for :meth:`ReadingObjective.forward`."""
    at_least("batch_size", batch_size, 1)

    def make(number: int) -> dict[str, Tensor]:
        scenes = [sample(number * batch_size + i) for i in range(batch_size)]
        return {"tokens": tokenize(tokenizer, [scene.prompt for scene in scenes]), **prompt_labels(scenes)}

    return NumberedBatches(make)


def prompt_labels(scenes: Sequence[Scene]) -> dict[str, Tensor]:
    """Encode the factors that the scenes' prompts name as class indices; a factor without a name gets ``UNNAMED``.

    A position counts as empty if the prompt names the positions of all objects and this position is none of them.

    Returns:
        ``positions`` (B, 9, 3): shape, colour and size at each position. ``ground`` (B, 2): texture and colour.
    """
    positions = torch.full((len(scenes), len(POSITIONS), len(POSITION_FACTORS)), UNNAMED)
    ground = torch.full((len(scenes), len(GROUND_FACTORS)), UNNAMED)
    for i, scene in enumerate(scenes):
        placed = [thing for thing in scene.things if "position" in thing.named]
        if len(placed) == len(scene.things):
            positions[i, :, 0] = len(SHAPES)
        for thing in placed:
            labels = [_label(thing, factor) for factor in POSITION_FACTORS]
            positions[i, FACTORS["position"].index(thing.position)] = torch.tensor(labels)
        ground[i] = torch.tensor([_label(scene, factor) for factor in SCENE_FACTORS])
    return {"positions": positions, "ground": ground}


def _label(described: object, factor: str) -> int:
    return FACTORS[factor].index(getattr(described, factor)) if factor in described.named else UNNAMED
