"""Figures from tensors and tables; nothing here knows a model. Every function returns a Figure."""

import textwrap
from collections.abc import Mapping, Sequence

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from torch import Tensor

SILENT = "#c8102e"
SMALL_PERCENT = 0.1
GAP = 3
PALETTE = {"baseline": "#555555", "nudge": "#3b76af", "control": "#e08e2b", "start": "#b8b8b8"}

sns.set_theme(style="whitegrid", context="notebook", rc={"axes.spines.top": False, "axes.spines.right": False})


def picture_grid(rows: Mapping[str, Tensor], title: str = "", captions: Sequence[str] = ()) -> Figure:
    """Pictures in labelled rows.

    Args:
        rows: for each label pictures (N, 3, H, W) in [-1, 1].
        title: the figure's.
        captions: a text under each column.
    """
    columns = max(len(pictures) for pictures in rows.values())
    figure, axes = plt.subplots(
        len(rows), columns, figsize=(1.1 * columns + 1.4, 1.1 * len(rows) + 0.4), squeeze=False, layout="constrained"
    )
    for line, (label, pictures) in zip(axes, rows.items(), strict=True):
        for axis in line:
            axis.axis("off")
        for axis, picture in zip(line, displayable(pictures), strict=False):
            axis.imshow(picture, interpolation="nearest")
        line[0].text(-0.12, 0.5, label, transform=line[0].transAxes, ha="right", va="center", fontsize=9)
    for axis, caption in zip(axes[-1], captions, strict=False):
        text = "\n".join(textwrap.wrap(caption, 20))
        axis.text(0.5, -0.06, text, transform=axis.transAxes, ha="center", va="top", fontsize=5.5)
    figure.suptitle(title, fontsize=11)
    return figure


def activation_grids(
    maps: Mapping[str, Tensor], silent: Mapping[str, Sequence[int]], picture: Tensor, columns: int = 8, title: str = ""
) -> Figure:
    """One picture's activation maps under several models, suppressed tiles framed (paper, Figure 2).

    Each tile is scaled to its own range, as in the paper, so a suppressed channel can show a
    pattern that is thousands of times too small to matter: its frame says so.

    Args:
        maps: for each model (C, H, W), the layer's activation for ``picture``.
        silent: for each model the suppressed channels.
        picture: (3, R, R) in [-1, 1].
        columns: tiles in a row.
        title: the figure's.
    """
    channels, height, width = next(iter(maps.values())).shape
    lines = -(-channels // columns)
    size = (1.6 + len(maps) * (0.42 * columns + 0.4), 0.42 * lines * height / width + 0.9)
    figure, axes = plt.subplots(
        1, len(maps) + 1, figsize=size, width_ratios=[1.4, *[0.42 * columns] * len(maps)], layout="constrained"
    )
    axes[0].imshow(displayable(picture[None])[0])
    axes[0].set_title("the picture", fontsize=9)
    for axis, (model, activation) in zip(axes[1:], maps.items(), strict=True):
        axis.set_title(f"{model}: {len(silent[model])} of {channels} suppressed", fontsize=9)
        axis.imshow(_mosaic(activation.float().numpy(), columns), cmap="gray", vmin=0, vmax=1, interpolation="nearest")
        for channel in silent[model]:
            corner = (channel % columns * (width + GAP) - 0.5, channel // columns * (height + GAP) - 0.5)
            axis.add_patch(Rectangle(corner, width, height, fill=False, edgecolor=SILENT, linewidth=2, clip_on=False))
    for axis in axes:
        axis.axis("off")
    figure.suptitle(title, fontsize=11)
    return figure


def _mosaic(maps: np.ndarray, columns: int) -> np.ndarray:
    """Maps (C, H, W) as tiles of one picture, each scaled to [0, 1]; a flat one is grey, gaps are white."""
    channels, height, width = maps.shape
    canvas = np.ones((-(-channels // columns) * (height + GAP) - GAP, columns * (width + GAP) - GAP))
    for channel, values in enumerate(maps):
        span = values.max() - values.min()
        top, left = channel // columns * (height + GAP), channel % columns * (width + GAP)
        canvas[top : top + height, left : left + width] = (values - values.min()) / span if span > 0 else 0.5
    return canvas


def curves(table: pd.DataFrame, y: str, ylabel: str, *, log: bool = False, title: str = "") -> Figure:
    """A curve a condition over steps: the mean over seeds, thin lines for the single ones.

    Args:
        table: columns ``step``, ``condition``, ``seed`` and ``y``.
        y: the column to draw.
        ylabel: its name and unit.
        log: a logarithmic axis.
        title: the figure's.
    """
    figure, axis = plt.subplots(figsize=(7, 3.6), layout="constrained")
    _lines(axis, table, y)
    axis.set(xlabel="step", ylabel=ylabel, yscale="log" if log else "linear")
    axis.set_title(title, fontsize=11)
    return figure


def losses(history: pd.DataFrame, validation: pd.DataFrame, kl_weight: float, title: str = "") -> Figure:
    """Training reconstruction, held-out reconstruction and held-out total loss (paper, Figure 3).

    Args:
        history: columns ``step``, ``condition``, ``seed``, ``reconstruction``.
        validation: columns ``step``, ``condition``, ``seed``, ``mse``, ``kl``.
        kl_weight: of the total, mse + kl_weight kl.
        title: the figure's.
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


def suppressed_over_steps(tracked: pd.DataFrame, interventions: Sequence[int], title: str = "") -> Figure:
    """Suppressed channels over training, with a tick for each intervention (paper, Figure 5).

    Args:
        tracked: columns ``step``, ``condition``, ``seed``, ``suppressed``.
        interventions: the steps at which one was made.
        title: the figure's.
    """
    figure = curves(tracked, "suppressed", "suppressed channels", title=title)
    axis = figure.axes[0]
    axis.plot(
        interventions, [0.02] * len(interventions), "|", transform=axis.get_xaxis_transform(), color=PALETTE["nudge"],
        markersize=12, markeredgewidth=1.6, label="intervention",
    )  # fmt: skip
    axis.legend(fontsize=9)
    return figure


def near_zero_weights(table: pd.DataFrame, top: int = 8, title: str = "") -> Figure:
    """Share of near-zero weights of the layers where it is largest, over training (paper, Figure 1).

    Args:
        table: columns ``step``, ``layer``, ``fraction``.
        top: how many layers.
        title: the figure's.
    """
    largest = table.groupby("layer")["fraction"].max().nlargest(top).index
    figure, axis = plt.subplots(figsize=(7, 3.6), layout="constrained")
    shown = table[table["layer"].isin(largest)].assign(percent=lambda t: 100 * t["fraction"])
    sns.lineplot(shown, x="step", y="percent", hue="layer", hue_order=list(largest), ax=axis, errorbar=None)
    axis.set(xlabel="step", ylabel="near-zero weights (%)")
    axis.legend(fontsize=7, title=None, loc="center left", bbox_to_anchor=(1.0, 0.5))
    axis.set_title(title, fontsize=11)
    return figure


def layer_bars(table: pd.DataFrame, threshold: float, title: str = "") -> Figure:
    """For every layer the distribution of m_c and its suppressed share.

    Args:
        table: from :func:`vaelab.channels.channel_table`.
        threshold: theta_act, drawn as a line.
        title: the figure's.
    """
    layers = list(dict.fromkeys(table["layer"]))
    figure, axis = plt.subplots(figsize=(8, 0.24 * len(layers) + 1.2), layout="constrained")
    places = {layer: place for place, layer in enumerate(layers)}
    values = table["mean_abs"].clip(lower=1e-6)
    silent = table["mean_abs"] < threshold
    jitter = np.random.default_rng(0).uniform(-0.3, 0.3, len(table))
    heights = table["layer"].map(places) + jitter
    axis.scatter(values[~silent], heights[~silent], s=5, color=PALETTE["nudge"], alpha=0.5, linewidths=0)
    axis.scatter(values[silent], heights[silent], s=12, color=SILENT, linewidths=0, label="suppressed")
    axis.axvline(threshold, color=SILENT, linewidth=1, linestyle="--", label=f"threshold {threshold:g}")
    counts = silent.groupby(table["layer"]).sum()
    sizes = table["layer"].value_counts()
    axis.set_yticks(list(places.values()), [f"{la} ({counts[la]}/{sizes[la]})" for la in layers], fontsize=7)
    axis.set(xscale="log", xlabel="m_c, mean absolute activation", ylim=(len(layers) - 0.4, -0.6))
    axis.legend(fontsize=8, loc="lower right")
    axis.set_title(title, fontsize=11)
    return figure


def scale_scatter(table: pd.DataFrame, threshold: float, title: str = "") -> Figure:
    """Draw m_c against |gamma|, coloured by |beta|, to see whether the scale is the mechanism.

    Args:
        table: from :func:`vaelab.channels.channel_table`.
        threshold: theta_act, drawn for both axes.
        title: the figure's.
    """
    figure, axis = plt.subplots(figsize=(6, 4.4), layout="constrained")
    gamma, seen = table["gamma"].abs().clip(lower=1e-6), table["mean_abs"].clip(lower=1e-6)
    points = axis.scatter(
        gamma, seen, c=np.log10(table["beta"].abs().clip(lower=1e-6)), s=8, cmap="viridis", linewidths=0
    )
    line = np.geomspace(gamma.min(), gamma.max(), 50)
    axis.plot(line, line * np.sqrt(2 / np.pi), color="#888888", linewidth=1, label="E|gamma z|, z normal")
    axis.axhline(threshold, color=SILENT, linewidth=1, linestyle="--", label=f"threshold {threshold:g}")
    axis.set(xscale="log", yscale="log", xlabel="|gamma|", ylabel="m_c")
    axis.legend(fontsize=8)
    axis.set_title(title, fontsize=11)
    figure.colorbar(points, ax=axis, label="log10 |beta|")
    return figure


def forest(table: pd.DataFrame, title: str = "") -> Figure:
    """Paired differences with their intervals, a panel a measure, on an axis that is linear up to
    ``SMALL_PERCENT`` and logarithmic beyond.

    Args:
        table: columns ``dataset``, ``measure``, ``condition``, ``percent``, ``percent_low``,
            ``percent_high``: the difference to the baseline in percent of it.
        title: the figure's.
    """
    table = table[table["measure"] != "kl_per_entry"]  # in percent it is the KL's
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
        axis.set(xlabel="difference to baseline (%)", xlim=(-reach, reach), ylim=(len(datasets) - 0.5, -0.5))
        axis.set_xticks([tick for tick in (-100, -1, 0, 1, 100) if abs(tick) <= reach])
        axis.xaxis.set_major_formatter("{x:g}")
        axis.minorticks_off()
        axis.set_yticks(range(len(datasets)), datasets)
        axis.set_title(measure, fontsize=10)
    axes[0][-1].legend(fontsize=8)
    figure.suptitle(title, fontsize=11)
    return figure


def bars(table: pd.DataFrame, x: str, y: str, hue: str | None, ylabel: str, title: str = "") -> Figure:
    """Means with every single value as a point.

    Args:
        table: a row a value.
        x: column of the groups.
        y: column of the values.
        hue: column of the colours, or None.
        ylabel: the values' name and unit.
        title: the figure's.
    """
    figure, axis = plt.subplots(figsize=(max(5, 1.25 * table[x].nunique() + 1), 3.6), layout="constrained")
    colours = _palette(table[hue]) if hue else None
    sns.barplot(table, x=x, y=y, hue=hue, palette=colours, ax=axis, errorbar=None, alpha=0.55)
    sns.stripplot(
        table, x=x, y=y, hue=hue, palette=colours, dodge=bool(hue), ax=axis, size=5, legend=False, jitter=False
    )
    if hue:
        sns.move_legend(axis, "center left", bbox_to_anchor=(1.0, 0.5), fontsize=9)  # inside it would hide a bar
    axis.set(xlabel="", ylabel=ylabel)
    axis.tick_params(axis="x", rotation=20)
    axis.set_title(title, fontsize=11)
    return figure


def distributions(table: pd.DataFrame, x: str, y: str, title: str = "") -> Figure:
    """Every single value of each group, with its median and quartiles.

    Args:
        table: a row a value.
        x: column of the groups.
        y: column of the values; its name is the axis's label.
        title: the figure's.
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


def displayable(pictures: Tensor) -> np.ndarray:
    """Pictures (N, 3, H, W) in [-1, 1] as (N, H, W, 3) in [0, 1]."""
    return ((pictures.detach().float().cpu().clamp(-1, 1) + 1) / 2).permute(0, 2, 3, 1).numpy()


def _palette(conditions: pd.Series) -> dict[str, str]:
    spare = sns.color_palette("deep").as_hex()
    names = list(dict.fromkeys(conditions))
    return {name: PALETTE.get(name, spare[i % len(spare)]) for i, name in enumerate(names)}
