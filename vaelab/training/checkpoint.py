"""The state of a training run on disk: a checkpoint, which is replaced as a whole, and a log, which only grows.

::

    checkpoint.safetensors   weights, AdamW's moments, settings, progress: written to a draft file, then renamed
    log.jsonl                one row per line: the history and what watchers recorded

The log is appended and synced before each checkpoint, and the checkpoint records how many bytes of the log belong to
it. A resumed run cuts the log to this length, so that each row occurs once. The checkpoint holds checksums of both
files, which are verified when they are read.
"""

import json
import os
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import xxhash
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

from vaelab.core.finite import all_finite, any_nan
from vaelab.core.io import atomic, naming

FORMAT = "vaelab training 2"
CHECKPOINT = "checkpoint.safetensors"
LOG = "log.jsonl"

Rows = list[dict[str, Any]]
"""Records of plain JSON, in the order in which they were recorded."""


@dataclass
class Progress:
    """How far a training run has come, besides its weights, its optimizer's moments and its log."""

    step: int = 0
    """Steps taken."""
    sums: dict[str, Tensor] = field(default_factory=dict)
    """Losses summed since the last row of the history, each a scalar."""
    watchers: list[dict[str, Any]] = field(default_factory=list)
    """The state of each watcher, plain JSON."""
    scaler: dict[str, Any] | None = None
    """The state of float16's loss scaler, if there is one."""


class TrainingLog:
    """The rows of a training run, written to ``log.jsonl`` in its folder.

    Args:
        path: the log file.
        logs: the lists of rows by name; they grow during training and are filled by :meth:`restore`.
    """

    def __init__(self, path: Path, logs: Mapping[str, Rows]):
        self.path, self._logs = path, logs
        self._written = dict.fromkeys(logs, 0)
        self._bytes, self._digest = 0, xxhash.xxh3_128()

    def append(self) -> dict[str, Any]:
        """Append the new rows to the file and sync it; return what :meth:`restore` needs to find this state again."""
        lines = []
        for name, rows in self._logs.items():
            lines += [json.dumps({"log": name, "row": row}) for row in rows[self._written[name] :]]
            self._written[name] = len(rows)
        text = "".join(f"{line}\n" for line in lines).encode()
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with naming(self.path), open(self.path, "r+b" if self._bytes else "wb") as file:
            file.truncate(self._bytes)
            file.seek(self._bytes)
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        self._bytes += len(text)
        self._digest.update(text)
        return {"bytes": self._bytes, "xxh128": self._digest.hexdigest()}

    def restore(self, state: dict[str, Any]) -> None:
        """Fill the lists from the file, up to the state that :meth:`append` returned.

        If an interrupted run wrote rows after that, the next :meth:`append` cuts them off.

        Raises:
            ValueError: the file is missing or damaged, or holds a list of rows with an unknown name.
        """
        content = _bytes_of(self.path, state["bytes"]) if state["bytes"] else b""
        self._digest = xxhash.xxh3_128(content)
        if len(content) != state["bytes"] or self._digest.hexdigest() != state["xxh128"]:
            raise ValueError(f"{self.path} is missing or damaged: it is not the log that {CHECKPOINT} belongs to")
        self._bytes = len(content)
        for rows in self._logs.values():
            rows.clear()
        for line in content.splitlines():
            record = json.loads(line)
            if record["log"] not in self._logs:
                raise ValueError(f"{self.path} holds rows of {record['log']!r}, which no watcher of this run records")
            self._logs[record["log"]].append(record["row"])
        self._written = {name: len(rows) for name, rows in self._logs.items()}


def read_log(path: Path) -> dict[str, Rows]:
    """Read the lists of rows from the log of a finished training run, by name.

    Raises:
        ValueError: the file is missing or damaged.
    """
    logs: dict[str, Rows] = {}
    try:
        for line in path.read_bytes().splitlines():
            record = json.loads(line)
            logs.setdefault(record["log"], []).append(record["row"])
    except FileNotFoundError as error:
        raise ValueError(f"{path} is missing") from error
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is damaged: line {sum(map(len, logs.values())) + 1} is no row of a log") from error
    return logs


def save(
    path: Path, objective: nn.Module, optimizer: torch.optim.Optimizer, documents: dict[str, Any], progress: Progress
) -> None:
    """Write the weights, AdamW's moments and the progress, atomically.

    Args:
        path: the checkpoint file.
        objective: the module in training; a moment is stored under its parameter's name.
        optimizer: the module's AdamW.
        documents: plain JSON by name: ``signature``, the settings that a run must share to resume, and ``log``, the
            result of :meth:`TrainingLog.append`.
        progress: how far the run has come.

    Raises:
        FloatingPointError: a weight is NaN or infinite; the existing file is not replaced.
    """
    inner = _unwrapped(optimizer)
    tensors = {f"model/{name}": value for name, value in objective.state_dict().items()}
    # without the condition, torch would take a step in order to have a state to return
    states = get_optimizer_state_dict(objective, inner)["state"] if inner.state else {}
    tensors |= {f"optimizer/{key}/{name}": value for name, state in states.items() for key, value in state.items()}
    tensors |= {f"sums/{name}": value for name, value in progress.sums.items()}
    bad = not_finite(tensors, _may_be_infinite(objective))
    if bad:
        raise FloatingPointError(
            f"{bad} is NaN or infinite after step {progress.step}; {path} was not replaced. Try a lower learning_rate"
        )
    described = {key: value for key, value in vars(progress).items() if key != "sums"}
    write_tensors(path, tensors, {**documents, "progress": {**described, "sums": list(progress.sums)}})


def restore(
    path: Path, objective: nn.Module, optimizer: torch.optim.Optimizer, signature: dict[str, Any]
) -> tuple[Progress, dict[str, Any]]:
    """Read what :func:`save` wrote into the module and its optimizer; return the progress and the documents.

    Raises:
        ValueError: the file is missing, damaged or foreign, was made with other settings than ``signature``, or has a
            weight that is NaN or infinite.
    """
    with _verified(path) as tensors:
        documents = _take_documents(tensors)
        if not {"progress", "signature", "log"} <= documents.keys():
            raise ValueError(f"{path} is no checkpoint of a training")
        require_same_settings(path, documents["signature"], signature)
        bad = not_finite(tensors, _may_be_infinite(objective))
        if bad:
            raise ValueError(f"{path} cannot be resumed from: {bad} is NaN or infinite")
    # the optimizer first: torch steps it once, at a learning rate of 0, to create the state that it then replaces
    _restore_optimizer(objective, _unwrapped(optimizer), tensors)
    objective.load_state_dict({n.removeprefix("model/"): t for n, t in tensors.items() if n.startswith("model/")})
    progress = documents["progress"]
    device = next(objective.parameters()).device
    sums = {name: tensors[f"sums/{name}"].to(device) for name in progress.pop("sums")}
    return Progress(**progress, sums=sums), documents


def write_tensors(path: Path, tensors: Mapping[str, Tensor], documents: Mapping[str, Any]) -> None:
    """Write tensors and JSON documents as one safetensors file with a checksum, atomically.

    Documents are stored as tensors of bytes: safetensors limits its header, not its tensors.
    """
    # copy each tensor: safetensors refuses tensors that share memory
    stored = {name: value.detach().to("cpu", copy=True).contiguous() for name, value in tensors.items()}
    for name, document in documents.items():
        stored[f"json/{name}"] = torch.frombuffer(bytearray(json.dumps(document).encode()), dtype=torch.uint8)
    with atomic(path) as draft:
        # one entry: safetensors writes several in any order, and then equal checkpoints would differ
        save_file(stored, draft, metadata={FORMAT: _checksum(stored)})


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read what :func:`write_tensors` wrote: tensors on the CPU, and documents. The checksum is always verified.

    For 1 GB (weights and moments of the SDXL-VAE in float32) in the system's cache this takes 0.1 s of a core. In
    :func:`restore`, which takes 0.45 s, a second core does it while the values are looked through, which takes as long.

    Raises:
        ValueError: the file is missing, damaged or foreign.
    """
    with _verified(path) as tensors:
        return tensors, _take_documents(tensors)


@contextmanager
def _verified(path: Path) -> Iterator[dict[str, Tensor]]:
    """Read the tensors of a file, and verify its checksum in a thread while the ``with`` block uses them.

    If the file is damaged, its error is raised at the end of the block, also in place of the block's own error.
    """
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except FileNotFoundError as error:
        raise ValueError(f"{path} is missing") from error
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged or no safetensors file ({error})") from error
    if FORMAT not in metadata:
        raise ValueError(f"{path} is no checkpoint of this version of the lab")
    with ThreadPoolExecutor(1) as pool:
        found = pool.submit(_checksum, dict(tensors))
        try:
            yield tensors
        finally:
            if found.result() != metadata[FORMAT]:
                raise ValueError(f"{path} is damaged: its checksum is not that of its content")


def _take_documents(tensors: dict[str, Tensor]) -> dict[str, Any]:
    names = [name for name in tensors if name.startswith("json/")]
    return {name.removeprefix("json/"): json.loads(tensors.pop(name).numpy().tobytes()) for name in names}


def not_finite(tensors: Mapping[str, Tensor], may_be_infinite: frozenset[str] = frozenset()) -> str | None:
    """Return the name of the first tensor with a NaN or infinite value; None if there is none. Tensors named in
    ``may_be_infinite`` are checked for NaN only."""
    for name, value in tensors.items():
        if any_nan(value) if name in may_be_infinite else not all_finite(value):
            return name
    return None


def require_same_settings(path: Path, there: dict[str, Any], here: dict[str, Any]) -> None:
    """Raise ValueError, naming the differences, if ``path`` was made with other settings than ``here``."""
    differing = [key for key in {**here, **there} if there.get(key) != here.get(key)]
    if differing:
        what = ", ".join(f"{key} {there.get(key)!r} there, {here.get(key)!r} here" for key in differing)
        raise ValueError(f"{path} was made with other settings ({what}); delete it, or train in another folder")


def _restore_optimizer(objective: nn.Module, optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> None:
    states: dict[str, dict[str, Tensor]] = {}
    for name, value in tensors.items():
        if name.startswith("optimizer/"):
            _, key, parameter = name.split("/", 2)
            states.setdefault(parameter, {})[key] = value
    if not states:
        return
    # a parameter without a gradient has no state, which strict=True would refuse
    options = StateDictOptions(strict=False)
    groups = get_optimizer_state_dict(objective, optimizer, options=options)["param_groups"]
    set_optimizer_state_dict(objective, optimizer, {"state": states, "param_groups": groups}, options=options)
    for parameter, state in optimizer.state.items():
        for key, value in state.items():
            if value.dim():
                # fused AdamW pairs a parameter with its moments by their places in memory
                state[key] = torch.empty_like(parameter, dtype=value.dtype).copy_(value)


def _unwrapped(optimizer: Any) -> torch.optim.Optimizer:
    return getattr(optimizer, "optimizer", optimizer)  # out of accelerate's


def _may_be_infinite(objective: nn.Module) -> frozenset[str]:
    """Names of the tensors that may be infinite: buffers, such as attention masks of -inf, and AdamW's second moments,
    which a huge gradient overflows."""
    buffers = {f"model/{name}" for name, _ in objective.named_buffers(remove_duplicate=False)}
    moments = {f"optimizer/exp_avg_sq/{name}" for name, _ in objective.named_parameters()}
    return frozenset(buffers | moments)


def _checksum(tensors: Mapping[str, Tensor]) -> str:
    digest = xxhash.xxh3_128()
    for name in sorted(tensors):
        value = tensors[name]
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
        digest.update(value.reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def _bytes_of(path: Path, count: int) -> bytes:
    try:
        with open(path, "rb") as file:
            return file.read(count)
    except FileNotFoundError:
        return b""
