"""How fast the statistics of features are computed, and how much memory they take.

The pass of :mod:`vaelab.sae.feature_statistics` runs over random vectors that are made batch by batch, so that the
memory measured is that of the pass alone. Each size has a process of its own, whose peak memory is read at the end.

::

    python -m vaelab.bench.features
"""

import multiprocessing
import time
from typing import Any

import pandas as pd
import torch

from vaelab.core.devices import peak_memory
from vaelab.core.validate import at_least
from vaelab.sae.feature_statistics import FeatureStatistics
from vaelab.sae.model import SAE, SAEConfig

POSITIONS = 256
"""Vectors of an item."""
BATCH_ITEMS = 64
"""Items of a batch, as in :func:`vaelab.sae.feature_statistics.collect_statistics`."""


def pass_over_vectors(vectors: int, n_features: int, width: int, k: int) -> dict[str, Any]:
    """Encode random vectors with an untrained autoencoder and add their codes to its statistics.

    Args:
        vectors: the number of vectors; whole items are made of them.
        n_features: the number of features.
        width: the width d of the vectors.
        k: the number of active features.

    Returns:
        ``vectors``, ``n_features``, ``seconds``, ``cpu_seconds``, ``encode_share`` (the share of the seconds that the
        autoencoder took) and ``added_mb`` (the process's peak memory less that before the statistics were made).
    """
    at_least("vectors", vectors, POSITIONS)
    sae, generator = SAE(SAEConfig(width, n_features, k)), torch.Generator().manual_seed(0)
    words = ["circle", "square"]
    before, items, encoding = peak_memory(torch.device("cpu")), vectors // POSITIONS, 0.0
    began, cpu = time.perf_counter(), time.process_time()
    statistics = FeatureStatistics(n_features, k, words=words)
    for first in range(0, items, BATCH_ITEMS):
        numbers = range(first, min(first + BATCH_ITEMS, items))
        x = torch.randn(len(numbers), POSITIONS, width, generator=generator)
        started = time.perf_counter()
        codes = sae.encode(x)
        encoding += time.perf_counter() - started
        statistics.add(codes, numbers, [{"prompt": words[number % 2], "timestep": 0.0} for number in numbers])
    seconds, cpu = time.perf_counter() - began, time.process_time() - cpu
    return {
        "vectors": items * POSITIONS, "n_features": n_features, "seconds": seconds, "cpu_seconds": cpu,
        "encode_share": encoding / seconds, "added_mb": (peak_memory(torch.device("cpu")) - before) / 2**20,
    }  # fmt: skip


def statistics_seconds(
    vectors: int = 100_000, n_features: int = 5_120, factors: tuple[int, ...] = (1, 4, 16), *, width: int = 64,
    k: int = 10,
) -> pd.DataFrame:  # fmt: skip
    """Measure the pass at several numbers of vectors, and at several numbers of features.

    Args:
        vectors: the smallest number of vectors.
        n_features: the smallest number of features.
        factors: by how much each of the two grows while the other is the smallest; the first is 1.
        width: the width of the vectors.
        k: the number of active features.

    Returns:
        One row per size, with the columns of :func:`pass_over_vectors`.
    """
    sizes = [(vectors * factor, n_features) for factor in factors]
    sizes += [(vectors, n_features * factor) for factor in factors if factor != 1]
    rows = []
    for size in sizes:
        with multiprocessing.get_context("spawn").Pool(1) as child:
            rows.append(child.apply(pass_over_vectors, (*size, width, k)))
    return pd.DataFrame(rows)


if __name__ == "__main__":
    print(statistics_seconds().to_string(index=False))
