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

from vaelab import purity, store
from vaelab.checks import at_least, one_of, unknown
from vaelab.examples import Examples, read
from vaelab.features import Summary, summarise
from vaelab.labelled import Pictures
from vaelab.layer_features import refuse_other_pictures
from vaelab.sae import SAE, SAEConfig
from vaelab.sae_training import Wanted
from vaelab.store import Layout, Store

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
        options: of every :class:`vaelab.sae.SAEConfig`.

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
        A row a layer and factor: ``layer``, ``factor``, the fields of :class:`vaelab.purity.Purity`, the
        range of sigma_label under other numberings of the classes (``sigma_label_low``,
        ``sigma_label_high``), and ``gain``, by how much the entropy is below that of chance: 0 is
        chance, 1 is pure.
    """
    rows = []
    for layer, one in found.items():
        for factor, examples in by_factor.items():
            labels = examples.labels.numpy()
            measured = purity.measure(labels, one.pictures, permutations=permutations, seed=seed)
            low, high = purity.renumbered(labels, one.pictures, seed=seed)
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
            named |= {f"{row['layer']}.{measure}": row[measure] for measure in MEASURES}
        named |= {f"{row['layer']}.{row['factor']}.{measure}": row[measure] for measure in MEASURES}
    return named


def grid(one: Tops, pictures: Pictures, examples: Examples, count: int, seed: int) -> dict[str, Tensor]:
    """The pictures of a few of the most active features, for :func:`vaelab.plots.picture_grid`.

    Args:
        one: of a layer.
        pictures: those of the store.
        examples: with the classes that the rows' labels tell the entropy of.
        count: how many features, drawn by ``seed``: a choice by eye would show what one likes.
        seed: fixes them.
    """
    drawn = np.sort(np.random.default_rng(seed).permutation(len(one.features))[:count])
    entropies = purity.entropies(examples.labels.numpy()[one.pictures[drawn]])
    images = [[examples.kept.items[examples.items[i][0]]["image"] for i in one.pictures[row]] for row in drawn]
    return {
        f"feature {one.features[row]}, {entropy:.1f} bit": pictures.stack(shown)
        for row, entropy, shown in zip(drawn, entropies, images, strict=True)
    }
