"""Read a store: the metadata of its items, the maps of some items, and shuffled batches of all rows.

::

    layout = {"down.2.1": BlockShape((16, 16), 1280)}
    print(store.plan(layout, items=30_000, seconds_per_item=0.8, folder="outputs/activations"))
    with store.create("outputs/activations", layout, settings={"model": "embedded"}) as writer:
        for start in range(writer.items_done, 30_000, 8):
            writer.add({"down.2.1": maps}, items)  # (8, 16, 16, 1280) and 8 dicts

    for batch in store.open("outputs/activations").batches("down.2.1", 4096, seed=0):
        ...  # (4096, 1280) float32

The files are described in :mod:`vaelab.store.format`.
"""

import json
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from itertools import count, groupby
from operator import itemgetter
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xxhash
from torch import Tensor
from tqdm import tqdm

from vaelab.core.validate import at_least, unknown
from vaelab.store.files import CONNECTIONS, Folder
from vaelab.store.format import (
    BlockShape,
    Layout,
    Shard,
    data_file,
    items_file,
    map_rows,
    read_index,
    read_manifests,
    read_rows,
)
from vaelab.store.shuffling import Group, ShuffledOrder

BUFFER_ROWS = 2**18
"""Number of rows that are shuffled together; two such buffers are in use while a pass is read."""
MAX_BUFFERS = 4
"""Number of blocks of memory that :class:`BufferPool` remembers for reuse."""
POOL_REFERENCES = 2
"""Number of references to a block of memory that only the pool uses: the pool's list, and the counting call."""


def open(url: str | Path, *, parameter: str = "", **options: Any) -> "Store":
    """Open a store for reading; of a store that is still being written, the finished shards can be read.

    Args:
        url: a local folder, or any fsspec URL: ``s3://bucket/folder``, ``hf://...``, ``memory://...``.
        parameter: the notebook parameter that gave the URL; error messages begin with it.
        options: arguments for the URL's file system; credentials belong in the environment.

    Raises:
        ValueError: a file is missing, truncated, foreign, changed or of another version; the error names it.
    """
    try:
        return Store(url, **options)
    except ValueError as error:
        if not parameter:
            raise
        raise ValueError(
            f"{parameter}: {str(url)!r} is not a readable store of activations ({error}); give the folder "
            "'activations' of a finished run of 30_collect_activations or 40_layer_features"
        ) from error


class Store:
    """A store that is read; made by :func:`open`.

    Files are compared with their checksums if that costs little: an items file when it is read, and a block's data
    file the first time that this object reads at least half of it. :meth:`verify` compares every file.

    The files of a group are compared by other threads while the group before is given out, so on two cores mainly the
    first group of a first pass, of at most :data:`BUFFER_ROWS` rows, waits for it. A first pass over 1.6 million
    float16 vectors of width 64, in the system's cache, takes 5 % longer with the checksums: the median of 12 pairs of
    passes.
    """

    url: str
    """The store's location."""
    layout: Layout
    """The blocks and the shapes of their maps."""
    precision: str
    """Precision of the stored values."""
    settings: dict[str, Any]
    """What determined the stored values: model, prompts, seed, ..."""
    complete: bool
    """Whether the collection was finished."""
    items: "Items"
    """The captures in their order: ``prompt`` or ``image``, ``seed``, ``timestep``, ..."""

    def __init__(self, url: str | Path, **options: Any):
        self._folder = Folder(str(url), **options)
        self._spec, total = read_index(self._folder)
        self._shards = read_manifests(self._folder, self._spec, total)
        self._intact: set[str] = set()
        self.url, self.complete = self._folder.url, total is not None
        self.layout, self.precision, self.settings = self._spec.layout, self._spec.precision, self._spec.settings
        self.items = Items(self._folder, self._shards, self._spec.items_per_shard)

    def __repr__(self) -> str:
        state = "" if self.complete else ", not complete"
        return f"Store({self.url!r}: {len(self.items)} items of {', '.join(self.layout)} in {self.precision}{state})"

    @property
    def identity(self) -> str:
        """A hash of the layout, the precision and the settings."""
        return self._spec.identity

    def shard_checksums(self, block: str) -> list[tuple[int, str]]:
        """List for each finished shard the number of its items and a checksum of the items and the block's vectors.

        Raises:
            ValueError: the store has no such block.
        """
        self._shape(block)
        names = ((shard, (items_file(number), data_file(number, block))) for number, shard in enumerate(self._shards))
        return [(shard.items, "-".join(shard.files[name].xxh128 for name in files)) for shard, files in names]

    def rows(self, block: str) -> int:
        """Return the number of rows (vectors) of a block."""
        return len(self.items) * self._shape(block).count

    def describe(self, block: str, row: int) -> dict[str, Any]:
        """Describe the origin of a row: its item's metadata, with ``block`` and ``position``, for instance (y, x).

        Raises:
            ValueError: the store has no such block or row.
        """
        shape = self._shape(block)
        if not 0 <= row < self.rows(block):
            raise ValueError(f"row: {block!r} has rows 0 to {self.rows(block) - 1}, got {row}")
        item, place = divmod(int(row), shape.count)
        position = tuple(map(int, np.unravel_index(place, shape.positions))) if shape.positions else ()
        return {**self.items[item], "block": block, "position": position}

    def maps(self, block: str, items: Sequence[int]) -> Tensor:
        """Read the maps of some items, in the order of ``items``: (n, positions..., width), in the stored precision.

        Raises:
            ValueError: the store has no such block or item, or a file is missing, truncated, foreign or changed.
        """
        shape, per_shard = self._shape(block), self._spec.items_per_shard
        for item in items:
            if not 0 <= item < len(self.items):
                raise ValueError(f"items: there are items 0 to {len(self.items) - 1}, got {item}")
        for shard, read in Counter(int(item) // per_shard for item in items).items():
            if self._folder.local and 2 * read >= self._shards[shard].items:
                self._check(block, shard, map_rows(self._folder, self._spec, block, shard, self._shards[shard].items))
        out = torch.empty(len(items), shape.count, shape.width, dtype=self._spec.dtype)
        for place, item in enumerate(items):
            shard, number = divmod(int(item), per_shard)
            self._read(block, shard, out[place], number * shape.count)
        return out.reshape(len(items), *shape.positions, shape.width)

    def verify(self) -> None:
        """Read every file and compare its checksum with the checksum in its manifest.

        Raises:
            ValueError: a file was changed; the error names all changed files.
        """
        files = {name: file for shard in self._shards for name, file in shard.files.items()}
        changed = []
        with tqdm(
            total=sum(file.bytes for file in files.values()), unit="B", unit_scale=True, desc="verifying",
            file=sys.stdout, mininterval=2, ncols=100,
        ) as bar:  # fmt: skip
            for name, file in files.items():
                if self._folder.checksum(name) != file.xxh128:
                    changed.append(self._folder.full_name(name))
                bar.update(file.bytes)
        if changed:
            raise ValueError(f"changed after they were written: {', '.join(changed)}")
        self._intact.update(files)

    def batches(
        self,
        block: str,
        batch_size: int,
        seed: int,
        *,
        epoch: int = 0,
        dtype: torch.dtype | None = torch.float32,
        buffer_rows: int = BUFFER_ROWS,
        with_rows: bool = False,
    ) -> Iterator[Any]:
        """Iterate once over a block in shuffled batches; every row occurs exactly once.

        Shards are taken in a random order, in groups of at most ``buffer_rows`` rows (at least one shard). The rows
        of a group are given out in random batches while the next group is read. Which rows form a batch is random, but
        determined by the store, ``buffer_rows``, ``seed`` and ``epoch``. Within a batch the rows keep the order of the
        store, because that is fastest. The memory of a batch is reused once nothing refers to it.

        Args:
            block: the block's name.
            batch_size: rows per batch.
            seed: determines the order.
            epoch: the index of the pass; each pass has another order.
            dtype: the dtype of the batches; None keeps the stored precision.
            buffer_rows: the number of rows that are shuffled together. They take twice their size in memory; for a
                local store this is the page cache, which the system frees when it needs memory.
            with_rows: whether to yield the indices of the rows as well.

        Yields:
            Tensors (batch_size, width), of which only the last may be smaller; with ``with_rows``, pairs of such a
            tensor and the rows' indices (batch_size,) int64.

        Raises:
            ValueError: the store has no such block, a number is out of range, or a file is missing, foreign or
                changed.
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
        dtype: torch.dtype | None = torch.float32,
        buffer_rows: int = BUFFER_ROWS,
    ) -> Callable[..., Iterator[Tensor]]:
        """Make a source of endless shuffled batches (batch_size, width) for :func:`vaelab.training.loop.train`.

        Passes follow each other without a gap, each in the order of :meth:`batches`, so that each pass uses every row
        once, for any batch size. The processes of a distributed run (ranks) take turns, batch by batch, and each reads
        all shards. When a run is resumed, the batches that it has already used are not read again.

        Raises:
            ValueError: the store has no such block or no rows, a number is out of range, or a file is missing, foreign
                or changed.
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

    def _order(self, block: str, seed: int, buffer_rows: int) -> ShuffledOrder:
        positions = self._shape(block).count
        return ShuffledOrder([shard.items * positions for shard in self._shards], buffer_rows, seed)

    def _stream(
        self,
        block: str,
        order: ShuffledOrder,
        spans: Callable[[], Iterator[tuple[int, int]]],
        dtype: torch.dtype | None,
        with_rows: bool,
    ) -> Iterator[Any]:
        """Yield the batches of an order's spans; the next group is read while the current one is given out."""
        upcoming = (group for group, _ in groupby(order.pieces(spans()), itemgetter(0)))
        starts = np.cumsum([0, *order.rows])
        rows: list[Tensor] = []
        numbers: list[Tensor] = []
        pool = BufferPool()
        with ThreadPoolExecutor(1) as reader:

            def read_next() -> Any:
                return reader.submit(self._group, block, order, group) if (group := next(upcoming, None)) else None

            next_group = read_next()
            for group, pieces in groupby(order.pieces(spans()), itemgetter(0)):
                parts, permutation = next_group.result()
                next_group = read_next()
                shards = order.shards(group)
                if with_rows:
                    in_store = torch.cat([torch.arange(starts[shard], starts[shard + 1]) for shard in shards])
                for _, begin, end, ends_batch in pieces:
                    chosen = permutation[begin:end].sort().values
                    rows.append(_gather(parts, chosen, dtype or self._spec.dtype, pool))
                    if with_rows:
                        numbers.append(in_store[chosen])
                    if ends_batch:
                        batch = rows[0] if len(rows) == 1 else torch.cat(rows)
                        yield (batch, torch.cat(numbers)) if with_rows else batch
                        rows, numbers = [], []

    def _group(self, block: str, order: ShuffledOrder, group: Group) -> tuple[Sequence[Tensor], Tensor]:
        """Read the rows of each shard of a group, and the order in which the group's rows are given out."""
        shards = order.shards(group)
        if self._folder.local:
            parts = [map_rows(self._folder, self._spec, block, n, self._shards[n].items) for n in shards]
        else:
            sizes = [order.rows[shard] for shard in shards]
            parts = torch.empty(sum(sizes), self.layout[block].width, dtype=self._spec.dtype).split(sizes)
            with ThreadPoolExecutor(CONNECTIONS) as readers:
                list(readers.map(lambda shard, part: self._read(block, shard, part), shards, parts))
        with ThreadPoolExecutor(CONNECTIONS) as checkers:
            list(checkers.map(lambda shard, part: self._check(block, shard, part), shards, parts))
        return parts, order.permutation(group)

    def _check(self, block: str, shard: int, rows: Tensor) -> None:
        """Compare all rows of a data file with its checksum, once; the header was compared when they were read."""
        file = data_file(shard, block)
        if file in self._intact:
            return
        digest = xxhash.xxh3_128(self._spec.header(shard, block, self._shards[shard].items))
        digest.update(rows.view(torch.uint8).numpy().reshape(-1))
        if digest.hexdigest() != self._shards[shard].files[file].xxh128:
            raise ValueError(f"{self._folder.full_name(file)} was changed after it was written: its checksum differs")
        self._intact.add(file)

    def _read(self, block: str, shard: int, out: Tensor, start: int = 0) -> None:
        read_rows(self._folder, self._spec, block, shard, self._shards[shard].items, out, start)


def _gather(parts: Sequence[Tensor], chosen: Tensor, dtype: torch.dtype, pool: "BufferPool") -> Tensor:
    """Gather the rows ``chosen`` (indices in rising order) of the concatenated parts, as ``dtype``."""
    ends = torch.tensor([len(part) for part in parts]).cumsum(0)
    out = pool.empty(len(chosen), parts[0].shape[1], dtype)
    first, begin = 0, 0
    for part, end in zip(parts, torch.searchsorted(chosen, ends).tolist(), strict=True):
        out[begin:end] = part.index_select(0, chosen[begin:end] - first)
        first, begin = first + len(part), end
    return out


class Items(Sequence):
    """The items of a store: a read-only sequence of dicts, read shard by shard when they are needed."""

    def __init__(self, folder: Folder, shards: list[Shard], per_shard: int):
        """Args: the store's ``folder``, its ``shards``, and the number of items ``per_shard``."""
        self._length, self._per_shard = sum(shard.items for shard in shards), per_shard
        self._shard = lru_cache(maxsize=8)(lambda number: self._read(folder, number, shards[number]))

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        place = range(len(self))[index]
        return dict(self._shard(place // self._per_shard)[place % self._per_shard])

    @staticmethod
    def _read(folder: Folder, number: int, shard: Shard) -> list[dict[str, Any]]:
        file = items_file(number)
        text = folder.read(file)
        if xxhash.xxh3_128_hexdigest(text) != shard.files[file].xxh128:
            raise ValueError(f"{folder.full_name(file)} was changed after it was written: its checksum differs")
        return json.loads(text)


class BufferPool:
    """Uninitialised tensors whose memory is reused once nothing refers to it.

    Large memory that is freed goes back to the system, and fresh memory costs a page fault every 4 kB: without the
    pool, a pass over a store in the page cache takes twice as long. A few blocks of memory are remembered. If all of
    them are in use, for instance because a caller collects the tensors, fresh memory is taken and the oldest block is
    forgotten; it is freed together with its tensors.
    """

    def __init__(self) -> None:
        self._blocks: list[np.ndarray] = []

    def empty(self, rows: int, width: int, dtype: torch.dtype) -> Tensor:
        """Return an uninitialised tensor (rows, width) on the CPU, like :func:`torch.empty`."""
        size = rows * width * dtype.itemsize
        if not size:
            return torch.empty(rows, width, dtype=dtype)
        return torch.frombuffer(self._block(size), dtype=dtype, count=rows * width).reshape(rows, width)

    def _block(self, size: int) -> np.ndarray:
        for i in range(len(self._blocks)):
            if self._blocks[i].nbytes >= size and sys.getrefcount(self._blocks[i]) <= POOL_REFERENCES:
                return self._blocks[i]
        fresh = np.empty(size, np.uint8)
        self._blocks = [*self._blocks[1 - MAX_BUFFERS :], fresh]
        return fresh
