"""Captions of features: the pictures, the answers, and names from factors."""

import io
import logging
from types import SimpleNamespace

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from endpoint import KEY, completion, serving
from PIL import Image

from vaelab import world
from vaelab.models.vision_language import Endpoint
from vaelab.sae import annotation
from vaelab.sae.annotation import Caption, Pool
from vaelab.sae.feature_statistics import feature_maps
from vaelab.sae.model import SAE, SAEConfig

GOOD = "<thinking>They share it.</thinking>\n<answer>a red thing</answer>"
SCENES = [world.sample(seed) for seed in range(80)]


def pool_of(means, features=None):
    means = np.asarray(means, np.float32)
    features = list(range(means.shape[1])) if features is None else features
    return Pool("up", None, features, list(range(100, 100 + len(means))), means)


def test_pictures_are_without_the_feature_then_rising_then_strongest():
    means = np.zeros((200, 1), np.float32)
    means[:120:2, 0] = np.random.default_rng(0).permutation(np.linspace(0.01, 1, 60))
    means[1::2, 0] = 5  # held out: never shown
    pool = pool_of(means)
    found = annotation.choose_pictures(pool, 0)
    shown = {part: [pool.means[item - 100, 0] for item in items] for part, items in found._asdict().items()}
    assert shown["unrelated"] == [0] * 5 and len(set(found.unrelated)) == 5
    assert shown["strongest"] == sorted(means[::2, 0])[:-6:-1]
    goals = np.arange(1, 10) / 10
    assert np.abs(np.array(shown["progression"])[:8] - goals[:8]).max() < 0.02
    assert shown["progression"] == sorted(shown["progression"]) and not {*found.progression} & {*found.strongest}
    assert annotation.choose_pictures(pool, 0, seed=1).unrelated != found.unrelated


def test_a_rare_feature_has_fewer_pictures_and_a_dense_one_its_weakest():
    rare, dense = np.zeros(40), np.linspace(1, 2, 40)
    rare[[0, 2]] = 1, 2
    pool = pool_of(np.stack([rare, dense], 1))
    assert annotation.choose_pictures(pool, 0)[1:] == ([], [102, 100])
    assert annotation.choose_pictures(pool, 1).unrelated == [100, 102, 104, 106, 108]


def test_features_are_chosen_among_those_that_are_active_often_enough():
    means = np.zeros((8, 4))
    means[[0, 1], 0] = means[[0, 1, 2, 3], 1] = means[:, 2] = means[::2, 3] = 1
    pool = pool_of(means, [5, 6, 7, 8])
    assert pool.active().tolist() == [1, 2, 4, 0]
    assert annotation.choose_features(pool, 0, 2).features == [6, 7]
    assert annotation.choose_features(pool, 1, 1).features in ([5], [6], [7])
    given = annotation.choose_features(pool, 1, 2, [7, 6])
    assert given.features == [7, 6] and given.means.tolist() == means[:, [2, 1]].tolist()
    with pytest.raises(ValueError, match=r"^features: 8 of up is active in 0 pictures of a half of the pool, .* 1$"):
        annotation.choose_features(pool, 1, 1, [7, 8])
    with pytest.raises(ValueError, match=r"^pool: no feature of up is active in 5 of the 4 pictures of a half"):
        annotation.choose_features(pool, 1, 5)


def test_coldmaps_are_white_where_nothing_is_active():
    found = annotation.coldmaps(-torch.ones(2, 3, 4, 4), torch.tensor([[[0.0, 1.0], [2.0, 4.0]], [[0.0, 0.0]] * 2]))
    assert found[0, 0, ::2, ::2].tolist() == [[1, 0.5], [0, -1]] and (found[1] == 1).all()


def test_an_answer_is_reasoning_and_a_phrase():
    assert annotation.parse_caption(f"Sure!\n{GOOD}") == Caption("a red thing", "They share it.")
    fifteen = " ".join(["word"] * 15)
    assert annotation.parse_caption(GOOD.replace("a red thing", fifteen)).text == fifteen


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a red thing", "Between <thinking> and </thinking> one text was expected, but there are 0."),
        ("<thinking>x</thinking>", "Between <answer> and </answer> one text was expected, but there are 0."),
        ("<thinking>x</thinking><answer> </answer>", "Between <answer> and </answer> one text was .* there are 0."),
        (f"{GOOD}<answer>a</answer>", "Between <answer> and </answer> one text was expected, but there are 2."),
        (GOOD.replace("a red", "word " * 15), "The phrase between <answer> and </answer> has 16 words; at most 15 "),
    ],
)
def test_other_answers_are_refused(text, message):
    with pytest.raises(ValueError, match=message):
        annotation.parse_caption(text)


def test_a_feature_is_named_by_the_value_that_it_finds():
    red = np.array([any(thing.colour == "red" for thing in scene.things) for scene in SCENES])
    striped = np.array([scene.texture == "striped" for scene in SCENES])
    corner = np.array([any(thing.position == "top left" for thing in scene.things) for scene in SCENES])
    means = np.stack([red, striped, corner, np.ones(80)], 1) * np.linspace(1, 2, 80)[:, None]
    means[1::2] = 1 - (means[1::2] > 0)  # the held-out half says the opposite, and does not count
    means[:, 3] = 1
    found = annotation.name_by_factors(pool_of(means), SCENES)
    assert [caption.text for caption in found[:3]] == ["a red thing", "a striped background", "a thing in the top left"]
    assert found[0].reasoning.startswith("It finds pictures with red colour with F1 1.00; marking every picture has 0.")
    assert found[3] == Caption("", "", "it finds no factor value better than marking every picture does")


def test_phrases_of_factor_values():
    assert annotation.describe_value("colour", "orange") == "an orange thing"
    assert annotation.describe_value("size", "small") == "a small thing"
    assert annotation.describe_value("shape", "star") == "a star"
    assert annotation.describe_value("ground", "teal") == "a teal background"


def test_the_factors_are_for_the_world_only():
    other = SimpleNamespace(settings={"dataset": "a/b"})
    assert annotation.load_annotator("factors") is None
    assert annotation.require_annotator("factors", SimpleNamespace(settings={"dataset": "world"}))
    assert not annotation.require_annotator("endpoint:seer", other)
    with pytest.raises(ValueError, match=r"^annotator: 'factors' names .* but these are of 'a/b'; give a vision"):
        annotation.require_annotator("factors", other)


class Store:
    """Maps of one block, of items from 100 on."""

    def maps(self, block, items):
        assert block == "up"
        return torch.stack([torch.randn(4, 4, 6, generator=torch.Generator().manual_seed(item)) for item in items])


class Pictures:
    """A grey picture per item."""

    store = Store()

    def pictures(self, items):
        return torch.stack([torch.full((3, 8, 8), item / 100 - 1) for item in items])


@pytest.fixture(scope="module")
def small_pool():
    sae = SAE(SAEConfig(6, 12, 2))
    return annotation.choose_features(annotation.measure_pool(sae, Store(), "up", range(100, 112)), 3, 4)


def test_the_pool_measures_mean_activations(small_pool):
    maps = feature_maps(small_pool.sae, Store(), "up", small_pool.items, small_pool.features)
    np.testing.assert_allclose(small_pool.means, maps.mean((2, 3)).numpy(), rtol=1e-5)
    with pytest.raises(ValueError, match=r"^pool: must be at least 4, got 3"):
        annotation.measure_pool(small_pool.sae, Store(), "up", [100, 101, 102])


def test_every_feature_is_captioned_once_by_what_it_is_active_on(small_pool, monkeypatch, tmp_path, caplog):
    caplog.set_level(logging.DEBUG)
    monkeypatch.setattr(annotation, "SIDE", 16)
    problems = {1: "<answer>only this</answer>", 2: GOOD.replace("red", "very " * 15)}

    def respond(body, number):
        return 200, completion(problems.get(number, GOOD)), {}

    model = {"timeout": 5, "attempts": 2, "backoff": 0.01}
    options = {"concurrency": 1, "tries": 2, "progress": False}
    with serving(respond, monkeypatch) as requests:
        for _ in range(2):
            found = annotation.caption_pools(
                {"sae": small_pool, "again": small_pool.select(small_pool.features[:1])}, Pictures(), {},
                Endpoint("seer", **model), tmp_path, **options,
            )  # fmt: skip
    red = Caption("a red thing", "They share it.")
    too_long = "The phrase between <answer> and </answer> has 17 words; at most 15 are allowed."
    assert found == {
        "sae": [
            red,
            Caption("", "", f"no valid answer in 2: {too_long}"),
            red,
        ],
        "again": [red],
    }  # fmt: skip
    assert len(requests) == 4  # the second has two tries, and everything else is asked once
    system, user = requests[0]["messages"]
    assert system["content"] == annotation.SYSTEM
    kinds = [part["type"] for part in user["content"]]
    rows = annotation.shown_rows(small_pool, Pictures(), small_pool.features[0])
    assert kinds == ["text", *["text", "image_url"] * len(rows)]
    assert [part["text"] for part in user["content"][1::2]] == [annotation.ROWS[name] for name in rows]
    written = b"".join(file.read_bytes() for file in tmp_path.rglob("*.json"))
    assert KEY not in caplog.text and KEY.encode() not in written and b"127.0.0.1" not in written


def test_a_model_that_captions_nothing_ends_the_run(small_pool, monkeypatch, tmp_path):
    monkeypatch.setattr(annotation, "SIDE", 16)
    with serving(lambda *_: (200, completion("no"), {}), monkeypatch):
        model = Endpoint("seer")
        with pytest.raises(ValueError, match=r"^annotator: endpoint:seer captions none of 3 features; no valid answer"):
            annotation.caption_pools({0: small_pool}, Pictures(), {}, model, tmp_path, tries=1, progress=False)


def test_pictures_stand_in_a_row():
    colours = torch.tensor([-1.0, 0.0, 1.0]).view(3, 1, 1, 1).expand(3, 3, 8, 8)
    row = np.asarray(Image.open(io.BytesIO(annotation.picture_row(colours))))
    assert row.shape == (224, 3 * 224 + 2 * 4, 3)
    assert row[5, [5, 223, 226, 300, 500, -1], 0].tolist() == [0, 0, 178, 128, 255, 255]
    large = Image.open(io.BytesIO(annotation.picture_row(torch.zeros(9, 3, 512, 512))))
    assert large.size == (2048, 224)


def test_white_pictures_have_frames():
    figure = annotation.draw_rows(
        {"unrelated": torch.ones(2, 3, 4, 4), "strongest": torch.ones(1, 3, 4, 4)}, "up: a $1 bill"
    )
    shown = figure.axes[0].images[0].get_array()
    assert shown.shape[:2] == (6, 6) and shown[0].max() < 0.8 and shown[1:-1, 1:-1].min() == 1
    assert [text.get_text() for axis in figure.axes for text in axis.texts] == ["unrelated", "strongest"]
    plt.close(figure)
