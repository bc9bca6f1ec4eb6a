"""A run and what it leaves: its checked parameters, its figures, and ``results.json``, last.

Every notebook says ``run = report.start("10_finetune_vae", globals())`` after its parameters,
shows what it finds, and ends with ``run.save()``.
"""

import ast
import importlib.metadata
import math
import os
import platform
import shutil
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from vaelab.core.io import read_json, write_json
from vaelab.core.paths import project_root, resolve
from vaelab.core.validate import at_least, unknown

if TYPE_CHECKING:
    from matplotlib.figure import Figure

REPORTED = ("vaelab", "torch", "diffusers", "accelerate", "datasets", "transformers", "torchmetrics", "numpy")
EARLIER = ".earlier.json"
COUNTS = (
    "batch_size", "class_steps", "compared_images", "compared_steps", "dit_steps", "epochs", "expansion", "features",
    "lesson_steps", "permutations", "shown_features", "shown_images", "steps", "text_steps", "top", "vectors", "width",
    "world_vae_steps", "zero_shot_images",
)  # fmt: skip
"""Parameters, of whatever notebook, that are 1 at least; of a list every number."""
FROM_ZERO = ("max_images", "resolution", "seed", "timed_rounds")
"""Parameters that are 0 at least."""
KINDS = {"str": str, "int": int, "float": float, "bool": bool}


class Run:
    """One execution of one notebook."""

    def __init__(self, notebook: str, params: dict[str, Any], folder: Path):
        self.notebook, self.params, self.folder = notebook, params, folder
        self.metrics: dict[str, float] = {}
        self.tables: dict[str, pd.DataFrame] = {}
        self._files: list[str] = []
        self._began = time.perf_counter()

    def metric(self, name: str, value: float) -> float:
        """Record a number; the front page shows the first few.

        Raises:
            ValueError: a value that is no finite number.
        """
        if not math.isfinite(value):
            raise ValueError(f"metric {name!r} is {value}; a result must be a finite number")
        self.metrics[name] = value if isinstance(value, int) else float(value)
        return self.metrics[name]

    def record(self, metrics: Mapping[str, float]) -> None:
        """Record several numbers, see :meth:`metric`."""
        for name, value in metrics.items():
            self.metric(name, value)

    def table(self, name: str, table: pd.DataFrame) -> pd.DataFrame:
        """Record a table, and give it back to be shown."""
        self.tables[name] = table
        return table

    def figure(self, name: str, figure: "Figure") -> "Figure":
        """Save a figure as ``name.png`` beside the results, and give it back to be shown."""
        import matplotlib.pyplot as plt

        self._made(f"{name}.png")
        figure.savefig(self.folder / f"{name}.png", dpi=110, bbox_inches="tight")
        plt.close(figure)
        return figure

    def workspace(self, name: str) -> Path:
        """A folder for what must outlive a kill: it stays while the run is unfinished, and is
        emptied when a finished run is run again."""
        self._made(name)
        (self.folder / name).mkdir(exist_ok=True)
        return self.folder / name

    def save(self) -> str:
        """Write ``results.json``, which says that the run has finished; gives its place back,
        without this machine's folders."""
        results = {
            "notebook": self.notebook,
            "params": {name: _portable(value) for name, value in self.params.items()},
            "metrics": self.metrics,
            "tables": {name: rows(table) for name, table in self.tables.items()},
            "seconds": round(time.perf_counter() - self._began, 3),
            "environment": environment(self.params.get("device", "auto")),
            "files": self._files,
        }
        write_json(self.folder / "results.json", results)
        return _portable(str(self.folder / "results.json"))

    def _made(self, name: str) -> None:
        if name not in self._files:
            self._files.append(name)


def start(notebook: str, namespace: Mapping[str, Any]) -> Run:
    """Begin a run: check the parameters and make the output folder ready. Tables are shown with four
    digits from here on, and stored with all.

    Args:
        notebook: the notebook's name without its ending.
        namespace: the notebook's ``globals()``: its annotated names are the parameters.

    Raises:
        ValueError: a parameter the notebook does not have, one of the wrong type, or a size, device or precision
            that no notebook takes.
        OSError: an output folder that cannot be written to.
    """
    declared = {name: kind_name(kind) for name, kind in namespace["__annotations__"].items()}
    check_value("output_dir", namespace["output_dir"], "str")
    folder = resolve(namespace["output_dir"])
    earlier = _open_folder(folder)
    for name in _injected(namespace):
        if name not in declared:
            raise unknown(f"{notebook}'s parameters", name, declared)
    params = {name: namespace[name] for name in declared}
    for name, value in params.items():
        check_value(name, value, declared[name])
    _refuse_nonsense(params)
    for name in earlier:
        path = folder / name
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    (folder / EARLIER).unlink(missing_ok=True)
    pd.set_option("display.float_format", "{:.4g}".format)
    return Run(notebook, params, folder)


def _refuse_nonsense(params: Mapping[str, Any]) -> None:
    """What cannot be meant is refused before anything is read or computed."""
    for least, names in ((1, COUNTS), (0, FROM_ZERO)):
        for name in params.keys() & set(names):
            given = params[name] if isinstance(params[name], list) else [params[name]]
            for value in given:
                at_least(name, value, least)
    if {"device", "precision"} & params.keys():
        from vaelab.core import devices

        devices.pick(params.get("device", "auto"))
        devices.dtype(params.get("precision", "float32"))


def check_value(name: str, value: Any, kind: str) -> None:
    """Raise ValueError unless ``value`` is of ``kind``: ``str``, ``int``, ``float`` (an int will
    do), ``bool``, or ``list[...]`` of one of these."""
    if kind.startswith("list["):
        if not isinstance(value, list):
            raise ValueError(f"{name}: expected a list ({kind}), got {value!r}")
        for entry in value:
            check_value(name, entry, kind.removeprefix("list[").removesuffix("]"))
        return
    expected = KINDS[kind]
    fits = isinstance(value, int | float) if expected is float else isinstance(value, expected)
    if isinstance(value, bool) and expected is not bool:
        fits = False
    if not fits:
        hint = " (YAML reads 5e-5 as text; write 5.0e-5)" if expected is float and _numeric(value) else ""
        raise ValueError(f"{name}: expected {kind}, got {type(value).__name__} {value!r}{hint}")


def kind_name(kind: Any) -> str:
    """How an annotation is written: ``float`` or ``list[str]``."""
    return kind.__name__ if isinstance(kind, type) and not hasattr(kind, "__args__") else str(kind)


def rows(table: pd.DataFrame) -> list[dict[str, Any]]:
    """A table as plain JSON rows; what is not a number is null."""
    return [{str(key): _plain(value) for key, value in row.items()} for row in table.to_dict("records")]


def environment(device: str) -> dict[str, Any]:
    """Versions and device, without a path or a host's name."""
    import torch

    from vaelab.core import devices

    chosen = devices.pick(device)
    versions = {name: _version(name) for name in REPORTED}
    return {
        "python": platform.python_version(),
        "machine": f"{platform.system()} {platform.machine()}",
        "device": chosen.type,
        "device_name": devices.name(chosen),
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        **versions,
    }


def _open_folder(folder: Path) -> list[str]:
    """Make ``folder`` writable and unfinished; what an earlier finished run made in it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".probe-{os.getpid()}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise OSError(f"output_dir: cannot write to {str(folder)!r} ({error.strerror})") from error
    if (folder / "results.json").exists():
        os.replace(folder / "results.json", folder / EARLIER)
    return read_json(folder / EARLIER).get("files", []) if (folder / EARLIER).exists() else []


def _injected(namespace: Mapping[str, Any]) -> list[str]:
    """The names that papermill assigned in its cell, which begins with ``# Parameters``."""
    cells = [cell for cell in namespace.get("In", []) if cell.lstrip().startswith("# Parameters")]
    return [
        target.id
        for cell in cells
        for statement in ast.parse(cell).body
        if isinstance(statement, ast.Assign)
        for target in statement.targets
        if isinstance(target, ast.Name)
    ]


def _portable(value: Any) -> Any:
    """A parameter without this machine's folders: inside the project relative, else its last part."""
    if isinstance(value, list):
        return [_portable(entry) for entry in value]
    if isinstance(value, str) and "+" in value:
        return "+".join(map(_portable, value.split("+")))
    if not isinstance(value, str) or not Path(value).expanduser().is_absolute():
        return value
    path = Path(value).expanduser()
    return str(path.relative_to(project_root())) if path.is_relative_to(project_root()) else path.name


def _plain(value: Any) -> Any:
    if isinstance(value, np.generic):
        value = value.item()
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _numeric(value: Any) -> bool:
    try:
        float(value)
    except (TypeError, ValueError):
        return False
    return isinstance(value, str)


def _version(package: str) -> str | None:
    if package == "vaelab":
        return sys.modules["vaelab"].__version__
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
