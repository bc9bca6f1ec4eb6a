"""Summarise a sweep of PeLAP-A's lambda over seeds: means with intervals, a comparison with the paper's two runs, and
the findings as text.

"PeLAP-A: Adaptive Latent Pruning for Lightweight Latent Diffusion Models" compares two single runs.
"""

from typing import Any

import numpy as np
import pandas as pd
import torch

from vaelab.core.stats import Interval, mean_interval, paired_interval
from vaelab.pruning import noise_loss
from vaelab.pruning.sweep import KEEP, UNMASKED, lambda_name

PAPER = {"lambda_0": (0.0240, 24.67), "lambda_0.01": (0.0236, 22.59)}
"""Diffusion loss, and reconstruction MSE summed over a picture's 3,072 values, from the paper's abstract: one run each.
``lambda_0`` is what the paper calls the unpruned baseline."""
PAPER_SCHEDULE = 1000


def summarize_over_seeds(measured: pd.DataFrame) -> dict[str, float]:
    """Compute the means ``<setting>.<measure>`` over seeds, with the ends of their intervals ``.low`` and ``.high``;
    measures with missing values are left out."""
    metrics: dict[str, float] = {}
    measures = [name for name in measured.columns if name not in ("setting", "seed")]
    for setting, part in measured.groupby("setting", sort=False):
        for measure in measures:
            if part[measure].notna().all():
                metrics |= interval_entries(f"{setting}.{measure}", mean_interval(part[measure].astype(float)))
    return metrics


def interval_entries(name: str, value: Interval) -> dict[str, float]:
    """Return an interval as three entries: ``name`` (the mean), ``name.low`` and ``name.high``."""
    return {name: value.mean, f"{name}.low": value.low, f"{name}.high": value.high}


def control_metrics(scaled: pd.DataFrame) -> dict[str, float]:
    """Compute the means ``control.scale_<value>.<measure>`` over seeds, with the ends of their intervals ``.low`` and
    ``.high``."""
    return summarize_over_seeds(scaled.assign(setting=[f"control.scale_{scale:g}" for scale in scaled["scale"]]))


def closed_form_curve(smallest: float = 1e-3, largest: float = 3.0) -> tuple[np.ndarray, np.ndarray]:
    """Compute scales (N,), and the diffusion losses (N,) of latents without structure that have these scales, over the
    paper's schedule."""
    scales = torch.logspace(np.log10(smallest), np.log10(largest), 100, dtype=torch.float64)
    abar = noise_loss.alpha_bar(_schedule())
    return scales.numpy(), noise_loss.closed_form_error(scales.square(), abar).mean(0).numpy()


def topk_runs(measured: pd.DataFrame) -> pd.DataFrame:
    """Select the runs of hard top-k, with the number of kept channels in a column ``kept``."""
    own = measured[measured["setting"].str.startswith(KEEP)]
    return own.assign(kept=own["setting"].str.removeprefix(KEEP).astype(int))


def paper_comparison(measured: pd.DataFrame) -> pd.DataFrame:
    """Compare the paper's two runs with ours, one row per setting of the paper. The table also has the scale of a
    latent without structure that has the paper's loss."""
    scheduler, rows = _schedule(), []
    for setting, (loss, mse) in PAPER.items():
        own = measured[measured["setting"] == setting]
        if len(own):
            rows.append({
                "setting": setting, "paper: diffusion loss": loss,
                "paper: scale of that closed form": noise_loss.equivalent_scale(loss, scheduler),
                "here: diffusion loss": own["diffusion_loss"].mean(), "here: scale": own["scale"].mean(),
                "paper: MSE": mse, "here: MSE": own["recon_mse"].mean(),
                "here: masked MSE": own["masked_recon_mse"].mean(),
            })  # fmt: skip
    return pd.DataFrame(rows)


def paper_differences(measured: pd.DataFrame) -> pd.DataFrame:
    """Compare lambda 0.01 with the baseline as the paper does, by paired differences with 95 % intervals: one row per
    measure, or no rows if one of the two settings was not run."""
    first, second = (measured[measured["setting"] == name].sort_values("seed") for name in PAPER)
    rows = []
    for place, measure in enumerate(("diffusion_loss", "recon_mse")):
        if len(first) and len(second):
            here = paired_interval(first[measure], second[measure])
            paper = PAPER["lambda_0.01"][place] - PAPER["lambda_0"][place]
            rows.append({"measure": measure, "paper": paper, "here": here.mean, "low": here.low, "high": here.high})
    return pd.DataFrame(rows)


def describe_results(measured: pd.DataFrame, parts: pd.DataFrame) -> Any:
    """Describe the findings in plain words, as Markdown.

    Args:
        measured: the table of :func:`vaelab.pruning.sweep.metrics_table`.
        parts: the table of :func:`vaelab.pruning.sweep.decompose_improvement`.
    """
    from IPython.display import Markdown

    means = measured.groupby("setting", sort=False)[[
        "diffusion_loss", "recon_mse", "masked_recon_mse", "mean_mask", "inactive_channels", "scale", "latent_scale",
    ]].mean()  # fmt: skip
    before = means.loc[UNMASKED]
    lines = []
    for setting, now in means.drop(UNMASKED).iterrows():
        own = parts[parts["setting"] == setting]
        gain, scaling = mean_interval(own["improvement"]), mean_interval(own["by_scaling"])
        sure = gain.low > 0 or gain.high < 0
        less = f"{abs(gain.mean):.3g} {'lower' if gain.mean > 0 else 'higher'}" if sure else "not clearly another"
        share = f", of which scaling alone brings {scaling.mean:.3g}" if sure and gain.mean > 0 else ""
        ratio = now["masked_recon_mse"] / before["recon_mse"]
        lines.append(
            f"- **{setting}**: mean mask {now['mean_mask']:.3g}, {now['inactive_channels']:.2g} inactive channels; the "
            f"diffusion loss is {less}{share}; pictures from the masked latent have {ratio:.3g} times the error."
        )
    return Markdown(
        f"Against `unmasked` (diffusion loss {before['diffusion_loss']:.3g}, scale {before['scale']:.3g}, error "
        f"{before['recon_mse']:.3g} a picture), by 95 % intervals over {measured['seed'].nunique()} seeds.\n\n"
        + describe_collapse(measured, parts) + "\n\n" + "\n".join(lines)
    )  # fmt: skip


def describe_collapse(measured: pd.DataFrame, parts: pd.DataFrame) -> str:
    """Describe with which lambdas the latent collapses, and how much of the lower loss scaling alone brings; the
    arguments are those of :func:`describe_results`."""
    means = measured.groupby("setting", sort=False)[["recon_mse", "masked_recon_mse", "scale"]].mean()
    before, lambdas = means.loc[UNMASKED], [name for name in means.index if name.startswith("lambda_")]
    collapsed = [name for name in lambdas if means.loc[name, "scale"] < 0.1 * before["scale"]]
    worse = [name for name in collapsed if means.loc[name, "masked_recon_mse"] > 2 * before["recon_mse"]]
    if not collapsed:
        return "No lambda brought the latent below a tenth of its scale."
    which = "every lambda" if collapsed == lambdas else ", ".join(collapsed)
    summary = f"The latent collapses below a tenth of its scale with {which}"
    summary += ", without any penalty too" if lambda_name(0) in collapsed else ""
    if worse:
        summary += ". Its pictures are then lost" + ("." if worse == collapsed else f" with {', '.join(worse)}.")
    else:
        summary += "; its pictures are not lost."
    by_seed = parts[parts["setting"].isin(collapsed)].groupby("seed")[["by_scaling", "improvement"]].mean()
    fell, by_scaling = (_with_ends(mean_interval(by_seed[name])) for name in ("improvement", "by_scaling"))
    return summary + (
        f" The diffusion loss falls by {fell}; scaling alone, of the denoiser without a mask, brings {by_scaling}."
    )


def _with_ends(interval: Interval) -> str:
    """A mean with its 95 % interval over seeds, where there is one."""
    ends = "" if np.isnan(interval.low) else f" ({interval.low:.3g} to {interval.high:.3g})"
    return f"{interval.mean:.3g}{ends}"


def describe_mask(measured: pd.DataFrame, setting: str) -> str:
    """Describe in words what one setting's mask does, beside the same training without a mask; ``measured`` is the
    table of :func:`vaelab.pruning.sweep.metrics_table`."""
    means = measured.groupby("setting")[["diffusion_loss", "closed_form_loss", "scale"]].mean()
    before, now = means.loc[UNMASKED], means.loc[setting]
    ratio = error_ratio(measured, setting)
    return (
        f"With the mask ({setting}) the diffusion loss is {now['diffusion_loss']:.3g} instead of "
        f"{before['diffusion_loss']:.3g}, but the scale of the latent is {now['scale']:.3g} instead of "
        f"{before['scale']:.3g}, and a latent of this scale without any structure has a loss of "
        f"{now['closed_form_loss']:.3g}; pictures from the masked latent have {ratio.mean:.3g} times the error of "
        f"those without a mask (means over {measured['seed'].nunique()} seeds)."
    )


def error_ratio(measured: pd.DataFrame, setting: str) -> Interval:
    """Compute how many times the error of pictures without a mask those from a setting's masked latent have: the
    geometric mean of the ratio over seeds, with its 95 % interval (of the logarithms, by Student's t)."""
    own, before = (measured[measured["setting"] == name].set_index("seed") for name in (setting, UNMASKED))
    logarithms = mean_interval(np.log(own["masked_recon_mse"] / before["recon_mse"]))
    return Interval(*np.exp(logarithms).tolist())


def _schedule() -> Any:
    from diffusers import DDPMScheduler

    return DDPMScheduler(num_train_timesteps=PAPER_SCHEDULE)
