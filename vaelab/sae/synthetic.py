"""Synthetic vectors from a known dictionary, and how much of it a trained autoencoder recovers."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from vaelab.core.validate import at_least


@dataclass(frozen=True)
class SyntheticSparseData:
    """Random vectors that are sparse sums of known features, plus noise and a mean."""

    d: int = 128
    """Width of the vectors."""
    n_features: int = 512
    """Number of features; they have unit length and random directions."""
    active: int = 8
    """Number of different features in each vector; their activations are uniform in [0.5, 1.5]."""
    noise: float = 0.01
    """Standard deviation of the noise."""
    length: float = 1.0
    """A factor that all vectors are multiplied by."""
    seed: int = 0
    """Determines the dictionary and every batch."""

    def __post_init__(self) -> None:
        for name in ("d", "n_features", "active"):
            at_least(name, getattr(self, name), 1)
        at_least("noise", self.noise, 0)
        if self.active > self.n_features:
            raise ValueError(f"active: {self.active} of {self.n_features} features")

    def features(self) -> Tensor:
        """Generate the dictionary: (n_features, d), rows of unit length."""
        return F.normalize(torch.randn(self.n_features, self.d, generator=self._generator(0)))

    def mean(self) -> Tensor:
        """Generate the vector (d,) that is added to every sample."""
        return self.length * torch.randn(self.d, generator=self._generator(1)) / self.d**0.5

    def vectors(self, count: int, number: int = 0) -> Tensor:
        """Generate the batch with index ``number``, of ``count`` vectors: (count, d)."""
        generator = self._generator(2 + number)
        which = torch.rand(count, self.n_features, generator=generator).topk(self.active).indices
        amounts = 0.5 + torch.rand(count, self.active, generator=generator)
        made = F.embedding_bag(which, self.features(), mode="sum", per_sample_weights=amounts)
        made += self.noise * torch.randn(count, self.d, generator=generator)
        return self.length * made + self.mean()

    def _generator(self, number: int) -> torch.Generator:
        # differs from torch.manual_seed(seed): an autoencoder of the same seed must not start as the true dictionary
        state = np.random.SeedSequence([self.seed, number]).generate_state(1, np.uint64)[0]
        return torch.Generator().manual_seed(int(state >> 1))

    def batches(self, batch_size: int, block: str = "planted") -> Callable[..., Iterator[dict[str, Tensor]]]:
        """Make endless batches under the name of a block, for :func:`vaelab.sae.train.train_saes`."""

        def batches(start: int = 0, rank: int = 0, world: int = 1) -> Iterator[dict[str, Tensor]]:
            number = start * world + rank
            while True:
                yield {block: self.vectors(batch_size, number)}
                number += world

        return batches


def dictionary_recovery(truth: Tensor, found: Tensor) -> float:
    """Compute the mean, over the rows of ``truth`` (n, d), of the largest cosine with a row of ``found`` (m, d)."""
    return float((F.normalize(truth) @ F.normalize(found).T).amax(1).mean())
