from itertools import islice

import numpy as np
import planted_pictures
import pytest
import torch

from vaelab import store
from vaelab.probing import dataset

TRUTH = planted_pictures.labels(10)


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    return planted_pictures.fill(tmp_path_factory.mktemp("features") / "stored", TRUTH, views=3)


def test_pictures_with_their_views_and_a_factors_classes(stored):
    found = dataset.load_examples(stored, "colour")
    assert len(found) == 10 and found.classes == ["red", "blue"]
    assert found.labels.tolist() == [one["colour"] for one in TRUTH]
    assert found.items == [[3 * i, 3 * i + 1, 3 * i + 2] for i in range(10)]
    assert dataset.load_examples(stored).labels.tolist() == [one["shape"] for one in TRUTH]
    with pytest.raises(ValueError, match=r"^factors: unknown name 'size'"):
        dataset.load_examples(stored, "size")


def test_vectors_and_batches_are_those_of_the_pictures_as_they_are(stored):
    found = dataset.load_examples(stored)
    expected = planted_pictures.planted_maps(TRUTH)
    vectors, labels = found.vectors("up.t25")
    np.testing.assert_allclose(vectors, expected.mean((1, 2)).numpy(), atol=1e-6)
    assert labels.tolist() == found.labels.tolist()
    batches = list(found.batches("up.t25.maps", 4))
    assert [len(batch["labels"]) for batch in batches] == [4, 4, 2]
    torch.testing.assert_close(torch.cat([batch["maps"] for batch in batches]), expected)
    assert torch.cat([batch["labels"] for batch in batches]).tolist() == labels.tolist()


def test_an_epoch_has_every_picture_in_one_of_its_views_and_can_be_taken_up_anywhere(stored):
    found = dataset.load_examples(stored)
    stream = found.shuffled("up.t25.maps", 4, seed=1)
    first = list(islice(stream(), 6))
    rows = stored.maps("up.t25.maps", range(30)).float()
    where = [[int((rows == one).flatten(1).all(1).nonzero()) for one in batch["maps"]] for batch in first]
    for epoch in (where[:3], where[3:]):
        pictures = [row // 3 for batch in epoch for row in batch]
        assert sorted(pictures[:10]) == list(range(10)) and pictures[10:] == pictures[:2]
    assert {row % 3 for batch in where for row in batch} == {0, 1, 2}
    assert where[0] != where[3]
    for batch, rows_of in zip(first, where, strict=True):
        assert batch["labels"].tolist() == [TRUTH[row // 3]["shape"] for row in rows_of]
    for one, other in zip(first[2:], stream(start=2), strict=False):
        assert torch.equal(one["maps"], other["maps"])
    ranks = [next(stream(rank=rank, world=2))["labels"] for rank in range(2)]
    assert torch.equal(torch.cat(ranks), torch.cat([batch["labels"] for batch in first[:2]]))


def test_maps_held_in_memory_are_those_of_the_store(stored, monkeypatch):
    found, layer = dataset.load_examples(stored).take(np.array([7, 2, 4])), "up.t25.maps"
    held = found.hold(layer)
    for one, other in zip(found.batches(layer, 2), held.batches(layer, 2), strict=True):
        assert torch.equal(one["maps"], other["maps"])
    for one, other in islice(zip(found.shuffled(layer, 2, 1)(), held.shuffled(layer, 2, 1)(), strict=True), 4):
        assert torch.equal(one["maps"], other["maps"])
    monkeypatch.setattr(dataset, "HELD_BYTES", 3 * 3 * 16 * planted_pictures.WIDTH * 4 - 1)
    assert list(held.held) == [layer] and not found.hold(layer).held


def test_vector_batches_are_of_the_pictures_as_they_are_each_once_a_pass(stored):
    found = dataset.load_examples(stored)
    whole = torch.from_numpy(found.vectors("up.t25")[0])
    stream = found.vector_batches(["up.t25"], 4, seed=3)
    drawn = torch.cat([batch["up.t25"] for batch in islice(stream(), 5)])
    where = [int((whole == row).all(1).nonzero()) for row in drawn]
    assert sorted(where[:10]) == sorted(where[10:]) == list(range(10)), "a view is no picture as it is"
    assert where[:10] != where[10:]
    assert torch.equal(next(stream(start=3))["up.t25"], drawn[12:16])
    ranks = [next(stream(start=1, rank=rank, world=2))["up.t25"] for rank in range(2)]
    assert torch.equal(torch.cat(ranks), drawn[8:16])
    longer = next(found.vector_batches(["up.t25"], 23, seed=3)())["up.t25"]
    assert torch.equal(longer[:20], drawn)
    with pytest.raises(ValueError, match=r"^layers: 'up.t25.maps' holds maps"):
        found.vector_batches(["up.t25.maps"], 4, seed=3)


def test_a_split_has_every_picture_on_one_side(stored):
    found = dataset.load_examples(stored)
    rest, share = found.split(0.3, seed=5)
    assert (len(rest), len(share)) == (7, 3)
    assert sorted(rest.items + share.items) == found.items
    assert [TRUTH[views[0] // 3]["shape"] for views in share.items] == share.labels.tolist()
    assert found.split(0.3, seed=5)[1].items == share.items != found.split(0.3, seed=6)[1].items
    for nothing in (0.0, 1.0, 0.01):
        with pytest.raises(ValueError, match="validation_share"):
            found.split(nothing, seed=0)


def test_labels_that_are_withheld_or_missing_are_refused(tmp_path):
    withheld = planted_pictures.fill(tmp_path / "withheld", [*TRUTH, {"shape": -1, "colour": 0}])
    with pytest.raises(ValueError, match=r"^split: 1 of 11 pictures have no label, first 10"):
        dataset.load_examples(withheld, "shape")
    assert len(dataset.load_examples(withheld, "colour")) == 11
    with store.create(tmp_path / "none", planted_pictures.LAYOUT):
        pass
    with pytest.raises(ValueError, match="have no labels"):
        dataset.load_examples(store.open(tmp_path / "none"))
