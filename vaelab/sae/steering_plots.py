"""Figures of :mod:`vaelab.sae.steering_scores`: effect against damage, and steered pictures."""

from collections.abc import Mapping

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from torch import Tensor

from vaelab.sae.steering_scores import DIRECTIONS, PROMPT
from vaelab.sae.truth_plots import STYLES
from vaelab.viz.grids import displayable
from vaelab.viz.text import plain_text

WAY_TITLES = {
    "add": "add the direction",
    "replace": "replace what was written",
    "clamp": "clamp to amounts seen",
}
SHADES = {"random": "#8a8a8a"}
"""Colours that differ from those of :data:`vaelab.sae.truth_plots.STYLES`, where the line is dashed and light."""


@plain_text
def effect_against_damage(curve: pd.DataFrame, ceiling: pd.DataFrame, title: str = "") -> Figure:
    """Draw effect, and below it selectivity, against damage: one line over strength per direction, one column per way.

    Args:
        curve: rows of :func:`vaelab.sae.steering_scores.steering_curve` of one block.
        ceiling: the row of the prompts that name the values.
        title: the figure's title.
    """
    ways = [way for way in WAY_TITLES if way in set(curve["way"])]
    figure, axes = plt.subplots(
        2, len(ways), figsize=(3.6 * len(ways) + 1.9, 6.2), sharex=True, sharey="row", squeeze=False,
        layout="constrained",
    )  # fmt: skip
    top, drawn = ceiling.iloc[0], {}
    for line, measure, label in zip(axes, ("effect", "selectivity"), ("effect", "other factors kept"), strict=True):
        for axis, way in zip(line, ways, strict=True):
            start = 0.0 if measure == "effect" else 1.0
            for name in DIRECTIONS:
                own = curve[(curve["way"] == way) & (curve["direction"] == name)].sort_values("strength")
                ends = np.abs(own[[f"{measure}_low", f"{measure}_high"]].to_numpy().T - own[measure].to_numpy())
                colour, dash = SHADES.get(name, STYLES[name][1]), STYLES[name][2]
                axis.plot([1, *own["damage"]], [start, *own[measure]], color=colour, linestyle=dash, linewidth=1.8)
                axis.errorbar(
                    own["damage"], own[measure], yerr=ends, fmt="none", color=colour, alpha=0.45, linewidth=1.2
                )
                sizes = 20 + 90 * np.linspace(0, 1, len(own))
                drawn[STYLES[name][0]] = axis.scatter(
                    own["damage"], own[measure], s=sizes, color=colour, edgecolor="white", linewidth=0.8, zorder=4
                )
            drawn["prompt that names it"] = axis.scatter(
                top["damage"], top[measure], marker="*", s=260, color="#f2b705", edgecolor="#7a5c00", zorder=5
            )
            axis.scatter(1, start, s=26, facecolor="white", edgecolor="#444444", zorder=3)
            axis.set_xscale("log")
            axis.set_ylim(-0.05, 1.08)
            axis.axvline(1, color="#bbbbbb", linewidth=1, zorder=0)
            axis.xaxis.set_major_formatter("{x:g}")
            axis.xaxis.set_minor_formatter("{x:g}")
            axis.tick_params(axis="x", which="both", labelsize=8)
        line[0].set_ylabel(label)
    for axis, way in zip(axes[0], ways, strict=True):
        axis.set_title(WAY_TITLES[way], fontsize=11)
    figure.supxlabel(
        "damage: the denoiser's loss on the picture, relative to pictures without steering (larger points: stronger)",
        fontsize=10,
    )
    figure.legend(drawn.values(), drawn.keys(), loc="outside right center", fontsize=9, frameon=False)
    figure.suptitle(title, fontsize=12)
    return figure


@plain_text
def steered_pictures(examples: Mapping[str, Mapping[str, Tensor]], title: str = "") -> Figure:
    """Show scenes steered to values, one column per value.

    Args:
        examples: the pictures of :meth:`vaelab.sae.steering_scores.SteeringExperiment.examples`.
        title: the figure's title.
    """
    rows = list(next(iter(examples.values())))
    figure, axes = plt.subplots(
        len(rows), len(examples), figsize=(1.15 * len(examples) + 2.1, 1.15 * len(rows) + 1.1), squeeze=False,
        layout="constrained",
    )  # fmt: skip
    for column, (name, pictures) in zip(axes.T, examples.items(), strict=True):
        for axis, row in zip(column, rows, strict=True):
            axis.imshow(displayable(pictures[row][None])[0], interpolation="nearest")
            axis.axis("off")
        column[0].set_title(name.replace(": ", "\n"), fontsize=9)
    for axis, row in zip(axes[:, 0], rows, strict=True):
        label = "prompt that names it" if row == PROMPT else STYLES[row][0] if row in STYLES else row
        axis.text(-0.12, 0.5, label, transform=axis.transAxes, ha="right", va="center", fontsize=9)
    figure.suptitle(title, fontsize=12)
    return figure
