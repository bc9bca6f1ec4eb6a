"""Every score against a plain float64 computation of its formula, on features that are known to show a concept."""

import numpy as np
import pytest
import torch
from sklearn.metrics import jaccard_score, roc_auc_score

from vaelab import world
from vaelab.sae import detection
from vaelab.sae.controls import LinearReadout, SAEReadout
from vaelab.sae.model import SAE, SAEConfig

SCENES, PATCHES, D = 12, 16, 5


def halves(seed=0):
    """Three concepts; neuron 2 shows the second one, neuron 4 the absence of the third."""
    rng = np.random.default_rng(seed)
    covered = rng.random((SCENES, PATCHES, 3), np.float32) ** 3
    covered[:, 8:, 0] = 0
    covered[::3, :, 1] = 0
    x = rng.normal(size=(SCENES, PATCHES, D)).round(1).astype(np.float32)
    x[..., 2] += 4 * (covered[..., 1] >= 0.5)
    x[..., 4] -= 4 * (covered[..., 2] >= 0.5)
    return detection.split_halves(torch.from_numpy(x), covered, ("a", "b", "c"))


NEURONS = LinearReadout(torch.eye(D), torch.zeros(D))


def f1_score(shown, found):
    return float(2 * (found & shown).sum() / (found.sum() + shown.sum()))


def plain_f1(scores, shown):
    """The best F1 and its threshold by trying every score as a threshold."""
    tried = {t: f1_score(shown, scores >= t) for t in np.unique(scores)}
    best = max(tried, key=tried.get)
    return tried[best], best


@pytest.mark.parametrize("signed", [False, True])
def test_best_f1_and_auroc_equal_a_search_over_all_thresholds(signed):
    part = halves().choosing
    scores, labels = part.flat.numpy().clip(0), part.labels
    f1, auroc = detection.best_f1(scores, labels, signed=signed)
    columns = np.concatenate([scores, -scores], 1) if signed else scores
    assert f1.shape == auroc.shape == (3, columns.shape[1])
    for v, f in np.ndindex(*f1.shape):
        expected, _ = plain_f1(columns[:, f], labels[:, v])
        assert f1[v, f] == pytest.approx(expected, abs=1e-12)
        assert auroc[v, f] == pytest.approx(roc_auc_score(labels[:, v], columns[:, f]), abs=1e-12)
        chosen = detection.best_threshold(columns[:, f], labels[:, v])
        assert f1_score(labels[:, v], columns[:, f] >= chosen) == pytest.approx(expected, abs=1e-12)


def test_features_are_chosen_on_one_half_and_scored_on_the_other():
    first, second = halves()
    found = detection.detect(NEURONS, halves())
    table = found.table.set_index("concept")
    assert (table.loc["b", "feature"], table.loc["b", "sign"]) == (2, 1)
    assert (table.loc["c", "feature"], table.loc["c", "sign"]) == (4, -1)
    assert table.loc[["b", "c"], "f1"].min() > 0.9 and table.loc["a", "f1"] < 0.7
    for v, row in enumerate(found.table.to_dict("records")):
        one, two = (row["sign"] * part.flat[:, row["feature"]].numpy() for part in (first, second))
        expected, threshold = plain_f1(one, first.labels[:, v])
        assert row["chosen_f1"] == pytest.approx(expected) and row["threshold"] == pytest.approx(threshold)
        assert row["f1"] == pytest.approx(f1_score(second.labels[:, v], two >= threshold))
        overlaps = []
        for scene in range(len(second.vectors)):
            at = two.reshape(-1, PATCHES)[scene] >= threshold
            mask = second.covered[scene, :, v].astype(float)
            if mask.any():
                overlaps.append((at * mask).sum() / (at.sum() + mask.sum() - (at * mask).sum()))
        assert row["iou"] == pytest.approx(np.mean(overlaps))
    share = first.labels.mean(0)
    gains = [
        max(plain_f1(sign * first.flat[:, f].numpy(), first.labels[:, v])[0] - 2 * share[v] / (1 + share[v])
            for v in range(3) for sign in (1, -1))
        for f in range(D)
    ]  # fmt: skip
    np.testing.assert_allclose(found.feature_gain, gains, atol=1e-12)
    assert table.loc["b", "sharing"] == 1


def test_auroc_is_that_of_the_feature_with_the_best_auroc_in_the_first_half():
    first, second = halves()
    table = detection.detect(NEURONS, halves()).table
    for v, value in enumerate(table["auroc"]):
        candidates = [(sign, f) for sign in (1, -1) for f in range(D)]
        areas = [roc_auc_score(first.labels[:, v], sign * first.flat[:, f]) for sign, f in candidates]
        sign, f = candidates[int(np.argmax(areas))]
        assert value == pytest.approx(roc_auc_score(second.labels[:, v], sign * second.flat[:, f]))


def test_a_picture_is_scored_by_the_maximum_or_the_mean_over_its_patches():
    first, second = halves()
    row = detection.detect(NEURONS, halves()).table.set_index("concept").loc["b"]
    shown = [(part.covered[..., 1] > 0).any(1) for part in (first, second)]
    pooled = [
        np.concatenate([sign * each for sign in (1, -1) for each in (x.max(1) if sign > 0 else x.min(1), x.mean(1))], 1)
        for x in (part.vectors.numpy() for part in (first, second))
    ]
    best = [plain_f1(column, shown[0]) for column in pooled[0].T]
    top = max(f1 for f1, _ in best)
    later = {
        round(f1_score(shown[1], column >= threshold), 12)
        for (f1, threshold), column in zip(best, pooled[1].T, strict=True)
        if f1 == top
    }
    assert round(row["picture_f1"], 12) in later


def test_the_interval_holds_the_value_and_resamples_scenes():
    found = {"sae": [detection.detect(NEURONS, halves())], "shuffled": [detection.detect(NEURONS, halves(1))]}
    summary = detection.summarise(found, resamples=200)
    row = summary.table.set_index("method").loc["sae"]
    assert row["f1_low"] < row["f1"] < row["f1_high"] and row["ahead"] == row["ahead_low"] == 0
    assert row["f1"] == pytest.approx(found["sae"][0].table["f1"].mean())
    assert row["coverage"] == pytest.approx((found["sae"][0].table["f1"] > 0.8).mean())
    other = summary.table.set_index("method").loc["shuffled"]
    assert other["ahead"] == pytest.approx(row["f1"] - other["f1"])
    weights = np.random.default_rng(0).multinomial(6, np.full(6, 1 / 6), 200)[0]
    counts = (found["sae"][0].patches * weights[:, None, None]).sum(0)
    true, false, missed = counts.T
    assert summary.resamples["sae"][0] == pytest.approx((2 * true / (2 * true + false + missed)).mean())


def test_codes_of_an_autoencoder_are_looked_for_with_one_sign():
    sae = SAE(SAEConfig(D, 8, 2), 0).eval()
    table = detection.detect(SAEReadout(sae), halves()).table
    assert (table["sign"] == 1).all() and table["feature"].max() < 8
    codes = SAEReadout(sae).scores(halves().reporting.flat)
    assert ((codes > 0).sum(1) <= 2).all()
    torch.testing.assert_close(codes @ sae.decoder + sae.pre_bias, sae(halves().reporting.flat))


def test_patches_are_covered_by_the_masks_of_their_objects():
    scene = world.Scene((world.Thing("square", "red", "large", "centre"),), "plain", "teal")
    covered = detection.factor_coverage([scene], 16, 16).reshape(16, 16, -1)
    number = {pair: i for i, pair in enumerate(detection.factor_values())}
    assert len(number) == 36
    mask = torch.from_numpy(scene.masks()[0]).double()
    expected = torch.nn.functional.avg_pool2d(mask[None], 4)[0].numpy()
    for pair in (("shape", "square"), ("colour", "red"), ("size", "large"), ("position", "centre")):
        np.testing.assert_allclose(covered[..., number[pair]], expected)
    np.testing.assert_allclose(covered[..., number["ground", "teal"]], 1 - expected)
    assert covered[..., number["shape", "star"]].max() == 0
    labels = detection.LabelledVectors(torch.zeros(1, 256, 2), covered.reshape(1, 256, -1), tuple("x" * 36)).labels
    agree = jaccard_score(labels[:, number["shape", "square"]], expected.ravel() >= 0.5)
    assert agree == 1
    with pytest.raises(ValueError, match="blocks: maps of 7 x 7 patches do not divide"):
        detection.factor_coverage([scene], 7, 7)


def test_concepts_that_a_half_does_not_show_are_left_out():
    covered = np.zeros((4, 6, 3), np.float32)
    covered[:, :3, 0] = 1
    covered[:2, :, 1] = 1
    split = detection.split_halves(torch.zeros(4, 6, 2), covered, ("both", "first", "none"))
    assert split.reporting.concepts == ("both",) and split.reporting.covered.shape == (2, 6, 1)
    with pytest.raises(ValueError, match="max_images: of 4 scenes both halves show no concept"):
        detection.split_halves(torch.zeros(4, 6, 2), covered[..., 1:], ("first", "none"))
