import numpy as np
import pytest
import torch

from vaelab import store
from vaelab.probing import purity
from vaelab.sae import top_activating
from vaelab.sae.model import SAE, Codes, SAEConfig
from vaelab.sae.top_activating import NO_ITEM, FeatureAccumulator, summarise_features
from vaelab.store.format import BlockShape

TOP = 3


def random_codes(items=23, places=4, k=3, n=12, seed=0):
    """With ties, negative activations and inactive entries; feature 11 is never active."""
    generator = torch.Generator().manual_seed(seed)
    indices = torch.stack([torch.randperm(n - 1, generator=generator)[:k] for _ in range(items * places)])
    values = torch.randint(-1, 4, (items * places, k), generator=generator).float()
    return Codes(values.view(items, places, k), indices.view(items, places, k))


def plainly(codes, n, top):
    """A feature's top items, by looking at every number."""
    dense = codes.dense(n)
    found = []
    for feature in range(n):
        best = []
        for item, places in enumerate(dense[..., feature].tolist()):
            active = [value for value in places if value]
            if active:
                best.append((-max(active), item, places.index(max(active))))
        found.append([(-value, item, place) for value, item, place in sorted(best)[:top]])
    return dense, found


@pytest.mark.parametrize("batch", [1, 5, 23])
def test_tops_and_statistics_are_those_of_a_plain_computation(batch):
    codes = random_codes()
    dense, expected = plainly(codes, 12, TOP)
    accumulator = FeatureAccumulator(12, TOP)
    for begin in range(0, 23, batch):
        part = Codes(codes.values[begin : begin + batch], codes.indices[begin : begin + batch])
        accumulator.add(part, range(100 + begin, 100 + min(begin + batch, 23)))
    found = accumulator.summary()
    for feature, best in enumerate(expected):
        rows = zip(found.values[feature].tolist(), found.items[feature].tolist(), found.positions[feature].tolist(),
                   strict=True)  # fmt: skip
        assert list(rows) == [(value, 100 + item, place) for value, item, place in best] + [(0, NO_ITEM, 0)] * (
            TOP - len(best)
        )
    flat = dense.flatten(0, 1).double()
    assert found.active_rows.tolist() == (flat != 0).sum(0).tolist()
    assert found.active_items.tolist() == (dense != 0).any(1).sum(0).tolist()
    torch.testing.assert_close(found.total, flat.sum(0))
    torch.testing.assert_close(found.squares, flat.square().sum(0))
    assert (found.item_count, found.row_count) == (23, 92)
    assert found.full().tolist() == [len(best) == TOP for best in expected] and not found.full()[11]


def test_the_table_describes_a_features_activations():
    codes = random_codes()
    accumulator = FeatureAccumulator(12, TOP)
    accumulator.add(codes, range(23))
    table, flat = accumulator.summary().table(), codes.dense(12).flatten(0, 1).double()
    for feature in (0, 5):
        active = flat[:, feature][flat[:, feature] != 0]
        row = table.iloc[feature]
        expected = (*(one.item() for one in (active.mean(), active.std(correction=0), active.max())), len(active) / 92)
        assert (row["mean"], row["deviation"], row["largest"], row["density"]) == pytest.approx(expected)
    assert table.iloc[11].drop("feature").tolist() == [0] * (5 + len(top_activating.QUANTILES))


@pytest.mark.parametrize("batch", [7, 400])
def test_quantiles_are_numpys_but_for_the_width_of_a_bin(batch):
    """Feature 0 spans nine decades, 1 has both signs, 2 is of one value, 3 has a single activation, 4 none."""
    rng = np.random.default_rng(0)
    planted = np.zeros((400, 5), dtype=np.float32)
    planted[:, 0] = 10 ** rng.uniform(-4.5, 4.5, 400)
    planted[:, 1] = rng.normal(0.5, 2, 400)
    planted[::3, 2] = 0.7
    planted[17, 3] = -3.3
    accumulator = FeatureAccumulator(5, TOP)
    for begin in range(0, 400, batch):
        values = torch.from_numpy(planted[begin : begin + batch])[:, None]
        accumulator.add(Codes(values, torch.arange(5).expand(len(values), 1, 5)), range(begin, begin + len(values)))
    found = accumulator.summary()
    for share in (0, 0.01, 0.25, 0.5, 0.9, 0.999, 1):
        seen = found.quantile(share)
        for feature in range(4):
            active = planted[:, feature][planted[:, feature] != 0]
            expected = float(np.quantile(active, share, method="inverted_cdf"))
            assert abs(seen[feature] - expected) <= abs(expected) / 16, (share, feature)
        assert seen[4] == 0
    table = found.table()
    assert table["median"].tolist() == found.quantile(0.5).tolist() and table["q99"][1] > table["upper_quartile"][1]
    with pytest.raises(ValueError, match=r"^share: must lie between 0 and 1"):
        found.quantile(1.1)


def test_bins_rise_with_the_values_and_hold_their_middles():
    middles = top_activating.bin_centres()
    assert (
        top_activating.histogram_bins(middles).tolist() == list(range(top_activating.BINS))
        and (middles.diff() > 0).all()
    )
    assert top_activating.histogram_bins(torch.tensor([2.0**-30, -(2.0**-30), 2.0**30, -(2.0**30)])).tolist() == [
        top_activating.BINS // 2, top_activating.BINS // 2 - 1, top_activating.BINS - 1, 0,
    ]  # fmt: skip


def test_the_most_active_features_are_those_of_the_largest_activations_in_enough_items():
    accumulator = FeatureAccumulator(4, top=2)
    values = torch.tensor([[1.0, 9.0, 3.0], [2.0, 0.0, 5.0]])[:, None]
    accumulator.add(Codes(values, torch.tensor([[0, 1, 2], [0, 1, 2]])[:, None]), [0, 1])
    found = accumulator.summary()
    assert found.most_active(10).tolist() == [2, 0]
    assert found.most_active(1).tolist() == [2]


def test_memory_does_not_grow_with_the_items():
    accumulator = FeatureAccumulator(12, TOP)
    sizes = set()
    for number in range(5):
        accumulator.add(random_codes(seed=number), range(23 * number, 23 * number + 23))
        held = [*vars(accumulator).values(), accumulator._best.keys, *accumulator._best.columns.values()]
        sizes.add(sum(value.numel() for value in held if isinstance(value, torch.Tensor)))
    assert len(sizes) == 1 and accumulator.summary().item_count == 115


def identity_sae(width, k):
    sae = SAE(SAEConfig(width, width, k))
    with torch.no_grad():
        for part in (sae.encoder, sae.decoder):
            part.copy_(torch.eye(width))
    return sae


@pytest.mark.parametrize("positions", [(), (2, 2)])
def test_planted_features_have_the_purity_they_were_made_with(tmp_path, positions):
    """Feature 0 is of class 0 alone, feature 1 of classes 1 and 2 alike, feature 2 of no class."""
    rng = np.random.default_rng(0)
    labels = np.repeat(np.arange(4), 15)
    order = rng.permutation(60)
    labels = labels[order]
    anywhere = rng.permutation(60)[:20]
    vectors = torch.zeros(60, 4)
    vectors[torch.from_numpy(np.flatnonzero(labels == 0)), 0] = torch.arange(15.0) + 1
    for c in (1, 2):
        vectors[torch.from_numpy(np.flatnonzero(labels == c)), 1] = torch.arange(15.0) + 1 + 0.5 * c
    vectors[torch.from_numpy(anywhere), 2] = torch.arange(20.0) + 1
    maps = torch.zeros(60, *positions, 4)
    (maps[:, 1, 0] if positions else maps)[:] = vectors
    items = [{"image": i, "seed": 0, "timestep": [25]} for i in range(60)]
    with store.create(tmp_path / "stored", {"up.t25": BlockShape(positions, 4)}, items_per_shard=16) as writer:
        writer.add({"up.t25": maps}, items)
    stored = store.open(tmp_path / "stored")
    found = summarise_features(identity_sae(4, 2), stored, "up.t25", batch_items=13)
    assert found.full().tolist() == [True, True, True, False]
    assert sorted(found.items[2].tolist()) == sorted(anywhere[10:].tolist())
    if positions:
        assert set(found.positions[:3].flatten().tolist()) == {2}
    expected = [(0.0, 1.0), (1.0, 0.5)]
    for feature, (entropy, majority) in enumerate(expected):
        one = purity.measure_purity(labels, found.items[[feature]].numpy(), permutations=200)
        assert (one.entropy, one.majority) == (entropy, majority) and one.permutation_p < 0.02
    assert purity.measure_purity(labels, found.items[[2]].numpy(), permutations=200).permutation_p > 0.05
    half = summarise_features(identity_sae(4, 2), stored, "up.t25", items=range(0, 60, 2), top=5)
    assert half.item_count == 30 and all(item % 2 == 0 for item in half.items[:3].flatten().tolist())


def test_wrong_input_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"^top: must be at least 1"):
        FeatureAccumulator(4, 0)
    assert top_activating.FeatureAccumulator(4, 2).summary().most_active(3).tolist() == []
