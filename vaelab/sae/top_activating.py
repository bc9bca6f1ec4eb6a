"""Statistics of each feature of a sparse autoencoder over a store: its top activating items and its density.

An item of the store is a map or a vector of one picture. The statistics take one pass over the store, and memory that
depends on the number of features but not on the number of items: quantiles come from a histogram of each feature's
activations, with eight bins between a power of two and the next. Only features that the autoencoder selects as active
count (:meth:`vaelab.sae.model.SAE.encode`), as in Kim et al. ("Revelio", equation 3 and section 4.2: the pictures that
activate a feature most).
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import pandas as pd
import torch
from torch import Tensor

from vaelab.core.devices import float64_device
from vaelab.core.validate import at_least
from vaelab.sae.model import SAE, Codes
from vaelab.store.reader import Store

NO_ITEM = -1
"""Marks the unused places in a list of top activating items that is not full."""
FINEST, OCTAVES, PARTS = -16, 32, 8
"""The histogram covers OCTAVES octaves from 2^FINEST on, each in PARTS bins of equal width. Values beyond either end
are counted in the bin at that end. Positive and negative activations have bins of their own."""
BINS = 2 * OCTAVES * PARTS
QUANTILES = {"lower_quartile": 0.25, "median": 0.5, "upper_quartile": 0.75, "q99": 0.99}
"""The quantiles in the table of features."""


class FeatureSummary(NamedTuple):
    """Statistics of n features over M items of P positions each; all on the CPU."""

    values: Tensor
    """(n, top) float32: the largest activation in each top activating item, in decreasing order; 0 beyond the last item
    of a feature with fewer than ``top`` items."""
    items: Tensor
    """(n, top) int64: the top activating items of each feature. Each occurs once; among equal activations the earlier
    item comes first; :data:`NO_ITEM` beyond the last."""
    positions: Tensor
    """(n, top) int64: the flat position of that activation in its item, from 0 to P - 1."""
    active_items: Tensor
    """(n,) int64: number of items in which the feature is active at some position."""
    active_rows: Tensor
    """(n,) int64: number of positions, over all items, at which the feature is active."""
    total: Tensor
    """(n,) float64: sum of the feature's activations."""
    squares: Tensor
    """(n,) float64: sum of the squares of the feature's activations."""
    histogram: Tensor
    """(n, BINS) int32: number of activations in each bin; bins are ordered by value."""
    item_count: int
    """Number of items, M."""
    row_count: int
    """Number of positions over all items, M P."""

    def full(self) -> Tensor:
        """Say for each feature, (n,) bool, whether it is active in at least ``top`` items."""
        return self.items[:, -1] != NO_ITEM

    def most_active(self, count: int) -> Tensor:
        """Find the indices (at most ``count``,) of the features with the largest activations, in decreasing order;
        only features that are active in at least ``top`` items count."""
        at_least("count", count, 1)
        largest = self.values[:, 0].masked_fill(~self.full(), -torch.inf)
        order = torch.sort(largest, descending=True, stable=True).indices
        return order[: min(count, int(self.full().sum()))]

    def quantile(self, share: float) -> Tensor:
        """Compute a quantile (n,) of each feature's activations, in float64 (numpy's ``inverted_cdf``); 0 for dead
        features.

        The result is the middle of the quantile's bin. For values between 2^-16 and 2^16 its error is at most a
        sixteenth of the value.

        Raises:
            ValueError: the share is outside [0, 1].
        """
        if not 0 <= share <= 1:
            raise ValueError(f"share: must lie between 0 and 1, got {share}")
        counts = self.histogram.long().cumsum(1)
        rank = (share * self.active_rows.double()).ceil().clamp_min(1).long()
        bins = torch.searchsorted(counts, rank[:, None]).flatten().clamp_max(BINS - 1)
        return bin_centres()[bins].masked_fill(self.active_rows == 0, 0)

    def table(self) -> pd.DataFrame:
        """Make a table with one row per feature.

        Its columns are ``feature``; ``items`` and ``density``, the shares of items and of positions in which the
        feature is active; and ``mean``, ``deviation`` (standard deviation), ``largest`` and :data:`QUANTILES` of its
        activations there.
        """
        count = self.active_rows.clamp_min(1).double()
        mean = self.total / count
        spread = (self.squares / count - mean.square()).clamp_min(0).sqrt()
        return pd.DataFrame({
            "feature": range(len(self.values)),
            "items": (self.active_items / max(self.item_count, 1)).tolist(),
            "density": (self.active_rows / max(self.row_count, 1)).tolist(),
            "mean": mean.tolist(), "deviation": spread.tolist(), "largest": self.values[:, 0].tolist(),
            **{name: self.quantile(share).tolist() for name, share in QUANTILES.items()},
        })  # fmt: skip


class BestEntries:
    """Keeps for each of n features the ``size`` entries with the largest keys, with the columns of each entry.

    The entries are in decreasing order of their keys; among equal keys the earlier one comes first.
    """

    def __init__(self, n_features: int, size: int, kind: torch.dtype, columns: Mapping[str, Tensor]):
        """Make empty lists.

        Args:
            n_features: the number of lists, n.
            size: the length of each list.
            kind: the type of the keys.
            columns: the value () of each column in an unused place; its type and device are those of the column. A
                column with several numbers per entry has a value (w,).
        """
        device = next(iter(columns.values())).device
        self.lowest = torch.iinfo(kind).min if not kind.is_floating_point else -torch.inf
        self.keys = torch.full((n_features, size), self.lowest, dtype=kind, device=device)
        self.columns = {name: value.expand(n_features, size, *value.shape).clone() for name, value in columns.items()}

    def state(self) -> dict[str, Tensor]:
        """Return the tensors that hold the entries."""
        return {"keys": self.keys, **self.columns}

    def add(self, feature: Tensor, key: Tensor, **columns: Tensor) -> None:
        """Add entries: their features (N,) int64, their keys (N,), and the columns (N,) or (N, w)."""
        size = self.keys.shape[1]
        enters = (key > self.keys[feature, -1]).nonzero().flatten()  # the others cannot be among the best
        if not len(enters):
            return
        feature, key = feature[enters], key[enters]
        order = torch.sort(key, descending=True, stable=True).indices
        order = order[torch.sort(feature[order], stable=True).indices]
        feature, key, enters = feature[order], key[order], enters[order]
        begins = _begins(feature)
        group = begins.cumsum(0) - 1
        rank = torch.arange(len(feature), device=feature.device) - begins.nonzero().flatten()[group]
        top = rank < size
        features, place = feature[begins], (group[top], rank[top])
        keys = torch.full((len(features), size), self.lowest, dtype=self.keys.dtype, device=self.keys.device)
        keys, order = torch.cat([self.keys[features], keys.index_put_(place, key[top])], 1).sort(
            dim=1, descending=True, stable=True
        )
        order = order[:, :size]
        self.keys[features] = keys[:, :size]
        for name, values in columns.items():
            mine = self.columns[name]
            fresh = torch.zeros(len(features), *mine.shape[1:], dtype=mine.dtype, device=mine.device)
            fresh.index_put_(place, values[enters[top]])
            both = torch.cat([mine[features], fresh], 1)
            index = order.view(*order.shape, *[1] * (both.ndim - 2)).expand(-1, -1, *both.shape[2:])
            # a place that is still unused keeps the value that marks it
            used = (keys[:, :size] != self.lowest).view(*order.shape, *[1] * (both.ndim - 2))
            mine[features] = torch.where(used, both.gather(1, index), mine[features])


class ItemActivations(NamedTuple):
    """The active pairs of an item and a feature of a batch, in the order of items and features; each (N,)."""

    item: Tensor
    """int64: the index of the item in the batch."""
    feature: Tensor
    """int64."""
    largest: Tensor
    """float32: the largest activation in the item."""
    position: Tensor
    """int64: the flat position of that activation; among equal activations the first."""
    total: Tensor
    """float32: the sum of the activations over the item's positions."""
    count: Tensor
    """int64: the number of positions at which the feature is active."""


class FeatureAccumulator:
    """Accumulates a :class:`FeatureSummary` batch by batch."""

    def __init__(self, n_features: int, top: int = 10, device: Any = "cpu"):
        at_least("top", top, 1)
        self.device = torch.device(device)
        whole, real = (torch.zeros((), dtype=kind, device=self.device) for kind in (torch.int64, torch.float32))
        self._best = BestEntries(n_features, top, real.dtype, {"item": whole + NO_ITEM, "position": whole})
        self._active_items, self._active_rows = (
            torch.zeros(n_features, dtype=torch.int64, device=self.device) for _ in range(2)
        )
        wide = float64_device(self.device)
        self._total, self._squares = (torch.zeros(n_features, dtype=torch.float64, device=wide) for _ in range(2))
        self._histogram = torch.zeros((n_features, BINS), dtype=torch.int32, device=self.device)
        self.item_count = self.row_count = 0

    def state(self) -> dict[str, Tensor]:
        """Return the tensors that hold the statistics; the two counts are the only other state."""
        own = {name: getattr(self, f"_{name}") for name in ("active_items", "active_rows", "total", "squares")}
        best = {f"best.{name}": value for name, value in self._best.state().items()}
        return {**own, "histogram": self._histogram, **best}

    def add(self, codes: Codes, items: Sequence[int]) -> ItemActivations:
        """Add the codes of B items, and return the activations of each item.

        Args:
            codes: ``values`` and ``indices`` (B, P, K); a feature with value 0 is not active.
            items: the indices of the B items. Add each item once; if indices increase, items with equal activations are
                listed in the order of their indices.
        """
        n = len(self._total)
        batch, places, _ = codes.values.shape
        self.item_count, self.row_count = self.item_count + batch, self.row_count + batch * places
        where = codes.values != 0
        item, position, _ = where.nonzero(as_tuple=True)
        feature, value = codes.indices[where], codes.values[where].float()
        self._active_rows += torch.bincount(feature, minlength=n)
        place, wide = feature.to(self._total.device), value.to(self._total.device).double()
        self._total.index_add_(0, place, wide)
        self._squares.index_add_(0, place, wide.square())
        one = torch.ones((), dtype=torch.int32, device=self.device).expand(len(value))
        self._histogram.view(-1).index_add_(0, feature * BINS + histogram_bins(value), one)
        active = by_item(item, position, feature, value, n)
        self._active_items += torch.bincount(active.feature, minlength=n)
        numbers = torch.tensor(list(items), dtype=torch.int64, device=self.device)
        self._best.add(active.feature, active.largest, item=numbers[active.item], position=active.position)
        return active

    def totals(self) -> Tensor:
        """Return the sum (n,) float64 of each feature's activations so far, on the CPU."""
        return self._total.cpu()

    def summary(self) -> FeatureSummary:
        """Return the statistics of all batches so far."""
        items = self._best.columns["item"]
        tensors = (
            self._best.keys.masked_fill(items == NO_ITEM, 0), items, self._best.columns["position"],
            self._active_items, self._active_rows, self._total, self._squares, self._histogram,
        )  # fmt: skip
        return FeatureSummary(*(part.to("cpu", copy=True) for part in tensors), self.item_count, self.row_count)


def by_item(item: Tensor, position: Tensor, feature: Tensor, value: Tensor, n_features: int) -> ItemActivations:
    """Combine the active entries (N,) of a batch, in the order of items and positions, into one entry per pair of an
    item and a feature."""
    order = torch.sort(value, descending=True, stable=True).indices
    pair = item * n_features + feature
    order = order[torch.sort(pair[order], stable=True).indices]
    first = _begins(pair[order])
    group, best = first.cumsum(0) - 1, order[first]
    total = value.new_zeros(len(best)).index_add_(0, group, value[order])
    count = torch.bincount(group, minlength=len(best))
    return ItemActivations(item[best], feature[best], value[best], position[best], total, count)


def summarise_features(
    sae: SAE, store: Store, block: str, *, top: int = 10, items: Sequence[int] | None = None, batch_items: int = 64
) -> FeatureSummary:
    """Summarise the features over a block of a store, in one pass.

    Args:
        sae: the autoencoder; the computation runs on its device.
        store: the store.
        block: the block whose vectors or maps are encoded.
        top: the number of top activating items per feature.
        items: the indices of the items to read; None means all.
        batch_items: the number of items per batch.

    Raises:
        ValueError: the block is unknown, or its vectors do not have the width that the autoencoder is for.
    """
    at_least("batch_items", batch_items, 1)
    numbers = range(len(store.items)) if items is None else list(items)
    accumulator = FeatureAccumulator(sae.config.n_features, top, sae.device)
    for begin in range(0, len(numbers), batch_items):
        part = numbers[begin : begin + batch_items]
        maps = store.maps(block, part).float().to(sae.device)
        accumulator.add(sae.encode(maps.reshape(len(part), -1, maps.shape[-1])), part)
    return accumulator.summary()


def histogram_bins(values: Tensor) -> Tensor:
    """Compute the histogram's bin (N,) int64 of each value (N,), from 0 to BINS - 1; larger values have later bins."""
    mantissa, exponent = torch.frexp(values.abs().float())  # value = mantissa 2^exponent, mantissa in [0.5, 1)
    part = ((2 * mantissa - 1) * PARTS).long()
    place = ((exponent.long() - 1 - FINEST) * PARTS + part).clamp(0, BINS // 2 - 1)
    return torch.where(values < 0, BINS // 2 - 1 - place, BINS // 2 + place)


def bin_edges() -> Tensor:
    """Compute the edges (BINS / 2 + 1,) float64 of the bins of positive values, rising."""
    octaves = torch.arange(FINEST, FINEST + OCTAVES, dtype=torch.float64)
    parts = 1 + torch.arange(PARTS, dtype=torch.float64) / PARTS
    begins = (2 ** octaves[:, None] * parts).flatten()
    return torch.cat([begins, begins.new_tensor([2.0 ** (FINEST + OCTAVES)])])


def bin_centres() -> Tensor:
    """Compute the middle (BINS,) float64 of each bin."""
    edges = bin_edges()
    positive = (edges[1:] + edges[:-1]) / 2
    return torch.cat([-positive.flip(0), positive])


def _begins(ordered: Tensor) -> Tensor:
    """Say for each entry (N,) of a sorted tensor whether it is the first with its value: (N,) bool."""
    first = torch.ones(len(ordered), dtype=torch.bool, device=ordered.device)
    first[1:] = ordered[1:] != ordered[:-1]
    return first
