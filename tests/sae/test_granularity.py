"""How fine patterns are: planted scenes give each answer, and both orders of the options mean the same."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from endpoint import completion, serving
from sklearn.metrics import cohen_kappa_score

from vaelab import world
from vaelab.models.vision_language import Answer, Endpoint
from vaelab.sae import annotation, granularity
from vaelab.sae.annotation import Pool
from vaelab.world.scenes import Scene, Thing

POOL = [world.sample(seed) for seed in range(100)]
FINE, MODERATE, COARSE, NONE = granularity.OPTIONS


def planted(**same):
    """Ten scenes with one thing each, whose factors differ but for some."""
    rng = np.random.default_rng(0)
    scenes = []
    for i in range(10):
        own = {factor: values[i % len(values)] for factor, values in world.FACTORS.items()}
        own |= {"size": rng.choice(["large", "small"]), **same}
        thing = Thing(*(own[factor] for factor in world.THING_FACTORS))
        scenes.append(Scene((thing,), own["texture"], own["ground"]))
    return scenes


@pytest.mark.parametrize(
    ("same", "expected"),
    [
        ({"shape": "star", "colour": "red"}, FINE),
        ({"texture": "striped", "ground": "teal"}, FINE),
        ({"shape": "star"}, MODERATE),
        ({"ground": "teal"}, MODERATE),
        ({"position": "top left"}, COARSE),
        ({}, NONE),
    ],
)
def test_scenes_answer_by_what_they_share(same, expected):
    assert granularity.granularity_of_scenes(planted(**same), POOL) == expected


def test_what_all_pictures_share_is_no_pattern():
    scenes = planted(ground="teal")
    assert granularity.granularity_of_scenes(scenes, scenes) == NONE


def test_the_most_active_features_and_their_strongest_pictures():
    means = np.zeros((30, 4), np.float32)
    means[:12, 0] = np.arange(1, 13)
    means[::2, 1] = 20
    means[:9, 2] = 100  # active in too few
    means[:, 3] = 1
    pool = Pool("up", None, [3, 5, 7, 9], list(range(100, 130)), means)
    found = granularity.top_pictures(pool, 2)
    assert list(found) == [5, 3] and found[3] == list(range(111, 101, -1)) and found[5] == list(range(100, 120, 2))
    assert list(granularity.top_pictures(pool, 9)) == [5, 3, 9]
    assert list(granularity.top_pictures(pool, 9, 9)) == [7, 5, 3, 9]
    with pytest.raises(ValueError, match=r"^pool: no feature of up is active in 31 of 30 pictures"):
        granularity.top_pictures(pool, 2, 31)
    drawn = granularity.random_pictures(pool.items, 3)
    assert list(drawn) == [0, 1, 2] and all(len({*one}) == 10 for one in drawn.values()) and drawn[0] != drawn[1]


@pytest.mark.parametrize("text", ["", "5", "0", "1 or 2", "one"])
def test_other_answers_than_a_number_are_refused(text):
    assert granularity.parse_number(" 3.\n") == 3
    with pytest.raises(ValueError, match=r"^One number from 1 to 4 was expected, and nothing else\.$"):
        granularity.parse_number(text)


def test_a_model_is_asked_in_both_orders(monkeypatch, tmp_path):
    monkeypatch.setattr(annotation, "SIDE", 16)
    pictures = SimpleNamespace(pictures=lambda items: torch.stack([torch.full((3, 8, 8), i / 50 - 1) for i in items]))

    def respond(body, _):
        lines = body["messages"][1]["content"][-1]["text"].splitlines()
        (place,) = [line[0] for line in lines if "wherever they are" in line]
        return 200, completion(place), {}

    with serving(respond, monkeypatch) as requests:
        sets = {"mid": {4: range(10), 6: range(10, 20)}, "up": {1: range(20, 30)}}
        found = granularity.classify(sets, pictures, {}, Endpoint("seer"), tmp_path)
    assert found.to_dict("list") == {
        "block": ["mid", "mid", "up"], "feature": [4, 6, 1], "forward": [MODERATE] * 3, "reversed": [MODERATE] * 3
    }  # fmt: skip
    kinds = [part["type"] for part in requests[0]["messages"][1]["content"]]
    assert len(requests) == 6 and kinds == ["image_url", "image_url", "text"]


def test_shares_and_agreement():
    answers = [1, 4, 1, 4, 2, 2, 3, 2, 4, None]  # of five features; in the second order 4 is the first option
    table = granularity.read_answers([Answer(one) for one in answers]).assign(block="up")
    assert table["forward"].tolist() == [FINE, FINE, MODERATE, COARSE, NONE]
    assert table["reversed"].tolist() == [FINE, FINE, COARSE, COARSE, ""]
    (row,) = granularity.summarise_granularity(table).to_dict("records")
    assert [row[name] for name in granularity.OPTIONS] == pytest.approx([4 / 9, 1 / 9, 3 / 9, 1 / 9])
    assert row["features"] == 5 and row["unanswered"] == pytest.approx(0.1)
    expected = cohen_kappa_score([FINE, FINE, MODERATE, COARSE], [FINE, FINE, COARSE, COARSE])
    assert row["kappa"] == pytest.approx(expected) and 0.5 < expected < 1
    metrics = granularity.granularity_metrics(granularity.summarise_granularity(table))
    assert metrics["up.granularity.no_pattern"] == pytest.approx(1 / 9) and "up.granularity.kappa" in metrics
    once = granularity.summarise_granularity(table[["block", "forward"]])
    assert once["no pattern"].tolist() == [0.2] and np.isnan(once["kappa"][0]) and once["unanswered"].tolist() == [0]


def test_the_scenes_answer_for_every_set():
    scenes = dict(enumerate([*planted(shape="star"), *POOL]))
    found = granularity.classify({"up": {8: range(10)}}, None, scenes, None, "")
    assert found.to_dict("list") == {"block": ["up"], "feature": [8], "forward": [MODERATE]}
