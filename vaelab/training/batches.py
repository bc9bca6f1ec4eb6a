"""Sources of training batches that can be resumed at any batch and split between processes.

A source is a function of ``start`` (the batches that this process has already used), ``rank`` and
``world`` (this process and the number of processes) that gives an endless iterator. Batch number n of
the whole run goes to process ``n % world``.
"""

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from vaelab.core.validate import at_least, one_of

Batches = Callable[..., Iterator[Any]]
"""What :func:`vaelab.training.loop.train` takes: called as ``batches(start=, rank=, world=)``."""

REMAINDERS = ("drop", "wrap", "join")


@dataclass(frozen=True)
class NumberedBatches:
    """Endless batches, each made from its number alone, so that no state has to be stored to resume.

    ::

        batches = NumberedBatches(lambda number: draw(np.random.default_rng([seed, number])))
        for batch in batches(start=100): ...      # from the 101st on
    """

    make: Callable[[int], Any]
    """Gives batch number n of the run, counted from 0."""

    def __call__(self, start: int = 0, rank: int = 0, world: int = 1) -> Iterator[Any]:
        """Iterate from this process's batch number ``start``; see the module's docstring."""
        return map(self.make, itertools.count(start * world + rank, world))


def shuffled_batches(
    count: int, batch_size: int, seed: int, take: Callable[[np.ndarray, int], Any], *, remainder: str = "drop"
) -> NumberedBatches:
    """Endless batches of ``count`` rows, in another order each epoch.

    Args:
        count: rows of the data set, at least 1.
        batch_size: rows of a batch.
        seed: epoch e's order is that of NumPy's default generator seeded with [seed, e].
        take: makes a batch of an array of row numbers (batch_size,) and the epoch of the first.
        remainder: what happens to the last rows of an epoch where they fill no batch. ``drop``
            leaves them out of this epoch, ``wrap`` completes the batch with the epoch's first rows,
            ``join`` completes it with the first rows of the next epoch. A data set smaller than one
            batch wraps under ``drop`` too.
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
