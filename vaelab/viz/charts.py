"""Charts of tables: curves, bars, intervals, distributions. Every function returns a matplotlib figure."""

from collections.abc import Mapping

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.figure import Figure

from vaelab.viz.text import plain_text

SUPPRESSED_COLOUR = "#c8102e"
"""The colour of suppressed channels (channels that a GroupNorm nearly switches off), and of thresholds."""
SMALL_PERCENT = 0.1
"""The axis of :func:`forest` is linear up to this value, in percent."""
MEASURES = {
    "mse": "squared error (lower is better)", "kl": "KL divergence (lower is better)",
    "psnr": "PSNR (higher is better)", "ssim": "SSIM (higher is better)",
}  # fmt: skip
"""Measures of a VAE in words."""
PALETTE = {"baseline": "#555555", "nudge": "#3b76af", "control": "#e08e2b", "start": "#b8b8b8"}
"""The colours of the conditions of fine-tuning, see :mod:`vaelab.vae.finetune`: "nudge" raises the GroupNorm scales
(gamma) of suppressed channels, "control" those of as many active channels."""

sns.set_theme(style="whitegrid", context="notebook", rc={"axes.spines.top": False, "axes.spines.right": False})


@plain_text
def curves(table: pd.DataFrame, y: str, ylabel: str, *, log: bool = False, title: str = "") -> Figure:
    """Draw one curve over steps per condition: the mean over seeds, with one thin line per seed.

    Args:
        table: columns ``step``, ``condition``, ``seed`` and ``y``.
        y: the column to draw.
        ylabel: the label of the vertical axis, with the unit.
        log: whether the vertical axis is logarithmic.
        title: the figure's title.
    """
    figure, axis = plt.subplots(figsize=(7, 3.6), layout="constrained")
    _lines(axis, table, y)
    axis.set(xlabel="step", ylabel=ylabel, yscale="log" if log else "linear")
    axis.set_title(title, fontsize=11)
    return figure


@plain_text
def losses(history: pd.DataFrame, validation: pd.DataFrame, kl_weight: float, title: str = "") -> Figure:
    """Draw training reconstruction, held-out reconstruction and held-out total loss (paper, Figure 3).

    Args:
        history: columns ``step``, ``condition``, ``seed``, ``reconstruction``.
        validation: columns ``step``, ``condition``, ``seed``, ``mse``, ``kl``.
        kl_weight: the weight beta in the total loss, mse + beta kl.
        title: the figure's title.
    """
    total = validation["mse"] + kl_weight * validation["kl"]
    panels = {
        "training MSE": (history, history["reconstruction"]),
        "held-out MSE": (validation, validation["mse"]),
        "held-out total loss": (validation, total),
    }
    figure, axes = plt.subplots(1, 3, figsize=(13, 3.4), layout="constrained")
    for axis, (label, (table, values)) in zip(axes, panels.items(), strict=True):
        _lines(axis, table.assign(value=values), "value")
        axis.set(xlabel="step", ylabel=label, yscale="log")
        axis.legend(fontsize=8)
    figure.suptitle(title, fontsize=11)
    return figure


@plain_text
def forest(table: pd.DataFrame, title: str = "") -> Figure:
    """Draw paired differences with their intervals, one panel per measure.

    The axis is linear up to ``SMALL_PERCENT`` and logarithmic beyond.

    Args:
        table: columns ``dataset``, ``measure``, ``condition``, and ``percent``, ``percent_low``, ``percent_high``: the
            difference to the baseline and its interval, in percent of the baseline.
        title: the figure's title.
    """
    table = table[table["measure"] != "kl_per_entry"]  # in percent it is the same as the KL
    measures = list(dict.fromkeys(table["measure"]))
    datasets = list(dict.fromkeys(table["dataset"]))
    figure, axes = plt.subplots(
        1, len(measures), figsize=(2.9 * len(measures) + 1, 0.6 * len(datasets) + 1.5), sharey=True, squeeze=False,
        layout="constrained",
    )  # fmt: skip
    for axis, measure in zip(axes[0], measures, strict=True):
        for shift, condition in ((-0.13, "nudge"), (0.13, "control")):
            part = table[(table["measure"] == measure) & (table["condition"] == condition)]
            if part.empty:
                continue
            heights = np.array([datasets.index(name) for name in part["dataset"]]) + shift
            ends = np.abs(part[["percent_low", "percent_high"]].to_numpy().T - part["percent"].to_numpy())
            axis.errorbar(
                part["percent"], heights, xerr=ends, fmt="o", color=PALETTE[condition], capsize=3, label=condition
            )
        axis.axvline(0, color="#444444", linewidth=1)
        axis.set_xscale("symlog", linthresh=SMALL_PERCENT)
        reach = 1.5 * max(1, np.abs(axis.get_xlim()).max())
        axis.set(xlabel="difference (%)", xlim=(-reach, reach), ylim=(len(datasets) - 0.5, -0.5))
        outer = [100] if reach > 100 else [10] if reach > 10 else []
        inner = [SMALL_PERCENT, 1, *outer]
        axis.set_xticks([*(-tick for tick in inner), 0, *inner])
        axis.xaxis.set_major_formatter("{x:g}")
        axis.tick_params(axis="x", labelsize=8)
        axis.minorticks_off()
        axis.axvspan(-SMALL_PERCENT, SMALL_PERCENT, color="#eef1f4", zorder=0)
        axis.set_yticks(range(len(datasets)), datasets)
        axis.set_title(MEASURES.get(measure, measure), fontsize=10)
    figure.legend(*axes[0][0].get_legend_handles_labels(), loc="outside right upper", fontsize=8)
    figure.suptitle(title, fontsize=11)
    figure.supxlabel(f"shaded: the axis is linear up to ±{SMALL_PERCENT:g} % and logarithmic beyond", fontsize=8)
    return figure


@plain_text
def bars(table: pd.DataFrame, x: str, y: str, hue: str | None, ylabel: str, title: str = "") -> Figure:
    """Draw a bar at the mean of each group, and every value as a point.

    Args:
        table: one row per value.
        x: the column of the groups.
        y: the column of the values.
        hue: the column shown as colour; None means one colour.
        ylabel: the name and unit of the values.
        title: the figure's title.
    """
    figure, axis = plt.subplots(figsize=(max(5, 1.25 * table[x].nunique() + 1), 3.6), layout="constrained")
    colours = {"palette": _palette(table[hue])} if hue else {"color": PALETTE["nudge"]}
    sns.barplot(table, x=x, y=y, hue=hue, **colours, ax=axis, errorbar=None, alpha=0.55)
    sns.stripplot(table, x=x, y=y, hue=hue, **colours, dodge=bool(hue), ax=axis, size=5, legend=False, jitter=False)
    if axis.get_legend():  # seaborn makes no legend if the colours repeat the labels under the bars
        sns.move_legend(axis, "center left", bbox_to_anchor=(1.0, 0.5), fontsize=9)  # inside it would hide a bar
    axis.set(xlabel="", ylabel=ylabel)
    axis.tick_params(axis="x", rotation=20)
    axis.set_title(title, fontsize=11)
    return figure


@plain_text
def distributions(table: pd.DataFrame, x: str, y: str, title: str = "") -> Figure:
    """Draw every value of each group, with the group's median and quartiles.

    Args:
        table: one row per value.
        x: the column of the groups.
        y: the column of the values; its name becomes the label of the axis.
        title: the figure's title.
    """
    figure, axis = plt.subplots(figsize=(1.2 * table[x].nunique() + 2.5, 3.4), layout="constrained")
    sns.boxplot(table, x=x, y=y, ax=axis, color="#dddddd", showfliers=False, width=0.5)
    sns.stripplot(table, x=x, y=y, ax=axis, size=3, alpha=0.6, color=PALETTE["nudge"])
    axis.set_xlabel("")
    axis.set_title(title, fontsize=11)
    return figure


def _lines(axis: plt.Axes, table: pd.DataFrame, y: str) -> None:
    palette = _palette(table["condition"])
    sns.lineplot(table, x="step", y=y, hue="condition", palette=palette, ax=axis, errorbar=None, linewidth=2)
    for (condition, _), part in table.groupby(["condition", "seed"], sort=False):
        axis.plot(part["step"], part[y], color=palette[condition], linewidth=0.6, alpha=0.5)


def _palette(conditions: pd.Series) -> dict[str, str]:
    spare = sns.color_palette("deep").as_hex()
    names = list(dict.fromkeys(conditions))
    return {name: PALETTE.get(name, spare[i % len(spare)]) for i, name in enumerate(names)}


@plain_text
def summary_bars(values: Mapping[str, float] | pd.Series, label: str, title: str = "") -> Figure:
    """Draw a few values as horizontal bars with large text, for a thumbnail of 480 by 300 pixels.

    Args:
        values: the values by name; at most eight are readable.
        label: the name and unit of the values.
        title: the figure's title, at most 40 characters.
    """
    figure, axis = plt.subplots(figsize=(4.8, 3.0), layout="constrained")
    values = pd.Series(values, dtype=float)
    bars = axis.barh(values.index, values, color=PALETTE["nudge"])
    axis.bar_label(bars, fmt="{:.3g}", padding=3, fontsize=10)
    axis.margins(x=0.18 if values.min() >= 0 else 0.34)  # labels of negative bars stand beside the names
    axis.invert_yaxis()
    axis.grid(axis="y", visible=False)
    axis.tick_params(labelsize=10)
    axis.set_xlabel(label, fontsize=10)
    axis.set_title(title, fontsize=11)
    return figure
