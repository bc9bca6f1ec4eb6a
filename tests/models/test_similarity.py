"""Models of similarity: known answers, and only the pinned weights."""

import importlib.util

import pytest
import skimage
import torch

from vaelab.models import similarity


@pytest.fixture(scope="module")
def pictures_model():
    return similarity.load_picture_model(device="cpu")


def pixels(picture):
    return torch.from_numpy(picture).permute(2, 0, 1)[None].float() / 127.5 - 1


def test_efficientnet_names_a_cat_an_egyptian_cat_and_finds_it_like_itself(pictures_model):
    cat, rocket = pixels(skimage.data.chelsea()), pixels(skimage.data.rocket())
    classes = pictures_model.model(pictures_model.preprocess(cat))
    assert int(classes.argmax()) == 285  # ImageNet's Egyptian cat
    left, right, other = (
        similarity.embed_in_batches(pictures_model, part)[0] for part in (cat[..., :300], cat[..., 150:], rocket)
    )
    assert float(left.norm()) == pytest.approx(1)
    assert float(left @ right) > float(left @ other) + 0.2


def test_sentences_are_embedded_as_by_sentence_transformers():
    model = similarity.load_sentence_model(device="cpu")
    found = model.embed_sentences(["a red circle", "the stock market fell, and nobody knew why"])
    # by SentenceTransformer(...).encode(..., normalize_embeddings=True), version 6.2.0
    expected = torch.tensor([-0.01264800, 0.00574349, -0.16688094, 0.08779727, -0.03873893, -0.02334482])
    torch.testing.assert_close(found[0, :6], expected, atol=1e-5, rtol=0)
    alone = model.embed_sentences(["a red circle"])
    torch.testing.assert_close(alone[0], found[0], atol=1e-5, rtol=0)  # padding changes nothing
    assert (model.name, tuple(found.shape)) == ("all-MiniLM-L6-v2", (2, 384))


def test_clip_embeds_both(clip_folder):
    model = similarity.load_picture_model(str(clip_folder), device="cpu")
    assert model.name == str(clip_folder) and similarity.embeds_sentences(model)
    assert similarity.embed_in_batches(model, torch.zeros(3, 3, 32, 32)).shape[0] == 3
    assert similarity.load_sentence_model(str(clip_folder), device="cpu").embed_sentences(["a cat"]).shape[0] == 1


@pytest.mark.parametrize("load", [similarity.load_picture_model, similarity.load_sentence_model])
def test_other_weights_and_missing_packages_are_refused(load, monkeypatch):
    with pytest.raises(ValueError, match=r"^scorer: .* has no revision 'main'"):
        load(device="cpu", revision="main", parameter="scorer")
    with monkeypatch.context() as patch:
        patch.setattr(similarity, "SHA256", dict.fromkeys(similarity.SHA256, "0" * 64))
        with pytest.raises(ValueError, match=r"^scorer: .* does not hold the weights of .*; its SHA-256 is another"):
            load(device="cpu", parameter="scorer")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"^scorer: .* is not installed; run pip install 'vaelab\[semantic\]'"):
        load(device="cpu", parameter="scorer")


def test_what_is_not_finite_is_refused(pictures_model):
    with pytest.raises(ValueError, match=r"^pictures: some have NaN"):
        similarity.embed_in_batches(pictures_model, torch.full((1, 3, 8, 8), torch.nan))
