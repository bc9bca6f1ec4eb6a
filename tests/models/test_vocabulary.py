"""Words that a text model cannot know are named."""

import json

import pytest
from transformers import CLIPTokenizer

from vaelab import models, world
from vaelab.activations import Sampling, generate
from vaelab.models import vocabulary
from vaelab.models.conditioning import encode_prompts


@pytest.fixture(scope="module")
def tokenizer():
    return CLIPTokenizer.from_pretrained(models.embedded_path() / "tokenizer")


@pytest.fixture(autouse=True)
def nothing_reported_yet(monkeypatch):
    monkeypatch.setattr(vocabulary, "_reported", set())


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("A large  Red star on the left, and a small ring", []),
        ("a red-blue star.", []),
        ("a dog and a red heron", ["dog", "heron"]),
        ("a na\u00efve star; a \u661f", [";", "na\u00efve", "\u661f"]),
        ("a star x 12", ["12", "x"]),
        ("a red \U0001f600 star", ["\U0001f600"]),
        ("", []),
    ],
)
def test_words_that_the_embedded_model_does_not_know(tokenizer, prompt, expected):
    assert vocabulary.unknown_words(tokenizer, [prompt]) == expected


def test_every_word_of_the_world_is_known_to_the_embedded_model(tokenizer):
    prompts = [world.sample(seed, split).prompt for split in ("train", "unseen") for seed in range(200)]
    assert vocabulary.unknown_words(tokenizer, prompts) == []


def test_unknown_words_are_named_once_before_a_picture_is_drawn(small_pipeline, capsys):
    pipeline = small_pipeline("world")
    for _ in range(2):
        generate(pipeline, ["a red dog", "a \u661f"], [0, 1], Sampling(1, 0.0))
        encode_prompts(pipeline, ["a dog", ""], 2, (64, 64))
    said = capsys.readouterr().out
    assert said.count("prompts: the text model does not know") == 1 and "'dog', '\u661f'" in said
    encode_prompts(pipeline, ["a cat on a red star"], 1, (64, 64))
    assert "does not know 'cat'" in (said := capsys.readouterr().out) and "dog" not in said


def test_of_several_text_models_one_must_know_the_word(small_pipeline):
    pipeline = small_pipeline("sd3")
    t5 = vocabulary.unknown_words(pipeline.tokenizer_3, ["a zebra \u661f"])
    assert t5 == ["zebra", "\u661f"]  # characters that its vocabulary lacks


def test_a_tokenizer_of_bytes_knows_every_word(tmp_path):
    from tokenizers.pre_tokenizers import ByteLevel

    symbols = sorted(ByteLevel.alphabet())
    tokens = ["<|startoftext|>", "<|endoftext|>", *symbols, *(f"{symbol}</w>" for symbol in symbols)]
    (tmp_path / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(tokens)}))
    (tmp_path / "merges.txt").write_text("#version: 0.2")
    tokenizer = CLIPTokenizer.from_pretrained(tmp_path)
    assert vocabulary.unknown_words(tokenizer, ["a zebra x 12 \u661f na\u00efve \U0001f600"]) == []
