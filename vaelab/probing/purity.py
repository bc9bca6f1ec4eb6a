"""k-sparse autoencoders on every layer and timestep of a store, and how pure their features are.

As Kim et al. ("Revelio", sections 3.2 and 4.2, appendix F): on vectors that are means over positions, of the
pictures as they are (crops and flips are Diff-C's alone, section 4.1); then of the 1,000 most active features
the ten pictures that activate each most. The paper does not say what makes a feature most active; here it is
its largest activation.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from torch import Tensor

from vaelab import store
from vaelab.core.validate import at_least, one_of, unknown
from vaelab.data.labelled import Pictures
from vaelab.probing.dataset import Examples, read
from vaelab.probing.layer_features import refuse_other_pictures
from vaelab.sae.model import SAE, SAEConfig
from vaelab.sae.top_activating import Summary, summarise
from vaelab.sae.train import Wanted
from vaelab.store.format import Layout
from vaelab.store.reader import Store

# purity: How pure features are: whether the pictures that activate one most are of one class.
#
# Kim et al. ("Revelio", section 4.2) take sigma_label, the standard deviation of the class *numbers* of
# the ten pictures, averaged over the thousand most active features. It depends on how classes happen to
# be numbered, so beside it stand what does not: the entropy of the classes, the share of the most
# frequent one, and a permutation test of the entropy.
#


class Purity(NamedTuple):
    """Means over features, and what they would be if features knew nothing of the classes."""

    sigma_label: float
    """The paper's measure; lower is purer, in class numbers."""
    entropy: float
    """Of the classes of a feature's pictures, in bits; 0 is pure."""
    majority: float
    """Share of the most frequent class; 1 is pure."""
    permutation_p: float
    """How often labels that are dealt anew to the pictures give as low an entropy."""
    sigma_label_chance: float
    """Mean over the permutations, as the next two."""
    entropy_chance: float
    majority_chance: float
    features: int
    """How many they are means of."""


def sigma_labels(classes: np.ndarray) -> np.ndarray:
    """Standard deviation (F,), that of a population, of the class numbers (F, n) of each feature's pictures."""
    return classes.std(axis=1)


def entropies(classes: np.ndarray) -> np.ndarray:
    """Entropy (F,) of the classes (F, n) of each feature's pictures, in bits."""
    shares = np.sort(_shares(classes), axis=1)  # so that sums do not depend on the classes' order
    return -(shares * np.log2(np.where(shares > 0, shares, 1))).sum(axis=1) + 0.0


def majorities(classes: np.ndarray) -> np.ndarray:
    """Share (F,) of the most frequent class (F, n) of each feature's pictures."""
    return _shares(classes).max(axis=1)


def measure(labels: np.ndarray, top: np.ndarray, *, permutations: int = 200, seed: int = 0) -> Purity:
    """The purity of features.

    The test permutes the labels among all pictures, so that pictures which several features share
    stay shared.

    Args:
        labels: (N,) class numbers of all pictures, from 0.
        top: (F, n) for each feature the numbers of its n pictures.
        permutations: of the test; its p is at least 1 / (permutations + 1).
        seed: fixes them.

    Raises:
        ValueError: no feature, a picture or a label that does not exist.
    """
    labels, top = np.asarray(labels), np.asarray(top)
    at_least("permutations", permutations, 1)
    if top.ndim != 2 or not top.size:
        raise ValueError(f"top: expected pictures (F, n) of one or more features, got {top.shape}")
    if top.min() < 0 or top.max() >= len(labels) or labels.min() < 0:
        raise ValueError(f"top: {len(labels)} pictures, and labels from 0 on; got picture {top.min()} or {top.max()}")
    found = _means(labels[top])
    rng = np.random.default_rng(seed)
    dealt = np.array([_means(rng.permutation(labels)[top]) for _ in range(permutations)])
    as_low = int((dealt[:, 1] <= found[1] + 1e-12).sum())
    return Purity(*found, (1 + as_low) / (1 + permutations), *map(float, dealt.mean(axis=0)), len(top))


def _means(classes: np.ndarray) -> tuple[float, float, float]:
    return tuple(float(one(classes).mean()) for one in (sigma_labels, entropies, majorities))


def _shares(classes: np.ndarray) -> np.ndarray:
    """Share of every class (F, C) among classes (F, n)."""
    features, count = classes.shape
    kinds = int(classes.max()) + 1
    places = np.arange(features)[:, None] * kinds + classes
    return np.bincount(places.ravel(), minlength=features * kinds).reshape(features, kinds) / count


def renumbered(labels: np.ndarray, top: np.ndarray, *, times: int = 50, seed: int = 0) -> tuple[float, float]:
    """The least and the most that sigma_label can be found to be when the same classes are numbered anew.

    Args:
        labels: (N,) class numbers, from 0.
        top: (F, n) pictures of each feature.
        times: random numberings that are tried.
        seed: fixes them.
    """
    at_least("times", times, 1)
    labels, rng = np.asarray(labels), np.random.default_rng(seed)
    kinds = int(labels.max()) + 1
    found = [float(sigma_labels(rng.permutation(kinds)[labels[top]]).mean()) for _ in range(times)]
    return min(found), max(found)


MEASURES = ("sigma_label", "entropy", "majority", "permutation_p")


class Tops(NamedTuple):
    """The most active features of a layer, each with the pictures that activate it most."""

    features: np.ndarray
    """(F,) their numbers, the most active first."""
    pictures: np.ndarray
    """(F, top) numbers among the examples."""
    summary: Summary
    """Of all features."""


def wanted(
    layout: Layout, layers: Sequence[str], expansion: int, k: int, seed: int, **options: Any
) -> dict[str, Wanted]:
    """An autoencoder for each layer and timestep, under its name.

    Args:
        layout: of the store.
        layers: names such as ``up_ft1.t25``.
        expansion: features a channel.
        k: active features of a picture.
        seed: of the first weights.
        options: of every :class:`vaelab.sae.model.SAEConfig`.

    Raises:
        ValueError: a layer that the store does not have, or whose items are maps.
    """
    at_least("expansion", expansion, 1)
    for layer in layers:
        if layer not in layout:
            raise unknown("layers (of the activations)", layer, layout)
        if layout[layer].positions:
            raise ValueError(f"layers: {layer!r} holds maps; purity is of vectors that are means over positions")
    return {
        layer: Wanted(layer, SAEConfig(layout[layer].width, expansion * layout[layer].width, k, **options), seed)
        for layer in layers
    }


def opened(activations: str, pictures: Pictures, model: str) -> tuple[Store, dict[str, Examples]]:
    """A store of notebook 40, and its pictures with the classes of each factor.

    Args:
        activations: its folder.
        pictures: that it must be of.
        model: that it must have been made with.

    Raises:
        ValueError: other pictures or another model, pictures without labels, or with withheld ones.
    """
    kept = store.open(activations, parameter="activations")
    refuse_other_pictures(kept, pictures, model, "activations")
    return kept, {factor: read(kept, factor) for factor in pictures.classes or [""]}


def refuse_nonsense(
    by_factor: Mapping[str, Examples], factor: str, layers: Sequence[str], shown: Sequence[str], top: int
) -> None:
    """Raise ValueError, before anything is trained, for an unknown factor, a layer that is to be shown and is not among
    those that are trained on, or more pictures a feature than there are."""
    one_of("factor", factor, by_factor)
    for layer in shown:
        one_of("shown_layers", layer, layers)
    if top > (count := len(by_factor[factor])):
        raise ValueError(f"top: {top} pictures a feature, and the activations are of {count}")


def keep(saes: Mapping[str, SAE], folder: Path) -> None:
    """Save the autoencoder of each layer in a folder of its name."""
    for layer, sae in saes.items():
        sae.save_pretrained(folder / layer)


def tops(sae: SAE, examples: Examples, layer: str, *, features: int = 1000, top: int = 10) -> Tops:
    """What the most active features of a layer are activated by, of the pictures as they are.

    Args:
        sae: the layer's autoencoder.
        examples: the pictures.
        layer: its name in the store.
        features: how many; of those that are active in at least ``top`` pictures.
        top: pictures a feature.

    Raises:
        ValueError: no feature is active in so many pictures.
    """
    items = [views[0] for views in examples.items]
    place = {item: number for number, item in enumerate(items)}
    found = summarise(sae, examples.kept, layer, top=top, items=items)
    chosen = found.most_active(features)
    if not len(chosen):
        raise ValueError(f"{layer}: no feature is active in {top} of {len(items)} pictures; train longer, or take more")
    pictures = np.array([[place[item] for item in row] for row in found.items[chosen].tolist()])
    return Tops(chosen.numpy(), pictures, found)


def table(
    found: Mapping[str, Tops], by_factor: Mapping[str, Examples], *, permutations: int, seed: int
) -> pd.DataFrame:
    """The purity of every layer's features, by every factor.

    Args:
        found: by layer and timestep.
        by_factor: the same pictures with the classes of each factor.
        permutations: of the test.
        seed: fixes them.

    Returns:
        A row a layer and factor: ``layer``, ``factor``, the fields of :class:`vaelab.probing.purity.Purity`, the
        range of sigma_label under other numberings of the classes (``sigma_label_low``,
        ``sigma_label_high``), and ``gain``, by how much the entropy is below that of chance: 0 is
        chance, 1 is pure.
    """
    rows = []
    for layer, one in found.items():
        for factor, examples in by_factor.items():
            labels = examples.labels.numpy()
            measured = measure(labels, one.pictures, permutations=permutations, seed=seed)
            low, high = renumbered(labels, one.pictures, seed=seed)
            gain = 1 - measured.entropy / measured.entropy_chance if measured.entropy_chance else 0.0
            rows.append({
                "layer": layer, "factor": factor, **measured._asdict(), "sigma_label_low": low,
                "sigma_label_high": high, "gain": gain,
            })  # fmt: skip
    return pd.DataFrame(rows)


def metrics(rows: pd.DataFrame, factor: str) -> dict[str, float]:
    """``<layer>.t<timestep>.<measure>`` of one factor, and ``<layer>.t<timestep>.<factor>.<measure>`` of all.

    Args:
        rows: from :func:`table`.
        factor: the one that is meant where none is named.
    """
    named = {}
    for row in rows.to_dict("records"):
        if row["factor"] == factor:
            named |= {f"{row['layer']}.{name}": row[name] for name in MEASURES}
        named |= {f"{row['layer']}.{row['factor']}.{name}": row[name] for name in MEASURES}
    return named


def grid(one: Tops, pictures: Pictures, examples: Examples, count: int, seed: int) -> dict[str, Tensor]:
    """The pictures of a few of the most active features, for :func:`vaelab.viz.charts.picture_grid`.

    Args:
        one: of a layer.
        pictures: those of the store.
        examples: with the classes that the rows' labels tell the entropy of.
        count: how many features, drawn by ``seed``: a choice by eye would show what one likes.
        seed: fixes them.
    """
    drawn = np.sort(np.random.default_rng(seed).permutation(len(one.features))[:count])
    each_entropy = entropies(examples.labels.numpy()[one.pictures[drawn]])
    images = [[examples.kept.items[examples.items[i][0]]["image"] for i in one.pictures[row]] for row in drawn]
    return {
        f"feature {one.features[row]}, {entropy:.1f} bit": pictures.stack(shown)
        for row, entropy, shown in zip(drawn, each_entropy, images, strict=True)
    }
