"""The small language model: its words, its training text, and that a saved one answers as it did."""

import re

import pytest
import torch

from vaelab import models
from vaelab.embedded import train_language
from vaelab.models import language_model
from vaelab.models.language_model import IGNORED, load_language_model
from vaelab.world.questions import describe, instructions
from vaelab.world.scenes import sample


@pytest.fixture(scope="module")
def language():
    return train_language._new(seed=0)


def test_the_tokenizer_knows_every_word_and_is_the_same_every_time(language):
    tokenizer = language.tokenizer
    for split in ("train", "test", "unseen"):
        for seed in range(500, 560):
            scene = sample(seed, split)
            asked = [*instructions(scene, seed), *instructions(scene, seed, held_out=True)]
            for text in (describe(scene), *(f"{one.question} {one.answer}" for one in asked)):
                ids = tokenizer(text, add_special_tokens=False).input_ids
                assert tokenizer.unk_token_id not in ids, text
                assert tokenizer.decode(ids).split() == re.findall(r"\w+|[^\w\s]", text)
    assert train_language.new_tokenizer().get_vocab() == tokenizer.get_vocab()


def test_a_batch_has_the_description_in_the_picture_s_place_and_learns_the_answer_alone(language):
    batch = next(train_language.text_batches(16, language)(start=3))
    for row, (ids, labels) in enumerate(zip(batch["input_ids"], batch["labels"], strict=True)):
        scene = sample(3 * 16 + row)
        whole = language.tokenizer.decode(ids[batch["attention_mask"][row].bool()])
        description = " ".join(re.findall(r"\w+|,", describe(scene)))
        assert whole.startswith(f"<s> user : {description} ")
        answers = {" ".join(re.findall(r"\w+|,", one.answer)) for one in instructions(scene, 3 * 16 + row)}
        assert language.tokenizer.decode(labels[labels != IGNORED]).removesuffix(" </s>") in answers


def test_a_trained_model_is_saved_and_loaded_as_the_embedded_one(tmp_path, monkeypatch):
    monkeypatch.setattr(train_language, "LESSONS", {"first": (2, 1), "second": (1, 3)})
    made = train_language.train_language_model(tmp_path / "training", steps=[2, 1], device="cpu")
    assert [trained.history[-1]["step"] for trained in made.lessons.values()] == [2, 1]
    asked = ["what is in the picture?"], ["a large red star on the left"]
    made.model.model.half().float()
    before = train_language.answers_from_descriptions(made.model, asked[1], asked[0])
    models.save_in_float16(made.model.model, tmp_path / "saved", made.model.tokenizer)
    monkeypatch.setattr(language_model, "embedded_language_path", lambda: tmp_path / "saved")
    loaded = load_language_model("embedded", device="cpu")
    assert loaded.model.dtype == torch.float32 and (tmp_path / "saved" / "checksums.json").is_file()
    assert train_language.answers_from_descriptions(loaded, asked[1], asked[0]) == before


def test_a_conversation_of_the_second_lesson_has_several_questions(language):
    batch = next(train_language.text_batches(4, language, questions=8)())
    for ids, labels in zip(batch["input_ids"], batch["labels"], strict=True):
        assert (labels == language.tokenizer.eos_token_id).sum() == 8, "each answer ends"
        assert language.tokenizer.decode(ids).count("user") == 8


def test_the_plan_names_the_training_and_every_lesson_needs_its_steps():
    plan = train_language.plan_language_model(steps=[3, 2], device="cpu")
    assert (plan.title, plan.steps, plan.seconds) == ("language model", 5, None)
    with pytest.raises(ValueError, match=r"^language_steps: expected one for each of one question, several questions"):
        train_language.plan_language_model(steps=[3], device="cpu")
    with pytest.raises(ValueError, match=r"^language_steps: must be at least 1, got 0"):
        train_language.train_language_model("nowhere", steps=[3, 0])
