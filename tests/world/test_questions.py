"""Questions about scenes: the truth, held-out phrasings, and marks of right and wrong answers."""

import re
from collections import Counter

import pytest

from vaelab.world import questions
from vaelab.world.questions import CATEGORIES, KINDS, Instruction, describe, instructions, mark, parse_answer
from vaelab.world.scenes import Scene, Thing, sample

STAR = Thing("star", "red", "large", "left")
RING = Thing("ring", "blue", "small", "top right")
HEART = Thing("heart", "red", "small", "bottom")
SCENE = Scene((RING, STAR), "striped", "pink")


def asked(kind, scene=SCENE, count=40, **options):
    """The questions of one kind, by text, with their answers."""
    found = [one for seed in range(count) for one in instructions(scene, seed, kinds=[kind], **options)]
    return {one.question: one.answer for one in found}


def question(kind, answer):
    return Instruction(kind, "", answer, False)


@pytest.mark.parametrize(
    ("kind", "text", "answer"),
    [
        ("colour", "what colour is the star?", "red"),
        ("shape", "what shape is the blue thing?", "ring"),
        ("size", "is the ring large or small?", "small"),
        ("position", "where is the ring?", "in the top right"),
        ("thing at", "what shape is the thing on the left?", "star"),
        ("ground", "what colour is the background?", "pink"),
        ("texture", "what pattern is the background?", "striped"),
        ("count", "how many things are there?", "two"),
        ("count size", "how many large things are there?", "one"),
        ("relation", "is the star left of the ring?", "yes"),
        ("relation", "is the star above the ring?", "no"),
        ("comparison", "which is larger, the thing left of the ring or the blue thing?", "star"),
        ("other", "which thing is not a star?", "ring"),
        ("exists", "is there a red star?", "yes"),
        ("absent", "is there not a red star?", "no"),
    ],
)
def test_the_answer_is_the_scene_s_truth(kind, text, answer):
    assert asked(kind, count=200)[text] == answer


def test_half_of_the_objects_asked_for_exist_and_the_others_resemble_one():
    answers = asked("exists", count=300)
    wrong = [re.search(r"an? (\w+) (\w+)", text).groups() for text, answer in answers.items() if answer == "no"]
    assert all((colour in ("red", "blue") or shape in ("star", "ring")) for colour, shape in wrong)
    assert not {("red", "star"), ("blue", "ring")} & set(wrong)
    assert ("red", "ring") in wrong, "the colour of one and the shape of the other"
    drawn = Counter(one.answer for seed in range(300) for one in instructions(SCENE, seed, kinds=["exists"]))
    assert 110 < drawn["yes"] < 190


def test_things_of_equal_size_compare_as_neither():
    scene = Scene((RING, HEART), "plain", "grey")
    assert set(asked("comparison", scene).values()) == {"neither"}


def test_no_question_names_an_object_that_is_not_unique():
    twins = Scene((STAR, Thing("star", "red", "small", "right")), "plain", "teal")
    kinds = {one.kind for seed in range(20) for one in instructions(twins, seed)}
    assert not kinds & {"colour", "shape", "size", "position", "relation", "comparison", "other"}
    assert {"thing at", "exists", "count", "describe"} <= kinds


def test_a_description_goes_from_the_top_left_to_the_bottom_right_and_names_everything():
    assert describe(Scene((HEART, STAR, RING), "striped", "pink")) == (
        "a small blue ring in the top right, a large red star on the left and a small red heart at the bottom, "
        "on a striped pink background"
    )


def test_true_answers_get_full_marks_and_answers_of_another_scene_do_not():
    scores = {kind: [] for kind in KINDS}
    for seed in range(120):
        scene, other = sample(seed), sample(seed + 1000)
        wrong = {one.kind: one.answer for one in instructions(other, seed + 1000)}
        for one in instructions(scene, seed):
            assert mark(one, one.answer) == (1.0, True)
            assert mark(one, f"It is {one.answer.upper()}.") == (1.0, True), "in a sentence"
            if one.kind in wrong and wrong[one.kind] != one.answer:
                scores[one.kind].append(mark(one, wrong[one.kind]))
    for kind, marks in scores.items():
        assert len(marks) > 2 and all(each.parsed and each.score < 1 for each in marks), kind
        if kind != "describe":
            assert not any(each.score for each in marks)


@pytest.mark.parametrize(
    ("kind", "answer", "text", "expected"),
    [
        ("colour", "red", "blue", (0.0, True)),
        ("colour", "red", "red or blue", (0.0, False)),
        ("colour", "red", "I cannot see it", (0.0, False)),
        ("position", "at the top", "in the top left", (0.0, True)),
        ("position", "in the top left", "top left corner", (1.0, True)),
        ("count", "two", "There are 2 things.", (1.0, True)),
        ("exists", "yes", "Yes, there is", (1.0, True)),
        ("comparison", "star", "neither", (0.0, True)),
        ("describe", "", "", (0.0, False)),
    ],
)
def test_planted_answers(kind, answer, text, expected):
    assert mark(question(kind, answer or describe(SCENE)), text) == expected


def test_a_description_loses_what_is_missing_and_what_is_made_up():
    one = question("describe", describe(SCENE))
    whole = 3 + 3 + 2
    assert mark(one, "a large red star on the left").score == 3 / whole
    assert mark(one, "a large blue star on the left, on a striped pink background").score == 4 / (whole + 1)
    assert mark(one, describe(SCENE) + " and a small red heart at the bottom").score == whole / (whole + 3)
    assert mark(one, "a large red star").score == 0.0, "an object without its position is no true fact"


def test_held_out_phrasings_are_other_sentences_in_known_words():
    scenes = [sample(seed) for seed in range(300)]
    seen = [one for seed, scene in enumerate(scenes) for one in instructions(scene, seed)]
    held = [one for seed, scene in enumerate(scenes) for one in instructions(scene, seed, held_out=True)]
    assert {one.category for one in seen} == set(CATEGORIES) and {one.kind for one in held} == set(KINDS)
    assert not {one.question for one in seen} & {one.question for one in held}
    words = [{word for one in each for word in re.findall(r"\w+|[^\w\s]", one.question)} for each in (seen, held)]
    assert words[1] <= words[0]


def test_the_same_seed_asks_the_same_and_only_known_kinds_can_be_asked():
    assert instructions(SCENE, 3) == instructions(SCENE, 3) != instructions(SCENE, 4)
    with pytest.raises(ValueError, match=r"^kinds: unknown name 'colours'; .*colour"):
        instructions(SCENE, 0, kinds=["colours"])
    with pytest.raises(ValueError, match=r"^seed: must be at least 0, got -1"):
        instructions(SCENE, -1)
    with pytest.raises(ValueError, match=r"^kind: unknown name"):
        parse_answer("size of", "large")


def test_every_kind_has_a_category_and_a_held_out_phrasing():
    for name, kind in KINDS.items():
        assert kind.category in CATEGORIES, name
        assert kind.value == "description" or kind.value in questions.VALUES, name
        assert len(set(kind.phrasings)) >= 3, name
