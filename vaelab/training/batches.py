"""Sources of training batches that can be resumed at any batch and split between processes.

A source is a function that returns an endless iterator. It takes ``start`` (the number of batches that this process
has already used), ``rank`` (the index of this process) and ``world`` (the number of processes). Batch n of the whole
run goes to process ``n % world``.
"""

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from vaelab.core.validate import at_least, one_of

Batches = Callable[..., Iterator[Any]]
"""A source of batches for :func:`vaelab.training.loop.train`; called as ``batches(start=, rank=, world=)``."""

REMAINDERS = ("drop", "wrap", "join")


@dataclass(frozen=True)
class NumberedBatches:
    """Endless batches, each made from its index alone, so that no state has to be stored to resume.

    ::

        batches = NumberedBatches(lambda number: draw(np.random.default_rng([seed, number])))
        for batch in batches(start=100): ...      # starts with the 101st batch
    """

    make: Callable[[int], Any]
    """Makes batch n of the run, counted from 0."""

    def __call__(self, start: int = 0, rank: int = 0, world: int = 1) -> Iterator[Any]:
        """Iterate over this process's batches from index ``start`` on; see the module's docstring."""
        return map(self.make, itertools.count(start * world + rank, world))


def shuffled_batches(
    count: int, batch_size: int, seed: int, take: Callable[[np.ndarray, int], Any], *, remainder: str = "drop"
) -> NumberedBatches:
    """Make endless batches of a data set of ``count`` rows, in another order in each epoch.

    Args:
        count: the number of rows of the data set, at least 1.
        batch_size: rows per batch.
        seed: determines the order: epoch e is permuted by NumPy's default generator seeded with [seed, e].
        take: makes a batch from an array of row indices (batch_size,) and the epoch of the first of them.
        remainder: what happens to the last rows of an epoch if they do not fill a batch. ``drop``
            leaves them out of this epoch, ``wrap`` completes the batch with the epoch's first rows,
            ``join`` completes it with the first rows of the next epoch. If the data set is smaller than one
            batch, ``drop`` wraps too.
    """
    at_least("count", count, 1)
    at_least("batch_size", batch_size, 1)
    one_of("remainder", remainder, REMAINDERS)

    @lru_cache(maxsize=2)
    def order(epoch: int) -> np.ndarray:
        return np.random.default_rng([seed, epoch]).permutation(count)

    def make(number: int) -> Any:
        if remainder == "join":
            epochs, places = np.divmod(np.arange(number * batch_size, (number + 1) * batch_size), count)
            rows = [order(int(epoch))[places[epochs == epoch]] for epoch in np.unique(epochs)]
            return take(np.concatenate(rows), int(epochs[0]))
        per_epoch = max(1, count // batch_size) if remainder == "drop" else -(-count // batch_size)
        epoch, place = divmod(number, per_epoch)
        places = range(place * batch_size, (place + 1) * batch_size)
        return take(np.take(order(epoch), places, mode="wrap"), epoch)

    return NumberedBatches(make)
