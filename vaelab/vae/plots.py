"""Plot a VAE's channels: activation maps, suppressed channels, scales, and near-zero weights.

After Figures 1, 2 and 5 of Shi, Wang and Roshka ("Investigating the Functional Role of Learned Channel Suppression in
Diffusion VAEs").
"""

import math
from collections.abc import Mapping, Sequence

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from torch import Tensor

from vaelab.viz.charts import PALETTE, SUPPRESSED_COLOUR, curves
from vaelab.viz.grids import displayable
from vaelab.viz.text import plain_text

GAP = 3
"""Pixels between the tiles of a mosaic."""
LOWEST_SHOWN = 1e-6
"""Smaller values are drawn here, since a logarithmic axis has no zero."""


@plain_text
def activation_grids(
    maps: Mapping[str, Tensor],
    suppressed: Mapping[str, Sequence[int]],
    picture: Tensor,
    columns: int = 8,
    title: str = "",
) -> Figure:
    """Plot one picture's activation maps in several models, with suppressed channels framed (paper, Figure 2).

    Each tile is scaled to its own range, as in the paper. A suppressed channel can therefore show a
    pattern whose values are too small to have an effect; the frame marks it.

    Args:
        maps: the layer's activation (C, H, W) for ``picture``, by model.
        suppressed: the indices of the suppressed channels, by model.
        picture: the picture (3, R, R) in [-1, 1].
        columns: the number of tiles per row.
        title: the figure's title.
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
        axis.set_title(f"{model}: {len(suppressed[model])} of {channels} suppressed", fontsize=9)
        axis.imshow(_mosaic(activation.float().numpy(), columns), cmap="gray", vmin=0, vmax=1, interpolation="nearest")
        for channel in suppressed[model]:
            corner = (channel % columns * (width + GAP) - 0.5, channel // columns * (height + GAP) - 0.5)
            axis.add_patch(
                Rectangle(corner, width, height, fill=False, edgecolor=SUPPRESSED_COLOUR, linewidth=2, clip_on=False)
            )
    for axis in axes:
        axis.axis("off")
    figure.suptitle(title, fontsize=11)
    return figure


def _mosaic(maps: np.ndarray, columns: int) -> np.ndarray:
    """Arrange maps (C, H, W) as tiles of one picture, each scaled to [0, 1]; constant maps are grey, gaps white."""
    channels, height, width = maps.shape
    canvas = np.ones((-(-channels // columns) * (height + GAP) - GAP, columns * (width + GAP) - GAP))
    for channel, values in enumerate(maps):
        span = values.max() - values.min()
        top, left = channel // columns * (height + GAP), channel % columns * (width + GAP)
        canvas[top : top + height, left : left + width] = (values - values.min()) / span if span > 0 else 0.5
    return canvas


@plain_text
def suppressed_over_steps(tracked: pd.DataFrame, interventions: Sequence[int], title: str = "") -> Figure:
    """Plot the number of suppressed channels over training, with a tick for each intervention (paper, Figure 5).

    Args:
        tracked: a table with the columns ``step``, ``condition``, ``seed``, ``suppressed``.
        interventions: the steps at which scales were changed.
        title: the figure's title.
    """
    figure = curves(tracked, "suppressed", "suppressed channels", title=title)
    axis = figure.axes[0]
    axis.plot(
        interventions, [0.02] * len(interventions), "|", transform=axis.get_xaxis_transform(), color=PALETTE["nudge"],
        markersize=12, markeredgewidth=1.6, label="intervention",
    )  # fmt: skip
    axis.legend(fontsize=9)
    return figure


@plain_text
def near_zero_weights(table: pd.DataFrame, top: int = 8, title: str = "") -> Figure:
    """Plot the fraction of near-zero weights over training, for the layers with the largest fraction (paper, Figure 1).

    Args:
        table: a table with the columns ``step``, ``layer``, ``fraction``.
        top: the number of layers to show.
        title: the figure's title.
    """
    largest = table.groupby("layer")["fraction"].max().nlargest(top).index
    figure, axis = plt.subplots(figsize=(7, 3.6), layout="constrained")
    shown = table[table["layer"].isin(largest)].assign(percent=lambda t: 100 * t["fraction"])
    sns.lineplot(shown, x="step", y="percent", hue="layer", hue_order=list(largest), ax=axis, errorbar=None)
    axis.set(xlabel="step", ylabel="near-zero weights (%)")
    axis.legend(fontsize=7, title=None, loc="center left", bbox_to_anchor=(1.0, 0.5))
    axis.set_title(title, fontsize=11)
    return figure


@plain_text
def layer_bars(table: pd.DataFrame, threshold: float, title: str = "") -> Figure:
    """Plot the mean absolute activation m_c of every channel, by layer, with the suppressed channels marked.

    Args:
        table: the table of :func:`vaelab.vae.channels.channel_table`.
        threshold: theta_act, shown as a line.
        title: the figure's title.
    """
    layers = list(dict.fromkeys(table["layer"]))
    figure, axis = plt.subplots(figsize=(8, 0.24 * len(layers) + 1.2), layout="constrained")
    lines = {layer: line for line, layer in enumerate(layers)}
    values = table["mean_abs"].clip(lower=LOWEST_SHOWN)
    suppressed = table["mean_abs"] < threshold
    jitter = np.random.default_rng(0).uniform(-0.3, 0.3, len(table))
    heights = table["layer"].map(lines) + jitter
    axis.scatter(values[~suppressed], heights[~suppressed], s=5, color=PALETTE["nudge"], alpha=0.5, linewidths=0)
    axis.scatter(
        values[suppressed], heights[suppressed], s=12, color=SUPPRESSED_COLOUR, linewidths=0, label="suppressed"
    )
    axis.axvline(threshold, color=SUPPRESSED_COLOUR, linewidth=1, linestyle="--", label=f"threshold {threshold:g}")
    counts = suppressed.groupby(table["layer"]).sum()
    sizes = table["layer"].value_counts()
    axis.set_yticks(list(lines.values()), [f"{layer} ({counts[layer]}/{sizes[layer]})" for layer in layers], fontsize=8)
    axis.set(xscale="log", xlabel="m_c, mean absolute activation", ylim=(len(layers) - 0.4, -0.6))
    figure.legend(loc="outside lower right", fontsize=9, ncols=2)
    axis.set_title(title, fontsize=11)
    return figure


@plain_text
def activity_histogram(table: pd.DataFrame, threshold: float, title: str = "") -> Figure:
    """Plot how many channels have which mean absolute activation m_c, with the suppressed channels marked; its text is
    large enough for a thumbnail of 480 by 300 pixels.

    Args:
        table: the table of :func:`vaelab.vae.channels.channel_table`.
        threshold: theta_act, shown as a line.
        title: the figure's title, at most 40 characters.
    """
    values = table["mean_abs"].clip(lower=LOWEST_SHOWN)
    suppressed = values[table["mean_abs"] < threshold]
    start = max(threshold, LOWEST_SHOWN)  # of a bin, so that no bin holds both kinds of channels
    below, above = (math.ceil(8 * abs(math.log10(end / start))) for end in (values.min(), values.max()))
    edges = start * 10.0 ** (np.arange(-below - 1, above + 2) / 8)
    figure, axis = plt.subplots(figsize=(4.8, 3.0), layout="constrained")
    axis.hist(values, edges, color=PALETTE["nudge"], label=f"{len(values) - len(suppressed)} others")
    axis.hist(suppressed, edges, color=SUPPRESSED_COLOUR, label=f"{len(suppressed)} suppressed")
    if threshold > 0:
        axis.axvline(threshold, color="#444444", linewidth=1, linestyle="--", label=f"threshold {threshold:g}")
    axis.set_xscale("log")
    axis.set_xlabel("m_c, mean absolute activation", fontsize=10)
    axis.set_ylabel("channels", fontsize=10)
    axis.tick_params(labelsize=10)
    axis.legend(fontsize=9)
    axis.set_title(title, fontsize=11)
    return figure


@plain_text
def scale_scatter(table: pd.DataFrame, threshold: float, title: str = "") -> Figure:
    """Plot m_c against |gamma|, coloured by |beta|, to show whether the scale is the mechanism of suppression.

    Args:
        table: the table of :func:`vaelab.vae.channels.channel_table`.
        threshold: theta_act, shown as a line.
        title: the figure's title.
    """
    figure, axis = plt.subplots(figsize=(6, 4.4), layout="constrained")
    gamma, activity = table["gamma"].abs().clip(lower=LOWEST_SHOWN), table["mean_abs"].clip(lower=LOWEST_SHOWN)
    points = axis.scatter(
        gamma, activity, c=np.log10(table["beta"].abs().clip(lower=LOWEST_SHOWN)), s=8, cmap="viridis", linewidths=0
    )
    line = np.geomspace(gamma.min(), gamma.max(), 50)
    axis.plot(line, line * np.sqrt(2 / np.pi), color="#888888", linewidth=1, label="E|gamma z|, z normal")
    axis.axhline(threshold, color=SUPPRESSED_COLOUR, linewidth=1, linestyle="--", label=f"threshold {threshold:g}")
    axis.set(xscale="log", yscale="log", xlabel="|gamma|", ylabel="m_c, mean absolute activation")
    axis.legend(fontsize=8)
    axis.set_title(title, fontsize=11)
    figure.colorbar(points, ax=axis, label="log10 |beta|")
    return figure
