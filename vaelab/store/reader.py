"""Activations on disk: written shard by shard, gone on with after a kill, read back shuffled.

::

    layout = {"down.2.1": BlockShape((16, 16), 1280)}
    print(store.plan(layout, items=30_000, seconds_per_item=0.8, folder="outputs/activations"))
    with store.create("outputs/activations", layout, settings={"model": "embedded"}) as writer:
        for start in range(writer.items_done, 30_000, 8):
            writer.add({"down.2.1": maps}, items)  # (8, 16, 16, 1280) and 8 dicts

    for batch in store.open("outputs/activations").batches("down.2.1", 4096, seed=0):
        ...  # (4096, 1280) float32

What the files are is told in :mod:`vaelab.store.format`.
"""

import json
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from itertools import count, groupby
from operator import itemgetter
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from vaelab.core.validate import at_least, unknown
from vaelab.store.files import CONNECTIONS, Folder
from vaelab.store.format import BlockShape, Layout, items_file, map_rows, read_index, read_rows, read_shards
from vaelab.store.planning import Plan, plan
from vaelab.store.shuffling import Group, Order, shuffle_stream
from vaelab.store.writer import Writer, create

# items: The items of a store: what was captured, read as it is asked for.
# buffers: Memory that is used again, for tensors that come and go in a loop.


KEPT = 4
"""Blocks of memory that are remembered, for another use."""
UNUSED = 2
"""References to memory that only its list has: that one, and the question's own."""


class Buffers:
    """Empty tensors whose memory is used again once nothing refers to it any more.

    Large memory that is given back goes back to the system, and new memory costs a page fault every
    4 kB: of a pass over a store at memory's speed that is half of the time. A few blocks are kept; where
    all of them are still in use, as by someone who collects the tensors, new memory is taken and the
    oldest block forgotten: it goes when its tensors do.
    """

    def __init__(self) -> None:
        self._kept: list[np.ndarray] = []

    def empty(self, rows: int, width: int, dtype: torch.dtype) -> Tensor:
        """A tensor (rows, width) of any content on the CPU, as :func:`torch.empty`'s."""
        size = rows * width * dtype.itemsize
        if not size:
            return torch.empty(rows, width, dtype=dtype)
        memory = self._free(size)
        return torch.frombuffer(memory, dtype=dtype, count=rows * width).reshape(rows, width)

    def _free(self, size: int) -> np.ndarray:
        for i in range(len(self._kept)):
            if self._kept[i].nbytes >= size and sys.getrefcount(self._kept[i]) <= UNUSED:
                return self._kept[i]
        fresh = np.empty(size, np.uint8)
        self._kept = [*self._kept[1 - KEPT :], fresh]
        return fresh


class Items(Sequence):
    """The items of a store, read shard by shard when they are asked for."""

    def __init__(self, folder: Folder, counts: list[int], per_shard: int):
        self._length, self._per_shard = sum(counts), per_shard
        self._shard = lru_cache(maxsize=8)(lambda shard: self._read(folder, items_file(shard), counts[shard]))

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        place = range(len(self))[index]
        return dict(self._shard(place // self._per_shard)[place % self._per_shard])

    @staticmethod
    def _read(folder: Folder, file: str, count: int) -> list[dict[str, Any]]:
        try:
            items = json.loads(folder.read(file))
        except json.JSONDecodeError as error:
            raise ValueError(
                f"{folder.name(file)} was changed since it was written: it is not JSON ({error})"
            ) from error
        if len(items) != count:
            raise ValueError(f"{folder.name(file)} was changed since it was written: {len(items)} items, not {count}")
        return items


__all__ = ["BlockShape", "Layout", "Plan", "Store", "Writer", "create", "open", "plan", "shuffle_stream"]

BUFFER_ROWS = 2**18
"""Rows that are mixed with each other; two such buffers are in use while a pass is read."""


class Store:
    """A store being read; made by :func:`open`."""

    url: str
    """Where it is."""
    layout: Layout
    """The blocks and the shape of their maps."""
    precision: str
    """Of the stored numbers."""
    settings: dict[str, Any]
    """What its items were made from."""
    complete: bool
    """Whether its collection came to its end."""
    items: Items
    """The captures in their order: ``prompt`` or ``image``, ``seed``, ``timestep``, ..."""

    def __init__(self, url: str | Path, **options: Any):
        self._folder = Folder(str(url), **options)
        self._spec, total = read_index(self._folder)
        self._shards = read_shards(self._folder, self._spec, total)
        self.url, self.complete = self._folder.url, total is not None
        self.layout, self.precision, self.settings = self._spec.layout, self._spec.precision, self._spec.settings
        self.items = Items(self._folder, [shard.items for shard in self._shards], self._spec.items_per_shard)

    def __repr__(self) -> str:
        state = "" if self.complete else ", not complete"
        return f"Store({self.url!r}: {len(self.items)} items of {', '.join(self.layout)} in {self.precision}{state})"

    def rows(self, block: str) -> int:
        """Vectors of a block."""
        return len(self.items) * self._shape(block).count

    def describe(self, block: str, row: int) -> dict[str, Any]:
        """Where a row comes from: its item, with ``block`` and ``position``, for instance (y, x).

        Raises:
            ValueError: no such block or row.
        """
        shape = self._shape(block)
        if not 0 <= row < self.rows(block):
            raise ValueError(f"row: {block!r} has rows 0 to {self.rows(block) - 1}, got {row}")
        item, place = divmod(int(row), shape.count)
        position = tuple(map(int, np.unravel_index(place, shape.positions))) if shape.positions else ()
        return {**self.items[item], "block": block, "position": position}

    def maps(self, block: str, items: Sequence[int]) -> Tensor:
        """The maps of some items, in the order asked for: (n, positions..., width), as stored.

        Raises:
            ValueError: no such block or item, a file that is missing, truncated or foreign.
        """
        shape = self._shape(block)
        out = torch.empty(len(items), shape.count, shape.width, dtype=self._spec.dtype)
        for place, item in enumerate(items):
            if not 0 <= item < len(self.items):
                raise ValueError(f"items: there are items 0 to {len(self.items) - 1}, got {item}")
            shard, number = divmod(int(item), self._spec.items_per_shard)
            self._read(block, shard, out[place], number * shape.count)
        return out.reshape(len(items), *shape.positions, shape.width)

    def verify(self) -> None:
        """Read every file and compare its checksum with the one it was written with.

        Raises:
            ValueError: naming every file whose bytes have changed.
        """
        files = {name: file for shard in self._shards for name, file in shard.files.items()}
        bad = []
        with tqdm(
            total=sum(file.bytes for file in files.values()), unit="B", unit_scale=True, desc="verifying",
            file=sys.stdout, mininterval=2, ncols=100,
        ) as bar:  # fmt: skip
            for name, file in files.items():
                if self._folder.digest(name) != file.xxh128:
                    bad.append(self._folder.name(name))
                bar.update(file.bytes)
        if bad:
            raise ValueError(f"changed since they were written: {', '.join(bad)}")

    def batches(
        self,
        block: str,
        batch_size: int,
        seed: int,
        *,
        epoch: int = 0,
        dtype: torch.dtype = torch.float32,
        buffer_rows: int = BUFFER_ROWS,
        with_rows: bool = False,
    ) -> Iterator[Any]:
        """One pass: every row exactly once, shuffled.

        Shards are taken in a random order, as many at a time as have ``buffer_rows`` rows together
        (one at least); these are read ahead, while those before are given out in random batches.
        What is in a batch is random and fixed by the store, ``buffer_rows``, ``seed`` and
        ``epoch``; inside a batch rows lie as they do in the store, which is the quickest. A batch's
        memory is used again once nothing refers to it any more.

        Args:
            block: whose rows.
            batch_size: rows of a batch.
            seed: fixes the order.
            epoch: another number, another order.
            dtype: of the batches.
            buffer_rows: rows that are mixed with each other; memory is twice these, for a local
                store the page cache's, which the system takes back where it is needed.
            with_rows: whether to tell which rows they are.

        Yields:
            Tensors (batch_size, width), of which only the last may be smaller; ``with_rows``,
            pairs of these and of the rows' numbers (batch_size,) int64.

        Raises:
            ValueError: no such block, a number out of its range, a file that is missing or foreign.
        """
        at_least("batch_size", batch_size, 1)
        at_least("epoch", epoch, 0)
        order, total = self._order(block, seed, buffer_rows), self.rows(block)
        begin, end = epoch * total, (epoch + 1) * total

        def spans() -> Iterator[tuple[int, int]]:
            return ((start, min(start + batch_size, end)) for start in range(begin, end, batch_size))

        return self._stream(block, order, spans, dtype, with_rows)

    def shuffled(
        self,
        block: str,
        batch_size: int,
        seed: int,
        *,
        dtype: torch.dtype = torch.float32,
        buffer_rows: int = BUFFER_ROWS,
    ) -> Callable[..., Iterator[Tensor]]:
        """Endless shuffled batches (batch_size, width) for :func:`vaelab.training.loop.train`.

        Pass follows upon pass without a gap, each as :meth:`batches` gives it: every row is used
        once in each, whatever the batch size. Ranks take turns, batch by batch, and each reads all
        shards. What lies before the batch at which a run is taken up is not read.

        Raises:
            ValueError: as :meth:`batches`, and where the store holds no row.
        """
        at_least("batch_size", batch_size, 1)
        order = self._order(block, seed, buffer_rows)
        if not order.total:
            raise ValueError(f"{self.url} holds no row of {block!r}")

        def batches(start: int = 0, rank: int = 0, world: int = 1) -> Iterator[Tensor]:
            def spans() -> Iterator[tuple[int, int]]:
                return ((batch * batch_size, (batch + 1) * batch_size) for batch in count(start * world + rank, world))

            return self._stream(block, order, spans, dtype, False)

        return batches

    def _shape(self, block: str) -> BlockShape:
        if block not in self.layout:
            raise unknown("block", block, self.layout)
        return self.layout[block]

    def _order(self, block: str, seed: int, buffer_rows: int) -> Order:
        positions = self._shape(block).count
        return Order([shard.items * positions for shard in self._shards], buffer_rows, seed)

    def _stream(
        self,
        block: str,
        order: Order,
        spans: Callable[[], Iterator[tuple[int, int]]],
        dtype: torch.dtype,
        with_rows: bool,
    ) -> Iterator[Any]:
        """Batches of the spans of an order, the next group being read while one is given out."""
        ahead = (group for group, _ in groupby(order.pieces(spans()), itemgetter(0)))
        starts = np.cumsum([0, *order.rows])
        held: list[Tensor] = []
        names: list[Tensor] = []
        buffers = Buffers()
        with ThreadPoolExecutor(1) as reader:

            def read_next() -> Any:
                return reader.submit(self._group, block, order, group) if (group := next(ahead, None)) else None

            coming = read_next()
            for group, pieces in groupby(order.pieces(spans()), itemgetter(0)):
                parts, permutation = coming.result()
                coming = read_next()
                shards = order.shards(group)
                numbers = None
                if with_rows:
                    numbers = torch.cat([torch.arange(starts[shard], starts[shard + 1]) for shard in shards])
                for _, begin, end, whole in pieces:
                    rows, chosen = _gathered(parts, permutation[begin:end], dtype, buffers)
                    held.append(rows)
                    if with_rows:
                        names.append(numbers[chosen])
                    if whole:
                        batch = held[0] if len(held) == 1 else torch.cat(held)
                        yield (batch, torch.cat(names)) if with_rows else batch
                        held, names = [], []

    def _group(self, block: str, order: Order, group: Group) -> tuple[Sequence[Tensor], Tensor]:
        """The rows of a group of shards, shard by shard, and the order in which they are given out."""
        shards = order.shards(group)
        if self._folder.local:
            held = [self._shards[shard].items for shard in shards]
            parts = [map_rows(self._folder, self._spec, block, *each) for each in zip(shards, held, strict=True)]
            return parts, order.permutation(group)
        sizes = [order.rows[shard] for shard in shards]
        parts = torch.empty(sum(sizes), self.layout[block].width, dtype=self._spec.dtype).split(sizes)
        with ThreadPoolExecutor(CONNECTIONS) as readers:
            list(readers.map(lambda shard, part: self._read(block, shard, part), shards, parts))
        return parts, order.permutation(group)

    def _read(self, block: str, shard: int, out: Tensor, start: int = 0) -> None:
        read_rows(self._folder, self._spec, block, shard, self._shards[shard].items, out, start)


def _gathered(parts: Sequence[Tensor], chosen: Tensor, dtype: torch.dtype, buffers: Buffers) -> tuple[Tensor, Tensor]:
    """Some rows of the parts taken together, in the order in which they lie there, and which they are."""
    chosen = chosen.sort().values
    ends = torch.tensor([len(part) for part in parts]).cumsum(0)
    out = buffers.empty(len(chosen), parts[0].shape[1], dtype)
    first, begin = 0, 0
    for part, end in zip(parts, torch.searchsorted(chosen, ends).tolist(), strict=True):
        out[begin:end] = part.index_select(0, chosen[begin:end] - first)
        first, begin = first + len(part), end
    return out, chosen


def open(url: str | Path, *, parameter: str = "", **options: Any) -> Store:
    """Open a store for reading; one that is still being written shows the shards it has.

    Args:
        url: a local folder, or any fsspec URL: ``s3://bucket/folder``, ``hf://...``, ``memory://...``.
        parameter: what named the store, where an error is to begin with it.
        options: for the URL's file system; credentials belong in the environment.

    Raises:
        ValueError: naming a file that is missing, truncated, foreign, changed or of a newer version.
    """
    try:
        return Store(url, **options)
    except ValueError as error:
        if not parameter:
            raise
        raise ValueError(
            f"{parameter}: {str(url)!r} is no store of activations that can be read ({error}); give the folder "
            "'activations' of a finished run of 30_collect_activations or 40_layer_features"
        ) from error
