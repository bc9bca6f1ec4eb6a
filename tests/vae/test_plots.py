import numpy as np
import pandas as pd
import pytest
import torch
from matplotlib import pyplot as plt

from vaelab.vae import plots


@pytest.fixture(autouse=True)
def closed():
    yield
    plt.close("all")


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


def test_interventions_are_ticks():
    tracked = pd.DataFrame([{"step": s, "condition": "nudge", "seed": 0, "suppressed": 9} for s in (0, 10, 20)])
    axis = plots.suppressed_over_steps(tracked, [5, 15]).axes[0]
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


def test_the_histogram_counts_suppressed_channels_apart():
    table = channel_table()
    table.loc[[2, 5], "mean_abs"] = [0.0, 9e-4]
    axis = plots.activity_histogram(table, 1e-3).axes[0]
    others, suppressed = axis.containers
    labels = [text.get_text() for text in axis.get_legend().get_texts()]
    assert {"6 others", "2 suppressed"} < set(labels)
    assert sum(bar.get_height() for bar in suppressed) == 2
    beyond = [bar.get_height() for bar in suppressed if bar.get_x() > 0.999e-3]
    assert not any(beyond) and sum(bar.get_height() for bar in others) == 8


def test_layer_bars_count_the_suppressed_channels():
    table = channel_table()
    table.loc[2, "mean_abs"] = 0.0
    labels = [text.get_text() for text in plots.layer_bars(table, 1e-3).axes[0].get_yticklabels()]
    assert labels == ["a (1/4)", "b (0/4)"]


def test_scale_scatter_draws_every_channel():
    assert len(plots.scale_scatter(channel_table(), 1e-3).axes[0].collections[0].get_offsets()) == 8
