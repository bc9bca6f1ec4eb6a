"""Scores of features: each equals a plain computation of its formula, and controls score as they must."""

import itertools

import numpy as np
import pandas as pd
import pytest
import torch
from small_features import BLOCK, Letters, MeanColours, N, pictures
from small_sae import FEATURES, D, shaken, vectors

from vaelab.activations.denoiser import Sampling
from vaelab.sae import feature_scores
from vaelab.sae.feature_statistics import FeatureStatistics
from vaelab.sae.model import Codes
from vaelab.sae.steering import Directions, Steerer, activate_alone, modulate


def unit_vectors(count, d=6, seed=0):
    return torch.nn.functional.normalize(torch.randn(count, d, generator=torch.Generator().manual_seed(seed)))


def sparse_maps(count, side=4, seed=2):
    """Whole numbers with ties; a half of them zero, and the first map empty."""
    maps = torch.randint(0, 4, (count, side, side), generator=torch.Generator().manual_seed(seed)).float()
    maps = (maps - 1).clamp_min(0)
    maps[0] = 0
    return maps


def test_specificity_is_the_mean_over_pairs():
    e = unit_vectors(7).double().numpy()
    pairs = [e[i] @ e[j] for i, j in itertools.combinations(range(7), 2)]
    assert feature_scores.mean_similarity(unit_vectors(7)) == pytest.approx(np.mean(pairs), abs=1e-6)
    assert np.isnan(feature_scores.mean_similarity(unit_vectors(1)))


def test_monosemanticity_is_the_weighted_mean_over_pairs():
    means = torch.rand(9, 4, generator=torch.Generator().manual_seed(3))
    means[:, 2], means[:, 3] = 0.5, torch.eye(9)[4]  # never varies; active in one picture
    e, a = unit_vectors(9).double().numpy(), means.double().numpy()
    expected = []
    for feature in range(2):
        weights = (a[:, feature] - a[:, feature].min()) / (a[:, feature].max() - a[:, feature].min())
        pairs = list(itertools.combinations(range(9), 2))
        both = sum(weights[i] * weights[j] * (e[i] @ e[j]) for i, j in pairs)
        expected.append(both / sum(weights[i] * weights[j] for i, j in pairs))
    found = feature_scores.monosemanticity(means, unit_vectors(9))
    assert found[:2].tolist() == pytest.approx(expected, abs=1e-6)
    assert found[2:].isnan().all()


def test_colour_distance_weights_every_pixel_by_the_activation_of_its_position():
    shown, maps = pictures(3), sparse_maps(3)
    weights, colours = [], []
    for m, y, x in itertools.product(range(3), range(8), range(8)):
        weights.append(float(maps[m, y // 2, x // 2]))
        colours.append((shown[m, :, y, x].double().numpy() + 1) * 127.5)
    weights, colours = np.array(weights)[:, None], np.array(colours)
    mean = (weights * colours).sum(0) / weights.sum()
    expected = (weights[:, 0] * np.abs(colours - mean).sum(1)).sum() / weights.sum()
    assert feature_scores.colour_distance(shown, maps) == pytest.approx(expected, rel=1e-6)
    assert np.isnan(feature_scores.colour_distance(shown, torch.zeros(3, 4, 4)))
    assert feature_scores.colour_distance(torch.zeros(2, 3, 4, 4), torch.ones(2, 1, 1)) == pytest.approx(0)


def test_locality_is_the_change_where_the_feature_is_strong_and_where_it_is_silent():
    before, after, maps = pictures(4), pictures(4, seed=9), sparse_maps(4)
    maps[3] = torch.arange(16.0).view(4, 4) + 1  # active everywhere: nothing is outside
    inside, outside = [], []
    for m in range(4):
        flat, own = maps[m].flatten().tolist(), {"in": [], "out": []}
        for y, x in itertools.product(range(8), range(8)):
            value = float(maps[m, y // 2, x // 2])
            change = 127.5 * float((before[m, :, y, x].double() - after[m, :, y, x].double()).abs().sum())
            if value > 0 and sum(one < value for one in flat) >= 8:
                own["in"].append(change)
            if value == 0:
                own["out"].append(change)
        inside += [np.mean(own["in"])] if own["in"] else []
        outside += [np.mean(own["out"])] if own["out"] else []
    assert (len(inside), len(outside)) == (3, 3)
    found = feature_scores.local_change(before, after, maps)
    assert found == pytest.approx((np.mean(inside), np.mean(outside)), rel=1e-6)
    assert int(feature_scores.areas(maps).inside[3].sum()) == 8  # the larger half of 16 different activations


def test_the_area_of_a_map_counts_positive_positions():
    maps = torch.tensor([[[0.0, 0.0], [0.0, 2.0]], [[1.0, 1.0], [0.0, 0.0]]])
    assert feature_scores.active_shares(maps).tolist() == [0.25, 0.5]


def test_prompts_near_a_caption_are_the_nearest_without_repetitions():
    sentences = torch.nn.functional.normalize(torch.tensor([[1.0, 0.0], [1.0, 0.01], [0.0, 1.0], [1.0, 1.0]]))
    assert feature_scores.nearest_prompts(torch.tensor([1.0, 0.0]), sentences, 3) == [0, 3, 2]
    assert feature_scores.nearest_prompts(torch.tensor([1.0, 0.0]), sentences, 1) == [0]


def test_a_caption_has_the_words_that_raise_a_feature():
    """Feature 0 is active when the prompt says red, and more so with a circle; feature 1 is always active."""
    prompts = ["a red circle", "a red square", "a blue circle", "a blue square"] * 3
    values = torch.tensor([[[3.0, 1.0]], [[1.0, 1.0]], [[0.0, 1.0]], [[0.0, 1.0]]] * 3)
    codes = Codes(values, torch.arange(2).expand(12, 1, 2))
    statistics = FeatureStatistics(2, 2, words=["a", "blue", "circle", "red", "square"])
    statistics.add(codes, range(12), [{"prompt": prompt} for prompt in prompts])
    assert feature_scores.caption_from_words(statistics, 0) == "red circle"  # "square" lowers it
    assert feature_scores.caption_from_words(statistics, 0, least=7) == ""
    assert feature_scores.caption_from_words(statistics, 1) == ""
    assert feature_scores.captions_from_words(statistics) == ["red circle", ""]


def test_position_probes_read_positions_that_are_there_and_no_others():
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(10, 4, 5, 6, generator=generator)
    places = torch.cat([torch.eye(4)[:, None].expand(4, 5, 4), torch.eye(5).expand(4, 5, 5)], -1)
    found = feature_scores.position_accuracy(torch.cat([noise, places.expand(10, 4, 5, 9)], -1))
    assert found == {"row": 1.0, "column": 1.0}
    chance = feature_scores.position_accuracy(noise)
    assert chance["row"] < 0.45 and chance["column"] < 0.4
    only_rows = feature_scores.position_accuracy(torch.cat([noise, places[..., :4].expand(10, 4, 5, 4)], -1))
    assert only_rows["row"] == 1.0 and only_rows["column"] < 0.4


def test_controls_have_the_size_and_the_rule_of_the_autoencoder():
    sae, x = shaken(), vectors(30)
    random = feature_scores.with_random_directions(sae, seed=1)
    torch.testing.assert_close(random.decoder.norm(dim=1), sae.decoder.norm(dim=1))
    torch.testing.assert_close(random.encode(x).values, sae.encode(x).values)
    assert (torch.nn.functional.cosine_similarity(random.decoder, sae.decoder).abs() < 0.9).all()
    mean = x.mean(0)
    controls = feature_scores.controls_of(sae, mean)
    single = controls["neurons"].encode(x)
    expected = (x - mean).topk(sae.config.k).values.clamp_min(0)
    torch.testing.assert_close(single.values.sort(1, descending=True).values, expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close((x - mean).gather(1, single.indices).clamp_min(0), single.values, rtol=1e-5, atol=1e-6)
    fresh = controls["untrained"]
    assert fresh.config.n_features == FEATURES and fresh.features().shape == (FEATURES, D)
    torch.testing.assert_close(fresh.pre_bias.detach(), mean, rtol=1e-4, atol=1e-5)


def test_the_table_has_mean_and_deviation_of_every_score():
    scores = pd.DataFrame([
        {"block": "up", "who": "sae", "feature": 1, "caption": "", "pictures": 3, "colour": 10.0, "inside_-5": 4.0,
         "outside_-5": 1.0},
        {"block": "up", "who": "sae", "feature": 2, "caption": "", "pictures": 3, "colour": 14.0, "inside_-5": 6.0,
         "outside_-5": 2.0},
        {"who": "random pictures", "colour": 50.0},
    ])  # fmt: skip
    table = feature_scores.summarise_scores(scores)
    assert table.to_dict("records")[0] == {
        "block": "up", "who": "sae", "score": "colour", "mean": 12.0, "low": 10.0, "high": 14.0,
        "deviation": pytest.approx(8**0.5), "count": 2,
    }  # fmt: skip
    many = pd.DataFrame({"block": "up", "who": "sae", "colour": np.random.default_rng(1).exponential(size=400)})
    (row,) = feature_scores.summarise_scores(many).to_dict("records")
    assert row["high"] - row["low"] == pytest.approx(2 * 1.96 * row["deviation"] / 20, rel=0.1)
    laid_out = feature_scores.paper_layout(table).to_dict("records")
    assert laid_out == [
        {"block": "up", "who": "sae", "colour": "12.0 (2.8)", "beta -5": "5.0 / 1.5"},
        {"block": "", "who": "random pictures", "colour": "50.0", "beta -5": ""},
    ]
    renamed = table.replace({"block": {"up": "up.0.1"}})
    compared = feature_scores.compare_with_paper(renamed)[["score", "here", "paper"]].values.tolist()
    assert compared == [["colour", 12, 73.8], ["colour", 50, 90.7], ["inside_-5", 5, 73.1], ["outside_-5", 1.5, 16.4]]
    assert feature_scores.table_metrics(table) == {
        "up.colour.sae": 12.0, "baseline.colour.random_pictures": 50.0, "up.inside_-5.sae": 5.0,
        "up.outside_-5.sae": 1.5,
    }  # fmt: skip


def test_features_are_scored_as_one_would_by_hand(lab):
    (feature,) = lab.statistics.most_active(1)
    row = lab.scorer.score(BLOCK, "sae", lab.sae, lab.statistics, [feature], captions={feature: "a bad egg"})
    row = row.to_dict("records")[0]
    items, _ = lab.statistics.sample_items(feature, 0.5, 1, 3)
    records = [lab.store.items[item] for item in items]
    assert len(items) == 3 and all(record["guided"] for record in records)
    sampling, model = Sampling(1, 2.0), MeanColours()

    steerer = Steerer(lab.pipeline, {BLOCK: Directions.of(lab.sae, lab.statistics)})

    def drawn(prompts, seeds, steering):
        return torch.cat([
            steerer.generate([prompt], [steering], sampling, [seed])
            for prompt, seed in zip(prompts, seeds, strict=True)
        ])  # fmt: skip

    prompts, seeds = [record["prompt"] for record in records], [record["seed"] for record in records]
    plain = drawn(prompts, seeds, [])
    dense = lab.sae.encode(lab.store.maps(BLOCK, lab.pool).float()).dense(N)[..., feature]
    maps = torch.stack([dense[lab.pool.index(item)] for item in items])
    assert row["specificity"] == pytest.approx(feature_scores.mean_similarity(model.embed_pictures(plain)), abs=1e-5)
    assert row["colour"] == pytest.approx(feature_scores.colour_distance(plain, maps), rel=1e-4)
    everything = drawn(*zip(*[(lab.store.items[i]["prompt"], lab.store.items[i]["seed"]) for i in lab.pool],
                            strict=True), [])  # fmt: skip
    weighted = feature_scores.monosemanticity(dense.mean((1, 2))[:, None], model.embed_pictures(everything))
    assert row["monosemanticity"] == pytest.approx(weighted.item(), abs=1e-5)
    for beta in (-5, 5):
        after = drawn(prompts[:2], seeds[:2], [modulate(BLOCK, feature, beta)])
        found = row[f"inside_{beta}"], row[f"outside_{beta}"]
        assert found == pytest.approx(feature_scores.local_change(plain[:2], after, maps[:2]), rel=1e-3, nan_ok=True)
    alone = model.embed_pictures(drawn([""], [0], [activate_alone(BLOCK, feature, 1.0)]))[0]
    assert row["causality"] == pytest.approx((model.embed_pictures(plain) @ alone).mean().item(), abs=1e-4)
    assert row["texture"] == pytest.approx((model.embed_pictures(pictures(3)) @ alone).mean().item(), abs=1e-4)
    near = feature_scores.nearest_prompts(
        Letters().embed_sentences(["a bad egg"])[0],
        Letters().embed_sentences([lab.store.items[item]["prompt"] for item in lab.pool]), 2,
    )  # fmt: skip
    shares = (dense > 0).double().mean((1, 2))
    for share in (0.0, 0.1, 0.3):
        assert row[f"sensitivity_{share:.0%}"] == pytest.approx((shares[near] > share).double().mean().item())
        assert row[f"any_prompt_{share:.0%}"] == pytest.approx((shares > share).double().mean().item())


def test_random_directions_keep_the_activations_and_write_something_else(lab):
    (feature,) = lab.statistics.most_active(1)
    random = feature_scores.with_random_directions(lab.sae)
    row = lab.scorer.score(BLOCK, "random", lab.sae, lab.statistics, [feature], written_by=random)
    assert "specificity" not in row and {"texture", "causality", "inside_5", "outside_-5"} <= set(row.columns)
    same = lab.scorer.score(BLOCK, "sae", lab.sae, lab.statistics, [feature])
    assert row["inside_5"][0] != same["inside_5"][0]


def test_baselines_are_samples_of_pictures(lab):
    rows = lab.scorer.baselines(same_prompts=1)
    assert rows["who"].tolist() == ["random pictures"] * 3 + ["same prompt"] + ["textures"] * 3 + ["empty prompt"]
    textures = MeanColours().embed_pictures(pictures(3)).double()
    first = (textures[0] @ textures[1] + textures[0] @ textures[2]).item() / 2
    assert rows[rows["who"] == "textures"]["texture"].iloc[0] == pytest.approx(first, abs=1e-6)
    assert (rows["specificity"].dropna() <= 1 + 1e-6).all() and len(rows["specificity"].dropna()) == 4


def test_a_model_of_words_compares_with_words(lab):
    both = MeanColours()
    both.embed_sentences = lambda sentences: torch.eye(12)[[len(one) % 12 for one in sentences]]
    shown = feature_scores.ItemPictures(lab.pipeline, lab.store, both, batch_size=4)
    scorer = feature_scores.FeatureScorer(lab.pipeline, shown, lab.pool, lab.scorer.config, textures=pictures(3))
    vectors_ = both.embed_pictures(pictures(2))
    assert scorer.texture(vectors_) == pytest.approx(vectors_[:, len("texture")].tolist())
    assert scorer._causality(vectors_[0], "a star", []) == pytest.approx(float(vectors_[0, len("a star")]))
    assert np.isnan(scorer._causality(vectors_[0], "", []))


def test_wrong_requests_are_one_plain_error(lab):
    inactive = (lab.statistics.mean_activation() == 0).nonzero().flatten().tolist()
    with pytest.raises(ValueError, match=rf"^feature: {BLOCK} has features 0 to {N - 1}, got {N}"):
        lab.scorer.score(BLOCK, "sae", lab.sae, lab.statistics, [N])
    if inactive:
        with pytest.raises(ValueError, match=rf"^feature: {inactive[0]} of {BLOCK} was never active"):
            lab.scorer.score(BLOCK, "sae", lab.sae, lab.statistics, inactive[:1])
    with pytest.raises(ValueError, match=r"^step: .* has no items of step 1; it was collected at all steps"):
        feature_scores.items_at_step(lab.store, 1)
    with pytest.raises(ValueError, match=r"^scored_features: no feature is active in 99 or more items"):
        feature_scores.choose_features(lab.statistics, 3, 99)
    with pytest.raises(ValueError, match=r"^top: expected a share"):
        feature_scores.ScoreConfig(top=0.0)
    chosen = feature_scores.choose_features(lab.statistics, 3, 2)
    assert len(chosen) == 3 and (lab.statistics.summary().active_items[chosen] >= 2).all()


def test_textures_and_probes_of_positions(lab):
    textures = feature_scores.load_textures(count=4, resolution=32)
    assert textures.shape == (4, 3, 32, 32) and textures.std() > 0.1
    found = feature_scores.probe_positions(lab.pipeline, lab.store, [BLOCK], 0, 4, batch_size=3)
    assert found["chance_row"][0] == 1 / 16 and 0 <= found["row"][0] <= 1
