import os
import random
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from collecting import COUNT, KILLED, begin, captures, die_writing, fill, truth
from helpers import CHILDREN, files_of_at_most

from vaelab import lasting, shards, store, writing
from vaelab.store import BlockShape


def contents(folder):
    return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


def part(begin, end):
    return {block: value[begin:end] for block, value in truth().items()}, captures()[begin:end]


def threads():
    return [thread for thread in threading.enumerate() if thread.name.startswith("lasting")]


@pytest.fixture
def slow(monkeypatch):
    """Files whose writing waits for ``slow.set()``."""
    gate, write = threading.Event(), lasting.SummedFile.write
    monkeypatch.setattr(lasting.SummedFile, "write", lambda self, data: (gate.wait(), write(self, data))[1])
    yield gate
    gate.set()


GIVEN = {
    "as it is stored": lambda value: value.clone(),
    "float64": lambda value: value.double(),
    "channels first": lambda value: value.movedim(-1, 1).contiguous().movedim(1, -1),
    "part of more": lambda value: torch.stack([value, value], -1)[..., 0],
    "numpy's": lambda value: torch.from_numpy(value.numpy().copy()),
}


@pytest.mark.parametrize("form", GIVEN)
def test_what_was_added_is_written_though_it_was_overwritten_before(tmp_path, slow, form):
    given, items = {block: GIVEN[form](value) for block, value in truth().items()}, captures()
    with begin(tmp_path) as writer:
        writer.add(given, items)
        for value in given.values():
            value.zero_()
        for item in items:
            item.clear()
        assert all(path.stat().st_size == 0 for path in tmp_path.glob("*.safetensors"))
        slow.set()
    opened = store.open(tmp_path)
    for block, value in truth().items():
        assert torch.equal(opened.maps(block, range(COUNT)), value)
    assert list(opened.items) == captures()


@pytest.mark.parametrize("waiting", [1, 60, 10**9])
def test_a_store_is_the_same_whatever_may_wait(tmp_path, monkeypatch, waiting):
    expected = contents(fill(tmp_path / "expected"))
    monkeypatch.setattr(writing, "WAITING", waiting)
    assert contents(fill(tmp_path / "this")) == expected


def test_adding_waits_when_too_much_waits_to_be_written(tmp_path, monkeypatch, slow):
    monkeypatch.setattr(writing, "WAITING", 3 * sum(value[0].nbytes for value in truth().values()))
    added = []

    def add():
        with begin(tmp_path) as writer:
            for number in range(COUNT):
                writer.add(*part(number, number + 1))
                added.append(number)

    adding = threading.Thread(target=add)
    adding.start()
    adding.join(0.1)
    assert len(added) == 3
    slow.set()
    adding.join()
    assert len(added) == COUNT and store.open(tmp_path).complete


def test_closing_waits_until_all_is_on_the_disk(tmp_path, monkeypatch):
    fsync, rng = os.fsync, random.Random(0)
    monkeypatch.setattr(os, "fsync", lambda descriptor: (time.sleep(rng.uniform(0, 0.01)), fsync(descriptor)))
    fill(tmp_path, step=COUNT)
    opened = store.open(tmp_path)
    opened.verify()
    assert opened.complete and list(opened.items) == captures()


def test_shards_come_to_exist_in_their_order(tmp_path, monkeypatch):
    replace, rng, order = os.replace, random.Random(0), []

    def replaced(draft, path):
        time.sleep(rng.uniform(0, 0.01))
        order.append(path.name)
        replace(draft, path)

    monkeypatch.setattr(os, "replace", replaced)
    fill(tmp_path, step=COUNT)
    assert order == ["index.json", *(f"shard-0000{number}.json" for number in range(4)), "index.json"]


@pytest.mark.parametrize("end", ["close", "error", "failure"])
def test_a_writer_has_one_thread_and_leaves_none(tmp_path, monkeypatch, end):
    before = len(threads())
    with pytest.raises(OSError if end == "failure" else KeyError if end == "error" else StopIteration):
        with begin(tmp_path) as writer:
            assert len(threads()) == before
            for number in range(0, 10, 2):
                writer.add(*part(number, number + 2))
                assert len(threads()) == before + 1
            if end == "error":
                raise KeyError
            if end == "failure":
                monkeypatch.setattr(os, "fsync", lambda descriptor: os.fstat(-1))
        assert end == "close"
        raise StopIteration
    assert len(threads()) == before
    monkeypatch.undo()
    begin(tmp_path).close()  # nor does it hold the lock


LARGEST = 100
"""Bytes of rows that a disk takes beside a file's header; a whole shard of down.2.1 has 144."""


@pytest.mark.parametrize("step", [1, 2, COUNT])
def test_a_full_disk_reaches_the_caller_with_the_file_and_can_be_gone_on_from(tmp_path, step):
    expected = contents(fill(tmp_path / "expected"))
    folder = tmp_path / "store"
    with begin(folder) as writer:
        writer.add(*part(0, 3))
        writer._background.wait()
        with files_of_at_most(shards.HEADER + LARGEST), pytest.raises(OSError) as caught:
            for start in range(3, COUNT, step):
                writer.add(*part(start, start + step))
            writer.close()
        assert caught.value.filename == str(folder / "shard-00001.down.2.1.safetensors")
        assert "File too large" in str(caught.value) and caught.value.filename in str(caught.value)
        with pytest.raises(ValueError, match="is closed: nothing can be added"):
            writer.add(*part(3, 4))
        writer.close()
    assert len(store.open(folder).items) == 3 and not store.open(folder).complete
    with begin(folder) as writer:
        assert writer.items_done == 3
        writer.add(*part(3, COUNT))
    assert contents(folder) == expected


def test_a_manifest_that_finds_no_room_is_named(tmp_path):
    layout = {f"block {number}": BlockShape((), 1) for number in range(80)}
    writer = begin(tmp_path, layout)
    with files_of_at_most(shards.HEADER + LARGEST), pytest.raises(OSError, match="File too large") as caught, writer:
        writer.add(truth(layout, 3), captures(3))
    assert caught.value.filename == str(tmp_path / "shard-00000.json")
    assert len(list(tmp_path.glob("*.safetensors"))) == 80 and len(store.open(tmp_path).items) == 0


@pytest.mark.parametrize("number", [1, 2, 4, 7, 10])
def test_a_collection_that_dies_in_the_middle_of_a_write_ends_as_one_left_alone(tmp_path, number):
    fill(tmp_path / "alone", truth(KILLED, 5), layout=KILLED)
    process = CHILDREN.Process(target=die_writing, args=(tmp_path / "died", 5, number))
    process.start()
    process.join()
    assert process.exitcode == 9
    found = store.open(tmp_path / "died")
    assert not found.complete and list(found.items) == captures(len(found.items))
    fill(tmp_path / "died", truth(KILLED, 5), layout=KILLED)
    assert contents(tmp_path / "died") == contents(tmp_path / "alone")


@pytest.mark.parametrize("shape", [(4, 6), (4, 3, 6), (3, 5, 7, 2), (2, 3, 2, 5, 4), (0, 3, 3, 5), (3, 70, 80)])
def test_maps_of_any_layout_come_as_rows(shape):
    maps = torch.randn(shape)
    naive = [maps[item][place] for item in range(len(maps)) for place in np.ndindex(shape[1:-1])]
    for given in (maps, maps.movedim(-1, 1).contiguous().movedim(1, -1), torch.stack([maps, -maps], 1)[:, 0]):
        rows = writing.rowwise(given)
        assert rows.is_contiguous() and rows.shape == (len(naive), shape[-1])
        assert all(torch.equal(row, expected) for row, expected in zip(rows, naive, strict=True))
