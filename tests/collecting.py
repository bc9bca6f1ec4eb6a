"""Small stores that tests write, in their own process or in one that is killed.

A module of its own, since the killed processes import it without pytest.
"""

import os

import fsspec
import numpy as np
import torch

from vaelab import store
from vaelab.store import writer as store_writer
from vaelab.store.format import BlockShape

LAYOUT = {"down.2.1": BlockShape((2, 3), 4), "mid/attn": BlockShape((), 5), "up.0": BlockShape((3,), 2)}
SETTINGS = {"model": "embedded", "steps": (1, 4)}
PER_SHARD = 3
COUNT = 11
"""Three shards of 3 items and one of 2."""


def truth(layout=LAYOUT, count=COUNT, dtype=torch.float16):
    """The maps of every block that a store should give back."""
    generator = torch.Generator().manual_seed(0)
    return {
        block: torch.randn(count, *shape.positions, shape.width, generator=generator).to(dtype)
        for block, shape in layout.items()
    }


def captures(count=COUNT):
    return [{"prompt": f"picture “{i}”", "seed": i * 7, "timestep": [999, 499][i % 2]} for i in range(count)]


def begin(folder, layout=LAYOUT, **options):
    options = {"precision": "float16", "items_per_shard": PER_SHARD, "settings": SETTINGS} | options
    return store.create(folder, layout, **options)


def fill(folder, maps=None, *, step=2, stop=None, **options):
    """Write or resume a store in steps of ``step`` items."""
    maps = maps or truth()
    items = captures(len(next(iter(maps.values()))))
    with begin(folder, **options) as writer:
        for start in range(writer.items_done, stop or len(items), step):
            part = slice(start, min(start + step, len(items)))
            writer.add({block: value[part] for block, value in maps.items()}, items[part])
    return folder


def damage(url, name, change):
    """Change one file of a store at any URL; None deletes it."""
    system, path = fsspec.url_to_fs(f"{url}/{name}")
    data = system.cat_file(path)
    system.rm(path)
    if (changed := change(data)) is not None:
        system.pipe_file(path, changed)


def correlation(numbers):
    """Rank correlation of the rows' numbers with their order."""
    return float(np.corrcoef(np.arange(len(numbers)), np.argsort(np.argsort(numbers)))[0, 1])


KILLED = {"a.0": BlockShape((2,), 8), "b": BlockShape((), 3)}
"""The layout of collections that are killed."""


def collect(folder, count):
    """A collection for a process of its own."""
    torch.set_num_threads(1)
    fill(folder, truth(KILLED, count), layout=KILLED)


def die_at(folder, count, step, layout=KILLED):
    """Exit without cleanup before the ``step``-th operation on the disk."""
    torch.set_num_threads(1)
    done = 0

    def counted(function):
        def call(*args, **kwargs):
            nonlocal done
            done += 1
            if done == step:
                os._exit(9)
            return function(*args, **kwargs)

        return call

    for module, name in (
        (os, "fsync"),
        (os, "replace"),
        (os, "unlink"),
        (store_writer, "_finish_shard"),
        (store_writer, "sync_folder"),
    ):
        setattr(module, name, counted(getattr(module, name)))
    fill(folder, truth(layout, count), layout=layout)


def die_writing(folder, count, number):
    """Exit without cleanup when half of the ``number``-th piece of a file has been written."""
    torch.set_num_threads(1)
    left, write = number, store_writer.ChecksummedFile.write

    def half(self, data):
        nonlocal left
        left -= 1
        if left == 0:
            write(self, data[: len(data) // 2])
            os._exit(9)
        write(self, data)

    store_writer.ChecksummedFile.write = half
    fill(folder, truth(KILLED, count), layout=KILLED)
