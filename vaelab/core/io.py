"""Write files atomically (to a draft beside the file, synced, then renamed to it), and lock files."""

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

DRAFT = ".draft-"
"""Prefix of the names of draft folders."""
_cleaned: set[Path] = set()


@contextmanager
def naming(path: str | Path) -> Iterator[None]:
    """Add the file's name to an OSError that does not name it, such as the error of a full disk."""
    try:
        yield
    except OSError as error:
        if error.filename is not None or error.errno is None:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error


@contextmanager
def atomic(path: str | Path) -> Iterator[Path]:
    """Yield a path to write to; on success it becomes ``path``, on an exception it is removed.

    A reader sees either the old file or the new one, never a part of it, even if the process is killed. The draft lies
    in its own folder beside ``path``, and the process holds a lock on that folder. The first call of a process for a
    parent folder removes the drafts that killed processes left there.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    if (parent := path.parent.resolve()) not in _cleaned:
        remove_dead_drafts(parent)
        _cleaned.add(parent)
    place, lock = _draft_folder(path.parent)
    draft = place / path.name
    try:
        yield draft
        with naming(path), open(draft, "rb") as file:
            os.fsync(file.fileno())
        os.replace(draft, path)
    finally:
        shutil.rmtree(place, ignore_errors=True)
        os.close(lock)


def remove_dead_drafts(folder: str | Path) -> None:
    """Remove those drafts of :func:`atomic` in a folder whose processes have ended.

    The system frees a draft's lock when its process ends, for whatever reason. A draft is kept if its lock is held, or
    if the file system has no locks.
    """
    for place in Path(folder).glob(f"{DRAFT}*"):
        if place.is_symlink() or not place.is_dir():
            continue
        try:
            lock = os.open(place, os.O_RDONLY)
        except FileNotFoundError:  # another process has just finished or removed it
            continue
        try:
            _flock(lock)
            shutil.rmtree(place, ignore_errors=True)
        except OSError:
            pass
        finally:
            os.close(lock)


def _draft_folder(parent: Path) -> tuple[Path, int]:
    """Make a new folder for a draft; return it with the descriptor that holds its lock."""
    while True:
        place = Path(tempfile.mkdtemp(prefix=DRAFT, dir=parent))
        try:
            lock = os.open(place, os.O_RDONLY)
        except FileNotFoundError:
            continue  # another process took it for the draft of an ended process, before it was locked
        try:
            _flock(lock)
            if os.path.samestat(os.fstat(lock), place.stat()):
                return place, lock
        except (BlockingIOError, FileNotFoundError):
            pass  # the same
        except OSError:
            return place, lock  # a file system without locks
        os.close(lock)


def _flock(descriptor: int) -> None:
    import fcntl  # not on Windows

    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)


def write_json(path: str | Path, value: Any) -> None:
    """Write ``value`` as strict JSON (no NaN), atomically."""
    with atomic(path) as draft, naming(path):
        draft.write_text(json.dumps(value, indent=1, allow_nan=False) + "\n")


def locked(path: str | Path) -> BinaryIO | None:
    """Lock a file, which only one process can do at a time, until the file is closed or the process ends.

    Returns None if another process holds the lock.
    """
    lock = open(path, "ab")  # noqa: SIM115
    try:
        _flock(lock.fileno())
    except BlockingIOError:
        lock.close()
        return None
    except OSError:
        pass  # a file system without locks
    return lock


def read_json(path: str | Path) -> Any:
    """Read the value of a JSON file."""
    return json.loads(Path(path).read_text())
