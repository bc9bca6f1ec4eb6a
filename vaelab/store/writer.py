"""Writing activations to disk so that a kill at any moment repeats and drops no row."""

import ctypes
import hashlib
import math
import os
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

from vaelab.core.io import locked, naming, write_json
from vaelab.core.paths import resolve
from vaelab.store.files import Folder
from vaelab.store.format import (
    INDEX,
    Layout,
    Spec,
    data_file,
    items_file,
    manifest_file,
    plain,
    read_index,
    read_shards,
    signed,
)

# lasting: Files written by a thread of their own: in their order, summed as they go by, lasting on the disk.


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


LOCK = ".lock"
WAITING = 2**26
"""Bytes at most that were added and wait to be written; or what was added at once, if that is more.
With four times as many, memory that is ever new cost more than it saved in waiting for the disk."""
REQUIRED = (("prompt", "image"), ("seed",), ("timestep",))
"""What every item must have, one of each."""
RESERVED = ("block", "position")
"""What an item must not have: reading adds them."""


def create(
    folder: str | Path,
    layout: Layout,
    *,
    precision: str = "float16",
    items_per_shard: int = 256,
    settings: dict[str, Any] | None = None,
) -> "Writer":
    """Begin a store in a local folder, or go on with the one that is there.

    What a killed collection had not finished is thrown away: ``writer.items_done`` says with which
    item to go on.

    Args:
        folder: of the store.
        layout: the blocks and the shape of their maps.
        precision: of the stored numbers: ``float16``, ``bfloat16`` or ``float32``.
        items_per_shard: captures that are read as one piece, and that a kill can lose beside what
            still waits to be written; 256 of 16x16x1280 in float16 are 168 MB. A multiple of what
            is computed together, so that a run which is gone on from computes the same batches.
        settings: what the items are made from, plain JSON: model, prompts, steps, ...

    Raises:
        ValueError: what is there was made with other settings, is damaged, or is being written by
            another process.
    """
    if "://" in str(folder) or "::" in str(folder):
        raise ValueError(f"folder: {folder!r} is not local; write the store locally, then copy its folder")
    return Writer(resolve(folder), Spec(dict(layout), precision, items_per_shard, settings or {}))


class Writer:
    """A store being written; a context manager, made by :func:`create`.

    Left without an exception, it writes the last shard and marks the store complete. Left with
    one, it leaves the store as a kill would: whole shards, to be gone on from.
    """

    items_done: int
    """Items that the store has taken: those found in it and those added since. The next item to
    add has this number."""
    complete: bool
    """Whether the store is finished, so that nothing can be added."""

    def __init__(self, folder: Path, spec: Spec):
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.spec = folder, spec
        self._lock = locked(folder / LOCK)
        if self._lock is None:
            raise ValueError(f"{folder} is being written by another process")
        try:
            self.items_done, self.complete = self._take_up()
        except BaseException:
            self._lock.close()
            raise
        self._shard = self.items_done // spec.items_per_shard
        self._items: list[str] = []
        self._files: dict[str, SummedFile] = {}
        self._begun: list[SummedFile] = []
        self._background = Background(WAITING)
        self._open = True

    def _take_up(self) -> tuple[int, bool]:
        for draft in self.folder.glob(".*.draft"):
            draft.unlink()
        there = Folder(str(self.folder))
        if not (self.folder / INDEX).exists():
            if any(self.folder.glob("shard-*")):
                raise ValueError(f"{there.name(INDEX)} is missing, though there are shards beside it")
            self._write_index(None)
            return 0, False
        spec, items = read_index(there)
        if differing := spec.differences(self.spec):
            raise ValueError(
                f"{there.url} was made with other settings ({', '.join(differing)}); delete it, or take another folder"
            )
        shards = read_shards(there, spec, items)
        if items is not None:
            return items, True
        if shards and shards[-1].items < spec.items_per_shard:
            # closing was cut off before the index was written; the manifest must be the first to go
            (self.folder / manifest_file(len(shards) - 1)).unlink()
            sync_names(self.folder)
            shards.pop()
        kept = {manifest_file(number) for number in range(len(shards))}.union(*(shard.files for shard in shards))
        for left in sorted(self.folder.glob("shard-*")):
            if left.name not in kept:
                left.unlink()
        return len(shards) * spec.items_per_shard, False

    def add(self, maps: Mapping[str, Tensor], items: Sequence[dict[str, Any]]) -> None:
        """Take the next captures, which are written in the background: what was given may be
        overwritten at once, and what could not be written is raised by a later call.

        Args:
            maps: every block's (n, positions..., width), of floating point, on any device.
            items: the n captures' ``prompt`` or ``image``, ``seed`` and ``timestep``, and what
                else is to be known of them: plain JSON.

        Raises:
            ValueError: a block too many or too few, a wrong shape, an item that lacks something,
                a number that is not finite or that the precision cannot hold. Nothing is stored then.
            OSError: naming the file that this or an earlier call could not write; the store is
                then as a kill would leave it, and takes nothing more.
        """
        if self.complete or not self._open:
            raise ValueError(f"{self.folder} is {'complete' if self.complete else 'closed'}: nothing can be added")
        if set(maps) != set(self.spec.layout):
            raise ValueError(f"maps: blocks {sorted(maps)} given, the layout has {sorted(self.spec.layout)}")
        texts = [self._checked(number, item) for number, item in enumerate(items, self.items_done)]
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
        """Write the last shard and mark the store complete; all is on the disk when this returns.

        Raises:
            OSError: naming the file that could not be written.
        """
        if not self._open:
            return
        try:
            if self._items:
                self._seal()
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
    def _checked(number: int, item: dict[str, Any]) -> str:
        for names in REQUIRED:
            if not any(name in item for name in names):
                raise ValueError(f"items: item {number} has no {' or '.join(map(repr, names))}: {item!r}")
        for name in RESERVED:
            if name in item:
                raise ValueError(f"items: item {number} has {name!r}, which is what reading adds")
        return plain(f"items: item {number}", item)

    def _rows(self, block: str, value: Tensor, items: int) -> Tensor:
        """The rows as they are stored, (items * positions, width) on the CPU."""
        shape = self.spec.layout[block]
        expected = (items, *shape.positions, shape.width)
        if tuple(value.shape) != expected or not value.is_floating_point():
            raise ValueError(f"maps: {block!r} is {tuple(value.shape)} {value.dtype}, expected {expected} of floats")
        stored = rowwise(value.detach().to(self.spec.dtype))
        if items and not finite(stored):
            self._refuse(block, value.detach(), stored.reshape(items, -1))
        stored = stored.cpu()
        return stored.clone() if stored.data_ptr() == value.data_ptr() else stored  # never the caller's memory

    def _refuse(self, block: str, value: Tensor, stored: Tensor) -> None:
        bad = int((~stored.isfinite()).any(1).nonzero()[0])
        where = f"maps: {block!r} of item {self.items_done + bad}"
        if value[bad].isfinite().all():
            largest, most = float(value[bad].abs().max()), torch.finfo(self.spec.dtype).max
            raise ValueError(f"{where} has {largest:.6g}, beyond the {most:.6g} of {self.spec.precision}: "
                             "take bfloat16 or float32")  # fmt: skip
        raise ValueError(f"{where} has NaN or infinite numbers")

    def _write(self, rows: dict[str, Tensor], texts: list[str], begin: int) -> int:
        """Write from item ``begin`` on, to the end of the shard at most; gives how many."""
        full = self.spec.items_per_shard
        taken = texts[begin : begin + full - len(self._items)]
        for block, value in rows.items():
            if not self._items:
                self._files[block] = self._begin(block)
            places = self.spec.layout[block].count
            part = value[begin * places : (begin + len(taken)) * places]
            data = memoryview(part.view(torch.uint8).numpy()).cast("B")
            self._background.do(self._files[block].write, data, holds=len(data))
        self._items += taken
        if len(self._items) == full:
            self._seal()
        return len(taken)

    def _begin(self, block: str) -> SummedFile:
        file = SummedFile(self.folder / data_file(self._shard, block))
        self._begun = [other for other in self._begun if not other.closed] + [file]
        self._background.do(file.write, self.spec.header(self._shard, block, self.spec.items_per_shard))
        return file

    def _seal(self) -> None:
        """Have the shard made lasting and its manifest written, after all that was added before."""
        self._background.do(_seal, self.folder, self.spec, self._shard, self._files, self._items)
        self._shard, self._items, self._files = self._shard + 1, [], {}

    def _abandon(self, error: BaseException | None) -> None:
        if not self._open:
            return
        self._open = False
        failed = self._background.close()
        if error is not None and failed not in (None, error):
            error.add_note(f"besides, what was added before could not be written: {failed}")
        for file in self._begun:
            file.close()
        self._lock.close()

    def _write_index(self, items: int | None) -> None:
        write_json(self.folder / INDEX, signed({**self.spec.record(), "items": items}))
        sync_names(self.folder)


def rowwise(value: Tensor) -> Tensor:
    """Maps (n, positions..., width) as their vectors (n * positions, width), contiguous."""
    if value.device.type != "cpu" or value.is_contiguous():
        return value.reshape(-1, value.shape[-1]).contiguous()
    # with the channels first: torch turns a matrix over in blocks, but anything larger number by number
    out = torch.empty(len(value), value.shape[1:-1].numel(), value.shape[-1], dtype=value.dtype)
    for room, item in zip(out, value, strict=True):
        room.copy_(item.reshape(room.shape))
    return out.flatten(0, 1)


def finite(rows: Tensor) -> bool:
    """Whether some numbers are finite, all of them; much quicker than ``rows.isfinite().all()``."""
    if rows.device.type != "cpu":
        return bool(torch.stack(rows.aminmax()).isfinite().all())  # a NaN comes out as both
    # by their bits, in numpy: threads of torch's, once woken, keep the core for a while that the writing needs
    whole = {2: torch.int16, 4: torch.int32}[rows.itemsize]
    bits, infinite = rows.view(whole).numpy(), int(torch.tensor(math.inf, dtype=rows.dtype).view(whole))
    negative = 2 ** (8 * rows.itemsize - 1) + infinite
    return bool(bits.max() < infinite and bits.view(f"u{rows.itemsize}").max() < negative)


def _seal(folder: Path, spec: Spec, shard: int, data: dict[str, SummedFile], items: list[str]) -> None:
    """Make a shard's files lasting, then let the shard exist."""
    with closing(SummedFile(folder / items_file(shard))) as listed:
        listed.write(b"[\n" + ",\n".join(items).encode() + b"\n]\n")
        if len(items) < spec.items_per_shard:
            for block, file in data.items():
                file.rewrite(spec.header(shard, block, len(items)))
        told = {file.path.name: file.finish() for file in (*data.values(), listed)}
    sync_names(folder)
    manifest = {"store": spec.identity, "shard": shard, "items": len(items), "files": told}
    write_json(folder / manifest_file(shard), signed(manifest))
    sync_names(folder)
