"""How pure features are: whether the pictures that activate one most are of one class.

Kim et al. ("Revelio", section 4.2) take sigma_label, the standard deviation of the class *numbers* of
the ten pictures, averaged over the thousand most active features. It depends on how classes happen to
be numbered, so beside it stand what does not: the entropy of the classes, the share of the most
frequent one, and a permutation test of the entropy.
"""

from typing import NamedTuple

import numpy as np

from vaelab.checks import at_least


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
