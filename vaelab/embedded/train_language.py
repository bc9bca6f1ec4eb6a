"""Training of the small language model shipped with the package, on text about the scene world.

Its architecture is Llama's (Touvron et al. 2023), its tokenizer has one token for each word, and its chat template is
LLaVA's. Where a multimodal model reads the tokens of a picture, this one reads the picture's description in words, and
it learns to answer questions about it (:mod:`vaelab.world.questions`). It learns to reason about scenes before it has
seen a picture, as language models do. In the first lesson a conversation has one question, in the second several.
"""

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from vaelab.core.validate import at_least
from vaelab.embedded.train_unet import require_lesson_steps, training_precision
from vaelab.models.language_model import IGNORED, TEMPLATES, LanguageModel, Segment, Turn
from vaelab.training.batches import Batches, NumberedBatches
from vaelab.training.loop import TrainConfig, Trained, train
from vaelab.training.planning import TrainingPlan, plan_training
from vaelab.world.questions import NUMBERS, describe, instructions
from vaelab.world.scenes import sample

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

LESSONS = {"one question": (32, 1), "several questions": (8, 8)}
"""The lessons: conversations of a step, and questions of a conversation."""
SCHEDULES = (900, 200)
"""Each lesson's learning rate falls over at least so many steps: a shorter training is the beginning of a longer one.
"""
WIDTH, LAYERS, HEADS = 128, 4, 4
"""Channels, layers and attention heads."""
LONGEST = 256
"""The number of positions."""
SPECIAL_TOKENS = ("<pad>", "<unk>", "<s>", "</s>")
VOCABULARY_SCENES = 400
"""Number of scenes whose descriptions and questions give the vocabulary."""
DESCRIBE_WEIGHT = 3
"""How often a description is asked for, compared with any other kind of question."""


class TrainedLanguageModel(NamedTuple):
    """Result of :func:`train_language_model`."""

    model: LanguageModel
    lessons: dict[str, Trained]
    """The results of the lessons, by name."""


class QuestionsObjective(nn.Module):
    """The cross-entropy of the answers to questions about described scenes.

    Args:
        model: a causal language model of transformers.
    """

    def __init__(self, model: "LlamaForCausalLM"):
        super().__init__()
        self.model = model

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Compute the ``loss`` of a batch with ``input_ids``, ``attention_mask`` and ``labels``, each (B, L)."""
        return {"loss": self.model(**batch).loss}


def new_tokenizer() -> "PreTrainedTokenizerFast":
    """Make a tokenizer with one token for every word of the world's descriptions, questions and answers, in lower
    case, and LLaVA's chat template."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    texts = ["user: assistant:", *NUMBERS]
    for seed in range(VOCABULARY_SCENES):
        texts.append(describe(sample(seed)))
        texts += [f"{one.question} {one.answer}" for one in instructions(sample(seed), seed)]
    words = sorted({word for text in texts for word in re.findall(r"\w+|[^\w\s]+", text)})
    vocabulary = {word: number for number, word in enumerate([*SPECIAL_TOKENS, *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    padding, unknown, begin, end = SPECIAL_TOKENS
    made = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=padding, unk_token=unknown, bos_token=begin, eos_token=end,
        model_max_length=LONGEST,
    )  # fmt: skip
    made.chat_template = TEMPLATES["llava"]
    return made


def new_language_model(tokenizer: "PreTrainedTokenizerFast", seed: int = 0) -> "LlamaForCausalLM":
    """Make an untrained language model of the default size."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=WIDTH, intermediate_size=3 * WIDTH, num_hidden_layers=LAYERS,
        num_attention_heads=HEADS, num_key_value_heads=HEADS, max_position_embeddings=LONGEST,
        pad_token_id=tokenizer.pad_token_id, bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
        tie_word_embeddings=True,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForCausalLM(config)


def text_batches(batch_size: int, model: LanguageModel, questions: int = 1) -> Batches:
    """Make endless batches of conversations about training scenes, each with the scene's description in the picture's
    place, for :meth:`QuestionsObjective.forward`. The loss counts the answers alone.

    Kinds of questions are drawn without replacement, ``describe`` with :data:`DESCRIBE_WEIGHT` times the weight of the
    others: its answer repeats the description, and a model that has learned to copy soon learns to look up.

    Args:
        batch_size: conversations of a batch.
        model: the language model, whose tokenizer and chat template are used.
        questions: the number of questions of a conversation, or fewer where a scene does not allow as many.
    """
    at_least("batch_size", batch_size, 1)

    def make(number: int) -> dict[str, Tensor]:
        rng = np.random.default_rng([1, number])
        rows = []
        for i in range(batch_size):
            seed = number * batch_size + i
            scene = sample(seed)
            asked = instructions(scene, seed)
            weights = np.array([DESCRIBE_WEIGHT if one.kind == "describe" else 1 for one in asked])
            chosen = rng.choice(len(asked), min(questions, len(asked)), replace=False, p=weights / weights.sum())
            turns = [Turn(asked[place].question, asked[place].answer) for place in chosen]
            rows.append(_with_description(model, describe(scene), turns))
        return _padded(rows, model.padding)

    return NumberedBatches(make)


def train_language_model(
    folder: str | Path, *, steps: Sequence[int], device: str = "auto", seed: int = 0
) -> TrainedLanguageModel:
    """Train the small language model; an interrupted training is resumed from the folder's checkpoints.

    Args:
        folder: the folder for the checkpoints.
        steps: the number of steps of each lesson.
        device: the device to train on.
        seed: determines the initial weights.

    Raises:
        ValueError: ``steps`` does not have one number, at least 1, per lesson.
    """
    require_language_steps(steps)
    model, lessons = _new(seed), {}
    for (name, (batch_size, questions)), count in zip(LESSONS.items(), steps, strict=True):
        config = replace(
            _training(count, device, seed, 1e-3 if lessons else 2e-3), horizon=max(count, SCHEDULES[len(lessons)])
        )
        lessons[name] = train(
            QuestionsObjective(model.model), text_batches(batch_size, model, questions), config,
            folder=Path(folder, name), title=f"language model, {name}",
            settings={"batch_size": batch_size, "questions": questions, "width": WIDTH, "layers": LAYERS},
        )  # fmt: skip
    return TrainedLanguageModel(model, lessons)


def plan_language_model(*, steps: Sequence[int], device: str = "auto", seed: int = 0) -> TrainingPlan:
    """Estimate what :func:`train_language_model` takes; the arguments and the errors are its own."""
    require_language_steps(steps)
    model = _new(seed)
    batch_size, questions = LESSONS["several questions"]
    return plan_training(
        QuestionsObjective(model.model), text_batches(batch_size, model, questions),
        _training(sum(steps), device, seed, 1e-3), "language model", checkpoints=len(LESSONS),
    )  # fmt: skip


def require_language_steps(steps: Sequence[int]) -> None:
    """Raise ValueError unless there is one number of steps, at least 1, for each of the ``LESSONS``."""
    require_lesson_steps(steps, LESSONS, "language_steps")


@torch.no_grad()
def answers_from_descriptions(model: LanguageModel, descriptions: Sequence[str], questions: Sequence[str]) -> list[str]:
    """Answer one question about each described scene, by greedy decoding: what the model can do without a picture."""
    embed = model.model.get_input_embeddings()
    answers = []
    for description, question in zip(descriptions, questions, strict=True):
        ids = model.tokenizer(description, add_special_tokens=False, return_tensors="pt").input_ids
        answers += model.answer([question], embed(ids.to(model.model.device)))
    return answers


def _new(seed: int) -> LanguageModel:
    tokenizer = new_tokenizer()
    return LanguageModel(new_language_model(tokenizer, seed), tokenizer, "embedded")


def _with_description(model: LanguageModel, description: str, turns: Sequence[Turn]) -> list[Segment]:
    """Write a conversation with a description in the picture's place."""
    ids = tuple(model.tokenizer(description, add_special_tokens=False).input_ids)
    return [Segment(ids, "prompt") if one.kind == "picture" else one for one in model.segments(turns)]


def _padded(rows: Sequence[Sequence[Segment]], padding: int) -> dict[str, Tensor]:
    ids = [[token for segment in row for token in segment.tokens] for row in rows]
    labels = [
        [token if segment.kind == "answer" else IGNORED for segment in row for token in segment.tokens] for row in rows
    ]
    longest = max(map(len, ids))
    return {
        "input_ids": torch.tensor([row + [padding] * (longest - len(row)) for row in ids]),
        "attention_mask": torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in ids]),
        "labels": torch.tensor([row + [IGNORED] * (longest - len(row)) for row in labels]),
    }


def _training(steps: int, device: str, seed: int, learning_rate: float) -> TrainConfig:
    return TrainConfig(
        steps=steps, learning_rate=learning_rate, weight_decay=0.01, warmup=min(50, steps // 2), schedule="cosine",
        precision=training_precision(device), device=device, seed=seed, log_every=20, checkpoint_every=50,
    )  # fmt: skip
