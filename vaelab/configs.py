"""How something is trained, and configurations made of a notebook's parameters."""

import math
from dataclasses import dataclass, fields
from typing import Any

from vaelab.checks import at_least, one_of

TRACKERS = ("tensorboard", "wandb")
SCHEDULES = ("constant", "linear", "cosine")
MIXED = {"float32": "no", "bfloat16": "bf16", "float16": "fp16"}
NOT_SIGNED = ("device", "checkpoint_every", "trackers")


@dataclass(frozen=True)
class TrainConfig:
    """How something is trained; AdamW throughout."""

    steps: int
    """Optimizer steps."""
    learning_rate: float = 1e-4
    """Peak step size of AdamW."""
    weight_decay: float = 0.0
    """Decoupled weight decay: a step takes learning_rate * weight_decay of a weight away."""
    undecayed: tuple[str, ...] = ()
    """Names of the parameters that weight decay leaves alone."""
    betas: tuple[float, float] = (0.9, 0.999)
    """AdamW's decay rates of its two moments."""
    warmup: int = 0
    """Steps over which the learning rate rises linearly from 0."""
    schedule: str = "constant"
    """After the warm-up: ``constant``, or ``linear`` or ``cosine``, which reach their end just after the last step."""
    horizon: int = 0
    """The step whose end that is; 0 for the last. A run that is to be gone on from ends before."""
    final_rate: float | None = None
    """The learning rate at that end; None for 0."""
    accumulation: int = 1
    """Batches to a step."""
    clip_norm: float = 1.0
    """Largest norm of the gradient; 0 does not clip."""
    precision: str = "float32"
    """Of the forward pass; the weights stay in float32."""
    device: str = "auto"
    """Where to train."""
    seed: int = 0
    """Fixes everything random inside a step."""
    log_every: int = 10
    """Steps to a row of the history, whose values are means over them."""
    checkpoint_every: int = 0
    """Steps between checkpoints; 0 writes one at the end only."""
    trackers: tuple[str, ...] = ()
    """accelerate's trackers to log to: ``tensorboard``, ``wandb``."""

    def __post_init__(self) -> None:
        for name in ("steps", "accumulation", "log_every"):
            at_least(name, getattr(self, name), 1)
        if self.horizon:
            at_least("horizon", self.horizon, self.steps)
        for name in ("weight_decay", "warmup", "clip_norm", "checkpoint_every"):
            at_least(name, getattr(self, name), 0)
        at_least("learning_rate", self.learning_rate, 0, exclusive=True)
        one_of("schedule", self.schedule, SCHEDULES)
        if not 0 <= (self.final_rate or 0) <= self.learning_rate:
            raise ValueError(f"final_rate: must lie between 0 and learning_rate, got {self.final_rate!r}")
        for tracker in self.trackers:
            one_of("trackers", tracker, TRACKERS)
        one_of("precision", self.precision, MIXED)

    def rate(self, step: int) -> float:
        """The learning rate of optimizer step ``step``, which counts from 1."""
        if step <= self.warmup:
            return self.learning_rate * step / self.warmup
        if self.schedule == "constant":
            return self.learning_rate
        end = self.horizon or self.steps
        left = (end - step + 1) / (end - self.warmup)
        final = self.final_rate or 0.0
        share = left if self.schedule == "linear" else (1 - math.cos(math.pi * left)) / 2
        return final + (self.learning_rate - final) * share


def configured(kind: type, params: dict[str, Any], **parts: type) -> Any:
    """A configuration made of a notebook's parameters: each field of the dataclass ``kind``, and of those that
    are its ``parts``, takes the parameter of its name and keeps its default where there is none."""

    def take(one: type) -> dict[str, Any]:
        given = {each.name: params[each.name] for each in fields(one) if each.name in params}
        return {name: tuple(value) if isinstance(value, list) else value for name, value in given.items()}

    return kind(**take(kind), **{name: part(**take(part)) for name, part in parts.items()})
