"""Sweeps of PeLAP-A's lambda and of the channels kept, and the controls on what they trained.

The paper ("PeLAP-A: Adaptive Latent Pruning for Lightweight Latent Diffusion Models") compares runs by a
diffusion loss that a smaller latent lowers by itself. Here a fall of the loss is split into what scaling
alone brings and what is left.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from vaelab import models
from vaelab.core.stats import Interval, paired_interval
from vaelab.core.validate import at_least
from vaelab.data.images import Images
from vaelab.pruning import noise_loss
from vaelab.pruning.fid import Judge
from vaelab.pruning.masks import PruningObjective
from vaelab.pruning.metrics import AT_ONCE, drawn, latents_of
from vaelab.pruning.train import PrunedRun, PruningConfig, build, load_pruned, train_pruned
from vaelab.training import evaluation_mode

# conclusions: What the runs of a sweep of PeLAP-A's lambda say together: numbers with intervals over seeds, the paper's
# two runs beside ours, and a conclusion in plain words that is computed from them.
#
# "PeLAP-A: Adaptive Latent Pruning for Lightweight Latent Diffusion Models" compares two single runs.
#


PAPER = {"lambda_0": (0.0240, 24.67), "lambda_0.01": (0.0236, 22.59)}
"""Diffusion loss and reconstruction MSE, summed over a picture's 3,072 values, of the paper's abstract: one
run each; what it calls the unpruned baseline stands under ``lambda_0``."""
PAPER_SCHEDULE = 1000
UNMASKED, KEEP = "unmasked", "keep_"


def lambda_name(value: float) -> str:
    """How a setting with this lambda is called."""
    return f"lambda_{value:g}"


def interval(values: Sequence[float]) -> Interval:
    """The mean over seeds with its 95 % interval by Student's t."""
    return paired_interval(np.zeros(len(values)), values)


def summary(measured: pd.DataFrame) -> dict[str, float]:
    """``<setting>.<measure>`` over seeds, with ``.low`` and ``.high``; what was not measured is left out."""
    found: dict[str, float] = {}
    measures = [name for name in measured.columns if name not in ("setting", "seed")]
    for setting, part in measured.groupby("setting", sort=False):
        for measure in measures:
            if part[measure].notna().all():
                found |= named(f"{setting}.{measure}", interval(part[measure].astype(float)))
    return found


def named(name: str, value: Interval) -> dict[str, float]:
    """An interval as three numbers: ``name``, ``name.low`` and ``name.high``."""
    return {name: value.mean, f"{name}.low": value.low, f"{name}.high": value.high}


def control_metrics(scaled: pd.DataFrame) -> dict[str, float]:
    """``control.scale_<value>.<measure>`` over seeds, with ``.low`` and ``.high``."""
    return summary(scaled.assign(setting=[f"control.scale_{scale:g}" for scale in scaled["scale"]]))


def closed_form_curve(smallest: float = 1e-3, largest: float = 3.0) -> tuple[np.ndarray, np.ndarray]:
    """Scales (N,) and the diffusion loss (N,) of a latent without structure of each, over the paper's schedule."""
    scales = torch.logspace(np.log10(smallest), np.log10(largest), 100, dtype=torch.float64)
    abar = noise_loss.signal_share(_schedule())
    return scales.numpy(), noise_loss.closed_form(scales.square(), abar).mean(0).numpy()


def by_kept(measured: pd.DataFrame) -> pd.DataFrame:
    """The runs of hard top-k, with their number of channels as ``kept``."""
    own = measured[measured["setting"].str.startswith(KEEP)]
    return own.assign(kept=own["setting"].str.removeprefix(KEEP).astype(int))


def beside_paper(measured: pd.DataFrame) -> pd.DataFrame:
    """The paper's two runs beside ours, with the scale of a structureless latent of that loss: a row a
    setting that the paper has."""
    scheduler, found = _schedule(), []
    for setting, (loss, mse) in PAPER.items():
        own = measured[measured["setting"] == setting]
        if len(own):
            found.append({
                "setting": setting, "paper: diffusion loss": loss,
                "paper: scale of that closed form": noise_loss.equivalent_scale(loss, scheduler),
                "here: diffusion loss": own["diffusion_loss"].mean(), "here: scale": own["scale"].mean(),
                "paper: MSE": mse, "here: MSE": own["recon_mse"].mean(),
                "here: masked MSE": own["masked_recon_mse"].mean(),
            })  # fmt: skip
    return pd.DataFrame(found)


def paper_differences(measured: pd.DataFrame) -> pd.DataFrame:
    """What the paper compares, lambda 0.01 with its baseline, as paired differences with 95 % intervals: a row a
    measure; none where one of the two settings was not run."""
    first, second = (measured[measured["setting"] == name].sort_values("seed") for name in PAPER)
    rows = []
    for place, measure in enumerate(("diffusion_loss", "recon_mse")):
        if len(first) and len(second):
            here = paired_interval(first[measure], second[measure])
            paper = PAPER["lambda_0.01"][place] - PAPER["lambda_0"][place]
            rows.append({"measure": measure, "paper": paper, "here": here.mean, "low": here.low, "high": here.high})
    return pd.DataFrame(rows)


def verdict(measured: pd.DataFrame, parts: pd.DataFrame) -> Any:
    """What the numbers say, in plain words, as Markdown."""
    from IPython.display import Markdown

    means = measured.groupby("setting", sort=False)[[
        "diffusion_loss", "recon_mse", "masked_recon_mse", "mean_mask", "channels_off", "scale", "latent_scale",
    ]].mean()  # fmt: skip
    before = means.loc[UNMASKED]
    lines = []
    for setting, now in means.drop(UNMASKED).iterrows():
        own = parts[parts["setting"] == setting]
        gain, scaling = interval(own["improvement"]), interval(own["by_scaling"])
        sure = gain.low > 0 or gain.high < 0
        less = f"{abs(gain.mean):.3g} {'lower' if gain.mean > 0 else 'higher'}" if sure else "not clearly another"
        share = f", of which scaling alone brings {scaling.mean:.3g}" if sure and gain.mean > 0 else ""
        ratio = now["masked_recon_mse"] / before["recon_mse"]
        lines.append(
            f"- **{setting}**: mean mask {now['mean_mask']:.3g}, {now['channels_off']:.2g} channels off; the diffusion "
            f"loss is {less}{share}; pictures decoded from what the denoiser gets have {ratio:.3g} times the error."
        )
    lambdas = [name for name in means.index if name.startswith("lambda_")]
    collapsed = [name for name in lambdas if means.loc[name, "scale"] < 0.1 * before["scale"]]
    worse = [name for name in collapsed if means.loc[name, "masked_recon_mse"] > 2 * before["recon_mse"]]
    said = "No lambda brought the latent below a tenth of its scale."
    if collapsed:
        said = f"The latent collapses below a tenth of its scale with {', '.join(collapsed)}"
        said += ", without any penalty too" if lambda_name(0) in collapsed else ""
        said += f". Its pictures are then lost with {', '.join(worse)}." if worse else "; its pictures are not lost."
        fell = parts[parts["setting"].isin(collapsed)][["by_scaling", "improvement"]].mean()
        said += (
            f" The diffusion loss falls by {fell['improvement']:.3g}; scaling alone, of the denoiser without a mask, "
            f"brings {fell['by_scaling']:.3g}."
        )
    return Markdown(
        f"Against `unmasked` (diffusion loss {before['diffusion_loss']:.3g}, scale {before['scale']:.3g}, error "
        f"{before['recon_mse']:.3g} a picture), by 95 % intervals over {measured['seed'].nunique()} seeds.\n\n"
        + said + "\n\n" + "\n".join(lines)
    )  # fmt: skip


def _schedule() -> Any:
    from diffusers import DDPMScheduler

    return DDPMScheduler(num_train_timesteps=PAPER_SCHEDULE)


def settings(
    config: PruningConfig, lambdas: Sequence[float] = (), kept: Sequence[int] = ()
) -> dict[str, PruningConfig]:
    """The settings of a sweep by name: ``unmasked``, the twin without a mask; ``lambda_<value>``, the
    configuration with that lambda; ``keep_<k>``, hard top-k with one mask for all and a decoder that reads
    what the denoiser gets.

    Raises:
        ValueError: a lambda below 0, or less than one channel kept.
    """
    for value in lambdas:
        at_least("lambdas", value, 0)
    found = {UNMASKED: config.with_latent(mask="none", sparsity=0.0)}
    found |= {lambda_name(value): config.with_latent(sparsity=float(value)) for value in lambdas}
    top_k = {"mask": "topk", "shared": True, "decoder_reads": "masked", "sparsity": 0.0}
    return found | {f"{KEEP}{k}": config.with_latent(keep=k, **top_k) for k in kept}


def place(folder: str | Path, setting: str, seed: int) -> Path:
    """Where the run of a setting and seed lies."""
    return Path(folder, f"{setting}-seed{seed}")


def sweep(
    model: str,
    settings: Mapping[str, PruningConfig],
    seeds: Sequence[int],
    pictures: tuple[Images, Images],
    folder: str | Path,
    *,
    judge: Judge | None = None,
    revision: str | None = None,
) -> list[PrunedRun]:
    """Train and measure every setting with every seed; runs of one seed share the first weights of what
    they have in common, the data's order and the noise.

    Raises:
        ValueError: fewer than two seeds, or a setting that does not fit, before anything is trained.
    """
    if len(set(seeds)) < len(seeds) or len(seeds) < 2:
        raise ValueError(f"seeds: an interval needs two or more different seeds, got {list(seeds)}")
    for config in settings.values():
        build(model, config, pictures[0].resolution, revision)
    return [
        train_pruned(
            model, name, config.with_seed(seed), pictures, place(folder, name, seed), judge=judge, revision=revision
        )
        for seed in seeds
        for name, config in settings.items()
    ]


def table(runs: Sequence[PrunedRun]) -> pd.DataFrame:
    """A row a run: ``setting``, ``seed``, and all measures."""
    return pd.DataFrame([{"setting": run.setting, "seed": run.seed, **run.measures} for run in runs])


def rows(runs: Sequence[PrunedRun], part: str) -> pd.DataFrame:
    """One of the logs of several runs (``history``, ``masks``, ``spectrum``), with ``setting``, the same as
    ``condition``, and ``seed``."""
    return pd.DataFrame(
        [{"setting": run.setting, "condition": run.setting, "seed": run.seed, **row}
         for run in runs for row in getattr(run, part)]
    )  # fmt: skip


def control(
    model: str,
    setting: str,
    config: PruningConfig,
    seeds: Sequence[int],
    images: Images,
    folder: str | Path,
    scales: Sequence[float],
) -> pd.DataFrame:
    """The trained denoisers of one setting on latents multiplied by each of ``scales``, without any training.

    Returns:
        A row a seed and scale: ``seed``, ``scale``, ``latent_scale``, the standard deviation that it gives,
        ``diffusion_loss`` of the denoiser as it is, ``matched_loss`` when it is asked at the timestep of the same
        signal-to-noise ratio (:func:`vaelab.pruning.noise_loss.at_scale`), and ``closed_form_loss``.
    """
    found = []
    for seed in seeds:
        own = trained(model, {setting: config}, seed, images.resolution, folder)[setting]
        seen = latents_of(own, images, seed)[1]
        scheduler, predict = own.scheduler, noise_loss.predictor(own.unet)
        timesteps = noise_loss.grid(scheduler, config.measuring.loss_timesteps)
        abar, options = noise_loss.signal_share(scheduler, timesteps), {"batch_size": AT_ONCE, "seed": seed}
        for scale in scales:
            at_least("scales", scale, 0)
            variance = noise_loss.variances(scale * seen).cpu()
            told = noise_loss.at_scale(predict, scheduler, scale)
            found.append({
                "seed": seed, "scale": scale, "latent_scale": float(variance.mean().sqrt()),
                "diffusion_loss": _loss(noise_loss.errors(predict, scale * seen, scheduler, timesteps, **options)),
                "matched_loss": _loss(noise_loss.errors(told, scale * seen, scheduler, timesteps, **options)),
                "closed_form_loss": _loss(noise_loss.closed_form(variance, abar)),
            })  # fmt: skip
    return pd.DataFrame(found)


@torch.no_grad()
def pictures(
    objectives: Mapping[str, PruningObjective], images: Images, config: PruningConfig, count: int = 8
) -> dict[str, Tensor]:
    """Rows of pictures (count, 3, R, R) for a figure: held-out ones, and for every trained objective what is
    decoded from the latents, from what the denoiser gets of them, and from samples of the denoiser."""
    shown = images.stack(count)
    found = {"held out": shown}
    for name, objective in objectives.items():
        with evaluation_mode(objective):
            latents = (
                models.encode_latents(objective.vae, shown.to(objective.vae.device))
                * objective.vae.config.scaling_factor
            )
            seen = objective.seen(latents).latents
            few = replace(config.measuring, fid_images=count)
            found[f"{name}, latent"] = models.decode_latents(
                objective.vae, latents / objective.vae.config.scaling_factor, shown.shape
            )
            if objective.config.mask != "none":
                found[f"{name}, masked"] = objective.decode(seen, shown.shape)
            found[f"{name}, drawn"] = drawn(objective, few, tuple(seen.shape[1:]), images.resolution, config.train.seed)
    return found


def decomposition(
    model: str,
    runs: Sequence[PrunedRun],
    reference: str,
    settings: Mapping[str, PruningConfig],
    images: Images,
    folder: str | Path,
    revision: str | None = None,
) -> pd.DataFrame:
    """How much lower each setting's diffusion loss is than the reference's, and how much of that scaling
    alone brings: the reference's own denoiser, untrained, on its own latents times the factor that gives
    them the setting's closed form.

    Returns:
        A row a run: ``setting``, ``seed``, ``factor``, ``improvement``, ``by_scaling`` and ``left``,
        their difference.
    """
    measured, found = {(run.setting, run.seed): run.measures for run in runs}, []
    for seed in dict.fromkeys(run.seed for run in runs):
        config = settings[reference].with_seed(seed)
        objective = load_pruned(model, config, images.resolution, place(folder, reference, seed), revision)
        seen = latents_of(objective, images, seed)[1]
        scheduler, own = objective.scheduler, measured[reference, seed]["diffusion_loss"]
        timesteps = noise_loss.grid(scheduler, config.measuring.loss_timesteps)
        variance, abar = noise_loss.variances(seen).cpu(), noise_loss.signal_share(scheduler, timesteps)
        for (setting, other), values in measured.items():
            if other != seed or setting == reference:
                continue
            factor = noise_loss.equal_factor(variance, values["closed_form_loss"], abar)
            told = noise_loss.at_scale(noise_loss.predictor(objective.unet), scheduler, factor)
            scaled = noise_loss.errors(told, factor * seen, scheduler, timesteps, batch_size=AT_ONCE, seed=seed)
            improvement, by_scaling = own - values["diffusion_loss"], own - _loss(scaled)
            found.append({"setting": setting, "seed": seed, "factor": factor, "improvement": improvement,
                          "by_scaling": by_scaling, "left": improvement - by_scaling})  # fmt: skip
    return pd.DataFrame(found)


def trained(
    model: str,
    settings: Mapping[str, PruningConfig],
    seed: int,
    resolution: int,
    folder: str | Path,
    revision: str | None = None,
) -> dict[str, PruningObjective]:
    """What one seed of a sweep trained, by setting."""
    return {
        name: load_pruned(model, config.with_seed(seed), resolution, place(folder, name, seed), revision)
        for name, config in settings.items()
    }


def _loss(errors: Tensor) -> float:
    return float(errors.mean())
