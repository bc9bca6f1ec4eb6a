"""Which features of a sparse autoencoder are active: the encoder's product and the choice from it.

The (N, n) pre-activations are made tile by tile and never are in memory together.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from vaelab.sae.kernels import Entries, linear

TILE = 2**22
"""Pre-activations that are made at a time."""
WIDEST = 8192
"""Features of a tile at most."""
GROUP = 16
"""Features that the first stage of the top-k takes as one."""


class Chosen(NamedTuple):
    """What a choice gives."""

    values: Tensor
    """(E,) pre-activations."""
    entries: Entries
    """Where they are in the (N, n) matrix."""


def tiles(
    centred: Tensor, weight: Tensor, bias: Tensor, *, screen: bool = False
) -> Iterator[tuple[slice, slice, Tensor]]:
    """The pre-activations of centred (N, d) under weight (n, d) and bias (n,), a tile at a time.

    Yields:
        Which examples, which features, and the tile; ``screen`` makes it in bfloat16. All features
        of some examples come before the next examples'.
    """
    wide = min(len(weight), WIDEST)
    high = max(1, TILE // wide)
    if screen:
        centred, bias = centred.bfloat16(), bias.bfloat16()
    for first in range(0, len(centred), high):
        examples = slice(first, min(first + high, len(centred)))
        for left in range(0, len(weight), wide):
            features = slice(left, min(left + wide, len(weight)))
            part = weight[features].bfloat16() if screen else weight[features]
            yield examples, features, linear(centred[examples], part, bias[features])


def top(values: Tensor, k: int) -> tuple[Tensor, Tensor]:
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


def largest(values: Tensor, k: int, *, signed: bool) -> Tensor:
    """1 for the k largest entries of each row of (N, m), 0 for the others; unless ``signed``, where more than
    k are positive only, since elsewhere nothing that is positive is lost."""
    mask = torch.ones_like(values)
    crowded = slice(None) if signed else ((values > 0).sum(1) > k).nonzero().flatten()
    places = values[crowded].topk(k, sorted=False).indices
    mask[crowded] = torch.zeros_like(values[crowded]).scatter_(1, places, 1.0)
    return mask


def choose_top(centred: Tensor, weight: Tensor, bias: Tensor, k: int, *, extra: int = 0) -> Chosen:
    """The k largest pre-activations of every example.

    Args:
        centred: (N, d).
        weight: (n, d).
        bias: (n,).
        k: how many.
        extra: where it is not 0, k + extra candidates are found in bfloat16 and computed again in
            float32, of which the k largest are taken. That is the choice of float32 where
            bfloat16's rounding moves none of these beyond that place.
    """
    count = min(k + extra, len(weight))
    rows: list[tuple[Tensor, Tensor]] = []
    held: list[tuple[Tensor, Tensor]] = []
    for _, features, tile in tiles(centred, weight, bias, screen=extra > 0):
        found, places = top(tile, min(count, tile.shape[1]))
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
        again = Entries(indices.flatten(), count, len(centred), len(weight))
        exact = (again.products(centred, weight) + bias[again.indices]).view_as(indices)
        values, which = exact.topk(k, sorted=False)
        indices = indices.gather(1, which)
    return Chosen(values.flatten(), Entries(indices.flatten(), k, len(centred), len(weight)))


def choose_of_batch(centred: Tensor, weight: Tensor, bias: Tensor, count: int) -> Chosen:
    """The ``count`` largest positive pre-activations of the whole batch, wherever they are; the other
    arguments as of :func:`choose_top`. What is below the ``count`` largest so far is passed over, so
    that later tiles cost little more than a comparison."""
    values, keys = centred.new_empty(0), torch.empty(0, dtype=torch.int64, device=centred.device)
    least = 0.0
    for examples, features, tile in tiles(centred, weight, bias):
        found, places = _above(tile, least, examples, features, len(weight))
        values, keys = torch.cat([values, found]), torch.cat([keys, places])
        if len(values) > count:
            values, which = values.topk(count, sorted=False)
            keys, least = keys[which], values.min()
    keys, order = keys.sort()
    return _by_row(values[order], keys, len(centred), len(weight))


def choose_above(centred: Tensor, weight: Tensor, bias: Tensor, least: Tensor) -> Chosen:
    """Every pre-activation above ``least``, one number or one a feature (n,); the other arguments as of
    :func:`choose_top`."""
    least = least.expand(len(weight))
    parts = [
        _above(tile, least[features], examples, features, len(weight))
        for examples, features, tile in tiles(centred, weight, bias)
    ]
    values, keys = _joined(parts, 0)
    if len(weight) > WIDEST:
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


def _by_row(values: Tensor, keys: Tensor, examples: int, features: int) -> Chosen:
    rows = keys // features
    counts = torch.bincount(rows, minlength=examples)
    return Chosen(values, Entries(keys - rows * features, counts, examples, features))
