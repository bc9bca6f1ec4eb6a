import matplotlib
import numpy as np
import pandas as pd
import pytest
import torch

matplotlib.use("agg")

from vaelab import plots

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
    plots.plt.close("all")


def test_pictures_are_shown_as_they_are():
    pictures = torch.stack([torch.full((3, 4, 4), -1.0), torch.full((3, 4, 4), 1.0)])
    figure = plots.picture_grid({"a row": pictures})
    first, second = (axis.images[0].get_array() for axis in figure.axes)
    assert first.max() == 0 and second.min() == 1
    assert figure.axes[0].texts[0].get_text() == "a row"


def test_a_grids_captions_stand_under_their_columns():
    pictures = torch.zeros(3, 3, 4, 4)
    captions = ["a large red circle on the left", "a star"]
    figure = plots.picture_grid({"one": pictures, "other": pictures}, captions=captions)
    texts = [[text.get_text() for text in axis.texts] for axis in figure.axes]
    assert texts == [["one"], [], [], ["other", "a large red circle\non the left"], ["a star"], []]


def test_suppressed_tiles_are_framed_and_no_others():
    maps = {"model": torch.randn(6, 4, 4), "other": torch.zeros(6, 4, 4)}
    figure = plots.activation_grids(maps, {"model": [1, 4], "other": []}, torch.zeros(3, 8, 8), columns=3)
    _, model, other = figure.axes
    step = 4 + plots.GAP
    assert [patch.get_xy() for patch in model.patches] == [(step - 0.5, -0.5), (step - 0.5, step - 0.5)]
    assert not other.patches
    assert model.get_title() == "model: 2 of 6 suppressed"


def test_each_tile_is_scaled_to_its_own_range_and_a_flat_one_is_grey():
    activation = torch.stack([torch.arange(4.0).view(2, 2), 1e-6 * torch.arange(4.0).view(2, 2), torch.ones(2, 2)])
    figure = plots.activation_grids({"m": activation}, {"m": []}, torch.zeros(3, 8, 8), columns=2)
    shown = figure.axes[1].images[0].get_array()
    step = 2 + plots.GAP
    ramp = [[0, 1 / 3], [2 / 3, 1]]
    assert np.allclose(shown[:2, :2], ramp) and np.allclose(shown[:2, step : step + 2], ramp)
    assert np.allclose(shown[step : step + 2, :2], 0.5)
    assert np.allclose(shown[2:step], 1)


def test_a_curve_for_every_condition_and_a_thin_line_for_every_seed():
    axis = plots.curves(STUDY, "mse", "MSE", log=True).axes[0]
    assert axis.get_yscale() == "log"
    assert [line.get_linewidth() for line in axis.lines].count(0.6) == 4


def test_losses_has_the_three_panels_of_figure_3():
    table = STUDY.assign(reconstruction=0.5, mse=0.25, kl=100.0)
    axes = plots.losses(table, table, 0.01).axes
    assert [axis.get_ylabel() for axis in axes] == ["training MSE", "held-out MSE", "held-out total loss"]
    assert [axis.lines[0].get_ydata()[0] for axis in axes] == [0.5, 0.25, 1.25]


def test_interventions_are_ticks():
    axis = plots.suppressed_over_steps(STUDY, [5, 15]).axes[0]
    (ticks,) = [line for line in axis.lines if line.get_label() == "intervention"]
    assert list(ticks.get_xdata()) == [5, 15]


def test_near_zero_weights_shows_the_largest_layers():
    table = pd.DataFrame([{"step": 0, "layer": f"l{i}", "fraction": i / 10} for i in range(6)])
    axis = plots.near_zero_weights(table, top=2).axes[0]
    assert {text.get_text() for text in axis.get_legend().get_texts()} == {"l5", "l4"}


def channel_table():
    rng = np.random.default_rng(0)
    columns = {"mean_abs": rng.random(8), "gamma": rng.normal(size=8), "beta": rng.normal(size=8)}
    return pd.DataFrame({"layer": ["a"] * 4 + ["b"] * 4, "channel": [0, 1, 2, 3] * 2, **columns})


def test_layer_bars_count_what_is_silent():
    table = channel_table()
    table.loc[2, "mean_abs"] = 0.0
    labels = [text.get_text() for text in plots.layer_bars(table, 1e-3).axes[0].get_yticklabels()]
    assert labels == ["a (1/4)", "b (0/4)"]


def test_scale_scatter_draws_every_channel():
    assert len(plots.scale_scatter(channel_table(), 1e-3).axes[0].collections[0].get_offsets()) == 8


def test_forest_has_a_panel_a_measure_and_survives_a_missing_condition():
    row = {"dataset": "d", "condition": "nudge", "percent": 1.0, "percent_low": -1.0, "percent_high": 2.0}
    table = pd.DataFrame([{**row, "measure": "mse"}, {**row, "measure": "kl"}])
    assert [axis.get_title() for axis in plots.forest(table).axes] == ["mse", "kl"]


def test_bars_and_distributions_show_every_value():
    axis = plots.bars(STUDY, "condition", "suppressed", None, "count").axes[0]
    assert sum(len(points.get_offsets()) for points in axis.collections) == len(STUDY)
    axis = plots.distributions(STUDY, "condition", "suppressed").axes[0]
    assert sum(len(points.get_offsets()) for points in axis.collections) == len(STUDY)
