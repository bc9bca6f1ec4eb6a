"""Shuffle rows in bounded memory: rows that are stored in shards, or a stream of rows that is never stored."""

from collections.abc import Iterable, Iterator
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from vaelab.core.validate import at_least

Group = tuple[int, int]
"""The index of a pass, and the index of a group of shards in that pass."""


class ShuffledOrder:
    """Endless passes over the rows of shards.

    A pass takes the shards in a random order, in groups of at most ``buffer_rows`` rows (at least one shard), and
    the rows of a group in a random order. The order is determined by the shards, ``buffer_rows``, the seed and the
    index of the pass; any part of it can be computed without the parts before.
    """

    def __init__(self, rows: list[int], buffer_rows: int, seed: int):
        """Args: ``rows``, the number of rows of each shard; ``buffer_rows``, the largest number of rows of a group;
        ``seed``, which determines the order."""
        at_least("buffer_rows", buffer_rows, 1)
        at_least("seed", seed, 0)
        self.rows, self.buffer_rows, self.seed = rows, buffer_rows, seed
        self.total = sum(rows)
        self._pass = lru_cache(maxsize=4)(self._grouped)

    def pieces(self, spans: Iterable[tuple[int, int]]) -> Iterator[tuple[Group, int, int, bool]]:
        """Cut spans (begin, end) of the endless sequence of rows at the ends of groups.

        Yields:
            The group, the begin and the (exclusive) end of the piece in it, and whether the span ends there.
        """
        for begin, end in spans:
            while begin < end:
                number, place = divmod(begin, self.total)
                _, starts = self._pass(number)
                group = int(np.searchsorted(starts, place, side="right")) - 1
                stop = min(end, number * self.total + int(starts[group + 1]))
                offset = begin - number * self.total - int(starts[group])
                yield (number, group), offset, offset + stop - begin, stop == end
                begin = stop

    def shards(self, group: Group) -> list[int]:
        """Return the shards of a group, in the order in which the group's rows are counted."""
        number, place = group
        return self._pass(number)[0][place]

    def permutation(self, group: Group) -> Tensor:
        """Return the indices of a group's rows in the order in which they are given out: (rows,) int64."""
        number, place = group
        rng = np.random.default_rng([self.seed, number, 1 + place])
        return torch.from_numpy(rng.permutation(sum(self.rows[shard] for shard in self.shards(group))))

    def _grouped(self, number: int) -> tuple[list[list[int]], np.ndarray]:
        groups: list[list[int]] = []
        sizes: list[int] = []
        for shard in np.random.default_rng([self.seed, number]).permutation(len(self.rows)).tolist():
            if groups and sizes[-1] + self.rows[shard] <= self.buffer_rows:
                groups[-1].append(shard)
                sizes[-1] += self.rows[shard]
            else:
                groups.append([shard])
                sizes.append(self.rows[shard])
        return groups, np.cumsum([0, *sizes])


def shuffle_stream(
    chunks: Iterable[Tensor],
    batch_size: int,
    *,
    buffer_rows: int,
    seed: int,
    dtype: torch.dtype = torch.float32,
) -> Iterator[Tensor]:
    """Shuffle a stream of rows with a buffer, without touching the disk.

    The buffer is filled first. Then every new row replaces a random row of the buffer, and the replaced row is given
    out.

    Args:
        chunks: tensors (n, d), for instance from :func:`vaelab.activations.collect.stream_rows`.
        batch_size: rows per batch.
        buffer_rows: rows in the buffer. Memory holds the buffer, one chunk and one batch.
        seed: determines the order in which the rows of given chunks come out.
        dtype: the dtype of the batches; the buffer has the dtype of the chunks.

    Yields:
        Every row exactly once, in batches (batch_size, d), of which only the last may be smaller.

    Raises:
        ValueError: a chunk does not have the shape (n, d), or has another d or dtype than the first chunk.
    """
    at_least("batch_size", batch_size, 1)
    at_least("buffer_rows", buffer_rows, 1)
    at_least("seed", seed, 0)
    return _batched(_swapped(chunks, min(batch_size, buffer_rows), buffer_rows, seed), batch_size, dtype)


def _swapped(chunks: Iterable[Tensor], most: int, buffer_rows: int, seed: int) -> Iterator[Tensor]:
    rng = np.random.default_rng(seed)
    buffer, filled, number = None, 0, 0
    for chunk in chunks:
        chunk = chunk.detach()
        if buffer is None and chunk.ndim == 2:
            buffer = torch.empty(buffer_rows, chunk.shape[1], dtype=chunk.dtype, device=chunk.device)
        if buffer is None or chunk.shape[1:] != buffer.shape[1:] or chunk.dtype != buffer.dtype:
            expected = "(n, d)" if buffer is None else f"(n, {buffer.shape[1]}) {buffer.dtype}"
            raise ValueError(f"chunks: chunk {number} is {tuple(chunk.shape)} {chunk.dtype}, expected {expected}")
        number += 1  # noqa: SIM113, enumerate would keep a reference to the chunk
        room = min(buffer_rows - filled, len(chunk))
        buffer[filled : filled + room] = chunk[:room]
        filled += room
        piece = None
        for piece in chunk[room:].split(most):
            if len(piece):
                places = torch.from_numpy(rng.choice(buffer_rows, len(piece), replace=False)).to(buffer.device)
                yield buffer.index_select(0, places)
                buffer.index_copy_(0, places, piece)
        del chunk, piece  # free the memory before the next chunk is made
    if buffer is not None:
        for places in torch.from_numpy(rng.permutation(filled)).to(buffer.device).split(most):
            yield buffer.index_select(0, places)


def _batched(pieces: Iterable[Tensor], batch_size: int, dtype: torch.dtype) -> Iterator[Tensor]:
    held: list[Tensor] = []
    for piece in pieces:
        while len(piece):
            rest = batch_size - sum(map(len, held))
            held.append(piece[:rest].to(dtype))
            piece = piece[rest:]
            if sum(map(len, held)) == batch_size:
                yield held[0] if len(held) == 1 else torch.cat(held)
                held = []
    if held:
        yield torch.cat(held)
