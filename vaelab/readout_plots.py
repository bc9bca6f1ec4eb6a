"""Figures of what classifiers read off layers."""

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.figure import Figure

from vaelab import plots  # whose theme these have too

APART = 0.28


def accuracies(table: pd.DataFrame, title: str = "") -> Figure:
    """Accuracies with their intervals, a line a layer and factor, and a mark where chance is.

    Args:
        table: columns ``layer``, ``factor``, ``classifier``, ``accuracy``, ``low``, ``high``, ``chance``.
        title: the figure's.
    """
    table = table.assign(line=table["factor"] + "\n" + table["layer"])
    lines, classifiers = list(dict.fromkeys(table["line"])), list(dict.fromkeys(table["classifier"]))
    figure, axis = plt.subplots(figsize=(6.5, 0.55 * len(lines) + 1.2), layout="constrained")
    colours = sns.color_palette("deep").as_hex()
    for number, classifier in enumerate(classifiers):
        part = table[table["classifier"] == classifier]
        heights = np.array([lines.index(line) for line in part["line"]]) + APART * (number - (len(classifiers) - 1) / 2)
        ends = np.abs(part[["low", "high"]].to_numpy().T - part["accuracy"].to_numpy())
        axis.errorbar(part["accuracy"], heights, xerr=ends, fmt="o", color=colours[number], capsize=3, label=classifier)
    chance = table.groupby("line", sort=False)["chance"].first()
    axis.plot(chance[lines], range(len(lines)), "|", color=plots.SILENT, markersize=22, label="the most frequent class")
    axis.set(xlabel="test accuracy, with 95 % interval", xlim=(-0.02, 1.02), ylim=(len(lines) - 0.5, -0.5))
    axis.set_yticks(range(len(lines)), lines, fontsize=8)
    axis.legend(fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
    axis.set_title(title, fontsize=11)
    return figure
