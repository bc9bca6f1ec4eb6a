"""Writing activations to disk so that an interrupted collection can be resumed without repeating or losing a row.

A *capture* (or item) is the maps of all blocks for one picture or prompt at one timestep, with its metadata. A *shard*
is a fixed number of consecutive captures: one data file per block and one file of metadata. A shard's *manifest* lists
the sizes and checksums of these files; it is written after all of them are on the disk, and only then does the shard
exist. See :mod:`vaelab.store.format`.

:class:`Writer` takes captures and hands their bytes to a :class:`BackgroundThread`, which writes them to
:class:`ChecksummedFile` objects.
"""

import hashlib
import math
import os
import re
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
import xxhash
from torch import Tensor

from vaelab.core.finite import all_finite
from vaelab.core.io import DRAFT, locked, naming, write_json
from vaelab.core.paths import resolve
from vaelab.store.files import Folder
from vaelab.store.format import (
    INDEX,
    Layout,
    Shard,
    Spec,
    data_file,
    items_file,
    manifest_file,
    read_index,
    read_manifests,
    to_json,
    with_checksum,
)

LOCK = ".lock"
MAX_QUEUED_BYTES = 2**26
"""Largest number of bytes in the queue of writes; a batch that is larger is queued alone. A limit four times as large
was slower, because it uses more fresh memory and saves little waiting."""
PIECE = 2**19
"""Bytes of one write call. Linux caches larger writes in larger pages, which on a virtual machine can be new to the
host and then cost five times as much; smaller ones take the disk longer."""
REQUIRED = (("prompt", "image"), ("seed",), ("timestep",))
"""Every item must have one key of each group."""
RESERVED = ("block", "position")
"""Keys that an item must not have, because reading adds them."""


def create(
    folder: str | Path,
    layout: Layout,
    *,
    precision: str = "float16",
    items_per_shard: int = 256,
    settings: dict[str, Any] | None = None,
) -> "Writer":
    """Start a store in a local folder, or resume the store that is there.

    A store is resumed if its layout, precision and settings are the same. The unfinished shard of an interrupted
    collection is removed, and ``writer.items_done`` is the index of the next item to add. A complete store is opened
    without changing any of its files.

    Args:
        folder: the store's folder; it is created if it does not exist.
        layout: the blocks and the shapes of their maps.
        precision: the precision of the stored values: ``float16``, ``bfloat16`` or ``float32``.
        items_per_shard: captures per shard. If the process is killed, up to this many captures are lost, besides
            those still queued. 256 captures of 16x16x1280 in float16 are 168 MB. A resumed store keeps its own
            shard size.
        settings: everything that determines the stored values, as plain JSON: model, prompts, steps, seed, ...

    Raises:
        ValueError: the folder holds something other than a store, a store with other settings (the error lists the
            differences) or a damaged store; or another process is writing to it.
    """
    if "://" in str(folder) or "::" in str(folder):
        raise ValueError(f"folder: {folder!r} is not local; write the store to a local folder, then copy the folder")
    return Writer(resolve(folder), Spec(dict(layout), precision, items_per_shard, settings or {}))


class Writer:
    """A store that is being written; a context manager, made by :func:`create`.

    On exit without an exception the last shard is written and the store is marked as complete. On exit with an
    exception the store keeps only its finished shards, and :func:`create` resumes after them.
    """

    folder: Path
    """The store's folder."""
    spec: Spec
    """The store's layout, precision, settings and shard size."""
    items_done: int
    """Number of items in the store, including queued ones; also the index of the next item."""
    complete: bool
    """Whether the store is complete, so that nothing can be added."""

    def __init__(self, folder: Path, spec: Spec):
        self.folder, self.spec = folder, spec
        self._lock = None
        self.items_done, self.complete = 0, False
        if not self._open_complete():
            self._lock = self._take_lock()
            try:
                self._resume()
            except BaseException:
                self._lock.close()
                raise
        self._shard = self.items_done // self.spec.items_per_shard
        self._items: list[str] = []
        self._files: dict[str, ChecksummedFile] = {}
        self._unfinished: list[ChecksummedFile] = []
        self._background = BackgroundThread(MAX_QUEUED_BYTES)
        self._open = True

    def _open_complete(self) -> bool:
        """Open a complete store without writing anything; False if the folder holds no complete store."""
        items = self._read_index()
        if items is None:
            return False
        read_manifests(Folder(str(self.folder)), self.spec, items)
        self.items_done, self.complete = items, True
        return True

    def _read_index(self) -> int | None:
        """Read the number of items of a complete store; None if the store is not complete or not started.

        Raises:
            ValueError: the folder holds something other than a store, or a store with other settings.
        """
        if os.path.lexists(self.folder) and not self.folder.is_dir():
            raise ValueError(f"folder: {str(self.folder)!r} is a file; expected a folder")
        if not os.path.lexists(self.folder / INDEX):
            foreign = sorted(path.name for path in self.folder.glob("*") if not _precedes_index(path.name))
            if foreign:
                raise ValueError(
                    f"folder: {str(self.folder)!r} holds {foreign[0]!r} and no {INDEX}, so it is not a store; expected "
                    "a new or empty folder, or that of a store"
                )
            return None
        spec, items = read_index(Folder(str(self.folder)))
        if differing := spec.differences(self.spec):
            raise ValueError(
                f"{self.folder} was made with other settings ({', '.join(differing)}); delete it, or give another "
                "folder"
            )
        self.spec = spec  # keeps the shard size of the existing store
        return items

    def _take_lock(self) -> Any:
        self.folder.mkdir(parents=True, exist_ok=True)
        lock = locked(self.folder / LOCK)
        if lock is None:
            raise ValueError(f"{self.folder} is being written by another process")
        return lock

    def _resume(self) -> None:
        """Remove the unfinished shard and count the items of the others, with the lock held."""
        if self._open_complete():  # another process has just completed it
            return
        if not os.path.lexists(self.folder / INDEX):
            self._write_index(None)
            return
        shards = read_manifests(Folder(str(self.folder)), self.spec, None)
        if shards and shards[-1].items < self.spec.items_per_shard:
            # closing was interrupted before the index was written; the manifest must be removed first
            (self.folder / manifest_file(len(shards) - 1)).unlink()
            sync_folder(self.folder)
            shards.pop()
        self._remove_unfinished(shards)
        self.items_done = len(shards) * self.spec.items_per_shard

    def _remove_unfinished(self, shards: Sequence[Shard]) -> None:
        """Remove only those files of this store's layout that belong to no finished shard."""
        blocks = {data_file(0, block).split(".", 1)[1] for block in self.spec.layout}
        for path in sorted(self.folder.glob("shard-*")):
            match = re.fullmatch(r"shard-(\d{5,})\.(.+)", path.name)
            if match and int(match[1]) >= len(shards) and match[2] in {"json", "items.json", *blocks}:
                path.unlink()

    def add(self, maps: Mapping[str, Tensor], items: Sequence[dict[str, Any]]) -> None:
        """Add the next n captures. They are written in the background; the tensors may be reused as soon as the call
        returns.

        Args:
            maps: a floating-point tensor (n, positions..., width) for every block, on any device.
            items: the metadata of each capture, as plain JSON: ``prompt`` or ``image``, ``seed``, ``timestep``, and
                any further entries.

        Raises:
            ValueError: a block is missing or unknown, a shape is wrong, an item lacks a required key or has a
                reserved one, or a value is not finite or does not fit the precision. In these cases none of the n
                captures is stored.
            OSError: this or an earlier call could not write a file, which the error names. The store then keeps its
                finished shards and accepts no more captures.
        """
        if self.complete or not self._open:
            raise ValueError(f"{self.folder} is {'complete' if self.complete else 'closed'}: nothing can be added")
        if set(maps) != set(self.spec.layout):
            raise ValueError(f"maps: expected the blocks {sorted(self.spec.layout)}, got {sorted(maps)}")
        texts = [self._item_text(number, item) for number, item in enumerate(items, self.items_done)]
        rows = {block: self._rows(block, maps[block], len(items)) for block in self.spec.layout}
        begin = 0
        try:
            while begin < len(texts):
                begin += self._write(rows, texts, begin)
        except BaseException as error:
            self._abandon(error)
            raise
        self.items_done += len(texts)

    def close(self) -> None:
        """Write the last shard and mark the store as complete. When this returns, everything is on the disk.

        Raises:
            OSError: a file could not be written; the error names it.
        """
        if not self._open:
            return
        try:
            if self._items:
                self._end_shard()
            self._background.wait()
            if not self.complete:
                self._write_index(self.items_done)
                self.complete = True
        finally:
            self._abandon(None)

    def __enter__(self) -> "Writer":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self.close()
        else:
            self._abandon(error)

    @staticmethod
    def _item_text(number: int, item: dict[str, Any]) -> str:
        for names in REQUIRED:
            if not any(name in item for name in names):
                raise ValueError(f"items: item {number} has no {' or '.join(map(repr, names))}: {item!r}")
        for name in RESERVED:
            if name in item:
                raise ValueError(f"items: item {number} has the reserved key {name!r}, which reading adds")
        return to_json(f"items: item {number}", item)

    def _rows(self, block: str, value: Tensor, items: int) -> Tensor:
        """Convert a block's maps to the rows that are stored, (items * positions, width) on the CPU."""
        shape = self.spec.layout[block]
        expected = (items, *shape.positions, shape.width)
        if tuple(value.shape) != expected or not value.is_floating_point():
            raise ValueError(f"maps: {block!r} is {tuple(value.shape)} {value.dtype}, expected {expected} of floats")
        stored = flatten_positions(value.detach().to(self.spec.dtype))
        if items and not bits_are_finite(stored):
            raise self._not_finite(block, value.detach(), stored.reshape(items, -1))
        stored = stored.cpu()
        # a copy, so that the caller may reuse its tensor
        return stored.clone() if stored.data_ptr() == value.data_ptr() else stored

    def _not_finite(self, block: str, value: Tensor, stored: Tensor) -> ValueError:
        bad = int((~stored.isfinite()).any(1).nonzero()[0])
        where = f"maps: {block!r} of item {self.items_done + bad}"
        if not value[bad].isfinite().all():
            return ValueError(f"{where} has NaN or infinite numbers")
        largest, limit = float(value[bad].abs().max()), torch.finfo(self.spec.dtype).max
        return ValueError(
            f"{where} has {largest:.6g}, beyond the {limit:.6g} of {self.spec.precision}: use bfloat16 or float32"
        )

    def _write(self, rows: dict[str, Tensor], texts: list[str], begin: int) -> int:
        """Write items from index ``begin`` on, at most up to the end of the shard; return how many were written."""
        full = self.spec.items_per_shard
        taken = texts[begin : begin + full - len(self._items)]
        for block, value in rows.items():
            if not self._items:
                self._files[block] = self._new_file(block)
            places = self.spec.layout[block].count
            part = value[begin * places : (begin + len(taken)) * places]
            data = memoryview(part.view(torch.uint8).numpy()).cast("B")
            self._background.submit(self._files[block].write, data, size=len(data))
        self._items += taken
        if len(self._items) == full:
            self._end_shard()
        return len(taken)

    def _new_file(self, block: str) -> "ChecksummedFile":
        file = ChecksummedFile(self.folder / data_file(self._shard, block))
        self._unfinished = [other for other in self._unfinished if not other.closed] + [file]
        self._background.submit(file.write, self.spec.header(self._shard, block, self.spec.items_per_shard))
        return file

    def _end_shard(self) -> None:
        """Queue the end of the shard: its files are finished and its manifest is written after all queued writes."""
        self._background.submit(_finish_shard, self.folder, self.spec, self._shard, self._files, self._items)
        self._shard, self._items, self._files = self._shard + 1, [], {}

    def _abandon(self, error: BaseException | None) -> None:
        if not self._open:
            return
        self._open = False
        failed = self._background.close()
        if error is not None and failed not in (None, error):
            error.add_note(f"In addition, an earlier batch could not be written: {failed}")
        for file in self._unfinished:
            file.close()
        if self._lock is not None:
            self._lock.close()

    def _write_index(self, items: int | None) -> None:
        write_json(self.folder / INDEX, with_checksum({**self.spec.record(), "items": items}))
        sync_folder(self.folder)


def _precedes_index(name: str) -> bool:
    """Whether a writer that was interrupted before it wrote its index may have left a file or folder of this name."""
    return name == LOCK or name.startswith(DRAFT)


def _finish_shard(folder: Path, spec: Spec, shard: int, data: dict[str, "ChecksummedFile"], items: list[str]) -> None:
    """Sync a shard's files to the disk, then write its manifest, which makes the shard part of the store."""
    with closing(ChecksummedFile(folder / items_file(shard))) as items_list:
        items_list.write(b"[\n" + ",\n".join(items).encode() + b"\n]\n")
        if len(items) < spec.items_per_shard:
            for block, file in data.items():
                file.rewrite(spec.header(shard, block, len(items)))
        records = {file.path.name: file.finish() for file in (*data.values(), items_list)}
    sync_folder(folder)
    manifest = {"store": spec.identity, "shard": shard, "items": len(items), "files": records}
    write_json(folder / manifest_file(shard), with_checksum(manifest))
    sync_folder(folder)


class BackgroundThread:
    """A thread that runs queued jobs one after the other, so that the caller need not wait for them.

    If a job fails, no further job runs: :meth:`submit` and :meth:`wait` raise its error, :meth:`close` returns it.
    """

    def __init__(self, max_bytes: int):
        """Args: ``max_bytes``, the bytes that queued jobs may keep in memory; a larger job is queued alone."""
        self._thread, self._max_bytes = ThreadPoolExecutor(1, "vaelab-store"), max_bytes
        self._waiting: deque[tuple[Future, int]] = deque()
        self._bytes = 0
        self._error: BaseException | None = None

    def submit(self, job: Callable[..., Any], *args: Any, size: int = 0) -> None:
        """Queue ``job(*args)``, which keeps ``size`` bytes in memory.

        Blocks while the queued jobs and this one together keep more than ``max_bytes`` in memory.
        """
        while self._waiting and (self._waiting[0][0].done() or self._bytes + size > self._max_bytes):
            self._wait_for_first()
        self._raise()
        self._waiting.append((self._thread.submit(self._run, job, args), size))
        self._bytes += size

    def wait(self) -> None:
        """Wait until every job has run."""
        while self._waiting:
            self._wait_for_first()
        self._raise()

    def close(self) -> BaseException | None:
        """Run the queued jobs, end the thread, and return the error of the job that failed; None if none failed."""
        self._thread.shutdown()
        return self._error

    def _wait_for_first(self) -> None:
        job, size = self._waiting.popleft()
        self._bytes -= size
        job.result()

    def _run(self, job: Callable[..., Any], args: tuple[Any, ...]) -> None:
        if self._error is None:
            try:
                job(*args)
            except BaseException as error:
                self._error = error

    def _raise(self) -> None:
        if self._error is not None:
            raise self._error


class ChecksummedFile:
    """A new file whose checksum (XXH3, 128 bits) is computed while it is written. Errors name the file."""

    def __init__(self, path: Path):
        """Create the file ``path``; raises FileExistsError if something of that name exists."""
        self.path, self._digest, self._bytes = path, xxhash.xxh3_128(), 0
        self._file = open(path, "x+b", buffering=0)  # noqa: SIM115

    @property
    def closed(self) -> bool:
        """Whether the file is closed."""
        return self._file.closed

    def write(self, data: bytes | memoryview) -> None:
        """Append bytes."""
        data = memoryview(data)
        self._bytes += len(data)
        with naming(self.path):
            for at in range(0, len(data), PIECE):
                rest = data[at : at + PIECE]
                self._digest.update(rest)
                while rest:
                    rest = rest[self._file.write(rest) :]

    def rewrite(self, head: bytes) -> None:
        """Overwrite the beginning of the file with ``head``, which is not longer than the file."""
        with naming(self.path):
            os.pwrite(self._file.fileno(), head, 0)
            self._file.seek(0)
            self._digest = hashlib.file_digest(self._file, xxhash.xxh3_128)

    def finish(self) -> dict[str, Any]:
        """Sync the file to the disk, close it, and return its manifest entry."""
        with naming(self.path):
            os.fsync(self._file.fileno())
            self._file.close()
        return {"xxh128": self._digest.hexdigest(), "bytes": self._bytes}

    def close(self) -> None:
        """Close the file without syncing it."""
        self._file.close()


def sync_folder(folder: Path) -> None:
    """Sync a folder's entries (names) to the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with naming(folder):
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


def flatten_positions(maps: Tensor) -> Tensor:
    """Flatten maps (n, positions..., width) to contiguous rows (n * positions, width)."""
    if maps.device.type != "cpu" or maps.is_contiguous():
        return maps.reshape(-1, maps.shape[-1]).contiguous()
    # one item at a time: torch transposes a matrix in blocks, but a larger tensor value by value
    out = torch.empty(len(maps), maps.shape[1:-1].numel(), maps.shape[-1], dtype=maps.dtype)
    for target, item in zip(out, maps, strict=True):
        target.copy_(item.reshape(target.shape))
    return out.flatten(0, 1)


def bits_are_finite(rows: Tensor) -> bool:
    """Whether all values of a non-empty tensor are finite, by their bits if it is on the CPU."""
    if rows.device.type != "cpu":
        return all_finite(rows)
    # compare the bits in numpy: torch's threads, once started, occupy the core that the background thread needs
    integer = {2: torch.int16, 4: torch.int32}[rows.itemsize]
    bits, infinity = rows.view(integer).numpy(), int(torch.tensor(math.inf, dtype=rows.dtype).view(integer))
    negative_infinity = 2 ** (8 * rows.itemsize - 1) + infinity
    return bool(bits.max() < infinity and bits.view(f"u{rows.itemsize}").max() < negative_infinity)
