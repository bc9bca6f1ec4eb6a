from itertools import islice

import numpy as np
import pytest

from vaelab.training.batches import NumberedBatches, shuffled_batches


def rows_of(source, number, **place):
    return [list(rows) for rows, _ in islice(source(**place), number)]


def source(count, batch_size, seed=3, **options):
    return shuffled_batches(count, batch_size, seed, lambda rows, epoch: (rows, epoch), **options)


def test_numbered_batches_resume_and_take_turns_between_processes():
    numbers = NumberedBatches(lambda number: number)
    assert list(islice(numbers(), 6)) == [0, 1, 2, 3, 4, 5]
    assert list(islice(numbers(start=4), 2)) == [4, 5]
    assert list(islice(numbers(rank=1, world=2), 3)) == [1, 3, 5]
    assert list(islice(numbers(start=2, rank=1, world=2), 1)) == [5]


@pytest.mark.parametrize("remainder", ["drop", "wrap", "join"])
@pytest.mark.parametrize("start", [1, 2, 3, 7])
def test_a_resumed_source_gives_the_same_batches(remainder, start):
    whole = rows_of(source(10, 4, remainder=remainder), 10)
    assert rows_of(source(10, 4, remainder=remainder), 10 - start, start=start) == whole[start:]
    halves = [rows_of(source(10, 4, remainder=remainder), 5, rank=rank, world=2) for rank in range(2)]
    assert [rows for pair in zip(*halves, strict=True) for rows in pair] == whole


def test_what_happens_to_the_rows_that_fill_no_batch():
    first, second = (list(np.random.default_rng([3, epoch]).permutation(10)) for epoch in range(2))
    assert rows_of(source(10, 4), 3) == [first[:4], first[4:8], second[:4]]
    assert rows_of(source(10, 4, remainder="wrap"), 4) == [first[:4], first[4:8], first[8:] + first[:2], second[:4]]
    assert rows_of(source(10, 4, remainder="join"), 3) == [first[:4], first[4:8], first[8:] + second[:2]]
    assert [epoch for _, epoch in islice(source(10, 4)(), 5)] == [0, 0, 1, 1, 2]
    assert sorted(row for rows in rows_of(source(10, 5, remainder="join"), 2) for row in rows) == list(range(10))


def test_a_data_set_smaller_than_a_batch_is_repeated_within_it():
    (rows,) = rows_of(source(3, 7), 1)
    assert rows == (rows[:3] * 3)[:7]


@pytest.mark.parametrize(
    ("changes", "named"), [({"count": 0}, "count"), ({"batch_size": 0}, "batch_size"), ({"remainder": "keep"}, "remai")]
)
def test_bad_sizes_are_refused_by_name(changes, named):
    with pytest.raises(ValueError, match=named):
        source(**{"count": 4, "batch_size": 2, **changes})
