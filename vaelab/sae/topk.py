"""Selection of the active features of a sparse autoencoder: the encoder's matrix multiplication followed by the top-k.

N examples of width d have (N, n) pre-activations, one per example and feature. They are computed tile by tile and are
never in memory together.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from vaelab.sae.kernels import SparseEntries, linear

TILE, WIDEST = 2**22, 8192
"""On a CPU: the number of pre-activations in a tile and the largest number of features in it. Such a tile stays in the
cache."""
ACCELERATOR_TILE = 2**28
"""On a GPU: the number of pre-activations in a tile (1 GiB in float32), for few large products instead of many small
ones."""
GROUP = 16
"""The number of features that the first stage of the top-k treats as one group."""


class Selection(NamedTuple):
    """E selected entries of the (N, n) matrix of pre-activations, listed row by row (examples in order)."""

    values: Tensor
    """(E,) the selected pre-activations, before any activation function."""
    entries: SparseEntries
    """The row (example) and column (feature) of each value, in the same order."""


def tile_shape(n: int, device: torch.device) -> tuple[int, int]:
    """Return how many examples and how many of the n features one tile holds on a device."""
    entries, widest = (TILE, WIDEST) if device.type == "cpu" else (ACCELERATOR_TILE, ACCELERATOR_TILE)
    width = min(n, widest)
    return max(1, entries // width), width


def preactivation_tiles(
    centred: Tensor, weight: Tensor, bias: Tensor, *, screen: bool = False
) -> Iterator[tuple[slice, slice, Tensor]]:
    """Yield the pre-activations centred @ weight.T + bias one tile at a time.

    Args:
        centred: (N, d), the autoencoder's inputs minus its ``pre_bias``.
        weight: (n, d), the rows of the encoder.
        bias: (n,), one value per feature.
        screen: compute the tiles in bfloat16, which is fast and precise enough to find candidates for the top-k.

    Yields:
        The tile's examples (a slice), its features (a slice), and the tile. All features of the first examples come
        before the next examples.
    """
    high, wide = tile_shape(len(weight), centred.device)
    if screen:
        centred, bias = centred.bfloat16(), bias.bfloat16()
    for first in range(0, len(centred), high):
        examples = slice(first, min(first + high, len(centred)))
        for left in range(0, len(weight), wide):
            features = slice(left, min(left + wide, len(weight)))
            part = weight[features].bfloat16() if screen else weight[features]
            yield examples, features, linear(centred[examples], part, bias[features])


def two_stage_topk(values: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Find the k largest entries of each row of (N, n), in no particular order: values and columns, both (N, k).

    Each row is split into groups of columns. The k largest entries lie in the k groups with the largest maxima, so only
    these groups are searched.
    """
    width = values.shape[1]
    if width % GROUP or width < 4 * GROUP * k:
        return tuple(values.topk(k, sorted=False))
    groups = values.view(len(values), GROUP, -1)  # columns that are n / GROUP apart form a group
    best = groups.amax(1).topk(k, sorted=False).indices
    found, places = groups.gather(2, best[:, None].expand(-1, GROUP, -1)).flatten(1).topk(k, sorted=False)
    return found, places // k * (width // GROUP) + best.gather(1, places % k)


def topk_mask(values: Tensor, k: int, *, signed: bool) -> Tensor:
    """Return a mask (N, m) with 1 at the k largest entries of each row and 0 elsewhere.

    If ``signed`` is False, the mask of a row with at most k positive entries may contain more than k ones; the extra
    entries are not positive, and the ReLU sets them to 0.
    """
    if signed or values.device.type != "cpu":  # finding the rows with more than k positive entries makes a GPU wait
        return torch.zeros_like(values).scatter_(1, values.topk(k, sorted=False).indices, 1.0)
    mask = torch.ones_like(values)
    crowded = ((values > 0).sum(1) > k).nonzero().flatten()
    places = values[crowded].topk(k, sorted=False).indices
    mask[crowded] = torch.zeros_like(values[crowded]).scatter_(1, places, 1.0)
    return mask


def select_topk(centred: Tensor, weight: Tensor, bias: Tensor, k: int, *, extra: int = 0) -> Selection:
    """Select the k largest pre-activations of every example.

    Args:
        centred: (N, d), the autoencoder's inputs minus its ``pre_bias``.
        weight: (n, d), the rows of the encoder.
        bias: (n,), one value per feature.
        k: the number of features to select per example.
        extra: if it is not 0, k + extra candidates are found in bfloat16 and computed again in float32, and the k
            largest of these are selected. The selection is the same as in float32 unless the rounding of bfloat16 moves
            one of the k largest beyond place k + extra.
    """
    count = min(k + extra, len(weight))
    rows: list[tuple[Tensor, Tensor]] = []
    held: list[tuple[Tensor, Tensor]] = []
    for _, features, tile in preactivation_tiles(centred, weight, bias, screen=extra > 0):
        found, places = two_stage_topk(tile, min(count, tile.shape[1]))
        held.append((found, places + features.start))
        if features.stop == len(weight):
            found, places = _joined(held, 1)
            if found.shape[1] > count:
                found, which = found.topk(count, sorted=False)
                places = places.gather(1, which)
            rows.append((found, places))
            held = []
    values, indices = _joined(rows, 0)
    if extra:
        again = SparseEntries(indices.flatten(), count, len(centred), len(weight))
        exact = (again.products(centred, weight) + bias[again.indices]).view_as(indices)
        values, which = exact.topk(k, sorted=False)
        indices = indices.gather(1, which)
    return Selection(values.flatten(), SparseEntries(indices.flatten(), k, len(centred), len(weight)))


def select_batch_topk(centred: Tensor, weight: Tensor, bias: Tensor, count: int) -> Selection:
    """Select the ``count`` largest positive pre-activations of the whole batch, however they are distributed over the
    examples.

    The other arguments are as in :func:`select_topk`. Once ``count`` entries are held, only entries above the smallest
    of them are considered, so that later tiles cost little more than a comparison.
    """
    values, keys = centred.new_empty(0), torch.empty(0, dtype=torch.int64, device=centred.device)
    least = 0.0
    for examples, features, tile in preactivation_tiles(centred, weight, bias):
        found, places = _above(tile, least, examples, features, len(weight))
        values, keys = torch.cat([values, found]), torch.cat([keys, places])
        if len(values) > count:
            values, which = values.topk(count, sorted=False)
            keys, least = keys[which], values.min()
    keys, order = keys.sort()
    return _by_row(values[order], keys, len(centred), len(weight))


def select_above(centred: Tensor, weight: Tensor, bias: Tensor, threshold: Tensor) -> Selection:
    """Select every pre-activation above a threshold.

    ``threshold`` is a scalar or (n,), one value per feature. The other arguments are as in :func:`select_topk`.
    """
    threshold = threshold.expand(len(weight))
    parts = [
        _above(tile, threshold[features], examples, features, len(weight))
        for examples, features, tile in preactivation_tiles(centred, weight, bias)
    ]
    values, keys = _joined(parts, 0)
    if len(weight) > tile_shape(len(weight), centred.device)[1]:
        keys, order = keys.sort()
        values = values[order]
    return _by_row(values, keys, len(centred), len(weight))


def _above(tile: Tensor, threshold: Tensor | float, examples: slice, features: slice, n: int) -> tuple[Tensor, Tensor]:
    """Return the values of a tile above a threshold, and their flat indices in the (N, n) matrix."""
    row, column = (tile > threshold).nonzero(as_tuple=True)
    return tile[row, column], (row + examples.start) * n + column + features.start


def _joined(parts: list[tuple[Tensor, Tensor]], dim: int) -> tuple[Tensor, Tensor]:
    if len(parts) == 1:
        return parts[0]
    values, places = zip(*parts, strict=True)
    return torch.cat(values, dim), torch.cat(places, dim)


def _by_row(values: Tensor, keys: Tensor, examples: int, features: int) -> Selection:
    # the keys are sorted; a bincount would make a GPU wait for their maximum
    starts = torch.searchsorted(keys, torch.arange(examples + 1, device=keys.device) * features)
    return Selection(values, SparseEntries(keys % features, starts.diff(), examples, features))
