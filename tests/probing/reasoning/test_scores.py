"""Accuracies with intervals and paired differences, on planted answers."""

import numpy as np
import pytest

from vaelab.probing.reasoning.conversations import scene_questions
from vaelab.probing.reasoning.scores import ALL, accuracy_table, generalization_table, mark_answers


@pytest.fixture(scope="module")
def asked():
    return scene_questions(40, ["test", "unseen"])[1]


def planted(asked, stream, seed, share):
    """Answers of which a share is right, drawn by the seed; the others are of no form."""
    right = np.random.default_rng([3, seed]).random(len(asked)) < share
    given = [one.instruction.answer if good else "nobody knows" for one, good in zip(asked, right, strict=True)]
    return mark_answers(asked, given, stream, seed)


@pytest.fixture(scope="module")
def marks(asked):
    import pandas as pd

    shares = {"clip + clip": 0.5, "clip + up_ft1.t25": 0.7, "clip + noise": 0.5}
    return pd.concat([planted(asked, stream, seed, share) for stream, share in shares.items() for seed in (0, 1)])


def test_planted_accuracies_and_differences_are_found_within_their_intervals(marks, asked):
    table = accuracy_table(marks, "clip + clip").set_index(["stream", "category"])
    for stream, share in (("clip + clip", 0.5), ("clip + up_ft1.t25", 0.7)):
        row = table.loc[stream, ALL]
        assert row["low"] < row["accuracy"] < row["high"] and abs(row["accuracy"] - share) < 0.05
        assert row["high"] - row["low"] < 0.12
        assert np.isclose(row["unparsed"], 1 - row["accuracy"]) and row["questions"] == len(asked)
    better = table.loc["clip + up_ft1.t25", ALL]
    assert 0 < better["difference_low"] < better["difference"] < better["difference_high"]
    same = table.loc["clip + noise"]
    assert (same["difference"] == 0).all() and (same["difference_low"] == 0).all(), "equal answers, drawn alike"
    assert table.loc["clip + clip", "difference"].isna().all()
    assert set(table.index.get_level_values(1)) == {"conversational", "detail", "complex", ALL}


def test_a_difference_that_one_seed_alone_shows_is_not_certain(asked):
    import pandas as pd

    parts = [planted(asked, "clip + clip", seed, 0.5) for seed in (0, 1)]
    parts += [planted(asked, "up", 0, 0.9), planted(asked, "up", 1, 0.4)]
    row = accuracy_table(pd.concat(parts), "clip + clip").set_index(["stream", "category"]).loc["up", ALL]
    assert row["difference_low"] < 0 < row["difference"] < row["difference_high"]


def test_generalization_has_every_split_and_phrasing(marks):
    table = generalization_table(marks)
    assert len(table) == 3 * 2 * 2 and table["size"].sum() == len(marks)
    assert set(table["phrasing"]) == {"held out", "of training"}


def test_an_unknown_baseline_is_refused(marks):
    with pytest.raises(ValueError, match=r"^baseline: unknown name 'clip'; .*clip \+ clip"):
        accuracy_table(marks, "clip")
