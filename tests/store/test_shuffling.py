import weakref

import numpy as np
import pytest
import torch
from collecting import correlation

from vaelab import store
from vaelab.store.shuffling import ShuffledOrder


def test_every_group_of_every_pass_has_an_order_of_its_own():
    order = ShuffledOrder([50] * 6, buffer_rows=100, seed=0)
    groups = [(number, group) for number in range(3) for group in range(3)]
    assert len({tuple(order.permutation(group).tolist()) for group in groups}) == 9
    passes = [[shard for group in range(3) for shard in order.shards((number, group))] for number in range(3)]
    assert len(set(map(tuple, passes))) == 3 and all(sorted(shards) == list(range(6)) for shards in passes)


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
