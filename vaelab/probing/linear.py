"""Linear probes on feature vectors, and accuracies with their confidence intervals.

The strength of the regularisation is selected on validation examples. The test examples are classified once, by the
selected probe.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from vaelab.core.stats import wilson

STRENGTHS = (1e-3, 1e-2, 1e-1, 1.0, 10.0)
"""Values of C, the inverse regularisation strength of scikit-learn's logistic regression."""


class Accuracy(NamedTuple):
    """Top-1 accuracy on test examples, which were used neither for training nor for selection."""

    accuracy: float
    """Fraction of the examples whose class is predicted correctly."""
    low: float
    """Lower end of Wilson's 95 % interval."""
    high: float
    """Upper end of the interval."""
    chance: float
    """Accuracy of always predicting the most frequent class of the training examples."""
    count: int
    """Number of test examples."""


class LinearProbe(NamedTuple):
    """The predictions of a fitted linear probe."""

    predicted: np.ndarray
    """(M,) predicted class indices of the test examples."""
    strength: float
    """The selected C, the inverse regularisation strength."""
    validation: float
    """Accuracy on the validation examples."""


def measure_accuracy(
    predicted: Sequence[int] | np.ndarray, truth: Sequence[int] | np.ndarray, training_labels: Any
) -> Accuracy:
    """Measure the accuracy of predicted classes.

    Args:
        predicted: (N,) predicted class indices.
        truth: (N,) true class indices.
        training_labels: (M,) class indices of the training examples, whose most frequent class is the guess by chance.

    Raises:
        ValueError: the arrays differ in length, or there is no example.
    """
    predicted, truth = np.asarray(predicted), np.asarray(truth)
    if predicted.shape != truth.shape:
        raise ValueError(f"predicted: {predicted.shape} classes for {truth.shape} examples")
    correct = int((predicted == truth).sum())
    most_frequent = np.bincount(np.asarray(training_labels)).argmax()
    low, high = wilson(correct, len(truth))
    return Accuracy(correct / len(truth), low, high, float((truth == most_frequent).mean()), len(truth))


def fit_linear_probe(
    training: tuple[np.ndarray, np.ndarray],
    validation: tuple[np.ndarray, np.ndarray],
    test: np.ndarray,
    strengths: Sequence[float] = STRENGTHS,
) -> LinearProbe:
    """Fit a multinomial logistic regression on vectors standardised by the training examples' mean and deviation.

    Args:
        training: vectors (N, d) and their class indices (N,).
        validation: vectors and class indices of other examples, on which C is selected; among equals the smallest.
        test: vectors (M, d) of further examples.
        strengths: the values of C to select from.

    Raises:
        ValueError: there is no value of C, or all training examples are of one class.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.preprocessing import StandardScaler

    (vectors, labels), (held_out, truth) = training, validation
    if not strengths:
        raise ValueError("strengths: expected one or more values of C")
    if len(np.unique(labels)) < 2:
        raise ValueError(f"labels: all {len(labels)} training examples are of one class")
    scaler = StandardScaler().fit(vectors)
    vectors, held_out, test = (scaler.transform(each) for each in (vectors, held_out, test))
    best: tuple[float, float, Any] | None = None
    for strength in sorted(strengths):
        model = LogisticRegression(C=strength, max_iter=500).fit(vectors, labels)
        accuracy = float((model.predict(held_out) == truth).mean())
        if best is None or accuracy > best[0]:
            best = accuracy, strength, model
    accuracy, strength, model = best
    return LinearProbe(model.predict(test), strength, accuracy)


def class_share(vectors: np.ndarray, labels: np.ndarray) -> float:
    """Compute the share of the vectors' variance that lies between classes, corrected for chance.

    1 - (within / (N - C)) / (total / (N - 1)), with sums of squares within classes and in total. 0 is the expectation
    for random labels; 1 means that all vectors of a class are equal.

    Args:
        vectors: (N, d), one vector per example.
        labels: (N,) class indices of C classes, C < N.

    Raises:
        ValueError: there are fewer than two classes, or as many classes as vectors.
    """
    vectors = np.asarray(vectors, dtype=np.float64)
    classes, numbers = np.unique(labels, return_inverse=True)
    if not 1 < len(classes) < len(vectors):
        raise ValueError(
            f"labels: {len(vectors)} vectors of {len(classes)} classes; expected at least two classes and more vectors"
        )
    counts = np.bincount(numbers)
    means = np.zeros((len(classes), vectors.shape[1]))
    np.add.at(means, numbers, vectors)
    means /= counts[:, None]
    within = np.square(vectors - means[numbers]).sum() / (len(vectors) - len(classes))
    total = np.square(vectors - vectors.mean(0)).sum() / (len(vectors) - 1)
    return float(1 - within / total) if total > 0 else 0.0
