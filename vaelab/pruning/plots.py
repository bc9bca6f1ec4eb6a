"""Plot masks on latents: the masks over training, the loss against the latent's scale and against the signal-to-noise
ratio, and the quality against the number of kept channels."""

from collections.abc import Mapping, Sequence

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.figure import Figure

from vaelab.viz.charts import PALETTE, SUPPRESSED_COLOUR
from vaelab.viz.text import plain_text

GREY = PALETTE["start"]
QUALITY = {
    "masked_recon_mse": "error of decoded pictures (sum)",
    "diffusion_loss": "diffusion loss (mean)",
    "fid": "Frechet distance of samples",
}


@plain_text
def masks_over_steps(masks: pd.DataFrame, settings: Sequence[str], title: str = "") -> Figure:
    """Plot the mean mask over training, one column of axes per setting: above one line per channel, below one line per
    class.

    Args:
        masks: columns ``setting``, ``seed``, ``step``, ``class``, ``channel``, ``mask``; the class ``all`` stands for
            all pictures. The lines are means over seeds.
        settings: the settings to show.
        title: the figure's title.
    """
    size = (2.7 * len(settings) + 1.2, 4.8)
    figure, axes = plt.subplots(2, len(settings), figsize=size, sharex=True, sharey=True, squeeze=False,
                                layout="constrained")  # fmt: skip
    everything = masks["class"] == "all"
    for column, setting in enumerate(settings):
        own = masks["setting"] == setting
        for axis, part, hue in (
            (axes[0][column], masks[own & everything], "channel"),
            (axes[1][column], masks[own & ~everything], "class"),
        ):
            if not part.empty:
                last = column == len(settings) - 1
                sns.lineplot(part, x="step", y="mask", hue=hue, ax=axis, errorbar=None, palette="viridis", legend=last)
                if last:
                    axis.legend(title=hue, fontsize=6, title_fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))
        axes[0][column].set_title(setting, fontsize=10)
    for axis in axes[:, 0]:
        axis.set_ylabel("mean mask")
    figure.suptitle(title, fontsize=11)
    return figure


@plain_text
def loss_over_scale(
    measured: pd.DataFrame,
    control: pd.DataFrame,
    closed_form: tuple[np.ndarray, np.ndarray],
    paper: Mapping[str, tuple[float, float]],
    title: str = "",
) -> Figure:
    """Plot the diffusion loss, and the error of decoded pictures, against the scale of the denoiser's input.

    Args:
        measured: one row per run: ``setting``, ``scale``, ``diffusion_loss``, ``masked_recon_mse``.
        control: one denoiser on scaled latents, with the columns ``latent_scale`` and ``matched_loss``. A scale of 0
            stands at the left edge of the axis, as an open square.
        closed_form: scales (N,), and the losses (N,) of latents without structure that have these scales.
        paper: the paper's diffusion losses and errors by name; the losses are shown as lines.
        title: the figure's title.
    """
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
    names = list(dict.fromkeys(measured["setting"]))
    colours = dict(zip(names, sns.color_palette("viridis", len(names)), strict=True))
    left.plot(*closed_form, color="#444444", linewidth=1.2, label="closed form, latent without structure")
    edge = closed_form[0].min()
    for zero, face, label in ((False, SUPPRESSED_COLOUR, "trained without a mask, then latents scaled"),
                              (True, "white", "the same, scaled to 0")):  # fmt: skip
        shown = control[(control["latent_scale"] == 0) == zero]
        if len(shown):
            left.plot(shown["latent_scale"].clip(lower=edge), shown["matched_loss"], "s", color=SUPPRESSED_COLOUR,
                      markerfacecolor=face, markersize=6, zorder=4, clip_on=False, label=label)  # fmt: skip
    losses = [loss for loss, _ in paper.values()]
    for loss in losses:
        left.axhline(loss, color=GREY, linewidth=1, linestyle=":")
    label = "PeLAP-A's losses: " + " and ".join(f"{loss:g}" for loss in losses)
    left.annotate(label, (1, max(losses)), xycoords=("axes fraction", "data"), fontsize=7, ha="right", va="bottom")
    for axis, column in ((left, "diffusion_loss"), (right, "masked_recon_mse")):
        for name, part in measured.groupby("setting", sort=False):
            axis.plot(
                part["scale"], part[column], "o", color=colours[name], markersize=6, zorder=5, label=_spelled(name)
            )
        axis.set(xscale="log", yscale="log", xlabel="scale of the denoiser's input (standard deviation)")
        axis.xaxis.set_minor_formatter("")
    left.set_ylabel("diffusion loss (mean)")
    left.set_xlim(left=edge)
    right.set_ylabel("error of decoded pictures (sum)")
    left.legend(fontsize=7)
    figure.suptitle(title, fontsize=11)
    return figure


def _spelled(setting: str) -> str:
    """A setting's name in words."""
    return "trained without a mask" if setting == "unmasked" else setting.replace("lambda_", "trained masks, lambda = ")


@plain_text
def spectrum(table: pd.DataFrame, settings: Sequence[str], title: str = "") -> Figure:
    """Plot the noise-prediction error against the signal-to-noise ratio; scaling a latent only moves it along this
    axis.

    Args:
        table: columns ``setting``, ``snr``, ``error``; one row per timestep, channel and seed.
        settings: the settings to show.
        title: the figure's title.
    """
    figure, axis = plt.subplots(figsize=(7, 4), layout="constrained")
    shown = table[(table["snr"] > 0) & table["setting"].isin(settings)]
    ratios = np.geomspace(shown["snr"].min(), shown["snr"].max(), 200)
    axis.plot(ratios, ratios / (1 + ratios), color="#444444", linewidth=1.4, label="closed form, SNR / (1 + SNR)")
    colours = sns.color_palette("viridis", len(settings))
    for setting, colour in zip(settings, colours, strict=True):
        part = shown[shown["setting"] == setting]
        decade = (2 * np.log10(part["snr"])).round() / 2
        middle = part.groupby(decade)["error"].median()
        axis.plot(part["snr"], part["error"], ".", color=colour, markersize=2, alpha=0.4)
        axis.plot(10**middle.index, middle, color=colour, linewidth=1.8, label=setting)
    axis.set(xscale="log", yscale="log", xlabel="signal-to-noise ratio of a channel", ylabel="error of the noise")
    axis.legend(fontsize=8)
    axis.set_title(title, fontsize=11)
    return figure


@plain_text
def trade_off(by_kept: pd.DataFrame, unmasked: pd.DataFrame, title: str = "") -> Figure:
    """Plot quality against the number of kept channels, one panel per measure and one point per run.

    Args:
        by_kept: one row per run: ``kept`` and the columns of ``QUALITY``. A measure with missing values is left out; if
            there are no runs, the figure says so.
        unmasked: the runs without a mask, shown as a line at their mean.
        title: the figure's title.
    """
    if by_kept.empty:
        figure, axis = plt.subplots(figsize=(3.6, 0.6))
        axis.text(0.5, 0.5, "no run kept a number of channels", ha="center", va="center", fontsize=9)
        axis.axis("off")
        return figure
    shown = {name: label for name, label in QUALITY.items() if by_kept[name].notna().all()}
    figure, axes = plt.subplots(1, len(shown), figsize=(3.6 * len(shown), 3.3), squeeze=False, layout="constrained")
    for axis, (name, label) in zip(axes[0], shown.items(), strict=True):
        sns.lineplot(by_kept, x="kept", y=name, ax=axis, errorbar=None, color=PALETTE["nudge"])
        axis.plot(by_kept["kept"], by_kept[name], "o", color=PALETTE["nudge"], markersize=4)
        axis.axhline(unmasked[name].mean(), color=PALETTE["baseline"], linewidth=1, linestyle="--", label="unmasked")
        axis.legend(fontsize=7)
        axis.set(xlabel="channels kept", ylabel=label, xticks=sorted(by_kept["kept"].unique()))
    figure.suptitle(title, fontsize=11)
    return figure
