"""Resolve the ``device`` and ``precision`` parameters: where tensors are stored, and in which number format."""

import resource
import sys

import torch
from torch import Tensor

from vaelab.core.validate import one_of

PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def pick(device: str = "auto") -> torch.device:
    """Return the torch device for a ``device`` parameter: ``auto`` takes CUDA, otherwise MPS, otherwise the CPU.

    Raises ValueError if the name is not a device, or this machine does not have the device.
    """
    if device == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        chosen = torch.device(device)
    except RuntimeError as error:
        raise ValueError(f"device: {device!r} is none; expected auto, cpu, cuda, cuda:N or mps") from error
    present = {
        "cpu": True,
        "cuda": torch.cuda.is_available() and (chosen.index or 0) < torch.cuda.device_count(),
        "mps": torch.backends.mps.is_available(),
    }
    if not present.get(chosen.type, False):
        raise ValueError(f"device: {device!r} is not on this machine (try auto)")
    return chosen


def dtype(precision: str) -> torch.dtype:
    """Return the torch dtype for a ``precision`` parameter; the error for an unknown precision lists the known
    ones."""
    one_of("precision", precision, PRECISIONS)
    return PRECISIONS[precision]


def float64_device(device: torch.device) -> torch.device:
    """Return the device for float64 values computed from tensors on ``device``: the same device, or the CPU if it is
    MPS, which has no float64."""
    return torch.device("cpu") if device.type == "mps" else device


def to_float64(values: Tensor) -> Tensor:
    """Convert a tensor to float64, on the device of :func:`float64_device`."""
    return values.to(float64_device(values.device)).double()


def synchronize(device: torch.device) -> None:
    """Wait for the work queued on ``device``, so that a time measured afterwards includes it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def peak_memory(device: torch.device) -> int:
    """Return the peak memory of this process so far in bytes: GPU memory on CUDA, main memory otherwise."""
    if device.type == "cuda":
        return torch.cuda.max_memory_reserved(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak  # macOS reports bytes, Linux units of 1024


def name(device: torch.device) -> str:
    """Return the name of ``device`` for a results file: a CUDA GPU's product name, otherwise the device's type."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
