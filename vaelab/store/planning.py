"""What a collection of activations will take: told before anything is computed."""

import shutil
from datetime import timedelta
from pathlib import Path
from typing import NamedTuple

from vaelab.core.paths import resolve
from vaelab.core.validate import at_least
from vaelab.store.format import Layout, Spec

UNITS = ("B", "kB", "MB", "GB", "TB")


class Plan(NamedTuple):
    """What a collection will take; ``print(plan)`` shows it."""

    items: int
    """Captures."""
    rows: dict[str, int]
    """Vectors, by block."""
    bytes: dict[str, int]
    """Of these vectors, by block."""
    seconds: float | None
    """Of the whole collection, where the seconds of an item are known."""
    free: int | None
    """Bytes that are free where the store is to be."""

    @property
    def total_rows(self) -> int:
        """Vectors of all blocks."""
        return sum(self.rows.values())

    @property
    def total_bytes(self) -> int:
        """Bytes of all blocks."""
        return sum(self.bytes.values())

    def __str__(self) -> str:
        wide = max(map(len, [*self.rows, "all blocks"]))
        lines = [f"{self.items:,} items"]
        for name, rows, size in (
            *((block, self.rows[block], self.bytes[block]) for block in self.rows),
            ("all blocks", self.total_rows, self.total_bytes),
        ):
            lines.append(f"{name:<{wide}}  {rows:>15,} rows  {_readable(size):>9}")
        if self.free is not None:
            verdict = "enough" if self.free > self.total_bytes else "NOT ENOUGH"
            lines.append(f"{'free disk':<{wide}}  {'':>15}       {_readable(self.free):>9}  {verdict}")
        time = "not known before an item has been timed"
        if self.seconds is not None:
            time = f"about {timedelta(seconds=round(self.seconds))} ({self.seconds / max(self.items, 1):.3g} s an item)"
        return "\n".join([*lines, f"{'time':<{wide}}  {time}"])


def plan(
    layout: Layout,
    items: int,
    precision: str = "float16",
    *,
    seconds_per_item: float | None = None,
    folder: str | Path | None = None,
) -> Plan:
    """What collecting ``items`` captures will take, before anything is computed.

    Args:
        layout: the blocks and the shape of their maps.
        items: captures.
        precision: of the stored numbers.
        seconds_per_item: as measured on a few, to estimate the time.
        folder: where the store is to be, to tell what is free there.

    Raises:
        ValueError: fewer than 0 items or seconds, an unknown precision.
    """
    at_least("items", items, 0)
    at_least("seconds_per_item", seconds_per_item or 0, 0)
    width = Spec(layout, precision, 1, {}).dtype.itemsize
    rows = {block: items * shape.count for block, shape in layout.items()}
    sizes = {block: rows[block] * shape.width * width for block, shape in layout.items()}
    seconds = None if seconds_per_item is None else items * seconds_per_item
    free = None
    if folder is not None:
        there = resolve(folder)
        free = shutil.disk_usage(next(path for path in (there, *there.parents) if path.exists())).free
    return Plan(items, rows, sizes, seconds, free)


def _readable(size: float) -> str:
    steps = 0
    while size >= 999.5 and steps < len(UNITS) - 1:
        size, steps = size / 1000, steps + 1
    return f"{size:.3g} {UNITS[steps]}"
