"""Planted directions that a trained autoencoder finds and its controls do not; projections; matching; verdicts."""

import itertools

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.decomposition import PCA
from sklearn.linear_model import LogisticRegression

from vaelab.sae import controls, truth
from vaelab.sae.detection import Halves, LabelledVectors
from vaelab.sae.model import SAE, SAEConfig
from vaelab.training import TrainConfig

MAPS = torch.randn(40, 8, 8, 12, generator=torch.Generator().manual_seed(5))
PLAN = {"active": 1, "strength": 20.0, "scored": 10, "seed": 0}


def setting(**changes):
    train = TrainConfig(steps=120, learning_rate=0.02, schedule="linear", clip_norm=0.0, device="cpu", log_every=120)
    return truth.ComparisonSetting(**{
        "k": 1, "n_features": 48, "train": train, "batch_size": 128, "resamples": 50, "options": {"dead_after": 2000},
        **changes,
    })  # fmt: skip


def test_a_planted_dictionary_is_found_by_the_trained_autoencoder_and_by_no_control():
    compared = truth.compare(truth.plant(MAPS, 30, **PLAN), setting())
    table = compared.summary.table.set_index("method")
    assert set(table.index) == {*controls.AUTOENCODERS, "untrained", *controls.LINEAR, "everything"}
    assert table.loc["sae", "f1"] > 0.8
    for name in ("frozen_decoder", "frozen_encoder", "untrained", "neurons", "pca", "ica", "random"):
        assert table.loc[name, "ahead_low"] > 0.1, table["f1"]
    shown = truth.plant(MAPS, 30, **PLAN).reporting.labels.mean(0)
    assert table.loc["everything", "f1"] == pytest.approx((2 * shown / (1 + shown)).mean())
    assert table.loc["everything", "auroc"] == 0.5 and table.loc["everything", "sharing"] == 0
    assert compared.explained["sae"] > compared.explained["frozen_decoder"] > compared.explained["untrained"]
    with_level = pd.concat([compared.summary.table.assign(concepts_per_dimension=30 / 12)])
    assert truth.worth_from(with_level) == 30 / 12
    assert "ahead of neurons, PCA, ICA and a frozen decoder from 2.5" in truth.worth_sentence(with_level)


def test_what_is_planted_has_the_strength_asked_for_and_its_labels():
    halves = truth.plant(MAPS, 30, **{**PLAN, "active": 3, "scored": 30})
    added = torch.cat([half.vectors for half in halves]) - MAPS.flatten(1, 2)
    before, after = MAPS.flatten(0, 2).double(), added.flatten(0, 1).double()
    assert after.var(0).sum().item() == pytest.approx(20 * before.var(0).sum().item(), rel=1e-4)
    labels = np.concatenate([half.labels for half in halves])
    assert (labels.sum(1) == 3).all()
    left = torch.linalg.lstsq(torch.from_numpy(labels).double(), after).solution  # mean amount times direction
    rest = after - torch.from_numpy(labels).double() @ left
    assert rest.square().sum() < 0.15 * after.square().sum()
    assert truth.plant(MAPS, 30, **PLAN).choosing.covered.shape == (20, 64, 10)


def test_a_feature_that_finds_a_value_is_told_from_random_directions():
    generator = torch.Generator().manual_seed(0)
    shown = np.random.default_rng(0).random((2, 8, 16, 2)) < [0.2, 0.4]
    x = torch.randn(2, 8, 16, 12, generator=generator)
    x[..., 0] = torch.from_numpy(6.0 * shown[..., 0])
    sae = SAE(SAEConfig(12, 12, 1))
    with torch.no_grad():
        for weight in (sae.encoder, sae.decoder):
            weight.copy_(torch.eye(12))
    halves = Halves(*(LabelledVectors(a, b.astype(np.float32), ("red", "star")) for a, b in zip(x, shown, strict=True)))
    found = truth.features_against_truth(sae, halves).set_index("feature")
    assert found.loc[0, "value"] == "red" and found.loc[0, "f1"] > 0.95 > found.loc[0, "control"]
    noise = found.drop(index=0)
    assert (noise["f1"] < 0.6).all()


def test_a_projection_keeps_labels_and_is_orthonormal():
    halves = truth.plant(MAPS, 30, **PLAN)
    small, whole = truth.project(halves, 4, 0), truth.project(halves, 12, 0)
    assert small.choosing.vectors.shape == (20, 64, 4) and small.choosing.covered is halves.choosing.covered
    x, y = halves.reporting.flat[:50], whole.reporting.flat[:50]
    torch.testing.assert_close(x @ x.T, y @ y.T, rtol=1e-3, atol=1e-3)


def test_settings_that_cannot_be_used_are_refused():
    with pytest.raises(ValueError, match="planted: must be at least 3, got 2"):
        truth.validate_controls(12, [4, 2], 3, [])
    with pytest.raises(ValueError, match="dimensions: expected numbers from 1 to the vectors' width 12, got 13"):
        truth.validate_controls(12, [], 3, [12, 13])
    for wrong, message in (
        ({"seeds": ()}, "seeds: expected one or more"), ({"seeds": (1, 1)}, "seeds: expected one or more"),
        ({"k": 99}, "k: 99 active features of 48"), ({"variants": ("topkk",)}, "other_kinds: .*'topkk'"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            setting(**wrong)


def test_features_are_matched_one_to_one_with_the_largest_sum_of_cosines():
    config = SAEConfig(4, 5, 2)
    readouts = {
        name: [controls.SAEReadout(SAE(config, seed).eval()) for seed in seeds]
        for name, seeds in (("sae", (0, 1)), ("untrained", (2, 2)))
    }
    x = torch.randn(50, 4, generator=torch.Generator().manual_seed(0))
    found = truth.stability(readouts, x, np.arange(5) / 5)
    a, b = (each.directions.double().numpy() for each in readouts["sae"])
    best = max(itertools.permutations(range(5)), key=lambda order: sum((a @ b[list(order)].T).diagonal()))
    expected = (a @ b[list(best)].T).diagonal()
    assert found.matched == pytest.approx(expected.mean(), abs=1e-6) and found.untrained == pytest.approx(1, abs=1e-6)
    np.testing.assert_allclose(found.features["cosine"], expected[found.features["feature"]], atol=1e-6)
    ranks = found.features[["cosine", "gain"]].rank().corr().iloc[0, 1]
    assert found.correlation == pytest.approx(ranks)
    assert "gain" not in truth.stability(readouts, x).features
    with pytest.raises(ValueError, match="seeds: stability needs at least two, got 1"):
        truth.stability({name: own[:1] for name, own in readouts.items()}, x)


def test_linear_controls_equal_plain_computations():
    rng = np.random.default_rng(0)
    sources = rng.laplace(size=(3000, 3))
    mixing = np.array([[2.0, 1, 0], [0, 1, 1], [1, 0, 3]])
    x = sources @ mixing.T + 5
    labels = np.stack([sources[:, 0] > 1, sources[:, 2] > 0.5], 1)
    made = {
        name: own[0]
        for name, own in controls.linear_readouts(torch.tensor(x, dtype=torch.float32), labels, 7, 0).items()
    }
    assert list(made) == list(controls.LINEAR) and made["random"].directions.shape == (7, 3)
    torch.testing.assert_close(made["neurons"].scores(torch.tensor(x).float()), torch.tensor(x - x.mean(0)).float())
    components = PCA().fit(x).components_
    np.testing.assert_allclose(np.abs((made["pca"].directions.double().numpy() * components).sum(1)), 1, atol=1e-4)
    columns = mixing / np.linalg.norm(mixing, axis=0)
    assert np.abs(made["ica"].directions.double().numpy() @ columns).max(0).min() > 0.99
    unmixed = made["ica"].scores(torch.tensor(x).float()).numpy()
    assert np.abs(np.corrcoef(unmixed.T, sources.T)[:3, 3:]).max(0).min() > 0.99
    means = np.stack([x[shown].mean(0) - x[~shown].mean(0) for shown in labels.T])
    np.testing.assert_allclose(made["mean_difference"].weights.numpy(), means, rtol=1e-4)
    scale = x.std()
    probe = LogisticRegression(max_iter=1000, tol=1e-8).fit((x - x.mean(0)) / scale, labels[:, 1])
    np.testing.assert_allclose(made["probe"].weights[1].numpy(), probe.coef_[0] / scale, rtol=1e-2)


def test_the_verdict_names_what_the_autoencoder_is_not_ahead_of():
    def rows(block, **ahead):
        ends = {"sae": 0.0, **ahead}.items()
        return [
            {"block": block, "method": name, "f1": 0.5 - by, "ahead": by}
            | {"ahead_low": by - 0.01, "ahead_high": by + 0.01}
            for name, by in ends
        ]

    table = pd.DataFrame(
        rows("a", neurons=0.0, pca=0.2, ica=-0.1, frozen_decoder=0.1)
        + rows("b", neurons=-0.1, pca=0.2, ica=-0.1, frozen_decoder=0.1)
    )
    assert truth.verdict(table, "block") == (
        "The best single features of a trained autoencoder have a mean F1 of 0.50, those of ICA 0.60. The autoencoder "
        "is ahead of PCA and a frozen decoder in 2 of 2 blocks, of neurons and ICA in none; it is behind ICA in 2 and "
        "neurons in 1."
    )
    dense = table.assign(concepts_per_dimension=1.0)
    assert truth.worth_from(dense) is None and "at no number of concepts" in truth.worth_sentence(dense)


def test_the_interval_of_a_mean_over_blocks_is_that_of_the_resamples_mean():
    drawn = np.random.default_rng(0).random((2, 400))
    compared = {
        block: truth.Compared(truth.Summary(pd.DataFrame(), {"sae": own}), {}, {}, {})
        for block, own in zip("ab", drawn, strict=True)
    }
    assert truth.f1_interval(compared, "sae") == pytest.approx(np.quantile(drawn.mean(0), [0.025, 0.975]))
