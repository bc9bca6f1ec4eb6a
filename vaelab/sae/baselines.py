"""Baselines of a reconstruction that need no trained autoencoder: zero, the mean of the vectors, a random dictionary
with the same top-k rule, and as many principal components as an autoencoder has active features.
"""

from collections.abc import Callable, Iterable
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from vaelab.core.validate import at_least
from vaelab.sae.model import Codes, widen


class Dictionary(Protocol):
    """Anything that encodes and decodes vectors: an autoencoder, or one of the baselines."""

    def encode(self, x: Tensor) -> Codes:
        """The codes of vectors (N, d)."""

    def decode(self, codes: Codes) -> Tensor:
        """The vectors (N, d) that codes reconstruct."""

    def features(self) -> Tensor:
        """The directions of the codes: (n_features, d)."""


def reconstruction_function(dictionary: Dictionary) -> Callable[[Tensor], Tensor]:
    """The function from vectors (N, d) to their reconstructions (N, d)."""
    return lambda x: dictionary.decode(dictionary.encode(x))


class Moments(NamedTuple):
    """Mean and covariance of vectors; made by :func:`moments`."""

    count: int
    mean: Tensor
    """(d,) float64."""
    covariance: Tensor
    """(d, d) float64, divided by ``count``."""


def moments(batches: Iterable[Tensor]) -> Moments:
    """Mean and covariance of the vectors of all batches (n, d), summed in float64.

    Raises:
        ValueError: no vector at all.
    """
    total, first, second, shift = 0, None, None, None
    for batch in batches:
        batch = widen(batch)
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
        """Args: ``vector`` (d,)."""
        self.vector = vector.float()

    def encode(self, x: Tensor) -> Codes:
        """No codes: (N, 0)."""
        return Codes(x.new_empty(len(x), 0), torch.empty(len(x), 0, dtype=torch.long, device=x.device))

    def decode(self, codes: Codes) -> Tensor:
        """The vector, N times: (N, d)."""
        return self.vector.to(codes.values.device).expand(len(codes.values), -1).contiguous()

    def features(self) -> Tensor:
        """(0, d)."""
        return self.vector.new_empty(0, len(self.vector))


class RandomDictionary:
    """s = ReLU(TopK(W (x - b))), x' = W^T s + b (Surkov et al., equation 16, tied), with random rows
    of unit length for W and the mean of the vectors for b."""

    def __init__(self, mean: Tensor, k: int, n_features: int, seed: int = 0):
        """Args: ``mean`` (d,), active features of a vector, size of the dictionary, and its seed."""
        _at_most("k", k, "n_features", n_features)
        rows = torch.randn(n_features, len(mean), generator=torch.Generator().manual_seed(seed))
        self.rows, self.mean, self.k = torch.nn.functional.normalize(rows).to(mean.device), mean.float(), k

    def encode(self, x: Tensor) -> Codes:
        """Values and indices (N, k); a value is 0 where fewer than k products are positive."""
        values, indices = ((x - self.mean.to(x)) @ self.rows.to(x).T).topk(self.k)
        return Codes(values.relu(), indices)

    def decode(self, codes: Codes) -> Tensor:
        """(N, d)."""
        values, rows = codes.values, self.rows.to(codes.values)
        sums = torch.nn.functional.embedding_bag(codes.indices, rows, per_sample_weights=values, mode="sum")
        return sums + self.mean.to(values)

    def features(self) -> Tensor:
        """The rows of W: (n_features, d)."""
        return self.rows


class PrincipalComponents:
    """The mean and the k directions of the largest variance: x' = V^T V (x - m) + m. No other k
    directions that are the same for every vector explain more variance; an autoencoder selects its k for each
    vector.

    scikit-learn's PCA needs all vectors in memory; this one needs their moments only."""

    def __init__(self, measured: Moments, k: int):
        """Args: the vectors' moments, and the number of components."""
        _at_most("k", k, "the vectors' width", len(measured.mean))
        _, directions = torch.linalg.eigh(measured.covariance)  # rising
        self.rows, self.mean = directions.T.flip(0)[:k].float().contiguous(), measured.mean.float()

    def encode(self, x: Tensor) -> Codes:
        """The k coordinates: values and indices (N, k)."""
        values = (x - self.mean.to(x)) @ self.rows.to(x).T
        return Codes(values, torch.arange(len(self.rows), device=x.device).expand(len(x), -1))

    def decode(self, codes: Codes) -> Tensor:
        """(N, d)."""
        return codes.values @ self.rows.to(codes.values) + self.mean.to(codes.values)

    def features(self) -> Tensor:
        """The components, the largest first: (k, d)."""
        return self.rows


def build_baselines(measured: Moments, k: int, n_features: int, seed: int = 0) -> dict[str, Dictionary]:
    """The four baselines for an autoencoder of n_features of which k are active: ``zero``, ``mean``,
    ``random`` and ``pca``.

    Args:
        measured: moments of the vectors that the autoencoder was trained on.
        k: active features of a vector, and number of principal components.
        n_features: size of the random dictionary.
        seed: seed of the random dictionary.

    Raises:
        ValueError: k above n_features or above the vectors' width.
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
