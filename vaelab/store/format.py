"""How activations lie on disk: the files of a store, and how they are checked when it is opened.

::

    index.json                         layout, precision, settings; whether the store is complete
    shard-00007.down.2.1.safetensors   one tensor ``rows`` (items * positions, width), one file a block
    shard-00007.items.json             the shard's items: prompt or image, seed, timestep, ...
    shard-00007.json                   its manifest, written last: bytes and checksum of the others

A shard exists if and only if its manifest does. Every shard holds ``items_per_shard`` items, but for
the last of a complete store. An *item* is one capture; row r of a block is position ``r % P`` of
item ``r // P``, where P is the number of positions an item has there.
"""

import hashlib
import json
import math
import re
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vaelab.core import devices
from vaelab.core.validate import at_least
from vaelab.store.files import Folder

FORMAT = "vaelab activations"
VERSION = 1
INDEX = "index.json"
HEADER = 4096
"""Bytes before the rows of a data file: one page, however many rows follow."""
LONGEST = 200
"""Characters of a block's name, which goes into a file's name and its header."""
CODES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}
"""What safetensors calls the precisions."""


@dataclass(frozen=True)
class BlockShape:
    """The map (positions..., width) that one item gives for a block."""

    positions: tuple[int, ...]
    """Sides of the map, for instance (16, 16); () for a pooled vector."""
    width: int
    """Length of the vector at each position."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "positions", tuple(self.positions))
        for side in self.positions:
            at_least("positions", side, 1)
        at_least("width", self.width, 1)

    @property
    def count(self) -> int:
        """Positions, and so rows, of an item."""
        return math.prod(self.positions)


Layout = dict[str, BlockShape]


@dataclass(frozen=True)
class Spec:
    """What all shards of a store agree on."""

    layout: Layout
    """The blocks, each with the shape of its maps."""
    precision: str
    """Of the stored numbers."""
    items_per_shard: int
    """Items of every shard but the last."""
    settings: dict[str, Any]
    """What the items are made from: plain JSON."""

    def __post_init__(self) -> None:
        devices.dtype(self.precision)
        at_least("items_per_shard", self.items_per_shard, 1)
        object.__setattr__(self, "settings", json.loads(plain("settings", self.settings)))
        if not self.layout:
            raise ValueError("layout: there is no block to store")
        owners: dict[str, str] = {}
        for block in self.layout:
            # there are file systems that take A for a
            other = owners.setdefault(data_file(0, block).lower(), block)
            if other != block:
                raise ValueError(f"layout: blocks {other!r} and {block!r} would share one file")
            if not 0 < len(block) <= LONGEST:
                raise ValueError(f"layout: a block's name has 1 to {LONGEST} characters, not {len(block)}")

    @classmethod
    def of(cls, record: dict[str, Any]) -> "Spec":
        """The spec that :meth:`record` was taken of."""
        layout = {block: BlockShape(**shape) for block, shape in record["layout"].items()}
        return cls(layout, record["precision"], record["items_per_shard"], record["settings"])

    def record(self) -> dict[str, Any]:
        """The spec as plain JSON."""
        layout = {name: {"positions": [*shape.positions], "width": shape.width} for name, shape in self.layout.items()}
        return {
            "layout": layout,
            "precision": self.precision,
            "items_per_shard": self.items_per_shard,
            "settings": self.settings,
        }

    def differences(self, other: "Spec") -> list[str]:
        """What is not the same ``there``, in this spec, and ``here``, in the other: in words."""

        def flat(spec: Spec) -> dict[str, Any]:
            record = spec.record()
            layout, settings = record.pop("layout"), record.pop("settings")
            of_layout = {f"layout of {block}": shape for block, shape in layout.items()}
            return {**record, **of_layout, **{f"settings {name}": value for name, value in settings.items()}}

        there, here = flat(self), flat(other)
        return [
            f"{name} {there.get(name, 'missing')!r} there, {here.get(name, 'missing')!r} here"
            for name in {**there, **here}
            if (name in there, there.get(name)) != (name in here, here.get(name))
        ]

    @cached_property
    def identity(self) -> str:
        """A name of the whole spec, which every shard bears: one of another store is found out."""
        return checksum(self.record())[:16]

    @property
    def dtype(self) -> torch.dtype:
        """Of the stored numbers."""
        return devices.dtype(self.precision)

    def size(self, block: str, items: int) -> int:
        """Bytes of the data file of a shard with so many items."""
        shape = self.layout[block]
        return HEADER + items * shape.count * shape.width * self.dtype.itemsize

    def header(self, shard: int, block: str, items: int) -> bytes:
        """What a data file begins with: HEADER bytes, as the safetensors format has them."""
        shape = self.layout[block]
        metadata = {"format": FORMAT, "store": self.identity, "shard": str(shard), "block": block}
        size = [items * shape.count, shape.width]
        rows = {"dtype": CODES[self.precision], "shape": size, "data_offsets": [0, self.size(block, items) - HEADER]}
        text = json.dumps({"__metadata__": metadata, "rows": rows}).encode()
        return (HEADER - 8).to_bytes(8, "little") + text.ljust(HEADER - 8)


class File(NamedTuple):
    """What a manifest says of one file."""

    bytes: int
    """Its length."""
    xxh128: str
    """Its checksum, XXH3 of 128 bits: as sure as any against damage, and quicker than the disk."""


class Shard(NamedTuple):
    """What a manifest says of its shard."""

    items: int
    """How many it holds."""
    files: dict[str, File]
    """Its items file and its data files, by name."""


def data_file(shard: int, block: str) -> str:
    """The name of a block's file; what does not belong in a file's name becomes ``_``."""
    return f"shard-{shard:05d}.{re.sub(r'[^A-Za-z0-9._-]', '_', block)}.safetensors"


def items_file(shard: int) -> str:
    """The name of the file with a shard's items."""
    return f"shard-{shard:05d}.items.json"


def manifest_file(shard: int) -> str:
    """The name of a shard's manifest."""
    return f"shard-{shard:05d}.json"


def plain(name: str, value: Any) -> str:
    """``value`` as strict JSON text, or ValueError where it is none."""
    try:
        return json.dumps(value, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name}: must be plain JSON without NaN ({error})") from error


def checksum(record: dict[str, Any]) -> str:
    """SHA-256 of a record, whatever the order of its keys."""
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()


def signed(record: dict[str, Any]) -> dict[str, Any]:
    """A record as it is written: with the format's name and version, and its own checksum."""
    record = {"format": FORMAT, "version": VERSION, **record}
    return {**record, "sha256": checksum(record)}


def record_of(name: str, text: bytes) -> dict[str, Any]:
    """What :func:`signed` made, read again.

    Raises:
        ValueError: naming the file: foreign, of a newer version, or changed since.
    """
    try:
        record = json.loads(text)
    except ValueError as error:
        raise ValueError(f"{name} is foreign or cut short: it is not JSON ({error})") from error
    if not isinstance(record, dict) or record.get("format") != FORMAT:
        raise ValueError(f"{name} is foreign: it was not written by this lab's store")
    if record.get("version") != VERSION:
        raise ValueError(
            f"{name} is of version {record.get('version')}, this lab reads {VERSION}: a newer lab wrote it"
        )
    if record.pop("sha256", None) != checksum(record):
        raise ValueError(f"{name} was changed since it was written: it does not match its own checksum")
    return record


def read_rows(folder: Folder, spec: Spec, block: str, shard: int, items: int, out: Tensor, start: int = 0) -> None:
    """Read rows ``start`` and on of a shard of ``items`` into ``out`` (n, width), of the store's dtype.

    Raises:
        ValueError: naming the file: missing, truncated, or another than it should be.
    """
    file, view = data_file(shard, block), out.view(torch.uint8).numpy().reshape(-1)
    head, got = folder.read_into(view, file, HEADER + start * out.shape[1] * out.itemsize, HEADER)
    size = spec.size(block, items) - len(view) + got
    _refuse_rows(folder, spec, block, shard, items, spec.header(shard, block, items) if head is None else head, size)


def map_rows(folder: Folder, spec: Spec, block: str, shard: int, items: int) -> Tensor:
    """All rows of a shard of a local store, (n, width) in memory that is the file's: what of it
    is not in the page cache yet is asked of the disk, and is waited for where it is used.

    Raises:
        ValueError: as :func:`read_rows`.
    """
    shape, memory = spec.layout[block], folder.mapped(data_file(shard, block))
    _refuse_rows(folder, spec, block, shard, items, memory[:HEADER], len(memory))
    rows = items * shape.count
    return torch.frombuffer(memory, dtype=spec.dtype, offset=HEADER, count=rows * shape.width).reshape(rows, -1)


def _refuse_rows(folder: Folder, spec: Spec, block: str, shard: int, items: int, header: bytes, size: int) -> None:
    name = folder.name(data_file(shard, block))
    if header != spec.header(shard, block, items):
        raise ValueError(f"{name} is foreign: it is not {block!r} of shard {shard} of this store")
    if missing := max(0, spec.size(block, items) - size):
        raise ValueError(f"{name} is truncated: {missing} bytes of its rows are not there")


def read_index(folder: Folder) -> tuple[Spec, int | None]:
    """The spec of a store, and how many items it holds (None while it is not complete)."""
    record = record_of(folder.name(INDEX), folder.read(INDEX))
    return Spec.of(record), record["items"]


def read_shards(folder: Folder, spec: Spec, items: int | None) -> list[Shard]:
    """What the manifests say, once every file has been seen to be there in its full length.

    Args:
        folder: where the store is.
        spec: of the store.
        items: of a complete store; None for one that may end anywhere.

    Raises:
        ValueError: naming a file that is missing, truncated or foreign.
    """
    sizes = folder.sizes()
    found = [int(match[1]) for name in sizes if (match := re.fullmatch(r"shard-(\d{5,})\.json", name))]
    count = max([-1, *found]) + 1
    if items is not None:
        count = max(count, -(-items // spec.items_per_shard))
    texts = folder.read_each(map(manifest_file, range(count)))
    shards = [_shard(folder, spec, number, text, sizes) for number, text in enumerate(texts)]
    held = sum(shard.items for shard in shards)
    if items not in (None, held) or any(shard.items != spec.items_per_shard for shard in shards[:-1]):
        raise ValueError(f"{folder.name(INDEX)} tells of {items} items, but the {count} shards beside it hold {held}")
    return shards


def _shard(folder: Folder, spec: Spec, number: int, text: bytes, sizes: dict[str, int | None]) -> Shard:
    name = folder.name(manifest_file(number))
    record = record_of(name, text)
    if (record.get("store"), record.get("shard")) != (spec.identity, number):
        raise ValueError(f"{name} is foreign: it is of shard {record.get('shard')} of a store with other settings")
    shard = Shard(record["items"], {file: File(**told) for file, told in record["files"].items()})
    for file, told in shard.files.items():
        if file not in sizes:
            raise ValueError(f"{folder.name(file)} is missing")
        size = told.bytes if sizes[file] is None else sizes[file]
        if size != told.bytes:
            how = "truncated" if size < told.bytes else "foreign or changed"
            raise ValueError(f"{folder.name(file)} is {how}: it has {size} bytes, and had {told.bytes} when written")
    return shard
