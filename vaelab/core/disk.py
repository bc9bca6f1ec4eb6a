"""Free disk space, checked before something large is written."""

import shutil
from pathlib import Path

from vaelab.core.paths import resolve

UNITS = ("B", "kB", "MB", "GB", "TB")


def readable(size: float) -> str:
    """Write a number of bytes with three digits and a unit, such as ``1.25 GB``."""
    steps = 0
    while size >= 999.5 and steps < len(UNITS) - 1:
        size, steps = size / 1000, steps + 1
    return f"{size:.3g} {UNITS[steps]}"


def free_bytes(folder: str | Path) -> int:
    """Return the free bytes on the disk of a folder, which need not exist yet."""
    path = resolve(folder)
    return shutil.disk_usage(next(place for place in (path, *path.parents) if place.exists())).free


def stored_bytes(folder: str | Path) -> int:
    """Return the size of all files in a folder and its subfolders, in bytes; 0 if there is no such folder."""
    return sum(file.stat().st_size for file in resolve(folder).rglob("*") if file.is_file())


def require_free(needed: int, folder: str | Path, *, parameter: str, what: str, advice: str) -> None:
    """Require free space on the disk of a folder.

    Args:
        needed: the number of bytes.
        folder: a folder, which need not exist yet.
        parameter: the notebook parameter that the error begins with.
        what: what needs the space, for the error.
        advice: what the user can do, for the error.

    Raises:
        ValueError: the disk has less free space.
    """
    if needed > (free := free_bytes(folder)):
        raise ValueError(
            f"{parameter}: {what} needs {readable(needed)} of disk space, and {readable(free)} are free; {advice}"
        )
