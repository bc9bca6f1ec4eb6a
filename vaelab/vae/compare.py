"""Compare fine-tuning runs: tables over seeds and conditions, together with the paper's values.

Shi, Wang and Roshka ("Investigating the Functional Role of Learned Channel Suppression in Diffusion VAEs") compare
single runs (section 5, Table 1). Here the differences to the baseline are paired by seed and have 95 % intervals.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from vaelab import runner
from vaelab.core.paths import resolve
from vaelab.core.stats import Interval, paired_interval
from vaelab.data.images import short_name
from vaelab.vae.finetune import VAERun, read_run

NOTEBOOK = "10_finetune_vae"

DIFFERENCE = (
    "dataset", "condition", "measure", "seeds", "baseline", "value", "difference", "low", "high", "percent",
    "percent_low", "percent_high",
)  # fmt: skip
"""The columns of a table of differences to the baseline."""
MEASURES = ("mse", "kl", "psnr", "ssim")
PAPER_TABLE_1 = {
    "ImageNette-256": {"baseline": (10.443e-3, 3361.52, 25.833, 0.8077), "nudge": (10.396e-3, 3351.61, 25.853, 0.8086)},
    "CIFAR-10": {"baseline": (2.879e-3, 994.63, 31.429, 0.9195), "nudge": (2.826e-3, 997.53, 31.509, 0.9210)},
    "Google Fonts": {"baseline": (2.451e-3, 6363.02, 32.138, 0.9917), "nudge": (2.470e-3, 6313.26, 32.105, 0.9916)},
}
"""MSE, KL, PSNR and SSIM from Table 1 of Shi, Wang and Roshka: one run each."""
PAPER_DATASETS = {
    **dict.fromkeys(("imagenette", "photos"), "ImageNette-256"),
    **dict.fromkeys(("cifar10", "digits"), "CIFAR-10"),
    **dict.fromkeys(("genfonts_data", "glyphs"), "Google Fonts"),
}
"""The row of ``PAPER_TABLE_1`` with which a data set is compared, by its short name. The embedded data sets, which are
shipped with the package, are compared with the paper's data set of the same kind."""


class Comparison(NamedTuple):
    """A finished run of notebook 10: one data set, several conditions and seeds."""

    dataset: str
    """Short name of its data set."""
    params: dict[str, Any]
    """The notebook's parameters."""
    folder: Path
    """The notebook's output folder."""
    runs: list[VAERun]
    """The training runs, ordered by seed and then by condition."""

    def weights(self, condition: str) -> Path:
        """Return the diffusers folder of the model that was trained under a condition with the first seed."""
        return self.folder / "runs" / f"{condition}-seed{self.params['seeds'][0]}" / "vae"


def read_comparison(folder: str) -> Comparison:
    """Read a finished run of notebook 10 from its output folder.

    Raises:
        ValueError: the run has not finished, is damaged, or has only one seed.
    """
    params = runner.read_results(folder, NOTEBOOK, "runs")["params"]
    names = [f"{condition}-seed{seed}" for seed in params["seeds"] for condition in params["conditions"]]
    runs = [read_run(resolve(folder) / "runs" / name) for name in names]
    if len(params["seeds"]) < 2:
        raise ValueError(f"runs: {folder!r} has one seed; an interval needs two or more")
    return Comparison(short_name(params["dataset"]), params, resolve(folder), runs)


def read_comparisons(folders: list[str]) -> list[Comparison]:
    """Read several finished runs of notebook 10, one for each data set.

    Raises:
        ValueError: two runs are of the same data set, or there is no run; also the errors of :func:`read_comparison`.
    """
    comparisons = [read_comparison(folder) for folder in folders]
    names = [comparison.dataset for comparison in comparisons]
    if len(set(names)) < len(names) or not names:
        raise ValueError(f"runs: expected one run of each data set, got {names}")
    return comparisons


def run_log_table(runs: list[VAERun], part: str) -> pd.DataFrame:
    """Join one of the logs of several runs to a table.

    Args:
        runs: the training runs.
        part: the name of the log: ``history``, ``tracked``, ``validation`` or ``interventions``, see
            :class:`vaelab.vae.finetune.VAERun`.

    Returns:
        The rows of the log, with the columns ``condition`` and ``seed`` before its own.
    """
    return pd.DataFrame(
        [{"condition": run.condition, "seed": run.seed, **row} for run in runs for row in getattr(run, part)]
    )


def near_zero_table(runs: list[VAERun]) -> pd.DataFrame:
    """Make a table of the fraction of near-zero weights in several runs: one row per run, tracked step and layer.

    Returns:
        Columns ``condition``, ``seed``, ``step``, ``layer`` and ``fraction``, from 0 to 1.
    """
    return pd.DataFrame(
        [
            {"condition": run.condition, "seed": run.seed, "step": row["step"], "layer": layer, "fraction": fraction}
            for run in runs
            for row in run.tracked
            for layer, fraction in row["near_zero"].items()
        ]
    )


def paired_differences(runs: list[VAERun], dataset: str) -> pd.DataFrame:
    """Compute the measures of the paper's Table 1 as differences to the baseline, paired by seed.

    Args:
        runs: the training runs of one data set, including those of the condition ``baseline``.
        dataset: the data set's name, for the table.

    Returns:
        One row per condition and measure: ``dataset``, ``condition``, ``measure``, ``seeds`` (the number of seeds),
        ``baseline`` and ``value`` (means over seeds), ``difference`` with its 95 % interval from ``low`` to ``high``
        (Student's t over seeds; NaN if there is only one seed), and the same three in percent of the baseline:
        ``percent``, ``percent_low``, ``percent_high``.
    """
    rows = []
    for condition in dict.fromkeys(run.condition for run in runs if run.condition != "baseline"):
        for measure in (*MEASURES, "kl_per_entry"):
            first, second = (final_values(runs, name, measure) for name in ("baseline", condition))
            interval, base = paired_difference(runs, condition, measure), float(np.mean(first))
            percents = {
                f"percent{suffix}": 100 * value / abs(base)
                for suffix, value in zip(("", "_low", "_high"), interval, strict=True)
            }
            rows.append(
                {"dataset": dataset, "condition": condition, "measure": measure, "seeds": len(first), "baseline": base,
                 "value": float(np.mean(second)), "difference": interval.mean, "low": interval.low,
                 "high": interval.high, **percents}
            )  # fmt: skip
    return pd.DataFrame(rows, columns=[*DIFFERENCE])


def final_values(runs: list[VAERun], condition: str, measure: str) -> list[float]:
    """List a measure of the last validation of a condition's runs, in the order of their seeds."""
    return [run.validation[-1][measure] for run in sorted(runs, key=lambda run: run.seed) if run.condition == condition]


def paired_difference(runs: list[VAERun], condition: str, measure: str) -> Interval:
    """Compute a condition's difference to the baseline after training, paired by seed, with its 95 % interval; with one
    seed the interval's ends are NaN."""
    first, second = (final_values(runs, name, measure) for name in ("baseline", condition))
    if len(first) < 2:
        return Interval(second[0] - first[0], float("nan"), float("nan"))
    return paired_interval(first, second)


def condition_means(runs: list[VAERun]) -> dict[str, float]:
    """Compute means over seeds, by name.

    Returns:
        ``suppressed.start``, the number of suppressed channels before training; and for every condition
        ``<condition>.<measure>`` and ``<condition>.suppressed`` after training, and ``<condition>.touched``, the number
        of changes of a channel's scale during training.
    """
    values = {"suppressed.start": float(np.mean([run.validation[0]["suppressed"] for run in runs]))}
    for condition in dict.fromkeys(run.condition for run in runs):
        of_condition = [run for run in runs if run.condition == condition]
        for measure in ("suppressed", *MEASURES, "kl_per_entry"):
            values[f"{condition}.{measure}"] = float(np.mean([run.validation[-1][measure] for run in of_condition]))
        touched = [sum(len(row["channels"]) for row in run.interventions) for run in of_condition]
        values[f"{condition}.touched"] = float(np.mean(touched))
    return values


def suppressed_counts(comparisons: list[Comparison]) -> pd.DataFrame:
    """Count the suppressed channels before and after training.

    Returns:
        One row per data set, seed and point in time: ``dataset``, ``seed``, ``when`` (``start`` before training, or the
        condition of a finished run) and ``suppressed``.
    """
    return pd.DataFrame(
        [
            {
                "dataset": comparison.dataset,
                "seed": run.seed,
                "when": when,
                "suppressed": run.validation[index]["suppressed"],
            }
            for comparison in comparisons
            for run in comparison.runs
            # all conditions of a seed start from the same model
            for when, index in (*((("start", 0),) if run.condition == "baseline" else ()), (run.condition, -1))
        ]
    )


def suppressed_means(comparisons: list[Comparison]) -> dict[str, float]:
    """Compute the baseline's mean numbers of suppressed channels over seeds: ``<dataset>.suppressed.start`` before
    training and ``<dataset>.suppressed.end`` after it."""
    counts = suppressed_counts(comparisons).groupby(["dataset", "when"])["suppressed"].mean()
    names = [comparison.dataset for comparison in comparisons]
    moments = {"start": "start", "end": "baseline"}
    return {
        f"{name}.suppressed.{moment}": float(counts[name, when]) for name in names for moment, when in moments.items()
    }


def beside_paper(table: pd.DataFrame) -> pd.DataFrame:
    """Compare the differences between ``nudge`` and ``baseline`` with those in the paper's Table 1, in percent of the
    baseline.

    Args:
        table: the table of :func:`paired_differences`.

    Returns:
        One row per data set and measure: ``dataset``, ``measure``, ``paper's data`` (see ``PAPER_DATASETS``; None if
        the paper has no such data), ``paper %``, and ``here %`` with its interval from ``here % low`` to
        ``here % high``.
    """
    rows = []
    for row in table[(table["condition"] == "nudge") & table["measure"].isin(MEASURES)].to_dict("records"):
        name, column, percent = PAPER_DATASETS.get(row["dataset"]), MEASURES.index(row["measure"]), None
        if name:
            base, nudged = (PAPER_TABLE_1[name][condition][column] for condition in ("baseline", "nudge"))
            percent = 100 * (nudged - base) / base
        rows.append(
            {"dataset": row["dataset"], "measure": row["measure"], "paper's data": name, "paper %": percent,
             "here %": row["percent"], "here % low": row["percent_low"], "here % high": row["percent_high"]}
        )  # fmt: skip
    return pd.DataFrame(rows)


def describe_study(table: pd.DataFrame, means: Mapping[str, float]) -> str:
    """Describe in words what the nudge and its control changed on one data set.

    Args:
        table: the table of :func:`paired_differences`.
        means: the means of :func:`condition_means`.
    """
    before, after = means["suppressed.start"], means["baseline.suppressed"]
    parts = [f"Plain fine-tuning changes the number of suppressed channels from {before:.0f} to {after:.0f}"]
    effects = {row["condition"]: _in_percent(row) for row in table[table["measure"] == "mse"].to_dict("records")}
    if "nudge" in effects:
        parts.append(
            f"with the nudge it is {means['nudge.suppressed']:.0f}, and the held-out error differs by "
            f"{effects['nudge']}"
        )
    if "control" in effects:
        parts.append(
            f"with the control, which raises the scales of active channels, the error differs by {effects['control']}"
        )
    seeds = int(table["seeds"].min()) if len(table) else 0
    return "; ".join(parts) + (f"; in brackets are 95 % intervals over {seeds} seeds." if seeds > 1 else ".")


def describe_comparisons(table: pd.DataFrame) -> str:
    """Describe in words what the nudge and its control changed on several data sets.

    Args:
        table: the rows of :func:`paired_differences` of all data sets.
    """
    parts = []
    for condition, subject in (("nudge", "the nudge"), ("control", "its control")):
        rows = table[(table["condition"] == condition) & (table["measure"] == "mse")]
        if len(rows):
            sizes = [f"{_signed(row['percent'])} % ({row['dataset']})" for row in rows.to_dict("records")]
            clear = ((rows["low"] > 0) | (rows["high"] < 0)).sum()
            parts.append(
                f"with {subject} the held-out error differs from the baseline's by {', '.join(sizes)} (the interval "
                f"over seeds excludes zero on {clear} of {len(rows)} data sets)"
            )
    text = "; ".join(parts) or "no run has another condition than the baseline"
    return text[0].upper() + text[1:] + "."


def _in_percent(row: Mapping[str, Any]) -> str:
    ends = f" ({_signed(row['percent_low'])} to {_signed(row['percent_high'])})" if row["seeds"] > 1 else ""
    return f"{_signed(row['percent'])} %{ends}"


def _signed(value: float) -> str:
    """A number with its sign and two digits, never with an exponent."""
    return f"{value:+.0f}" if abs(value) >= 10 else f"{value:+.2g}"


def describe_differences(table: pd.DataFrame) -> Any:
    """List the measures that differ from the baseline in the table of :func:`paired_differences`, as Markdown for a
    notebook."""
    from IPython.display import Markdown

    table = table[table["measure"].isin(MEASURES)]
    lines = []
    for dataset, part in table.groupby("dataset", sort=False):
        for condition, measures in part.groupby("condition", sort=False):
            without_zero = measures[(measures["low"] > 0) | (measures["high"] < 0)]
            effects = ", ".join(f"{row.measure} {_signed(row.percent)} %" for row in without_zero.itertuples())
            lines.append(f"- **{dataset}**, {condition}: {effects or 'no measure differs from the baseline'}")
    chance = 0.05 * len(table)
    return Markdown(
        f"Differences from the baseline whose 95 % interval over {int(table['seeds'].min())} seeds excludes zero. "
        f"Of {len(table)} intervals about {chance:.1f} would exclude zero by chance alone.\n\n" + "\n".join(lines)
    )
