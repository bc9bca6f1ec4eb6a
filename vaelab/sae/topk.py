"""Selection of the active features of a sparse autoencoder: the encoder's product and the top-k over it.

The (N, n) pre-activations are computed tile by tile and are never in memory together.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from vaelab.sae.kernels import SparseEntries, linear

TILE, WIDEST = 2**22, 8192
"""On a CPU, the pre-activations of a tile and the most features in it, so that it stays in the cache."""
ACCELERATOR_TILE = 2**28
"""On a GPU, the pre-activations of a tile (1 GiB in float32): few large products instead of many small ones."""
GROUP = 16
"""Features that the first stage of the top-k treats as one group."""


class Selection(NamedTuple):
    """Selected pre-activations."""

    values: Tensor
    """(E,) pre-activations."""
    entries: SparseEntries
    """Their places in the (N, n) matrix."""


def tile_shape(n: int, device: torch.device) -> tuple[int, int]:
    """Examples and features of a tile of the pre-activations of n features on a device."""
    entries, widest = (TILE, WIDEST) if device.type == "cpu" else (ACCELERATOR_TILE, ACCELERATOR_TILE)
    width = min(n, widest)
    return max(1, entries // width), width


def preactivation_tiles(
    centred: Tensor, weight: Tensor, bias: Tensor, *, screen: bool = False
) -> Iterator[tuple[slice, slice, Tensor]]:
    """The pre-activations of centred (N, d) under weight (n, d) and bias (n,), a tile at a time.

    Yields:
        The tile's examples, its features, and the tile, in bfloat16 for ``screen``. All features of some examples
        come before the next examples.
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
    """The k largest of each row of (N, n), unordered: values and columns, both (N, k).

    In two stages: the k largest entries lie in the k groups with the largest maxima.
    """
    width = values.shape[1]
    if width % GROUP or width < 4 * GROUP * k:
        return tuple(values.topk(k, sorted=False))
    groups = values.view(len(values), GROUP, -1)  # features n / GROUP apart are together
    best = groups.amax(1).topk(k, sorted=False).indices
    found, places = groups.gather(2, best[:, None].expand(-1, GROUP, -1)).flatten(1).topk(k, sorted=False)
    return found, places // k * (width // GROUP) + best.gather(1, places % k)


def topk_mask(values: Tensor, k: int, *, signed: bool) -> Tensor:
    """1 for the k largest entries of each row of (N, m), 0 for the others. Unless ``signed``, rows with at most k
    positive entries may keep more, because their other entries become 0 anyway."""
    if signed or values.device.type != "cpu":  # finding the crowded rows would make a GPU wait
        return torch.zeros_like(values).scatter_(1, values.topk(k, sorted=False).indices, 1.0)
    mask = torch.ones_like(values)
    crowded = ((values > 0).sum(1) > k).nonzero().flatten()
    places = values[crowded].topk(k, sorted=False).indices
    mask[crowded] = torch.zeros_like(values[crowded]).scatter_(1, places, 1.0)
    return mask


def select_topk(centred: Tensor, weight: Tensor, bias: Tensor, k: int, *, extra: int = 0) -> Selection:
    """The k largest pre-activations of every example.

    Args:
        centred: (N, d).
        weight: (n, d).
        bias: (n,).
        k: how many.
        extra: where it is not 0, k + extra candidates are found in bfloat16 and computed again in
            float32, and the k largest of these are selected. The selection equals that of float32 unless
            bfloat16's rounding moves one of the k largest beyond place k + extra.
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
    """The ``count`` largest positive pre-activations of the whole batch, in any example; the other
    arguments as in :func:`select_topk`. Entries below the ``count`` largest so far are skipped, so
    that later tiles cost little more than a comparison."""
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


def select_above(centred: Tensor, weight: Tensor, bias: Tensor, least: Tensor) -> Selection:
    """Every pre-activation above ``least``, a scalar or one number a feature (n,); the other arguments as in
    :func:`select_topk`."""
    least = least.expand(len(weight))
    parts = [
        _above(tile, least[features], examples, features, len(weight))
        for examples, features, tile in preactivation_tiles(centred, weight, bias)
    ]
    values, keys = _joined(parts, 0)
    if len(weight) > tile_shape(len(weight), centred.device)[1]:
        keys, order = keys.sort()
        values = values[order]
    return _by_row(values, keys, len(centred), len(weight))


def _above(tile: Tensor, least: Tensor | float, examples: slice, features: slice, n: int) -> tuple[Tensor, Tensor]:
    row, column = (tile > least).nonzero(as_tuple=True)
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
