"""The one training loop, on accelerate, for everything the lab trains.

A step's randomness depends on the seed and the step's number alone, and a checkpoint is one file
that is written whole or not at all: a run that was killed and started again ends in the same
weights, bit for bit on a CPU, as one that was left alone.
"""

import json
import math
import sys
import time
from collections.abc import Iterable
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from vaelab.core import devices
from vaelab.core.validate import at_least, one_of
from vaelab.training import checkpoint as training_checkpoint
from vaelab.training.batches import Batches
from vaelab.training.checkpoint import Progress

# configs: How something is trained, and configurations made of a notebook's parameters.


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


class Watcher:
    """What looks at a training run from outside, or reaches into it. Steps count from 1.

    Its ``state`` must be plain JSON: it travels in the checkpoints.
    """

    def around(self, step: int) -> AbstractContextManager:
        """A context for the forward and backward pass of a step."""
        return nullcontext()

    def after(self, step: int, optimizer: torch.optim.Optimizer) -> None:
        """Called when the step has been taken, before the next one."""

    def logged(self, history: list[dict[str, float]]) -> None:
        """Called when a row has been added to the history."""

    def state(self) -> dict[str, Any]:
        """What a checkpoint must hold for this watcher to go on from it."""
        return {}

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from what ``state`` gave."""


class Trained(NamedTuple):
    """What :func:`train` gives back; the weights are in the module it was given."""

    history: list[dict[str, float]]
    """A row for every ``log_every`` steps: ``step``, ``learning_rate`` and the mean losses."""
    seconds: float
    """Time spent in this process."""
    resumed_at: int
    """The step of the checkpoint that was gone on from, 0 for none."""


def train(
    objective: nn.Module,
    batches: Batches,
    config: TrainConfig,
    *,
    folder: str | Path | None = None,
    watchers: Iterable[Watcher] = (),
    settings: dict[str, Any] | None = None,
    title: str = "training",
) -> Trained:
    """Train ``objective`` and leave it on the training device, in evaluation mode.

    Args:
        objective: a module whose call on a batch returns a dict of scalar tensors with the key
            ``loss``; what of it requires gradients is trained.
        batches: called with ``start`` (batches to skip), ``rank`` and ``world`` (of a
            distributed run), gives the batches from there on: dicts of tensors, tensors or tuples.
        config: how to train.
        folder: where checkpoints go, as ``checkpoint.safetensors``, and are gone on from. None
            keeps none.
        watchers: see :class:`Watcher`.
        settings: what else, as plain JSON, a checkpoint must agree on to be gone on from.
        title: the progress bar's.

    Raises:
        ValueError: the folder's checkpoint was made with other settings.
        FloatingPointError: a loss that is not finite, with its step.
    """
    watchers = list(watchers)
    accelerator = _accelerator(config, folder)
    optimizer = _optimizer(objective, config, accelerator.device)
    module, optimizer = accelerator.prepare(objective, optimizer)
    signature = _signature(config, settings)
    checkpoint = Path(folder, "checkpoint.safetensors") if folder else None
    if checkpoint and accelerator.is_main_process:
        for left_by_a_kill in checkpoint.parent.glob(".*.draft"):
            left_by_a_kill.unlink()
    progress = Progress()
    if checkpoint and checkpoint.exists():
        progress = training_checkpoint.restore(checkpoint, objective, optimizer, signature)
        for watcher, state in zip(watchers, progress.watchers, strict=True):
            watcher.restore(state)
        if progress.scaler and accelerator.scaler:
            accelerator.scaler.load_state_dict(progress.scaler)
    start, history, sums = progress.step, progress.history, progress.sums
    if config.trackers:
        accelerator.init_trackers(
            "vaelab", config={**asdict(config), "undecayed": None, "betas": None, "trackers": None}
        )
    stream = batches(start=start * config.accumulation, rank=accelerator.process_index, world=accelerator.num_processes)
    began = time.perf_counter()
    bar = tqdm(
        total=config.steps, initial=start, desc=title, file=sys.stdout, mininterval=2, ncols=100,
        disable=not accelerator.is_main_process,
    )  # fmt: skip
    objective.train()
    for step in range(start + 1, config.steps + 1):
        for group in optimizer.param_groups:
            group["lr"] = config.rate(step)
        torch.manual_seed(_step_seed(config.seed, step, accelerator.process_index))
        with ExitStack() as around:
            for watcher in watchers:
                around.enter_context(watcher.around(step))
            for _ in range(config.accumulation):
                losses = _micro_step(accelerator, module, optimizer, _to(next(stream), accelerator.device), config)
                for name, value in losses.items():
                    sums[name] = sums.get(name, 0) + value.detach().float() / config.accumulation
        for watcher in watchers:
            watcher.after(step, getattr(optimizer, "optimizer", optimizer))
        if step % config.log_every == 0 or step == config.steps:
            row = _row(step, config, sums)
            sums = {}
            history.append(row)
            for watcher in watchers:
                watcher.logged(history)
            bar.set_postfix({"loss": f"{row['loss']:.4g}"}, refresh=False)
            if config.trackers:
                accelerator.log({key: value for key, value in row.items() if key != "step"}, step=step)
        bar.update()
        due = step == config.steps or (config.checkpoint_every and step % config.checkpoint_every == 0)
        if checkpoint and due and accelerator.is_main_process:
            scaler = accelerator.scaler.state_dict() if accelerator.scaler else None
            progress = Progress(step, history, sums, [watcher.state() for watcher in watchers], scaler)
            training_checkpoint.save(checkpoint, objective, optimizer, progress, signature)
    bar.close()
    if config.trackers:
        accelerator.end_training()
    accelerator.wait_for_everyone()
    accelerator.unwrap_model(module, keep_fp32_wrapper=False)  # which is what ends its autocast
    objective.eval()
    return Trained(history, time.perf_counter() - began, start)


def _micro_step(accelerator: Any, module: nn.Module, optimizer: Any, batch: Any, config: TrainConfig) -> dict:
    with accelerator.accumulate(module):
        losses = module(batch)
        accelerator.backward(losses["loss"])
        if accelerator.sync_gradients and config.clip_norm:
            accelerator.clip_grad_norm_(module.parameters(), config.clip_norm)
        optimizer.step()
        optimizer.zero_grad()
    return losses


def _row(step: int, config: TrainConfig, sums: dict[str, Tensor]) -> dict[str, float]:
    count = (step - 1) % config.log_every + 1
    values = (torch.stack(list(sums.values())) / count).tolist()
    row = {"step": step, "learning_rate": config.rate(step), **dict(zip(sums, values, strict=True))}
    bad = [name for name, value in row.items() if not math.isfinite(value)]
    if bad:
        raise FloatingPointError(
            f"{', '.join(bad)} not finite in the steps up to {step}; try a lower learning_rate, or precision "
            f"float32 or bfloat16 (it is {config.precision})"
        )
    return row


def _step_seed(seed: int, step: int, rank: int) -> int:
    return int(np.random.SeedSequence([seed, step, rank]).generate_state(1, np.uint64)[0] >> 1)


def _to(batch: Any, device: torch.device) -> Any:
    if isinstance(batch, Tensor):
        return batch.to(device, non_blocking=True)
    if isinstance(batch, dict):
        return {key: _to(value, device) for key, value in batch.items()}
    return type(batch)(_to(value, device) for value in batch)


def _accelerator(config: TrainConfig, folder: str | Path | None) -> Any:
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState, PartialState

    device = devices.pick(config.device)
    if device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)
    if not PartialState._shared_state or PartialState().num_processes == 1:
        # accelerate keeps the first run's device and precision for the process's whole life
        AcceleratorState._reset_state(reset_partial_state=True)
    accelerator = Accelerator(
        cpu=device.type == "cpu",
        mixed_precision=MIXED[config.precision],
        gradient_accumulation_steps=config.accumulation,
        log_with=list(config.trackers) or None,
        project_dir=str(folder) if folder else None,
    )
    if len(accelerator.log_with) < len(config.trackers):
        raise ValueError(
            f"trackers: {', '.join(config.trackers)} asked for, not all installed (pip install vaelab[trackers])"
        )
    if accelerator.device.type != device.type:
        raise ValueError(f"device: accelerate chose {accelerator.device}, not {device}")
    return accelerator


def _optimizer(objective: nn.Module, config: TrainConfig, device: torch.device) -> torch.optim.Optimizer:
    trained = {name: p for name, p in objective.named_parameters() if p.requires_grad}
    strange = set(config.undecayed) - set(trained)
    if strange:
        raise ValueError(f"undecayed: no trained parameter is called {sorted(strange)[0]!r}")
    groups = [
        {"params": [p for name, p in trained.items() if name not in config.undecayed]},
        {"params": [p for name, p in trained.items() if name in config.undecayed], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=config.learning_rate,
        betas=config.betas,
        weight_decay=config.weight_decay,
        fused=device.type in ("cpu", "cuda"),
    )


def _signature(config: TrainConfig, settings: dict[str, Any] | None) -> dict[str, Any]:
    signed = {key: value for key, value in asdict(config).items() if key not in NOT_SIGNED}
    return json.loads(json.dumps({**signed, **(settings or {})}))
