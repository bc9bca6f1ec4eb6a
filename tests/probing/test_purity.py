import numpy as np
import planted_pictures
import pytest
import torch

from vaelab import examples, label_purity, purity, sae_training
from vaelab.configs import TrainConfig
from vaelab.label_purity import grid, metrics, table, tops, wanted
from vaelab.labelled import Pictures

LAYER = "up.t25"


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
    truth = planted_pictures.labels(60)
    return planted_pictures.fill(tmp_path_factory.mktemp("purity") / "kept", truth, views=2, noise=0.05)


@pytest.fixture(scope="module")
def by_factor(kept):
    return {factor: examples.read(kept, factor) for factor in planted_pictures.CLASSES}


@pytest.fixture(scope="module")
def found(kept, by_factor):
    config = TrainConfig(steps=150, learning_rate=1e-2, clip_norm=0.0, device="cpu", log_every=150)
    asked = wanted(kept.layout, [LAYER], 1, 2, seed=0, dead_after=10**9)
    batches = by_factor["shape"].vector_batches([LAYER], batch_size=60, seed=0)
    saes = sae_training.train_saes(asked, batches, config).saes
    return {LAYER: tops(saes[LAYER], by_factor["shape"], LAYER, top=8)}


def test_the_planted_factor_is_purer_than_chance_and_the_absent_one_is_not(found, by_factor):
    rows = table(found, by_factor, permutations=200, seed=0).set_index("factor")
    assert rows.loc["shape", "permutation_p"] < 0.01 < rows.loc["colour", "permutation_p"]
    assert rows.loc["shape", "gain"] > 0.4 > 0.2 > rows.loc["colour", "gain"]
    for factor, row in rows.iterrows():
        labels = by_factor[factor].labels.numpy()
        expected = purity.measure(labels, found[LAYER].pictures, permutations=200)
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
    rows = table(found, by_factor, permutations=5, seed=0)
    named = metrics(rows, "colour")
    assert named["up.t25.entropy"] == named["up.t25.colour.entropy"] != named["up.t25.shape.entropy"]
    assert {f"up.t25.{measure}" for measure in ("sigma_label", "entropy", "majority", "permutation_p")} < named.keys()
    assert len(named) == 12


def test_the_grid_shows_the_pictures_of_drawn_features(found, by_factor):
    one = found[LAYER]
    pictures = Pictures("p", 8, {}, range(60), lambda image: (torch.full((3, 8, 8), float(image)), {}))
    rows = grid(one, pictures, by_factor["shape"], 2, seed=1)
    assert len(rows) == min(2, len(one.features))
    shown = {int(label.split()[1].strip(",")): made[:, 0, 0, 0].int().tolist() for label, made in rows.items()}
    for feature, images in shown.items():
        assert images == one.pictures[one.features.tolist().index(feature)].tolist()


def test_what_cannot_be_measured_is_refused(kept, by_factor):
    with pytest.raises(ValueError, match=r"^layers .*unknown name 'up.t26'"):
        wanted(kept.layout, ["up.t26"], 1, 2, seed=0)
    with pytest.raises(ValueError, match=r"^layers: 'up.t25.maps' holds maps"):
        wanted(kept.layout, ["up.t25.maps"], 1, 2, seed=0)
    asked = wanted(kept.layout, [LAYER], 1, 2, seed=0)[LAYER]
    untrained = label_purity.SAE(asked.config)
    with pytest.raises(ValueError, match="no feature is active in 61 of 60 pictures"):
        tops(untrained, by_factor["shape"], LAYER, top=61)


def test_what_cannot_be_measured_is_refused_before_anything_is_trained(by_factor):
    layers = [LAYER, "up.t100"]
    label_purity.refuse_nonsense(by_factor, "shape", layers, ["up.t100"], 60)
    for given, message in (
        (("size", layers, [], 1), "factor: unknown name 'size'"),
        (("shape", layers, ["up.t26"], 1), "shown_layers: unknown name 'up.t26'"),
        (("shape", layers, [], 61), "top: 61 pictures a feature, and the activations are of 60"),
    ):
        with pytest.raises(ValueError, match=f"^{message}"):
            label_purity.refuse_nonsense(by_factor, *given)


def test_a_store_is_opened_with_its_factors_for_its_own_pictures_alone(kept):
    pictures = Pictures("p", 8, planted_pictures.CLASSES, range(60), lambda image: None)
    with pytest.raises(ValueError, match=r"^activations: made with dataset None, here it is 'p'"):
        label_purity.opened(kept.url, pictures, "planted")
    with pytest.raises(ValueError, match=r"^activations: made with model 'planted', here it is 'embedded'"):
        label_purity.opened(kept.url, pictures, "embedded")


def test_autoencoders_are_kept_under_their_layers(kept, tmp_path):
    asked = wanted(kept.layout, [LAYER], 2, 3, seed=1)[LAYER]
    sae = label_purity.SAE(asked.config, asked.seed)
    label_purity.keep({LAYER: sae}, tmp_path)
    again = label_purity.SAE.from_pretrained(tmp_path / LAYER)
    assert again.config == asked.config and torch.equal(again.encoder, sae.encoder)
