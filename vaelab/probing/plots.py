"""Figures of accuracies: maps over layers and timesteps, and best layers with their intervals."""

from collections.abc import Mapping

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.figure import Figure

from vaelab import viz
from vaelab.viz.text import plain_text

APART = 0.28
AT_CHANCE, ALL = "#f2f0eb", "#14506e"
WHITE_FROM = 2 / 3
"""Share of the colour scale from which white numbers have more contrast than dark ones."""
NAMES = {"probe": "linear probe", "diffc": "Diff-C"}


@plain_text
def knowledge(tables: Mapping[str, pd.DataFrame], title: str = "") -> Figure:
    """Draw a heat map of blocks by timesteps for every factor (set of classes), with one row of panels per measure.

    The colour scale goes from chance, given above each panel, to 1; the numbers are the measure itself. For
    accuracies it starts at the share of the commonest class, which stands beside 1 / the number of classes. Missing
    values are white.

    Args:
        tables: the tables by the measure's label. Each has one row per layer (block at a timestep) and factor, with
            columns ``block``, ``timestep``, ``factor``, ``value`` (1 is the best) and ``chance``, whose mean is shown.
            Tables of accuracies also have ``uniform``, 1 / the number of classes; their ``chance`` is the commonest
            class's share. The first table has all layers.
        title: the figure's title.
    """
    first = next(iter(tables.values()))
    factors = list(dict.fromkeys(first["factor"]))
    blocks, timesteps = list(dict.fromkeys(first["block"])), sorted(set(first["timestep"]))
    height = 0.34 * len(blocks) + 0.9
    width = max(1.6, 0.46 * len(timesteps) + 0.3)
    colours = sns.blend_palette([AT_CHANCE, ALL], as_cmap=True)
    figure, axes = plt.subplots(
        len(tables), len(factors), figsize=(width * len(factors) + 2.2, height * len(tables) + 0.4), squeeze=False
    )
    for axis in axes.flat:  # each heat map draws all visible ones, which would take most of the time
        axis.set_visible(False)
    for line, (measure, table) in zip(axes, tables.items(), strict=True):
        for axis, factor in zip(line, factors, strict=True):
            own = table[table["factor"] == factor]
            chance = own["chance"].mean()
            wide = own.pivot(index="block", columns="timestep", values="value").reindex(index=blocks, columns=timesteps)
            above = ((wide - chance) / (1 - chance)).clip(0, 1)
            axis.set_visible(True)
            sns.heatmap(
                above, annot=wide, fmt=".2f", annot_kws={"fontsize": 7}, vmin=0, vmax=1, cmap=colours, cbar=False,
                linewidths=0.5, ax=axis, yticklabels=axis is line[0],
            )  # fmt: skip
            for number in axis.texts:
                column, row = map(int, number.get_position())
                number.set_color("white" if above.iat[row, column] >= WHITE_FROM else "0.15")
            axis.set_visible(False)
            axis.grid(visible=False)
            axis.set(xlabel="", ylabel="")
            axis.tick_params(labelsize=8, rotation=0)
            accuracy = "uniform" in own and own["uniform"].notna().all()
            below = (
                f"chance {own['uniform'].mean():.2f}\ncommonest {chance:.2f}" if accuracy else f"chance {chance:.2f}"
            )
            axis.set_title(f"{factor}\n{below}", fontsize=9)
        line[0].set_ylabel(measure, fontsize=10, labelpad=8)
    for axis in axes.flat:
        axis.set_visible(True)
    figure.set_layout_engine("constrained")
    figure.supxlabel("timestep", fontsize=9)
    figure.suptitle(title, fontsize=11)
    return figure


@plain_text
def accuracies(table: pd.DataFrame, title: str = "") -> Figure:
    """Draw accuracies with their 95 % intervals, one line per layer and factor, with marks at chance.

    Args:
        table: columns ``layer``, ``factor``, ``classifier``, ``accuracy``, ``low``, ``high``, ``chance`` (the
            commonest class's share), ``uniform`` (1 / the number of classes), and ``model`` if there are several
            models.
        title: the figure's title.
    """
    several = "model" in table and table["model"].nunique() > 1
    place = table["model"].str.rsplit("/").str[-1] + ", " + table["layer"] if several else table["layer"]
    table = table.assign(line=table["factor"] + "\n" + place)
    lines, classifiers = list(dict.fromkeys(table["line"])), list(dict.fromkeys(table["classifier"]))
    figure, axis = plt.subplots(figsize=(6.5, 0.55 * len(lines) + 1.2), layout="constrained")
    colours = sns.color_palette("deep").as_hex()
    for number, classifier in enumerate(classifiers):
        part = table[table["classifier"] == classifier]
        heights = np.array([lines.index(line) for line in part["line"]]) + APART * (number - (len(classifiers) - 1) / 2)
        ends = np.abs(part[["low", "high"]].to_numpy().T - part["accuracy"].to_numpy())
        name = NAMES.get(classifier, classifier)
        axis.errorbar(part["accuracy"], heights, xerr=ends, fmt="o", color=colours[number], capsize=3, label=name)
    marks = table.groupby("line", sort=False)[["chance", "uniform"]].first().loc[lines]
    for column, label, colour in (
        ("chance", "always the commonest class", viz.SUPPRESSED_COLOUR),
        ("uniform", "chance, 1 / classes", "#6b6b6b"),
    ):
        axis.plot(marks[column], range(len(lines)), "|", color=colour, markersize=22, markeredgewidth=2, label=label)
    axis.set(xlabel="test accuracy, with 95 % interval", xlim=(-0.02, 1.02), ylim=(len(lines) - 0.5, -0.5))
    axis.set_yticks(range(len(lines)), lines, fontsize=8)
    axis.legend(fontsize=8, markerscale=0.5, loc="center left", bbox_to_anchor=(1.0, 0.5))
    axis.set_title(title, fontsize=11)
    return figure
