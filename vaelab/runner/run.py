"""A run of a notebook: its validated parameters, its figures and tables, and ``results.json``, written last.

Every notebook says ``run = runner.start("10_finetune_vae", globals())`` after its parameters,
shows its results, and ends with ``run.save()``.
"""

import ast
import io
import math
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from vaelab.core.io import read_json, write_json
from vaelab.core.paths import resolve
from vaelab.core.validate import unknown
from vaelab.runner.output import RESULTS, OutputFolder
from vaelab.runner.parameters import changed, fingerprints, portable, validate
from vaelab.runner.provenance import embedded_weights, environment

if TYPE_CHECKING:
    from IPython.display import Image
    from matplotlib.figure import Figure

RECORDED = ".run/recorded.json"
"""What an unfinished run has recorded so far, in its output folder."""
FIGURE_DPI, SHOWN_DPI = 110, 100
"""Pixels of a saved figure per inch, and of the screen on which it is shown."""
LONGEST_ALT = 600
"""Characters of a figure's alternative text."""
INTERACTIVE = "interactive"
"""An output folder of this name is rewritten by every run: JupyterLab's default."""


class Run:
    """One execution of one notebook; made by :func:`start`."""

    def __init__(self, notebook: str, params: dict[str, Any], execution_only: Iterable[str], output: OutputFolder,
                 *, stage_all: bool, stage_results: bool):  # fmt: skip
        self.notebook, self.params = notebook, params
        self.metrics: dict[str, float] = {}
        self.tables: dict[str, pd.DataFrame] = {}
        self._execution_only, self._output = sorted(execution_only), output
        self._stage_all, self._stage_results = stage_all, stage_results or stage_all
        self._files: list[str] = []
        self._key_numbers: list[dict[str, Any]] = []
        self._finding = ""
        self._embedded_weights = embedded_weights()
        self._started = time.perf_counter()

    @property
    def folder(self) -> Path:
        """The output folder."""
        return self._output.folder

    @property
    def dry(self) -> bool:
        """Whether the run only estimates what it would take, and writes nothing else."""
        return bool(self.params.get("dry_run", False))

    def metric(self, name: str, value: float) -> float:
        """Record a number.

        Raises:
            ValueError: the value is not a finite number.
        """
        if not math.isfinite(value):
            raise ValueError(f"metric {name!r} is {value}; a result must be a finite number")
        self.metrics[name] = value if isinstance(value, int) else float(value)
        return self.metrics[name]

    def record(self, metrics: Mapping[str, float]) -> None:
        """Record several numbers, see :meth:`metric`."""
        for name, value in metrics.items():
            self.metric(name, value)
        self._note()

    def table(self, name: str, table: pd.DataFrame) -> pd.DataFrame:
        """Record a table, and return it to be shown."""
        self.tables[name] = table
        self._note()
        return table

    def key_number(self, label: str, value: float, *, unit: str = "",
                   interval: tuple[float, float] | None = None) -> None:  # fmt: skip
        """Name one of the two to four numbers that answer the notebook's question, for the front page.

        Args:
            label: what the number is, in plain words.
            value: the number.
            unit: its unit, such as ``%`` or ``s``.
            interval: lower and upper end of its 95 % interval, in the same unit. If both are NaN, as the ends over a
                single seed are, there is none.

        Raises:
            ValueError: a number is not finite.
        """
        if interval is not None and all(math.isnan(end) for end in interval):
            interval = None
        for number in (value, *(interval or ())):
            if not math.isfinite(number):
                raise ValueError(f"key number {label!r} is {number}; a result must be a finite number")
        ends = None if interval is None else [float(end) for end in interval]
        self._key_numbers.append({"label": label, "value": float(value), "unit": unit, "interval": ends})

    def finding(self, sentence: str) -> str:
        """State what the run found in one plain sentence, for the front page; returns the sentence."""
        self._finding = sentence
        return sentence

    def figure(self, name: str, figure: "Figure") -> "Image":
        """Save a figure as ``name.png`` beside the results, and return the picture to be shown.

        Its alternative text, for screen readers, is made of the figure's titles, labels and legends.
        """
        import matplotlib.pyplot as plt
        from IPython.display import Image

        data = io.BytesIO()
        figure.savefig(data, dpi=FIGURE_DPI, bbox_inches="tight")
        plt.close(figure)
        if not self.dry:
            path = self._output.place(f"{name}.png", staged=self._stage_results)
            path.write_bytes(data.getvalue())
            self._files += [path.name] if path.name not in self._files else []
        shown = int.from_bytes(data.getvalue()[16:20]) * SHOWN_DPI // FIGURE_DPI  # a PNG's width is in these bytes
        return Image(data.getvalue(), format="png", width=shown, alt=describe_figure(figure) or name)

    def thumbnail(self, figure: "Figure") -> None:
        """Save a figure as ``thumbnail.png``, which the front page shows at its own size, 480 by 300 pixels.

        The figure is resized to 4.8 by 3 inches, so its text must be readable at that size.
        """
        import matplotlib.pyplot as plt

        if not self.dry:
            path = self._output.place("thumbnail.png", staged=self._stage_results)
            figure.set_size_inches(4.8, 3.0)
            figure.savefig(path, dpi=100)
            self._files += [path.name] if path.name not in self._files else []
        plt.close(figure)

    def workspace(self, name: str) -> Path:
        """A folder for files that must survive a kill, such as checkpoints and stores.

        If an unfinished run is started again, its files are still there. A run that overwrites a finished
        run gets an empty folder, which replaces the finished run's folder in :meth:`save`.

        Raises:
            ValueError: the run is a dry run, or the output folder holds an entry of that name that no run made.
        """
        if self.dry:
            raise ValueError(f"dry_run: a dry run writes nothing, but asks for a place for {name!r}")
        path = self._output.place(name, staged=self._stage_all)
        path.mkdir(exist_ok=True)
        self._files += [name] if name not in self._files else []
        return path

    def save(self) -> str:
        """Write ``results.json``, which marks the run as finished; returns its path, relative to the project.

        A dry run writes ``.run/dry_run.json`` instead and stays unfinished.
        """
        results = self._results()
        if self.dry:
            write_json(self.folder / ".run" / "dry_run.json", results)
            return portable(str(self.folder / ".run" / "dry_run.json"))
        write_json(self._output.place(RESULTS, staged=self._stage_results), results)
        if self._stage_results:
            self._output.commit(replace_all=self._stage_all)
        self._output.release()
        (self.folder / RECORDED).unlink(missing_ok=True)
        return portable(str(self.folder / RESULTS))

    def _note(self) -> None:
        """Write what is recorded so far, so that a figure that fails later does not lose the numbers."""
        if not self.dry:
            write_json(self.folder / RECORDED, self._results())

    def _results(self) -> dict[str, Any]:
        return {
            "notebook": self.notebook,
            "params": {name: portable(value) for name, value in self.params.items()},
            "fingerprints": fingerprints(self.params, self._execution_only),
            "execution_only": self._execution_only,
            "metrics": self.metrics,
            "tables": {name: rows(table) for name, table in self.tables.items()},
            "key_numbers": self._key_numbers,
            "finding": self._finding,
            "seconds": round(time.perf_counter() - self._started, 3),
            "environment": environment(self.params.get("device", "auto")),
            "embedded_weights": self._embedded_weights,
            "files": self._files,
        }


def describe_figure(figure: "Figure") -> str:
    """Describe a figure in words: its title, and of each panel the title, the labels of its axes, the legend's entries,
    and beside pictures the labels of rows and the captions. What several panels have in common is said once."""
    parts = [figure.get_suptitle()]
    for axis in figure.axes:
        vertical, horizontal = axis.get_ylabel(), axis.get_xlabel()
        labels = f"{vertical} against {horizontal}" if vertical and horizontal else vertical or horizontal
        legend = axis.get_legend()
        entries = ", ".join(text.get_text() for text in legend.get_texts()) if legend else ""
        beside = [] if axis.axison else [text.get_text() for text in axis.texts]
        parts += [axis.get_title(), labels, entries, *beside]
    text = "; ".join(" ".join(part.split()) for part in dict.fromkeys(parts) if part.strip())
    text = text if len(text) <= LONGEST_ALT else f"{text[:LONGEST_ALT]}..."
    return text.replace("\\$", "$").replace("\u200b", "")  # as they were before vaelab.viz.text made them safe to draw


def start(notebook: str, namespace: Mapping[str, Any], *, execution_only: Iterable[str] = ()) -> Run:
    """Begin a run: validate the parameters and open the output folder.

    A finished run is replaced only if ``overwrite`` is true, and then in :meth:`Run.save`, when the new run is
    complete. In an output folder called ``interactive`` every run replaces results and figures, and
    workspaces are used again. Tables are shown with four digits from here on, and stored with all.

    Args:
        notebook: the notebook's name without its ending.
        namespace: the notebook's ``globals()``; its annotated names are the parameters.
        execution_only: parameters of this notebook that say how the run executes and do not decide its results,
            besides :data:`vaelab.runner.parameters.EXECUTION_ONLY`.

    Raises:
        ValueError: the notebook has no such parameter; a value has the wrong type or size; a device or precision does
            not exist; the folder holds a finished run and ``overwrite`` is false; or another process uses the folder.
        OSError: the output folder cannot be written to.
    """
    declared = namespace["__annotations__"]
    validate("output_dir", namespace["output_dir"], str)
    for name in _injected(namespace):
        if name not in declared:
            raise unknown(f"{notebook}'s parameters", name, declared)
    for name in execution_only:
        if name not in declared:
            raise unknown(f"{notebook}'s execution_only", name, declared)
    params = {name: namespace[name] for name in declared}
    for name, value in params.items():
        validate(name, value, declared[name])
    _validate_device(params)
    pd.set_option("display.float_format", "{:.4g}".format)
    folder = resolve(params["output_dir"])
    if params.get("dry_run", False):
        return Run(notebook, params, execution_only, OutputFolder(folder, lock=False),
                   stage_all=False, stage_results=False)  # fmt: skip
    output = OutputFolder(folder)
    identity = {"notebook": notebook, **fingerprints(params, execution_only)}
    overwrite = params.get("overwrite", False)
    if output.finished and not overwrite and folder.name != INTERACTIVE:
        output.release()
        raise ValueError(_finished_message(folder, params))
    stage_all = overwrite and (output.finished or (bool(output.made) and not output.begun_as(identity)))
    if stage_all:
        output.stage(identity)
    else:
        output.begin(identity)
    return Run(notebook, params, execution_only, output, stage_all=stage_all, stage_results=output.finished)


def rows(table: pd.DataFrame) -> list[dict[str, Any]]:
    """A table as plain JSON rows; a value that is not a finite number is null."""
    return [{str(key): _plain(value) for key, value in row.items()} for row in table.to_dict("records")]


def read_results(folder: str | Path, notebook: str = "", parameter: str = "") -> dict[str, Any]:
    """The results of the finished run in an output folder.

    Args:
        folder: the output folder, as a parameter names it.
        notebook: the notebook that must have made it; empty for any.
        parameter: the notebook parameter that named the folder; error messages begin with it.

    Raises:
        ValueError: the folder holds no finished run of that notebook, or its results file is damaged.
    """
    shown, before = portable(str(folder)), f"{parameter}: " if parameter else ""
    file = resolve(folder) / RESULTS
    try:
        results = read_json(file) if file.is_file() else None
    except (ValueError, OSError) as error:
        raise ValueError(f"{before}'{shown}/{RESULTS}' is damaged: {error}") from error
    if file.is_file() and not _complete(results):
        raise ValueError(f"{before}'{shown}/{RESULTS}' is damaged: it does not hold the results of a run")
    if not file.is_file() or (notebook and results.get("notebook") != notebook):
        params = f"{shown}.yaml".replace("outputs/", "params/", 1)
        hint = f"; run it first (vaelab run {params})" if notebook else ""
        raise ValueError(f"{before}{shown!r} holds no finished run{f' of {notebook}' if notebook else ''}{hint}")
    return results


def _complete(results: Any) -> bool:
    parts = ("params", "metrics", "tables")
    return isinstance(results, dict) and all(isinstance(results.get(part, {}), dict) for part in parts)


def _finished_message(folder: Path, params: Mapping[str, Any]) -> str:
    try:
        differing = changed(read_results(folder), params)
    except ValueError:
        differing = []
    made_with = f", made with another {', '.join(differing)}" if differing else ""
    return (
        f"output_dir: {portable(str(folder))!r} holds a finished run{made_with}; give overwrite: true "
        "(vaelab run --overwrite) to replace it, or another output_dir"
    )


def _validate_device(params: Mapping[str, Any]) -> None:
    from vaelab.core import devices
    from vaelab.core.validate import one_of

    if "device" in params:
        devices.pick(params["device"])
    for name in params:
        if name == "precision" or name.endswith("_precision"):
            one_of(name, params[name], devices.PRECISIONS)


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


def _plain(value: Any) -> Any:
    if isinstance(value, np.generic):
        value = value.item()
    return None if isinstance(value, float) and not math.isfinite(value) else value
