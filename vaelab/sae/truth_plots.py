"""Figures of :mod:`vaelab.sae.truth`: F1 against concepts per dimension, methods compared, stability of features."""

from collections.abc import Mapping

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from vaelab.sae.truth import Stability
from vaelab.viz.text import plain_text

STYLES = {
    "sae": ("trained SAE", "#c8102e", "-"),
    "batchtopk": ("trained, batch top-k", "#e2687c", "-"),
    "matryoshka": ("trained, Matryoshka", "#f0a3ae", "-"),
    "frozen_decoder": ("frozen decoder", "#3b76af", "-"),
    "soft_frozen": ("soft-frozen decoder", "#7fa8d0", "-"),
    "frozen_encoder": ("frozen encoder", "#1f4a75", "-"),
    "untrained": ("untrained SAE", "#a9c4e0", "--"),
    "neurons": ("neurons", "#555555", "-"),
    "pca": ("PCA", "#9a9a9a", "-"),
    "ica": ("ICA", "#e08e2b", "-"),
    "random": ("random directions", "#c9c9c9", "--"),
    "mean_difference": ("difference of means", "#6aa84f", "-"),
    "probe": ("linear probe (ceiling)", "#274e13", ":"),
    "everything": ("every patch (chance)", "#d9b38c", ":"),
}
"""Label, colour and line of each method."""
LABELS = {method: label for method, (label, _, _) in STYLES.items()}


@plain_text
def against_density(panels: Mapping[str, pd.DataFrame], title: str = "") -> Figure:
    """Draw F1 against the number of concepts per dimension, one line per method, with intervals.

    Args:
        panels: for each panel's title the columns ``concepts_per_dimension``, ``method``, ``f1``, ``f1_low`` and
            ``f1_high``.
        title: the figure's title.
    """
    figure, axes = plt.subplots(
        1, len(panels), figsize=(4.6 * len(panels) + 2.2, 4.2), squeeze=False, layout="constrained"
    )
    drawn = {}
    for axis, (name, table) in zip(axes[0], panels.items(), strict=True):
        points = table.groupby("method").size()  # methods that were tried at one density only are not drawn
        present = [method for method in STYLES if points.get(method, 0) == points.max()]
        for shift, method in zip(np.linspace(-0.03, 0.03, len(present)), present, strict=True):
            label, colour, line = STYLES[method]
            own = table[table["method"] == method].sort_values("concepts_per_dimension")
            x = own["concepts_per_dimension"] * (1 + shift)
            ends = np.abs(own[["f1_low", "f1_high"]].to_numpy().T - own["f1"].to_numpy())
            bold = method == "sae"
            drawn[label] = axis.errorbar(
                x, own["f1"], yerr=ends, color=colour, linestyle=line, marker="o", markersize=6 if bold else 4,
                linewidth=2.8 if bold else 1.4, capsize=2, zorder=5 if bold else 3,
            )  # fmt: skip
        ticks = sorted(set(table["concepts_per_dimension"]))
        axis.set_xscale("log")
        axis.set_xticks(ticks, [f"{tick:.2g}" for tick in ticks])
        axis.minorticks_off()
        axis.set(xlabel="concepts per dimension", ylim=(0, 1.04))
        axis.set_title(name, fontsize=11)
    axes[0][0].set_ylabel("F1 of the best feature, held out")
    figure.legend(drawn.values(), drawn.keys(), loc="outside right center", fontsize=9, frameon=False)
    figure.suptitle(title, fontsize=12)
    return figure


@plain_text
def method_forest(table: pd.DataFrame, key: str, score: str, xlabel: str, title: str = "") -> Figure:
    """Draw a score of every method with its interval, one panel per value of ``key``, sorted by the mean.

    Args:
        table: columns ``method``, ``key``, ``score``, ``<score>_low`` and ``<score>_high``.
        key: the column of the panels.
        score: the column to draw.
        xlabel: its name.
        title: the figure's title.
    """
    order = table.groupby("method")[score].mean().sort_values().index
    keys = list(dict.fromkeys(table[key]))
    figure, axes = plt.subplots(
        1, len(keys), figsize=(3.3 * len(keys) + 2.2, 0.34 * len(order) + 1.3), sharey=True, sharex=True,
        squeeze=False, layout="constrained",
    )  # fmt: skip
    for axis, name in zip(axes[0], keys, strict=True):
        own = table[table[key] == name].set_index("method").reindex(order)
        for height, (method, row) in enumerate(own.iterrows()):
            ends = [[row[score] - row[f"{score}_low"]], [row[f"{score}_high"] - row[score]]]
            axis.errorbar(
                row[score], height, xerr=np.abs(ends), fmt="D" if method == "sae" else "o", color=STYLES[method][1],
                markersize=8 if method == "sae" else 6, capsize=3, linewidth=2,
            )  # fmt: skip
        axis.axvline(own.loc["sae", score], color=STYLES["sae"][1], linewidth=1, linestyle=":", zorder=0)
        axis.set_xlabel(xlabel)
        axis.set_title(name, fontsize=11)
        axis.grid(axis="y", visible=False)
    axes[0][0].set_yticks(range(len(order)), [STYLES[method][0] for method in order])
    for text, method in zip(axes[0][0].get_yticklabels(), order, strict=True):
        text.set_fontweight("bold" if method == "sae" else "normal")
    figure.suptitle(title, fontsize=12)
    return figure


@plain_text
def stability_scatter(found: Mapping[str, Stability], title: str = "") -> Figure:
    """Draw every feature's gain in F1 against how well it is found again from other seeds, one panel per block."""
    figure, axes = plt.subplots(
        1, len(found), figsize=(3.5 * len(found) + 0.6, 3.5), sharey=True, sharex=True, squeeze=False,
        layout="constrained",
    )  # fmt: skip
    for axis, (block, own) in zip(axes[0], found.items(), strict=True):
        axis.scatter(
            own.features["cosine"], own.features["gain"], s=22, color=STYLES["sae"][1], alpha=0.55, edgecolor="white"
        )
        axis.axvline(own.untrained, color="#555555", linestyle="--", linewidth=1)
        axis.text(
            own.untrained, 0.97, " untrained", fontsize=8, color="#555555", va="top",
            transform=axis.get_xaxis_transform(), bbox={"facecolor": "white", "edgecolor": "none", "pad": 1},
        )  # fmt: skip
        axis.set_title(f"{block}: rank correlation {own.correlation:.2f}", fontsize=10)
        axis.set_xlabel("cosine with its match")
    axes[0][0].set_ylabel("F1 above chance, best concept")
    figure.suptitle(title, fontsize=12)
    return figure
