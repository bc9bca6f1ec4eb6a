"""Figures of training curves, and of autoencoders compared by block, k and n_features."""

import time
from collections.abc import Callable, Mapping
from typing import Any

import matplotlib.pyplot as plt
import pandas as pd
import seaborn as sns
from matplotlib.figure import Figure

from vaelab import viz
from vaelab.viz.text import plain_text

MEASURES = {
    "loss": "loss",
    "explained_variance": "explained variance",
    "l0": "active features",
    "dead_fraction": "dead features",
}
"""Columns of a training history, and their labels."""
SMALL_CHANGE = 0.1
"""The Manhattan distance up to which the axis of :func:`manhattan_bars` is linear."""


@plain_text
def training_curves(history: pd.DataFrame, title: str = "") -> Figure:
    """Draw loss, explained variance, L0 and dead fraction over steps: one row per metric, one column per block.

    Args:
        history: columns ``step``, ``block``, ``k``, ``n_features``, ``seed`` and those of :data:`MEASURES`; each seed
            is drawn as a line.
        title: the figure's title.
    """
    blocks = list(dict.fromkeys(history["block"]))
    figure, axes = plt.subplots(
        len(MEASURES), len(blocks), figsize=(2.9 * len(blocks) + 1.2, 1.75 * len(MEASURES) + 0.5), sharex=True,
        sharey="row", squeeze=False, layout="constrained",
    )  # fmt: skip
    colours = _colours(history["k"])
    for line, (measure, label) in zip(axes, MEASURES.items(), strict=True):
        for axis, block in zip(line, blocks, strict=True):
            sns.lineplot(
                history[history["block"] == block], x="step", y=measure, hue="k", style="n_features", palette=colours,
                units="seed", estimator=None, ax=axis, linewidth=1.2, legend=bool(axis is axes[0][-1]),
            )  # fmt: skip
            axis.set(ylabel=label if axis is line[0] else "")
            if measure == "dead_fraction":
                axis.set_ylim(-0.02, None)
    for axis, block in zip(axes[0], blocks, strict=True):
        axis.set(yscale="log")
        axis.set_title(block, fontsize=10)
    handles, labels = axes[0][-1].get_legend_handles_labels()
    axes[0][-1].get_legend().remove()
    figure.legend(handles, labels, fontsize=8, loc="outside right upper")
    figure.suptitle(title, fontsize=11)
    return figure


class LiveCurves:
    """Training curves that are redrawn in one output of a notebook every few seconds.

    ::

        train_saes(..., live=LiveCurves(lambda history: label_history(history, specs)))
    """

    def __init__(self, prepare: Callable[[pd.DataFrame], pd.DataFrame], every: float = 15.0):
        """Args: the function that turns a history into the table for :func:`training_curves`, and the seconds between
        drawings."""
        self._prepare, self._every, self._place = prepare, every, None
        self._drawn = time.perf_counter()

    def __call__(self, history: pd.DataFrame) -> None:
        """Redraw if enough time has passed."""
        if time.perf_counter() - self._drawn < self._every:
            return
        from IPython.display import display

        figure = training_curves(self._prepare(history), f"so far: {int(history['step'].max())} steps")
        if self._place is None:
            self._place = display(figure, display_id=True)
        elif self._place:
            self._place.update(figure)
        plt.close(figure)
        self._drawn = time.perf_counter()


@plain_text
def size_curves(table: pd.DataFrame, title: str = "") -> Figure:
    """Draw explained variance and dead features against k: one column of panels per block, one line per n_features;
    several seeds are shown as their mean and range.

    Args:
        table: columns ``block``, ``k``, ``n_features``, ``explained_variance`` and ``dead_fraction``.
        title: the figure's title.
    """
    values = {name: MEASURES[name] for name in ("explained_variance", "dead_fraction")}
    blocks = list(dict.fromkeys(table["block"]))
    figure, axes = plt.subplots(
        len(values), len(blocks), figsize=(2.6 * len(blocks) + 1.4, 2.4 * len(values) + 0.4), sharex=True, sharey="row",
        squeeze=False, layout="constrained",
    )  # fmt: skip
    colours = _colours(table["n_features"])
    for line, (value, label) in zip(axes, values.items(), strict=True):
        for axis, block in zip(line, blocks, strict=True):
            own = table[table["block"] == block]
            last = bool(axis is axes[0][-1])
            sns.lineplot(
                own, x="k", y=value, hue="n_features", palette=colours, marker="o", errorbar=("pi", 100), ax=axis,
                legend=last,
            )  # fmt: skip
            axis.set(xlabel="k, active features", ylabel=label if axis is line[0] else "")
            axis.set_xticks(sorted(set(table["k"])))
    for axis, block in zip(axes[0], blocks, strict=True):
        axis.set_title(block, fontsize=10)
    if axes[0][-1].get_legend():
        axes[0][-1].legend(title="n_features", fontsize=7, title_fontsize=8)
    figure.suptitle(title, fontsize=11)
    return figure


def _colours(values: pd.Series) -> dict:
    names = sorted(set(values))
    return dict(zip(names, sns.color_palette("viridis", len(names)).as_hex(), strict=True))


@plain_text
def manhattan_bars(outcomes: Mapping[tuple, Any], hue: str, title: str = "") -> Figure:
    """Draw the Manhattan distance per pixel of every picture, and the means.

    The axis is linear up to ``SMALL_CHANGE`` and logarithmic beyond, because a few pictures change a hundred times as
    much as most.

    Args:
        outcomes: outcomes whose table ``effects`` has a column ``manhattan``. Each key is a pair: the group along the
            axis, and the value of the quantity shown as colour.
        hue: the name of the quantity shown as colour.
        title: the figure's title.
    """
    parts = [
        outcome.effects.assign(group=str(group), **{hue: str(colour)}) for (group, colour), outcome in outcomes.items()
    ]
    ylabel = "Manhattan distance per pixel"
    effects = pd.concat(parts, ignore_index=True)
    figure = viz.bars(effects, "group", "manhattan", hue, ylabel, title)
    figure.axes[0].set_yscale("symlog", linthresh=SMALL_CHANGE)
    figure.axes[0].yaxis.set_major_formatter("{x:g}")
    figure.axes[0].set_ylim(0, 1.5 * max(SMALL_CHANGE, effects["manhattan"].max()))
    return figure
