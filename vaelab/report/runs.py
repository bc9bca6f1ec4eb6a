"""The finished runs that the results page is made from.

A run's folder is ``<notebook>/<run>`` with ``results.json`` and a few pictures: under ``outputs`` where it was made,
under ``docs/results`` where the page reads it.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from vaelab.core.io import atomic
from vaelab.core.paths import project_root, resolve
from vaelab.core.validate import unknown
from vaelab.runner import read_results
from vaelab.runner.output import RESULTS
from vaelab.runner.provenance import changed_weights, embedded_weights

LEFT_OUT = ("demo", "smoke", "interactive")
"""Runs whose names begin with one of these are quick looks, not results."""
OWN = "99_report"
KEPT = (
    "notebook", "params", "metrics", "tables", "key_numbers", "finding", "seconds", "environment", "embedded_weights",
)  # fmt: skip
"""The parts of a run's results that the page needs."""
LONGEST_TABLE = 500
"""Tables with more rows, such as one row per channel, stay with the run."""
PICTURES = {
    "02_judge_embedded_models": ("pictures-test",),
    "10_finetune_vae": ("near_zero_weights", "suppressed"),
    "11_compare_interventions": ("activations",),
    "12_channel_census": ("mechanism",),
    "13_logit_lens": ("full_map",),
    "32_evaluate_sae": ("pictures-*",),
    "33_block_ablation": ("pictures",),
    "34_feature_gallery": ("prompt-*", "features-*", "turned-on-*"),
    "35_feature_scores": ("steered-*",),
    "36_annotate_features": ("shown-*",),
    "41_label_purity": ("features-*",),
    "43_pca_maps": ("jointly",),
}
"""Figures, by notebook, that cannot be drawn from a run's tables."""
WIDEST, COLOURS = 1400, 256
"""Size in pixels and number of colours of a copied picture."""


@dataclass(frozen=True)
class FinishedRun:
    """The results of one run."""

    label: str
    """``<notebook>/<run>``, such as ``11_compare_interventions/study``."""
    folder: Path
    results: Mapping[str, Any]
    changed_weights: tuple[str, ...]
    """The embedded models that the run used and whose weights have changed since; such a run is stale."""

    @property
    def params(self) -> Mapping[str, Any]:
        """The notebook's parameters."""
        return self.results["params"]

    @property
    def params_file(self) -> str:
        """The params file that makes the run."""
        return f"params/{self.label}.yaml"

    def metric(self, name: str) -> float:
        """Return a metric.

        Raises:
            ValueError: the run has no such metric.
        """
        if name not in self.results["metrics"]:
            raise unknown(f"metrics of {self.label}", name, list(self.results["metrics"]))
        return self.results["metrics"][name]

    def table(self, name: str, *columns: str) -> pd.DataFrame:
        """Return a table.

        Args:
            name: its name.
            columns: columns that it must have.

        Raises:
            ValueError: the run has no such table, or the table no such column.
        """
        if name not in self.results["tables"]:
            raise unknown(f"tables of {self.label}", name, list(self.results["tables"]))
        table = pd.DataFrame(self.results["tables"][name])
        for column in columns:
            if column not in table:
                raise unknown(f"columns of the table {name!r} of {self.label}", column, list(table))
        return table

    def pictures(self, pattern: str) -> list[Path]:
        """The copied pictures whose names match a glob, in order."""
        return sorted(self.folder.glob(f"{pattern}.png"))


def read_runs(folder: str | Path, weights: Mapping[str, str] | None = None) -> dict[str, FinishedRun]:
    """Read every finished run under a folder but demo and smoke runs, by label, in order.

    Args:
        folder: a folder of ``<notebook>/<run>/results.json``.
        weights: hashes of the embedded models; None means today's.

    Raises:
        ValueError: a run's results are damaged.
    """
    weights, runs = embedded_weights() if weights is None else weights, {}
    for file in sorted(resolve(folder).glob(f"*/*/{RESULTS}")):
        label = f"{file.parent.parent.name}/{file.parent.name}"
        if file.parent.name.startswith(LEFT_OUT) or label.startswith(OWN):
            continue
        results = read_results(file.parent)
        missing = [part for part in KEPT if part not in results]
        if missing:
            raise ValueError(f"the results of {label} have no {', '.join(missing)}; run it again")
        runs[label] = FinishedRun(label, file.parent, results, changed_weights(results, weights))
    return runs


def require_export(outputs: str, export: bool) -> None:
    """Raise ValueError if runs should be copied but nothing may be written, or if their folder does not exist."""
    if outputs and not export:
        raise ValueError("outputs_folder: runs are copied only with export: true")
    if outputs and not resolve(outputs).is_dir():
        raise ValueError(f"outputs_folder: no folder {outputs!r}")


def copy_runs(outputs: str | Path, folder: str | Path, weights: Mapping[str, str] | None = None) -> list[str]:
    """Copy what the page needs of every finished run that has a params file.

    A stale run does not replace one that is not stale.

    Args:
        outputs: the folder of the runs' output folders.
        folder: the folder to copy to.
        weights: as in :func:`read_runs`.

    Returns:
        One line for each run that was copied, or left because it is stale.
    """
    weights = embedded_weights() if weights is None else weights
    known, lines = read_runs(folder, weights), []
    for label, run in read_runs(outputs, weights).items():
        if not (project_root() / run.params_file).is_file():
            continue
        if run.changed_weights and label in known and not known[label].changed_weights:
            lines.append(f"{label}: left out, since it is stale and the committed run is not")
            continue
        target = resolve(folder) / label
        if _write(target, run):
            lines.append(f"{label}: copied")
    return lines


def _write(target: Path, run: FinishedRun) -> bool:
    """Write a run's results and pictures; return whether the results were new."""
    results = {part: run.results[part] for part in KEPT}
    tables = {name: rows for name, rows in results["tables"].items() if len(rows) <= LONGEST_TABLE}
    text = as_text({**results, "tables": tables})
    new = not (target / RESULTS).is_file() or (target / RESULTS).read_text() != text
    if new:
        with atomic(target / RESULTS) as draft:
            draft.write_text(text)
    for pattern in PICTURES.get(run.results["notebook"], ()):
        for picture in run.pictures(pattern):
            copy_picture(picture, target / picture.name)
    return new


def as_text(results: Mapping[str, Any]) -> str:
    """Results as JSON with one line for each metric and each row of a table."""
    parts = [f"{json.dumps(name)}: {_part(value)}" for name, value in results.items()]
    return "{\n" + ",\n".join(parts) + "\n}\n"


def _part(value: Any, indent: str = " ") -> str:
    dumped = [isinstance(value, dict), isinstance(value, list) and bool(value)]
    if not any(dumped):
        return json.dumps(value, allow_nan=False)
    if dumped[1]:
        return "[\n" + ",\n".join(indent + json.dumps(entry, allow_nan=False) for entry in value) + "]"
    lines = [f"{indent}{json.dumps(name)}: {_part(entry, indent + ' ')}" for name, entry in value.items()]
    return "{\n" + ",\n".join(lines) + "}"


def copy_picture(source: Path, target: Path) -> None:
    """Copy a PNG, at most :data:`WIDEST` pixels wide and with :data:`COLOURS` colours; the same input gives the same
    bytes."""
    from PIL import Image

    with Image.open(source) as picture:
        small = picture.convert("RGB")
    if small.width > WIDEST:
        small = small.resize((WIDEST, round(small.height * WIDEST / small.width)), Image.Resampling.LANCZOS)
    # the default method replaces the colours of small areas: a black circle among pink ones becomes purple
    reduced = small.quantize(COLOURS, Image.Quantize.MAXCOVERAGE, kmeans=3, dither=Image.Dither.NONE)
    with atomic(target) as draft:
        reduced.save(draft, format="PNG", optimize=True)
