"""The embedded text model: CLIP's architecture, a tokenizer of its own, and how it learns to read.

Stable Diffusion's text encoder has learned to read before the U-Net sees it, from 400 million
pictures with captions (Radford et al. 2021). This one, which knows only the world's prompts, learns
from the prompts alone: asked what a prompt puts in each place, it must give its tokens what the
U-Net will look for there.
"""

import itertools
import json
import string
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from vaelab.core.validate import at_least
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
SPECIAL = ("<|startoftext|>", "<|endoftext|>")
PROMPTS_FOR_THE_TOKENIZER = 5000
NOT_SAID = -1
ASKED = {"shape": len(SHAPES) + 1, "colour": len(COLOURS), "size": len(SIZES)}
"""What is asked of each place; after the shapes comes that nothing is there."""
GROUND = {"texture": len(TEXTURES), "ground": len(GROUNDS)}


def new_tokenizer() -> "CLIPTokenizer":
    """CLIP's byte-pair tokenizer, with a token for every word of the world's prompts.

    The merges are found here, ties broken by name: the tokenizers library's trainer breaks them
    otherwise in every process, and a training that is gone on from needs the same numbers.
    """
    from transformers import CLIPTokenizer

    prompts = (sample(seed).prompt for seed in range(PROMPTS_FOR_THE_TOKENIZER))
    merges = _merges(sorted({word for prompt in prompts for word in prompt.replace(",", " ,").split()}))
    characters = string.ascii_lowercase + string.digits + ".,!?'-"
    tokens = [*SPECIAL, *characters, *(f"{one}</w>" for one in characters), *map("".join, merges)]
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(tokens)}))
        Path(folder, "merges.txt").write_text("\n".join(["#version: 0.2", *map(" ".join, merges)]))
        return CLIPTokenizer.from_pretrained(folder, model_max_length=MAX_TOKENS)


def _merges(words: list[str]) -> list[tuple[str, str]]:
    """Byte-pair encoding (Sennrich et al. 2016) of words that count once each, until each is one token."""
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
    """Token numbers (B, L), padded as the pipelines of diffusers do."""
    return tokenizer(
        prompts, padding="max_length", max_length=tokenizer.model_max_length, truncation=True, return_tensors="pt"
    ).input_ids


def new_text_model(tokenizer: "CLIPTokenizer", width: int, layers: int, seed: int = 0) -> "CLIPTextModel":
    """An untrained CLIP text model, whose states are ``width`` wide."""
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
    """Cross-entropy of what a prompt puts in each of the nine places, and of its ground.

    Each place asks with a query of its own, through one layer of attention to the text model's
    states: as little as that, so that it is the text model that learns to read.
    """

    def __init__(self, text_model: "CLIPTextModel", seed: int = 0):
        super().__init__()
        width = text_model.config.hidden_size
        self.text_encoder = text_model
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.queries = nn.Parameter(torch.randn(len(POSITIONS) + 1, width))
            self.attention = nn.MultiheadAttention(width, 4, batch_first=True)
            self.place = nn.Linear(width, sum(ASKED.values()))
            self.ground = nn.Linear(width, sum(GROUND.values()))

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """The loss of ``tokens`` (B, L), what is said of each of the 9 ``places`` (B, 9, 3) and of
        the ``ground`` (B, 2), -1 where the prompt does not say; and the share of right answers."""
        states = self.text_encoder(batch["tokens"])[0]
        found, _ = self.attention(self.queries.expand(len(states), -1, -1), states, states, need_weights=False)
        answers = [
            *self.place(found[:, :-1]).split(list(ASKED.values()), -1),
            *self.ground(found[:, -1]).split(list(GROUND.values()), -1),
        ]
        truths = [*batch["places"].unbind(-1), *batch["ground"].unbind(-1)]
        loss, right, said = 0.0, 0, 0
        for answer, truth in zip(answers, truths, strict=True):
            known = truth != NOT_SAID
            if known.any():
                loss = loss + nn.functional.cross_entropy(answer[known].float(), truth[known])
                right, said = right + (answer[known].argmax(-1) == truth[known]).sum(), said + known.sum()
        return {"loss": loss, "right": right / said}


def readings(batch_size: int, tokenizer: "CLIPTokenizer") -> Callable[..., Iterator[dict[str, Tensor]]]:
    """Endless batches of prompts of training scenes, for :class:`ReadingObjective`."""
    at_least("batch_size", batch_size, 1)

    def batches(start: int = 0, rank: int = 0, world: int = 1) -> Iterator[dict[str, Tensor]]:
        for number in itertools.count(start):
            first = (number * world + rank) * batch_size
            drawn = [sample(seed) for seed in range(first, first + batch_size)]
            yield {"tokens": tokenize(tokenizer, [scene.prompt for scene in drawn]), **said(drawn)}

    return batches


def said(scenes: Sequence[Scene]) -> dict[str, Tensor]:
    """What prompts say: ``places`` (B, 9, 3), of each place its shape, colour and size, and
    ``ground`` (B, 2), as numbers of the world's factors.

    A place is said to be empty where the place of every thing is named and it is none of these.
    """
    places = torch.full((len(scenes), len(POSITIONS), len(ASKED)), NOT_SAID)
    ground = torch.full((len(scenes), len(GROUND)), NOT_SAID)
    for i, scene in enumerate(scenes):
        placed = [thing for thing in scene.things if "position" in thing.named]
        if len(placed) == len(scene.things):
            places[i, :, 0] = len(SHAPES)
        for thing in placed:
            values = [_number(thing, factor) for factor in ASKED]
            places[i, FACTORS["position"].index(thing.position)] = torch.tensor(values)
        ground[i] = torch.tensor([_number(scene, factor) for factor in SCENE_FACTORS])
    return {"places": places, "ground": ground}


def _number(named: object, factor: str) -> int:
    return FACTORS[factor].index(getattr(named, factor)) if factor in named.named else NOT_SAID
