"""Statistics of features from one pass, against a plain computation over dense activations."""

import numpy as np
import pytest
import torch
from small_sae import FEATURES, D, shaken, vectors

from vaelab import store
from vaelab.sae import feature_statistics
from vaelab.sae.feature_statistics import FeatureStatistics, collect_statistics, feature_maps
from vaelab.sae.model import Codes
from vaelab.store.format import BlockShape

N, ITEMS, PLACES, K = 12, 40, 6, 3
PROMPTS = ["a red circle", "a blue square", "a red square, a blue ring", "Red!"]
WORDS = ["blue", "circle", "red", "square"]
RECORDS = [{"prompt": PROMPTS[i % 4], "timestep": [999.0, 499.0, 0.0][i % 3], "seed": i} for i in range(ITEMS)]


def random_codes(items=ITEMS, seed=0, n=N):
    """With ties, negative activations and inactive entries; the last feature is never active."""
    generator = torch.Generator().manual_seed(seed)
    indices = torch.stack([torch.randperm(n - 1, generator=generator)[:K] for _ in range(items * PLACES)])
    values = torch.randint(-1, 4, (items * PLACES, K), generator=generator).float()
    return Codes(values.view(items, PLACES, K), indices.view(items, PLACES, K))


def filled(codes, batch, records=RECORDS, **sizes):
    statistics = FeatureStatistics(N, K, words=WORDS, **sizes)
    for begin in range(0, len(codes.values), batch):
        end = begin + batch
        part = Codes(codes.values[begin:end], codes.indices[begin:end])
        statistics.add(part, range(begin, begin + len(part.values)), records[begin:end])
    return statistics


@pytest.mark.parametrize("batch", [1, 7, 40])
def test_statistics_are_those_of_a_plain_dense_computation(batch):
    codes = random_codes()
    found, dense = filled(codes, batch, top=5), codes.dense(N).double().numpy()  # (items, places, features)
    spatial = dense.mean(1)
    for feature in range(N):
        own, mean = dense[..., feature], spatial[:, feature]
        positive = own[own > 0]
        assert found.mean_activation()[feature] == pytest.approx(positive.mean() if len(positive) else 0)
        order = sorted((i for i in range(ITEMS) if mean[i] > 0), key=lambda i: (-mean[i], i))
        items, means = found.top_items(feature)
        assert (items, means) == (order[:5], pytest.approx([mean[i] for i in order[:5]]))
        whole, _ = found.sample_items(feature, 0, 1, ITEMS)
        assert sorted(whole) == sorted(order)
        for timestep, density, average in found.timestep_curve(feature).itertuples(index=False):
            at = own[[i for i in range(ITEMS) if RECORDS[i]["timestep"] == timestep]]
            assert density == pytest.approx((at != 0).mean())
            assert average == pytest.approx(at[at != 0].mean() if (at != 0).any() else 0)
        rows = dense.reshape(-1, N)[own.ravel() > 0]
        shares = {g: (rows[:, g] > 0).mean() for g in range(N) if g != feature and len(rows) and (rows[:, g] > 0).any()}
        table = found.co_active(feature, N)
        assert dict(zip(table["feature"], table["share"], strict=True)) == pytest.approx(shares)
        assert table["share"].is_monotonic_decreasing
        for row in found.by_word(feature).to_dict("records"):
            of = [i for i in range(ITEMS) if row["word"] in PROMPTS[i % 4].lower().replace(",", " ").strip("!").split()]
            assert row["items"] == len(of)
            assert row["active"] == pytest.approx((dense[of][..., feature] != 0).any(1).mean())
            assert row["mean"] == pytest.approx(mean[of].mean(), abs=1e-7)
            if mean.any():
                assert row["ratio"] == pytest.approx(mean[of].mean() / mean.mean(), rel=1e-5)
    assert found.timestep_curve(0)["timestep"].tolist() == [999, 499, 0]
    assert found.table()["mean_positive"].tolist() == found.mean_activation().tolist()


def test_quantiles_of_the_active_items_are_sampled():
    """Feature 0 has the mean i in item i, except that it is not active in item 0."""
    values = torch.arange(100.0)[:, None, None]
    codes = Codes(values, torch.zeros(100, 1, 1, dtype=torch.int64))
    records = [{}] * 100
    found = FeatureStatistics(2, 1)
    found.add(codes, range(100), records)
    assert found.sample_items(0, 0.95, 1, 10) == ([99, 98, 97, 96, 95], [99, 98, 97, 96, 95])
    tenths = [found.sample_items(0, low / 10, (low + 1) / 10, 99)[0] for low in range(10)]
    assert sorted(set().union(*tenths)) == list(range(1, 100)) and all(9 <= len(one) <= 11 for one in tenths)
    assert all(min(one) > max(other) - 2 for one, other in zip(tenths[1:], tenths, strict=False))
    few, again = (found.sample_items(0, 0, 1, 10, seed=s)[0] for s in (1, 2))
    assert len(few) == 10 and few == sorted(few, reverse=True) and few != again
    assert found.sample_items(1, 0, 1, 10) == ([], []) and found.sample_items(0, 0.99, 1, 5)[0] == [99]
    with pytest.raises(ValueError, match=r"^quantiles: expected"):
        found.sample_items(0, 0.5, 0.5, 3)


def test_a_small_sample_is_uniform_and_does_not_depend_on_the_batches():
    values = torch.arange(1.0, 4001.0)[:, None, None]
    found = [FeatureStatistics(1, 1, sample=400) for _ in range(2)]
    for statistics, batch in zip(found, (4000, 333), strict=True):
        for begin in range(0, 4000, batch):
            part = values[begin : begin + batch]
            codes = Codes(part, torch.zeros_like(part, dtype=torch.int64))
            statistics.add(codes, range(begin, begin + len(part)), [{}] * len(part))
    first, second = (one.sample_items(0, 0, 1, 400)[0] for one in found)
    assert first == second and len(set(first)) == 400
    # of 400 uniform draws 40 are in each tenth, give or take six
    assert np.abs(np.histogram(first, 10, (0, 4000))[0] - 40).max() < 20
    assert all(item > 3600 for item in found[0].sample_items(0, 0.95, 1, 20)[0])


def test_memory_does_not_grow_with_the_items():
    statistics, sizes = FeatureStatistics(N, K, words=WORDS, top=4, sample=5, rows=6), set()
    for number in range(4):
        statistics.add(random_codes(seed=number), range(ITEMS * number, ITEMS * (number + 1)), RECORDS)
        sizes.add(sum(value.numel() for value in statistics.state().values()))
    assert len(sizes) == 1 and statistics.item_count == 4 * ITEMS


def write(folder, count, *, complete=True):
    """A store of two blocks, whose odd items are those of the half without the prompt."""
    with store.create(folder, {"up": BlockShape((2, 2), D), "down": BlockShape((), D + 1)}, items_per_shard=8) as w:
        done = w.items_done
        maps = vectors(4 * count).view(count, 2, 2, D)[done:]
        items = [{**RECORDS[i % ITEMS], "guided": i % 2 == 0, "step": i // 2 % 4} for i in range(done, count)]
        w.add({"up": maps, "down": torch.zeros(len(maps), D + 1)}, items)
        if not complete:
            raise KeyboardInterrupt
    return store.open(folder)


def test_saved_statistics_are_read_and_only_new_shards_are_added(tmp_path, monkeypatch):
    sae, folder = shaken(), tmp_path / "sae"
    with pytest.raises(KeyboardInterrupt):
        write(tmp_path / "store", 24, complete=False)
    begun = collect_statistics(sae, store.open(tmp_path / "store"), "up", folder)
    assert begun.item_count == 12
    stored = write(tmp_path / "store", 40)
    read, maps = [], store.Store.maps

    def counted(self, block, items):
        read.extend(items)
        return maps(self, block, items)

    monkeypatch.setattr(store.Store, "maps", counted)
    grown = collect_statistics(sae, stored, "up", folder)
    assert read == list(range(24, 40, 2)) and grown.item_count == 20
    read.clear()
    again = collect_statistics(sae, stored, "up", folder)
    assert not read
    fresh = collect_statistics(sae, stored, "up")
    for name, value in fresh.state().items():
        if "with" not in name:  # the words are those of the first pass
            torch.testing.assert_close(grown.state()[name], value, rtol=1e-12, atol=1e-12)
        assert torch.equal(again.state()[name], grown.state()[name])
    read.clear()
    collect_statistics(shaken(seed=1), stored, "up", folder)
    assert read  # those of another autoencoder
    assert len(list(folder.glob("statistics-*.safetensors"))) == 2
    assert collect_statistics(sae, stored, "up", guided_only=False).item_count == 40
    assert collect_statistics(sae, stored, "up", folder, step=1).item_count == 5


def test_damaged_statistics_are_computed_again(tmp_path, capsys):
    sae, stored = shaken(), write(tmp_path / "store", 16)
    first = collect_statistics(sae, stored, "up", tmp_path)
    (path,) = tmp_path.glob("statistics-*.safetensors")
    path.write_bytes(path.read_bytes()[:-8] + bytes(8))
    second = collect_statistics(sae, stored, "up", tmp_path)
    assert "computed again: " in capsys.readouterr().out
    assert all(torch.equal(value, second.state()[name]) for name, value in first.state().items())


def test_maps_are_the_features_activations(tmp_path):
    sae, stored = shaken(), write(tmp_path / "store", 8)
    found = feature_maps(sae, stored, "up", [5, 2], [7, 0, 31])
    dense = sae.encode(stored.maps("up", [5, 2]).float()).dense(FEATURES)
    assert found.shape == (2, 3, 2, 2) and torch.equal(found, dense[..., [7, 0, 31]].permute(0, 3, 1, 2))
    assert dense.any()


def test_wrong_input_is_refused(tmp_path):
    sae, stored = shaken(), write(tmp_path / "store", 8)
    with pytest.raises(ValueError, match=r"vectors of 25 numbers; this autoencoder is for 24"):
        collect_statistics(sae, stored, "down")
    with pytest.raises(ValueError, match=r"^block: unknown name 'upp'"):
        collect_statistics(sae, stored, "upp")
    with pytest.raises(ValueError, match=rf"^feature: the autoencoder has features 0 to {FEATURES - 1}, got 256"):
        feature_maps(sae, stored, "up", [0], [256])
    found = filled(random_codes(), 40)
    found.require_feature(0)
    with pytest.raises(ValueError, match=r"^feature: up.1.0 has features 0 to 11, got 12"):
        found.require_feature(12, "up.1.0")
    with pytest.raises(ValueError, match=r"^feature: 11 of up.1.0 was never active"):
        found.require_feature(11, "up.1.0")


def test_the_most_frequent_words_are_counted(tmp_path):
    stored = write(tmp_path / "store", 40)
    assert feature_statistics.frequent_words(stored, count=2) == ["a", "red"]
