import numpy as np
import pandas as pd
import pytest
from matplotlib import pyplot as plt

from vaelab.pruning import plots


@pytest.fixture(autouse=True)
def closed():
    yield
    plt.close("all")


def lines(axis):
    return {line.get_label(): line for line in axis.get_lines() if not line.get_label().startswith("_")}


def test_masks_have_a_line_a_channel_and_a_line_a_class():
    masks = pd.DataFrame(
        [{"setting": setting, "seed": seed, "step": step, "class": label, "channel": channel, "mask": channel + seed}
         for setting in ("a", "b") for seed in (0, 1) for step in (0, 5) for label in ("all", "x", "y", "z")
         for channel in (0, 1)]
    )  # fmt: skip
    figure = plots.masks_over_steps(masks, ["a", "b"])
    axes = np.array(figure.axes).reshape(2, 2)
    assert [axis.get_title() for axis in axes[0]] == ["a", "b"]
    assert [len(axis.get_lines()) for axis in axes[:, 0]] == [2, 3]
    assert sorted(line.get_ydata()[0] for line in axes[0, 0].get_lines()) == [0.5, 1.5]  # means over the seeds


def test_the_loss_over_the_scale_shows_every_run_the_control_and_the_paper():
    measured = pd.DataFrame(
        {"setting": ["a", "a", "b"], "scale": [1.0, 0.5, 0.1], "diffusion_loss": [0.3, 0.2, 0.1],
         "masked_recon_mse": [1.0, 2.0, 3.0]}
    )  # fmt: skip
    control = pd.DataFrame({"latent_scale": [1.0, 0.0], "matched_loss": [0.3, 0.01]})
    curve = (np.array([0.1, 1.0]), np.array([0.2, 0.4]))
    left, right = plots.loss_over_scale(measured, control, curve, {"x": (0.024, 20.0), "y": (0.023, 19.0)}).axes
    assert lines(left)["a"].get_xydata().tolist() == [[1.0, 0.3], [0.5, 0.2]]
    assert lines(right)["b"].get_xydata().tolist() == [[0.1, 3.0]]
    assert lines(left)["trained without a mask, then latents scaled"].get_xdata().tolist() == [1.0]
    assert lines(left)["the same, scaled to 0"].get_xydata().tolist() == [
        [0.1, 0.01]
    ]  # at the edge: 0 has no logarithm
    assert [text.get_text() for text in left.texts] == ["PeLAP-A's losses: 0.024 and 0.023"]


def test_the_spectrum_has_the_closed_form_and_the_medians():
    table = pd.DataFrame(
        [{"setting": "a", "snr": snr, "error": error} for snr, error in ((1.0, 0.1), (1.0, 0.3), (100.0, 0.9))]
        + [{"setting": "a", "snr": 0.0, "error": 0.5}]
    )
    (axis,) = plots.spectrum(table, ["a"]).axes
    shown = lines(axis)
    curve = shown["closed form, SNR / (1 + SNR)"].get_xydata()
    np.testing.assert_allclose(curve[:, 1], curve[:, 0] / (1 + curve[:, 0]))
    np.testing.assert_allclose(shown["a"].get_xydata(), [[1.0, 0.2], [100.0, 0.9]])


@pytest.mark.parametrize(("fids", "panels"), [([3.0, 4.0], 3), ([3.0, None], 2)])
def test_the_trade_off_has_a_panel_for_what_was_measured(fids, panels):
    by_kept = pd.DataFrame({"kept": [1, 2], "masked_recon_mse": [5.0, 2.0], "diffusion_loss": [0.1, 0.2], "fid": fids})
    unmasked = pd.DataFrame({"masked_recon_mse": [1.0, 3.0], "diffusion_loss": [0.3, 0.3], "fid": [1.0, 1.0]})
    axes = plots.trade_off(by_kept, unmasked).axes
    assert len(axes) == panels
    assert axes[0].get_ylabel() == "error of decoded pictures (sum)"
    assert lines(axes[0])["unmasked"].get_ydata()[0] == 2.0


def test_a_trade_off_without_runs_says_so():
    (axis,) = plots.trade_off(pd.DataFrame({"kept": [], "fid": []}), pd.DataFrame()).axes
    assert [text.get_text() for text in axis.texts] == ["no run kept a number of channels"]
