"""The training loop, built on accelerate, for everything that the lab trains.

The randomness of a step depends only on the seed, the step's index and the process, and a checkpoint is replaced as a
whole. A run that was interrupted and resumed therefore ends with the same weights (bit for bit on a CPU) as one that
was not interrupted.
"""

import json
import math
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import asdict, dataclass
from numbers import Integral
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from vaelab.core import devices
from vaelab.core.validate import at_least, one_of, unknown
from vaelab.training import checkpoint
from vaelab.training.batches import Batches
from vaelab.training.checkpoint import CHECKPOINT, LOG, Progress, Rows, TrainingLog

TRACKERS = ("tensorboard", "wandb")
SCHEDULES = ("constant", "linear", "cosine")
MIXED_PRECISION = {"float32": "no", "bfloat16": "bf16", "float16": "fp16"}
"""accelerate's names for the precisions."""
EXECUTION_ONLY = ("device", "checkpoint_every", "trackers")
"""Fields of :class:`TrainConfig` that do not affect the result: a run may be resumed with other values."""


@dataclass(frozen=True)
class TrainConfig:
    """How something is trained. The optimizer is AdamW (Loshchilov and Hutter, 2019)."""

    steps: int
    """Optimizer steps, at least 1."""
    learning_rate: float = 1e-4
    """Peak learning rate, above 0."""
    weight_decay: float = 0.0
    """Decoupled weight decay: each step subtracts learning_rate * weight_decay * weight."""
    undecayed: tuple[str, ...] = ()
    """Names of the parameters without weight decay."""
    betas: tuple[float, float] = (0.9, 0.999)
    """AdamW's decay rates of its two moments, each in [0, 1)."""
    warmup: int = 0
    """Steps over which the learning rate rises linearly from 0."""
    schedule: str = "constant"
    """The learning rate after the warm-up: ``constant``, ``linear`` or ``cosine``. The latter two reach ``final_rate``
    one step after the schedule's last step."""
    horizon: int = 0
    """The schedule's last step, if it is later than ``steps``; 0 means ``steps``."""
    final_rate: float | None = None
    """The learning rate at the end of the schedule; None means 0."""
    accumulation: int = 1
    """Batches per step, at least 1."""
    clip_norm: float = 1.0
    """Largest norm of the gradient; 0 does not clip."""
    precision: str = "float32"
    """Precision of the forward pass (autocast); the weights keep their precision. float16 needs a GPU."""
    tf32: bool = True
    """Whether float32 products on a CUDA GPU are computed in TensorFloat-32: several times as fast, with factors
    rounded to 10 bits. Without a CUDA GPU it has no effect."""
    device: str = "auto"
    """The device to train on: ``auto``, ``cpu``, ``cuda`` or ``mps``."""
    seed: int = 0
    """Determines everything random inside a step."""
    log_every: int = 10
    """Steps per row of the history, whose values are means over these steps."""
    checkpoint_every: int = 0
    """Steps between checkpoints; 0 writes one at the end only."""
    trackers: tuple[str, ...] = ()
    """Trackers of accelerate to log to: ``tensorboard``, ``wandb``."""

    def __post_init__(self) -> None:
        least = {"steps": 1, "accumulation": 1, "log_every": 1, "warmup": 0, "checkpoint_every": 0, "seed": 0}
        for name, minimum in least.items():
            _whole(name, getattr(self, name), minimum)
        _whole("horizon", self.horizon, self.steps if self.horizon else 0)
        for name in ("weight_decay", "clip_norm", "learning_rate"):
            _finite(name, getattr(self, name))
            at_least(name, getattr(self, name), 0, exclusive=name == "learning_rate")
        if self.final_rate is not None:
            _finite("final_rate", self.final_rate)
            if not 0 <= self.final_rate <= self.learning_rate:
                raise ValueError(f"final_rate: must lie between 0 and learning_rate, got {self.final_rate!r}")
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas: expected two numbers from 0 to below 1, got {self.betas!r}")
        for name in ("undecayed", "trackers"):
            if isinstance(getattr(self, name), str):
                raise ValueError(f"{name}: expected a list of names, got {getattr(self, name)!r}")
        one_of("schedule", self.schedule, SCHEDULES)
        for tracker in self.trackers:
            one_of("trackers", tracker, TRACKERS)
        one_of("precision", self.precision, MIXED_PRECISION)

    def rate(self, step: int) -> float:
        """Compute the learning rate of optimizer step ``step``, which counts from 1."""
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
    """A callback that observes a training run or changes it. Steps count from 1."""

    def around(self, step: int) -> AbstractContextManager:
        """Return a context manager that is active during the forward and backward pass of a step."""
        return nullcontext()

    def after(self, step: int, optimizer: torch.optim.Optimizer) -> None:
        """Called after the optimizer step ``step`` and before the next step."""

    def logged(self, history: Rows) -> None:
        """Called after a row was added to the history."""

    def logs(self) -> dict[str, Rows]:
        """Return the lists of rows that this watcher appends to, by name; rows are plain JSON.

        They are written to the log file, which may grow without limit. When a run is resumed, they are restored to
        their state at the checkpoint. A row must not be changed after it was added.
        """
        return {}

    def state(self) -> dict[str, Any]:
        """Return what else a checkpoint must hold to resume this watcher, as plain JSON."""
        return {}

    def restore(self, state: dict[str, Any]) -> None:
        """Resume from what :meth:`state` returned; the lists of :meth:`logs` have already been restored."""


class Trained(NamedTuple):
    """What :func:`train` returns; the trained weights are in the module that was given to it."""

    history: Rows
    """One row per ``log_every`` steps: ``step``, ``learning_rate`` and the losses, each the mean over these steps."""
    seconds: float
    """Seconds of training in this process, without the time before a resumption."""
    resumed_at: int
    """The step of the checkpoint that the run was resumed from; 0 if it was not resumed."""


def train(
    objective: nn.Module,
    batches: Batches,
    config: TrainConfig,
    *,
    folder: str | Path | None = None,
    watchers: Iterable[Watcher] = (),
    settings: dict[str, Any] | None = None,
    title: str = "training",
    progress: bool = True,
) -> Trained:
    """Train ``objective`` and leave it on the training device, in evaluation mode.

    Args:
        objective: a module that returns a dict of scalar tensors with the key ``loss`` when it is called on a batch;
            its parameters that require gradients are trained.
        batches: a source of batches (see :mod:`vaelab.training.batches`). Called with ``start`` (the number of batches
            to skip), ``rank`` and ``world`` (the index of this process and the number of processes), it iterates over
            batches: tensors, or dicts or tuples of tensors.
        config: how to train.
        folder: where the checkpoint and the log are written; training resumes from them if they exist. None writes
            neither.
        watchers: callbacks, see :class:`Watcher`.
        settings: what else determines the result, as plain JSON: a checkpoint with other settings is not resumed.
        title: the title of the progress bar.
        progress: whether to show the progress bar.

    Raises:
        ValueError: the folder's checkpoint is damaged or was made with other settings, or ``config`` does not fit the
            model or this machine.
        FloatingPointError: a loss is not finite (the error gives the step), or a weight is not finite when a
            checkpoint is written.
    """
    watchers = list(watchers)
    accelerator = _accelerator(config, folder)
    optimizer = _optimizer(objective, config, accelerator.device)
    module, optimizer = accelerator.prepare(objective, optimizer)
    history: Rows = []
    saved = _Saved(folder, objective, optimizer, accelerator, watchers, history, _signature(config, settings))
    reached = saved.resume()
    start, sums = reached.step, reached.sums
    if config.trackers:
        accelerator.init_trackers(
            "vaelab", config={**asdict(config), "undecayed": None, "betas": None, "trackers": None}
        )
    stream = iter(
        batches(start=start * config.accumulation, rank=accelerator.process_index, world=accelerator.num_processes)
    )
    began = time.perf_counter()
    bar = tqdm(
        total=config.steps, initial=start, desc=title, file=sys.stdout, mininterval=2, ncols=100,
        disable=not (progress and accelerator.is_main_process),
    )  # fmt: skip
    objective.train()
    for step in range(start + 1, config.steps + 1):
        for group in optimizer.param_groups:
            group["lr"] = config.rate(step)
        torch.manual_seed(_step_seed(config.seed, step, accelerator.process_index))
        with ExitStack() as around:
            around.enter_context(_float32_products(config.tf32, accelerator.device))
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
        if step == config.steps or (config.checkpoint_every and step % config.checkpoint_every == 0):
            saved.write(step, sums)
    bar.close()
    if config.trackers:
        accelerator.end_training()
    accelerator.wait_for_everyone()
    accelerator.unwrap_model(module, keep_fp32_wrapper=False)  # this ends the module's autocast
    objective.eval()
    return Trained(history, time.perf_counter() - began, start)


class _Saved:
    """The checkpoint and the log of one training run; does nothing if the run has no folder."""

    def __init__(
        self,
        folder: str | Path | None,
        objective: nn.Module,
        optimizer: torch.optim.Optimizer,
        accelerator: Any,
        watchers: list[Watcher],
        history: Rows,
        signature: dict[str, Any],
    ):
        self._folder = Path(folder) if folder else None
        self._objective, self._optimizer, self._accelerator = objective, optimizer, accelerator
        self._watchers, self._signature = watchers, signature
        logs = {"history": history}
        for number, watcher in enumerate(watchers):
            logs |= {f"{type(watcher).__name__} {number}: {name}": rows for name, rows in watcher.logs().items()}
        self._log = TrainingLog(Path(folder, LOG), logs) if folder else None

    def resume(self) -> Progress:
        """Read the checkpoint, if there is one, into the objective, the optimizer and the watchers."""
        if not self._folder:
            return Progress()
        path = self._folder / CHECKPOINT
        if not path.exists():
            return Progress()
        progress, documents = checkpoint.restore(path, self._objective, self._optimizer, self._signature)
        if len(progress.watchers) != len(self._watchers):
            raise ValueError(f"{path} has {len(progress.watchers)} watchers; this run has {len(self._watchers)}")
        self._log.restore(documents["log"])
        for watcher, state in zip(self._watchers, progress.watchers, strict=True):
            watcher.restore(state)
        if progress.scaler and self._accelerator.scaler:
            self._accelerator.scaler.load_state_dict(progress.scaler)
        return progress

    def write(self, step: int, sums: dict[str, Tensor]) -> None:
        """Append to the log, then replace the checkpoint; on the main process only."""
        if not self._folder or not self._accelerator.is_main_process:
            return
        scaler = self._accelerator.scaler.state_dict() if self._accelerator.scaler else None
        progress = Progress(step, sums, [watcher.state() for watcher in self._watchers], scaler)
        documents = {"signature": self._signature, "log": self._log.append()}
        checkpoint.save(self._folder / CHECKPOINT, self._objective, self._optimizer, documents, progress)


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
        if device.type == "cuda" and batch.device.type == "cpu":
            batch = batch.pin_memory()  # from other memory the copy would wait for the GPU
        return batch.to(device, non_blocking=True)
    if isinstance(batch, dict):
        return {key: _to(value, device) for key, value in batch.items()}
    return type(batch)(_to(value, device) for value in batch)


@contextmanager
def _float32_products(tf32: bool, device: torch.device) -> Iterator[None]:
    """Switch TensorFloat-32 for products on or off, on CUDA only: elsewhere ``high`` does not mean TensorFloat-32."""
    before = torch.get_float32_matmul_precision()
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high" if tf32 else "highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def _accelerator(config: TrainConfig, folder: str | Path | None) -> Any:
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState, PartialState

    device = devices.pick(config.device)
    if device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)
    if not PartialState._shared_state or PartialState().num_processes == 1:
        # otherwise accelerate would keep the first run's device and precision for the rest of the process
        AcceleratorState._reset_state(reset_partial_state=True)
    accelerator = Accelerator(
        cpu=device.type == "cpu",
        mixed_precision=MIXED_PRECISION[config.precision],
        gradient_accumulation_steps=config.accumulation,
        log_with=list(config.trackers) or None,
        project_dir=str(folder) if folder else None,
    )
    if config.precision == "float16" and not accelerator.scaler:  # accelerate would silently train in float32
        raise ValueError(f"precision: float16 trains on a GPU only, not on {device}; use bfloat16 or float32")
    if len(accelerator.log_with) < len(config.trackers):
        raise ValueError(
            f"trackers: not all of {', '.join(config.trackers)} are installed (pip install vaelab[trackers])"
        )
    if accelerator.device.type != device.type:
        raise ValueError(f"device: accelerate chose {accelerator.device}, not {device}")
    return accelerator


def _optimizer(objective: nn.Module, config: TrainConfig, device: torch.device) -> torch.optim.Optimizer:
    trained = {name: p for name, p in objective.named_parameters() if p.requires_grad}
    strange = set(config.undecayed) - set(trained)
    if strange:
        raise unknown("undecayed", sorted(strange)[0], trained)
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
    signed = {key: value for key, value in asdict(config).items() if key not in EXECUTION_ONLY}
    return json.loads(json.dumps({**signed, **(settings or {})}))


def _whole(name: str, value: Any, minimum: int) -> None:
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise ValueError(f"{name}: must be a whole number, got {value!r}")
    at_least(name, value, minimum)


def _finite(name: str, value: Any) -> None:
    if isinstance(value, bool | str) or not math.isfinite(value):
        raise ValueError(f"{name}: must be a finite number, got {value!r}")
