import json
import math
import os
import random
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import xxhash
from collecting import (
    COUNT,
    KILLED,
    LAYOUT,
    PER_SHARD,
    SETTINGS,
    begin,
    captures,
    collect,
    die_at,
    die_writing,
    fill,
    truth,
)
from helpers import CHILDREN, files_of_at_most

from vaelab import store
from vaelab.store import format, writer
from vaelab.store import writer as store_writer
from vaelab.store.format import BlockShape
from vaelab.store.writer import BackgroundThread, ChecksummedFile, sync_folder

DATA = bytes(range(256)) * 40


def test_jobs_run_in_their_order_in_one_other_thread():
    background, done = BackgroundThread(10), []
    for number in range(50):
        background.submit(lambda number=number: done.append((number, threading.current_thread())), size=number % 3)
    background.wait()
    assert [number for number, _ in done] == list(range(50))
    (thread,) = {thread for _, thread in done}
    assert thread is not threading.current_thread() and thread.is_alive()
    assert background.close() is None and not thread.is_alive()


def test_waiting_and_closing_end_when_the_last_job_has():
    for end in ("wait", "close"):
        background, done = BackgroundThread(10), []
        for _ in range(3):
            background.submit(lambda done=done: (time.sleep(0.02), done.append(1)))
        getattr(background, end)()
        assert len(done) == 3
        background.close()


@pytest.mark.parametrize(
    ("holds", "at_once"), [((4, 4, 2), 3), ((4, 4, 3), 2), ((10, 1), 1), ((99, 99), 1), ((0,) * 9, 9)]
)
def test_jobs_that_wait_hold_no_more_than_the_limit(holds, at_once):
    background, gate, taken = BackgroundThread(10), threading.Event(), []

    def hand_on():
        for number, size in enumerate(holds):
            background.submit(gate.wait, size=size)
            taken.append(number)

    thread = threading.Thread(target=hand_on)
    thread.start()
    thread.join(0.1)
    assert len(taken) == at_once and thread.is_alive() == (at_once < len(holds))
    gate.set()
    thread.join()
    background.wait()
    assert len(taken) == len(holds)
    background.close()


def test_after_a_job_that_failed_no_other_runs_and_every_call_raises():
    background, gate, done = BackgroundThread(10), threading.Event(), []

    def fail():
        gate.wait()
        raise OSError(5, "Input/output error")

    background.submit(done.append, 1)
    background.submit(fail)
    background.submit(done.append, 2)
    gate.set()
    for _ in range(2):
        with pytest.raises(OSError, match="Input/output error"):
            background.wait()
        with pytest.raises(OSError, match="Input/output error"):
            background.submit(done.append, 3)
    assert isinstance(background.close(), OSError)
    assert done == [1]


def test_no_call_waits_behind_a_job_that_failed():
    background = BackgroundThread(10)
    background.submit(lambda: 1 / 0, size=10)
    with pytest.raises(ZeroDivisionError):
        background.submit(print, size=10)
    background.close()


@pytest.mark.parametrize("piece", [writer.PIECE, 1000])
@pytest.mark.parametrize("pieces", [1, 3, 17])
def test_a_file_and_its_checksum_are_of_what_was_written(tmp_path, monkeypatch, pieces, piece):
    monkeypatch.setattr(writer, "PIECE", piece)
    file, size = ChecksummedFile(tmp_path / "file"), -(-len(DATA) // pieces)
    for start in range(0, len(DATA), size):
        file.write(memoryview(DATA)[start : start + size])
    assert not file.closed
    assert file.finish() == {"xxh128": xxhash.xxh3_128(DATA).hexdigest(), "bytes": len(DATA)}
    assert file.closed and (tmp_path / "file").read_bytes() == DATA


def test_a_rewritten_head_counts_in_the_checksum(tmp_path):
    file = ChecksummedFile(tmp_path / "file")
    file.write(DATA)
    file.rewrite(b"head")
    whole = b"head" + DATA[4:]
    assert file.finish() == {"xxh128": xxhash.xxh3_128(whole).hexdigest(), "bytes": len(DATA)}
    assert (tmp_path / "file").read_bytes() == whole


def test_a_file_is_synced_when_it_is_finished_and_not_before(tmp_path, monkeypatch):
    synced, fsync = [], os.fsync
    monkeypatch.setattr(
        os, "fsync", lambda descriptor: (synced.append(os.fstat(descriptor).st_size), fsync(descriptor))
    )
    file = ChecksummedFile(tmp_path / "file")
    file.write(DATA)
    assert not synced
    file.finish()
    assert synced == [len(DATA)]


def test_a_closed_file_stays_as_it_is(tmp_path):
    file = ChecksummedFile(tmp_path / "file")
    file.write(b"half")
    for _ in range(2):
        file.close()
    assert file.closed and (tmp_path / "file").read_bytes() == b"half"


def test_a_full_disk_is_an_error_that_names_the_file(tmp_path):
    with files_of_at_most(5000):
        file = ChecksummedFile(tmp_path / "file")
        with pytest.raises(OSError, match=r"File too large: '.*file'$"):
            file.write(DATA)  # of which a part was written
        file.close()
    assert (tmp_path / "file").read_bytes() == DATA[:5000]


@pytest.mark.parametrize("call", ["rewrite", "finish"])
def test_an_error_of_the_system_names_the_file(tmp_path, monkeypatch, call):
    file = ChecksummedFile(tmp_path / "file")
    file.write(DATA)

    def refuse(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, {"rewrite": "pwrite", "finish": "fsync"}[call], refuse)
    with pytest.raises(OSError, match=r"No space left on device: '.*file'$"):
        file.finish() if call == "finish" else file.rewrite(b"head")
    assert not file.closed
    file.close()


def test_a_folder_that_cannot_be_synced_is_named(tmp_path, monkeypatch):
    sync_folder(tmp_path)
    closed, close = [], os.close

    def refuse(descriptor):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "fsync", refuse)
    monkeypatch.setattr(os, "close", lambda descriptor: (closed.append(descriptor), close(descriptor)))
    with pytest.raises(OSError, match=f"Input/output error: '{tmp_path}'"):
        sync_folder(tmp_path)
    assert len(closed) == 1


def part(begin, end):
    return {block: value[begin:end] for block, value in truth().items()}, captures()[begin:end]


def threads():
    return [thread for thread in threading.enumerate() if thread.name.startswith("vaelab-store")]


def manifests(folder):
    return len(list(folder.glob("shard-?????.json")))


def contents(folder):
    return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


# resuming


def test_what_is_added_may_be_overwritten_afterwards(tmp_path):
    room = {block: torch.empty_like(value[:1]) for block, value in truth().items()}
    with begin(tmp_path) as writer:
        for number, item in enumerate(captures()):
            for block, value in truth().items():
                room[block].copy_(value[number : number + 1])
            writer.add(room, [item])
            item.clear()
            for value in room.values():
                value.zero_()
    assert torch.equal(store.open(tmp_path).maps("down.2.1", range(COUNT)), truth()["down.2.1"])
    assert list(store.open(tmp_path).items) == captures()


def test_after_an_exception_a_store_resumes_at_its_last_whole_shard(tmp_path, written):
    maps, items = truth(), captures()
    with pytest.raises(RuntimeError), begin(tmp_path / "other") as writer:
        assert writer.items_done == 0
        writer.add({block: value[:8] for block, value in maps.items()}, items[:8])
        assert writer.items_done == 8
        raise RuntimeError
    broken_off = store.open(tmp_path / "other")
    assert not broken_off.complete and list(broken_off.items) == items[:6]
    assert torch.equal(broken_off.maps("up.0", range(6)), maps["up.0"][:6])
    with pytest.raises(ValueError, match="closed"):
        writer.add({block: value[8:] for block, value in maps.items()}, items[8:])
    with begin(tmp_path / "other") as writer:
        assert writer.items_done == 6
        writer.add({block: value[6:] for block, value in maps.items()}, items[6:])
    assert contents(tmp_path / "other") == contents(written)


def test_an_unfinished_shard_is_removed_and_nothing_else(tmp_path, written):
    folder = tmp_path / "other"
    with pytest.raises(RuntimeError), begin(folder) as writer:
        writer.add({block: value[:7] for block, value in truth().items()}, captures()[:7])
        raise RuntimeError
    assert (folder / "shard-00002.up.0.safetensors").exists()
    (folder / "shard-00003.up.0.safetensors").write_bytes(b"half")
    (folder / "shard-00002.items.json").write_bytes(b"[")
    (folder / "notes.txt").write_text("mine")
    (folder / "shard-00002.tar").write_text("mine")
    (folder / "shard-00002.another.safetensors").write_text("mine")
    with begin(folder) as writer:
        assert writer.items_done == 6
        left = {path.name for path in folder.glob("shard-0000[23]*")}
        assert left == {"shard-00002.tar", "shard-00002.another.safetensors"}
    assert (folder / "notes.txt").exists()


def test_a_last_shard_that_the_index_does_not_list_is_collected_again(written):
    index = json.loads((written / "index.json").read_text())
    del index["sha256"]
    whole = contents(written)
    (written / "index.json").write_text(json.dumps(format.with_checksum({**index, "items": None})))
    with begin(written) as writer:
        assert writer.items_done == 9
        writer.add({block: value[9:] for block, value in truth().items()}, captures()[9:])
    assert contents(written) == whole


def test_a_complete_store_is_opened_without_writing(written):
    def state():
        return {path.name: (path.stat().st_ino, path.stat().st_mtime_ns) for path in (written, *written.iterdir())}

    before = state()
    with begin(written, items_per_shard=5) as writer:
        assert writer.complete and writer.items_done == COUNT and writer.spec.items_per_shard == PER_SHARD
    assert state() == before


@pytest.mark.parametrize("per_shard", [1, 2, 5, 100])
def test_a_store_is_resumed_with_its_own_shard_size(tmp_path, written, per_shard):
    with pytest.raises(RuntimeError), begin(tmp_path / "other") as writer:
        writer.add(*part(0, 8))
        raise RuntimeError
    with begin(tmp_path / "other", items_per_shard=per_shard) as writer:
        assert writer.items_done == 6
        writer.add(*part(6, COUNT))
    assert contents(tmp_path / "other") == contents(written)


def test_a_complete_store_takes_nothing_more(written):
    before = contents(written)
    with begin(written) as writer:
        assert writer.items_done == COUNT and writer.complete
        with pytest.raises(ValueError, match="is complete: nothing can be added"):
            writer.add({block: value[:1] for block, value in truth().items()}, captures()[:1])
    assert contents(written) == before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"settings": SETTINGS | {"steps": (1, 2)}}, r"settings steps \[1, 4\] there, \[1, 2\] here"),
        ({"settings": {"model": "embedded"}}, r"settings steps \[1, 4\] there, 'missing' here"),
        ({"settings": SETTINGS | {"seed": None}}, "settings seed 'missing' there, None here"),
        ({"precision": "bfloat16"}, "precision 'float16' there, 'bfloat16' here"),
        ({"layout": LAYOUT | {"up.0": BlockShape((3,), 3)}}, r"layout of up.0 .*'width': 2.*'width': 3"),
        ({"layout": {"up.0": LAYOUT["up.0"]}}, "layout of down.2.1 .* here, layout of mid/attn"),
    ],
)
def test_other_settings_are_refused_with_their_differences(written, options, message):
    before = contents(written)
    with pytest.raises(ValueError, match=f"made with other settings .*{message}"):
        begin(written, **options)
    assert contents(written) == before


def test_two_spellings_of_a_path_are_the_same_setting(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("prompts.txt", "others.txt"):
        (tmp_path / name).touch()
    begin(tmp_path / "store", settings={"dataset": "prompts.txt"}).close()
    assert begin(tmp_path / "store", settings={"dataset": str(tmp_path / "prompts.txt")}).complete
    for other in ("others.txt", "missing.txt"):
        with pytest.raises(ValueError, match=r"settings dataset 'prompts.txt' there"):
            begin(tmp_path / "store", settings={"dataset": other})


def test_two_writers_at_a_time_are_refused(tmp_path):
    with begin(tmp_path), pytest.raises(ValueError, match="is being written by another process"):
        begin(tmp_path)
    begin(tmp_path).close()


def test_an_error_in_the_background_is_raised(tmp_path, monkeypatch):
    def full(*args):
        raise OSError(28, "No space left on device")

    begin(tmp_path)._abandon(None)
    monkeypatch.setattr(store_writer, "write_json", full)
    for stop in (3, COUNT):
        with pytest.raises(OSError, match="No space left"):
            fill(tmp_path, step=3, stop=stop)
    with pytest.raises(KeyError) as caught, begin(tmp_path) as writer:
        writer.add({block: value[:3] for block, value in truth().items()}, captures()[:3])
        raise KeyError
    assert ["No space left" in note for note in caught.value.__notes__] == [True]
    assert len(store.open(tmp_path).items) == 0


def test_a_shard_is_synced_before_its_manifest(tmp_path, monkeypatch):
    fsync, replace, order = os.fsync, os.replace, []

    def synced(descriptor):
        inode = os.fstat(descriptor).st_ino
        order.extend(path.name for path in (tmp_path, *tmp_path.iterdir()) if path.stat().st_ino == inode)
        fsync(descriptor)

    def replaced(draft, path):
        order.append(f"now {path.name}")
        replace(draft, path)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "replace", replaced)
    fill(tmp_path)
    for number in range(4):
        end = order.index(f"now shard-0000{number}.json")
        files = {path.name for path in tmp_path.glob(f"shard-0000{number}.*.*")}
        assert len(files) == 4 and files < set(order[:end])
        last = max(order.index(name) for name in files)
        assert tmp_path.name in order[last:end] and order[end + 1] == tmp_path.name
    assert order[-2:] == ["now index.json", tmp_path.name]


def test_a_disk_that_fails_is_an_error(tmp_path, monkeypatch):
    fsync = os.fsync

    def failing(descriptor):
        if os.fstat(descriptor).st_size > format.HEADER_BYTES:
            raise OSError(5, "Input/output error")
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", failing)
    with pytest.raises(OSError, match="Input/output error"):
        fill(tmp_path, step=3, stop=3)
    assert manifests(tmp_path) == 0 and not store.open(tmp_path).complete


def test_nothing_is_added_after_a_write_that_failed(tmp_path, monkeypatch):
    part = {block: value[:4] for block, value in truth().items()}, captures()[:4]
    with begin(tmp_path) as writer:
        name = format.data_file
        monkeypatch.setattr(
            store_writer, "data_file", lambda shard, block: name(shard, block) if not shard else "no/such"
        )
        with pytest.raises(FileNotFoundError):
            writer.add(*part)
        with pytest.raises(ValueError, match="is closed"):
            writer.add(*part)
    assert not store.open(tmp_path).complete


def test_the_cleanup_may_be_killed_too(written):
    """A kill at any step of the cleanup leaves a store that can be resumed."""
    index = json.loads((written / "index.json").read_text())
    del index["sha256"]
    whole = contents(written)
    for step in range(1, 100):
        (written / "index.json").write_text(json.dumps(format.with_checksum({**index, "items": None})))
        process = CHILDREN.Process(target=die_at, args=(written, COUNT, step, LAYOUT))
        process.start()
        process.join()
        found = store.open(written)
        assert len(found.items) in (9, 11)
        if process.exitcode == 0:
            break
    assert 9 < step < 99 and contents(written) == whole


# kills


def test_a_collection_killed_ten_times_ends_as_an_undisturbed_one(tmp_path):
    count, rng, folder, seen = 180, random.Random(0), tmp_path / "killed", []
    fill(tmp_path / "alone", truth(KILLED, count), layout=KILLED)
    for _ in range(10):
        until = manifests(folder) + rng.randrange(6)
        process = CHILDREN.Process(target=collect, args=(folder, count))
        process.start()
        while process.is_alive() and (manifests(folder) < until or not folder.exists()):
            time.sleep(1e-4)
        time.sleep(rng.uniform(0, 0.02))
        process.kill()
        process.join()
        if (folder / "index.json").exists():
            found = store.open(folder)
            found.verify()
            assert list(found.items) == captures(count)[: len(found.items)]
            seen.append(len(found.items))
    assert seen == sorted(seen) and len(set(seen) - {0, count}) > 4, seen
    fill(folder, truth(KILLED, count), layout=KILLED)
    assert contents(folder) == contents(tmp_path / "alone")


def test_a_collection_killed_at_any_step_ends_as_an_undisturbed_one(tmp_path):
    fill(tmp_path / "alone", truth(KILLED, 5), layout=KILLED)
    for step in range(1, 100):
        process = CHILDREN.Process(target=die_at, args=(tmp_path / f"{step}", 5, step))
        process.start()
        process.join()
        if process.exitcode == 0:
            break
        assert process.exitcode == 9
        fill(tmp_path / f"{step}", truth(KILLED, 5), layout=KILLED)
        assert contents(tmp_path / f"{step}") == contents(tmp_path / "alone"), step
    assert 20 < step < 99


# what cannot be stored


def test_shards_without_their_index_are_refused(written):
    (written / "index.json").unlink()
    before = contents(written)
    with pytest.raises(ValueError, match=r"holds 'shard-00000.*' and no index.json, so it is not a store"):
        begin(written)
    assert contents(written) == before


def test_a_folder_that_holds_something_else_is_refused_and_left_as_it_is(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "picture.png").write_bytes(b"png")
    for folder, message in (
        (tmp_path / "mine", r"mine' holds 'picture.png' and no index.json, so it is not a store; expected a new"),
        (tmp_path / "mine" / "picture.png", r"picture.png' is a file; expected a folder"),
    ):
        with pytest.raises(ValueError, match=f"^folder: .*{message}"):
            begin(folder)
    (tmp_path / "mine" / "index.json").write_text('{"title": "my pictures"}')
    with pytest.raises(ValueError, match=r"index.json is foreign"):
        begin(tmp_path / "mine")
    assert contents(tmp_path / "mine") == {"picture.png": b"png", "index.json": b'{"title": "my pictures"}'}


def test_a_file_that_appears_in_the_place_of_a_data_file_is_not_overwritten(tmp_path):
    with begin(tmp_path / "store") as writer:
        (tmp_path / "mine").write_text("mine")
        (tmp_path / "store" / "shard-00000.up.0.safetensors").symlink_to(tmp_path / "mine")
        with pytest.raises(FileExistsError):
            writer.add(*part(0, 4))
    assert (tmp_path / "mine").read_text() == "mine"


def test_a_writer_killed_before_its_index_does_not_block_the_folder(tmp_path, written):
    (tmp_path / ".lock").touch()
    (tmp_path / ".draft-abc").mkdir()
    (tmp_path / ".draft-abc" / "index.json").write_text("{")
    fill(tmp_path / "store")
    folder = tmp_path / "killed"
    folder.mkdir()
    for name in (".lock", ".draft-abc"):
        (tmp_path / name).rename(folder / name)
    fill(folder)
    assert contents(folder) == contents(written)


def test_stores_are_written_locally():
    with pytest.raises(ValueError, match=r"folder: 'memory://x' is not local"):
        begin("memory://x")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layout": {}}, "layout: there is no block"),
        ({"layout": {"a/b": LAYOUT["up.0"], "A_b": LAYOUT["up.0"]}}, "layout: blocks 'a/b' and 'A_b' would share"),
        ({"layout": {"": LAYOUT["up.0"]}}, "layout: a block's name has 1 to 200 characters, not 0"),
        ({"precision": "float8"}, "precision: unknown name 'float8'"),
        ({"items_per_shard": 0}, "items_per_shard: must be at least 1"),
        ({"settings": {"a": torch.ones(1)}}, "settings: must be plain JSON"),
        ({"settings": {"a": float("nan")}}, "settings: must be plain JSON"),
    ],
)
def test_a_store_that_cannot_be_is_refused(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        begin(tmp_path, **options)
    assert not list(tmp_path.iterdir())


def wrong(block="down.2.1", **change):
    maps = {name: value[:2].clone() for name, value in truth().items()}
    return {**maps, block: change["to"](maps[block])} if change else maps


def put(value, *place):
    def change(maps):
        maps = maps.float()
        maps[place] = value
        return maps

    return change


@pytest.mark.parametrize(
    ("maps", "message"),
    [
        ({"down.2.1": truth()["down.2.1"][:2]}, "maps: expected the blocks .*, got"),
        (wrong() | {"more": torch.ones(2)}, "maps: expected the blocks .*more"),
        (wrong(to=lambda maps: maps[:1]), r"'down.2.1' is \(1, 2, 3, 4\) torch.float16, expected \(2, 2, 3, 4\)"),
        (wrong(to=lambda maps: maps.mT), r"'down.2.1' is \(2, 2, 4, 3\)"),
        (wrong(to=lambda maps: maps.int()), r"'down.2.1' is .*int32, expected .* of floats"),
        (wrong(to=put(float("nan"), 1, 0, 2, 1)), "'down.2.1' of item 5 has NaN or infinite numbers"),
        (wrong("up.0", to=put(float("-inf"), 0, 0, 1)), "'up.0' of item 4 has NaN or infinite numbers"),
        (
            wrong(to=put(-70000.0, 1, 1, 1, 1)),
            "'down.2.1' of item 5 has 70000, beyond the 65504 of float16: use bfloat16 or float32",
        ),
    ],
)
def test_maps_that_cannot_be_stored_are_refused_whole(tmp_path, maps, message):
    with begin(tmp_path) as writer:
        writer.add({block: value[:4] for block, value in truth().items()}, captures()[:4])
        with pytest.raises(ValueError, match=message):
            writer.add(maps, captures()[4:6])
        assert writer.items_done == 4
        writer.add({block: value[4:] for block, value in truth().items()}, captures()[4:])
    assert torch.equal(store.open(tmp_path).maps("down.2.1", range(COUNT)), truth()["down.2.1"])


def test_wide_numbers_go_into_wide_precisions(tmp_path):
    layout = {"a": BlockShape((), 2)}
    for precision in ("bfloat16", "float32"):
        with begin(tmp_path / precision, layout, precision=precision) as writer:
            writer.add({"a": torch.full((1, 2), 70000.0)}, captures(1))
        assert store.open(tmp_path / precision).maps("a", [0]).float().allclose(torch.tensor(70000.0), rtol=4e-3)


@pytest.mark.parametrize(
    ("item", "message"),
    [
        ({"seed": 0, "timestep": 0}, "item 0 has no 'prompt' or 'image'"),
        ({"prompt": "", "timestep": 0}, "item 0 has no 'seed'"),
        ({"image": 3, "seed": 0}, "item 0 has no 'timestep'"),
        ({"image": 3, "seed": 0, "timestep": 0, "position": 1}, "item 0 has the reserved key 'position'"),
        ({"image": 3, "seed": np.int64(0), "timestep": 0}, "item 0: must be plain JSON"),
        ({"image": 3, "seed": 0, "timestep": float("inf")}, "item 0: must be plain JSON"),
    ],
)
def test_an_incomplete_item_is_refused(tmp_path, item, message):
    with begin(tmp_path) as writer, pytest.raises(ValueError, match=f"items: {message}"):
        writer.add({block: value[:1] for block, value in truth().items()}, [item])


# the background


@pytest.fixture
def slow(monkeypatch):
    """Files whose writing waits for ``slow.set()``."""
    gate, write = threading.Event(), store_writer.ChecksummedFile.write
    monkeypatch.setattr(store_writer.ChecksummedFile, "write", lambda self, data: (gate.wait(), write(self, data))[1])
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
    monkeypatch.setattr(store_writer, "MAX_QUEUED_BYTES", waiting)
    assert contents(fill(tmp_path / "this")) == expected


def test_adding_waits_when_too_much_waits_to_be_written(tmp_path, monkeypatch, slow):
    monkeypatch.setattr(store_writer, "MAX_QUEUED_BYTES", 3 * sum(value[0].nbytes for value in truth().values()))
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


def test_manifests_are_written_in_order(tmp_path, monkeypatch):
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
    assert len(threads()) == before and all(file.closed for file in writer._unfinished)
    monkeypatch.undo()
    begin(tmp_path).close()  # nor does it hold the lock


LARGEST = 100
"""Bytes of rows that a disk takes beside a file's header; a whole shard of down.2.1 has 144."""


@pytest.mark.parametrize("step", [1, 2, COUNT])
def test_a_full_disk_is_raised_with_the_file_and_the_store_can_be_resumed(tmp_path, step):
    expected = contents(fill(tmp_path / "expected"))
    folder = tmp_path / "store"
    with begin(folder) as writer:
        writer.add(*part(0, 3))
        writer._background.wait()
        with files_of_at_most(format.HEADER_BYTES + LARGEST), pytest.raises(OSError) as caught:
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


def test_a_manifest_that_the_disk_cannot_hold_is_named(tmp_path):
    layout = {f"block {number}": BlockShape((), 1) for number in range(80)}
    writer = begin(tmp_path, layout)
    with (
        files_of_at_most(format.HEADER_BYTES + LARGEST),
        pytest.raises(OSError, match="File too large") as caught,
        writer,
    ):
        writer.add(truth(layout, 3), captures(3))
    assert caught.value.filename == str(tmp_path / "shard-00000.json")
    assert len(list(tmp_path.glob("*.safetensors"))) == 80 and len(store.open(tmp_path).items) == 0


@pytest.mark.parametrize("number", [1, 2, 4, 7, 10])
def test_a_collection_killed_in_the_middle_of_a_write_ends_as_an_undisturbed_one(tmp_path, number):
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
def test_maps_of_any_memory_layout_become_rows(shape):
    maps = torch.randn(shape)
    naive = [maps[item][place] for item in range(len(maps)) for place in np.ndindex(shape[1:-1])]
    for given in (maps, maps.movedim(-1, 1).contiguous().movedim(1, -1), torch.stack([maps, -maps], 1)[:, 0]):
        rows = store_writer.flatten_positions(given)
        assert rows.is_contiguous() and rows.shape == (len(naive), shape[-1])
        assert all(torch.equal(row, expected) for row, expected in zip(rows, naive, strict=True))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_numbers_that_are_not_finite_are_recognised_by_their_bits(dtype):
    if dtype == torch.float32:
        edges = [0, 1, 0x7F7FFFFF, 0x7F800000, 0x7F800001, 0x7FC00000, 0x7FFFFFFF]
        edges = [bits - sign for bits in edges for sign in (0, 2**31)]
        numbers = torch.tensor(edges, dtype=torch.int32).view(dtype)
    else:
        numbers = torch.arange(-(2**15), 2**15, 17, dtype=torch.int16).view(dtype)
        edges = torch.tensor([math.inf, -math.inf, math.nan, -math.nan, torch.finfo(dtype).max, torch.finfo(dtype).min])
        numbers = torch.cat([numbers, edges.to(dtype)])
    truth = numbers.isfinite().tolist()
    assert {True, False} == set(truth)
    among = torch.tensor([[-1.0, 0.0, 2.0]] * len(numbers), dtype=dtype)
    among[:, 1] = numbers
    assert [store_writer.bits_are_finite(row) for row in numbers[:, None]] == truth
    assert [store_writer.bits_are_finite(row) for row in among] == truth
