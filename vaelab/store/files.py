"""The files of one folder, local or at any fsspec URL."""

import mmap
import os
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import numpy as np
import xxhash
from fsspec.core import url_to_fs
from fsspec.implementations.local import LocalFileSystem

from vaelab.core.paths import resolve

CONNECTIONS = 4
"""Number of files that are read at the same time from a remote folder."""


class Folder:
    """A folder whose files are read whole, in parts, or as mapped memory.

    Reading a file that does not exist raises a ValueError that names it.
    """

    url: str
    """The folder's location, as it was given."""
    local: bool
    """Whether the files are on this machine, so that they can be mapped into memory."""

    def __init__(self, url: str, **options: Any):
        """Args: ``url``, a local folder or any fsspec URL; ``options``, arguments for the URL's file system."""
        remote = "://" in str(url) or "::" in str(url)
        self._fs, self.path = url_to_fs(str(url), **options) if remote else (LocalFileSystem(), str(resolve(url)))
        self.url = str(url)
        self.local = isinstance(self._fs, LocalFileSystem)

    def sizes(self) -> dict[str, int | None]:
        """Return the size of every file in bytes, by name; None if the file system does not report a size."""
        self._fs.invalidate_cache(self.path)
        try:
            entries = self._fs.ls(self.path, detail=True)
        except (FileNotFoundError, NotADirectoryError) as error:
            raise ValueError(f"store: there is no folder {self.url!r}") from error
        return {entry["name"].rstrip("/").rsplit("/", 1)[-1]: entry.get("size") for entry in entries}

    def full_name(self, file: str) -> str:
        """Return a file's name together with its folder, for error messages."""
        return f"{self.url.rstrip('/')}/{file}"

    def read(self, file: str) -> bytes:
        """Read a file's content."""
        with self._missing_as_value_error(file):
            return self._fs.cat_file(f"{self.path}/{file}")

    def read_all(self, files: Iterable[str]) -> list[bytes]:
        """Read the contents of several files, in the order of ``files``."""
        with ThreadPoolExecutor(CONNECTIONS) as pool:
            return list(pool.map(self.read, files))

    def checksum(self, file: str, piece: int = 2**24) -> str:
        """Compute a file's XXH3 checksum (128 bits, hexadecimal), reading ``piece`` bytes at a time."""
        digest = xxhash.xxh3_128()
        with self._missing_as_value_error(file), self._fs.open(f"{self.path}/{file}", "rb") as source:
            while data := source.read(piece):
                digest.update(data)
        return digest.hexdigest()

    def read_into(self, view: np.ndarray, file: str, begin: int, head: int) -> tuple[bytes | None, int]:
        """Fill ``view``, an array of bytes, with the bytes of a file from offset ``begin``.

        Returns:
            The first ``head`` bytes of the file (None if the file is remote and they would take a second request), and
            the number of bytes that were read into ``view``.
        """
        with self._missing_as_value_error(file):
            if self.local:
                with open(f"{self.path}/{file}", "rb") as source:
                    first = source.read(head)
                    source.seek(begin)
                    return first, source.readinto(view)
            contiguous = begin == head
            data = memoryview(
                self._fs.cat_file(f"{self.path}/{file}", start=0 if contiguous else begin, end=begin + len(view))
            )
        first, data = (bytes(data[:head]), data[head:]) if contiguous else (None, data)
        view[: len(data)] = data
        return first, len(data)

    def memory_map(self, file: str) -> mmap.mmap | bytes:
        """Map the bytes of a local file into memory; an empty file gives empty bytes."""
        with self._missing_as_value_error(file), open(f"{self.path}/{file}", "rb") as source:
            size = os.fstat(source.fileno()).st_size
            # copy-on-write, since torch accepts only writable memory; nothing writes to it
            return mmap.mmap(source.fileno(), size, access=mmap.ACCESS_COPY) if size else b""

    @contextmanager
    def _missing_as_value_error(self, file: str) -> Iterator[None]:
        try:
            yield
        except (FileNotFoundError, NotADirectoryError) as error:
            raise ValueError(f"{self.full_name(file)} is missing") from error
