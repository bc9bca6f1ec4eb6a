"""What can be read off vectors by a linear classifier, and how sure an accuracy is.

The strength of the regularisation is chosen on validation examples; the test examples are classified
once, by the one that was chosen.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from vaelab.core.stats import wilson

STRENGTHS = (1e-3, 1e-2, 1e-1, 1.0, 10.0)
"""C of the logistic regressions that are tried: the smaller, the more regularised."""


class Accuracy(NamedTuple):
    """Of a classifier on examples it was neither trained nor chosen on."""

    accuracy: float
    """Share of the examples whose class is named (top-1)."""
    low: float
    """Lower end of its interval."""
    high: float
    """Upper end."""
    chance: float
    """What always naming the most frequent class of the training examples attains."""
    count: int
    """Test examples."""


class Probe(NamedTuple):
    """A linear probe and what it says of the test examples."""

    predicted: np.ndarray
    """(N,) a class number for each test example."""
    strength: float
    """The chosen C."""
    validation: float
    """Its accuracy on the validation examples."""


def score(predicted: Sequence[int] | np.ndarray, truth: Sequence[int] | np.ndarray, learned: Any) -> Accuracy:
    """How often ``predicted`` is right.

    Args:
        predicted: (N,) class numbers.
        truth: (N,) the true ones.
        learned: (M,) those of the training examples, which say what chance is.
    """
    predicted, truth = np.asarray(predicted), np.asarray(truth)
    if predicted.shape != truth.shape:
        raise ValueError(f"predicted: {predicted.shape} classes for {truth.shape} examples")
    right = int((predicted == truth).sum())
    most_frequent = np.bincount(np.asarray(learned)).argmax()
    low, high = wilson(right, len(truth))
    return Accuracy(right / len(truth), low, high, float((truth == most_frequent).mean()), len(truth))


def linear_probe(
    learn: tuple[np.ndarray, np.ndarray],
    validate: tuple[np.ndarray, np.ndarray],
    test: np.ndarray,
    strengths: Sequence[float] = STRENGTHS,
) -> Probe:
    """Multinomial logistic regression on vectors that are standardised by the training examples.

    Args:
        learn: vectors (N, d) and their class numbers (N,).
        validate: others, by which the strength is chosen; of equally good ones the most regularised.
        test: vectors (M, d) of further examples.
        strengths: values of C to choose from.

    Raises:
        ValueError: no strength, or training examples of one class alone.
    """
    from sklearn.linear_model import LogisticRegression

    (vectors, labels), (held_out, truth) = learn, validate
    if not strengths:
        raise ValueError("strengths: expected one or more values of C")
    if len(np.unique(labels)) < 2:
        raise ValueError(f"labels: all {len(labels)} training examples are of one class")
    mean, spread = vectors.mean(0), vectors.std(0)
    spread = np.where(spread > 0, spread, 1)
    best: tuple[float, float, Any] | None = None
    for strength in sorted(strengths):
        model = LogisticRegression(C=strength, max_iter=500).fit((vectors - mean) / spread, labels)
        accuracy = float((model.predict((held_out - mean) / spread) == truth).mean())
        if best is None or accuracy > best[0]:
            best = accuracy, strength, model
    accuracy, strength, model = best
    return Probe(model.predict((test - mean) / spread), strength, accuracy)


def class_share(vectors: np.ndarray, labels: np.ndarray) -> float:
    """The share of the vectors' variance that is between classes, beyond what classes dealt at random
    would have: 1 - (within / (N - C)) / (whole / (N - 1)). 0 is chance, 1 that classes are points.

    Args:
        vectors: (N, d).
        labels: (N,) class numbers of C classes, C below N.

    Raises:
        ValueError: fewer than two classes, or as many as vectors.
    """
    vectors = np.asarray(vectors, dtype=np.float64)
    classes, numbers = np.unique(labels, return_inverse=True)
    if not 1 < len(classes) < len(vectors):
        raise ValueError(f"labels: {len(vectors)} vectors of {len(classes)} classes; expected two or more, of several")
    counts = np.bincount(numbers)
    means = np.zeros((len(classes), vectors.shape[1]))
    np.add.at(means, numbers, vectors)
    means /= counts[:, None]
    within = np.square(vectors - means[numbers]).sum() / (len(vectors) - len(classes))
    whole = np.square(vectors - vectors.mean(0)).sum() / (len(vectors) - 1)
    return float(1 - within / whole) if whole > 0 else 0.0
