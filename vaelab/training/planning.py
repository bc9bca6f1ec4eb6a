"""Estimate the time, disk space and memory that training will take, before it is started."""

import time
from collections.abc import Iterable, Sequence
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from vaelab.core import devices
from vaelab.core.disk import free_bytes, readable, require_free, stored_bytes
from vaelab.training.batches import Batches
from vaelab.training.loop import TrainConfig, Watcher, train

MEASURED_STEPS = 2
"""Number of steps that are taken to measure the time of a step; the last one is timed."""
MEASURED_FROM = 10
"""A training of fewer steps is not measured: measuring would take as long as the training."""
CHECKPOINT_BYTES = 3 * 4
"""Bytes per parameter in a checkpoint: the weight and AdamW's two moments, in float32."""
WEIGHT_BYTES = 4
"""Bytes per parameter in a file of weights."""


class TrainingPlan(NamedTuple):
    """What a training takes, or several of the same kind; made by :func:`plan_training`."""

    title: str
    """The name of the training."""
    trainings: int
    """Number of trainings."""
    steps: int
    """Steps of all trainings."""
    parameters: int
    """Number of parameters that one training changes."""
    seconds: float | None
    """Time of all trainings in seconds; None if a training has too few steps to be measured."""
    checkpoint_bytes: int
    """Size of a checkpoint in bytes."""
    disk_bytes: int
    """Size of the checkpoints and weights on the disk at the end, in bytes."""


class _Clock(Watcher):
    """Records the time after each step."""

    def __init__(self, device: torch.device):
        self._device, self.times = device, []

    def after(self, step: int, optimizer: torch.optim.Optimizer) -> None:
        devices.synchronize(self._device)
        self.times.append(time.perf_counter())


def plan_training(
    objective: nn.Module,
    batches: Batches,
    config: TrainConfig,
    title: str,
    *,
    trainings: int = 1,
    checkpoints: int = 1,
    saved: int = 0,
    other_seconds: float = 0.0,
) -> TrainingPlan:
    """Estimate what training takes by timing a few real steps.

    Args:
        objective: the module to train, see :func:`vaelab.training.loop.train`. It is trained for these steps, so do not
            use it afterwards.
        batches: the source of batches.
        config: how each training is done.
        title: the name of the training.
        trainings: the number of such trainings.
        checkpoints: the number of checkpoints of all trainings that are on the disk at the end.
        saved: the number of copies of the weights that all trainings save besides.
        other_seconds: the seconds of each training outside its steps, such as those of validations.

    Raises:
        ValueError: ``config`` does not fit the model or this machine.
    """
    trained = [parameter for parameter in objective.parameters() if parameter.requires_grad]
    weights = _size(objective.state_dict().values())
    checkpoint = weights + 2 * _size(trained)  # with AdamW's two moments
    seconds = None
    if trainings and config.steps >= MEASURED_FROM:
        step = _measure_step(objective, batches, config)
        seconds = trainings * (config.steps * step + other_seconds)
    parameters = sum(parameter.numel() for parameter in trained)
    written = checkpoints * checkpoint + saved * weights
    return TrainingPlan(title, trainings, trainings * config.steps, parameters, seconds, checkpoint, written)


def announce(plans: Sequence[TrainingPlan], folders: Sequence[Path], device: str) -> float:
    """Print what the trainings of a notebook will take, and check that the disk has room.

    Args:
        plans: the trainings.
        folders: the folders on one disk that the trainings write to. What they hold already counts towards the need.
        device: the device of the trainings.

    Returns:
        The estimated time in seconds; trainings that were too short to be timed count as 0.

    Raises:
        ValueError: the disk does not have enough free space; the error begins with ``output_dir``.
    """
    plans = [plan for plan in plans if plan.trainings]
    if not plans:
        print("every training is finished already")
        return 0.0
    # a checkpoint is written beside its predecessor before it replaces it
    needed = sum(plan.disk_bytes for plan in plans) + max(plan.checkpoint_bytes for plan in plans)
    seconds = sum(plan.seconds or 0.0 for plan in plans)
    rows = [
        (_title(plan), plan.steps, plan.parameters, _time(plan.seconds), readable(plan.disk_bytes)) for plan in plans
    ]
    width = max(len(title) for title, *_ in rows)
    for title, steps, parameters, time_, size in rows:
        print(f"{title:<{width}}  {steps:>9,} steps  {parameters:>13,} parameters  {time_:>16}  {size:>8} on disk")
    memory = devices.peak_memory(devices.pick(device))
    print(
        f"together {_time(seconds or None)} if nothing is resumed; at most {readable(needed)} on disk "
        f"({readable(free_bytes(folders[0]))} are free); memory so far {readable(memory)}"
    )
    left = needed - sum(map(stored_bytes, folders))
    advice = "train less, or give a folder on a larger disk"
    require_free(left, folders[0], parameter="output_dir", what="training", advice=advice)
    return seconds


def require_training_space(what: str, largest: int, total: int, folder: str | Path, *, together: bool) -> int:
    """Print how much disk space and memory the training of some models takes, and require the space.

    A checkpoint is written beside its predecessor before it replaces it, so the largest one needs its space twice.

    Args:
        what: the name of the models in the message.
        largest: the number of parameters of the largest model.
        total: the number of parameters of all models.
        folder: the folder for the checkpoints and weights.
        together: whether all models are trained at once, with one checkpoint.

    Returns:
        The number of bytes needed on disk.

    Raises:
        ValueError: the disk does not have that much free space.
    """
    at_once = total if together else largest
    needed = total * (CHECKPOINT_BYTES + WEIGHT_BYTES) + at_once * CHECKPOINT_BYTES
    memory = at_once * (CHECKPOINT_BYTES + WEIGHT_BYTES)  # weights, gradients and two moments
    print(f"{what}: {total:,} parameters; {readable(needed)} on disk ({readable(free_bytes(folder))} are free), "
          f"{readable(memory)} of memory for training")  # fmt: skip
    require_free(
        needed, folder, parameter="output_dir", what=f"the training of {what}",
        advice="train fewer or smaller ones, or take another disk",
    )  # fmt: skip
    return needed


def _title(plan: TrainingPlan) -> str:
    return plan.title if plan.trainings == 1 else f"{plan.trainings} x {plan.title}"


def _time(seconds: float | None) -> str:
    return "not measured" if seconds is None else f"about {timedelta(seconds=max(1, round(seconds)))}"


def _size(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _measure_step(objective: nn.Module, batches: Batches, config: TrainConfig) -> float:
    clock = _Clock(devices.pick(config.device))
    short = replace(config, steps=MEASURED_STEPS, horizon=0, warmup=0, log_every=1, trackers=())
    with torch.random.fork_rng():
        train(objective, batches, short, watchers=[clock], progress=False)
    return clock.times[-1] - clock.times[-2]
