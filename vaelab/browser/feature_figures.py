"""The feature browser as figures, for runs without a browser: the map of the dictionary, a card, and a turn."""

import textwrap
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
import torch
from matplotlib.figure import Figure
from torch import Tensor

from vaelab import viz
from vaelab.browser.feature_data import FeatureData, decode_picture
from vaelab.sae.gallery import heat
from vaelab.viz.text import plain_text

THUMBNAIL = 0.042
"""Side of a thumbnail on the map, as a share of the map."""
PER_ROW = 7
"""Pictures in a row of a card."""


@plain_text
def draw_map(data: FeatureData, column: str, title: str = "") -> Figure:
    """Draw the map of the dictionary twice: coloured by a column of the table, and with thumbnails in place of dots
    where they do not overlap; features with the largest values come first.

    Args:
        data: the features.
        column: the column that colours the dots; dots whose value is unknown are grey.
        title: the figure's title.
    """
    values, places = data.table[column].to_numpy(float), data.positions
    known = np.isfinite(values)
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 5.3), layout="constrained")
    size = float(np.clip(12_000 / len(data), 1, 40))
    left.scatter(*places[~known].T, s=size, color="0.8", linewidths=0)
    dots = left.scatter(*places[known].T, s=size, c=values[known], cmap="viridis", linewidths=0)
    figure.colorbar(dots, ax=left, label=column, shrink=0.8)
    right.scatter(*places.T, s=size / 3, color="0.8", linewidths=0)
    drawn = np.zeros((0, 2))
    for feature in np.argsort(-np.where(known, values, -np.inf), kind="stable"):
        place, tile = places[feature], data.thumbnail(feature)
        if tile is None or (np.abs(drawn - place).max(1, initial=0) < THUMBNAIL).any():
            continue
        drawn = np.concatenate([drawn, place[None]])
        half = THUMBNAIL / 2
        right.imshow(tile, extent=(place[0] - half, place[0] + half, place[1] - half, place[1] + half), zorder=2)
    for axis in (left, right):
        axis.set(xlim=(-0.03, 1.03), ylim=(-0.03, 1.03), xticks=[], yticks=[], aspect="equal")
        sns.despine(ax=axis, left=True, bottom=True)
    figure.suptitle(title, fontsize=11, x=0.02, ha="left")
    return figure


@plain_text
def draw_card(card: dict[str, Any]) -> Figure:
    """Draw a card of :meth:`vaelab.browser.feature_data.FeatureData.card`: its examples with heat maps, the histogram
    of its activations and its curve over timesteps."""
    examples = card["examples"]
    rows = max(1, -(-len(examples) // PER_ROW))
    figure = plt.figure(figsize=(11, 0.8 + 1.35 * rows))
    grid = figure.add_gridspec(
        rows,
        PER_ROW + 3,
        left=0.01,
        right=0.985,
        top=1 - 0.75 / (0.8 + 1.35 * rows),
        bottom=0.03,
        wspace=0.08,
        hspace=0.3,
    )
    pictures = (
        torch.stack([decode_picture(one["picture"]) for one in examples]) if examples else torch.zeros(0, 3, 8, 8)
    )
    hot = viz.displayable(heat(pictures, torch.tensor([one["map"] for one in examples]))) if examples else []
    for place, (one, picture) in enumerate(zip(examples, hot, strict=True)):
        axis = figure.add_subplot(grid[place // PER_ROW, place % PER_ROW])
        axis.imshow(picture, interpolation="nearest")
        axis.set_title(f"{one['group']}, {one['activation']:.3g}", fontsize=7.5, color="0.3", pad=3)
        axis.axis("off")
    beside = grid[:, PER_ROW:].subgridspec(2, 1, hspace=0.75)
    _draw_histogram(figure.add_subplot(beside[0]), card["histogram"])
    axis = figure.add_subplot(beside[1])
    axis.plot(card["timesteps"]["timestep"], card["timesteps"]["mean"], marker="o", markersize=3.5)
    axis.set(ylim=(0, None))
    axis.invert_xaxis()
    axis.set_title("mean activation over timesteps", fontsize=8)
    for axis in figure.axes[-2:]:
        axis.tick_params(labelsize=7)
        sns.despine(ax=axis)
    figure.suptitle("\n".join(textwrap.wrap(_heading(card), 150)[:2]), fontsize=10.5, x=0.01, ha="left", y=0.985)
    return figure


def _draw_histogram(axis: plt.Axes, histogram: dict[str, list[float]]) -> None:
    edges, counts = histogram["edges"], histogram["counts"]
    if counts:
        axis.stairs(counts, edges, fill=True)
        axis.set_yscale("log")
    axis.set_title("positive activations", fontsize=8)


def _heading(card: dict[str, Any]) -> str:
    parts = [f"feature {card['feature']}", card["caption"] or f"words: {card['words'] or 'none'}"]
    parts.append(f"active in {card['frequency']:.1%} of items, mu {card['mu']:.3g}")
    if card["value"]:
        parts.append(f"F1 for {card['value']} {card['f1']:.2f} (best random direction {card['control']:.2f})")
    return " · ".join(parts)


@plain_text
def draw_turn(before: bytes, after: bytes, control: bytes, feature: int, title: str = "") -> Figure:
    """Draw the picture before and after a feature is turned, and their difference; below it the same with a random
    direction of equal length.

    Args:
        before: the unchanged picture, as :meth:`vaelab.browser.feature_data.FeatureData.generate` returns it.
        after: the picture with the feature turned.
        control: the picture with the random direction.
        feature: the feature's number.
        title: the figure's title.
    """
    plain = decode_picture(before)
    rows = {
        label: torch.stack([plain, picture, (picture - plain).abs() - 1])
        for label, picture in (
            (f"feature {feature}", decode_picture(after)),
            ("random\ndirection", decode_picture(control)),
        )
    }
    return viz.picture_grid(rows, title, ["before", "after", "difference"])


def mean_change(before: bytes, after: bytes) -> float:
    """Compute the mean Manhattan distance of the pixels of two pictures, from 0 to 765."""
    return float((decode_picture(before) - decode_picture(after)).abs().sum(0).mean() * 127.5)


def draw_summary(data: FeatureData, features: list[int], title: str = "") -> Figure:
    """Draw the strongest examples of at most three features with their heat maps, for a thumbnail."""
    rows: dict[str, Tensor] = {}
    for feature in features[:3]:
        examples = data.card(feature)["examples"][:4]
        pictures = torch.stack([decode_picture(one["picture"]) for one in examples])
        rows[str(feature)] = heat(pictures, torch.tensor([one["map"] for one in examples]))
    return viz.summary_pictures(rows, title)


def find_table(table: pd.DataFrame, count: int = 20) -> pd.DataFrame:
    """List the features that a reader looks at first: those that find a factor value best where the truth is known,
    otherwise those with the best scores, otherwise the most frequent ones; columns that nothing is known for are left
    out."""
    column = next((name for name in ("f1", "caption_score", "specificity") if table[name].notna().any()), "frequency")
    found = table.sort_values(column, ascending=False, kind="stable")[:count]
    return found.loc[:, [name for name in found if found[name].notna().any() and (found[name] != "").any()]]
