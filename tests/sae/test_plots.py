"""What the figures of autoencoders show."""

import itertools
import time
from types import SimpleNamespace

import pandas as pd
import pytest

from vaelab.sae import plots

BLOCKS = ["down.1.1", "up.0.1"]


@pytest.fixture
def history():
    rows = itertools.product([1, 2], BLOCKS, [5, 10], [64, 512], [0, 1])
    return pd.DataFrame([
        {"step": step, "block": block, "k": k, "n_features": n, "seed": seed, "loss": 1 / step,
         "explained_variance": step / 4, "l0": k, "dead_fraction": seed / 10}
        for step, block, k, n, seed in rows
    ])  # fmt: skip


def test_training_has_a_panel_a_measure_and_block_and_a_line_an_autoencoder(history):
    figure = plots.training_curves(history, "title")
    axes = figure.axes
    assert len(axes) == len(plots.MEASURES) * len(BLOCKS)
    assert [axis.get_title() for axis in axes[:2]] == BLOCKS
    assert [axis.get_ylabel() for axis in axes[::2]] == list(plots.MEASURES.values())
    assert all(len([line for line in axis.lines if len(line.get_xdata())]) == 8 for axis in axes)
    assert {tuple(line.get_ydata()) for line in axes[4].lines if len(line.get_xdata())} == {(5, 5), (10, 10)}


def test_live_draws_now_and_then_in_one_place(history, monkeypatch):
    import IPython.display

    shown = []
    place = SimpleNamespace(update=lambda figure: shown.append(("update", figure)))
    monkeypatch.setattr(IPython.display, "display", lambda figure, **_: shown.append(("new", figure)) or place)
    now = iter([0.0, 5.0, 16.0, 17.0, 20.0, 40.0, 41.0])
    monkeypatch.setattr(time, "perf_counter", lambda: next(now))
    live = plots.LiveCurves(lambda rows: rows, every=15.0)
    for _ in range(4):
        live(history)
    assert [how for how, _ in shown] == ["new", "update"]


def test_by_size_has_a_line_for_each_number_of_features(history):
    figure = plots.size_curves(history[history["step"] == 2])
    assert len(figure.axes) == 4
    lines = [line for line in figure.axes[0].lines if len(line.get_xdata())]
    assert len(lines) == 2 and all(line.get_xdata().tolist() == [5, 10] for line in lines)


def test_bars_are_means_over_pictures():
    effects = {
        (block, who): SimpleNamespace(effects=pd.DataFrame({"manhattan": [value, value + 2]}))
        for value, (block, who) in enumerate(itertools.product(BLOCKS, ["sae", "zero"]))
    }
    (axis,) = plots.manhattan_bars(effects, "who").axes
    assert sorted(bar.get_height() for bar in axis.patches if bar.get_height()) == [1, 2, 3, 4]
    assert [label.get_text() for label in axis.get_xticklabels()] == BLOCKS
