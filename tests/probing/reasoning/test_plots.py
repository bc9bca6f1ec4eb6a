"""Figures: every stream and category is drawn, and marks of right and wrong are shown."""

import pandas as pd

from vaelab.probing.reasoning import plots
from vaelab.probing.reasoning.conversations import scene_questions


def test_accuracies_have_a_panel_for_each_category_and_a_row_for_each_stream():
    rows = [
        {"stream": stream, "category": category, "accuracy": 0.5, "low": 0.4, "high": 0.6}
        for stream in ("clip", "clip + clip")
        for category in ("complex", "all")
    ]
    figure = plots.accuracies(pd.DataFrame(rows), "clip + clip")
    assert [axis.get_title() for axis in figure.axes] == ["complex", "all"]
    assert [label.get_text() for label in figure.axes[0].get_yticklabels()] == ["clip", "clip + clip"]
    assert "clip + clip" in figure.get_supxlabel()


def test_examples_show_question_truth_and_marked_answers():
    pictures, asked = scene_questions(1, ["test"])
    one = asked[0]
    figure = plots.examples(
        pictures([one.picture]), [one], {"clip": [one.instruction.answer], "none": ["nobody knows"]}
    )
    texts = [text.get_text() for axis in figure.axes for text in axis.texts]
    assert texts[0] == one.question and texts[1] == f"truth: {one.instruction.answer}"
    assert texts[2] == f"clip: {one.instruction.answer} (right)" and texts[3] == "none: nobody knows (wrong)"
    colours = [text.get_color() for axis in figure.axes for text in axis.texts]
    assert colours[2:] == [plots.RIGHT, plots.WRONG]
