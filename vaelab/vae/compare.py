"""What several runs say together: tables over seeds and conditions, and the paper's beside them.

From Shi, Wang and Roshka, section 5, whose table compares single runs; here the differences are
paired by seed and carry an interval.
"""

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from vaelab.core.io import read_json
from vaelab.core.paths import resolve
from vaelab.core.stats import Interval, paired_interval
from vaelab.data.images import short_name
from vaelab.vae.finetune import VAERun, read_run

MEASURES = ("mse", "kl", "psnr", "ssim")
PAPER_TABLE_1 = {
    "ImageNette-256": {"baseline": (10.443e-3, 3361.52, 25.833, 0.8077), "nudge": (10.396e-3, 3351.61, 25.853, 0.8086)},
    "CIFAR-10": {"baseline": (2.879e-3, 994.63, 31.429, 0.9195), "nudge": (2.826e-3, 997.53, 31.509, 0.9210)},
    "Google Fonts": {"baseline": (2.451e-3, 6363.02, 32.138, 0.9917), "nudge": (2.470e-3, 6313.26, 32.105, 0.9916)},
}
"""MSE, KL, PSNR and SSIM of Shi, Wang and Roshka, Table 1: one run each."""
PAPER_KIN = {
    **dict.fromkeys(("imagenette", "photos"), "ImageNette-256"),
    **dict.fromkeys(("cifar10", "digits"), "CIFAR-10"),
    **dict.fromkeys(("genfonts_data", "glyphs"), "Google Fonts"),
}
"""Which row of it a data set answers to; the embedded sets stand for the paper's kinds of data."""


class Comparison(NamedTuple):
    """A finished run of notebook 10."""

    dataset: str
    """Short name of its data set."""
    params: dict[str, Any]
    folder: Path
    runs: list[VAERun]

    def weights(self, condition: str) -> Path:
        """The diffusers folder of the first seed's model under a condition."""
        return self.folder / "runs" / f"{condition}-seed{self.params['seeds'][0]}" / "vae"


def read_comparison(folder: str) -> Comparison:
    """Read what a run of notebook 10 left in its output folder.

    Raises:
        ValueError: the run has not finished, or has a single seed.
    """
    place = resolve(folder)
    if not (place / "results.json").exists():
        raise ValueError(
            f"runs: {folder!r} holds no finished run of 10_finetune_vae; run it first "
            f"(make run P={folder.replace('outputs/', 'params/', 1)}.yaml)"
        )
    params = read_json(place / "results.json")["params"]
    names = [f"{condition}-seed{seed}" for seed in params["seeds"] for condition in params["conditions"]]
    runs = [read_run(place / "runs" / name) for name in names]
    if len(params["seeds"]) < 2:
        raise ValueError(f"runs: {folder!r} has one seed; an interval needs two or more")
    return Comparison(short_name(params["dataset"]), params, place, runs)


def read_comparisons(folders: list[str]) -> list[Comparison]:
    """Read several runs of notebook 10, one a data set.

    Raises:
        ValueError: see :func:`read_comparison`; or two of one data set.
    """
    studies = [read_comparison(folder) for folder in folders]
    names = [one.dataset for one in studies]
    if len(set(names)) < len(names) or not names:
        raise ValueError(f"runs: expected one run of each data set, got {names}")
    return studies


def run_log_table(runs: list[VAERun], part: str) -> pd.DataFrame:
    """One of the logs of several runs (``history``, ``tracked``, ``validation``, ``interventions``)
    as a table with the columns ``condition`` and ``seed``."""
    return pd.DataFrame([{"condition": r.condition, "seed": r.seed, **row} for r in runs for row in getattr(r, part)])


def near_zero_table(runs: list[VAERun]) -> pd.DataFrame:
    """The near-zero weights of several runs: a row for every run, tracked step and layer."""
    return pd.DataFrame(
        [
            {"condition": run.condition, "seed": run.seed, "step": row["step"], "layer": layer, "fraction": fraction}
            for run in runs
            for row in run.tracked
            for layer, fraction in row["near_zero"].items()
        ]
    )


def paired_differences(runs: list[VAERun], dataset: str) -> pd.DataFrame:
    """The paper's Table 1 as paired differences to the baseline, with 95 % intervals over seeds
    (which are not numbers where there is one seed).

    Returns:
        A row a condition and measure: ``baseline`` and ``value`` (means), ``difference``, ``low``,
        ``high``, the same in percent of the baseline, and ``seeds``.
    """
    values = {(run.condition, run.seed): run.validation[-1] for run in runs}
    seeds = sorted({run.seed for run in runs})
    rows = []
    for condition in dict.fromkeys(run.condition for run in runs if run.condition != "baseline"):
        for measure in (*MEASURES, "kl_per_entry"):
            first, second = ([values[one, seed][measure] for seed in seeds] for one in ("baseline", condition))
            interval = paired_interval(first, second) if len(seeds) > 1 else _unsure(first, second)
            base = float(np.mean(first))
            percents = {
                f"percent{suffix}": 100 * value / abs(base)
                for suffix, value in zip(("", "_low", "_high"), interval, strict=True)
            }
            rows.append(
                {"dataset": dataset, "condition": condition, "measure": measure, "seeds": len(seeds), "baseline": base,
                 "value": float(np.mean(second)), "difference": interval.mean, "low": interval.low,
                 "high": interval.high, **percents}
            )  # fmt: skip
    return pd.DataFrame(rows)


def condition_means(runs: list[VAERun]) -> dict[str, float]:
    """Means over seeds: the suppressed channels before training, and for every condition the
    measures and the suppressed channels at the end, and the number of touched entries."""
    values = {"suppressed.start": float(np.mean([run.validation[0]["suppressed"] for run in runs]))}
    for condition in dict.fromkeys(run.condition for run in runs):
        own = [run for run in runs if run.condition == condition]
        for measure in ("suppressed", *MEASURES, "kl_per_entry"):
            values[f"{condition}.{measure}"] = float(np.mean([run.validation[-1][measure] for run in own]))
        values[f"{condition}.touched"] = float(
            np.mean([sum(len(row["channels"]) for row in run.interventions) for run in own])
        )
    return values


def _unsure(first: list[float], second: list[float]) -> Interval:
    return Interval(second[0] - first[0], float("nan"), float("nan"))


def suppressed_counts(studies: list[Comparison]) -> pd.DataFrame:
    """Suppressed channels before training and after it: a row a data set, seed, and ``when``
    (``start``, or the condition that was trained under)."""
    return pd.DataFrame(
        [
            {"dataset": one.dataset, "seed": run.seed, "when": when, "suppressed": run.validation[place]["suppressed"]}
            for one in studies
            for run in one.runs
            for when, place in ((run.condition, -1), *((("start", 0),) if run.condition == "baseline" else ()))
        ]
    )


def suppressed_means(studies: list[Comparison]) -> dict[str, float]:
    """``<dataset>.suppressed.start`` and ``.end``, of the baseline, means over seeds."""
    counts = suppressed_counts(studies).groupby(["dataset", "when"])["suppressed"].mean()
    names = {"start": "start", "end": "baseline"}
    return {f"{one.dataset}.suppressed.{end}": float(counts[one.dataset, when])
            for one in studies for end, when in names.items()}  # fmt: skip


def beside_paper(table: pd.DataFrame) -> pd.DataFrame:
    """The nudge's difference here, in percent of the baseline, beside the paper's for its own data
    (or, for an embedded set, for the data of the paper that it stands for)."""
    rows = []
    for row in table[(table["condition"] == "nudge") & table["measure"].isin(MEASURES)].to_dict("records"):
        kin = PAPER_KIN.get(row["dataset"])
        paper = None
        if kin:
            base, nudged = (PAPER_TABLE_1[kin][one][MEASURES.index(row["measure"])] for one in ("baseline", "nudge"))
            paper = 100 * (nudged - base) / base
        rows.append(
            {"dataset": row["dataset"], "measure": row["measure"], "paper's data": kin, "paper %": paper,
             "here %": row["percent"], "here % low": row["percent_low"], "here % high": row["percent_high"]}
        )  # fmt: skip
    return pd.DataFrame(rows)


def describe_differences(table: pd.DataFrame) -> Any:
    """What the intervals say, in plain words, as Markdown."""
    from IPython.display import Markdown

    table = table[table["measure"].isin(MEASURES)]
    lines = []
    for dataset, part in table.groupby("dataset", sort=False):
        for condition, own in part.groupby("condition", sort=False):
            clear = own[(own["low"] > 0) | (own["high"] < 0)]
            effects = ", ".join(f"{row.measure} {row.percent:+.2g} %" for row in clear.itertuples())
            lines.append(f"- **{dataset}**, {condition}: {effects or 'no measure differs from the baseline'}")
    chance = 0.05 * len(table)
    return Markdown(
        f"What differs from the baseline, by 95 % intervals over {int(table['seeds'].min())} seeds. Of {len(table)} "
        f"intervals about {chance:.1f} would miss zero by chance alone.\n\n" + "\n".join(lines)
    )
