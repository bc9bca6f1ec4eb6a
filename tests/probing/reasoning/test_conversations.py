"""Lessons and questions: those of scenes, and those of files in LLaVA's formats."""

import json

import PIL.Image
import pytest
import torch

from vaelab.models.language_model import Turn
from vaelab.probing.reasoning.conversations import (
    read_lessons,
    read_questions,
    scene_lessons,
    scene_questions,
)
from vaelab.world.scenes import allowed_combinations, render, sample

TALK = [{"from": "human", "value": "What is it?\n<image>"}, {"from": "gpt", "value": "A red dot."}]


def test_lessons_are_of_training_scenes_in_training_phrasings():
    lessons = scene_lessons(6, seed=1)
    assert [one.picture for one in lessons.captions] == list(range(6))
    assert torch.equal(lessons.pictures([2, 0]), render([sample(2), sample(0)]))
    assert set(lessons.captions) < set(lessons.instructions) and len(lessons.instructions) > 40
    smaller = scene_lessons(6, seed=1, resolution=32).pictures
    assert smaller([0]).shape == (1, 3, 32, 32) and len(smaller) == 6


def test_questions_are_of_held_out_scenes_and_half_are_in_held_out_phrasings():
    pictures, asked = scene_questions(4, ["test", "unseen"])
    assert {one.split for one in asked} == {"test", "unseen"} and len(pictures) == 8
    assert {one.picture for one in asked if one.instruction.held_out} == {1, 3, 5, 7}
    allowed = {split: set(allowed_combinations(split)) for split in ("test", "unseen")}
    for one in asked:
        for thing in pictures.scenes[one.picture].things:
            assert (thing.shape, thing.colour, thing.size, thing.position) in allowed[one.split]
    learned = {turn.question for lesson in scene_lessons(200).instructions for turn in lesson.turns}
    assert not learned & {one.question for one in asked if one.instruction.held_out}


@pytest.fixture
def files(tmp_path):
    (tmp_path / "pictures").mkdir()
    for name in ("a.png", "b.png"):
        PIL.Image.new("RGB", (40, 30), "red" if name == "a.png" else "blue").save(tmp_path / "pictures" / name)
    rows = [{"image": "a.png", "conversations": TALK}, {"conversations": TALK}]
    (tmp_path / "captions.json").write_text(json.dumps(rows))
    (tmp_path / "instructions.json").write_text(json.dumps([{"image": "b.png", "conversations": TALK * 2}]))
    lines = {
        "questions": {"question_id": 7, "image": "b.png", "text": "Which colour?", "category": "conv"},
        "contexts": {"image": "b.png", "caption": "a blue picture"},
        "references": {"question_id": 7, "text": "Blue."},
    }
    for name, line in lines.items():
        (tmp_path / f"{name}.jsonl").write_text(json.dumps(line) + "\n")
    return tmp_path


def lessons_of(files, **options):
    pictures = str(files / "pictures")
    return read_lessons(
        str(files / "captions.json"), pictures, str(files / "instructions.json"), pictures, 16, **options
    )  # fmt: skip


def questions_of(files):
    names = (str(files / f"{name}.jsonl") for name in ("questions", "contexts", "references"))
    questions, contexts, references = names
    return read_questions(questions, str(files / "pictures"), contexts, references, 16)


def test_files_in_llava_s_formats_are_read(files, capsys):
    lessons = lessons_of(files)
    assert "captions: 1 of 2 conversations have no picture and are left out" in capsys.readouterr().out
    assert lessons.captions[0].turns == (Turn("What is it?\n<image>", "A red dot."),)
    assert len(lessons.instructions[0].turns) == 2 and lessons.instructions[0].picture == 1
    pixels = lessons.pictures([1, 0])
    assert pixels.shape == (2, 3, 16, 16) and pixels[0, 2].mean() == 1 and pixels[1, 0].mean() == 1
    pictures, (one,) = questions_of(files)
    assert (one.question, one.category, one.context, one.reference) == (
        "Which colour?", "conv", "a blue picture", "Blue."
    )  # fmt: skip
    assert len(pictures) == 1


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("captions.json", "[", "captions: '.*captions.json' is no JSON"),
        ("captions.json", "{}", "captions: '.*' holds no list of conversations"),
        ("captions.json", json.dumps([{"image": "a.png", "conversations": TALK[:1]}]), "captions: entry 0 of .* is no"),
        ("captions.json", json.dumps([{"image": "c.png", "conversations": TALK}]), "captions: the picture 'c.png' is"),
        ("captions.json", json.dumps([{"conversations": TALK}]), "captions: '.*' has no conversation about a picture"),
        ("questions.jsonl", '{"question_id": 1}\n', "questions: line 1 of .* lacks image, text, category"),
        ("references.jsonl", '{"question_id": 8, "text": "no"}\n', "questions: question 7 has no reference answer"),
        ("contexts.jsonl", "no\n", "contexts: '.*' has a line that is no JSON"),
    ],
)
def test_files_of_another_form_are_refused(files, name, text, message):
    (files / name).write_text(text)
    with pytest.raises(ValueError, match=f"^{message}"):
        lessons_of(files)
        questions_of(files)


def test_a_missing_file_is_refused(files):
    (files / "captions.json").unlink()
    with pytest.raises(ValueError, match=r"^captions: '.*captions.json' is no file"):
        lessons_of(files)
