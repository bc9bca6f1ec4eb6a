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
RANK = 1e-7
"""Directions in which the vectors vary less than this share of the largest singular value are left out."""
GRADIENT, DECREASE = 1e-6, 1e-7
"""A fit ends when its gradient (per picture, in the scaled weights) or a step's relative decrease is smaller."""


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
    uniform: float
    """Accuracy of guessing each class equally often: 1 / the number of classes of the training examples."""


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
    counts = np.bincount(np.asarray(training_labels))
    low, high = wilson(correct, len(truth))
    commonest = float((truth == counts.argmax()).mean())
    return Accuracy(correct / len(truth), low, high, commonest, len(truth), 1 / np.count_nonzero(counts))


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
    from sklearn.preprocessing import StandardScaler

    (vectors, labels), (held_out, truth) = training, validation
    if not strengths:
        raise ValueError("strengths: expected one or more values of C")
    if len(np.unique(labels)) < 2:
        raise ValueError(f"labels: all {len(labels)} training examples are of one class")
    scaler = StandardScaler().fit(vectors)
    vectors, held_out, test = (scaler.transform(each) for each in (vectors, held_out, test))
    classes, numbers = np.unique(labels, return_inverse=True)
    best: tuple[float, float, LogisticFit] | None = None
    for strength, fit in zip(sorted(strengths), logistic_path(vectors, numbers, sorted(strengths)), strict=True):
        accuracy = float((classes[fit.predict(held_out)] == truth).mean())
        if best is None or accuracy > best[0]:
            best = accuracy, strength, fit
    accuracy, strength, fit = best
    return LinearProbe(classes[fit.predict(test)], strength, accuracy)


class LogisticFit(NamedTuple):
    """A fitted multinomial logistic regression."""

    weights: np.ndarray
    """(d, K), one column per class."""
    offsets: np.ndarray
    """(K,)."""

    def predict(self, vectors: np.ndarray) -> np.ndarray:
        """Predict the class indices (N,) of vectors (N, d)."""
        return (vectors @ self.weights + self.offsets).argmax(1)


def logistic_path(vectors: np.ndarray, labels: np.ndarray, strengths: Sequence[float]) -> list[LogisticFit]:
    """Fit multinomial logistic regressions of rising C, each from the solution for the C before it.

    For each C this minimises C times the summed cross-entropy plus half the squared weights, as scikit-learn's
    ``LogisticRegression`` does, with L-BFGS. The weights are rotated to the principal axes of the vectors and scaled by
    the square root of the curvature there, which is (C s^2 / K + 1) for the singular value s and K classes. Neither
    changes the minimum. They make the problem well conditioned, although a denoiser's channels are strongly correlated.

    Args:
        vectors: (N, d) of mean 0.
        labels: (N,) class indices 0 to K - 1; every class occurs.
        strengths: the values of C, in rising order.
    """
    from scipy.optimize import minimize

    count, classes = len(vectors), int(labels.max()) + 1
    left, sizes, axes = np.linalg.svd(np.asarray(vectors, np.float64), full_matrices=False)
    kept = sizes > RANK * sizes.max()
    sizes, axes = sizes[kept], axes[kept]
    inputs = np.hstack([left[:, kept] * sizes, np.ones((count, 1))])  # the last column belongs to the offsets
    targets = np.eye(classes)[labels]
    weights, fits = np.zeros((inputs.shape[1], classes)), []
    for strength in (
        strengths if classes > 2 else np.divide(strengths, 2)
    ):  # scikit-learn has one vector for two classes
        curvature = np.append(sizes**2 / classes + 1 / strength, count / classes)
        scale = np.sqrt(curvature)[:, None]
        scaled = (inputs / scale.T).astype(np.float32)
        penalty = np.append(np.full(len(sizes), 1 / strength), 0.0)[:, None] / scale**2

        def objective(
            flat: np.ndarray, scaled: np.ndarray = scaled, penalty: np.ndarray = penalty
        ) -> tuple[float, np.ndarray]:
            current = flat.reshape(-1, classes)
            logits = scaled @ current.astype(np.float32)
            logits -= logits.max(1, keepdims=True)
            shares = np.exp(logits)
            sums = shares.sum(1, keepdims=True)
            loss = np.log(sums).sum(dtype=np.float64) - logits[np.arange(count), labels].sum(dtype=np.float64)
            slope = scaled.T @ (shares / sums - targets).astype(np.float32) + penalty * current
            return (loss + (penalty * current**2).sum() / 2) / count, (slope / count).ravel().astype(np.float64)

        options = {"maxiter": 500, "gtol": GRADIENT, "ftol": DECREASE}
        found = minimize(objective, (weights * scale).ravel(), jac=True, method="L-BFGS-B", options=options)
        weights = found.x.reshape(weights.shape) / scale
        fits.append(LogisticFit(axes.T @ weights[:-1], weights[-1]))
    return fits


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
