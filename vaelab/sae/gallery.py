"""The gallery of features: what a feature is active on, and what it does (Surkov et al., "Unpacking SDXL Turbo",
Figures 1 and 5 to 10).

A panel has a row per feature. Its columns are named as in the paper:

======== =================================================================================================
hmap     the picture of a prompt, with the feature's activation: the highest red, the lowest above zero blue
A        that picture with the feature modulated (equation 10); the number is beta
B        the empty prompt with the feature alone (equation 11); the number is gamma
C        samples of the feature's top pictures, with the activation
D        pictures of other prompts in which the feature is turned on, everywhere or under a mask
======== =================================================================================================
"""

import math
import textwrap
from collections.abc import Sequence
from typing import Any, NamedTuple

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
import torch
from matplotlib.figure import Figure
from torch import Tensor

from vaelab import viz
from vaelab.activations.denoiser import from_prompts
from vaelab.core.validate import at_least
from vaelab.sae.feature_scores import ItemPictures, at_pixels, caption_from_words
from vaelab.sae.feature_statistics import FeatureStatistics, encoded_maps, feature_maps
from vaelab.sae.model import SAE
from vaelab.sae.steering import Directions, Steerer, Steering, activate_alone, modulate
from vaelab.viz.grids import displayable
from vaelab.viz.text import plain_text

HEAT_STRENGTH = 0.75
"""How opaque the colours of activations are."""


class Panel(NamedTuple):
    """Pictures in rows of features and columns of groups."""

    groups: list[tuple[str, list[str]]]
    """The title of each group of columns, and its columns' headings."""
    rows: list[tuple[str, list[Tensor]]]
    """Each row's label, and its pictures (3, H, W) in [-1, 1], one per column."""


class FeatureGallery:
    """The features of one block, shown."""

    def __init__(
        self, pipeline: Any, block: str, sae: SAE, statistics: FeatureStatistics, pictures: ItemPictures, *,
        step: int = 0, top: float = 0.05, seed: int = 0, batch_size: int = 16,
    ):  # fmt: skip
        """Take a block's autoencoder.

        Args:
            pipeline: the model.
            block: the block's short name.
            sae: its autoencoder.
            statistics: the autoencoder's statistics over the items of the step.
            pictures: the pictures of the store's items.
            step: the denoising step whose activations are shown; features are steered at all steps.
            top: the share of the items in which a feature is active that count as its top pictures.
            seed: the seed of the pictures of prompts, and of the samples.
            batch_size: pictures per batch.

        Raises:
            ValueError: the autoencoder is for vectors of another width than the block's.
        """
        self.block, self.sae, self.statistics, self._pictures = block, sae, statistics, pictures
        self._pipeline, self._step, self._top, self._seed, self._batch_size = pipeline, step, top, seed, batch_size
        self._steerer = Steerer(pipeline, {block: Directions.of(sae, statistics)})

    def label(self, feature: int) -> str:
        """Return a feature's number, with the words whose prompts activate it most."""
        return f"{feature}\n{caption_from_words(self.statistics, feature)}".strip()

    def most_active(self, prompt: str, count: int) -> list[int]:
        """List the features with the largest mean activation while the picture of a prompt is drawn, in decreasing
        order; features that were never active in the store are left out."""
        at_least("prompt_features", count, 1)
        codes = self.sae.encode(self._map_of(prompt).to(self.sae.device))
        total = codes.dense(self.sae.config.n_features).sum((0, 1)).cpu()
        total[self.statistics.mean_activation() == 0] = 0
        order = torch.sort(total, descending=True, stable=True).indices[:count]
        return order[total[order] > 0].tolist()

    def on_prompt(
        self, prompt: str, features: Sequence[int], *, betas: Sequence[float] = (-6.0, 6.0),
        gammas: Sequence[float] = (1.0,), examples: int = 2,
    ) -> Panel:  # fmt: skip
        """Show features on the picture of a prompt: hmap, A, B and C (Figures 1 and 5)."""
        self._require(features)
        plain = self._generate([prompt], [[]])
        maps = encoded_maps(self.sae, self._map_of(prompt)[None], features)[0]  # (F, h, w)
        changed = self._steered(features, prompt, [modulate(self.block, f, beta) for f in features for beta in betas])
        alone = self._steered(features, "", [activate_alone(self.block, f, g) for f in features for g in gammas])
        rows = []
        for place, feature in enumerate(features):
            shown = [heat(plain, maps[place : place + 1])[0], *changed[place], *alone[place]]
            rows.append((self.label(feature), shown + self._examples(feature, examples)))
        groups = [("hmap", [""]), *_groups(betas, gammas, examples)]
        return Panel(groups, rows)

    def on_examples(
        self, features: Sequence[int], *, betas: Sequence[float] = (-6.0, 6.0),
        gammas: Sequence[float] = (0.5, 1.0, 2.0), examples: int = 2,
    ) -> Panel:  # fmt: skip
        """Show features on samples of their own top pictures (Figures 6, 7 and 8): for each sample its hmap, the
        picture, and A; then B."""
        self._require(features)
        chosen = {feature: self._sample(feature, examples) for feature in features}
        alone = self._steered(features, "", [activate_alone(self.block, f, g) for f in features for g in gammas])
        rows = []
        for place, feature in enumerate(features):
            items = chosen[feature]
            maps, plain = self._maps(items, feature), self._pictures.pictures(items)
            requests = [[modulate(self.block, feature, beta)] for _ in items for beta in betas]
            changed = self._generate(
                [prompt for prompt in self._pictures.prompts(items) for _ in betas], requests,
                [seed for seed in self._pictures.seeds(items) for _ in betas],
            )  # fmt: skip
            shown = []
            for i, (hot, picture) in enumerate(zip(heat(plain, maps), plain, strict=True)):
                own = list(changed[i * len(betas) : (i + 1) * len(betas)])
                shown += [hot, picture, *own]
            blank = torch.ones_like(plain[0])
            shown += [blank] * ((2 + len(betas)) * (examples - len(items)))  # a rarely active feature has fewer
            rows.append((self.label(feature), shown + list(alone[place])))
        headings = ["hmap", "picture", *(f"A {beta:+g}" for beta in betas)]
        groups = [(f"C.{i}", headings) for i in range(examples)]
        return Panel([*groups, ("B: alone on the empty prompt, gamma", [f"{gamma:g}" for gamma in gammas])], rows)

    def turned_on(
        self, features: Sequence[int], prompts: Sequence[str], strength: float, mask: Tensor | None = None
    ) -> Panel:
        """Show features turned on in pictures of unrelated prompts (Figures 9 and 10): the first row is the unchanged
        picture, the others have one feature each, on everywhere and, if there is a mask, under it alone.

        Args:
            features: the features.
            prompts: the prompts.
            strength: the amount, in multiples of k times the feature's mean activation mu.
            mask: (H, W) from 0 to 1.
        """
        self._require(features)
        masks = [None] if mask is None else [None, mask]
        requests = [
            [Steering(self.block, feature, strength, "add", "k_mean", mask=one)]
            for feature in features for _ in prompts for one in masks
        ]  # fmt: skip
        plain = self._generate(list(prompts), [[] for _ in prompts])
        every = [prompt for _ in features for prompt in prompts for _ in masks]
        changed = self._generate(every, requests)
        width = len(prompts) * len(masks)
        rows = [("nothing", [picture for picture in plain for _ in masks])]
        rows += [
            (self.label(feature), list(changed[place * width : (place + 1) * width]))
            for place, feature in enumerate(features)
        ]
        headings = ["everywhere"] if mask is None else ["everywhere", "masked"]
        return Panel([(f"D: {prompt}", headings) for prompt in prompts], rows)

    def _require(self, features: Sequence[int]) -> None:
        at_least("features", len(features), 1)
        for feature in features:
            self.statistics.require_feature(feature, self.block)

    def _steered(self, features: Sequence[int], prompt: str, steerings: Sequence[Steering]) -> list[list[Tensor]]:
        """Generate one picture per steering, the same number for each feature."""
        if not steerings:
            return [[] for _ in features]
        made = self._generate([prompt] * len(steerings), [[one] for one in steerings])
        return [list(part) for part in made.split(len(steerings) // len(features))]

    def _generate(
        self, prompts: Sequence[str], steerings: Sequence[Sequence[Steering]], seeds: Sequence[int] = ()
    ) -> Tensor:
        seeds = list(seeds) or [self._seed] * len(prompts)
        sampling = self._pictures.sampling
        return self._steerer.generate(prompts, steerings, sampling, seeds, batch_size=self._batch_size)

    def _map_of(self, prompt: str) -> Tensor:
        """Capture the block's update (h, w, d) at the step while the picture of a prompt is drawn."""
        found = from_prompts(
            self._pipeline, [prompt], [self._seed], self.block, self._pictures.sampling, steps=[self._step]
        )
        return found.maps[self.block][0][0].float().cpu()

    def _sample(self, feature: int, count: int) -> list[int]:
        return self.statistics.sample_items(feature, 1 - self._top, 1, count, self._seed)[0]

    def _maps(self, items: Sequence[int], feature: int) -> Tensor:
        return feature_maps(self.sae, self._pictures.store, self.block, items, [feature])[:, 0]

    def _examples(self, feature: int, count: int) -> list[Tensor]:
        items = self._sample(feature, count)
        pictures = self._pictures.pictures(items)
        shown = list(heat(pictures, self._maps(items, feature)))
        return shown + [torch.ones_like(pictures[0])] * (count - len(items))


def _groups(betas: Sequence[float], gammas: Sequence[float], examples: int) -> list[tuple[str, list[str]]]:
    groups = [
        ("A: modulated, beta", [f"{beta:+g}" for beta in betas]),
        ("B: gamma", [f"{gamma:g}" for gamma in gammas]),
        ("C: top pictures", [f"C.{i}" for i in range(examples)]),
    ]
    return [group for group in groups if group[1]]


def heat(pictures: Tensor, maps: Tensor) -> Tensor:
    """Lay activations over grey pictures: the highest of all pictures red, the lowest above zero blue, nothing where
    the feature is not active.

    Args:
        pictures: (N, 3, H, W) in [-1, 1].
        maps: (N, h, w).

    Returns:
        (N, 3, H, W) in [-1, 1].
    """
    grey = pictures.mean(1, keepdim=True).expand(-1, 3, -1, -1)
    spread = at_pixels(maps.float(), pictures)
    active = spread > 0
    if not active.any():
        return grey.clone()
    low, high = spread[active].min(), spread.max()
    scaled = ((spread - low) / (high - low).clamp_min(1e-12)).clamp(0, 1)
    colours = torch.from_numpy(heat_colours(scaled)).float() * 2 - 1
    weight = HEAT_STRENGTH * active[:, None]
    return (1 - weight) * grey + weight * colours.permute(0, 3, 1, 2)


def heat_colours(scaled: Tensor) -> np.ndarray:
    """Return the colours (..., 3) in [0, 1] of activations that are scaled to [0, 1]: blue for 0, red for 1."""
    return mpl.colormaps["turbo"](0.08 + 0.84 * scaled.numpy())[..., :3]


def box_mask(box: Sequence[float], side: int = 64) -> Tensor | None:
    """Make a mask (side, side) that is 1 in a box and 0 elsewhere; None for an empty box.

    Args:
        box: top, left, bottom and right, as shares of the picture's sides.
        side: the mask's side.

    Raises:
        ValueError: the box has other than four numbers, or holds no position.
    """
    if not box:
        return None
    if len(box) != 4 or not (0 <= box[0] < box[2] <= 1 and 0 <= box[1] < box[3] <= 1):
        raise ValueError(f"mask: expected [top, left, bottom, right] as rising shares from 0 to 1, got {list(box)}")
    mask = torch.zeros(side, side)
    top, left, bottom, right = (round(share * side) for share in box)
    mask[top:bottom, left:right] = 1
    return mask


def require_features(features: Sequence[int], saes: dict[str, SAE]) -> None:
    """Raise ValueError unless every block's autoencoder has these features; before anything long begins."""
    for block, sae in saes.items():
        for feature in features:
            if not 0 <= feature < sae.config.n_features:
                raise ValueError(f"features: {block} has features 0 to {sae.config.n_features - 1}, got {feature}")


def require_finite(**strengths: Sequence[float]) -> None:
    """Raise ValueError unless all strengths, by the parameter that gave them, are finite."""
    for name, values in strengths.items():
        if not all(math.isfinite(value) for value in values):
            raise ValueError(f"{name}: expected finite numbers, got {list(values)}")


@plain_text
def draw_panel(panel: Panel, title: str = "", side: float = 0.98) -> Figure:
    """Draw a panel.

    Args:
        panel: the pictures.
        title: the figure's title.
        side: the side of a picture, in inches.
    """
    widths, places, begins = [], [], []
    for number, (_, headings) in enumerate(panel.groups):
        if number:
            widths.append(0.16)  # a gap between groups
        begins.append(len(widths))
        places += range(len(widths), len(widths) + len(headings))
        widths += [1.0] * len(headings)
    names = ["\n".join(textwrap.wrap(name, int(14 * side * len(ones)))[:2]) for name, ones in panel.groups]
    label, gap = 1.25, 0.05
    width = label + side * (sum(widths) + gap * (len(widths) - 1)) + 0.08
    lines = textwrap.wrap(title, int(11 * width))[:2]
    top = 0.6 + 0.2 * len(lines) + 0.13 * any("\n" in name for name in names)
    height = top + side * len(panel.rows) * (1 + gap) + 0.08
    figure = plt.figure(figsize=(width, height))
    grid = figure.add_gridspec(
        len(panel.rows), len(widths), width_ratios=widths, wspace=gap * len(widths) / sum(widths), hspace=gap,
        left=label / width, right=1 - 0.08 / width, top=1 - top / height, bottom=0.08 / height,
    )  # fmt: skip
    headings = [heading for _, ones in panel.groups for heading in ones]
    for line, (name, pictures) in enumerate(panel.rows):
        shown = displayable(torch.stack(list(pictures)))
        for place, picture, heading in zip(places, shown, headings, strict=True):
            axis = figure.add_subplot(grid[line, place])
            axis.imshow(picture, interpolation="nearest", aspect="auto")
            axis.axis("off")
            if line == 0:
                axis.set_title(heading, fontsize=8, color="0.25", pad=3)
            if place == 0:
                number, *words = name.split("\n")
                axis.text(-0.08, 0.5 if not words else 0.58, number, transform=axis.transAxes, ha="right", va="center",
                          fontsize=10, weight="bold")  # fmt: skip
                axis.text(-0.08, 0.32, _two_lines(" ".join(words)), transform=axis.transAxes, ha="right", va="center",
                          fontsize=7, color="0.35", linespacing=1.1)  # fmt: skip
    for begin, name, (_, ones) in zip(begins, names, panel.groups, strict=True):
        first, last = (grid[0, place].get_position(figure) for place in (begin, begin + len(ones) - 1))
        y = first.y1 + (0.24 if any(ones) else 0.04) / height
        figure.text((first.x0 + last.x1) / 2, y + 0.03 / height, name, ha="center", va="bottom", fontsize=8.5)
        if any(ones):
            line = plt.Line2D([first.x0, last.x1], [y, y], color="0.6", linewidth=0.8, transform=figure.transFigure)
            figure.add_artist(line)
    if title:
        figure.suptitle("\n".join(lines), x=0.08 / width, ha="left", y=1 - 0.06 / height, va="top", fontsize=10.5)
    return figure


@plain_text
def draw_locality(table: pd.DataFrame, title: str = "") -> Figure:
    """Draw what modulated features change inside and outside their active areas: a panel per block, and in it for each
    strength the two mean distances of the autoencoder's features and of its controls, joined by a line.

    Args:
        table: a table of :func:`vaelab.sae.feature_scores.summarise_scores`.
        title: the figure's title.
    """
    kinds = table["score"].str.extract(r"^(?P<area>inside|outside)_(?P<beta>.+)$")
    table = table.join(kinds).dropna(subset=["area"])
    blocks, betas, names = (list(dict.fromkeys(table[column])) for column in ("block", "beta", "who"))
    betas.sort(key=float)
    figure, axes = plt.subplots(
        1, len(blocks), figsize=(3.2 * len(blocks) + 2.6, 3.2), sharey=True, squeeze=False, layout="constrained"
    )
    colours = dict(zip(names, sns.color_palette("colorblind", len(names)), strict=True))
    values = table.set_index(["block", "who", "beta", "area"])["mean"]
    for axis, block in zip(axes[0], blocks, strict=True):
        for number, who in enumerate(names):
            shift = 0.16 * (number - (len(names) - 1) / 2)
            for place, beta in enumerate(betas):
                ends = [values.get((block, who, beta, area), float("nan")) for area in ("inside", "outside")]
                axis.plot([place + shift] * 2, ends, color=colours[who], linewidth=1.6, zorder=1)
                axis.scatter([place + shift], ends[:1], s=34, color=colours[who], zorder=2)
                axis.scatter([place + shift], ends[1:], s=30, facecolor="white", edgecolor=colours[who], zorder=2)
        axis.set_xticks(range(len(betas)), betas)
        axis.set_title(block, fontsize=10)
        axis.set_xlabel("beta")
        axis.grid(visible=False, axis="x")
        sns.despine(ax=axis)
    axes[0][0].set_ylabel("Manhattan distance, of 765")
    axes[0][0].set_ylim(0, 1.08 * values.max())
    marks = [plt.Line2D([], [], marker="s", linestyle="", color=colour, label=who) for who, colour in colours.items()]
    marks += [
        plt.Line2D([], [], marker="o", linestyle="", color="0.35", label="inside"),
        plt.Line2D([], [], marker="o", linestyle="", color="0.35", markerfacecolor="white", label="outside"),
    ]
    figure.legend(handles=marks, fontsize=8, loc="outside right center", frameon=False)
    figure.suptitle(title, fontsize=11, x=0.02, ha="left")
    return figure


def summary(panel: Panel, title: str = "") -> Figure:
    """Draw the first four columns of a panel's first three rows, for a thumbnail."""
    rows = {label.split("\n")[0]: torch.stack(list(pictures[:4])) for label, pictures in panel.rows[:3]}
    return viz.summary_pictures(rows, title)


def _two_lines(text: str) -> str:
    words = text.split()
    return f"{' '.join(words[:2])}\n{' '.join(words[2:])}".strip()
