"""The feature browser as figures, for runs without a browser: the map of the dictionary, a card, and a turn."""

import textwrap
from collections.abc import Mapping
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
import torch
from matplotlib.figure import Figure
from torch import Tensor

from vaelab import viz
from vaelab.browser.feature_data import FeatureData
from vaelab.sae.feature_scores import at_pixels
from vaelab.sae.gallery import heat_colours
from vaelab.viz.encoding import decode_picture
from vaelab.viz.text import plain_text

THUMBNAIL = 0.055
"""Side of a thumbnail on the map, as a share of the map."""
OPACITY = 0.6
"""How opaque the colours of activations are."""
PER_ROW = 7
"""Pictures in a row of a card."""


@plain_text
def draw_map(data: FeatureData, column: str, label: str, title: str = "") -> Figure:
    """Draw the map of the dictionary twice: coloured by a column of the table, and with thumbnails in place of dots
    where they do not overlap; features with the largest values come first.

    Args:
        data: the features.
        column: the column that colours the dots; dots whose value is unknown are grey.
        label: what the column holds.
        title: the figure's title.
    """
    values, places = data.table[column].to_numpy(float), data.positions
    known = np.isfinite(values)
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 6), width_ratios=[1, 1.35], layout="constrained")
    size = float(np.clip(8_000 / len(data), 1, 30))
    left.scatter(*places[~known].T, s=size, color="0.8", linewidths=0)
    dots = left.scatter(*places[known].T, s=size, c=values[known], cmap="viridis", linewidths=0)
    figure.colorbar(dots, ax=left, label=label, orientation="horizontal", shrink=0.7)
    right.scatter(*places.T, s=size / 2, color="0.75", linewidths=0)
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
    right.set_title("a top picture of each, darker where the feature is not active", fontsize=9, color="0.3")
    figure.suptitle(title, fontsize=11, x=0.02, ha="left")
    return figure


@plain_text
def draw_card(card: dict[str, Any]) -> Figure:
    """Draw a card of :meth:`vaelab.browser.feature_data.FeatureData.card`: its examples with heat maps, the histogram
    of its activations and its curve over timesteps."""
    examples = card["examples"]
    rows = max(2, -(-len(examples) // PER_ROW))
    height = 0.4 + 1.4 * rows
    figure = plt.figure(figsize=(11, height))
    grid = figure.add_gridspec(
        rows, PER_ROW, left=0.01, right=0.7, top=1 - 0.55 / height, bottom=0.03, wspace=0.06, hspace=0.22
    )
    for place, one in enumerate(examples):
        axis = figure.add_subplot(grid[place // PER_ROW, place % PER_ROW])
        axis.imshow(viz.displayable(overlaid(one)[None])[0], interpolation="nearest")
        axis.set_title(f"{one['group']}: {one['activation']:.3g}", fontsize=7.5, color="0.3", pad=3)
        axis.axis("off")
    beside = figure.add_gridspec(2, 1, left=0.75, right=0.985, top=1 - 0.6 / height, bottom=0.1, hspace=0.7)
    _draw_histogram(figure.add_subplot(beside[0]), card["histogram"])
    axis = figure.add_subplot(beside[1])
    axis.plot(card["timesteps"]["timestep"], card["timesteps"]["mean"], marker="o", markersize=3.5)
    axis.set(ylim=(0, None))
    axis.margins(y=0.15)
    axis.invert_xaxis()
    axis.set_title("mean activation over timesteps", fontsize=8)
    for axis in figure.axes[-2:]:
        axis.tick_params(labelsize=7)
        axis.grid(linewidth=0.5)
        sns.despine(ax=axis)
    figure.suptitle("\n".join(textwrap.wrap(_heading(card), 150)[:2]), fontsize=10.5, x=0.01, ha="left", y=0.985)
    return figure


def heat_pixels(example: Mapping[str, Any]) -> np.ndarray:
    """Colour the map of an example of a card: (h, w, 4) uint8, transparent where the feature is not active."""
    values = torch.tensor(example["map"])
    span = max(example["vmax"] - example["vmin"], 1e-12)
    colours = heat_colours(((values - example["vmin"]) / span).clamp(0, 1))
    return (np.dstack([colours, values > 0]) * 255).round().astype(np.uint8)


def overlaid(example: Mapping[str, Any]) -> Tensor:
    """Lay the heat map of an example of a card over its picture: (3, H, W) in [-1, 1]."""
    picture = decode_picture(example["picture"])
    pixels = torch.from_numpy(heat_pixels(example)).permute(2, 0, 1).float()
    heat = torch.stack([at_pixels(channel[None], picture[None])[0] for channel in pixels]) / 255
    weight = OPACITY * heat[3:]
    return (1 - weight) * picture + weight * (2 * heat[:3] - 1)


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
    """Draw the picture before and after a feature is turned, and their difference, scaled so that the largest is white;
    below it the same with a random direction of equal length.

    Args:
        before: the unchanged picture, as :meth:`vaelab.browser.feature_data.FeatureData.generate` returns it.
        after: the picture with the feature turned.
        control: the picture with the random direction.
        feature: the feature's number.
        title: the figure's title.
    """
    plain = decode_picture(before)
    rows = [(f"feature {feature}", decode_picture(after)), ("random\ndirection", decode_picture(control))]
    most = max(float((picture - plain).abs().max()) for _, picture in rows) or 1.0
    figure, axes = plt.subplots(2, 3, figsize=(6.4, 4.0), layout="constrained")
    for line, (label, picture) in zip(axes, rows, strict=True):
        shown = torch.stack([plain, picture, 2 * (picture - plain).abs() / most - 1])
        for axis, pixels, heading in zip(line, viz.displayable(shown), ("before", "after", "difference"), strict=True):
            axis.imshow(pixels, interpolation="nearest")
            axis.axis("off")
            axis.set_title(heading if picture is rows[0][1] else "", fontsize=9)
        line[0].text(-0.06, 0.5, label, transform=line[0].transAxes, ha="right", va="center", fontsize=9)
    figure.suptitle("\n".join(textwrap.wrap(title, 70)), fontsize=10.5)
    return figure


def mean_change(before: bytes, after: bytes) -> float:
    """Compute the mean Manhattan distance of the pixels of two pictures, from 0 to 765."""
    return float((decode_picture(before) - decode_picture(after)).abs().sum(0).mean() * 127.5)


def draw_summary(data: FeatureData, features: list[int], title: str = "") -> Figure:
    """Draw the strongest examples of at most three features with their heat maps, for a thumbnail."""
    cards = {str(feature): data.card(feature)["examples"][:4] for feature in features[:3]}
    rows = {name: torch.stack([overlaid(one) for one in examples]) for name, examples in cards.items()}
    return viz.summary_pictures(rows, title)


def find_table(table: pd.DataFrame, count: int = 20) -> pd.DataFrame:
    """List the features that a reader looks at first: those that find a factor value best where the truth is known,
    otherwise those with the best scores, otherwise the most frequent ones; columns that nothing is known for are left
    out."""
    column = next((name for name in ("f1", "caption_score", "specificity") if table[name].notna().any()), "frequency")
    found = table.sort_values(column, ascending=False, kind="stable", ignore_index=True)[:count]
    return found.loc[:, [name for name in found if found[name].notna().any() and (found[name] != "").any()]]
