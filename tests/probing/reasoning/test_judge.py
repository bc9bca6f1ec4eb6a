"""A judge of answers: both orders, relative scores of planted judges, and replies that are nonsense."""

import pytest

from vaelab.probing.reasoning.conversations import Asked
from vaelab.probing.reasoning.judge import (
    ORDERS,
    estimate_judging,
    judge_answers,
    judge_question,
    parse_scores,
    relative_scores,
)
from vaelab.probing.reasoning.scores import ALL

ASKED = [
    Asked(0, f"question {i}", ("conv", "complex")[i % 2], context="a picture", reference=f"reference {i}")
    for i in range(6)
]
ANSWERS = {("clip", 0): [f"own {i}" for i in range(6)], ("clip + clip", 0): [f"other {i}" for i in range(6)]}


class Judge:
    """Gives the reference 8, ``own`` answers 4 and others 6, and one point more to what it reads first."""

    name, identity, concurrent = "judge", {"model": "judge"}, False

    def __init__(self, nonsense=()):
        self.asked, self.nonsense = 0, nonsense

    def answer(self, question, earlier=()):
        self.asked += 1
        (text,) = question.parts
        if any(word in text for word in self.nonsense):
            return "Both are wonderful."
        first, second = text.split("Answer of assistant ")[1:]
        scores = [8 if "reference" in one else 4 if "own" in one else 6 for one in (first, second)]
        return f"{scores[0] + 1} {scores[1]}\nbecause"


def test_relative_scores_cancel_the_order_and_measure_its_effect(tmp_path):
    judge = Judge()
    judged = judge_answers(judge, ASKED, ANSWERS, tmp_path)
    table = relative_scores(judged).set_index(["stream", "category"])
    assert table.loc[("clip", ALL), "relative"] == pytest.approx(100 * 4.5 / 8.5)
    assert table.loc[("clip + clip", "conv"), "relative"] == pytest.approx(100 * 6.5 / 8.5)
    assert table["first"].tolist() == pytest.approx([1.0] * len(table)), "one point, whoever is better"
    assert judge.asked == len(judged) == 2 * 2 * 6
    judge_answers(judge, ASKED, ANSWERS, tmp_path)
    assert judge.asked == 24, "what was asked is not asked again"


def test_replies_that_are_nonsense_are_counted_and_a_judge_that_gives_no_scores_is_an_error(tmp_path):
    judged = judge_answers(Judge(nonsense=["question 0"]), ASKED, ANSWERS, tmp_path / "some")
    table = relative_scores(judged).set_index(["stream", "category"])
    assert table.loc[("clip", "conv"), "unjudged"] == 2 and table.loc[("clip", "complex"), "unjudged"] == 0
    assert "must be two numbers" in judged["problem"].iloc[0]
    with pytest.raises(ValueError, match=r"^judge: it gave no scores for 'clip' in 'conv'; no valid answer in 3"):
        relative_scores(judge_answers(Judge(nonsense=["question"]), ASKED, ANSWERS, tmp_path / "none"))


def test_the_judge_reads_description_question_and_both_answers_in_order():
    text = [judge_question(ASKED[0], "own", order).parts[0] for order in ORDERS]
    for one in text:
        assert "a picture" in one and "question 0" in one
    assert text[0].index("reference 0") < text[0].index("own") and text[1].index("own") < text[1].index("reference 0")
    assert estimate_judging(ASKED, streams=2).requests == 24


@pytest.mark.parametrize(("text", "scores"), [("7 8", (7, 8)), ("7.5, 8\nfor", (7.5, 8)), ("**3 9**", (3, 9))])
def test_two_numbers_are_read(text, scores):
    assert parse_scores(text) == scores


@pytest.mark.parametrize("text", ["", "7", "11 3", "0 5", "seven eight", "Answer 1 is 7 8"])
def test_anything_else_is_refused(text):
    with pytest.raises(ValueError, match="two numbers from 1 to 10"):
        parse_scores(text)
