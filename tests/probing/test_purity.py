from collections import Counter
from math import log2

import numpy as np
import planted_pictures
import pytest
import torch

from vaelab.data.labelled import LabelledPictures
from vaelab.probing import dataset, purity
from vaelab.probing.purity import feature_pictures, purity_metrics, purity_table, sae_specs, top_features
from vaelab.sae import model, train
from vaelab.training.loop import TrainConfig

LABELS = np.repeat(np.arange(4), 15)
PURE = [list(range(15 * c, 15 * c + 10)) for c in range(4)]
MIXED = [list(range(15 * c + 10, 15 * c + 15)) + list(range(5)) for c in range(1, 4)]
RANDOM = np.random.default_rng(0).permutation(60).reshape(6, 10).tolist()


def plainly(top):
    """sigma_label, entropy and majority share by loops."""
    rows = []
    for pictures in top:
        classes = [int(LABELS[picture]) for picture in pictures]
        mean = sum(classes) / len(classes)
        sigma = (sum((one - mean) ** 2 for one in classes) / len(classes)) ** 0.5
        shares = [count / len(classes) for count in Counter(classes).values()]
        rows.append((sigma, -sum(share * log2(share) for share in shares), max(shares)))
    return [sum(column) / len(rows) for column in zip(*rows, strict=True)]


@pytest.mark.parametrize("top", [PURE, MIXED, RANDOM, PURE + MIXED + RANDOM])
def test_measures_are_those_of_a_plain_computation(top):
    found = purity.measure_purity(LABELS, np.array(top), permutations=20)
    assert found[:3] == pytest.approx(plainly(top), rel=1e-12, abs=1e-12)
    assert found.features == len(top)


def test_pure_mixed_and_random_features_are_told_apart():
    pure, mixed, random = (
        purity.measure_purity(LABELS, np.array(top), permutations=400) for top in (PURE, MIXED, RANDOM)
    )
    assert (pure.sigma_label, pure.entropy, pure.majority) == (0, 0, 1)
    assert (mixed.entropy, mixed.majority) == (1, 0.5)
    assert pure.permutation_p == mixed.permutation_p == 1 / 401
    assert random.permutation_p > 0.05
    for one in (pure, mixed, random):
        assert one.entropy_chance == pytest.approx(random.entropy, abs=0.15)
        assert one.majority_chance == pytest.approx(random.majority, abs=0.05)


def test_the_permutation_test_is_uniform_where_there_is_nothing_to_find():
    rng = np.random.default_rng(1)
    found = [
        purity.measure_purity(LABELS, rng.permutation(60)[:20].reshape(2, 10), permutations=39, seed=i).permutation_p
        for i in range(200)
    ]
    assert 0.4 < np.mean(found) < 0.62
    assert np.mean(np.array(found) <= 0.1) < 0.17


def test_nothing_but_sigma_label_changes_when_classes_are_renumbered():
    top = np.array(PURE[:1] + MIXED + RANDOM)
    before = purity.measure_purity(LABELS, top, permutations=50)
    after = purity.measure_purity(np.array([2, 0, 3, 1])[LABELS], top, permutations=50)
    for name in ("entropy", "majority", "permutation_p", "entropy_chance", "majority_chance"):
        assert getattr(before, name) == getattr(after, name), name
    assert abs(before.sigma_label - after.sigma_label) > 0.05


def test_wrong_input_is_refused():
    for labels, top in ((LABELS, np.array([[60]])), (LABELS, np.array([[-1]])), (LABELS - 1, np.array([[0]]))):
        with pytest.raises(ValueError, match=r"^top: expected picture numbers below 60 and labels from 0"):
            purity.measure_purity(labels, top)
    with pytest.raises(ValueError, match=r"^top: expected pictures"):
        purity.measure_purity(LABELS, np.empty((0, 10), int))


def test_other_numberings_of_the_classes_span_what_sigma_label_can_be():
    top = np.array(MIXED)
    low, high = purity.sigma_label_range(LABELS, top, times=200)
    assert low <= purity.measure_purity(LABELS, top, permutations=1).sigma_label <= high
    assert high - low > 0.2
    assert purity.sigma_label_range(LABELS, np.array(PURE)) == (0, 0)
    two = np.array([0, 1])[np.arange(60) % 2]
    assert np.ptp(purity.sigma_label_range(two, top)) == pytest.approx(0, abs=1e-12)


LAYER = "up.t25"


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    truth = planted_pictures.labels(60)
    return planted_pictures.fill(tmp_path_factory.mktemp("purity") / "stored", truth, views=2, noise=0.05)


@pytest.fixture(scope="module")
def by_factor(stored):
    return {factor: dataset.load_examples(stored, factor) for factor in planted_pictures.CLASSES}


@pytest.fixture(scope="module")
def found(stored, by_factor):
    config = TrainConfig(steps=150, learning_rate=1e-2, clip_norm=0.0, device="cpu", log_every=150)
    asked = sae_specs(stored.layout, [LAYER], 1, 2, seed=0, dead_after=10**9)
    batches = by_factor["shape"].vector_batches([LAYER], batch_size=60, seed=0)
    saes = train.train_saes(asked, batches, config).saes
    return {LAYER: top_features(saes[LAYER], by_factor["shape"], LAYER, top=8)}


def test_the_planted_factor_is_purer_than_chance_and_the_absent_one_is_not(found, by_factor):
    rows = purity_table(found, by_factor, permutations=200, seed=0).set_index("factor")
    assert rows.loc["shape", "permutation_p"] < 0.01 < rows.loc["colour", "permutation_p"]
    assert rows.loc["shape", "gain"] > 0.4 > 0.2 > rows.loc["colour", "gain"]
    for factor, row in rows.iterrows():
        labels = by_factor[factor].labels.numpy()
        expected = purity.measure_purity(labels, found[LAYER].pictures, permutations=200)
        assert row["entropy"] == expected.entropy and row["features"] == len(found[LAYER].features)
        assert row["sigma_label_low"] <= row["sigma_label"] + 1e-12 <= row["sigma_label_high"] + 2e-12


def test_pictures_are_numbered_as_the_examples_and_stand_for_the_picture_as_it_is(found, by_factor):
    one, shapes = found[LAYER], by_factor["shape"]
    items = one.summary.items[torch.from_numpy(one.features)].numpy()
    assert np.array_equal(2 * one.pictures, items), "of two views the first is item 2 i"
    assert one.pictures.shape[1] == 8 and len(one.features) == len(set(one.features.tolist()))
    assert one.summary.item_count == 60
    largest = one.summary.values[torch.from_numpy(one.features), 0]
    assert torch.equal(largest, largest.sort(descending=True).values)
    assert len(shapes) == 60


def test_metrics_have_the_names_that_were_promised(found, by_factor):
    rows = purity_table(found, by_factor, permutations=5, seed=0)
    named = purity_metrics(rows, "colour")
    assert named["up.t25.entropy"] == named["up.t25.colour.entropy"] != named["up.t25.shape.entropy"]
    assert {f"up.t25.{measure}" for measure in ("sigma_label", "entropy", "majority", "permutation_p")} < named.keys()
    assert len(named) == 12


def test_the_grid_shows_the_pictures_of_drawn_features(found, by_factor):
    one = found[LAYER]
    pictures = LabelledPictures("p", 8, {}, range(60), lambda image: (torch.full((3, 8, 8), float(image)), {}))
    rows = feature_pictures(one, pictures, by_factor["shape"], 2, seed=1)
    assert len(rows) == min(2, len(one.features))
    shown = {int(label.split()[1].strip(",")): made[:, 0, 0, 0].int().tolist() for label, made in rows.items()}
    for feature, images in shown.items():
        assert images == one.pictures[one.features.tolist().index(feature)].tolist()


def test_what_cannot_be_measured_is_refused(stored, by_factor):
    with pytest.raises(ValueError, match=r"^layers .*unknown name 'up.t26'"):
        sae_specs(stored.layout, ["up.t26"], 1, 2, seed=0)
    with pytest.raises(ValueError, match=r"^layers: 'up.t25.maps' holds maps"):
        sae_specs(stored.layout, ["up.t25.maps"], 1, 2, seed=0)
    asked = sae_specs(stored.layout, [LAYER], 1, 2, seed=0)[LAYER]
    untrained = model.SAE(asked.config)
    with pytest.raises(ValueError, match=r"^top: no feature of up.t25 is active on 61 of 60 pictures"):
        top_features(untrained, by_factor["shape"], LAYER, top=61)


def test_what_cannot_be_measured_is_refused_before_anything_is_trained(by_factor):
    layers = [LAYER, "up.t100"]
    purity.validate_selection(by_factor, "shape", layers, ["up.t100"], 60)
    for given, message in (
        (("size", layers, [], 1), "factor: unknown name 'size'"),
        (("shape", layers, ["up.t26"], 1), "shown_layers: unknown name 'up.t26'"),
        (("shape", layers, [], 61), "top: 61 pictures per feature, but the activations are of 60"),
    ):
        with pytest.raises(ValueError, match=f"^{message}"):
            purity.validate_selection(by_factor, *given)


def test_a_store_is_opened_with_its_factors_for_its_own_pictures_alone(stored):
    pictures = LabelledPictures("p", 8, planted_pictures.CLASSES, range(60), lambda image: None)
    with pytest.raises(ValueError, match=r"^activations: made with dataset None, here it is 'p'"):
        purity.open_features(stored.url, pictures, "planted")
    with pytest.raises(ValueError, match=r"^model: 'embedded', but activations was made with 'planted'"):
        purity.open_features(stored.url, pictures, "embedded")


def test_autoencoders_are_kept_under_their_layers(stored, tmp_path):
    asked = sae_specs(stored.layout, [LAYER], 2, 3, seed=1)[LAYER]
    sae = model.SAE(asked.config, asked.seed)
    purity.save_saes({LAYER: sae}, tmp_path)
    again = model.SAE.from_pretrained(tmp_path / LAYER)
    assert again.config == asked.config and torch.equal(again.encoder, sae.encoder)
