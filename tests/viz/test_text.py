"""Any text can be drawn: a figure is made after everything was computed, and must not end the run."""

import importlib
import inspect
import io
import itertools
from types import SimpleNamespace

import matplotlib
import numpy as np
import pandas as pd
import pytest
import torch

matplotlib.use("agg")
from matplotlib import pyplot as plt

from vaelab import viz
from vaelab.probing import plots as probing_plots
from vaelab.pruning import plots as pruning_plots
from vaelab.sae import plots as sae_plots
from vaelab.vae import plots as vae_plots
from vaelab.viz.text import plain

NAMES = ["a $$ b", "$x_1$ and {", r"c\$d$ %", "_$"]
PICTURES = torch.zeros(4, 3, 8, 8)
VALUES = np.linspace(0.1, 1, 4)
ROWS = pd.DataFrame([
    {"step": step, "condition": name, "setting": name, "seed": 0, "layer": name, "block": name, "dataset": name,
     "measure": name, "class": name, "factor": name, "classifier": name, "value": 0.5, "chance": 0.1}
    for name, step in itertools.product(NAMES, (0, 1))
])  # fmt: skip
FOREST = ROWS.assign(condition="nudge", percent=1.0, percent_low=0.5, percent_high=2.0)
MASKS = ROWS.assign(channel=0, mask=0.5)
TRAINING = ROWS.assign(k=5, n_features=8, loss=1.0, explained_variance=0.5, l0=3, dead_fraction=0.0)
ACCURACIES = ROWS.assign(accuracy=0.5, low=0.4, high=0.6, uniform=0.2)
RUNS = pd.DataFrame({"setting": NAMES, "scale": VALUES, "diffusion_loss": VALUES, "masked_recon_mse": VALUES})
CHANNELS = pd.DataFrame({"layer": NAMES, "mean_abs": VALUES, "gamma": VALUES, "beta": VALUES})
EFFECTS = {(name, name): SimpleNamespace(effects=pd.DataFrame({"manhattan": [0.1, 0.2]})) for name in NAMES}
CURVE = (VALUES, VALUES)
TITLE = NAMES[0]
CAPTIONS = [*NAMES[:3], "not UTF-8: \udcff"]

FIGURES = {
    "curves": lambda: viz.curves(ROWS, "value", TITLE, log=True, title=TITLE),
    "losses": lambda: viz.losses(ROWS.assign(reconstruction=1.0), ROWS.assign(mse=1.0, kl=1.0), 0.1, TITLE),
    "forest": lambda: viz.forest(FOREST, TITLE),
    "bars": lambda: viz.bars(ROWS, "layer", "value", "condition", TITLE, TITLE),
    "bars by a column of any name": lambda: viz.bars(ROWS.assign(**{TITLE: 1.0}), "layer", TITLE, None, TITLE),
    "distributions": lambda: viz.distributions(ROWS, "layer", "value", TITLE),
    "captioned": lambda: viz.captioned(PICTURES, CAPTIONS, title=TITLE),
    "masked": lambda: viz.masked(PICTURES[0], np.ones((4, 8, 8), bool), CAPTIONS, TITLE),
    "strength": lambda: viz.strength(PICTURES, {name: torch.zeros(4, 2, 2, 3) for name in NAMES}, TITLE),
    "matrix": lambda: viz.matrix(pd.DataFrame(np.eye(4), index=NAMES, columns=NAMES), TITLE, TITLE),
    "picture_grid": lambda: viz.picture_grid(dict.fromkeys(CAPTIONS, PICTURES), TITLE, CAPTIONS),
    "summary_bars": lambda: viz.summary_bars(dict.fromkeys(NAMES, 0.5), TITLE, TITLE),
    "summary_pictures": lambda: viz.summary_pictures(dict.fromkeys(CAPTIONS, PICTURES), TITLE),
    "activation_grids": lambda: vae_plots.activation_grids(
        {name: torch.zeros(2, 4, 4) for name in NAMES}, {name: [1] for name in NAMES}, PICTURES[0], title=TITLE
    ),
    "suppressed_over_steps": lambda: vae_plots.suppressed_over_steps(ROWS.assign(suppressed=1), [1], TITLE),
    "near_zero_weights": lambda: vae_plots.near_zero_weights(ROWS.assign(fraction=0.5), title=TITLE),
    "layer_bars": lambda: vae_plots.layer_bars(CHANNELS, 0.2, TITLE),
    "activity_histogram": lambda: vae_plots.activity_histogram(CHANNELS, 0.2, TITLE),
    "scale_scatter": lambda: vae_plots.scale_scatter(CHANNELS, 0.2, TITLE),
    "training_curves": lambda: sae_plots.training_curves(TRAINING, TITLE),
    "size_curves": lambda: sae_plots.size_curves(TRAINING, TITLE),
    "manhattan_bars": lambda: sae_plots.manhattan_bars(EFFECTS, TITLE, TITLE),
    "knowledge": lambda: probing_plots.knowledge({TITLE: ROWS[ROWS["step"] == 0].assign(timestep=1)}, TITLE),
    "accuracies": lambda: probing_plots.accuracies(ACCURACIES, TITLE),
    "masks_over_steps": lambda: pruning_plots.masks_over_steps(MASKS, NAMES, TITLE),
    "loss_over_scale": lambda: pruning_plots.loss_over_scale(
        RUNS, pd.DataFrame({"latent_scale": VALUES, "matched_loss": VALUES}), CURVE, {TITLE: (0.1, 0.2)}, TITLE
    ),
    "spectrum": lambda: pruning_plots.spectrum(ROWS.assign(snr=1.0, error=0.5), NAMES, TITLE),
    "trade_off": lambda: pruning_plots.trade_off(RUNS.assign(kept=1, fid=1.0), RUNS.assign(fid=1.0), TITLE),
}


@pytest.fixture(autouse=True)
def closed():
    yield
    plt.close("all")


@pytest.mark.parametrize("name", FIGURES)
def test_every_figure_survives_any_text(name):
    FIGURES[name]().savefig(io.BytesIO())


def test_every_function_that_draws_is_among_these():
    modules = ("viz.charts", "viz.grids", "vae.plots", "sae.plots", "probing.plots", "pruning.plots")
    drawing = [
        name
        for path in modules
        for name, function in inspect.getmembers(importlib.import_module(f"vaelab.{path}"), inspect.isfunction)
        if function.__module__ == f"vaelab.{path}" and inspect.signature(function).return_annotation is plt.Figure
    ]
    assert sorted(drawing) == sorted(name for name in FIGURES if " " not in name)


def test_the_letters_drawn_are_those_of_the_text():
    shown, wanted = (viz.captioned(PICTURES[:1], [text]) for text in ("costs $5 or $$6", "same length of t"))
    (text,) = shown.axes[0].texts
    assert text.get_text().replace(r"\$", "$") == "costs $5 or $$6"
    shown.canvas.draw()
    wanted.axes[0].texts[0].set_text("costs $5 or $$6")
    wanted.axes[0].texts[0].set_parse_math(False)
    wanted.canvas.draw()
    assert np.array_equal(shown.canvas.buffer_rgba(), wanted.canvas.buffer_rgba())


def test_a_name_with_an_underscore_is_in_the_legend():
    table = pd.DataFrame({"step": [0, 1] * 2, "layer": ["_x"] * 2 + ["y"] * 2, "fraction": 0.5})
    texts = vae_plots.near_zero_weights(table).axes[0].get_legend().get_texts()
    assert {text.get_text().lstrip("\u200b") for text in texts} == {"_x", "y"}


def test_numbers_and_types_of_a_table_stay():
    table = pd.DataFrame(
        {"n": [1, 2], "x": [0.5, None], "$": ["$", None], "kind": pd.Categorical(["$$", "b"])}, index=["$", "j"]
    )
    escaped = plain(table)
    assert escaped.columns.tolist() == ["n", "x", r"\$", "kind"] and escaped.index.tolist() == [r"\$", "j"]
    assert escaped.dtypes.tolist()[:3] == table.dtypes.tolist()[:3] and escaped["kind"].dtype == "category"
    assert escaped[r"\$"].isna().tolist() == [False, True]
    assert escaped["kind"].tolist() == [r"\$\$", "b"]
    pd.testing.assert_frame_equal(plain(escaped), escaped)
    assert plain(pd.DataFrame({"a": []})).empty
