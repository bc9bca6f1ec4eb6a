"""The results page on "PeLAP-A: Adaptive Latent Pruning for Lightweight Latent Diffusion Models"."""

import pandas as pd

from vaelab.core.stats import Interval, paired_interval
from vaelab.pruning import plots, results
from vaelab.report.markdown import Chart, between, excludes_zero, number, percent, signed, span, table
from vaelab.report.page import Absent, Entry, Section, Shown
from vaelab.report.runs import FinishedRun

COLLAPSED = 0.1
"""A latent has collapsed where its scale is below this share of the scale without a mask."""
UNMASKED = "unmasked"
ALIKE = 1.05
"""Pictures count as decoded as well where their mean error is at most this many times that without a mask."""
MEASURES = {
    "diffusion_loss": "diffusion loss",
    "closed_form_loss": "its closed form for a latent of that scale",
    "scale": "scale of the denoiser's input",
    "mean_mask": "mean mask",
    "recon_mse": "reconstruction, error summed over a picture",
    "masked_recon_mse": "the same, decoded from the masked latent",
}


def collapse(run: FinishedRun) -> Shown:
    """Show the paper's comparison with seeds, and beside it the training without a mask."""
    settings = (UNMASKED, "lambda_0", "lambda_0.01")
    paper = {
        "diffusion_loss": " and ".join(f"{loss:g}" for loss, _ in results.PAPER.values()),
        "recon_mse": " and ".join(f"{mse:g}" for _, mse in results.PAPER.values()),
        "mean_mask": "near zero with lambda 0.01",
    }
    rows = [
        [name, *(_mean(run, setting, measure) for setting in settings), paper.get(measure, "")]
        for measure, name in MEASURES.items()
    ]
    scales = {setting: run.metric(f"{setting}.scale") for setting in settings}
    alone = scales["lambda_0"] < COLLAPSED * scales[UNMASKED]
    penalised = scales["lambda_0.01"] < COLLAPSED * scales[UNMASKED]
    finding = {
        (True, True): "The collapse is there, and needs no penalty: with lambda = 0 the latent shrinks to "
        f"{percent(scales['lambda_0'] / scales[UNMASKED])} of its scale too.",
        (False, True): "The collapse is there, and needs the penalty: with lambda = 0 the latent keeps "
        f"{percent(scales['lambda_0'] / scales[UNMASKED])} of its scale.",
    }.get((alone, penalised), "The latent does not collapse with lambda = 0.01.")
    own = run.table("paper_differences", "measure", "paper", "here", "low", "high").to_dict("records")
    differences = [
        (MEASURES[row["measure"]], signed(row["paper"]), f"{signed(row['here'])} ({_ends(row)})",
         "yes" if excludes_zero(row["low"], row["high"]) else "no")
        for row in own
    ]  # fmt: skip
    seeds = run.table("measures", "setting", "seed")["seed"].nunique()
    return Shown(finding, [
        f"Means over {seeds} seeds with 95 % intervals; the error is summed over a picture's values.",
        table(("", "no mask", "lambda = 0", "lambda = 0.01", "paper, lambda 0 and 0.01"), rows),
        "Lambda 0.01 against lambda 0, paired by seed:",
        table(("measure", "paper, one run", "here", "does the interval exclude zero?"), differences),
        "The reconstruction never uses the mask, so nothing in the objective holds the mask open, and the noise in a "
        "smaller latent is easier to predict.",
    ])  # fmt: skip


def scale(run: FinishedRun) -> Shown:
    """Show how much of the fall of the loss scaling alone explains."""
    measured, control = run.table("measures", "setting", "scale"), run.table("control", "latent_scale", "matched_loss")
    fall, scaling = (_interval(run, f"lambda_0.01.{name}") for name in ("improvement", "by_scaling"))
    left = _interval(run, "lambda_0.01.left")
    share = scaling.mean / fall.mean
    finding = (
        f"The loss mostly measures the scale: it falls by {number(fall.mean)} ({between(*fall[1:])}) with lambda = "
        f"0.01, and scaling the latents of the model trained without a mask, with no further training, lowers its loss "
        f"by {number(scaling.mean)} ({between(*scaling[1:])})."
        if share > 0.5
        else f"The loss does not only measure the scale: of its fall by {number(fall.mean)} ({between(*fall[1:])}) "
        f"scaling explains {number(scaling.mean)} ({between(*scaling[1:])})."
    )
    return Shown(finding, [
        f"What is left, {number(left.mean)} ({between(*left[1:])}), is a difference between the denoisers.",
        Chart("collapse",
              lambda: plots.loss_over_scale(_without_topk(measured), control, results.closed_form_curve(),
                                            results.PAPER),
              "Left: diffusion loss against the scale of the latent. The line is the closed form for a latent without "
              "structure; the squares are one trained denoiser whose latents are scaled down, without training; the "
              "dotted lines are the paper's two losses. Where all points follow one curve, the loss says little about "
              "the model. Right: what the decoder can still make of the masked latent; higher is worse."),
    ])  # fmt: skip


def sweep(run: FinishedRun) -> Shown:
    """Show the sweep of lambda on digits."""
    measured = run.table("measures", "setting", "seed", *MEASURES)
    means = measured.groupby("setting", sort=False).mean(numeric_only=True)
    lambdas = [name for name in means.index if name.startswith("lambda_")]
    before = means.loc[UNMASKED]
    collapsed = [name for name in lambdas if means.loc[name, "scale"] < COLLAPSED * before["scale"]]
    ratios = means.loc[lambdas, "masked_recon_mse"] / before["recon_mse"]
    rows = [
        (name.removeprefix("lambda_"), number(means.loc[name, "scale"], 2), number(means.loc[name, "mean_mask"], 2),
         _mean(run, name, "diffusion_loss"), number(run.metric(f"{name}.by_scaling"), 2), f"{ratios[name]:.0f}",
         number(means.loc[name, "fid"], 2) if "fid" in means and pd.notna(means.loc[name, "fid"]) else "not measured")
        for name in lambdas
    ]  # fmt: skip
    none = (
        "no mask", number(before["scale"], 2), "1", _mean(run, UNMASKED, "diffusion_loss"), "",
        f"{before['masked_recon_mse'] / before['recon_mse']:.0f}",
        number(before["fid"], 2) if "fid" in means and pd.notna(before["fid"]) else "not measured",
    )  # fmt: skip
    return Shown(
        f"On digits the latent collapses with {len(collapsed)} of {len(lambdas)} values of lambda"
        + (", 0 among them" if "lambda_0" in collapsed else "")
        + f"; pictures decoded from the masked latent have {span(ratios, '{:.0f}'.format)} times the error.",
        [
            table(("lambda", "scale", "mean mask", "diffusion loss", "its fall by scaling alone",
                   "times the error of decoded pictures", "Frechet distance of samples"), [none, *rows]),
            "The Frechet distance compares drawn with real pictures by features of the embedded autoencoder; lower is "
            "better.",
        ],
    )  # fmt: skip


def kept(run: FinishedRun) -> Shown:
    """Show quality and cost with fewer channels of the latent."""
    measured = run.table("measures", "setting", "seed", "masked_recon_mse").sort_values("seed")
    topk = results.topk_runs(measured)
    numbers = sorted(topk["kept"].unique())
    errors = {"all, no mask": _interval(run, f"{UNMASKED}.masked_recon_mse")}
    whole = errors["all, no mask"].mean
    errors |= {str(count): _interval(run, f"{results.KEEP}{count}.masked_recon_mse") for count in numbers}
    savings = run.table("savings", "part", "kept", "repeat", "saved", "saved_low", "saved_high")
    steps = savings[(savings["part"] == "denoise") & ~savings["repeat"].astype(bool)].set_index("kept")
    before, rows = measured.loc[measured["setting"] == UNMASKED, "masked_recon_mse"], []
    for name, error in errors.items():
        time = steps.loc[int(name)] if name.isdigit() and int(name) in steps.index else None
        saved = "" if time is None else f"{signed(-time['saved'])} % ({signed(-time['saved_high'])} to " \
                                        f"{signed(-time['saved_low'])})"  # fmt: skip
        own = measured.loc[measured["setting"] == f"{results.KEEP}{name}", "masked_recon_mse"]
        more = paired_interval(before, own) if len(own) else None
        paired = f"{signed(more.mean)} ({between(*more[1:], sign=True)})" if more else ""
        rows.append((name, f"{number(error.mean, 2)} ({between(*error[1:])})", paired, saved))
    free = [count for count in numbers if errors[str(count)].mean <= ALIKE * whole]
    return Shown(
        f"Where the decoder reads the masked latent, channels can be removed: {min(free)} of {max(numbers)} give "
        f"pictures with an error of {number(errors[str(min(free))].mean, 2)}, against {number(whole, 2)} without a mask"
        + (f"; {min(numbers)} gives {number(errors[str(min(numbers))].mean, 2)}." if min(numbers) < min(free) else ".")
        if free and min(free) < max(numbers)
        else f"No channel can be removed without a larger error of decoded pictures than {number(whole, 2)}.",
        [
            "Hard top-k with one mask for all pictures; the error is that of pictures decoded from the denoiser's "
            "input, with 95 % intervals over seeds; the time is that of a denoising step against the whole model's, "
            "median and quartiles.",
            table(("channels kept", "error of decoded pictures", "difference to no mask, paired", "time of a step"),
                  rows),
        ],
    )  # fmt: skip


def _without_topk(measured: pd.DataFrame) -> pd.DataFrame:
    return measured[~measured["setting"].str.startswith(results.KEEP)]


def _interval(run: FinishedRun, name: str) -> Interval:
    return Interval(*(run.metric(f"{name}{end}") for end in ("", ".low", ".high")))


def _mean(run: FinishedRun, setting: str, measure: str) -> str:
    value = _interval(run, f"{setting}.{measure}")
    ends = "" if value.low == value.high else f" ({between(*value[1:])})"
    return f"{number(value.mean, 2)}{ends}"


def _ends(row: dict[str, float]) -> str:
    return between(row["low"], row["high"], sign=True)


SECTION = Section(
    "Paper 2: pruning the latent's channels",
    "\"PeLAP-A: Adaptive Latent Pruning for Lightweight Latent Diffusion Models\" multiplies each channel of the VAE's "
    "latent by a predicted **mask** between 0 and 1 before the denoiser sees it, and trains VAE, predictor and "
    "denoiser together; **lambda** is the weight of the mean mask in the loss. What is known of the paper is its "
    "abstract, which has two runs and no table or figure.",
    (
        Entry(
            "The abstract's comparison: lambda 0 and 0.01 on CIFAR-10", ("21_sparsity_collapse/cifar10",), collapse,
            paper="with lambda = 0.01 all masks go to near zero, while the diffusion loss falls from 0.0240 to 0.0236 "
            "and the reconstruction error from 24.67 to 22.59.",
            differs="small networks and some hundred steps instead of 100 epochs; several seeds instead of one. The "
            "paper does not say whether its unpruned baseline has a mask without a penalty or none.",
            paper_runs=("21_sparsity_collapse/paper-cifar10",), headline=True,
        ),
        Entry("What the diffusion loss measures: the scale of the latent", ("21_sparsity_collapse/cifar10",), scale,
              headline=True),
        Entry("More values of lambda: the sweep on digits", ("21_sparsity_collapse/study",), sweep),
        Entry("The intended use: quality and time against the channels kept", ("21_sparsity_collapse/study",), kept),
    ),
    (Absent("abstract", "one setting in the paper's size, masks by class", "20_latent_pruning/paper-cifar10",
            "it needs CIFAR-10 and a GPU"),),
)  # fmt: skip
