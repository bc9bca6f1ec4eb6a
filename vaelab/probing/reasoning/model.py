"""A language model that reads one or several streams of picture tokens, and its training in two stages.

Kim et al. ("Revelio"), appendix C: the features of a denoiser's layer are reduced by a block of two convolutions to as
many tokens as the image encoder has; each part of a stream has its own projector of two layers; the projected tokens
are interleaved and stand before the question. Stage 1 trains the projectors (and convolutions) on captions, stage 2 the
language model too, on instructions (Table 12).
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vaelab.core.validate import at_least, one_of
from vaelab.models.language_model import LanguageModel, Turn
from vaelab.probing.reasoning.features import FeatureTable, Statistics, stream_parts
from vaelab.training.batches import Batches, shuffled_batches
from vaelab.training.evaluation import evaluation_mode
from vaelab.training.loop import TrainConfig, Trained, train

TUNINGS = ("full", "lora", "frozen")
LORA_RANK, LORA_SCALE = 128, 256
"""Rank and alpha of LoRA, those of LLaVA's recipe; the rank is at most the language model's width."""


class Conversation(NamedTuple):
    """Questions about one picture with their answers."""

    picture: int
    """The picture's index."""
    turns: tuple[Turn, ...]


@dataclass(frozen=True)
class StageConfig:
    """How one stage is trained; the defaults are those of stage 1 in Table 12."""

    epochs: float = 1.0
    """Passes over the conversations; above 0."""
    batch_size: int = 128
    """Conversations of a step."""
    accumulation: int = 1
    """Forward and backward passes that share a step."""
    learning_rate: float = 2e-3
    """Peak learning rate; it falls to 0 on a cosine."""
    warmup_ratio: float = 0.03
    """Share of the steps over which the learning rate rises."""
    precision: str = "float32"
    """Precision of the forward pass."""
    device: str = "auto"
    """The device to train on."""
    seed: int = 0
    """Determines the order of the conversations."""
    checkpoint_every: int = 0
    """Steps between checkpoints."""

    def __post_init__(self) -> None:
        at_least("epochs", self.epochs, 0, exclusive=True)
        for name in ("batch_size", "accumulation"):
            at_least(name, getattr(self, name), 1)
        if self.batch_size % self.accumulation:
            raise ValueError(f"accumulation: {self.accumulation} does not divide batch_size {self.batch_size}")
        if not 0 <= self.warmup_ratio < 1:
            raise ValueError(f"warmup_ratio: expected a share below 1, got {self.warmup_ratio!r}")

    def training(self, conversations: int) -> TrainConfig:
        """Turn into the training loop's configuration for this number of conversations."""
        steps = max(1, math.ceil(self.epochs * conversations / self.batch_size))
        return TrainConfig(
            steps=steps, learning_rate=self.learning_rate, warmup=math.ceil(self.warmup_ratio * steps),
            schedule="cosine", accumulation=self.accumulation, precision=self.precision, device=self.device,
            seed=self.seed, checkpoint_every=self.checkpoint_every, log_every=max(1, min(10, steps // 4)),
        )  # fmt: skip


class PseudoTokens(nn.Module):
    """The block of two convolutions that reduces a map to a square grid of tokens (appendix C).

    Each convolution halves the sides as long as they stay at least as large as the grid; what then differs is averaged
    or interpolated.

    Args:
        shape: (h, w, d) of the maps.
        tokens: T, a square number.
        width: channels of the tokens.

    Raises:
        ValueError: T is no square number.
    """

    def __init__(self, shape: tuple[int, int, int], tokens: int, width: int):
        super().__init__()
        self.side = math.isqrt(tokens)
        if self.side**2 != tokens:
            raise ValueError(
                f"image_encoder: it gives {tokens} tokens of a picture, no square number; maps cannot be reduced to it"
            )
        smallest, strides = min(shape[:2]), []
        for _ in range(2):
            strides.append(2 if smallest >= 2 * self.side else 1)
            smallest //= strides[-1]
        self.first = nn.Conv2d(shape[2], width, 3, strides[0], padding=1)
        self.second = nn.Conv2d(width, width, 3, strides[1], padding=1)

    def forward(self, maps: Tensor) -> Tensor:
        """Reduce maps (B, h, w, d) to tokens (B, T, width), row by row."""
        x = self.second(F.gelu(self.first(maps.permute(0, 3, 1, 2))))
        if min(x.shape[-2:]) >= self.side:
            x = F.adaptive_avg_pool2d(x, self.side)
        else:
            x = F.interpolate(x, (self.side, self.side), mode="bilinear", align_corners=False)
        return x.flatten(2).transpose(1, 2)


class Adapter(nn.Module):
    """From one part's features to vectors of the language model's width: pseudo-tokens if they are maps, then a
    projector of two layers (LLaVA 1.5).

    Args:
        shape: (T, d) of tokens, or (h, w, d) of maps.
        tokens: the number of tokens that the image encoder has.
        width: the image encoder's width, which pseudo-tokens have too.
        output: the language model's width.
        statistics: what the features are standardized by, each channel by itself; None leaves them as they are.
    """

    def __init__(
        self, shape: tuple[int, ...], tokens: int, width: int, output: int, statistics: Statistics | None = None
    ):
        super().__init__()
        self.register_buffer("mean", statistics.mean.clone() if statistics else torch.zeros(shape[-1]))
        self.register_buffer("deviation", statistics.deviation.clone() if statistics else torch.ones(shape[-1]))
        maps = len(shape) == 3
        self.reduce = PseudoTokens(shape, tokens, width) if maps else nn.Identity()
        self.project = nn.Sequential(
            nn.Linear(width if maps else shape[-1], output), nn.GELU(), nn.Linear(output, output)
        )

    def forward(self, features: Tensor) -> Tensor:
        """Project features (B, ..., d) to (B, T, output)."""
        return self.project(self.reduce((features - self.mean) / self.deviation))


class VisualReasoner(nn.Module):
    """A stream's adapters and a language model.

    Args:
        stream: the stream's name.
        shapes: the shape of each part's features without the batch, by part; ``clip`` must be among them.
        language: the language model.
        statistics: of each part; None leaves the features as they are.
        seed: determines the adapters' initial weights.
    """

    def __init__(
        self, stream: str, shapes: Mapping[str, tuple[int, ...]], language: LanguageModel, *,
        statistics: Mapping[str, Statistics] | None = None, seed: int = 0,
    ):  # fmt: skip
        super().__init__()
        self.parts, self.language = stream_parts(stream), language
        tokens, width = shapes["clip"]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.adapters = nn.ModuleList(
                Adapter(shapes[part], tokens, width, language.width, statistics[part] if statistics else None)
                for part in self.parts
            )
        self.adapters.to(language.model.device)

    def see(self, features: Mapping[str, Tensor]) -> Tensor:
        """Interleave the parts' tokens: (B, T * parts, width of the language model); the first tokens of all parts come
        first, in the stream's order, then all second tokens, and so on."""
        device = self.language.model.device
        if not self.parts:
            count = len(next(iter(features.values())))
            return torch.zeros(count, 0, self.language.width, device=device)
        seen = [adapt(features[part].to(device)) for part, adapt in zip(self.parts, self.adapters, strict=True)]
        return torch.stack(seen, 2).flatten(1, 2)

    @torch.no_grad()
    def answer(self, features: Mapping[str, Tensor], questions: Sequence[str], longest: int = 64) -> list[str]:
        """Answer one question about each picture, given the features of its parts."""
        with evaluation_mode(self, self.language.model):
            return self.language.answer(questions, self.see(features), longest)


class _Stage(nn.Module):
    """The loss of some conversations. The weights of what is not trained stay out of the checkpoints."""

    def __init__(
        self,
        reasoner: VisualReasoner,
        table: FeatureTable,
        conversations: Sequence[Conversation],
        trains_language: bool,
    ):
        super().__init__()
        self.adapters = reasoner.adapters
        self.model = reasoner.language.model if trains_language else None
        self._unregistered = (reasoner, table, conversations)

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        reasoner, table, conversations = self._unregistered
        chosen = [conversations[row] for row in batch["rows"].tolist()]
        features = table.take([one.picture for one in chosen])
        segments = [reasoner.language.segments(one.turns) for one in chosen]
        return {"loss": reasoner.language.loss(segments, reasoner.see(features))}


def train_stage(
    reasoner: VisualReasoner, table: FeatureTable, conversations: Sequence[Conversation], config: StageConfig, *,
    tuning: str = "frozen", folder: str | Path | None = None, settings: dict[str, Any] | None = None,
    title: str = "training",
) -> Trained:  # fmt: skip
    """Train a reasoner on conversations; an interrupted training is resumed from the folder's checkpoint.

    Args:
        reasoner: the adapters and the language model; both end in evaluation mode.
        table: the pictures' features.
        conversations: what is learned.
        config: how.
        tuning: ``frozen`` trains the adapters alone (stage 1), ``full`` the whole language model too, and ``lora``
            low-rank updates of its linear layers (Hu et al. 2021).
        folder: the folder for the checkpoint; None writes none.
        settings: what else decides the result.
        title: the title of the progress bar.

    Raises:
        ValueError: nothing can be trained: the stream has no picture and the language model is frozen.
    """
    stage = prepare_stage(reasoner, table, conversations, tuning, config.seed)
    trained = train(
        stage, stage_batches(conversations, config), config.training(len(conversations)), folder=folder, title=title,
        settings={
            **(settings or {}), "tuning": tuning, "conversations": len(conversations), "parts": list(reasoner.parts),
            "batch_size": config.batch_size,
        },
    )  # fmt: skip
    reasoner.language.model.eval()
    return trained


def prepare_stage(
    reasoner: VisualReasoner, table: FeatureTable, conversations: Sequence[Conversation], tuning: str, seed: int
) -> nn.Module:
    """Make what :func:`train_stage` trains, and let what is trained require gradients; arguments and errors are its
    own."""
    one_of("tuning", tuning, TUNINGS)
    at_least("conversations", len(conversations), 1)
    if not reasoner.parts and tuning == "frozen":
        raise ValueError("tuning: a stream without pictures has nothing to train beside a frozen language model")
    reasoner.language.model.requires_grad_(tuning == "full")
    if tuning == "lora":
        add_lora(reasoner.language.model, seed)
    reasoner.adapters.requires_grad_(True)
    return _Stage(reasoner, table, conversations, tuning != "frozen")


def add_lora(model: Any, seed: int) -> None:
    """Add low-rank updates to a model's linear layers except the last; they alone require gradients.

    Args:
        model: a language model of transformers, which is changed.
        seed: determines the updates' initial weights; the updates themselves begin at 0.
    """
    from peft import LoraConfig, inject_adapter_in_model

    rank = min(LORA_RANK, model.get_input_embeddings().embedding_dim)
    linear = [name for name, layer in model.named_modules() if isinstance(layer, nn.Linear)]
    output = model.get_output_embeddings()
    targets = [name for name in linear if model.get_submodule(name) is not output]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        inject_adapter_in_model(
            LoraConfig(r=rank, lora_alpha=LORA_SCALE * rank // LORA_RANK, target_modules=targets), model
        )


def stage_batches(conversations: Sequence[Conversation], config: StageConfig) -> Batches:
    """Make endless shuffled batches of the indices of conversations: ``rows`` (batch_size / accumulation,)."""

    def take(rows: np.ndarray, epoch: int) -> dict[str, Tensor]:
        return {"rows": torch.from_numpy(rows)}

    size = config.batch_size // config.accumulation
    return shuffled_batches(len(conversations), size, config.seed, take, remainder="join")


def answer_all(
    reasoner: VisualReasoner, table: FeatureTable, asked: Sequence[tuple[int, str]], *, batch_size: int = 32,
    longest: int = 64, report: Callable[[int], None] = lambda done: None,
) -> list[str]:  # fmt: skip
    """Answer questions about pictures, in batches of questions of similar length.

    Args:
        reasoner: the trained model.
        table: the pictures' features.
        asked: for each question the picture's index and the question.
        batch_size: questions that are answered together.
        longest: the number of tokens after which an answer is cut.
        report: called with the number of answers of each batch.
    """
    answers = [""] * len(asked)
    order = sorted(range(len(asked)), key=lambda i: (len(asked[i][1]), asked[i][1], i))
    for begin in range(0, len(order), batch_size):
        part = order[begin : begin + batch_size]
        features = table.take([asked[i][0] for i in part])
        for i, text in zip(part, reasoner.answer(features, [asked[i][1] for i in part], longest), strict=True):
            answers[i] = text
        report(len(part))
    return answers
