"""The files of a store, and their validation when a store is opened.

::

    index.json                         layout, precision and settings; whether the store is complete
    shard-00007.down.2.1.safetensors   one tensor ``rows`` (items * positions, width) for each block
    shard-00007.items.json             the shard's items: prompt or image, seed, timestep, ...
    shard-00007.json                   the shard's manifest, written last: size and checksum of the other files

A shard exists if and only if its manifest does. Every shard holds ``items_per_shard`` items, except that the last
shard of a complete store may hold fewer. An *item* is one capture: the maps of all blocks for one picture or prompt at
one timestep. Row r of a block is position ``r % P`` of item ``r // P``, where P is the number of positions that an item
has in this block.
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
from vaelab.core.paths import local
from vaelab.core.validate import at_least
from vaelab.store.files import Folder

FORMAT = "vaelab activations"
VERSION = 1
INDEX = "index.json"
HEADER_BYTES = 4096
"""Size of the header of a data file: one page, for any number of rows."""
MAX_NAME_LENGTH = 200
"""Largest number of characters in a block's name, which becomes part of a file's name and header."""
SAFETENSORS_DTYPES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}
"""The names that safetensors gives to the precisions."""


@dataclass(frozen=True)
class BlockShape:
    """The shape of the map (positions..., width) that a block gives for one item."""

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
        """Number of positions, and therefore of rows, of one item."""
        return math.prod(self.positions)


Layout = dict[str, BlockShape]


@dataclass(frozen=True)
class Spec:
    """What all shards of a store have in common."""

    layout: Layout
    """The blocks and the shapes of their maps."""
    precision: str
    """Precision of the stored values."""
    items_per_shard: int
    """Number of items in every shard; the last shard may hold fewer."""
    settings: dict[str, Any]
    """Everything that determines the stored values, as plain JSON."""

    def __post_init__(self) -> None:
        devices.dtype(self.precision)
        at_least("items_per_shard", self.items_per_shard, 1)
        object.__setattr__(self, "settings", json.loads(to_json("settings", self.settings)))
        if not self.layout:
            raise ValueError("layout: there is no block to store")
        owners: dict[str, str] = {}
        for block in self.layout:
            # lower case, since some file systems do not distinguish A from a
            other = owners.setdefault(data_file(0, block).lower(), block)
            if other != block:
                raise ValueError(f"layout: blocks {other!r} and {block!r} would share one file")
            if not 0 < len(block) <= MAX_NAME_LENGTH:
                raise ValueError(f"layout: a block's name has 1 to {MAX_NAME_LENGTH} characters, not {len(block)}")

    @classmethod
    def from_record(cls, record: dict[str, Any]) -> "Spec":
        """Make a spec from the result of :meth:`record`."""
        layout = {block: BlockShape(**shape) for block, shape in record["layout"].items()}
        return cls(layout, record["precision"], record["items_per_shard"], record["settings"])

    def record(self) -> dict[str, Any]:
        """Return the spec as plain JSON."""
        layout = {name: {"positions": [*shape.positions], "width": shape.width} for name, shape in self.layout.items()}
        return {
            "layout": layout,
            "precision": self.precision,
            "items_per_shard": self.items_per_shard,
            "settings": self.settings,
        }

    def differences(self, other: "Spec") -> list[str]:
        """Describe what differs between the store of this spec ("there") and the other spec ("here").

        ``items_per_shard`` is not compared, since it does not affect the stored values. Two spellings of the path
        of one local file or folder count as equal.
        """
        there, here = self._decisive(), other._decisive()
        return [
            f"{name} {there.get(name, 'missing')!r} there, {here.get(name, 'missing')!r} here"
            for name in {**there, **here}
            if (name in there, there.get(name)) != (name in here, here.get(name))
            and not _same_path(there.get(name), here.get(name))
        ]

    def _decisive(self) -> dict[str, Any]:
        record = self.record()
        return {
            "precision": self.precision,
            **{f"layout of {block}": shape for block, shape in record["layout"].items()},
            **{f"settings {name}": value for name, value in self.settings.items()},
        }

    @cached_property
    def identity(self) -> str:
        """A hash of the spec, stored in every shard, so that a shard of another store is recognised."""
        return json_sha256(self.record())[:16]

    @property
    def dtype(self) -> torch.dtype:
        """The torch dtype of the stored values."""
        return devices.dtype(self.precision)

    def file_size(self, block: str, items: int) -> int:
        """Compute the size in bytes of the data file of a shard with ``items`` items."""
        shape = self.layout[block]
        return HEADER_BYTES + items * shape.count * shape.width * self.dtype.itemsize

    def header(self, shard: int, block: str, items: int) -> bytes:
        """Make the header of a data file in the safetensors format, padded to ``HEADER_BYTES``."""
        shape = self.layout[block]
        metadata = {"format": FORMAT, "store": self.identity, "shard": str(shard), "block": block}
        rows = {
            "dtype": SAFETENSORS_DTYPES[self.precision],
            "shape": [items * shape.count, shape.width],
            "data_offsets": [0, self.file_size(block, items) - HEADER_BYTES],
        }
        text = json.dumps({"__metadata__": metadata, "rows": rows}).encode()
        return (HEADER_BYTES - 8).to_bytes(8, "little") + text.ljust(HEADER_BYTES - 8)


def _same_path(there: Any, here: Any) -> bool:
    if not (isinstance(there, str) and isinstance(here, str)):
        return False
    paths = local(there), local(here)
    return None not in paths and paths[0].samefile(paths[1])


class FileRecord(NamedTuple):
    """A manifest's entry for one file."""

    bytes: int
    """Size of the file."""
    xxh128: str
    """Checksum of the file: XXH3 with 128 bits, which detects damage and is faster than a disk."""


class Shard(NamedTuple):
    """The content of a manifest."""

    items: int
    """Number of items in the shard."""
    files: dict[str, FileRecord]
    """The items file and the data files, by name."""


def data_file(shard: int, block: str) -> str:
    """Return the name of a block's data file; characters that are unsafe in a file's name become ``_``."""
    return f"shard-{shard:05d}.{re.sub(r'[^A-Za-z0-9._-]', '_', block)}.safetensors"


def items_file(shard: int) -> str:
    """Return the name of a shard's items file."""
    return f"shard-{shard:05d}.items.json"


def manifest_file(shard: int) -> str:
    """Return the name of a shard's manifest."""
    return f"shard-{shard:05d}.json"


def to_json(name: str, value: Any) -> str:
    """Convert ``value`` to strict JSON text.

    Raises:
        ValueError: the value is not plain JSON, or contains NaN or infinity; the error begins with ``name``.
    """
    try:
        return json.dumps(value, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name}: must be plain JSON without NaN ({error})") from error


def json_sha256(record: dict[str, Any]) -> str:
    """Compute the SHA-256 of a JSON record, independent of the order of its keys."""
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()


def with_checksum(record: dict[str, Any]) -> dict[str, Any]:
    """Add the format's name and version and the record's own checksum to a record, so that it can be written."""
    record = {"format": FORMAT, "version": VERSION, **record}
    return {**record, "sha256": json_sha256(record)}


def parse_record(name: str, text: bytes) -> dict[str, Any]:
    """Parse and check the text of the file ``name``, a record of :func:`with_checksum`.

    Raises:
        ValueError: the file is foreign, of another version, or was changed after it was written; the error names it.
    """
    try:
        record = json.loads(text)
    except ValueError as error:
        raise ValueError(f"{name} is foreign or truncated: it is not JSON ({error})") from error
    if not isinstance(record, dict) or record.get("format") != FORMAT:
        raise ValueError(f"{name} is foreign: it was not written by this lab's store")
    if record.get("version") != VERSION:
        raise ValueError(
            f"{name} has version {record.get('version')}, and this lab reads version {VERSION}: a newer lab wrote it"
        )
    if record.pop("sha256", None) != json_sha256(record):
        raise ValueError(f"{name} was changed after it was written: it does not match its own checksum")
    return record


def read_index(folder: Folder) -> tuple[Spec, int | None]:
    """Read a store's spec and its number of items; the number is None while the store is not complete."""
    record = parse_record(folder.full_name(INDEX), folder.read(INDEX))
    return Spec.from_record(record), record["items"]


def read_manifests(folder: Folder, spec: Spec, items: int | None) -> list[Shard]:
    """Read all manifests, and check that every file they list exists and has its full size.

    Args:
        folder: the store's folder.
        spec: the store's spec.
        items: the number of items of a complete store; None if the store is not complete.

    Raises:
        ValueError: a file is missing, truncated or foreign; the error names it.
    """
    sizes = folder.sizes()
    numbers = [int(match[1]) for name in sizes if (match := re.fullmatch(r"shard-(\d{5,})\.json", name))]
    count = max([-1, *numbers]) + 1
    if items is not None:
        count = max(count, -(-items // spec.items_per_shard))
    texts = folder.read_all(map(manifest_file, range(count)))
    shards = [_manifest(folder, spec, number, text, sizes) for number, text in enumerate(texts)]
    total = sum(shard.items for shard in shards)
    if items not in (None, total) or any(shard.items != spec.items_per_shard for shard in shards[:-1]):
        raise ValueError(f"{folder.full_name(INDEX)} lists {items} items, but its {count} shards hold {total}")
    return shards


def _manifest(folder: Folder, spec: Spec, number: int, text: bytes, sizes: dict[str, int | None]) -> Shard:
    name = folder.full_name(manifest_file(number))
    record = parse_record(name, text)
    if (record.get("store"), record.get("shard")) != (spec.identity, number):
        raise ValueError(f"{name} is foreign: it belongs to shard {record.get('shard')} of a store of other settings")
    shard = Shard(record["items"], {file: FileRecord(**entry) for file, entry in record["files"].items()})
    for file, entry in shard.files.items():
        if file not in sizes:
            raise ValueError(f"{folder.full_name(file)} is missing")
        size = entry.bytes if sizes[file] is None else sizes[file]
        if size != entry.bytes:
            how = "truncated" if size < entry.bytes else "foreign or changed"
            raise ValueError(f"{folder.full_name(file)} is {how}: it has {size} bytes instead of {entry.bytes}")
    return shard


def read_rows(folder: Folder, spec: Spec, block: str, shard: int, items: int, out: Tensor, start: int = 0) -> None:
    """Read rows ``start`` to ``start + n`` of a shard of ``items`` items into ``out`` (n, width) of the store's dtype.

    Raises:
        ValueError: the file is missing, truncated or foreign; the error names it.
    """
    file, view = data_file(shard, block), out.view(torch.uint8).numpy().reshape(-1)
    head, read = folder.read_into(view, file, HEADER_BYTES + start * out.shape[1] * out.itemsize, HEADER_BYTES)
    size = spec.file_size(block, items) - len(view) + read
    header = spec.header(shard, block, items) if head is None else head
    _validate_data_file(folder, spec, block, shard, items, header, size)


def map_rows(folder: Folder, spec: Spec, block: str, shard: int, items: int) -> Tensor:
    """Map all rows (n, width) of a shard of a local store into memory, as a view of its file.

    Raises:
        ValueError: the file is missing, truncated or foreign; the error names it.
    """
    shape, memory = spec.layout[block], folder.memory_map(data_file(shard, block))
    _validate_data_file(folder, spec, block, shard, items, memory[:HEADER_BYTES], len(memory))
    rows = items * shape.count
    return torch.frombuffer(memory, dtype=spec.dtype, offset=HEADER_BYTES, count=rows * shape.width).reshape(rows, -1)


def _validate_data_file(
    folder: Folder, spec: Spec, block: str, shard: int, items: int, header: bytes, size: int
) -> None:
    name = folder.full_name(data_file(shard, block))
    if header != spec.header(shard, block, items):
        raise ValueError(f"{name} is foreign: it is not {block!r} of shard {shard} of this store")
    if missing := max(0, spec.file_size(block, items) - size):
        raise ValueError(f"{name} is truncated: {missing} bytes of its rows are missing")
