"""Fidelity of reconstructions: explained variance, number of active features (L0), dead and dense features.

From Surkov et al. ("Unpacking SDXL Turbo", appendix D, Table 2). Autoencoders and baselines are evaluated in the same
way and in one pass over the vectors; each selects active features by its own rule.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

import pandas as pd
import torch
from torch import Tensor

from vaelab.core.devices import to_float64
from vaelab.core.validate import at_least
from vaelab.sae.baselines import Dictionary

DENSE = 0.1
"""A feature that is active in more than this share of the vectors is dense."""


class Fidelity(NamedTuple):
    """Metrics of one dictionary over N vectors."""

    explained_variance: float
    """1 - fvu, the paper's "ratio of variance explained to the total variance": 1 is perfect, 0 is as good as
    reconstructing every vector by the mean, and there is no lower bound."""
    fvu: float
    """Fraction of variance unexplained: the sum of ||x - x'||^2 over the sum of ||x - mean(x)||^2."""
    by_channel: float
    """1 - Var(x_j - x'_j) / Var(x_j), averaged over the channels j that vary; the paper's code prints this value. It
    ignores a constant error, and weak channels count as much as strong ones."""
    l0: float
    """Mean number of active features per vector."""
    dead_fraction: float
    """Fraction of the features that are 0 for every vector; 0 if there are no features."""
    dense_fraction: float
    """Fraction of the features that are dense: active in more than ``dense`` of the vectors, by default a tenth."""


class _Sums:
    """Sums over the vectors for one dictionary: moments of its residuals, and how often each feature is active."""

    def __init__(self, dictionary: Dictionary):
        self.dictionary = dictionary
        self.active = torch.zeros(len(dictionary.features()), dtype=torch.long)
        self.first = self.second = 0.0

    def add(self, x: Tensor, target: Tensor) -> None:
        codes = self.dictionary.encode(x)
        residual = to_float64(target - self.dictionary.decode(codes))
        self.first, self.second = self.first + residual.sum(0), self.second + residual.square().sum(0)
        fired = codes.indices[codes.values != 0].cpu()
        self.active += torch.bincount(fired, minlength=len(self.active))


@torch.no_grad()
def evaluate_dictionaries(
    dictionaries: Mapping[str, Dictionary], batches: Iterable[Tensor], *, dense: float = DENSE,
    target: Callable[[Tensor], Tensor] | None = None,
) -> dict[str, Fidelity]:  # fmt: skip
    """Evaluate several dictionaries on the same vectors, read once and summed in float64.

    Args:
        dictionaries: the dictionaries by name.
        batches: batches of vectors (n, d), preferably held-out ones.
        dense: a feature is dense if it is active in more than this fraction of the vectors.
        target: returns what is reconstructed of a batch, for transcoders its outputs; None means the batch itself.

    Raises:
        ValueError: there is no vector, all vectors are equal, or a vector is not finite.
    """
    at_least("dense", dense, 0)
    sums = {name: _Sums(dictionary) for name, dictionary in dictionaries.items()}
    total, shift, first, second = 0, None, 0.0, 0.0
    for batch in batches:
        _finite(batch, total)
        wanted = target(batch) if target else batch
        wide = to_float64(wanted)
        shift = wide.mean(0) if shift is None else shift
        first, second = first + (wide - shift).sum(0), second + (wide - shift).square().sum(0)
        total += len(batch)
        for dictionary in sums.values():
            dictionary.add(batch, wanted)
    variance = second / total - (first / total) ** 2 if total else torch.zeros(1)
    if not (variance > 0).any():
        raise ValueError(f"activations: {total} vectors without any variance, so none of it can be explained")
    return {name: _fidelity(own, variance, total, dense) for name, own in sums.items()}


def _fidelity(sums: _Sums, variance: Tensor, total: int, dense: float) -> Fidelity:
    error = sums.second / total
    fvu = (error.sum() / variance.sum()).item()
    varies = variance > 0
    left = (error - (sums.first / total) ** 2)[varies] / variance[varies]
    features = max(1, len(sums.active))
    return Fidelity(
        explained_variance=1 - fvu,
        fvu=fvu,
        by_channel=1 - left.mean().item(),
        l0=sums.active.sum().item() / total,
        dead_fraction=(sums.active == 0).sum().item() / features,
        dense_fraction=(sums.active > dense * total).sum().item() / features,
    )


def _finite(batch: Tensor, before: int) -> None:
    bad = ~torch.isfinite(batch).all(1)
    if bad.any():
        raise ValueError(f"activations: vector {before + bad.nonzero()[0].item()} of this pass is not finite")


def fidelity_table(measured: Mapping[tuple, Fidelity], names: Iterable[str]) -> pd.DataFrame:
    """Make a table with one row per dictionary: the columns ``names``, filled from the keys, and the fields of
    :class:`Fidelity`."""
    names = list(names)
    return pd.DataFrame([{**dict(zip(names, key, strict=True)), **row._asdict()} for key, row in measured.items()])


def paper_layout(table: pd.DataFrame, value: str = "explained_variance") -> pd.DataFrame:
    """Arrange a table as in the paper: one row per pair of k and n_features, one column per block.

    Args:
        table: columns ``block``, ``k``, ``n_features`` and ``value``.
        value: the column that fills the cells.
    """
    blocks = list(dict.fromkeys(table["block"]))
    pivoted = table.pivot(index=["k", "n_features"], columns="block", values=value)
    return pivoted[blocks].reset_index().rename_axis(columns=None)
