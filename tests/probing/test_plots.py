import numpy as np
import pandas as pd
import pytest
from matplotlib import pyplot as plt

from vaelab.probing import plots


@pytest.fixture
def table():
    return pd.DataFrame([
        {"layer": layer, "factor": factor, "classifier": classifier, "accuracy": accuracy, "low": accuracy - 0.1,
         "high": accuracy + 0.05, "chance": chance, "uniform": chance / 2}
        for layer, factor, chance in (("up.t25", "shape", 0.125), ("mid.t25", "colour", 0.2))
        for classifier, accuracy in (("probe", 0.5), ("diffc", 0.7))
    ])  # fmt: skip


def test_every_accuracy_has_its_interval_and_every_line_its_chance(table):
    axis = plots.accuracies(table, "title").axes[0]
    assert [label.get_text() for label in axis.get_yticklabels()] == ["shape\nup.t25", "colour\nmid.t25"]
    for number, (name, accuracy) in enumerate((("linear probe", 0.5), ("Diff-C", 0.7))):
        bars = axis.containers[number]
        assert bars.get_label() == name
        assert bars.lines[0].get_xdata().tolist() == [accuracy] * 2
        ends = [segment[:, 0].tolist() for segment in bars.lines[2][0].get_segments()]
        assert ends == [pytest.approx([accuracy - 0.1, accuracy + 0.05])] * 2
    heights = [axis.containers[number].lines[0].get_ydata() for number in range(2)]
    assert (heights[0] < heights[1]).all()
    for name, places in (("always the commonest class", [0.125, 0.2]), ("chance, 1 / classes", [0.0625, 0.1])):
        mark = next(line for line in axis.lines if line.get_label() == name)
        assert mark.get_xdata().tolist() == places and list(mark.get_ydata()) == [0, 1]
    plt.close("all")


def test_models_are_told_apart_where_there_are_several(table):
    both = pd.concat([table.assign(model="org/unet"), table.assign(model="dit")])
    labels = [label.get_text() for label in plots.accuracies(both).axes[0].get_yticklabels()]
    assert labels == ["shape\nunet, up.t25", "colour\nunet, mid.t25", "shape\ndit, up.t25", "colour\ndit, mid.t25"]
    assert len(plots.accuracies(table.assign(model="dit")).axes[0].get_yticklabels()) == 2
    plt.close("all")


def test_the_map_has_every_number_in_its_place_and_its_colour_begins_at_chance():
    rows = [
        {"block": block, "timestep": t, "factor": factor, "value": 0.01 * (10 * b + t / 100) + 0.3 * f, "chance": 0.2}
        for f, factor in enumerate(("shape", "colour"))
        for b, block in enumerate(("up", "mid"))
        for t in (500, 25)
    ]
    table = pd.DataFrame(rows).assign(uniform=0.125)
    few = table[table["block"] == "mid"].assign(value=1.0, chance=0.5).drop(columns="uniform")
    figure = plots.knowledge({"probe": table, "purity": few}, "title")
    assert len(figure.axes) == 4
    shape, colour, *pure = figure.axes
    assert [axis.get_title() for axis in figure.axes] == [
        "shape\nchance 0.12\ncommonest 0.20", "colour\nchance 0.12\ncommonest 0.20",
        "shape\nchance 0.50", "colour\nchance 0.50",
    ]  # fmt: skip
    assert [label.get_text() for label in shape.get_yticklabels()] == ["up", "mid"]
    assert [label.get_text() for label in shape.get_xticklabels()] == ["25", "500"]
    assert [text.get_text() for text in colour.texts] == ["0.30", "0.35", "0.40", "0.45"]
    drawn = colour.collections[0].get_array().ravel()
    assert drawn.tolist() == pytest.approx([(v - 0.2) / 0.8 for v in (0.3025, 0.35, 0.4025, 0.45)])
    assert shape.collections[0].get_array().ravel().max() == 0, "what is below chance is drawn as chance"
    assert {text.get_color() for text in colour.texts} == {"0.15"}
    for axis in pure:
        assert {text.get_color() for text in axis.texts} == {"white"}
        drawn = axis.collections[0].get_array()
        assert np.ma.getmaskarray(drawn).tolist() == [[True, True], [False, False]] and drawn[1].tolist() == [1, 1]
        assert [text.get_text() for text in axis.texts] == ["1.00"] * 2, "what was not measured has no number"
    plt.close("all")
