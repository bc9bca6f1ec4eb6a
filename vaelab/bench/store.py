"""Speed of the activation store and of other file formats: writing the same maps, and reading their vectors shuffled.

- ``webdataset``: a tar of pickled tensors, as sdxl-unbox collects them. It is read through a buffer of samples; each
  time a fifth of the buffer is used up, it is refilled and reshuffled, as in sdxl-unbox's iterator (which drops the
  rest of the buffer at the end; here every vector is read). The maps are written as they are.
- ``arrow``: rows of float16 in Arrow, written by the ``datasets`` library one table at a time, which is by far its
  fastest way. The store's own function turns the maps into rows.

All systems get the maps as a model produces them: a few at a time, in fresh memory, channels first. A write ends when
the file and its name are synced to the disk. The store syncs every shard; it alone refuses values that are not finite,
computes checksums and can be resumed. A read yields every vector once, shuffled, in float32 batches. The files are then
in the page cache, so that the software is timed and not the disk.
"""

import io
import itertools
import json
import os
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from vaelab import store
from vaelab.core.validate import at_least, one_of
from vaelab.store.format import BlockShape
from vaelab.store.writer import flatten_positions, sync_folder

BLOCK = "down.2.1"
SIDE = 16
"""Side of the maps, in positions."""
TOGETHER = 10
"""Number of maps that a system gets at a time, and number of maps in one sample of the tar."""
SAMPLES_IN_BUFFER = 25
"""Number of samples in the buffer of the tar's reader: 64,000 vectors are shuffled together, as in the store's
reader."""


def store_seconds(
    folder: str | Path | None = None,
    *,
    systems: Sequence[str] = ("store", "webdataset", "arrow"),
    vectors: int = 200_000,
    width: int = 1280,
    batch_size: int = 4096,
    rounds: int = 5,
    warmup: int = 1,
    seed: int = 0,
) -> pd.DataFrame:
    """Time the systems in turns, writing and reading the same vectors.

    Args:
        folder: the folder to write in; None means the system's folder for temporary files.
        systems: the names of the systems to time.
        vectors: the number of vectors, rounded up to whole maps of 16x16.
        width: the number of values per vector.
        batch_size: the number of vectors per batch.
        rounds: how often each system is timed.
        warmup: the number of rounds before these, which do not count.
        seed: determines the vectors and the order of the systems in each round.

    Returns:
        One row per round and system: ``round``, ``system``, ``write`` and ``read`` in seconds, and ``vectors``.

    Raises:
        ImportError: ``webdataset`` is among the systems and is not installed.
        ValueError: a system is unknown, or a number is below 1.
        RuntimeError: a system did not read back as many vectors as were written.
    """
    for name, value in (("vectors", vectors), ("width", width), ("batch_size", batch_size), ("rounds", rounds)):
        at_least(name, value, 1)
    for system in systems:
        one_of("systems", system, SYSTEMS)
    items = -(-vectors // SIDE**2)
    generator = torch.Generator().manual_seed(seed)
    parts = [
        torch.randn(min(TOGETHER, items - done), width, SIDE, SIDE, generator=generator).half()
        for done in range(0, items, TOGETHER)
    ]
    rng = np.random.default_rng(seed)
    rows = []
    for number in range(warmup + rounds):
        for system in map(str, rng.permutation(list(systems))):
            write, read = SYSTEMS[system]
            with tempfile.TemporaryDirectory(dir=folder) as place:
                os.sync()  # so that the data of other systems is not written while this one is timed
                began = time.perf_counter()
                write(Path(place), parts)
                written = time.perf_counter()
                count = sum(map(len, read(Path(place), batch_size, number)))
                finished = time.perf_counter()
            if count != items * SIDE**2:
                raise RuntimeError(f"systems: {system} read back {count} of {items * SIDE**2} vectors")
            rows.append((number - warmup, system, written - began, finished - written, count))
    table = pd.DataFrame(rows, columns=["round", "system", "write", "read", "vectors"])
    return table[table["round"] >= 0].reset_index(drop=True)


def write_store(folder: Path, parts: Sequence[Tensor]) -> None:
    """Write the parts of the maps, each (N, width, side, side), to a store."""
    layout = {BLOCK: BlockShape((SIDE, SIDE), parts[0].shape[1])}
    with store.create(folder, layout, items_per_shard=10 * TOGETHER) as writer:
        for part in parts:
            numbers = range(writer.items_done, writer.items_done + len(part))
            writer.add({BLOCK: part.permute(0, 2, 3, 1)}, [_item(number) for number in numbers])


def read_store(folder: Path, batch_size: int, seed: int) -> Iterator[Tensor]:
    """Read the vectors that :func:`write_store` wrote in shuffled batches (batch_size, width) float32."""
    return store.open(folder).batches(BLOCK, batch_size, seed, buffer_rows=SAMPLES_IN_BUFFER * TOGETHER * SIDE**2)


def write_webdataset(folder: Path, parts: Sequence[Tensor]) -> None:
    """Write each part as a pickled sample (maps, steps, width, side, side) to a tar."""
    import webdataset

    with open(folder / "block.tar", "wb") as file:
        with webdataset.TarWriter(file) as tar:
            for number, part in enumerate(parts):
                pickled = io.BytesIO()
                torch.save(part[:, None], pickled)
                metadata = json.dumps([_item(number * TOGETHER + place) for place in range(len(part))])
                sample = {"gen_args.json": metadata.encode(), "output.pth": pickled.getvalue()}
                tar.write({"__key__": f"sample_{number}", **sample})
        _sync(folder / "block.tar")


def read_webdataset(folder: Path, batch_size: int, seed: int) -> Iterator[Tensor]:
    """Read the vectors that :func:`write_webdataset` wrote in shuffled batches (batch_size, width) float32."""
    import webdataset

    samples = iter(webdataset.WebDataset(str(folder / "block.tar"), shardshuffle=False).decode("torch"))
    generator = torch.Generator().manual_seed(seed)
    buffer, missing, low = torch.empty(0), SAMPLES_IN_BUFFER, 1
    while True:
        if len(buffer) < low:
            fresh = [sample["output.pth"] for sample in itertools.islice(samples, missing)]
            rows = [maps.permute(0, 1, 3, 4, 2).reshape(-1, maps.shape[2]) for maps in fresh]
            if rows:
                buffer = torch.cat([*([buffer.clone()] if len(buffer) else []), *rows])
                buffer = buffer[torch.randperm(len(buffer), generator=generator)]
            low = SAMPLES_IN_BUFFER * TOGETHER * SIDE**2 * 4 // 5 if len(fresh) == missing else 0
            missing = SAMPLES_IN_BUFFER // 5
        if not len(buffer):
            return
        yield buffer[:batch_size].float()
        buffer = buffer[batch_size:]


def write_arrow(folder: Path, parts: Sequence[Tensor]) -> None:
    """Write the vectors as the rows of an Arrow file."""
    import datasets
    import pyarrow as pa
    from datasets.arrow_writer import ArrowWriter

    width = parts[0].shape[1]
    schema = pa.schema([("vector", pa.list_(pa.float16(), width))])
    path = folder / "block.arrow"
    with ArrowWriter(path=str(path), features=datasets.Features.from_arrow_schema(schema)) as writer:
        for part in parts:
            numbers = pa.array(flatten_positions(part.permute(0, 2, 3, 1)).reshape(-1).numpy())
            rows = pa.FixedSizeListArray.from_arrays(numbers, width)
            writer.write_table(pa.Table.from_arrays([rows], schema=schema))
        writer.finalize()
    _sync(path)


def read_arrow(folder: Path, batch_size: int, seed: int) -> Iterator[Tensor]:
    """Read the vectors that :func:`write_arrow` wrote in shuffled batches (batch_size, width) float32."""
    import datasets

    rows = datasets.Dataset.from_file(str(folder / "block.arrow")).with_format("torch")
    order = np.random.default_rng(seed).permutation(len(rows))
    for begin in range(0, len(order), batch_size):
        yield rows[order[begin : begin + batch_size]]["vector"].float()


SYSTEMS = {
    "store": (write_store, read_store),
    "webdataset": (write_webdataset, read_webdataset),
    "arrow": (write_arrow, read_arrow),
}


def _item(number: int) -> dict[str, object]:
    return {"prompt": f"picture {number}", "seed": number, "timestep": 999}


def _sync(path: Path) -> None:
    with open(path, "rb") as file:
        os.fsync(file.fileno())
    sync_folder(path.parent)


def speed_ratios(table: pd.DataFrame) -> dict[str, float]:
    """Compare the medians over rounds.

    Returns:
        ``store.shuffled_vectors_per_second``, and for each other system how many times as fast the store reads
        (``store.read_vs_<system>``) and writes (``store.write_vs_<system>``).
    """
    medians = table.groupby("system")[["write", "read"]].median()
    metrics = {"store.shuffled_vectors_per_second": table["vectors"].iloc[0] / medians.loc["store", "read"]}
    for system in medians.index.drop("store"):
        for kind in ("read", "write"):
            metrics[f"store.{kind}_vs_{system}"] = medians.loc[system, kind] / medians.loc["store", kind]
    return {name: float(value) for name, value in metrics.items()}
