"""What each feature of a sparse autoencoder does over a store: where it is most active, and how often.

One pass over the store, in memory that depends on the number of features and not on that of pictures.
Codes are read after the choice of the active ones (:meth:`vaelab.sae.SAE.encode`), as in Kim et al.
("Revelio", equation 3 and section 4.2: the pictures that activate a feature most).
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import pandas as pd
import torch
from torch import Tensor

from vaelab.checks import at_least
from vaelab.sae import SAE, Codes
from vaelab.store import Store

NONE = -1
"""The item of a place that no picture has taken."""


class Summary(NamedTuple):
    """What n features do over M items of P positions each; all on the CPU."""

    values: Tensor
    """(n, top) float32, falling: the largest activation in each of the most activating items; 0 where
    there are fewer such items than ``top``."""
    items: Tensor
    """(n, top) int64: which they are, each once a feature; of equals the earlier comes first; ``NONE``
    where there are fewer."""
    positions: Tensor
    """(n, top) int64: where in each the activation is, flat, from 0 to P - 1."""
    active_items: Tensor
    """(n,) int64: items with the feature active somewhere."""
    active_rows: Tensor
    """(n,) int64: positions with it active."""
    total: Tensor
    """(n,) float64: sum of its activations."""
    squares: Tensor
    """(n,) float64: sum of their squares."""
    item_count: int
    """M."""
    row_count: int
    """M P."""

    def full(self) -> Tensor:
        """(n,) bool: active in at least ``top`` items."""
        return self.items[:, -1] != NONE

    def most_active(self, count: int) -> Tensor:
        """Numbers (at most ``count``,) of the features with the largest activations of all, falling, of
        those that are active in at least ``top`` items."""
        at_least("count", count, 1)
        largest = self.values[:, 0].masked_fill(~self.full(), -torch.inf)
        order = torch.sort(largest, descending=True, stable=True).indices
        return order[: min(count, int(self.full().sum()))]

    def table(self) -> pd.DataFrame:
        """A row a feature: ``feature``, ``items`` and ``density`` (the shares of items and of positions
        where it is active), and of its activations there ``mean``, ``deviation`` and ``largest``."""
        count = self.active_rows.clamp_min(1).double()
        mean = self.total / count
        spread = (self.squares / count - mean.square()).clamp_min(0).sqrt()
        return pd.DataFrame({
            "feature": range(len(self.values)),
            "items": (self.active_items / max(self.item_count, 1)).tolist(),
            "density": (self.active_rows / max(self.row_count, 1)).tolist(),
            "mean": mean.tolist(), "deviation": spread.tolist(), "largest": self.values[:, 0].tolist(),
        })  # fmt: skip


class Tally:
    """A :class:`Summary` in the making, batch by batch."""

    def __init__(self, n_features: int, top: int = 10, device: Any = "cpu"):
        at_least("top", top, 1)
        self.top, self.device = top, torch.device(device)
        self._values = torch.full((n_features, top), -torch.inf, device=self.device)
        self._items = torch.full((n_features, top), NONE, device=self.device)
        self._positions = torch.zeros_like(self._items)
        self._active_items, self._active_rows = (
            torch.zeros(n_features, dtype=torch.int64, device=self.device) for _ in range(2)
        )
        self._total, self._squares = (
            torch.zeros(n_features, dtype=torch.float64, device=self.device) for _ in range(2)
        )
        self._item_count = self._row_count = 0

    def add(self, codes: Codes, items: Sequence[int]) -> None:
        """Take the codes of B items: ``values`` and ``indices`` (B, P, K).

        Args:
            codes: an entry of value 0 is not active.
            items: their B numbers, none of which was there before; rising, where equals are to be in order.
        """
        n = len(self._values)
        batch, places, _ = codes.values.shape
        self._item_count, self._row_count = self._item_count + batch, self._row_count + batch * places
        where = codes.values != 0
        item, position, _ = where.nonzero(as_tuple=True)
        feature, value = codes.indices[where], codes.values[where].float()
        if not len(value):
            return
        self._active_rows += torch.bincount(feature, minlength=n)
        self._total.index_add_(0, feature, value.double())
        self._squares.index_add_(0, feature, value.double().square())
        # of every item and feature the largest, the first of equals
        order = torch.sort(value, descending=True, stable=True).indices
        order = order[torch.sort(item[order] * n + feature[order], stable=True).indices]
        first = _begins(item[order] * n + feature[order])
        item, position, feature, value = (one[order][first] for one in (item, position, feature, value))
        self._active_items += torch.bincount(feature, minlength=n)
        # of every feature its items, the largest first, the earlier of equals
        order = torch.sort(value, descending=True, stable=True).indices
        order = order[torch.sort(feature[order], stable=True).indices]
        item, position, feature, value = (one[order] for one in (item, position, feature, value))
        begins = _begins(feature)
        group = begins.cumsum(0) - 1
        rank = torch.arange(len(feature), device=self.device) - begins.nonzero().flatten()[group]
        kept = rank < self.top
        self._merge(
            feature[begins], (group[kept], rank[kept]), value[kept], _numbers(items, item[kept]), position[kept]
        )

    def _merge(
        self, features: Tensor, where: tuple[Tensor, Tensor], value: Tensor, item: Tensor, place: Tensor
    ) -> None:
        shape = (len(features), self.top)
        values = self._values.new_full(shape, -torch.inf).index_put_(where, value)
        items = self._items.new_full(shape, NONE).index_put_(where, item)
        places = self._positions.new_zeros(shape).index_put_(where, place)
        values, order = torch.cat([self._values[features], values], 1).sort(dim=1, descending=True, stable=True)
        order = order[:, : self.top]
        self._values[features] = values[:, : self.top]
        self._items[features] = torch.cat([self._items[features], items], 1).gather(1, order)
        self._positions[features] = torch.cat([self._positions[features], places], 1).gather(1, order)

    def summary(self) -> Summary:
        """What was seen so far."""
        values = self._values.masked_fill(self._items == NONE, 0)
        tensors = (
            values, self._items, self._positions, self._active_items, self._active_rows, self._total, self._squares,
        )  # fmt: skip
        return Summary(*(one.to("cpu", copy=True) for one in tensors), self._item_count, self._row_count)


def summarise(
    sae: SAE, kept: Store, block: str, *, top: int = 10, items: Sequence[int] | None = None, batch_items: int = 64
) -> Summary:
    """Go once over a block of a store.

    Args:
        sae: the autoencoder; the work is done on its device.
        kept: the store.
        block: whose vectors or maps.
        top: how many items to keep of each feature.
        items: only these; None for all.
        batch_items: items at a time.

    Raises:
        ValueError: no such block, or an autoencoder of vectors of another width.
    """
    at_least("batch_items", batch_items, 1)
    numbers = range(len(kept.items)) if items is None else list(items)
    tally = Tally(sae.config.n_features, top, sae.device)
    for begin in range(0, len(numbers), batch_items):
        part = numbers[begin : begin + batch_items]
        maps = kept.maps(block, part).float().to(sae.device)
        tally.add(sae.encode(maps.reshape(len(part), -1, maps.shape[-1])), part)
    return tally.summary()


def _begins(ordered: Tensor) -> Tensor:
    """Where a run of equal numbers begins: (N,) bool."""
    first = torch.ones(len(ordered), dtype=torch.bool, device=ordered.device)
    first[1:] = ordered[1:] != ordered[:-1]
    return first


def _numbers(items: Sequence[int], places: Tensor) -> Tensor:
    return torch.tensor(list(items), device=places.device)[places]
