"""Dictionaries that stand beside a trained autoencoder: neurons, PCA, ICA, random directions, class means, probes.

A readout gives every vector of a block's update one score per feature, and every feature a direction. Trained, frozen
and untrained autoencoders are readouts too, so that all of them are compared by the same code.
"""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.decomposition import FastICA
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from torch import Tensor

from vaelab.sae.baselines import PrincipalComponents, moments
from vaelab.sae.model import SAE, SAEConfig
from vaelab.sae.train import INITIALISATION_VECTORS, SAESpec, geometric_median, train_saes
from vaelab.training import TrainConfig, shuffled_batches

AUTOENCODERS = {"sae": "", "frozen_decoder": "decoder", "soft_frozen": "soft_decoder", "frozen_encoder": "encoder"}
"""Names of the trained autoencoder and of its frozen controls, with :attr:`vaelab.sae.train.SAESpec.frozen`."""
LINEAR = ("neurons", "pca", "ica", "random", "mean_difference", "probe")
"""Names of the readouts of :func:`linear_readouts`."""
FITTED_VECTORS = 20_000
"""The largest number of vectors that ICA and each linear probe are fitted on."""
ICA_ITERATIONS = 200


class Readout(Protocol):
    """Scores of vectors, and the directions that belong to them."""

    signed: bool
    """Whether a feature may also count when it is negative; an autoencoder's never does."""

    @property
    def directions(self) -> Tensor:
        """The directions (m, d), of unit length, that the features write."""

    def scores(self, x: Tensor) -> Tensor:
        """Compute the scores (N, m) of vectors (N, d)."""


@dataclass(frozen=True)
class LinearReadout:
    """Scores (x - mean) weights^T."""

    weights: Tensor
    """(m, d)."""
    mean: Tensor
    """(d,)."""
    written: Tensor | None = None
    """(m, d): the directions, if they are not the weights."""
    signed: bool = True

    @property
    def directions(self) -> Tensor:
        """The directions (m, d), of unit length."""
        return F.normalize(self.weights if self.written is None else self.written)

    def scores(self, x: Tensor) -> Tensor:
        """Compute the scores (N, m) of vectors (N, d)."""
        return (x - self.mean) @ self.weights.T


@dataclass(frozen=True)
class SAEReadout:
    """The codes of an autoencoder, zeros included."""

    sae: SAE
    signed: bool = False

    @property
    def directions(self) -> Tensor:
        """The features (m, d)."""
        return self.sae.features()

    def scores(self, x: Tensor) -> Tensor:
        """Compute the codes (N, m) of vectors (N, d)."""
        return self.sae.encode(x).dense(self.sae.config.n_features)


def linear_readouts(vectors: Tensor, labels: np.ndarray, n_random: int, seed: int) -> dict[str, list[LinearReadout]]:
    """Make the readouts :data:`LINEAR`, one each.

    Args:
        vectors: (N, d).
        labels: (N, V) bool, which of V concepts each vector shows; every concept must occur, and be absent, somewhere.
        n_random: the number of random directions.
        seed: seed of ``ica``, ``random``, and the choice of the vectors that ICA and probes are fitted on.
    """
    mean, d = vectors.mean(0), vectors.shape[1]
    principal = PrincipalComponents(moments([vectors]), d).features()
    rows = np.random.default_rng(seed).permutation(len(vectors))[:FITTED_VECTORS]
    random = torch.randn(n_random, d, generator=torch.Generator().manual_seed(10_000 + seed))
    return {
        "neurons": [LinearReadout(torch.eye(d), mean)],
        "pca": [LinearReadout(principal, mean)],
        "ica": [fit_ica(vectors[torch.from_numpy(rows)], seed)],
        "random": [LinearReadout(F.normalize(random), mean)],
        "mean_difference": [LinearReadout(mean_differences(vectors, labels), mean)],
        "probe": [fit_probes(vectors, labels, seed)],
    }


def fit_ica(vectors: Tensor, seed: int) -> LinearReadout:
    """Fit independent components (scikit-learn's FastICA) to vectors (N, d); their directions are the mixing matrix's.

    If the iteration has not converged after :data:`ICA_ITERATIONS`, its last components are used.
    """
    ica = FastICA(whiten="unit-variance", max_iter=ICA_ITERATIONS, tol=1e-3, random_state=seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        ica.fit(vectors.double().numpy())
    weights, mixing, mean = (
        torch.from_numpy(np.asarray(each, np.float32)) for each in (ica.components_, ica.mixing_, ica.mean_)
    )
    return LinearReadout(weights, mean, mixing.T)


def mean_differences(vectors: Tensor, labels: np.ndarray) -> Tensor:
    """Compute (V, d): for each concept the mean of the vectors (N, d) that show it minus the mean of the others."""
    shows = torch.from_numpy(labels).to(vectors)
    inside, count = shows.T @ vectors, shows.sum(0)[:, None]
    return inside / count - (vectors.sum(0) - inside) / (len(vectors) - count)


def fit_probes(vectors: Tensor, labels: np.ndarray, seed: int) -> LinearReadout:
    """Fit one logistic regression per concept (scikit-learn's), on all vectors (N, d) that show it and as many others
    as :data:`FITTED_VECTORS` leaves room for."""
    rng, x = np.random.default_rng(seed), vectors.double().numpy()
    mean, scale = x.mean(0), x.std() or 1.0
    weights = []
    for shown in labels.T:
        inside, outside = (rng.permutation(np.flatnonzero(each)) for each in (shown, ~shown))
        inside = inside[: FITTED_VECTORS // 2]
        rows = np.concatenate([inside, outside[: FITTED_VECTORS - len(inside)]])
        probe = LogisticRegression(solver="newton-cholesky", max_iter=50).fit((x[rows] - mean) / scale, shown[rows])
        weights.append(probe.coef_[0] / scale)
    return LinearReadout(torch.from_numpy(np.asarray(weights, np.float32)), torch.from_numpy(mean.astype(np.float32)))


def train_readouts(
    vectors: Tensor,
    sae: SAEConfig,
    config: TrainConfig,
    batch_size: int,
    seeds: Sequence[int],
    variants: Sequence[str] = (),
    frozen: bool = True,
) -> dict[str, list[SAEReadout]]:
    """Train an autoencoder and its controls on vectors (N, d), one per seed, in one pass.

    Args:
        vectors: what is learned from.
        sae: the autoencoder.
        config: the optimisation.
        batch_size: vectors per step.
        seeds: seeds of the initial weights.
        variants: further variants to train from the first seed, named as in :class:`vaelab.sae.model.SAEConfig`.
        frozen: whether the frozen controls and the untrained autoencoder are made too.

    Returns:
        ``sae``, the variants and, with ``frozen``, the other names of :data:`AUTOENCODERS` and ``untrained``: the
        initial weights of ``sae`` around the vectors' geometric median.
    """
    kinds = {name: kind for name, kind in AUTOENCODERS.items() if frozen or name == "sae"}
    specs = {(name, s): SAESpec("update", sae, s, kind) for name, kind in kinds.items() for s in seeds}
    specs |= {(name, seeds[0]): SAESpec("update", replace(sae, variant=name), seeds[0]) for name in variants}
    named = {f"{name}-s{s}": spec for (name, s), spec in specs.items()}
    batches = shuffled_batches(
        len(vectors), batch_size, config.seed, lambda rows, _: {"update": vectors[torch.from_numpy(rows)]}
    )
    saes = train_saes(named, batches, config).saes
    readouts: dict[str, list[SAEReadout]] = {name: [] for name, _ in specs}
    for (name, _), sae_trained in zip(specs, saes.values(), strict=True):
        readouts[name].append(SAEReadout(sae_trained.cpu()))
    if frozen:
        readouts["untrained"] = [SAEReadout(untrained(vectors, sae, seed)) for seed in seeds]
    return readouts


def untrained(vectors: Tensor, config: SAEConfig, seed: int) -> SAE:
    """Make an autoencoder with its initial weights, whose ``pre_bias`` is the geometric median of vectors (N, d)."""
    sae = SAE(config, seed).eval()
    with torch.no_grad():
        sae.pre_bias.copy_(geometric_median(vectors[:INITIALISATION_VECTORS]))
    return sae


def explained_variance(readouts: Mapping[str, Sequence[Readout]], vectors: Tensor) -> dict[str, float]:
    """Compute the share of the variance of vectors (N, d) that autoencoders explain, averaged over seeds."""
    total = (vectors - vectors.mean(0)).square().sum()
    return {
        name: float(np.mean([1 - float((each.sae(vectors) - vectors).square().sum() / total) for each in own]))
        for name, own in readouts.items()
        if all(isinstance(each, SAEReadout) for each in own)
    }
