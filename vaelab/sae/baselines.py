"""Baselines that reconstruct vectors without a trained autoencoder: by zero, by the mean of the vectors, by a random
dictionary with the same top-k rule, and by as many principal components as an autoencoder has active features.
"""

from collections.abc import Callable, Iterable
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from vaelab.core.devices import to_float64
from vaelab.core.validate import at_least
from vaelab.sae.model import Codes


class Dictionary(Protocol):
    """Anything that encodes and decodes vectors: an autoencoder, or one of the baselines."""

    def encode(self, x: Tensor) -> Codes:
        """Compute the codes of vectors (N, d)."""

    def decode(self, codes: Codes) -> Tensor:
        """Reconstruct vectors (N, d) from codes."""

    def features(self) -> Tensor:
        """Return the directions that the codes are coefficients of: (n_features, d)."""


def reconstruction_function(dictionary: Dictionary) -> Callable[[Tensor], Tensor]:
    """Make the function from vectors (N, d) to their reconstructions (N, d)."""
    return lambda x: dictionary.decode(dictionary.encode(x))


class Moments(NamedTuple):
    """Mean and covariance of vectors; made by :func:`moments`."""

    count: int
    mean: Tensor
    """(d,) float64."""
    covariance: Tensor
    """(d, d) float64, divided by ``count``."""


def moments(batches: Iterable[Tensor]) -> Moments:
    """Compute mean and covariance of the vectors of all batches (n, d), summed in float64.

    Raises:
        ValueError: there is no vector.
    """
    total, first, second, shift = 0, None, None, None
    for batch in batches:
        batch = to_float64(batch)
        if shift is None:
            shift = batch.mean(0)  # sums about a distant point would lose the covariance to rounding
            first, second = torch.zeros_like(shift), torch.zeros(len(shift), len(shift)).to(shift)
        centred = batch - shift
        total, first = total + len(batch), first + centred.sum(0)
        second += centred.T @ centred
    if not total:
        raise ValueError("activations: a mean needs at least one vector")
    first /= total
    return Moments(total, shift + first, second / total - torch.outer(first, first))


class ConstantDictionary:
    """A dictionary without features, which reconstructs every vector as the same vector."""

    def __init__(self, vector: Tensor):
        """Args: the vector (d,) that every vector is reconstructed as."""
        self.vector = vector.float()

    def encode(self, x: Tensor) -> Codes:
        """Return empty codes: (N, 0)."""
        return Codes(x.new_empty(len(x), 0), torch.empty(len(x), 0, dtype=torch.long, device=x.device))

    def decode(self, codes: Codes) -> Tensor:
        """Return the vector N times: (N, d)."""
        return self.vector.to(codes.values.device).expand(len(codes.values), -1).contiguous()

    def features(self) -> Tensor:
        """Return no features: (0, d)."""
        return self.vector.new_empty(0, len(self.vector))


class RandomDictionary:
    """s = ReLU(TopK(W (x - b))), x' = W^T s + b (Surkov et al., equation 16, tied), with random rows
    of unit length for W and the mean of the vectors for b."""

    def __init__(self, mean: Tensor, k: int, n_features: int, seed: int = 0):
        """Args: the mean (d,), the number of active features per vector, the size of the dictionary, and its seed."""
        _at_most("k", k, "n_features", n_features)
        rows = torch.randn(n_features, len(mean), generator=torch.Generator().manual_seed(seed))
        self.rows, self.mean, self.k = torch.nn.functional.normalize(rows).to(mean.device), mean.float(), k

    def encode(self, x: Tensor) -> Codes:
        """Compute values and indices (N, k); if fewer than k products are positive, the other values are 0."""
        values, indices = ((x - self.mean.to(x)) @ self.rows.to(x).T).topk(self.k)
        return Codes(values.relu(), indices)

    def decode(self, codes: Codes) -> Tensor:
        """Reconstruct vectors (N, d) from codes."""
        values, rows = codes.values, self.rows.to(codes.values)
        sums = torch.nn.functional.embedding_bag(codes.indices, rows, per_sample_weights=values, mode="sum")
        return sums + self.mean.to(values)

    def features(self) -> Tensor:
        """Return the rows of W: (n_features, d)."""
        return self.rows


class LinearDictionary:
    """Directions of unit length as features of any sign: s = W (x - m), x' = W^T s + m.

    If the directions are orthogonal, x' is the projection on them.
    """

    def __init__(self, rows: Tensor, mean: Tensor):
        """Args: the directions W (n, d) and the mean m (d,)."""
        self.rows, self.mean = rows.float().contiguous(), mean.float()

    def encode(self, x: Tensor) -> Codes:
        """Compute the n coordinates, as values and indices (N, n)."""
        values = (x - self.mean.to(x)) @ self.rows.to(x).T
        return Codes(values, torch.arange(len(self.rows), device=x.device).expand(len(x), -1))

    def decode(self, codes: Codes) -> Tensor:
        """Reconstruct vectors (N, d) from codes."""
        return codes.values @ self.rows.to(codes.values) + self.mean.to(codes.values)

    def features(self) -> Tensor:
        """Return the directions: (n, d)."""
        return self.rows


class PrincipalComponents(LinearDictionary):
    """The mean and the k directions of the largest variance: x' = V^T V (x - m) + m.

    Among k directions that are the same for all vectors, these explain the most variance; an autoencoder selects its k
    features for each vector separately. scikit-learn's PCA needs all vectors in memory, this class only their moments.
    """

    def __init__(self, measured: Moments, k: int):
        """Args: the vectors' moments, and the number of components, of which those with the largest variance come
        first."""
        _at_most("k", k, "the vectors' width", len(measured.mean))
        _, directions = torch.linalg.eigh(measured.covariance)  # rising
        super().__init__(directions.T.flip(0)[:k], measured.mean)


def build_baselines(measured: Moments, k: int, n_features: int, seed: int = 0) -> dict[str, Dictionary]:
    """Build the four baselines (``zero``, ``mean``, ``random``, ``pca``) of an autoencoder with n_features features, k
    of them active.

    Args:
        measured: the moments of the vectors that the autoencoder was trained on.
        k: the number of active features per vector, and of principal components.
        n_features: the size of the random dictionary.
        seed: the seed of the random dictionary.

    Raises:
        ValueError: k is above n_features or above the width of the vectors.
    """
    return {
        "zero": ConstantDictionary(torch.zeros_like(measured.mean)),
        "mean": ConstantDictionary(measured.mean),
        "random": RandomDictionary(measured.mean, k, n_features, seed),
        "pca": PrincipalComponents(measured, k),
    }


def _at_most(name: str, value: int, bound: str, limit: int) -> None:
    at_least(name, value, 1)
    if value > limit:
        raise ValueError(f"{name}: must be at most {bound} ({limit}), got {value}")
