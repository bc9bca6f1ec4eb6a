import pandas as pd
import pytest
from matplotlib import pyplot as plt

from vaelab import readout_plots


@pytest.fixture
def table():
    return pd.DataFrame([
        {"layer": layer, "factor": factor, "classifier": classifier, "accuracy": accuracy, "low": accuracy - 0.1,
         "high": accuracy + 0.05, "chance": chance}
        for layer, factor, chance in (("up.t25", "shape", 0.125), ("mid.t25", "colour", 0.2))
        for classifier, accuracy in (("probe", 0.5), ("diffc", 0.7))
    ])  # fmt: skip


def test_every_accuracy_has_its_interval_and_every_line_its_chance(table):
    axis = readout_plots.accuracies(table, "title").axes[0]
    assert [label.get_text() for label in axis.get_yticklabels()] == ["shape\nup.t25", "colour\nmid.t25"]
    for number, (name, accuracy) in enumerate((("probe", 0.5), ("diffc", 0.7))):
        bars = axis.containers[number]
        assert bars.get_label() == name
        assert bars.lines[0].get_xdata().tolist() == [accuracy] * 2
        ends = [segment[:, 0].tolist() for segment in bars.lines[2][0].get_segments()]
        assert ends == [pytest.approx([accuracy - 0.1, accuracy + 0.05])] * 2
    heights = [axis.containers[number].lines[0].get_ydata() for number in range(2)]
    assert (heights[0] < heights[1]).all()
    chance = next(line for line in axis.lines if line.get_label() == "the most frequent class")
    assert chance.get_xdata().tolist() == [0.125, 0.2] and list(chance.get_ydata()) == [0, 1]
    plt.close("all")
