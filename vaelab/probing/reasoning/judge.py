"""A language model as the judge of answers, where there is no truth to compare with.

As in LLaVA-Bench (Liu et al. 2023, section 5.1), which Kim et al. ("Revelio", Table 4) use: the judge reads a picture's
description, the question, a reference answer and a model's answer, and gives both a score from 1 to 10. The relative
score is the model's sum of scores in percent of the reference's. The judge is asked in both orders, so that its
preference for the answer that it reads first is measured and cancels.
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from vaelab.models.vision_language import Estimate, Question, VisionLanguageModel, ask_all, estimate
from vaelab.probing.reasoning.conversations import Asked
from vaelab.probing.reasoning.scores import ALL, DRAWS

SYSTEM = (
    "You rate the answers that two assistants gave to a question about a picture. You do not see the picture; read its "
    "description instead. Rate how helpful, relevant, accurate and detailed each answer is, on a scale from 1 to 10, "
    "where 10 is the best. Do not let the order of the answers influence you. Write the two numbers on the first line, "
    "separated by a space and nothing else, and your reasons after it."
)
ORDERS = ("reference first", "model first")


def judge_question(one: Asked, answer: str, order: str) -> Question:
    """Write the question to the judge.

    Args:
        one: the question about a picture, with its context and reference.
        answer: the model's answer.
        order: one of :data:`ORDERS`.
    """
    answers = (one.reference, answer) if order == ORDERS[0] else (answer, one.reference)
    parts = [f"Description of the picture:\n{one.context}", f"Question:\n{one.question}"]
    parts += [f"Answer of assistant {i}:\n{text or '(no answer)'}" for i, text in enumerate(answers, 1)]
    return Question(SYSTEM, ("\n\n".join(parts),))


def parse_scores(text: str) -> tuple[float, float]:
    """Read the judge's two scores from its first line.

    Raises:
        ValueError: the line does not hold two numbers from 1 to 10.
    """
    first = text.strip().splitlines()[0] if text.strip() else ""
    found = re.fullmatch(r"\W*(\d+(?:\.\d+)?)[\s,;/]+(\d+(?:\.\d+)?)\W*", first)
    scores = tuple(float(number) for number in found.groups()) if found else ()
    if len(scores) != 2 or not all(1 <= score <= 10 for score in scores):
        raise ValueError(f"The first line must be two numbers from 1 to 10, it was {first[:80]!r}.")
    return scores


def estimate_judging(asked: Sequence[Asked], streams: int) -> Estimate:
    """Estimate what judging the answers of a number of streams takes, from the longest question and reference."""
    longest = max(asked, key=lambda one: len(one.context + one.question + one.reference))
    return estimate(judge_question(longest, longest.reference, ORDERS[0]), len(asked) * streams * len(ORDERS))


def judge_answers(
    judge: VisionLanguageModel, asked: Sequence[Asked], answers: Mapping[tuple[str, int], Sequence[str]],
    folder: str | Path, *, concurrency: int = 4,
) -> pd.DataFrame:  # fmt: skip
    """Let a judge score every answer in both orders. What was asked before is read from the folder.

    Args:
        judge: the judge.
        asked: the questions.
        answers: one answer per question, by stream and seed.
        folder: the folder of all the judge's answers.
        concurrency: how many questions are asked at a time.

    Returns:
        One row per stream, seed, question and order: ``category``, ``question``, ``order``, ``score``, ``reference``
        (the reference's score), and ``problem``, which says why there are no scores.
    """
    cases = [
        (stream, seed, number, order)
        for (stream, seed), given in answers.items()
        for number in range(len(given))
        for order in ORDERS
    ]
    questions = (judge_question(asked[n], answers[stream, seed][n], order) for stream, seed, n, order in cases)
    rows = []
    replies = ask_all(judge, questions, parse_scores, folder, concurrency=concurrency, total=len(cases))
    for (stream, seed, number, order), reply in zip(cases, replies, strict=True):
        first, second = reply.value or (np.nan, np.nan)
        score, reference = (second, first) if order == ORDERS[0] else (first, second)
        rows.append(
            {
                "stream": stream, "seed": seed, "category": asked[number].category, "question": number, "order": order,
                "score": score, "reference": reference, "problem": reply.problem,
            }
        )  # fmt: skip
    return pd.DataFrame(rows)


def relative_scores(judged: pd.DataFrame, seed: int = 0) -> pd.DataFrame:
    """Compute the relative scores of streams.

    Args:
        judged: the rows of :func:`judge_answers`; those without scores are left out and counted.
        seed: determines the resamples of the intervals.

    Returns:
        One row per stream and category, and per stream for :data:`vaelab.probing.reasoning.scores.ALL`: ``relative``
        (100 times the sum of the model's scores by that of the reference's) with its 95 % interval ``low`` and ``high``
        by the bootstrap over questions, ``score`` and ``reference`` (means), ``first`` (the mean advantage, in points,
        of the answer that the judge reads first), ``judged`` and ``unjudged`` (numbers of replies).

    Raises:
        ValueError: the judge gave no scores for a stream and category.
    """
    rng, rows = np.random.default_rng(seed), []
    for stream in dict.fromkeys(judged["stream"]):
        for category in (*dict.fromkeys(judged["category"]), ALL):
            part = judged[(judged["stream"] == stream) & ((judged["category"] == category) | (category == ALL))]
            scored = part.dropna(subset=["score"])
            if scored.empty:
                raise ValueError(f"judge: it gave no scores for {stream!r} in {category!r}; {part['problem'].iloc[0]}")
            sums = scored.groupby("question")[["score", "reference"]].sum().to_numpy()
            draws = rng.multinomial(len(sums), [1 / len(sums)] * len(sums), DRAWS) @ sums
            low, high = np.quantile(100 * draws[:, 0] / draws[:, 1], [0.025, 0.975])
            ahead = (scored["score"] - scored["reference"]).where(scored["order"] == ORDERS[1])
            behind = (scored["reference"] - scored["score"]).where(scored["order"] == ORDERS[0])
            rows.append(
                {
                    "stream": stream, "category": category, "relative": 100 * sums[:, 0].sum() / sums[:, 1].sum(),
                    "low": low, "high": high, "score": scored["score"].mean(), "reference": scored["reference"].mean(),
                    "first": float(np.nanmean([ahead.mean(), behind.mean()])), "judged": len(scored),
                    "unjudged": len(part) - len(scored),
                }
            )  # fmt: skip
    return pd.DataFrame(rows)
