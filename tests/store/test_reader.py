import json
import shutil
import threading
import weakref
from itertools import islice

import fsspec
import numpy as np
import pytest
import torch
from collecting import COUNT, LAYOUT, begin, captures, correlation, damage, fill, truth
from safetensors.torch import load_file

from vaelab import store
from vaelab.store import format, reader
from vaelab.store.format import BlockShape
from vaelab.store.reader import MAX_BUFFERS, BufferPool


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_pooled_memory_is_reused_once_nothing_refers_to_it(dtype):
    pool = BufferPool()
    first = pool.empty(5, 3, dtype)
    assert first.shape == (5, 3) and first.dtype == dtype
    place = first.data_ptr()
    assert pool.empty(5, 3, dtype).data_ptr() != place
    del first
    assert pool.empty(4, 3, dtype).data_ptr() == place
    assert pool.empty(4, 3, dtype).data_ptr() == place


def test_a_view_keeps_the_memory_of_its_tensor():
    pool = BufferPool()
    row = pool.empty(5, 3, torch.float32).fill_(7)[2].view(3, 1)
    for _ in range(2 * MAX_BUFFERS):
        pool.empty(5, 3, torch.float32).fill_(0)
    assert (row == 7).all()
    factor = torch.ones(3, 1, requires_grad=True)
    product = (factor * row).sum()
    del row  # from here on the graph alone needs it
    for _ in range(2 * MAX_BUFFERS):
        pool.empty(5, 3, torch.float32).fill_(0)
    product.backward()
    assert (factor.grad == 7).all()


def test_tensors_that_are_collected_do_not_share_memory():
    pool = BufferPool()
    all_of_them = [pool.empty(2, 2, torch.float32).fill_(i) for i in range(3 * MAX_BUFFERS)]
    assert [int(one[0, 0]) for one in all_of_them] == list(range(3 * MAX_BUFFERS))
    assert len(pool._blocks) == MAX_BUFFERS


def test_memory_that_is_too_small_is_not_reused_and_an_empty_tensor_takes_none():
    pool = BufferPool()
    pool.empty(2, 2, torch.float32)
    assert pool.empty(3, 2, torch.float32).shape == (3, 2)
    assert pool.empty(0, 8, torch.float32).shape == (0, 8) and len(pool._blocks) == 2


def test_items_are_indexed_and_sliced(url):
    items = store.open(url).items
    assert len(items) == COUNT
    assert items[-1] == captures()[-1] and items[2:9:3] == captures()[2:9:3]
    with pytest.raises(IndexError):
        items[COUNT]


@pytest.mark.parametrize("text", [b"[]", b"[{}]]]", b""])
def test_an_items_file_that_changes_while_the_store_is_open_is_named(url, text):
    opened = store.open(url)
    damage(url, "shard-00001.items.json", lambda data: text)
    assert opened.items[2] == captures()[2]
    with pytest.raises(ValueError, match=r"shard-00001.items.json was changed after it was written"):
        opened.describe("up.0", 10)


def flat(block):
    shape = LAYOUT[block]
    return truth()[block].reshape(-1, shape.width)


@pytest.mark.parametrize("precision", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("step", [1, 2, 5, 11])
def test_what_is_written_is_read_back_whatever_the_steps(tmp_path, precision, step):
    maps = truth(dtype=getattr(torch, precision))
    opened = reader.open(fill(tmp_path, maps, step=step, precision=precision))
    assert opened.complete and opened.precision == precision and opened.layout == LAYOUT
    assert opened.settings == {"model": "embedded", "steps": [1, 4]}
    assert list(opened.items) == captures()
    for block, value in maps.items():
        assert opened.rows(block) == value[..., 0].numel()
        got = opened.maps(block, range(COUNT))
        assert got.dtype == value.dtype and torch.equal(got, value)


def test_maps_are_in_the_order_of_the_items(url):
    opened = reader.open(url)
    for block, value in truth().items():
        assert torch.equal(opened.maps(block, [10, 0, 4, 4]), value[[10, 0, 4, 4]])
        assert opened.maps(block, []).shape == (0, *value.shape[1:])


def test_a_row_is_described_by_its_item_block_and_position(url):
    opened = reader.open(url)
    for block, shape in LAYOUT.items():
        for row in range(opened.rows(block)):
            expected = opened.describe(block, row)
            item = expected["seed"] // 7
            assert expected == {**captures()[item], "block": block, "position": expected["position"]}
            assert torch.equal(truth()[block][(item, *expected["position"])], flat(block)[row])
            assert len(expected["position"]) == len(shape.positions)


def test_data_files_are_ordinary_safetensors(written):
    for block, shape in LAYOUT.items():
        name = block.replace("/", "_")
        parts = [load_file(written / f"shard-{k:05d}.{name}.safetensors")["rows"] for k in range(4)]
        assert [len(part) // shape.count for part in parts] == [3, 3, 3, 2]
        assert torch.equal(torch.cat(parts), flat(block))


def test_numbers_of_any_dtype_are_stored_in_the_precision(tmp_path):
    maps = {block: value.double() + 1e-4 for block, value in truth().items()}
    maps["down.2.1"] = maps["down.2.1"].permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1).requires_grad_()
    opened = reader.open(fill(tmp_path, maps))
    for block, value in maps.items():
        assert torch.equal(opened.maps(block, range(COUNT)), value.half())


def test_a_store_without_an_item(tmp_path):
    with begin(tmp_path):
        pass
    opened = reader.open(tmp_path)
    assert opened.complete and opened.rows("up.0") == len(opened.items) == 0
    assert list(opened.batches("up.0", 4, seed=0)) == []
    with pytest.raises(ValueError, match=r"holds no row of 'up.0'"):
        opened.shuffled("up.0", 4, seed=0)


@pytest.mark.parametrize("form", ["file://{}/store", "zip://::{}/store.zip", "simplecache::file://{}/store"])
def test_a_store_is_read_from_any_url(written, form):
    shutil.make_archive(written, "zip", written)
    opened = reader.open(form.format(written.parent))
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
    opened, total = reader.open(url), len(flat(block))
    stream = opened.batches(block, batch_size, seed=3, buffer_rows=buffer_rows, with_rows=True)
    sizes, rows, numbers = gathered(stream)
    assert sizes == [batch_size] * (total // batch_size) + [total % batch_size] * (total % batch_size > 0)
    assert sorted(numbers.tolist()) == list(range(total))
    assert rows.dtype == torch.float32 and torch.equal(rows, flat(block)[numbers].float())


def test_the_order_is_fixed_by_seed_and_epoch_alone(url, written):
    def order(seed=0, epoch=0, batch_size=5, where=url):
        stream = reader.open(where).batches(
            "down.2.1", batch_size, seed, epoch=epoch, buffer_rows=40, with_rows=True, dtype=torch.float16
        )
        return gathered(stream)[2].tolist()

    first = order()
    assert first == order() == order(where=str(written))
    halves = order(batch_size=10)
    assert [set(halves[i : i + 10]) for i in (0, 10, 20)] == [set(first[i : i + 10]) for i in (0, 10, 20)]
    assert len({tuple(order(seed, epoch)) for seed in (0, 1) for epoch in (0, 1)}) == 4
    assert first != list(range(len(first)))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64, None])
def test_batches_have_the_given_dtype_or_the_stored_one(written, dtype):
    (batch,) = reader.open(written).batches("up.0", 100, seed=0, dtype=dtype)
    assert batch.dtype == (dtype or torch.float16)


def test_rows_of_a_group_are_really_mixed(tmp_path):
    layout = {"a": BlockShape((4, 4), 1)}
    fill(tmp_path, truth(layout, 320), layout=layout, items_per_shard=20, step=40)
    opened = reader.open(tmp_path)
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


def rows_of(stream, count):
    return [batch.tolist() for batch in islice(stream, count)]


@pytest.mark.parametrize("batch_size", [1, 4, 9, 70, 150])
def test_shuffled_is_pass_after_pass_without_a_gap(url, batch_size):
    opened = reader.open(url)
    stream = opened.shuffled("down.2.1", batch_size, seed=5, buffer_rows=30)()
    got = torch.cat([next(stream) for _ in range(-(-4 * 66 // batch_size))])
    one_by_one = [opened.batches("down.2.1", 1, seed=5, epoch=e, buffer_rows=30) for e in range(4)]
    expected = torch.cat([row for each in one_by_one for row in each])
    for place in range(0, 4 * 66 - batch_size, batch_size):
        batch, same = (sorted(rows[place : place + batch_size].tolist()) for rows in (got, expected))
        assert batch == same


@pytest.mark.parametrize("start", [0, 1, 6, 25])
@pytest.mark.parametrize("world", [1, 2, 3])
def test_shuffled_batches_resume_anywhere_and_are_shared_by_ranks(url, start, world):
    make = reader.open(url).shuffled("down.2.1", 4, seed=1, buffer_rows=30)
    alone = rows_of(make(), (start + 9) * world)
    for rank in range(world):
        assert rows_of(make(start=start, rank=rank, world=world), 9) == alone[start * world + rank :: world][:9]


def test_resuming_far_on_reads_no_more_than_two_groups(written, monkeypatch):
    read = []
    rows = format.map_rows
    monkeypatch.setattr(reader, "map_rows", lambda *args: (read.append(args[3]), rows(*args))[1])
    stream = reader.open(written).shuffled("down.2.1", 6, seed=0, buffer_rows=1)(start=10**6)
    next(stream)
    stream.close()
    assert len(read) == 2


def test_a_group_is_freed_when_it_has_been_given_out(written, monkeypatch):
    alive, most = weakref.WeakSet(), []
    group = reader.Store._group

    def watched(self, *args):
        parts, order = group(self, *args)
        alive.update(parts)
        most.append(len(alive))
        return parts, order

    monkeypatch.setattr(reader.Store, "_group", watched)
    assert sum(map(len, reader.open(written).batches("down.2.1", 5, seed=0, buffer_rows=1))) == 66
    assert len(most) == 4 and max(most) <= 2
    assert not alive


def test_training_on_a_store_resumes_from_a_checkpoint(written, tmp_path):
    from vaelab.training.loop import TrainConfig, train

    class Mean(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.mean = torch.nn.Parameter(torch.zeros(4))

        def forward(self, batch):
            return {"loss": (batch - self.mean).square().mean()}

    batches = reader.open(written).shuffled("down.2.1", 8, seed=0)
    once, twice, config = Mean(), Mean(), TrainConfig(steps=12, device="cpu", checkpoint_every=5)
    train(once, batches, config)

    def stops(**options):
        return islice(batches(**options), 7)

    with pytest.raises(StopIteration):
        train(twice, stops, config, folder=tmp_path)
    assert train(twice, batches, config, folder=tmp_path).resumed_at == 5
    assert torch.equal(once.mean, twice.mean)


# damage

FILES = ["index.json", "shard-00001.json", "shard-00003.json", "shard-00001.items.json",
         "shard-00000.mid_attn.safetensors", "shard-00003.down.2.1.safetensors"]  # fmt: skip


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("change", [lambda data: None, lambda data: data[:-2], lambda data: b""],
                         ids=["missing", "truncated", "emptied"])  # fmt: skip
def test_a_missing_or_truncated_file_is_named_when_a_store_is_opened(url, name, change):
    damage(url, name, change)
    with pytest.raises(ValueError, match=rf"{name} (is missing|is truncated|is foreign or truncated|was changed)"):
        reader.open(url)


@pytest.mark.parametrize("name", ["shard-00001.json", "shard-00001.items.json", "shard-00000.mid_attn.safetensors"])
def test_a_damaged_store_is_not_resumed(written, name):
    damage(written, name, lambda data: None)
    with pytest.raises(ValueError, match=f"{name} is missing"):
        begin(written)


@pytest.mark.parametrize("name", FILES)
def test_verify_finds_a_changed_byte(url, name, capsys):
    for place in (0, 40, -60, -2):
        damage(url, name, lambda data, place=place: flip(data, place))
        with pytest.raises(ValueError, match=name):
            reader.open(url).verify()
        damage(url, name, lambda data, place=place: flip(data, place))
    reader.open(url).verify()


def flip(data, place):
    data = bytearray(data)
    data[place] ^= 1
    return bytes(data)


@pytest.mark.parametrize("place", [format.HEADER_BYTES, -40, -1])
def test_a_changed_byte_of_the_rows_is_found_when_they_are_read(url, place):
    damage(url, "shard-00001.down.2.1.safetensors", lambda data: flip(data, place))
    message = r"shard-00001.down.2.1.safetensors was changed after it was written"
    with pytest.raises(ValueError, match=message):
        list(reader.open(url).batches("down.2.1", 7, seed=0, buffer_rows=30))
    with pytest.raises(ValueError, match=message):
        next(reader.open(url).shuffled("down.2.1", 66, seed=0)())
    opened = reader.open(url)
    assert opened.maps("down.2.1", [0, 1, 2, 4]).shape[0] == 4  # a third of the damaged shard is not checked
    if opened._folder.local:
        with pytest.raises(ValueError, match=message):
            opened.maps("down.2.1", [3, 4])
    list(opened.batches("up.0", 7, seed=0))


@pytest.mark.parametrize("place", [3, 40, -5])
def test_a_changed_byte_of_the_items_is_found_when_they_are_read(url, place):
    damage(url, "shard-00001.items.json", lambda data: flip(data, place))
    opened = reader.open(url)
    assert opened.items[2] == captures()[2]
    with pytest.raises(ValueError, match=r"shard-00001.items.json was changed after it was written"):
        opened.items[3]


def test_a_data_file_is_compared_with_its_checksum_once(written, monkeypatch):
    opened, checked = reader.open(written), []
    xxh3_128 = reader.xxhash.xxh3_128
    monkeypatch.setattr(reader.xxhash, "xxh3_128", lambda data: (checked.append(1), xxh3_128(data))[1])
    for epoch in range(3):
        list(opened.batches("down.2.1", 7, seed=0, epoch=epoch))
    opened.maps("down.2.1", range(COUNT))
    assert len(checked) == 4


def test_every_changed_file_is_named_at_once(written):
    for name in FILES[-3:]:
        damage(written, name, lambda data: data[:-1] + bytes([data[-1] ^ 1]))
    with pytest.raises(ValueError, match=".*".join(sorted(FILES[-3:]))):
        reader.open(written).verify()


@pytest.mark.parametrize("text", [b"[]", b'{"format": "other"}', b"\xff\xfe", b"{}"])
@pytest.mark.parametrize("name", FILES[:2])
def test_a_foreign_json_is_named(url, name, text):
    damage(url, name, lambda data: text)
    with pytest.raises(ValueError, match=f"{name} is foreign"):
        reader.open(url)


@pytest.mark.parametrize("name", FILES[:2])
def test_a_newer_version_is_refused(written, name):
    record = json.loads((written / name).read_text()) | {"version": 2}
    (written / name).write_text(json.dumps(record))
    with pytest.raises(ValueError, match=f"{name} has version 2, and this lab reads version 1"):
        reader.open(written)
    with pytest.raises(ValueError, match=f"{name} has version 2"):
        begin(written)


def test_a_shard_of_another_store_is_named(written, tmp_path):
    fill(tmp_path / "other", settings={"model": "another"})
    for path in (tmp_path / "other").glob("shard-00001.*"):
        shutil.copy(path, written)
    with pytest.raises(ValueError, match=r"shard-00001.json is foreign"):
        reader.open(written)


def test_a_shard_in_the_place_of_another_is_named(written):
    for name in ("json", "items.json", "up.0.safetensors"):
        shutil.copy(written / f"shard-00000.{name}", written / f"shard-00001.{name}")
    with pytest.raises(ValueError, match=r"shard-00001.json is foreign"):
        reader.open(written)


def test_data_of_another_shard_is_named_when_it_is_read(url):
    opened = reader.open(url)
    system, path = fsspec.url_to_fs(url)
    system.pipe_file(f"{path}/shard-00001.up.0.safetensors", system.cat_file(f"{path}/shard-00000.up.0.safetensors"))
    with pytest.raises(ValueError, match=r"shard-00001.up.0.safetensors is foreign"):
        list(opened.batches("up.0", 4, seed=0))


@pytest.mark.parametrize(
    ("change", "expected"), [(lambda data: None, "is missing"), (lambda data: data[:-1], "is truncated: 1 bytes")]
)
def test_a_file_that_disappears_while_the_store_is_open_is_named(url, change, expected):
    opened = reader.open(url)
    damage(url, "shard-00003.up.0.safetensors", change)
    for read in (lambda: list(opened.batches("up.0", 4, seed=0)), lambda: opened.maps("up.0", [10])):
        with pytest.raises(ValueError, match=f"shard-00003.up.0.safetensors {expected}"):
            read()


def test_a_shard_after_a_gap_is_refused(written):
    for number in (1, 2):
        for path in written.glob(f"shard-0000{number}.*"):
            path.unlink()
    with pytest.raises(ValueError, match=r"shard-00001.json is missing"):
        reader.open(written)


@pytest.mark.parametrize("items", [9, 10, 12])
def test_an_index_with_another_number_of_items_is_refused(written, items):
    index = json.loads((written / "index.json").read_text())
    del index["sha256"]
    (written / "index.json").write_text(json.dumps(format.with_checksum({**index, "items": items})))
    with pytest.raises(ValueError, match=rf"index.json lists {items} items, but its 4 shards hold 11"):
        reader.open(written)


@pytest.mark.parametrize("where", ["nowhere", "memory://nowhere"])
def test_a_folder_without_a_store_is_refused(tmp_path, where):
    where = where if "://" in where else str(tmp_path / where)
    with pytest.raises(ValueError, match=rf"{where}/index.json is missing"):
        reader.open(where)


def test_an_error_begins_with_the_parameter_that_named_the_store(written, tmp_path):
    with pytest.raises(
        ValueError, match=r"^activations: .* is not a readable store .*index.json is missing.* a finished run"
    ):
        reader.open(tmp_path, parameter="activations")
    assert len(reader.open(written, parameter="activations").items) == COUNT


@pytest.mark.parametrize(("shape", "expected"), [(((0,), 3), "positions"), (((2,), 0), "width")])
def test_a_block_without_rows_is_refused(shape, expected):
    with pytest.raises(ValueError, match=f"{expected}: must be at least 1"):
        BlockShape(*shape)


def test_the_longest_name_of_a_block_fits(tmp_path):
    layout = {"\N{GRINNING FACE}" * format.MAX_NAME_LENGTH: BlockShape((2,), 3)}
    opened = reader.open(fill(tmp_path, truth(layout), layout=layout))
    assert torch.equal(opened.maps(next(iter(layout)), range(COUNT)), next(iter(truth(layout).values())))


@pytest.mark.parametrize(
    ("ask", "expected"),
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
def test_unknown_names_and_numbers_out_of_range_are_refused_at_once(written, ask, expected):
    with pytest.raises(ValueError, match=expected):
        ask(reader.open(written))


def test_the_files_of_a_group_are_compared_with_their_checksums_at_the_same_time(tmp_path, monkeypatch):
    fill(tmp_path)
    two, compare = threading.Barrier(2, timeout=30), store.Store._check

    def together(self, block, shard, rows):
        if shard < 2:
            two.wait()
        compare(self, block, shard, rows)

    monkeypatch.setattr(store.Store, "_check", together)
    assert sum(len(batch) for batch in store.open(tmp_path).batches(next(iter(LAYOUT)), 5, seed=0)) > 0
