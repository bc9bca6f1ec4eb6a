"""Scores of captions: a planted caption that is right scores 1, and one that is not 0.5."""

from types import SimpleNamespace

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch
from small_features import Letters

from vaelab import world
from vaelab.core.stats import mean_interval
from vaelab.sae import caption_scores
from vaelab.sae.annotation import Caption, Pool
from vaelab.world.scenes import Scene, Thing

SCENES = [world.sample(seed) for seed in range(120)]
ITEMS = list(range(1000, 1120))
STAR = np.array([any(thing.shape == "star" for thing in scene.things) for scene in SCENES])
TEAL = np.array([scene.ground == "teal" for scene in SCENES])


@pytest.fixture
def judge():
    return caption_scores.SceneJudge(dict(zip(ITEMS, SCENES, strict=True)))


def pool_of(*columns):
    means = np.stack(columns, 1) * np.linspace(1, 2, len(columns[0]))[:, None]
    return Pool("up", None, list(range(5, 5 + len(columns))), ITEMS[: len(means)], means.astype(np.float32))


def words(monkeypatch, found):
    monkeypatch.setattr(caption_scores, "caption_from_words", lambda _, feature: found.get(feature, ""))


def test_held_out_pictures_are_the_strongest_and_inactive_ones():
    pool = pool_of(STAR)
    found = caption_scores.held_out_items(pool, 5, 6)
    held_out = dict(zip(pool.items[1::2], pool.column(5)[1::2], strict=True))
    assert [held_out[item] for item in found.active] == sorted(held_out.values(), reverse=True)[:6]
    assert [held_out[item] for item in found.inactive] == [0] * 6 and len({*found.inactive}) == 6
    assert caption_scores.held_out_items(pool, 5, 6, seed=1).inactive != found.inactive
    few = caption_scores.held_out_items(pool, 5, 100)
    assert len(few.active) == len(few.inactive) == STAR[1::2].sum()
    dense = pool_of(np.ones(120))
    both = caption_scores.held_out_items(dense, 5, 100)
    assert both.active == ITEMS[:59:-2] and both.inactive == ITEMS[1:60:2]


def test_right_captions_score_1_and_controls_stand_beside_them(judge, monkeypatch):
    words(monkeypatch, {5: "star", 7: "teal heart"})
    captions = [Caption("a star", "so"), Caption("a teal background", "so"), Caption("", "", "no idea")]
    table = caption_scores.score_captions(pool_of(STAR, TEAL, STAR), captions, None, judge, count=10)
    assert table["feature"].tolist() == [5, 6, 7] and table["problem"].tolist() == ["", "", "no idea"]
    assert table["score"].tolist()[:2] == [1, 1] and np.isnan(table["score"][2])
    assert abs(table["other_score"][0] - 0.5) < 0.3 and np.isnan(table["other_score"][2])
    assert table["words_score"][0] == 1 and np.isnan(table["words_score"][1])
    assert (table[["active", "inactive"]] == 10).all(axis=None)


def test_wrong_captions_score_near_chance(judge, monkeypatch):
    words(monkeypatch, {})
    noise = np.random.default_rng(0).random((20, 120)) > 0.5
    captions = [Caption("a star", "") for _ in noise]
    scores = caption_scores.score_captions(pool_of(*noise), captions, None, judge)["score"]
    assert abs(scores.mean() - 0.5) < 0.05


def test_a_caption_fits_the_thing_or_the_ground_that_has_most_of_its_words():
    things = (Thing("star", "red", "large", "top left"), Thing("cross", "blue", "small", "right", named=()))
    judge = caption_scores.SceneJudge({1: Scene(things, "striped", "teal")})
    captions = [
        "a red star",
        "red crosses",
        "a thing in the top left",
        "the striped background",
        "a green ring",
        "stars",
    ]
    assert judge.fit(captions, [1, 1]).tolist() == [[1, 0.5, 1, 1, 0, 1]] * 2
    assert judge.fit(["a blue star", "things"], [1]).tolist() == [[0.5, 0]]


def test_outside_of_the_world_prompts_or_pictures_are_compared():
    class Both(Letters):
        def embed_pictures(self, pixels):
            raise NotImplementedError

    vectors = torch.eye(8)[:2]
    pictures = SimpleNamespace(
        prompts=lambda items: ["aa", "b"][: len(items)], vectors=lambda items: vectors[: len(items)], model=Both()
    )
    by_prompts = caption_scores.choose_judge(pictures, Letters(), {})
    embedded = Letters().embed_sentences(["aa", "b", "abc"])
    assert by_prompts.name == "letters, by prompts"
    np.testing.assert_allclose(by_prompts.fit(["abc"], [0, 1]), embedded[:2] @ embedded[2:].T)
    by_pictures = caption_scores.choose_judge(pictures, Both(), {})
    np.testing.assert_allclose(
        by_pictures.fit(["abc", "aa"], [0, 1]), vectors @ Letters().embed_sentences(["abc", "aa"]).T
    )
    assert caption_scores.choose_judge(pictures, None, {1: SCENES[0]}).name == "truth of the scene"


@pytest.fixture
def tables():
    def rows(block, scores):
        return [{"block": block, "feature": i, "score": score, "other_score": 0.5, "words_score": np.nan if i else 0.7}
                for i, score in enumerate(scores)]  # fmt: skip

    own = pd.DataFrame([*rows("mid", [0.8, 0.9, np.nan]), *rows("up", [0.6])])
    return own, pd.DataFrame(rows("mid", [0.4, 0.6]))


def test_means_over_features_with_intervals(tables):
    summary = caption_scores.summarise_captions(*tables)
    mid = summary[summary["block"] == "mid"].set_index("who")
    assert mid.loc["caption", ["mean", "low", "high"]].tolist() == pytest.approx(
        [0.85, mean_interval([0.8, 0.9]).low, 1]
    )
    assert mid.loc["caption", ["features", "captioned"]].tolist() == [2, 2 / 3]
    assert mid.loc["untrained autoencoder", "mean"] == 0.5
    metrics = caption_scores.caption_metrics(summary)
    assert metrics["up.caption"] == 0.6 and metrics["mid.captioned"] == 2 / 3 and metrics["mid.words_of_prompts"] == 0.7
    assert "up.untrained_autoencoder" not in metrics
    assert caption_scores.finding(summary[summary["block"] == "mid"]) == (
        "A caption tells pictures in which its feature is active from others with an AUROC of 0.85 (0.21 to 1.00) over "
        "2 features; captions of other features reach 0.50; three words of prompts 0.70; captions of an untrained "
        "autoencoder's features 0.50."
    )


def test_every_score_is_a_point(tables):
    figure = caption_scores.draw_scores(*tables, "a title with a $ sign")
    left, right = figure.axes
    assert [text.get_text() for text in left.get_yticklabels()] == [
        "caption", "captions of other features", "words of prompts", "untrained autoencoder"
    ]  # fmt: skip
    assert [len(points.get_offsets()) for points in left.collections] == [2, 3, 1, 2]
    assert [len(points.get_offsets()) for points in right.collections] == [1, 1, 1, 0]
    assert left.collections[0].get_offsets()[:, 0].tolist() == [0.8, 0.9]
    plt.close(figure)
