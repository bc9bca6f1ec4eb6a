"""Files that are whole or not there: written beside their place, synced, then renamed into it. And locks."""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO


@contextmanager
def naming(path: str | Path) -> Iterator[None]:
    """Have what the system refuses name the file: a full disk does not of itself."""
    try:
        yield
    except OSError as error:
        if error.filename is not None or error.errno is None:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error


@contextmanager
def atomic(path: str | Path) -> Iterator[Path]:
    """Yield a path to write to; on success it becomes ``path``, on an exception it is removed.

    A reader sees the old file or the new one, never a part, whatever kills the writer.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.{os.getpid()}.draft")
    try:
        yield draft
        with naming(path), open(draft, "rb") as file:
            os.fsync(file.fileno())
        os.replace(draft, path)
    finally:
        draft.unlink(missing_ok=True)


def write_json(path: str | Path, value: Any) -> None:
    """Write ``value`` as strict JSON (no NaN), atomically."""
    with atomic(path) as draft, naming(path):
        draft.write_text(json.dumps(value, indent=1, allow_nan=False) + "\n")


def locked(path: str | Path) -> BinaryIO | None:
    """A file that one process holds at a time, until it closes it or is killed; None where another holds it."""
    import fcntl  # not on Windows

    lock = open(path, "wb")  # noqa: SIM115
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        lock.close()
        return None
    except OSError:
        pass  # a file system without locks
    return lock


def read_json(path: str | Path) -> Any:
    """The value of a JSON file."""
    return json.loads(Path(path).read_text())
