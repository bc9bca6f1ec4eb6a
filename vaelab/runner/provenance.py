"""What a run was made with: versions of libraries, the processor, and the embedded weights."""

import importlib.metadata
import os
import platform
import sys
from pathlib import Path
from typing import Any

import xxhash

REPORTED = ("vaelab", "torch", "diffusers", "accelerate", "datasets", "transformers", "torchmetrics", "numpy")
WEIGHTS = Path(__file__).parent.parent / "embedded" / "weights"
PIECE = 2**22
"""Number of bytes that are hashed at a time."""


def environment(device: str) -> dict[str, Any]:
    """Versions, processor and device, without a path or a host's name."""
    import torch

    from vaelab.core import devices

    chosen = devices.pick(device)
    versions = {name: _version(name) for name in REPORTED}
    return {
        "python": platform.python_version(),
        "machine": f"{platform.system()} {platform.machine()}",
        "processor": processor(),
        "device": chosen.type,
        "device_name": devices.name(chosen),
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        **versions,
    }


def processor() -> str:
    """The product name of the processor, where the system tells it; otherwise its architecture."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return next(filter(None, [*names, platform.processor(), platform.machine()]), "unknown")


def embedded_weights(folder: Path = WEIGHTS) -> dict[str, str]:
    """A short hash of each embedded model: ``{"vae": ..., "pipeline": ..., "dit": ...}``.

    A result whose hash differs from today's was measured on other weights, and is stale.

    Args:
        folder: a folder with one folder for each model. Configurations, weights and vocabularies are hashed;
            hidden files and ``checksums.json`` are not.
    """
    return {model.name: _digest(model) for model in sorted(folder.iterdir()) if model.is_dir()}


def _digest(model: Path) -> str:
    files = sorted(file for file in model.rglob("*") if file.is_file() and not file.name.startswith("."))
    digest = xxhash.xxh3_128()
    for file in files:
        if file.name == "checksums.json":
            continue
        digest.update(file.relative_to(model).as_posix().encode() + b"\0")
        with open(file, "rb") as source:
            while piece := source.read(PIECE):
                digest.update(piece)
    return digest.hexdigest()[:16]


def _version(package: str) -> str | None:
    if package == "vaelab":
        return sys.modules["vaelab"].__version__
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
