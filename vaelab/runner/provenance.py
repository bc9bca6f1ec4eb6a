"""What a run was made with: versions of libraries, the processor, and the embedded weights."""

import importlib.metadata
import os
import platform
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import xxhash

REPORTED = ("vaelab", "torch", "diffusers", "accelerate", "datasets", "transformers", "torchmetrics", "numpy")
WEIGHTS = Path(__file__).parent.parent / "embedded" / "weights"
DEPENDS = {
    "0": ("pipeline", "dit"), "1": ("vae",), "2": ("vae",), "3": ("pipeline",), "9": ("pipeline", "vae"),
    "44": ("pipeline", "clip", "language_model"),
}  # fmt: skip
"""The embedded models that a run on ``embedded`` depends on, by the first digit or both of its notebook."""
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
    """A short hash of each embedded model: ``{"vae": ..., "pipeline": ..., ...}``.

    A result whose hash differs from today's was measured on other weights, and is stale.

    Args:
        folder: a folder with one folder for each model. Configurations, weights and vocabularies are hashed;
            hidden files and ``checksums.json`` are not.
    """
    return {model.name: _digest(model) for model in sorted(folder.iterdir()) if model.is_dir()}


def depends_on(notebook: str, params: Mapping[str, Any]) -> tuple[str, ...]:
    """The embedded models whose weights decide a run's results.

    A model in ``outputs`` counts as made from the embedded ones, unless a run in the paper's own setting made it.
    """
    named = [str(value) for entry in params.values() for value in (entry if isinstance(entry, list) else [entry])]
    embedded = [name for name in named if name.startswith("embedded")]
    derived = [name for name in named if name.startswith("outputs/") and "/paper" not in name]
    model = str(params.get("model", ""))
    if not model.startswith("embedded") and not (model.startswith("outputs/") and derived):
        return ()
    found = (
        DEPENDS.get(notebook[:2])
        or DEPENDS.get(notebook[0])
        or (("dit",) if model == "embedded-dit" else ("pipeline",))
    )
    return (*found, "dit") if "embedded-dit" in embedded and "dit" not in found else found


def changed_weights(results: Mapping[str, Any], weights: Mapping[str, str]) -> tuple[str, ...]:
    """The embedded models that a run used and whose weights have changed since; such a run is stale.

    Args:
        results: what the run's ``results.json`` holds.
        weights: today's hashes, of :func:`embedded_weights`.
    """
    made_with = results["embedded_weights"]
    used = depends_on(results["notebook"], results["params"])
    return tuple(name for name in used if made_with.get(name) != weights.get(name))


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
