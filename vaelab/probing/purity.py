"""Purity of a layer's features: a feature is pure if the pictures that activate it most are all of one class.

Kim et al. ("Revelio", sections 3.2 and 4.2, appendix F) train a k-sparse autoencoder on each layer, on vectors averaged
over positions, of uncropped pictures (crops and flips are for Diff-C alone, section 4.1). They take the 1,000 most
active features and the ten top activating pictures of each. Their measure sigma_label is the standard deviation of the
pictures' class *numbers*, so it depends on how the classes happen to be numbered. The entropy of the classes, the share
of the most frequent class, and a permutation test of the entropy do not; they are reported too.

The paper does not say by what features are ranked as most active; here it is their largest activation.
A layer is a block at a timestep, such as ``up_ft1.t25``; a factor is a set of classes, such as the colours.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from torch import Tensor

from vaelab import store
from vaelab.core.validate import at_least, one_of, unknown
from vaelab.data.labelled import LabelledPictures
from vaelab.probing.dataset import Examples, load_examples
from vaelab.probing.layer_features import require_same_model, require_same_source
from vaelab.sae.model import SAE, SAEConfig
from vaelab.sae.top_activating import FeatureSummary, summarise_features
from vaelab.sae.train import SAESpec
from vaelab.store.format import Layout
from vaelab.store.reader import Store
from vaelab.training.planning import require_training_space

MEASURES = ("sigma_label", "entropy", "majority", "permutation_p")
"""The fields of :class:`Purity` that are recorded as metrics."""


class Purity(NamedTuple):
    """Purity of some features, as means over them, and its expectation if features were unrelated to the classes."""

    sigma_label: float
    """The paper's measure: the standard deviation of the class numbers of a feature's pictures; 0 is pure."""
    entropy: float
    """Entropy of the classes of a feature's pictures, in bits; 0 is pure."""
    majority: float
    """Share of the most frequent class among a feature's pictures; 1 is pure."""
    permutation_p: float
    """The p value: the share of permutations of the labels whose entropy is as low or lower."""
    sigma_label_chance: float
    """Mean of ``sigma_label`` over the permutations; the next two are such means of ``entropy`` and ``majority``."""
    entropy_chance: float
    majority_chance: float
    features: int
    """Number of features."""


class TopFeatures(NamedTuple):
    """The most active features of a layer, each with its top activating pictures."""

    features: np.ndarray
    """(F,) feature indices, the most active first."""
    pictures: np.ndarray
    """(F, n) indices of each feature's pictures among the examples."""
    summary: FeatureSummary
    """Statistics of all features of the layer."""


def sigma_labels(classes: np.ndarray) -> np.ndarray:
    """Compute the population standard deviation (F,) of the class indices (F, n) of each feature's pictures."""
    return classes.std(axis=1)


def entropies(classes: np.ndarray) -> np.ndarray:
    """Compute the entropy (F,) of the classes (F, n) of each feature's pictures, in bits."""
    shares = np.sort(_class_frequencies(classes), axis=1)  # so that a sum does not depend on the classes' order
    return -(shares * np.log2(np.where(shares > 0, shares, 1))).sum(axis=1) + 0.0


def majorities(classes: np.ndarray) -> np.ndarray:
    """Compute the share (F,) of the most frequent class among the classes (F, n) of each feature's pictures."""
    return _class_frequencies(classes).max(axis=1)


def measure_purity(labels: np.ndarray, top: np.ndarray, *, permutations: int = 200, seed: int = 0) -> Purity:
    """Measure the purity of some features.

    The test permutes the labels among all pictures, so that pictures that several features share stay shared.

    Args:
        labels: (N,) class indices of all pictures, from 0.
        top: (F, n) indices of each feature's pictures.
        permutations: the number of permutations in the test; its p value is at least 1 / (permutations + 1).
        seed: determines the permutations.

    Raises:
        ValueError: there is no feature, or an index of a picture or class is out of range.
    """
    labels, top = np.asarray(labels), np.asarray(top)
    at_least("permutations", permutations, 1)
    if top.ndim != 2 or not top.size:
        raise ValueError(f"top: expected pictures (F, n) of one or more features, got {top.shape}")
    if top.min() < 0 or top.max() >= len(labels) or labels.min() < 0:
        raise ValueError(
            f"top: expected picture numbers below {len(labels)} and labels from 0, got pictures {top.min()} to "
            f"{top.max()} and labels from {labels.min()}"
        )
    measured = _means(labels[top])
    rng = np.random.default_rng(seed)
    permuted = np.array([_means(rng.permutation(labels)[top]) for _ in range(permutations)])
    as_low = int((permuted[:, 1] <= measured[1] + 1e-12).sum())
    return Purity(*measured, (1 + as_low) / (1 + permutations), *map(float, permuted.mean(axis=0)), len(top))


def _means(classes: np.ndarray) -> tuple[float, float, float]:
    return tuple(float(measure(classes).mean()) for measure in (sigma_labels, entropies, majorities))


def _class_frequencies(classes: np.ndarray) -> np.ndarray:
    """Compute the share of every class (F, C) among the classes (F, n) of each feature's pictures."""
    features, count = classes.shape
    kinds = int(classes.max()) + 1
    places = np.arange(features)[:, None] * kinds + classes
    return np.bincount(places.ravel(), minlength=features * kinds).reshape(features, kinds) / count


def sigma_label_range(labels: np.ndarray, top: np.ndarray, *, times: int = 50, seed: int = 0) -> tuple[float, float]:
    """Find the smallest and largest sigma_label if the same classes are numbered differently.

    Args:
        labels: (N,) class indices, from 0.
        top: (F, n) indices of each feature's pictures.
        times: the number of random numberings to try.
        seed: determines the numberings.
    """
    at_least("times", times, 1)
    labels, rng = np.asarray(labels), np.random.default_rng(seed)
    kinds = int(labels.max()) + 1
    values = [float(sigma_labels(rng.permutation(kinds)[labels[top]]).mean()) for _ in range(times)]
    return min(values), max(values)


def open_features(activations: str, pictures: LabelledPictures, model: str) -> tuple[Store, dict[str, Examples]]:
    """Open a store of notebook 40 (features of a denoiser's layers), with its pictures and the classes of each factor.

    Args:
        activations: the store's folder.
        pictures: the pictures that the store must hold.
        model: the model that the store must have been made with.

    Raises:
        ValueError: the store holds other pictures or was made with another model, or the pictures have no labels.
    """
    features = store.open(activations, parameter="activations")
    require_same_model(features, model, "activations")
    require_same_source(features, pictures, {}, "activations")
    return features, {factor: load_examples(features, factor) for factor in pictures.classes or [""]}


def sae_specs(
    layout: Layout, layers: Sequence[str], expansion: int, k: int, seed: int, **options: Any
) -> dict[str, SAESpec]:
    """Specify a k-sparse autoencoder to train for each layer, by the layer's name.

    Args:
        layout: the store's layout.
        layers: the layers' names, such as ``up_ft1.t25``.
        expansion: the number of features per channel of the layer.
        k: the number of active features per picture.
        seed: the seed of the initial weights.
        options: further fields of every :class:`vaelab.sae.model.SAEConfig`.

    Raises:
        ValueError: the store does not have a layer, or the layer holds maps.
    """
    at_least("expansion", expansion, 1)
    for layer in layers:
        if layer not in layout:
            raise unknown("layers (of the activations)", layer, layout)
        if layout[layer].positions:
            raise ValueError(f"layers: {layer!r} holds maps; purity is measured on vectors averaged over positions")
    return {
        layer: SAESpec(layer, SAEConfig(layout[layer].width, expansion * layout[layer].width, k, **options), seed)
        for layer in layers
    }


def require_disk_space(specs: Mapping[str, SAESpec], folder: str | Path) -> int:
    """Require the disk space that training these autoencoders takes, see :func:`require_training_space`."""
    sizes = [
        2 * spec.config.n_features * spec.config.d + spec.config.n_features + spec.config.d for spec in specs.values()
    ]
    return require_training_space(f"{len(sizes)} autoencoders", max(sizes), sum(sizes), folder, together=True)


def validate_selection(
    by_factor: Mapping[str, Examples], factor: str, layers: Sequence[str], shown: Sequence[str], top: int
) -> None:
    """Validate parameters of notebook 41 before anything is trained.

    Raises:
        ValueError: the factor is unknown, a layer to be shown has no autoencoder, or ``top`` is above the number of
            pictures.
    """
    one_of("factor", factor, by_factor)
    for layer in shown:
        one_of("shown_layers", layer, layers)
    if top > (count := len(by_factor[factor])):
        raise ValueError(f"top: {top} pictures per feature, but the activations are of {count} pictures")


def save_saes(saes: Mapping[str, SAE], folder: Path) -> None:
    """Save each layer's autoencoder in a subfolder with the layer's name."""
    for layer, sae in saes.items():
        sae.save_pretrained(folder / layer)


def top_features(sae: SAE, examples: Examples, layer: str, *, features: int = 1000, top: int = 10) -> TopFeatures:
    """Find the most active features of a layer and the uncropped pictures that activate each of them most.

    Args:
        sae: the layer's autoencoder.
        examples: the pictures.
        layer: the layer's name in the store.
        features: the largest number of features to return; only features that are active on at least ``top`` pictures
            count.
        top: the number of pictures per feature.

    Raises:
        ValueError: no feature is active on ``top`` pictures.
    """
    items = [views[0] for views in examples.items]
    place = {item: number for number, item in enumerate(items)}
    summary = summarise_features(sae, examples.store, layer, top=top, items=items)
    chosen = summary.most_active(features)
    if not len(chosen):
        raise ValueError(
            f"top: no feature of {layer} is active on {top} of {len(items)} pictures; train longer or take more"
        )
    pictures = np.array([[place[item] for item in row] for row in summary.items[chosen].tolist()])
    return TopFeatures(chosen.numpy(), pictures, summary)


def purity_table(
    by_layer: Mapping[str, TopFeatures], by_factor: Mapping[str, Examples], *, permutations: int, seed: int
) -> pd.DataFrame:
    """Tabulate the purity of every layer's features, for every factor.

    Args:
        by_layer: the most active features of each layer.
        by_factor: for each factor, the same pictures with their classes of that factor.
        permutations: the number of permutations in the test.
        seed: determines the permutations.

    Returns:
        One row per layer and factor: ``layer``, ``factor``, the fields of :class:`Purity`, the range of sigma_label
        under other numberings of the classes (``sigma_label_low``, ``sigma_label_high``), and ``gain``, 1 - entropy /
        entropy_chance: 0 is chance, 1 is pure.
    """
    rows = []
    for layer, found in by_layer.items():
        for factor, examples in by_factor.items():
            labels = examples.labels.numpy()
            measured = measure_purity(labels, found.pictures, permutations=permutations, seed=seed)
            low, high = sigma_label_range(labels, found.pictures, seed=seed)
            gain = 1 - measured.entropy / measured.entropy_chance if measured.entropy_chance else 0.0
            rows.append({
                "layer": layer, "factor": factor, **measured._asdict(), "sigma_label_low": low,
                "sigma_label_high": high, "gain": gain,
            })  # fmt: skip
    return pd.DataFrame(rows)


def purity_metrics(rows: pd.DataFrame, factor: str) -> dict[str, float]:
    """Collect the metrics ``<layer>.<factor>.<measure>``, and ``<layer>.<measure>`` for the main factor.

    Args:
        rows: the table of :func:`purity_table`.
        factor: the main factor.
    """
    metrics = {}
    for row in rows.to_dict("records"):
        if row["factor"] == factor:
            metrics |= {f"{row['layer']}.{name}": row[name] for name in MEASURES}
        metrics |= {f"{row['layer']}.{row['factor']}.{name}": row[name] for name in MEASURES}
    return metrics


def feature_pictures(
    found: TopFeatures, pictures: LabelledPictures, examples: Examples, count: int, seed: int
) -> dict[str, Tensor]:
    """Collect the top activating pictures of a few features, for :func:`vaelab.viz.picture_grid`.

    Args:
        found: the most active features of a layer.
        pictures: the pictures of the store.
        examples: the examples, with the classes whose entropy stands in the rows' labels.
        count: the number of features; they are chosen at random, because a choice by eye would be biased.
        seed: determines which features are chosen.
    """
    drawn = np.sort(np.random.default_rng(seed).permutation(len(found.features))[:count])
    entropy = entropies(examples.labels.numpy()[found.pictures[drawn]])
    images = [[examples.store.items[examples.items[i][0]]["image"] for i in found.pictures[row]] for row in drawn]
    return {
        f"feature {found.features[row]}, {bits:.1f} bit": pictures.stack(shown)
        for row, bits, shown in zip(drawn, entropy, images, strict=True)
    }
