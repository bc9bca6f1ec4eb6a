"""Files of one folder, wherever it is: a local one, or any fsspec URL."""

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
"""Files read at a time from a remote folder."""
READ_AHEAD = 2**17
"""Bytes that Linux reads ahead at one request at least."""


class Folder:
    """A folder whose files are read: whole, in parts, or as memory.

    A file that is not there is a ValueError that names it.
    """

    url: str
    """Where it is, as it was asked for."""
    local: bool
    """Whether its files are this machine's, and can be mapped."""

    def __init__(self, url: str, **options: Any):
        """Args: ``url``, a local folder or any fsspec URL; ``options``, for its file system."""
        remote = "://" in str(url) or "::" in str(url)
        self._fs, self.path = url_to_fs(str(url), **options) if remote else (LocalFileSystem(), str(resolve(url)))
        self.url = str(url)
        self.local = isinstance(self._fs, LocalFileSystem)

    def sizes(self) -> dict[str, int | None]:
        """Bytes of every file, by name; None where the file system does not tell."""
        self._fs.invalidate_cache(self.path)
        try:
            listed = self._fs.ls(self.path, detail=True)
        except (FileNotFoundError, NotADirectoryError) as error:
            raise ValueError(f"store: there is no folder {self.url!r}") from error
        return {entry["name"].rstrip("/").rsplit("/", 1)[-1]: entry.get("size") for entry in listed}

    def name(self, file: str) -> str:
        """What a file is called in an error."""
        return f"{self.url.rstrip('/')}/{file}"

    def read(self, file: str) -> bytes:
        """A whole file."""
        with self._named(file):
            return self._fs.cat_file(f"{self.path}/{file}")

    def read_each(self, files: Iterable[str]) -> list[bytes]:
        """Several whole files, in their order."""
        with ThreadPoolExecutor(CONNECTIONS) as pool:
            return list(pool.map(self.read, files))

    def digest(self, file: str, piece: int = 2**24) -> str:
        """The checksum of a file, XXH3 of 128 bits, read in pieces."""
        digest = xxhash.xxh3_128()
        with self._named(file), self._fs.open(f"{self.path}/{file}", "rb") as source:
            while data := source.read(piece):
                digest.update(data)
        return digest.hexdigest()

    def read_into(self, view: np.ndarray, file: str, begin: int, head: int) -> tuple[bytes | None, int]:
        """Fill ``view``, of bytes, with what lies in a file from ``begin`` on.

        Returns:
            The first ``head`` bytes of the file, or None where they would take another request;
            and how many bytes there were for the view.
        """
        with self._named(file):
            if self.local:
                with open(f"{self.path}/{file}", "rb") as source:
                    first = source.read(head)
                    source.seek(begin)
                    return first, source.readinto(view)
            whole = begin == head
            data = memoryview(self._fs.cat_file(f"{self.path}/{file}", start=0 if whole else begin,
                                                end=begin + len(view)))  # fmt: skip
        first, data = (bytes(data[:head]), data[head:]) if whole else (None, data)
        view[: len(data)] = data
        return first, len(data)

    def mapped(self, file: str) -> mmap.mmap | bytes:
        """A file of a local folder as memory, which is asked of the disk at once; one without bytes as none."""
        with self._named(file), open(f"{self.path}/{file}", "rb") as source:
            size = os.fstat(source.fileno()).st_size
            if not size:
                return b""
            if hasattr(os, "posix_fadvise"):
                for begin in range(0, size, READ_AHEAD):
                    os.posix_fadvise(source.fileno(), begin, READ_AHEAD, os.POSIX_FADV_WILLNEED)
            # a private copy of what is written to, which nothing does, is what torch calls writable
            return mmap.mmap(source.fileno(), size, access=mmap.ACCESS_COPY)

    @contextmanager
    def _named(self, file: str) -> Iterator[None]:
        try:
            yield
        except (FileNotFoundError, NotADirectoryError) as error:
            raise ValueError(f"{self.name(file)} is missing") from error
