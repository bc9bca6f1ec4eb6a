import json
import os
import random
import shutil
import time
import weakref
from itertools import islice
from pathlib import Path

import fsspec
import numpy as np
import pytest
import torch
from collecting import COUNT, KILLED, LAYOUT, SETTINGS, begin, captures, collect, die_at, fill, truth
from helpers import CHILDREN
from safetensors.torch import load_file

from vaelab import planning, shards, store, writing
from vaelab.shuffling import Order
from vaelab.store import BlockShape


@pytest.fixture(scope="module")
def once_written(tmp_path_factory):
    return fill(tmp_path_factory.mktemp("once") / "store")


@pytest.fixture
def written(once_written, tmp_path):
    """A store of one's own."""
    return Path(shutil.copytree(once_written, tmp_path / "store"))


@pytest.fixture(params=["local", "memory"])
def url(request, written):
    """The same store in a folder and on a file system that knows neither folders nor mapping."""
    if request.param == "local":
        yield str(written)
        return
    memory = fsspec.filesystem("memory")
    memory.put(str(written), "/some/store", recursive=True)
    yield "memory://some/store"
    memory.rm("/some", recursive=True)


def flat(block):
    shape = LAYOUT[block]
    return truth()[block].reshape(-1, shape.width)


@pytest.mark.parametrize("precision", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("step", [1, 2, 5, 11])
def test_what_is_written_is_read_back_whatever_the_steps(tmp_path, precision, step):
    maps = truth(dtype=getattr(torch, precision))
    opened = store.open(fill(tmp_path, maps, step=step, precision=precision))
    assert opened.complete and opened.precision == precision and opened.layout == LAYOUT
    assert opened.settings == {"model": "embedded", "steps": [1, 4]}
    assert list(opened.items) == captures()
    for block, value in maps.items():
        assert opened.rows(block) == value[..., 0].numel()
        got = opened.maps(block, range(COUNT))
        assert got.dtype == value.dtype and torch.equal(got, value)


def test_maps_and_items_come_in_the_order_asked_for(url):
    opened = store.open(url)
    for block, value in truth().items():
        assert torch.equal(opened.maps(block, [10, 0, 4, 4]), value[[10, 0, 4, 4]])
        assert opened.maps(block, []).shape == (0, *value.shape[1:])
    assert len(opened.items) == COUNT
    assert opened.items[-1] == captures()[-1] and opened.items[2:9:3] == captures()[2:9:3]
    with pytest.raises(IndexError):
        opened.items[COUNT]


def test_a_row_is_described_by_its_item_block_and_position(url):
    opened = store.open(url)
    for block, shape in LAYOUT.items():
        for row in range(opened.rows(block)):
            told = opened.describe(block, row)
            item = told["seed"] // 7
            assert told == {**captures()[item], "block": block, "position": told["position"]}
            assert torch.equal(truth()[block][(item, *told["position"])], flat(block)[row])
            assert len(told["position"]) == len(shape.positions)


def test_data_files_are_ordinary_safetensors(written):
    for block, shape in LAYOUT.items():
        name = block.replace("/", "_")
        parts = [load_file(written / f"shard-{k:05d}.{name}.safetensors")["rows"] for k in range(4)]
        assert [len(part) // shape.count for part in parts] == [3, 3, 3, 2]
        assert torch.equal(torch.cat(parts), flat(block))


def test_numbers_are_stored_in_the_precision_whatever_they_came_in(tmp_path):
    maps = {block: value.double() + 1e-4 for block, value in truth().items()}
    maps["down.2.1"] = maps["down.2.1"].permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1).requires_grad_()
    opened = store.open(fill(tmp_path, maps))
    for block, value in maps.items():
        assert torch.equal(opened.maps(block, range(COUNT)), value.half())


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


def test_a_store_without_an_item(tmp_path):
    with begin(tmp_path):
        pass
    opened = store.open(tmp_path)
    assert opened.complete and opened.rows("up.0") == len(opened.items) == 0
    assert list(opened.batches("up.0", 4, seed=0)) == []
    with pytest.raises(ValueError, match=r"holds no row of 'up.0'"):
        opened.shuffled("up.0", 4, seed=0)


@pytest.mark.parametrize("form", ["file://{}/store", "zip://::{}/store.zip", "simplecache::file://{}/store"])
def test_any_url_will_do(written, form):
    shutil.make_archive(written, "zip", written)
    opened = store.open(form.format(written.parent))
    opened.verify()
    _, rows, numbers = gathered(opened.batches("down.2.1", 7, seed=0, buffer_rows=30, with_rows=True))
    assert torch.equal(rows, flat("down.2.1")[numbers].float()) and len(set(numbers.tolist())) == 66
    assert torch.equal(opened.maps("up.0", [7, 0]), truth()["up.0"][[7, 0]])
    assert list(opened.items) == captures()


# shuffled reading


def gathered(batches):
    """The rows of (batch, numbers) pairs, and their numbers."""
    pairs = list(batches)
    return [len(batch) for batch, _ in pairs], torch.cat([b for b, _ in pairs]), torch.cat([n for _, n in pairs])


@pytest.mark.parametrize("block", LAYOUT)
@pytest.mark.parametrize("buffer_rows", [1, 20, 37, 10**6])
@pytest.mark.parametrize("batch_size", [1, 4, 7, 1000])
def test_a_pass_gives_every_row_once(url, block, buffer_rows, batch_size):
    opened, total = store.open(url), len(flat(block))
    stream = opened.batches(block, batch_size, seed=3, buffer_rows=buffer_rows, with_rows=True)
    sizes, rows, numbers = gathered(stream)
    assert sizes == [batch_size] * (total // batch_size) + [total % batch_size] * (total % batch_size > 0)
    assert sorted(numbers.tolist()) == list(range(total))
    assert rows.dtype == torch.float32 and torch.equal(rows, flat(block)[numbers].float())


def test_the_order_is_fixed_by_seed_and_epoch_alone(url, written):
    def order(seed=0, epoch=0, batch_size=5, where=url):
        stream = store.open(where).batches(
            "down.2.1", batch_size, seed, epoch=epoch, buffer_rows=40, with_rows=True, dtype=torch.float16
        )
        return gathered(stream)[2].tolist()

    first = order()
    assert first == order() == order(where=str(written))
    halves = order(batch_size=10)
    assert [set(halves[i : i + 10]) for i in (0, 10, 20)] == [set(first[i : i + 10]) for i in (0, 10, 20)]
    assert len({tuple(order(seed, epoch)) for seed in (0, 1) for epoch in (0, 1)}) == 4
    assert first != list(range(len(first)))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_batches_come_in_the_dtype_asked_for(written, dtype):
    (batch,) = store.open(written).batches("up.0", 100, seed=0, dtype=dtype)
    assert batch.dtype == dtype


def correlation(numbers):
    """Rank correlation of the rows' numbers with the order they came in."""
    return float(np.corrcoef(np.arange(len(numbers)), np.argsort(np.argsort(numbers)))[0, 1])


def test_rows_of_a_group_are_really_mixed(tmp_path):
    layout = {"a": BlockShape((4, 4), 1)}
    fill(tmp_path, truth(layout, 320), layout=layout, items_per_shard=20, step=40)
    opened = store.open(tmp_path)
    assert opened.rows("a") == 16 * 320
    whole = gathered(opened.batches("a", 64, seed=0, with_rows=True))[2].numpy()
    assert abs(correlation(whole)) < 0.05
    batches = [n.numpy() for _, n in opened.batches("a", 64, seed=0, with_rows=True)]
    assert abs(correlation(np.array([numbers.mean() for numbers in batches]))) < 0.3
    assert np.mean([len(set(numbers // 320)) for numbers in batches]) > 13
    # two shards a group: whichever they are, rows of both in every batch, none of any other
    batches = [n.numpy() for _, n in opened.batches("a", 64, seed=0, buffer_rows=640, with_rows=True)]
    pairs = [tuple(sorted(set(numbers // 320))) for numbers in batches]
    assert all(len(pair) == 2 for pair in pairs)
    assert len(set(pairs)) == 8 and set(pairs) != {(k, k + 1) for k in range(0, 16, 2)}


def test_every_group_of_every_pass_has_an_order_of_its_own():
    order = Order([50] * 6, buffer_rows=100, seed=0)
    groups = [(number, group) for number in range(3) for group in range(3)]
    assert len({tuple(order.permutation(group).tolist()) for group in groups}) == 9
    passes = [[shard for group in range(3) for shard in order.shards((number, group))] for number in range(3)]
    assert len(set(map(tuple, passes))) == 3 and all(sorted(shards) == list(range(6)) for shards in passes)


def rows_of(stream, count):
    return [batch.tolist() for batch in islice(stream, count)]


@pytest.mark.parametrize("batch_size", [1, 4, 9, 70, 150])
def test_shuffled_is_pass_after_pass_without_a_gap(url, batch_size):
    opened = store.open(url)
    stream = opened.shuffled("down.2.1", batch_size, seed=5, buffer_rows=30)()
    got = torch.cat([next(stream) for _ in range(-(-4 * 66 // batch_size))])
    one_by_one = [opened.batches("down.2.1", 1, seed=5, epoch=e, buffer_rows=30) for e in range(4)]
    expected = torch.cat([row for each in one_by_one for row in each])
    for place in range(0, 4 * 66 - batch_size, batch_size):
        batch, same = (sorted(rows[place : place + batch_size].tolist()) for rows in (got, expected))
        assert batch == same


@pytest.mark.parametrize("start", [0, 1, 6, 25])
@pytest.mark.parametrize("world", [1, 2, 3])
def test_shuffled_can_be_taken_up_anywhere_and_shared(url, start, world):
    make = store.open(url).shuffled("down.2.1", 4, seed=1, buffer_rows=30)
    alone = rows_of(make(), (start + 9) * world)
    for rank in range(world):
        assert rows_of(make(start=start, rank=rank, world=world), 9) == alone[start * world + rank :: world][:9]


def test_taking_up_far_on_reads_no_more_than_two_groups(written, monkeypatch):
    read = []
    rows = store.map_rows
    monkeypatch.setattr(store, "map_rows", lambda *args: (read.append(args[3]), rows(*args))[1])
    stream = store.open(written).shuffled("down.2.1", 6, seed=0, buffer_rows=1)(start=10**6)
    next(stream)
    stream.close()
    assert len(read) == 2


def test_a_group_is_let_go_when_it_has_been_given_out(written, monkeypatch):
    alive, most = weakref.WeakSet(), []
    group = store.Store._group

    def watched(self, *args):
        parts, order = group(self, *args)
        alive.update(parts)
        most.append(len(alive))
        return parts, order

    monkeypatch.setattr(store.Store, "_group", watched)
    assert sum(map(len, store.open(written).batches("down.2.1", 5, seed=0, buffer_rows=1))) == 66
    assert len(most) == 4 and max(most) <= 2
    assert not alive


def test_training_goes_on_from_a_checkpoint_on_a_store(written, tmp_path):
    from vaelab.training import TrainConfig, train

    class Mean(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.mean = torch.nn.Parameter(torch.zeros(4))

        def forward(self, batch):
            return {"loss": (batch - self.mean).square().mean()}

    batches = store.open(written).shuffled("down.2.1", 8, seed=0)
    once, twice, config = Mean(), Mean(), TrainConfig(steps=12, device="cpu", checkpoint_every=5)
    train(once, batches, config)

    def stops(**options):
        return islice(batches(**options), 7)

    with pytest.raises(StopIteration):
        train(twice, stops, config, folder=tmp_path)
    assert train(twice, batches, config, folder=tmp_path).resumed_at == 5
    assert torch.equal(once.mean, twice.mean)


# resuming


def manifests(folder):
    return len(list(folder.glob("shard-?????.json")))


def contents(folder):
    return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


def test_left_by_an_exception_a_store_is_gone_on_from_at_its_last_whole_shard(tmp_path, written):
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


def test_what_a_kill_left_is_cleared_away(tmp_path, written):
    folder = tmp_path / "other"
    with pytest.raises(RuntimeError), begin(folder) as writer:
        writer.add({block: value[:7] for block, value in truth().items()}, captures()[:7])
        raise RuntimeError
    assert (folder / "shard-00002.up.0.safetensors").exists()
    (folder / "shard-00003.up.0.safetensors").write_bytes(b"half")
    (folder / "shard-00002.items.json").write_bytes(b"[")
    (folder / ".shard-00002.json.123.draft").write_bytes(b"{")
    (folder / "notes.txt").write_text("mine")
    with begin(folder) as writer:
        assert writer.items_done == 6
        assert not list(folder.glob("shard-0000[23]*")) and not list(folder.glob(".*.draft"))
    assert (folder / "notes.txt").exists()


def test_a_last_shard_that_was_not_owned_to_is_collected_again(written):
    index = json.loads((written / "index.json").read_text())
    del index["sha256"]
    whole = contents(written)
    (written / "index.json").write_text(json.dumps(shards.signed({**index, "items": None})))
    with begin(written) as writer:
        assert writer.items_done == 9
        writer.add({block: value[9:] for block, value in truth().items()}, captures()[9:])
    assert contents(written) == whole


def test_a_complete_store_takes_nothing_more(written):
    before = contents(written)
    with begin(written) as writer:
        assert writer.items_done == COUNT and writer.complete
        with pytest.raises(ValueError, match="is complete: nothing can be added"):
            writer.add({block: value[:1] for block, value in truth().items()}, captures()[:1])
    assert contents(written) == before


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"settings": SETTINGS | {"steps": (1, 2)}}, r"settings steps \[1, 4\] there, \[1, 2\] here"),
        ({"settings": {"model": "embedded"}}, r"settings steps \[1, 4\] there, 'missing' here"),
        ({"settings": SETTINGS | {"seed": None}}, "settings seed 'missing' there, None here"),
        ({"precision": "bfloat16"}, "precision 'float16' there, 'bfloat16' here"),
        ({"items_per_shard": 4}, "items_per_shard 3 there, 4 here"),
        ({"layout": LAYOUT | {"up.0": BlockShape((3,), 3)}}, r"layout of up.0 .*'width': 2.*'width': 3"),
        ({"layout": {"up.0": LAYOUT["up.0"]}}, "layout of down.2.1 .* here, layout of mid/attn"),
    ],
)
def test_other_settings_are_refused_with_what_differs(written, options, told):
    before = contents(written)
    with pytest.raises(ValueError, match=f"made with other settings .*{told}"):
        begin(written, **options)
    assert contents(written) == before


def test_two_writers_at_a_time_are_refused(tmp_path):
    with begin(tmp_path), pytest.raises(ValueError, match="is being written by another process"):
        begin(tmp_path)
    begin(tmp_path).close()


def test_an_error_in_the_background_is_raised(tmp_path, monkeypatch):
    def full(*args):
        raise OSError(28, "No space left on device")

    begin(tmp_path)._abandon(None)
    monkeypatch.setattr(writing, "write_json", full)
    for stop in (3, COUNT):
        with pytest.raises(OSError, match="No space left"):
            fill(tmp_path, step=3, stop=stop)
    with pytest.raises(KeyError) as caught, begin(tmp_path) as writer:
        writer.add({block: value[:3] for block, value in truth().items()}, captures()[:3])
        raise KeyError
    assert ["No space left" in note for note in caught.value.__notes__] == [True]
    assert len(store.open(tmp_path).items) == 0


def test_a_shard_is_on_the_disk_before_its_manifest_is(tmp_path, monkeypatch):
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
        if os.fstat(descriptor).st_size > shards.HEADER:
            raise OSError(5, "Input/output error")
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", failing)
    with pytest.raises(OSError, match="Input/output error"):
        fill(tmp_path, step=3, stop=3)
    assert manifests(tmp_path) == 0 and not store.open(tmp_path).complete


def test_nothing_is_added_after_a_write_that_failed(tmp_path, monkeypatch):
    part = {block: value[:4] for block, value in truth().items()}, captures()[:4]
    with begin(tmp_path) as writer:
        name = shards.data_file
        monkeypatch.setattr(writing, "data_file", lambda shard, block: name(shard, block) if not shard else "no/such")
        with pytest.raises(FileNotFoundError):
            writer.add(*part)
        with pytest.raises(ValueError, match="is closed"):
            writer.add(*part)
    assert not store.open(tmp_path).complete


def test_clearing_away_may_be_cut_off_too(written):
    """At any step of it, what is left is still gone on from."""
    index = json.loads((written / "index.json").read_text())
    del index["sha256"]
    whole = contents(written)
    for step in range(1, 100):
        (written / "index.json").write_text(json.dumps(shards.signed({**index, "items": None})))
        process = CHILDREN.Process(target=die_at, args=(written, COUNT, step, LAYOUT))
        process.start()
        process.join()
        found = store.open(written)
        assert len(found.items) in (9, 11)
        if process.exitcode == 0:
            break
    assert 9 < step < 99 and contents(written) == whole


# kills


def test_a_collection_killed_ten_times_ends_as_one_left_alone(tmp_path):
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


def test_a_collection_that_dies_at_any_step_ends_as_one_left_alone(tmp_path):
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


# what is wrong is named


def damage(url, name, change):
    """Change one file of a store, wherever it is; None deletes it."""
    system, path = fsspec.url_to_fs(f"{url}/{name}")
    data = system.cat_file(path)
    system.rm(path)
    if (changed := change(data)) is not None:
        system.pipe_file(path, changed)


FILES = ["index.json", "shard-00001.json", "shard-00003.json", "shard-00001.items.json",
         "shard-00000.mid_attn.safetensors", "shard-00003.down.2.1.safetensors"]  # fmt: skip


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("change", [lambda data: None, lambda data: data[:-2], lambda data: b""],
                         ids=["missing", "truncated", "emptied"])  # fmt: skip
def test_a_missing_or_truncated_file_is_named_when_a_store_is_opened(url, name, change):
    damage(url, name, change)
    with pytest.raises(ValueError, match=rf"{name} (is missing|is truncated|is foreign or cut short|was changed)"):
        store.open(url)


@pytest.mark.parametrize("name", ["shard-00001.json", "shard-00001.items.json", "shard-00000.mid_attn.safetensors"])
def test_nobody_goes_on_with_a_damaged_store(written, name):
    damage(written, name, lambda data: None)
    with pytest.raises(ValueError, match=f"{name} is missing"):
        begin(written)


@pytest.mark.parametrize("name", FILES)
def test_a_changed_byte_is_found(url, name, capsys):
    for place in (0, 40, -60, -2):

        def flip(data, place=place):
            data = bytearray(data)
            data[place] ^= 1
            return bytes(data)

        damage(url, name, flip)
        with pytest.raises(ValueError, match=name):
            store.open(url).verify()
        damage(url, name, flip)
    store.open(url).verify()


def test_every_changed_file_is_named_at_once(written):
    for name in FILES[-3:]:
        damage(written, name, lambda data: data[:-1] + bytes([data[-1] ^ 1]))
    with pytest.raises(ValueError, match=".*".join(sorted(FILES[-3:]))):
        store.open(written).verify()


@pytest.mark.parametrize("text", [b"[]", b'{"format": "other"}', b"\xff\xfe", b"{}"])
@pytest.mark.parametrize("name", FILES[:2])
def test_a_foreign_json_is_named(url, name, text):
    damage(url, name, lambda data: text)
    with pytest.raises(ValueError, match=f"{name} is foreign"):
        store.open(url)


@pytest.mark.parametrize("name", FILES[:2])
def test_a_newer_version_is_refused(written, name):
    record = json.loads((written / name).read_text()) | {"version": 2}
    (written / name).write_text(json.dumps(record))
    with pytest.raises(ValueError, match=f"{name} is of version 2, this lab reads 1"):
        store.open(written)
    with pytest.raises(ValueError, match=f"{name} is of version 2"):
        begin(written)


def test_a_shard_of_another_store_is_named(written, tmp_path):
    fill(tmp_path / "other", settings={"model": "another"})
    for path in (tmp_path / "other").glob("shard-00001.*"):
        shutil.copy(path, written)
    with pytest.raises(ValueError, match=r"shard-00001.json is foreign"):
        store.open(written)


def test_a_shard_in_anothers_place_is_named(written):
    for name in ("json", "items.json", "up.0.safetensors"):
        shutil.copy(written / f"shard-00000.{name}", written / f"shard-00001.{name}")
    with pytest.raises(ValueError, match=r"shard-00001.json is foreign"):
        store.open(written)


def test_data_of_another_shard_is_named_when_it_is_read(url):
    opened = store.open(url)
    system, path = fsspec.url_to_fs(url)
    system.pipe_file(f"{path}/shard-00001.up.0.safetensors", system.cat_file(f"{path}/shard-00000.up.0.safetensors"))
    with pytest.raises(ValueError, match=r"shard-00001.up.0.safetensors is foreign"):
        list(opened.batches("up.0", 4, seed=0))


@pytest.mark.parametrize(
    ("change", "told"), [(lambda data: None, "is missing"), (lambda data: data[:-1], "is truncated: 1 bytes")]
)
def test_a_file_that_goes_while_the_store_is_open_is_named(url, change, told):
    opened = store.open(url)
    damage(url, "shard-00003.up.0.safetensors", change)
    for read in (lambda: list(opened.batches("up.0", 4, seed=0)), lambda: opened.maps("up.0", [10])):
        with pytest.raises(ValueError, match=f"shard-00003.up.0.safetensors {told}"):
            read()


@pytest.mark.parametrize("text", [b"[]", b"[{}]]]", b""])
def test_items_that_change_while_the_store_is_open_are_named(url, text):
    opened = store.open(url)
    damage(url, "shard-00001.items.json", lambda data: text)
    assert opened.items[2] == captures()[2]
    with pytest.raises(ValueError, match=r"shard-00001.items.json was changed since it was written"):
        opened.describe("up.0", 10)


def test_a_shard_too_many_is_no_part_of_the_store(written):
    for number in (1, 2):
        for path in written.glob(f"shard-0000{number}.*"):
            path.unlink()
    with pytest.raises(ValueError, match=r"shard-00001.json is missing"):
        store.open(written)


@pytest.mark.parametrize("items", [9, 10, 12])
def test_an_index_that_tells_of_other_items_is_refused(written, items):
    index = json.loads((written / "index.json").read_text())
    del index["sha256"]
    (written / "index.json").write_text(json.dumps(shards.signed({**index, "items": items})))
    with pytest.raises(ValueError, match=rf"index.json tells of {items} items, but the 4 shards beside it hold 11"):
        store.open(written)


def test_shards_without_their_index_are_not_begun_anew(written):
    (written / "index.json").unlink()
    with pytest.raises(ValueError, match=r"index.json is missing, though there are shards"):
        begin(written)


@pytest.mark.parametrize("where", ["nowhere", "memory://nowhere"])
def test_no_store_at_all(tmp_path, where):
    where = where if "://" in where else str(tmp_path / where)
    with pytest.raises(ValueError, match=rf"{where}/index.json is missing"):
        store.open(where)


def test_stores_are_written_locally():
    with pytest.raises(ValueError, match=r"folder: 'memory://x' is not local"):
        begin("memory://x")


@pytest.mark.parametrize(
    ("options", "told"),
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
def test_a_store_that_cannot_be_is_refused(tmp_path, options, told):
    with pytest.raises(ValueError, match=told):
        begin(tmp_path, **options)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("shape", "told"), [(((0,), 3), "positions"), (((2,), 0), "width")])
def test_a_block_without_rows_is_refused(shape, told):
    with pytest.raises(ValueError, match=f"{told}: must be at least 1"):
        BlockShape(*shape)


def test_the_longest_name_of_a_block_fits(tmp_path):
    layout = {"\N{GRINNING FACE}" * shards.LONGEST: BlockShape((2,), 3)}
    opened = store.open(fill(tmp_path, truth(layout), layout=layout))
    assert torch.equal(opened.maps(next(iter(layout)), range(COUNT)), next(iter(truth(layout).values())))


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
    ("maps", "told"),
    [
        ({"down.2.1": truth()["down.2.1"][:2]}, "maps: blocks .* given, the layout has"),
        (wrong() | {"more": torch.ones(2)}, "maps: blocks .*more"),
        (wrong(to=lambda maps: maps[:1]), r"'down.2.1' is \(1, 2, 3, 4\) torch.float16, expected \(2, 2, 3, 4\)"),
        (wrong(to=lambda maps: maps.mT), r"'down.2.1' is \(2, 2, 4, 3\)"),
        (wrong(to=lambda maps: maps.int()), r"'down.2.1' is .*int32, expected .* of floats"),
        (wrong(to=put(float("nan"), 1, 0, 2, 1)), "'down.2.1' of item 5 has NaN or infinite numbers"),
        (wrong("up.0", to=put(float("-inf"), 0, 0, 1)), "'up.0' of item 4 has NaN or infinite numbers"),
        (
            wrong(to=put(-70000.0, 1, 1, 1, 1)),
            "'down.2.1' of item 5 has 70000, beyond the 65504 of float16: take bfloat16 or float32",
        ),
    ],
)
def test_maps_that_cannot_be_stored_are_refused_whole(tmp_path, maps, told):
    with begin(tmp_path) as writer:
        writer.add({block: value[:4] for block, value in truth().items()}, captures()[:4])
        with pytest.raises(ValueError, match=told):
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
    ("item", "told"),
    [
        ({"seed": 0, "timestep": 0}, "item 0 has no 'prompt' or 'image'"),
        ({"prompt": "", "timestep": 0}, "item 0 has no 'seed'"),
        ({"image": 3, "seed": 0}, "item 0 has no 'timestep'"),
        ({"image": 3, "seed": 0, "timestep": 0, "position": 1}, "item 0 has 'position'"),
        ({"image": 3, "seed": np.int64(0), "timestep": 0}, "item 0: must be plain JSON"),
        ({"image": 3, "seed": 0, "timestep": float("inf")}, "item 0: must be plain JSON"),
    ],
)
def test_an_item_that_says_too_little_is_refused(tmp_path, item, told):
    with begin(tmp_path) as writer, pytest.raises(ValueError, match=f"items: {told}"):
        writer.add({block: value[:1] for block, value in truth().items()}, [item])


@pytest.mark.parametrize(
    ("ask", "told"),
    [
        (lambda opened: opened.rows("down.2"), "block: unknown name 'down.2'; the nearest of 3: down.2.1"),
        (lambda opened: opened.batches("x", 1, seed=0), "block: unknown name 'x'"),
        (lambda opened: opened.shuffled("x", 1, seed=0), "block: unknown name 'x'"),
        (lambda opened: opened.batches("up.0", 0, seed=0), "batch_size: must be at least 1"),
        (lambda opened: opened.batches("up.0", 1, seed=-1), "seed: must be at least 0"),
        (lambda opened: opened.batches("up.0", 1, seed=0, epoch=-1), "epoch: must be at least 0"),
        (lambda opened: opened.batches("up.0", 1, seed=0, buffer_rows=0), "buffer_rows: must be at least 1"),
        (lambda opened: opened.shuffled("up.0", 0, seed=0), "batch_size: must be at least 1"),
        (lambda opened: opened.describe("up.0", 33), "row: 'up.0' has rows 0 to 32, got 33"),
        (lambda opened: opened.describe("up.0", -1), "row: 'up.0' has rows 0 to 32, got -1"),
        (lambda opened: opened.maps("up.0", [0, 11]), "items: there are items 0 to 10, got 11"),
    ],
)
def test_what_a_store_does_not_have_is_refused_at_once(written, ask, told):
    with pytest.raises(ValueError, match=told):
        ask(store.open(written))


# the plan


def test_a_plan_has_the_size_of_the_papers_collection():
    told = store.plan({"down.2.1": BlockShape((16, 16), 1280)}, 1_500_000, seconds_per_item=0.8)
    assert told.rows == {"down.2.1": 384_000_000} and told.bytes == {"down.2.1": 983_040_000_000}
    assert told.seconds == 1_200_000
    text = str(told)
    for part in ("1,500,000 items", "384,000,000 rows", "983 GB", "13 days, 21:20:00", "0.8 s an item"):
        assert part in text


@pytest.mark.parametrize("precision", ["float16", "bfloat16", "float32"])
def test_a_plan_is_what_is_then_written(tmp_path, precision):
    told = store.plan(LAYOUT, COUNT, precision)
    fill(tmp_path, truth(dtype=getattr(torch, precision)), precision=precision)
    sizes = {
        block: sum(path.stat().st_size - shards.HEADER for path in tmp_path.glob(f"*.{block.replace('/', '_')}.safe*"))
        for block in LAYOUT
    }
    assert told.bytes == sizes and told.total_bytes == sum(sizes.values())
    assert told.rows == {block: store.open(tmp_path).rows(block) for block in LAYOUT}
    assert told.seconds is None and "not known" in str(told)


def test_a_plan_says_whether_the_disk_has_room(tmp_path, monkeypatch):
    monkeypatch.setattr(planning.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 0, 4 * 10**8))
    layout = {"a": BlockShape((10, 10), 1000)}
    for count, verdict in ((1000, "enough"), (3000, "NOT ENOUGH")):
        told = str(store.plan(layout, count, folder=tmp_path / "not" / "there"))
        assert told.splitlines()[3].split() == ["free", "disk", "400", "MB", *verdict.split()]
    with pytest.raises(ValueError, match="items: must be at least 0"):
        store.plan(layout, -1)


# streaming


def numbered(sizes, width=3):
    """Chunks whose rows are numbered."""
    start = 0
    for size in sizes:
        yield torch.arange(start, start + size, dtype=torch.float64)[:, None].expand(size, width).clone()
        start += size


SIZES = [5, 1, 0, 13, 2, 40, 7]


@pytest.mark.parametrize("batch_size", [1, 4, 9, 100])
@pytest.mark.parametrize("buffer_rows", [1, 3, 10, 68, 1000])
def test_a_stream_gives_every_row_once(batch_size, buffer_rows):
    batches = list(store.shuffle_stream(numbered(SIZES), batch_size, buffer_rows=buffer_rows, seed=0))
    assert all(len(batch) == batch_size for batch in batches[:-1]) and 0 < len(batches[-1]) <= batch_size
    rows = torch.cat(batches)
    assert rows.dtype == torch.float32 and (rows == rows[:, :1]).all()
    assert sorted(rows[:, 0].tolist()) == list(range(sum(SIZES)))


def test_a_stream_is_fixed_by_its_seed():
    def order(seed):
        return torch.cat(list(store.shuffle_stream(numbered(SIZES), 7, buffer_rows=20, seed=seed)))[:, 0].tolist()

    assert order(0) == order(0) != order(1)


def test_a_stream_is_mixed_over_its_buffer():
    rows = torch.cat(list(store.shuffle_stream(numbered([100] * 40, 1), 50, buffer_rows=1000, seed=0)))[:, 0].numpy()
    assert abs(correlation(rows[:50])) < 0.3 and np.ptp(rows[:50]) > 700
    waits = np.argsort(rows) - np.arange(len(rows))
    assert waits.min() > -1101 and waits.std() > 500
    everything = torch.cat(list(store.shuffle_stream(numbered([100] * 40, 1), 50, buffer_rows=4000, seed=0)))
    assert abs(correlation(everything[:, 0].numpy())) < 0.05


def test_a_stream_holds_its_buffer_and_one_chunk():
    taken, given, chunks = 0, 0, []

    def watched():
        nonlocal taken
        for _ in range(30):
            assert all(chunk() is None for chunk in chunks), "a chunk was kept"
            assert taken - given <= 100 + 8, "more rows are held than buffer and batch"
            memory = np.zeros((20, 3))
            chunks.append(weakref.ref(memory))
            taken += 20
            chunk = torch.from_numpy(memory)
            del memory
            yield chunk
            del chunk

    for batch in store.shuffle_stream(watched(), 8, buffer_rows=100, seed=0):
        given += len(batch)
    assert given == taken == 600


def test_a_stream_asks_for_no_chunk_before_its_time():
    asked = []
    chunks = (asked.append(1) or chunk for chunk in numbered([20] * 30))
    stream = store.shuffle_stream(chunks, 8, buffer_rows=100, seed=0)
    assert not asked
    next(stream)
    assert len(asked) == 6


@pytest.mark.parametrize(
    ("chunks", "told"),
    [
        ([torch.ones(2, 3), torch.ones(2, 4)], r"chunk 1 is \(2, 4\) torch.float32, expected \(n, 3\)"),
        ([torch.ones(2, 3), torch.ones(2, 3).half()], r"chunk 1 is .*float16, expected .*float32"),
        ([torch.ones(2, 3, 4)], r"chunk 0 is \(2, 3, 4\) .* expected \(n, d\)"),
    ],
)
def test_a_chunk_of_another_kind_is_refused(chunks, told):
    with pytest.raises(ValueError, match=f"chunks: {told}"):
        list(store.shuffle_stream(chunks, 2, buffer_rows=1, seed=0))


@pytest.mark.parametrize("name", ["batch_size", "buffer_rows", "seed"])
def test_bad_number_of_a_stream_is_refused_at_once(name):
    options = {"batch_size": 1, "buffer_rows": 1, "seed": 0} | {name: -1}
    with pytest.raises(ValueError, match=f"{name}: must be at least"):
        store.shuffle_stream([], **options)


def test_gradients_do_not_pile_up_in_a_stream():
    chunks = (chunk.requires_grad_() for chunk in numbered([20, 20]))
    assert not any(batch.requires_grad for batch in store.shuffle_stream(chunks, 8, buffer_rows=10, seed=0))
