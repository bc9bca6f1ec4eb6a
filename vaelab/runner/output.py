"""The output folder of a run: locked while the run executes, and replaced only as a whole.

What the runner itself needs lies in the folder's own ``.run``::

    .run/lock        held by the process that executes the run
    .run/identity.json  what decides the results of the run that began in the folder
    .run/made.json   the names in the folder that runs of this notebook made
    .run/new/        the files that an overwriting run has made so far
    .run/staged.json what decides the results of that run
    .run/swap.json   written when ``new`` is complete: the names to move, and the names to remove
    .run/old/        the replaced files, until they are removed

A run that overwrites a finished one writes into ``.run/new``. At its end these files take the place of the finished
ones. If the process is killed before that, the finished run stays as it was. If it is killed during the move,
``swap.json`` is left, and the next process that opens the folder completes the move. Only entries that a run made
itself are ever replaced or removed. Nothing outside the folder is touched, and no link is followed.
"""

import json
import os
import shutil
from datetime import datetime
from pathlib import Path
from typing import Any

from vaelab.core.io import read_json, write_json

RESULTS = "results.json"
PRIVATE = ".run"
_held: dict[str, "Lock"] = {}


class Lock:
    """A lock file that one process holds at a time; the system frees it when the process ends."""

    def __init__(self, path: Path, subject: str):
        """Take the lock.

        Args:
            path: the lock file.
            subject: name of what is locked; the error message begins with it.

        Raises:
            ValueError: another process holds it; the error names that process.
        """
        self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0), 0o644)
        try:
            _flock(self._descriptor)
        except BlockingIOError:
            holder = os.read(self._descriptor, 200).decode(errors="replace").strip() or "another process"
            os.close(self._descriptor)
            raise ValueError(f"{subject} is in use by {holder}") from None
        os.ftruncate(self._descriptor, 0)
        os.pwrite(self._descriptor, f"process {os.getpid()} since {datetime.now():%Y-%m-%d %H:%M:%S}".encode(), 0)

    def release(self) -> None:
        """Give the lock back."""
        if self._descriptor is not None:
            os.ftruncate(self._descriptor, 0)
            os.close(self._descriptor)
            self._descriptor = None


def in_use(folder: Path) -> bool:
    """Whether a process is executing a run in an output folder."""
    path = folder / PRIVATE / "lock"
    try:
        lock = Lock(path, "") if path.is_file() else None
    except (ValueError, OSError):
        return True
    if lock is not None:
        lock.release()
    return False


class OutputFolder:
    """A locked output folder; the paths that a run writes to.

    Args:
        folder: folder for the run's results; it is created if it does not exist.
        lock: whether to hold the folder's lock until :meth:`release`.

    Raises:
        OSError: the folder cannot be written to.
        ValueError: another process is using the folder.
    """

    def __init__(self, folder: Path, *, lock: bool = True):
        self.folder, self._private = folder, folder / PRIVATE
        self._staged: set[str] = set()
        self._lock: Lock | None = None
        subject = f"output_dir: {str(folder)!r}"
        try:
            _own_folder(folder)
            _own_folder(self._private, links=False)
            if lock:
                previous = _held.pop(str(folder.resolve()), None)
                if previous is not None:  # a cell of the same kernel was run again
                    previous.release()
                self._lock = _held[str(folder.resolve())] = Lock(self._private / "lock", subject)
                (self._private / "probe").touch()
                (self._private / "probe").unlink()
        except OSError as error:
            raise OSError(f"output_dir: cannot write to {str(folder)!r} ({error.strerror})") from error
        if lock:
            complete_swap(folder)

    @property
    def finished(self) -> bool:
        """Whether the folder holds the results of a finished run."""
        return os.path.lexists(self.folder / RESULTS)

    @property
    def made(self) -> list[str]:
        """The names in the folder that runs made."""
        return _names(self._private / "made.json")

    def stage(self, identity: dict[str, Any]) -> None:
        """Write everything beside the finished run from now on, until :meth:`commit`.

        Args:
            identity: the parameters that decide the results. Files left by a killed run of the same identity are
                used again; files of another identity are removed.
        """
        marker = self._private / "staged.json"
        if self._new.is_symlink() or not _holds(marker, identity):
            _remove(self._new)
        self._new.mkdir(exist_ok=True)
        write_json(marker, identity)

    def begin(self, identity: dict[str, Any]) -> None:
        """Note what decides the results of the run that writes into the folder itself."""
        write_json(self._private / "identity.json", identity)

    def begun_as(self, identity: dict[str, Any]) -> bool:
        """Whether an unfinished run of this identity began in the folder."""
        return _holds(self._private / "identity.json", identity)

    def place(self, name: str, *, staged: bool) -> Path:
        """The path to write an entry of the folder to.

        Args:
            name: a file or folder directly in the output folder.
            staged: whether it replaces an existing entry only at :meth:`commit`.

        Raises:
            ValueError: the folder holds an entry of that name that no run made.
        """
        if not _plain(name):
            raise ValueError(f"{name!r} does not name an entry of the output folder")
        path = self.folder / name
        if os.path.lexists(path) and name not in self.made:
            raise ValueError(
                f"output_dir: {str(path)!r} was not made by a run of this notebook and is not replaced; move it "
                "away, or choose another output_dir"
            )
        if staged:
            self._new.mkdir(exist_ok=True)
            self._staged.add(name)
            return self._new / name
        if path.is_symlink():
            raise ValueError(f"output_dir: {str(path)!r} is a link, which a run does not follow")
        if name not in self.made:
            write_json(self._private / "made.json", sorted({*self.made, name}))
        return path

    def commit(self, *, replace_all: bool) -> None:
        """Move the staged entries into the folder.

        Args:
            replace_all: whether to remove entries that earlier runs made and this run did not.
        """
        new = sorted(self._staged)
        old = [name for name in self.made if name not in new] if replace_all else []
        made = new if replace_all else sorted({*self.made, *new})
        write_json(self._private / "swap.json", {"new": new, "old": old, "made": made})
        complete_swap(self.folder)
        self._staged.clear()

    def release(self) -> None:
        """Give the lock back."""
        if self._lock is not None:
            _held.pop(str(self.folder.resolve()), None)
            self._lock.release()
            self._lock = None

    @property
    def _new(self) -> Path:
        return self._private / "new"


def recover(folder: Path) -> None:
    """Complete an interrupted move in a folder that no process is using."""
    if not (folder / PRIVATE / "swap.json").is_file() or (folder / PRIVATE).is_symlink():
        return
    try:
        lock = Lock(folder / PRIVATE / "lock", str(folder))
    except ValueError:  # the process that moves is alive
        return
    complete_swap(folder)
    lock.release()


def complete_swap(folder: Path) -> None:
    """Complete the move of staged entries if a killed process left one unfinished."""
    private = folder / PRIVATE
    record = private / "swap.json"
    if private.is_symlink() or not record.is_file() or record.is_symlink():
        return
    swap = read_json(record)
    new, old, made = ([name for name in swap[key] if _plain(name)] for key in ("new", "old", "made"))
    write_json(private / "made.json", made)
    replaced = private / "old"
    if replaced.is_symlink():
        replaced.unlink()
    replaced.mkdir(exist_ok=True)
    # results.json goes first and comes last: a reader in between sees a run that has not finished
    for name in sorted([*new, *old], key=lambda name: name != RESULTS):
        if os.path.lexists(folder / name) and (name in old or os.path.lexists(private / "new" / name)):
            _remove(replaced / name)
            os.replace(folder / name, replaced / name)
    for name in sorted(new, key=lambda name: name == RESULTS):
        if os.path.lexists(private / "new" / name):
            os.replace(private / "new" / name, folder / name)
    _remove(replaced)
    _remove(private / "new")
    (private / "staged.json").unlink(missing_ok=True)
    record.unlink()


def _plain(name: Any) -> bool:
    """Whether a name is that of a visible entry directly in a folder."""
    return isinstance(name, str) and bool(name) and name == Path(name).name and not name.startswith(".")


def _names(path: Path) -> list[str]:
    if not path.is_file() or path.is_symlink():
        return []
    try:
        names = read_json(path)
    except json.JSONDecodeError:
        return []
    return [name for name in names if _plain(name)] if isinstance(names, list) else []


def _holds(path: Path, value: Any) -> bool:
    """Whether a JSON file that is no link holds a value; a damaged file holds none."""
    if not path.is_file() or path.is_symlink():
        return False
    try:
        return read_json(path) == value
    except ValueError:
        return False


def _own_folder(path: Path, *, links: bool = True) -> None:
    if not links and path.is_symlink():
        raise ValueError(f"output_dir: {str(path)!r} is a link, which a run does not follow")
    path.mkdir(parents=True, exist_ok=True)


def _remove(path: Path) -> None:
    """Remove a file, a link itself, or a folder, whose links are not followed."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _flock(descriptor: int) -> None:
    try:
        import fcntl
    except ImportError:  # Windows
        return
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise
    except OSError:
        return  # a file system without locks
