"""Accuracy of streams by category, with intervals over pictures and seeds, and paired differences to a control."""

from collections.abc import Sequence

import numpy as np
import pandas as pd

from vaelab.core.validate import one_of
from vaelab.probing.reasoning.conversations import Asked
from vaelab.probing.reasoning.features import WORDS, stream_parts
from vaelab.world.questions import CATEGORIES, mark

DRAWS = 1000
"""Resamples of an interval."""
ALL = "all"
"""The name of all categories together, each question counting once."""


def mark_answers(asked: Sequence[Asked], answers: Sequence[str], stream: str, seed: int) -> pd.DataFrame:
    """Mark answers by the truth (:func:`vaelab.world.questions.mark`).

    Returns:
        One row per question: ``stream``, ``seed``, ``picture``, ``category``, ``kind``, ``split``, ``held_out`` (the
        phrasing), ``question``, ``truth``, ``answer``, ``score`` and ``parsed``.
    """
    rows = []
    for one, answer in zip(asked, answers, strict=True):
        score, parsed = mark(one.instruction, answer)
        rows.append(
            {
                "stream": stream, "seed": seed, "picture": one.picture, "category": one.category,
                "kind": one.instruction.kind, "split": one.split, "held_out": one.instruction.held_out,
                "question": one.question, "truth": one.instruction.answer, "answer": answer, "score": score,
                "parsed": parsed,
            }
        )  # fmt: skip
    return pd.DataFrame(rows)


def accuracy_table(marks: pd.DataFrame, baseline: str, seed: int = 0) -> pd.DataFrame:
    """Compute each stream's accuracy in each category, and its difference to a baseline.

    The intervals are of 95 %, by the bootstrap: pictures and, independently, seeds are drawn with replacement. All
    streams are resampled alike, so that the differences are paired. With one seed the intervals do not hold the
    variance between trainings.

    Args:
        marks: the rows of :func:`mark_answers` for all streams and seeds.
        baseline: the stream to compare with.
        seed: determines the resamples.

    Returns:
        One row per stream and category, and per stream for :data:`ALL`: ``accuracy``, ``low``, ``high``,
        ``unparsed`` (the share of answers that were not understood), ``questions``, ``seeds``; and ``difference``,
        ``difference_low``, ``difference_high`` to the baseline, missing in the baseline's own rows.

    Raises:
        ValueError: the baseline is not among the streams.
    """
    streams, seeds = list(dict.fromkeys(marks["stream"])), sorted(set(marks["seed"]))
    one_of("baseline", baseline, streams)
    rng = np.random.default_rng(seed)
    pictures = sorted(set(marks["picture"]))
    by_picture = rng.multinomial(len(pictures), [1 / len(pictures)] * len(pictures), DRAWS)
    by_seed = rng.multinomial(len(seeds), [1 / len(seeds)] * len(seeds), DRAWS)
    rows = []
    for category in (*(name for name in CATEGORIES if name in set(marks["category"])), ALL):
        part = marks if category == ALL else marks[marks["category"] == category]
        drawn = {}
        for stream in streams:
            own = part[part["stream"] == stream]
            grid = own.pivot_table(index="seed", columns="picture", values="score", aggfunc=["sum", "count"])
            sums, counts = (
                grid[name].reindex(index=seeds, columns=pictures).fillna(0).to_numpy() for name in ("sum", "count")
            )
            with np.errstate(invalid="ignore"):
                drawn[stream] = _weighted(sums, by_seed, by_picture) / _weighted(counts, by_seed, by_picture)
            low, high = np.nanquantile(drawn[stream], [0.025, 0.975])
            rows.append(
                {
                    "stream": stream, "category": category, "accuracy": own["score"].mean(), "low": low, "high": high,
                    "unparsed": 1 - own["parsed"].mean(), "questions": len(own) // len(seeds), "seeds": len(seeds),
                }
            )  # fmt: skip
        base = next(row for row in rows if row["stream"] == baseline and row["category"] == category)
        for row in rows[-len(streams) :]:
            if row["stream"] != baseline:
                low, high = np.nanquantile(drawn[row["stream"]] - drawn[baseline], [0.025, 0.975])
                row |= {
                    "difference": row["accuracy"] - base["accuracy"], "difference_low": low, "difference_high": high
                }  # fmt: skip
    columns = ["difference", "difference_low", "difference_high"]
    table = pd.DataFrame(rows)
    return table.reindex(columns=[*(name for name in table if name not in columns), *columns])


def generalization_table(marks: pd.DataFrame) -> pd.DataFrame:
    """Compute each stream's accuracy by the world's split and by whether the phrasing is held out."""
    named = marks.assign(phrasing=np.where(marks["held_out"], "held out", "of training"))
    return named.groupby(["stream", "split", "phrasing"], sort=False)["score"].agg(["mean", "size"]).reset_index()


def layer_table(table: pd.DataFrame, known: pd.DataFrame | None = None) -> pd.DataFrame:
    """Arrange the differences of streams that have a denoiser's layer by layer and category.

    Args:
        table: the result of :func:`accuracy_table`.
        known: the accuracies of notebook 42, with columns ``layer``, ``factor``, ``classifier`` and ``accuracy``, or
            None.

    Returns:
        One row per stream with a layer: ``layer``, ``stream``, the difference to the baseline in each category, and
        with ``known`` the column ``probe``: the linear probe's accuracy on the layer, the mean over all sets of
        classes, missing where it was not measured. Empty if no stream has a layer.
    """
    rows = []
    for stream, part in table.groupby("stream", sort=False):
        layers = [each for each in stream_parts(stream) if each not in WORDS]
        if layers:
            rows.append({"layer": layers[-1], "stream": stream, **part.set_index("category")["difference"]})
    found = pd.DataFrame(rows)
    if known is not None and len(found):
        probes = known[known["classifier"] == "probe"].groupby("layer")["accuracy"].mean()
        found["probe"] = found["layer"].map(probes)
    return found


def _weighted(values: np.ndarray, by_seed: np.ndarray, by_picture: np.ndarray) -> np.ndarray:
    """Sum values (seeds, pictures) with the weights of each draw: (draws,)."""
    return np.einsum("ds,sp,dp->d", by_seed, values, by_picture, optimize=True)
