"""Estimate the disk space and time that a collection of activations will take, before it is started."""

from datetime import timedelta
from pathlib import Path
from typing import NamedTuple

from vaelab.core.disk import free_bytes, readable
from vaelab.core.paths import resolve
from vaelab.core.validate import at_least
from vaelab.store.format import Layout, Spec


class Plan(NamedTuple):
    """The estimated size and time of a collection; ``print(plan)`` shows it as a table."""

    items: int
    """Number of captures."""
    rows: dict[str, int]
    """Number of rows (vectors) of each block."""
    bytes: dict[str, int]
    """Size of these rows in bytes, by block."""
    seconds: float | None
    """Time of the whole collection in seconds; None if the time per item is not known."""
    memory: int | None
    """Peak memory of the process in bytes; None if it is not known."""
    free: int | None
    """Free bytes on the disk of the store's folder; None if no folder was given."""
    stored: int
    """Bytes of data that the folder already holds."""

    @property
    def total_rows(self) -> int:
        """Number of rows of all blocks."""
        return sum(self.rows.values())

    @property
    def total_bytes(self) -> int:
        """Size of all blocks in bytes."""
        return sum(self.bytes.values())

    @property
    def fits(self) -> bool:
        """Whether the disk has room for what is not stored yet; True if no folder was given."""
        return self.free is None or self.free > self.total_bytes - self.stored

    def require_disk_space(self, parameter: str = "output_dir") -> None:
        """Raise ValueError, beginning with ``parameter``, unless the disk has room for the collection."""
        if not self.fits:
            raise ValueError(
                f"{parameter}: the store needs {readable(self.total_bytes - self.stored)} more, and the disk has "
                f"{readable(self.free)} free; collect fewer items or blocks, or give a folder on a larger disk"
            )

    def __str__(self) -> str:
        width = max(map(len, [*self.rows, "all blocks"]))
        lines = [f"{self.items:,} items"]
        for name, rows, size in (
            *((block, self.rows[block], self.bytes[block]) for block in self.rows),
            ("all blocks", self.total_rows, self.total_bytes),
        ):
            lines.append(f"{name:<{width}}  {rows:>15,} rows  {readable(size):>9}")
        for name, size, remark in (
            ("stored", self.stored or None, ""),
            ("free disk", self.free, "enough" if self.fits else "NOT ENOUGH"),
            ("memory", self.memory, ""),
        ):
            if size is not None:
                lines.append(f"{name:<{width}}  {'':>15}       {readable(size):>9}  {remark}".rstrip())
        time = "unknown"
        if self.seconds is not None:
            time = f"about {timedelta(seconds=round(self.seconds))} ({self.seconds / max(self.items, 1):.3g} s an item)"
        return "\n".join([*lines, f"{'time':<{width}}  {time}"])


def plan(
    layout: Layout,
    items: int,
    precision: str = "float16",
    *,
    seconds_per_item: float | None = None,
    memory: int | None = None,
    folder: str | Path | None = None,
) -> Plan:
    """Estimate the disk space and time that collecting ``items`` captures will take.

    Args:
        layout: the blocks and the shapes of their maps.
        items: the number of captures.
        precision: the precision of the stored values.
        seconds_per_item: the time per item, measured on a few items; None if it is not known.
        memory: the peak memory of the process in bytes, measured on a few items; None if it is not known.
        folder: the store's folder, whose disk must have enough free space; shards in it count as stored.

    Raises:
        ValueError: the number of items or seconds is negative, or the precision is unknown.
    """
    at_least("items", items, 0)
    at_least("seconds_per_item", seconds_per_item or 0, 0)
    itemsize = Spec(layout, precision, 1, {}).dtype.itemsize
    rows = {block: items * shape.count for block, shape in layout.items()}
    sizes = {block: rows[block] * shape.width * itemsize for block, shape in layout.items()}
    seconds = None if seconds_per_item is None else items * seconds_per_item
    free, stored = None, 0
    if folder is not None:
        free = free_bytes(folder)
        stored = sum(file.stat().st_size for file in resolve(folder).glob("shard-*.safetensors"))
    return Plan(items, rows, sizes, seconds, memory, free, stored)
