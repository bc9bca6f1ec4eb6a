"""The results page on "Investigating the Functional Role of Learned Channel Suppression in Diffusion VAEs" (Shi, Wang
and Roshka)."""

from typing import Any

import matplotlib.pyplot as plt
import pandas as pd
import seaborn as sns

from vaelab import viz
from vaelab.report.markdown import (
    Chart,
    Picture,
    between,
    excludes_zero,
    listed,
    number,
    percent,
    signed,
    span,
    table,
)
from vaelab.report.page import Absent, Entry, Section, Shown
from vaelab.report.runs import FinishedRun
from vaelab.vae.compare import MEASURES, PAPER_DATASETS, PAPER_TABLE_1
from vaelab.viz.charts import PALETTE

NAMES = {"mse": "MSE", "kl": "KL divergence", "psnr": "PSNR", "ssim": "SSIM"}
STUDIES = tuple(f"10_finetune_vae/study-{name}" for name in ("photos", "digits", "glyphs"))


def table_1(run: FinishedRun) -> Shown:
    """Show Table 1 as paired differences to plain fine-tuning, beside the control's and the paper's."""
    rows = run.table("differences", "dataset", "condition", "measure", "percent", "percent_low", "percent_high")
    rows = rows[rows["measure"].isin(MEASURES)]
    nudge, control = (rows[rows["condition"] == name] for name in ("nudge", "control"))
    cells = [
        (row.dataset, NAMES[row.measure], _paper(row.dataset, row.measure), _percents(row), _percents(other))
        for row, other in zip(nudge.itertuples(), control.itertuples(), strict=True)
    ]
    changed = [row for row in nudge.itertuples() if excludes_zero(row.percent_low, row.percent_high)]
    harmed = [row for row in control.itertuples() if excludes_zero(row.percent_low, row.percent_high)]
    mse = [row.percent for row in control.itertuples() if row.measure == "mse"]
    effects = listed([f"{NAMES[row.measure]} on {row.dataset} ({row.percent:+.2g} %)" for row in changed])
    found = (
        f"all {len(nudge)} intervals of its effect contain zero"
        if not changed
        else f"{len(changed)} of the {len(nudge)} intervals of its effect exclude zero, {effects}; the largest of "
        f"these effects is {number(max(abs(row.percent) for row in changed), 2)} %"
    )
    outside = sum(
        1
        for row in nudge.itertuples()
        if (paper := _paper_percent(row.dataset, row.measure)) is not None
        and not row.percent_low <= paper <= row.percent_high
    )
    return Shown(
        f"Raising the scales of suppressed channels (the nudge): {found}. The same change to as many active channels "
        f"(the control) changes {len(harmed)} of {len(control)} measures, MSE by {span(mse, signed)} %.",
        [
            f"Difference to plain fine-tuning in percent, paired by seed, {int(rows['seeds'].min())} seeds, with 95 % "
            f"intervals. Of {len(nudge)} intervals, {number(0.05 * len(nudge), 1)} would exclude zero by chance alone.",
            table(("data", "measure", "paper, one run", "here, nudge", "here, control"), cells),
            f"{outside} of the paper's {len(nudge)} differences lie outside our interval of the nudge.",
            Chart("differences", lambda: viz.forest(rows, "nudge and control against plain fine-tuning"),
                  "Differences to plain fine-tuning with 95 % intervals. Blue: the nudge. Orange: the control. A point "
                  "whose bar crosses the line at 0 shows no effect."),
        ],
    )  # fmt: skip


def counts(run: FinishedRun) -> Shown:
    """Show how many channels are suppressed before and after fine-tuning."""
    rows = run.table("suppressed", "dataset", "seed", "when", "suppressed")
    means = rows.groupby(["dataset", "when"], sort=False)["suppressed"].mean().unstack()
    datasets = list(dict.fromkeys(rows["dataset"]))
    fewer = [1 - means.loc[name, "nudge"] / means.loc[name, "baseline"] for name in datasets]
    grew = [name for name in datasets if means.loc[name, "baseline"] > means.loc[name, "start"]]
    cells = [
        (name, *(f"{means.loc[name, when]:.0f}" for when in ("start", "baseline", "nudge", "control")))
        for name in datasets
    ]
    change = "fewer" if min(fewer) > 0 else "fewer (a negative share means more)"
    return Shown(
        f"The nudge does reactivate channels: with it {span(fewer, percent)} {change} are suppressed at the end than "
        f"with plain fine-tuning. Plain fine-tuning raises their number on {listed(grew)}.",
        [
            table(("data", "at the start", "plain fine-tuning", "nudge", "control"), cells),
            *_pictures(run, "activations", "One picture in one layer of the encoder, under the VAE as shipped and "
                       "after fine-tuning on three kinds of pictures. Framed tiles are suppressed channels. Each tile "
                       "is scaled to its own range, as in the paper, so a suppressed channel still shows a faint "
                       "pattern."),
        ],
    )  # fmt: skip


def figure_1(run: FinishedRun) -> Shown:
    """Show the share of near-zero weights over training."""
    threshold = run.params["near_zero_threshold"]
    return Shown(
        "",
        _pictures(run, "near_zero_weights", f"Share of weights below {threshold:g} over plain fine-tuning, one line a "
                  "layer. This is another thing than suppression: a suppressed channel has a small GroupNorm scale, "
                  "whatever its weights."),
    )  # fmt: skip


def figure_3(photos: FinishedRun, digits: FinishedRun, glyphs: FinishedRun) -> Shown:
    """Show held-out losses over fine-tuning on three kinds of pictures."""
    runs = {run.params["dataset"]: run for run in (photos, digits, glyphs)}
    ends = {name: _last(run, "mse") for name, run in runs.items()}
    gaps = {name: 100 * (end["nudge"] - end["baseline"]) / end["baseline"] for name, end in ends.items()}
    reach = max(abs(gap) for gap in gaps.values())
    return Shown(
        f"At the end the held-out error with the nudge differs from plain fine-tuning by at most {number(reach, 2)} %.",
        [
            Chart("losses", lambda: held_out_losses(runs),
                  "Held-out error over fine-tuning, mean over seeds (thick) and each seed (thin); on glyphs the total "
                  "loss, as in the paper's panel (c). Where the two lines lie on each other, the nudge changes "
                  "nothing."),
        ],
    )  # fmt: skip


def held_out_losses(runs: dict[str, FinishedRun]) -> Any:
    """Draw the held-out loss of plain fine-tuning and of the nudge over steps, one panel a data set."""
    figure, axes = plt.subplots(1, len(runs), figsize=(3.5 * len(runs), 2.9), layout="constrained")
    for axis, (name, run) in zip(axes, runs.items(), strict=True):
        rows = _validation(run)
        total = name == "glyphs"
        rows = rows.assign(loss=rows["mse"] + run.params["kl_weight"] * rows["kl"] if total else rows["mse"])
        rows = rows[rows["condition"].isin(["baseline", "nudge"])]
        for (condition, _), part in rows.groupby(["condition", "seed"], sort=False):
            axis.plot(part["step"], part["loss"], color=PALETTE[condition], linewidth=0.6, alpha=0.5)
        last = axis is axes[-1]
        sns.lineplot(rows, x="step", y="loss", hue="condition", palette=PALETTE, ax=axis, errorbar=None, legend=last)
        axis.set(xlabel="step", ylabel="held-out total loss" if total else "held-out MSE", title=name)
        axis.ticklabel_format(axis="y", style="sci", scilimits=(-2, 2))
    axes[-1].legend(fontsize=9)
    return figure


def figure_4(run: FinishedRun) -> Shown:
    """Show what a trained lens decodes from one layer."""
    r2, shuffled = run.metric("full.r2"), run.metric("full.shuffled.r2")
    verdict = "shows what the layer holds" if shuffled < 0.5 * r2 else "shows mostly what the lens itself has learned"
    return Shown(
        f"The lens {verdict}: on held-out pictures it reaches R2 {number(r2, 2)}, and the same lens trained and tested "
        f"on activations of the wrong pictures reaches {number(shuffled, 2)}.",
        [
            "A **lens** is a small decoder that is trained to turn one layer's activation back into the picture. R2 is "
            f"1 for a perfect picture and 0 for the mean picture. The layer is `{run.params['layer']}`.",
            *_pictures(run, "full_map", "Held-out glyphs, and what the lens decodes from the layer under plain "
                       "fine-tuning (baseline) and under the nudge. Alike rows mean that the nudge changes nothing "
                       "the lens can see."),
        ],
    )  # fmt: skip


def figure_5(run: FinishedRun) -> Shown:
    """Show suppressed channels over fine-tuning with the nudge."""
    start, end = (
        run.metric("suppressed.start"),
        {name: _last(run, "suppressed")[name] for name in ("baseline", "nudge")},
    )
    return Shown(
        f"On glyphs {start:.0f} channels are suppressed at the start; at the end {end['nudge']:.0f} are with the nudge "
        f"and {end['baseline']:.0f} without it.",
        _pictures(run, "suppressed", "Suppressed channels over fine-tuning; the ticks at the bottom mark the steps at "
                  "which scales were raised. Look whether the count falls after a tick."),
    )  # fmt: skip


def causes(run: FinishedRun) -> Shown:
    """Show what suppresses channels in training from scratch."""
    final = run.table("validation", "variant", "seed", "share", "final", "mse")
    final = final[final["final"]].assign(percent=lambda rows: 100 * rows["share"])
    means = final.groupby("variant", sort=False)["share"].mean()
    without = [name for name in ("no weight decay", "scales not decayed") if name in means]
    with_decay = means["reference"]
    none = means[without].max() < 0.1 * with_decay
    data = {name: means[name] for name in ("photos", "digits", "glyphs") if name in means}
    finding = (
        f"Weight decay on GroupNorm's scales suppresses the channels here: without it {span(means[without], percent)} "
        f"of the channels are suppressed, with it {percent(with_decay)}."
        if none
        else f"Weight decay on GroupNorm's scales does not explain the suppression: without it "
        f"{span(means[without], percent)} of the channels are suppressed, with it {percent(with_decay)}."
    )
    order = [f"{name} {percent(share)}" for name, share in sorted(data.items(), key=lambda pair: -pair[1])]
    few = [name for name, share in means.items() if share < 0.1 * with_decay]
    mixture = run.params["dataset"].replace("+", ", ")
    shown = {"reference": f"reference ({mixture})", "twice the length": "twice the steps"}
    final["variant"] = final["variant"].replace(shown)
    others = [
        f"{shown.get(name, name)} {percent(means[name])}"
        for name in ("half the decay", "half the width", "twice the length") if name in means
    ]  # fmt: skip
    return Shown(finding, [
        f"A VAE is trained from scratch, {int(final['seed'].nunique())} seeds a variant, and each variant changes one "
        "thing. A channel counts as suppressed where m_c is below "
        f"{run.params['threshold']:g}. By data: {listed(order)}. The paper expects more on simpler data. "
        f"By training: {listed(others)}.",
        Chart("causes", lambda: viz.bars(final, "variant", "percent", None, "suppressed channels (%)"),
              "Share of suppressed channels at the end of training, by variant; each point is a seed."
              + (f" Almost none are suppressed with {listed(few)}." if few else "")),
    ])  # fmt: skip


def mechanism(run: FinishedRun) -> Shown:
    """Show how m_c and gamma relate over all channels."""
    low, both = run.metric("low.activity"), run.metric("low.both")
    return Shown(
        f"The scale is the mechanism, as the paper says: over {run.metric('channels'):,.0f} channels m_c and |gamma| "
        f"have a rank correlation of {number(run.metric('spearman.gamma'), 2)}, and {both:.0f} of {low:.0f} "
        "suppressed channels have a |gamma| below the same threshold."
        if run.metric("spearman.gamma") > 0.5 and both > low / 2
        else f"The scale explains only a part: rank correlation {number(run.metric('spearman.gamma'), 2)}, and "
        f"{both:.0f} of {low:.0f} suppressed channels have a small |gamma|.",
        _pictures(run, "mechanism", "Every channel by its scale |gamma| and its activity m_c, on log scales. The line "
                  "is what a channel would have whose normalised input is normally distributed and whose shift is 0."),
    )  # fmt: skip


def _pictures(run: FinishedRun, name: str, caption: str) -> list[Picture]:
    return [Picture(path, caption) for path in run.pictures(name)]


def _validation(run: FinishedRun) -> pd.DataFrame:
    return run.table("validation", "condition", "seed", "step", "mse", "kl", "suppressed")


def _last(run: FinishedRun, column: str) -> pd.Series:
    """The mean over seeds at the last step, by condition."""
    rows = _validation(run)
    return rows[rows["step"] == rows["step"].max()].groupby("condition", sort=False)[column].mean()


def _paper_percent(dataset: str, measure: str) -> float | None:
    name, place = PAPER_DATASETS.get(dataset), MEASURES.index(measure)
    if name is None:
        return None
    base, nudged = (PAPER_TABLE_1[name][condition][place] for condition in ("baseline", "nudge"))
    return 100 * (nudged - base) / base


def _paper(dataset: str, measure: str) -> str:
    value = _paper_percent(dataset, measure)
    return "" if value is None else f"{signed(value)} % ({PAPER_DATASETS[dataset]})"


def _percents(row: Any) -> str:
    ends = f" ({between(row.percent_low, row.percent_high, sign=True)})" if row.percent_low is not None else ""
    return f"{signed(row.percent)} %{ends}"


SECTION = Section(
    "Paper 1: suppressed channels of a VAE",
    "\"Investigating the Functional Role of Learned Channel Suppression in Diffusion VAEs\" (Shi, Wang and Roshka). "
    "**m_c** is a channel's mean absolute activation after GroupNorm; a channel is **suppressed** where m_c is below "
    "a threshold, here 0.001. **gamma** is GroupNorm's learned scale of the channel. The **nudge** raises gamma of "
    "suppressed channels every few steps of fine-tuning. Our **control** raises gamma of as many active channels: "
    "without it a difference could come from changing scales at all.",
    (
        Entry(
            "Table 1: quality with and without the nudge", ("11_compare_interventions/study",), table_1,
            paper="the nudge slightly improves MSE, PSNR and SSIM on ImageNette-256 and CIFAR-10, and on Google Fonts "
            "only the KL divergence; single runs, without intervals.",
            differs="the paper fine-tunes the SDXL-VAE on pictures of 256 x 256, once; here the embedded VAE on "
            "pictures of 32 x 32, with several seeds. Photos stand in for ImageNette-256, digits for CIFAR-10, glyphs "
            "for Google Fonts.",
            paper_runs=("11_compare_interventions/paper",), headline=True,
        ),
        Entry(
            "Figure 2: activation grids, and how many channels are suppressed", ("11_compare_interventions/study",),
            counts, paper="a VAE tuned on fonts suppresses far more channels of a layer than one tuned on photographs.",
            differs="the embedded VAE, whose layers have fewer channels.",
        ),
        Entry(
            "Figure 1: near-zero weights during training", ("10_finetune_vae/study-photos",), figure_1,
            paper="percentages of weights below 1e-8 over 30 epochs on ImageNette.",
            differs="the embedded VAE on photos, some hundred steps.",
            paper_runs=("10_finetune_vae/paper-imagenette",),
        ),
        Entry(
            "Figure 3: losses with and without the nudge", STUDIES, figure_3,
            paper="the nudge's reconstruction loss is a little lower on ImageNette and CIFAR-10; on Google Fonts the "
            "total losses are very close.",
            differs="as for Table 1; the paper's panel (a) shows the training loss.",
        ),
        Entry(
            "Figure 4: the logit lens", ("13_logit_lens/study",), figure_4,
            paper="the differences between the pictures decoded under baseline and nudge are subtle; the lens has no "
            "score.",
            differs="the embedded VAE on glyphs; the lens is trained and scored on held-out pictures.",
            paper_runs=("13_logit_lens/paper-imagenette", "13_logit_lens/paper-fonts"),
        ),
        Entry(
            "Figure 5: suppressed channels and interventions", ("10_finetune_vae/study-glyphs",), figure_5,
            paper="on Google Fonts interventions lower the number of inactive channels for a while; then channels "
            "become suppressed again.",
            differs="the embedded VAE on glyphs.",
            paper_runs=("10_finetune_vae/paper-fonts",),
        ),
        Entry(
            "Why channels become suppressed: beyond the paper", ("15_causes_of_suppression/study",), causes,
            headline=True,
        ),
        Entry("Gamma as the mechanism: beyond the paper", ("12_channel_census/study",), mechanism),
    ),
    (Absent("Table 1, Figures 1 to 5", "the SDXL-VAE on ImageNette-256, CIFAR-10 and Google Fonts",
            "11_compare_interventions/paper", "it needs the checkpoint, the data and a GPU"),),
)  # fmt: skip
