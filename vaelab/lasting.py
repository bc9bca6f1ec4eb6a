"""Files written by a thread of their own: in their order, summed as they go by, lasting on the disk."""

import ctypes
import hashlib
import os
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import xxhash

from vaelab.files import naming

PIECE = 2**19
"""Bytes written at a time. Linux caches larger ones in larger pages; these are read a tenth quicker, but on a
virtual machine they can be new to the host, and then cost five times as much. Smaller ones take the disk longer."""
SYNC_FILE_RANGE_WRITE = 2
_sync_file_range = getattr(ctypes.CDLL(None), "sync_file_range", None) if os.name == "posix" else None  # Linux has it


class Background:
    """A thread that does one job after the other, so that whoever hands them on need not wait.

    After a job that failed no other is done, and its error is raised by whatever is called next.
    """

    def __init__(self, most: int):
        """Args: ``most`` bytes that waiting jobs may hold; a job that holds more waits alone."""
        self._thread, self._most = ThreadPoolExecutor(1, "lasting"), most
        self._waiting: deque[tuple[Future, int]] = deque()
        self._held = 0
        self._error: BaseException | None = None

    def do(self, job: Callable[..., Any], *args: Any, holds: int = 0) -> None:
        """Have a job done after those before it; waits while these hold too much."""
        while self._waiting and (self._waiting[0][0].done() or self._held + holds > self._most):
            self._wait_for_first()
        self._raise()
        self._waiting.append((self._thread.submit(self._try, job, args), holds))
        self._held += holds

    def wait(self) -> None:
        """Return once every job is done."""
        while self._waiting:
            self._wait_for_first()
        self._raise()

    def close(self) -> BaseException | None:
        """Have done what waits, end the thread, and give the error of the job that failed."""
        self._thread.shutdown()
        return self._error

    def _wait_for_first(self) -> None:
        job, holds = self._waiting.popleft()
        self._held -= holds
        job.result()

    def _try(self, job: Callable[..., Any], args: tuple[Any, ...]) -> None:
        if self._error is None:
            try:
                job(*args)
            except BaseException as error:
                self._error = error

    def _raise(self) -> None:
        if self._error is not None:
            raise self._error


class SummedFile:
    """A new file, its checksum (XXH3 of 128 bits) taken as its bytes go by. Errors name it."""

    def __init__(self, path: Path):
        self.path, self._digest, self._bytes = path, xxhash.xxh3_128(), 0
        self._file = open(path, "w+b", buffering=0)  # noqa: SIM115

    @property
    def closed(self) -> bool:
        """Whether nothing can be written to it any more."""
        return self._file.closed

    def write(self, data: bytes | memoryview) -> None:
        """Append bytes, which the disk begins with at once."""
        begin, data = self._bytes, memoryview(data)
        self._bytes += len(data)
        with naming(self.path):
            for at in range(0, len(data), PIECE):
                rest = data[at : at + PIECE]
                self._digest.update(rest)
                while rest:
                    rest = rest[self._file.write(rest) :]
        send(self._file.fileno(), begin, len(data))

    def rewrite(self, head: bytes) -> None:
        """Put other bytes where the file begins, no more of them than there are."""
        with naming(self.path):
            os.pwrite(self._file.fileno(), head, 0)
            self._file.seek(0)
            self._digest = hashlib.file_digest(self._file, xxhash.xxh3_128)

    def finish(self) -> dict[str, Any]:
        """Make the bytes lasting; gives their number and their checksum."""
        with naming(self.path):
            os.fsync(self._file.fileno())
            self._file.close()
        return {"xxh128": self._digest.hexdigest(), "bytes": self._bytes}

    def close(self) -> None:
        """Leave the file as it is."""
        self._file.close()


def send(descriptor: int, begin: int, size: int) -> None:
    """Have the disk begin with a part of a file, where the system can be asked to: fsync then waits for less.

    It promises nothing, nor does it say what fails: fsync does both.
    """
    if size and _sync_file_range is not None:
        _sync_file_range(descriptor, ctypes.c_int64(begin), ctypes.c_int64(size), SYNC_FILE_RANGE_WRITE)


def sync_names(folder: Path) -> None:
    """Make the names in a folder lasting."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with naming(folder):
            os.fsync(descriptor)
    finally:
        os.close(descriptor)
