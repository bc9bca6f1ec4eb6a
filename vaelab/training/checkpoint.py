"""A training's state as one safetensors file: whole or not there, and never a pickle."""

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from vaelab.core.io import atomic

MOMENTS = ("step", "exp_avg", "exp_avg_sq")


@dataclass
class Progress:
    """How far a training has come, beside its weights and its optimizer's moments."""

    step: int = 0
    """Steps taken."""
    history: list[dict[str, float]] = field(default_factory=list)
    """The rows of the log so far."""
    sums: dict[str, Tensor] = field(default_factory=dict)
    """Losses since the last row, each a scalar."""
    watchers: list[dict[str, Any]] = field(default_factory=list)
    """The state of each watcher, plain JSON."""
    scaler: dict[str, Any] | None = None
    """The state of float16's loss scaler, where there is one."""


def save(
    path: Path, objective: nn.Module, optimizer: torch.optim.Optimizer, progress: Progress, signature: dict[str, Any]
) -> None:
    """Write the weights, AdamW's moments and the progress, atomically.

    Args:
        path: the file.
        objective: the module in training; a moment is stored under its parameter's name.
        optimizer: its AdamW.
        progress: how far it has come.
        signature: the settings, plain JSON, that a run must share to go on from here.
    """
    tensors = {f"model/{name}": value for name, value in objective.state_dict().items()}
    for name, state in _named_state(objective, optimizer):
        tensors |= {f"optimizer/{key}/{name}": state[key] for key in MOMENTS if key in state}
    tensors |= {f"sums/{name}": value for name, value in progress.sums.items()}
    told = {**{key: value for key, value in vars(progress).items() if key != "sums"}, "sums": list(progress.sums)}
    with atomic(path) as draft:
        # a copy each: safetensors refuses tensors that share memory
        tensors = {name: value.detach().to("cpu", copy=True).contiguous() for name, value in tensors.items()}
        save_file(tensors, draft, metadata={"progress": json.dumps(told), "signature": json.dumps(signature)})


def restore(path: Path, objective: nn.Module, optimizer: torch.optim.Optimizer, signature: dict[str, Any]) -> Progress:
    """Read what :func:`save` wrote into the module and its optimizer.

    Raises:
        ValueError: a foreign file, or one whose settings are others than ``signature``.
    """
    with safe_open(path, framework="pt", device="cpu") as file:
        told = file.metadata() or {}
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    if not {"progress", "signature"} <= told.keys():
        raise ValueError(f"{path} is no checkpoint of this lab")
    refuse_other_settings(path, json.loads(told["signature"]), signature)
    objective.load_state_dict({n.removeprefix("model/"): t for n, t in tensors.items() if n.startswith("model/")})
    device = next(objective.parameters()).device
    fused = optimizer.param_groups[0]["fused"]
    for name, state in _named_state(objective, optimizer):
        for key in MOMENTS:
            if (stored := tensors.get(f"optimizer/{key}/{name}")) is not None:
                state[key] = stored.to(device) if fused or key != "step" else stored
    progress = json.loads(told["progress"])
    sums = {name: tensors[f"sums/{name}"].to(device) for name in progress.pop("sums")}
    return Progress(**progress, sums=sums)


def refuse_other_settings(path: Path, there: dict[str, Any], here: dict[str, Any]) -> None:
    """Raise ValueError, naming what differs, where ``path`` was made with other settings than ``here``."""
    differing = [key for key in here if there.get(key) != here[key]]
    if differing:
        what = ", ".join(f"{key} {there.get(key)!r} there, {here[key]!r} here" for key in differing)
        raise ValueError(f"{path} was made with other settings ({what}); delete it, or train in another folder")


def _named_state(objective: nn.Module, optimizer: Any) -> Iterator[tuple[str, dict[str, Tensor]]]:
    names = {id(parameter): name for name, parameter in objective.named_parameters()}
    inner = getattr(optimizer, "optimizer", optimizer)
    for group in inner.param_groups:
        for parameter in group["params"]:
            yield names[id(parameter)], inner.state.setdefault(parameter, {})
