import matplotlib
import pandas as pd
import pytest
import torch

matplotlib.use("agg")

from vaelab.viz import charts, grids

STUDY = pd.DataFrame(
    [
        {"step": step, "condition": condition, "seed": seed, "suppressed": step + seed, "mse": 1 / (step + 1)}
        for step in (0, 10, 20)
        for condition in ("baseline", "nudge")
        for seed in (0, 1)
    ]
)


@pytest.fixture(autouse=True)
def close_figures():
    yield
    charts.plt.close("all")


def test_pictures_are_shown_as_they_are():
    pictures = torch.stack([torch.full((3, 4, 4), -1.0), torch.full((3, 4, 4), 1.0)])
    figure = grids.picture_grid({"a row": pictures})
    first, second = (axis.images[0].get_array() for axis in figure.axes)
    assert first.max() == 0 and second.min() == 1
    assert figure.axes[0].texts[0].get_text() == "a row"


def test_a_grids_captions_stand_under_their_columns():
    pictures = torch.zeros(3, 3, 4, 4)
    captions = ["a large red circle on the left", "a star"]
    figure = grids.picture_grid({"one": pictures, "other": pictures}, captions=captions)
    texts = [[text.get_text() for text in axis.texts] for axis in figure.axes]
    assert texts == [["one"], [], [], ["other", "a large red circle\non the left"], ["a star"], []]


def test_a_curve_for_every_condition_and_a_thin_line_for_every_seed():
    axis = charts.curves(STUDY, "mse", "MSE", log=True).axes[0]
    assert axis.get_yscale() == "log"
    assert [line.get_linewidth() for line in axis.lines].count(0.6) == 4


def test_losses_has_the_three_panels_of_figure_3():
    table = STUDY.assign(reconstruction=0.5, mse=0.25, kl=100.0)
    axes = charts.losses(table, table, 0.01).axes
    assert [axis.get_ylabel() for axis in axes] == ["training MSE", "held-out MSE", "held-out total loss"]
    assert [axis.lines[0].get_ydata()[0] for axis in axes] == [0.5, 0.25, 1.25]


def test_forest_has_a_panel_a_measure_and_survives_a_missing_condition():
    row = {"dataset": "d", "condition": "nudge", "percent": 1.0, "percent_low": -1.0, "percent_high": 2.0}
    table = pd.DataFrame([{**row, "measure": "mse"}, {**row, "measure": "kl"}])
    titles = ["squared error (lower is better)", "KL divergence (lower is better)"]
    assert [axis.get_title() for axis in charts.forest(table).axes] == titles


def test_bars_and_distributions_show_every_value():
    axis = charts.bars(STUDY, "condition", "suppressed", None, "count").axes[0]
    assert sum(len(points.get_offsets()) for points in axis.collections) == len(STUDY)
    axis = charts.distributions(STUDY, "condition", "suppressed").axes[0]
    assert sum(len(points.get_offsets()) for points in axis.collections) == len(STUDY)


def test_thumbnails_show_every_value_and_at_most_three_rows_of_four():
    figure = charts.summary_bars({"up.1.0": 31.0, "mid.0": 0.5}, "points")
    assert [bar.get_width() for bar in figure.axes[0].patches] == [31.0, 0.5]
    figure = grids.summary_pictures({str(i): torch.zeros(6, 3, 4, 4) for i in range(5)})
    assert len(figure.axes) == 12 and all(axis.images for axis in figure.axes)
