"""What the feature browser shows: numbers equal those of the store, for autoencoders of every readable format."""

import io
import json
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from sae.test_formats import FEATURES, WRITERS, D, vectors
from small_features import BLOCK, WIDTH, Letters, N, collect_small

from vaelab import activations, store
from vaelab.activations.denoiser import Sampling
from vaelab.browser import dictionary_map, feature_data
from vaelab.browser.feature_data import FeatureData, Twin
from vaelab.core.io import write_json
from vaelab.sae import formats
from vaelab.sae.feature_scores import ItemPictures, caption_from_words, controls_of
from vaelab.sae.feature_statistics import collect_statistics
from vaelab.sae.model import SAE, SAEConfig
from vaelab.sae.sweep import SAESweep
from vaelab.sae.transcoder import Transcoder, TranscoderConfig
from vaelab.store.format import BlockShape
from vaelab.viz.encoding import encode_picture

PROMPT = "a red circle on the left"


class CountedPictures:
    """Pictures of one colour in place of those of a model; counts them."""

    sampling = Sampling(1, 2.0)

    def __init__(self, activation_store):
        self.store, self.count = activation_store, 0

    def pictures(self, items):
        self.count += len(items)
        return torch.stack([torch.full((3, 16, 16), item / 50 - 0.5) for item in items])


@pytest.fixture(scope="module", autouse=True)
def fast_maps():
    """PCA in place of t-SNE."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dictionary_map, "TSNE_MOST", 0)
        yield


@pytest.fixture(scope="module")
def of_formats(tmp_path_factory):
    """The vectors of the tests of formats as a store: ten items of three positions."""
    folder = tmp_path_factory.mktemp("formats") / "store"
    records = [
        {"prompt": f"picture {i // 2}", "seed": i // 2, "step": i % 2, "timestep": 999 - 500 * (i % 2)}
        for i in range(10)
    ]
    with store.create(folder, {"b": BlockShape((3, 1), D)}, precision="float32", items_per_shard=4) as writer:
        for begin in range(0, 10, 4):
            writer.add({"b": vectors().view(10, 3, 1, D)[begin : begin + 4]}, records[begin : begin + 4])
    return store.open(folder)


@pytest.fixture(scope="module")
def small(small_pipeline, tmp_path_factory):
    """Features of a small model with random weights."""
    pipeline = small_pipeline("sd2")
    stored = collect_small(pipeline, tmp_path_factory.mktemp("browsed") / "store", (BLOCK,), 6)
    mean = stored.maps(BLOCK, range(4)).float().mean((0, 1, 2))
    sae = controls_of(SAE(SAEConfig(WIDTH, N, 3)), mean)["untrained"]
    statistics = collect_statistics(sae, stored, BLOCK)
    pictures = ItemPictures(pipeline, stored, batch_size=4)
    return SimpleNamespace(pipeline=pipeline, store=stored, sae=sae, statistics=statistics, pictures=pictures)


def browse(small, folder, **options):
    return FeatureData(small.pipeline, BLOCK, small.sae, small.statistics, small.pictures, folder, **options)


@pytest.fixture(scope="module")
def data(small, tmp_path_factory):
    return browse(small, tmp_path_factory.mktemp("browser"), thumbnails=3)


@pytest.fixture(scope="module")
def active(data):
    """The two features that are active in most items."""
    return data.table.sort_values("frequency")["feature"].tolist()[-2:]


def test_activations_are_those_of_the_store_for_every_readable_format(of_formats, tmp_path):
    """The expected activations are computed by each library's own formula, not by this lab."""
    pictures = CountedPictures(of_formats)
    for number, (name, write) in enumerate(WRITERS.items()):
        expected = write(tmp_path / f"theirs{number}")[0].view(10, 3, -1)
        sae = formats.load_sae(tmp_path / f"theirs{number}").sae
        statistics = collect_statistics(sae, of_formats, "b")
        data = FeatureData(None, "b", sae, statistics, pictures, tmp_path / "browser", examples=3)
        positive = expected.clamp_min(0)
        torch.testing.assert_close(
            torch.tensor(data.table["mu"].to_numpy()).float(),
            positive.sum((0, 1)) / (positive > 0).sum((0, 1)).clamp_min(1), rtol=1e-4, atol=1e-4, msg=name,
        )  # fmt: skip
        np.testing.assert_allclose(data.table["frequency"], (expected != 0).any(1).float().mean(0), err_msg=name)
        for feature in data.table.sort_values("frequency")["feature"][-2:]:
            for one in data.card(int(feature))["examples"]:
                shown = torch.tensor(one["map"]).flatten()
                torch.testing.assert_close(shown, expected[one["item"], :, feature], rtol=1e-4, atol=1e-4, msg=name)
                assert one["activation"] == pytest.approx(shown.mean().item(), rel=1e-4), name


def test_the_table_has_the_stores_statistics_and_the_words(small, data):
    guided = [number for number, record in enumerate(small.store.items) if record["guided"]]
    codes = small.sae.encode(small.store.maps(BLOCK, guided).float().flatten(1, 2)).dense(N)
    np.testing.assert_allclose(data.table["density"], (codes > 0).float().mean((0, 1)))
    np.testing.assert_allclose(data.table["frequency"], (codes > 0).any(1).float().mean(0))
    assert data.table["words"].tolist() == [caption_from_words(small.statistics, f) for f in range(N)]
    assert data.table["feature"].tolist() == list(range(N)) == list(range(len(data)))
    assert data.table[["f1", "specificity", "stability", "caption_score"]].isna().all(axis=None)


def test_a_card_is_json_but_for_its_pictures_and_covers_all_deciles(small, data, active):
    card = data.card(active[0])
    assert {one["group"] for one in card["examples"]} == {"top", *(f"decile {i}" for i in range(1, 11))}
    for one in card["examples"]:
        expected = encode_picture(small.pictures.pictures([one["item"]])[0])
        assert one.pop("picture") == expected
    json.dumps(card)
    top = [one["activation"] for one in card["examples"] if one["group"] == "top"]
    assert top == sorted(top, reverse=True) and len(top) > 1
    shown = [(one["prompt"], one["seed"]) for one in card["examples"] if one["group"] == "top"]
    assert len(set(shown)) == len(shown)
    assert sum(card["histogram"]["counts"]) == data.statistics.summary().active_rows[active[0]]
    cosines = data.sae.features() @ data.sae.features()[active[0]]
    cosines[active[0]] = -1
    assert card["nearest"][0] == (int(cosines.argmax()), pytest.approx(cosines.max().item()))
    with pytest.raises(ValueError, match=rf"^feature: up\.1\.1 has features 0 to {N - 1}, got {N}$"):
        data.card(N)


def test_what_was_computed_is_not_computed_again(of_formats, tmp_path):
    formats_sae = SAE(SAEConfig(D, FEATURES, 4))
    statistics = collect_statistics(formats_sae, of_formats, "b")
    pictures = CountedPictures(of_formats)
    first = FeatureData(None, "b", formats_sae, statistics, pictures, tmp_path)
    generated = pictures.count
    assert 0 < generated <= 5  # two items each have the same picture
    again = FeatureData(None, "b", formats_sae, statistics, pictures, tmp_path)
    assert pictures.count == generated and again.sprites == first.sprites
    np.testing.assert_array_equal(again.positions, first.positions)
    other = FeatureData(None, "b", SAE(SAEConfig(D, FEATURES, 4), seed=1), statistics, pictures, tmp_path)
    assert not np.array_equal(other.positions, first.positions)


def test_every_active_feature_has_a_thumbnail_and_no_other(of_formats, tmp_path):
    sae = SAE(SAEConfig(D, FEATURES, 4))
    with torch.no_grad():
        sae.latent_bias[7] = -100.0
    data = FeatureData(
        None, "b", sae, collect_statistics(sae, of_formats, "b"), CountedPictures(of_formats), tmp_path, thumbnails=5
    )
    for feature in range(FEATURES):
        assert (data.thumbnail(feature) is not None) == (data.table["frequency"][feature] > 0)
    assert data.thumbnail(7) is None and data.card(7)["examples"] == []
    columns, rows, side = data.sprite_grid
    assert Image.open(io.BytesIO(data.sprites[0])).size == (columns * side, rows * side)


def test_histograms_keep_every_activation_between_their_edges():
    from vaelab.sae.top_activating import BINS, histogram_bins

    values = torch.tensor([0.011, 0.5, 0.5, 3.0, 40.0])
    found = feature_data.histogram(torch.bincount(histogram_bins(values), minlength=BINS))
    assert sum(found["counts"]) == 5 and len(found["counts"]) <= feature_data.BARS
    np.testing.assert_array_equal(np.histogram(values, found["edges"])[0], found["counts"])
    assert feature_data.histogram(torch.zeros(BINS)) == {"edges": [], "counts": []}


def test_pictures_change_when_features_are_turned_and_not_otherwise(small, data, active):
    plain = data.generate(PROMPT, 3)
    expected = activations.generate(small.pipeline, [PROMPT], [3], data.sampling)[0]
    assert plain == {"picture": encode_picture(expected), "maps": {}}
    turn = {"feature": active[0], "strength": 3.0}
    found = {
        "add": data.generate(PROMPT, 3, [turn]),
        "replaced": data.generate(PROMPT, 3, [{**turn, "way": "replace"}]),
        "two": data.generate(PROMPT, 3, [turn, {"feature": active[1], "strength": 3.0}]),
        "masked": data.generate(PROMPT, 3, [{**turn, "mask": [[1.0, 0.0]]}]),
        "control": data.generate(PROMPT, 3, [{**turn, "control": True}]),
        "late": data.generate(PROMPT, 3, [turn], (1, 1)) if data.passes > 1 else {"picture": b"late"},
    }
    assert len({plain["picture"], *(one["picture"] for one in found.values())}) == 7
    assert data.generate(PROMPT, 3, [{**turn, "strength": 0.0}])["picture"] == plain["picture"]
    assert data.generate(PROMPT, 3, [turn]) == found["add"] and list(found["add"]["maps"]) == [active[0]]


def test_the_controls_direction_has_the_features_length(data, active):
    own, random = (each._directions[BLOCK].written_by(active[0]) for each in (data._steerer, data._control))
    assert random.norm().item() == pytest.approx(own.norm().item(), rel=1e-4)
    assert abs(torch.cosine_similarity(own, random, 0)) < 0.9


def test_what_is_active_in_a_part_of_the_picture(data):
    updates = activations.from_prompts(data._pipeline, [PROMPT], [3], BLOCK, data.sampling).maps[BLOCK]
    codes = torch.stack([data.sae.encode(one[0].float()).dense(N) for one in updates])  # (steps, h, w, N)
    left = codes[:, :, : codes.shape[2] // 2].mean((0, 1, 2))
    found = data.active_at(PROMPT, 3, np.array([[1, 0]], np.float32))
    assert [amount for _, amount in found] == sorted((amount for _, amount in found), reverse=True)
    for feature, amount in found:
        assert amount == pytest.approx(left[feature].item(), rel=1e-4)
    assert {feature for feature, _ in found} == set(((left > 0) & (data._mean > 0)).nonzero().flatten().tolist())
    assert data.active_at(PROMPT, 3) != found


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"feature": N}, "feature: up.1.1 has features 0 to"),
        ({"way": "only"}, "way: unknown name 'only'"),
        ({"strength": np.inf}, "strength: expected a finite number"),
        ({"strengths": 1.0}, "steerings: unknown name 'strengths'"),
        ({"mask": [[1.0], [1.0, 0.0]]}, "mask: expected rows of equal length"),
        ({"mask": [[2.0]]}, "mask: expected .H, W. with numbers from 0 to 1"),
    ],
)
def test_a_turn_that_cannot_be_made_is_one_sentence(data, active, changes, message):
    with pytest.raises(ValueError, match=f"^{message}") as caught:
        data.generate(PROMPT, 0, [{"feature": active[0], "strength": 1.0, **changes}])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda data, turn: data.generate("a red \u661f", 0), "prompt: the text model does not know '\u661f'"),
        (lambda data, turn: data.active_at("a red \u661f", 0), "prompt: the text model does not know '\u661f'"),
        (lambda data, turn: data.active_at(PROMPT, 0, [[0.0]]), "mask: is 0 at every position"),
        (lambda data, turn: data.generate(PROMPT, 0, [turn], (0, 9)), "step_range: expected two rising numbers"),
        (lambda data, turn: data.generate(PROMPT, 0, [turn, {**turn, "control": True}]), "control: holds for all"),
        (lambda data, turn: data.search_meaning(" "), "text: expected some words"),
    ],
)
def test_bad_input_is_one_sentence(data, active, call, message):
    with pytest.raises(ValueError, match=f"^{message}") as caught:
        call(data, {"feature": active[0], "strength": 1.0})
    assert "\n" not in str(caught.value)


def test_captions_are_found_by_their_meaning(small, tmp_path, monkeypatch):
    monkeypatch.setattr(feature_data, "load_sentence_model", lambda name, device: Letters())
    captions = pd.DataFrame(
        {"feature": [4, 9], "caption": ["bbbb", "hhhh"], "reasoning": ["why", ""], "score": [0.9, 0.1]}
    )
    data = browse(small, tmp_path, captions=captions, thumbnails=1)
    assert data.search_meaning("hhhh")[0] == 9 and data.search_meaning("bbbb")[0] == 4
    assert (
        data.table.loc[4, ["caption", "caption_score"]].tolist() == ["bbbb", 0.9] and data.card(4)["reasoning"] == "why"
    )
    with pytest.raises(ValueError, match=f"^captions: has feature {N}; the autoencoder of {BLOCK} has features 0 to"):
        browse(small, tmp_path, captions=captions.assign(feature=[4, N]))


def test_scores_stand_beside_their_controls(small, tmp_path, active):
    scores = pd.DataFrame({
        "who": ["sae", "random directions", "random directions", "neurons", "sae"],
        "feature": [active[0], active[0], 1, N + 5, 2], "pictures": 3, "caption": "words",
        "specificity": [0.7, np.nan, np.nan, 0.4, 0.6], "texture": [0.5, 0.1, 0.3, 0.2, np.nan],
    })  # fmt: skip
    truth = pd.DataFrame({"feature": [active[0]], "value": ["shape: star"], "f1": [0.8], "control": [0.3]})
    data = browse(small, tmp_path, scores=scores, truth=truth, thumbnails=1)
    assert data.card(active[0])["scores"] == [
        {"score": "F1 for shape: star", "feature": 0.8, "random directions": 0.3},
        {"score": "specificity", "feature": 0.7, "neurons": 0.4},
        {"score": "texture", "feature": 0.5, "neurons": 0.2, "random directions": 0.1},
    ]
    assert data.table["specificity"].dropna().tolist() == [0.6, 0.7] or active[0] < 2
    assert data.table.loc[active[0], ["value", "f1", "control"]].tolist() == ["shape: star", 0.8, 0.3]


def test_the_twin_of_a_feature_is_found_in_a_shuffled_autoencoder(small, tmp_path):
    order = torch.randperm(N, generator=torch.Generator().manual_seed(3))
    twin = SAE(small.sae.config)
    with torch.no_grad():
        twin.decoder.copy_(small.sae.decoder[order])
    data = browse(small, tmp_path, twin=Twin(5, twin), thumbnails=1)
    assert data.card(11)["twin"] == {"seed": 5, "feature": int((order == 11).nonzero()), "cosine": pytest.approx(1.0)}
    np.testing.assert_allclose(data.table["stability"], 1.0, atol=1e-5)


def test_the_shelf_is_kept_in_the_folder(small, data, tmp_path):
    data = browse(small, tmp_path, thumbnails=1)
    assert data.load_shelf() == {}
    data.save_shelf({9: "red\n<b>", 2: ""})
    assert browse(small, tmp_path, thumbnails=1).load_shelf() == {9: "red\n<b>", 2: ""}
    assert list(data.load_shelf()) == [9, 2]
    with pytest.raises(ValueError, match=r"^feature: up\.1\.1 has features 0 to"):
        data.save_shelf({N: ""})
    shuffled = SAE(small.sae.config, seed=4)
    other = FeatureData(small.pipeline, BLOCK, shuffled, small.statistics, small.pictures, tmp_path, thumbnails=1)
    assert other.load_shelf() == {}
    other.save_shelf({1: "another autoencoder's"})
    assert data.load_shelf() == {9: "red\n<b>", 2: ""} and other.load_shelf() == {1: "another autoencoder's"}
    stored = json.loads((tmp_path / "shelf.json").read_text())
    for damaged in ("{", "[]", json.dumps({**stored, "shelves": {"a": {"features": [{"feature": "x"}]}}}), '"text"'):
        (tmp_path / "shelf.json").write_text(damaged)
        with pytest.raises(ValueError, match=r"^shelf: shelf\.json is damaged; move it away to begin anew$"):
            data.load_shelf()
        with pytest.raises(ValueError, match=r"^shelf: shelf\.json is damaged"):
            data.save_shelf({1: ""})


def test_a_transcoder_and_unknown_autoencoders_are_refused(small, tmp_path):
    with pytest.raises(ValueError, match=r"^saes: that of up\.1\.1 is a transcoder"):
        small_with = SimpleNamespace(**{**vars(small), "sae": Transcoder(TranscoderConfig(WIDTH, N, 3))})
        browse(small_with, tmp_path)
    small.sae.save_pretrained(tmp_path / "a")
    trained = SAESweep(tmp_path, {}, {(BLOCK, 3, N, 0): "a", (BLOCK, 3, N, 7): "a"}, small.store)
    sae, twin = feature_data.load_autoencoders(trained, BLOCK, 3, N)
    assert torch.equal(sae.decoder, small.sae.decoder) and twin.seed == 7
    with pytest.raises(ValueError, match=r"^block \(of the autoencoders\): unknown name 'up\.0\.1'"):
        feature_data.load_autoencoders(trained, "up.0.1", 3, N)
    with pytest.raises(ValueError, match=f"^k and n_features: the run has none of 4 and {N}; it has 3 and {N}"):
        feature_data.load_autoencoders(trained, BLOCK, 4, N)


def test_captions_of_another_run_are_refused(tmp_path):
    rows = [{"block": "up.1.2", "feature": 3, "caption": "rings", "reasoning": "", "score": 0.8},
            {"block": "up.1.2", "feature": 4, "caption": "", "reasoning": "", "score": None}]  # fmt: skip
    params = {"saes": "outputs/31_train_sae/demo", "k": 10, "n_features": 256}
    write_json(tmp_path / "results.json", {
        "notebook": "36_annotate_features", "params": params, "metrics": {}, "tables": {"captions": rows},
    })  # fmt: skip
    found = feature_data.read_captions(str(tmp_path), "up.1.2", params)
    assert found.to_dict("records") == [{"feature": 3, "caption": "rings", "reasoning": "", "score": 0.8}]
    with pytest.raises(ValueError, match=r"^captions: .* has no feature of block up\.1\.0; its blocks: up\.1\.2$"):
        feature_data.read_captions(str(tmp_path), "up.1.0", params)
    with pytest.raises(ValueError, match=r"^captions: .* is about other autoencoders: its k is 10, here it is 5$"):
        feature_data.read_captions(str(tmp_path), "up.1.2", {**params, "k": 5})
    with pytest.raises(ValueError, match=r"^scores: .* holds no finished run of 34_feature_gallery"):
        feature_data.read_scores(str(tmp_path), "up.1.2", params)
