"""Grids of pictures with captions, masks or maps, and heat maps of tables."""

import textwrap
from collections.abc import Mapping, Sequence

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.figure import Figure
from torch import Tensor

from vaelab.viz.text import plain_text


@plain_text
def captioned(pictures: Tensor, captions: Sequence[str], columns: int = 6, title: str = "") -> Figure:
    """Show pictures, each with a caption under it.

    Args:
        pictures: (N, 3, H, W) in [-1, 1].
        captions: one caption per picture.
        columns: the number of pictures per row.
        title: the figure's title.
    """
    lines = -(-len(pictures) // columns)
    figure, axes = plt.subplots(
        lines, columns, figsize=(2.1 * columns, 2.9 * lines), squeeze=False, layout="constrained"
    )
    for axis in axes.flat:
        axis.axis("off")
    for axis, picture, caption in zip(axes.flat, displayable(pictures), captions, strict=False):
        axis.imshow(picture, interpolation="nearest")
        axis.text(
            0.5,
            -0.04,
            "\n".join(textwrap.wrap(caption, 28)),
            transform=axis.transAxes,
            ha="center",
            va="top",
            fontsize=7,
        )
    figure.suptitle(title, fontsize=11)
    return figure


@plain_text
def masked(picture: Tensor, masks: np.ndarray, labels: Sequence[str], title: str = "") -> Figure:
    """Show a picture, and beside it each of its masks with a label.

    Args:
        picture: (3, H, W) in [-1, 1].
        masks: (N, H, W) bool.
        labels: one label per mask.
        title: the figure's title.
    """
    shown = displayable(picture[None])[0]
    figure, axes = plt.subplots(1, len(masks) + 1, figsize=(2.3 * (len(masks) + 1), 2.8), layout="constrained")
    axes[0].imshow(shown, interpolation="nearest")
    for axis, mask, label in zip(axes[1:], masks, labels, strict=True):
        axis.imshow(np.where(mask[..., None], shown, 0.25 * shown + 0.7), interpolation="nearest")
        axis.set_title("\n".join(textwrap.wrap(label, 24)), fontsize=8)
    for axis in axes:
        axis.axis("off")
    figure.suptitle(title, fontsize=11)
    return figure


@plain_text
def strength(pictures: Tensor, maps: Mapping[str, Tensor], title: str = "") -> Figure:
    """Show under each picture the norm of the vector at each position; each map is scaled to its own range.

    Args:
        pictures: (N, 3, H, W) in [-1, 1].
        maps: the maps (N, h, w, d) by block.
        title: the figure's title.
    """
    figure, axes = plt.subplots(
        len(maps) + 1, len(pictures), figsize=(1.3 * len(pictures) + 1.2, 1.3 * len(maps) + 1.8), squeeze=False,
        layout="constrained",
    )  # fmt: skip
    for axis, picture in zip(axes[0], displayable(pictures), strict=True):
        axis.imshow(picture, interpolation="nearest")
    for line, (name, activations) in zip(axes[1:], maps.items(), strict=True):
        for axis, lengths in zip(line, activations.float().norm(dim=-1).cpu().numpy(), strict=True):
            axis.imshow(lengths, cmap="magma", interpolation="nearest")
        line[0].text(-0.1, 0.5, name, transform=line[0].transAxes, ha="right", va="center", fontsize=9)
    for axis in axes.flat:
        axis.axis("off")
    figure.suptitle(title, fontsize=11)
    return figure


@plain_text
def matrix(table: pd.DataFrame, label: str, title: str = "", *, diverging: bool = False) -> Figure:
    """Draw a heat map of a table, with the values in its cells.

    Args:
        table: the values, with the names of rows and columns.
        label: the name of the values, shown beside the colour bar.
        title: the figure's title.
        diverging: whether 0 is the middle of the colours.
    """
    size = (0.85 * len(table.columns) + 2.6, 0.42 * len(table) + 1.3)
    figure, axis = plt.subplots(figsize=size, layout="constrained")
    reach = {"center": 0, "cmap": "vlag"} if diverging else {"cmap": "viridis"}
    sns.heatmap(table, annot=True, fmt=".2f", annot_kws={"fontsize": 8}, cbar_kws={"label": label}, ax=axis, **reach)
    axis.set(xlabel="", ylabel="")
    axis.set_title(title, fontsize=11)
    return figure


@plain_text
def picture_grid(rows: Mapping[str, Tensor], title: str = "", captions: Sequence[str] = ()) -> Figure:
    """Show pictures in labelled rows.

    Args:
        rows: the pictures (N, 3, H, W) in [-1, 1] of each row, by the row's label.
        title: the figure's title.
        captions: one caption per column, shown under it; empty means no captions.
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


@plain_text
def summary_pictures(rows: Mapping[str, Tensor], title: str = "") -> Figure:
    """Show a few pictures in labelled rows with large text, for a thumbnail of 480 by 300 pixels.

    Args:
        rows: the pictures (N, 3, H, W) in [-1, 1] of each row, by the row's label of at most 12 characters; the first
            four of at most three rows are shown.
        title: the figure's title, at most 40 characters.
    """
    shown = dict(list(rows.items())[:3])
    columns = min(4, max(len(pictures) for pictures in shown.values()))
    figure, axes = plt.subplots(len(shown), columns, figsize=(4.8, 3.0), squeeze=False, layout="constrained")
    for line, (label, pictures) in zip(axes, shown.items(), strict=True):
        for axis, picture in zip(line, displayable(pictures[:columns]), strict=False):
            axis.imshow(picture, interpolation="nearest")
        for axis in line:
            axis.axis("off")
        line[0].text(-0.1, 0.5, label, transform=line[0].transAxes, ha="right", va="center", fontsize=10)
    figure.suptitle(title, fontsize=11)
    return figure


def displayable(pictures: Tensor) -> np.ndarray:
    """Convert pictures (N, 3, H, W) in [-1, 1] to (N, H, W, 3) in [0, 1], for matplotlib."""
    return ((pictures.detach().float().cpu().clamp(-1, 1) + 1) / 2).permute(0, 2, 3, 1).numpy()
