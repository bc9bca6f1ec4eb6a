"""Run sweeps of PeLAP-A's lambda and of the number of kept channels, and control experiments on the trained models.

The paper ("PeLAP-A: Adaptive Latent Pruning for Lightweight Latent Diffusion Models") compares runs by their diffusion
loss, which already falls when the latent gets smaller. Here an improvement of the loss is split into the part that
scaling alone explains and the rest.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import pandas as pd
import torch
from torch import Tensor

from vaelab import models
from vaelab.core.validate import at_least
from vaelab.data.images import Images
from vaelab.pruning import noise_loss
from vaelab.pruning.fid import FIDReference
from vaelab.pruning.masks import PruningObjective
from vaelab.pruning.metrics import EVALUATION_BATCH, sample_latents, sample_pictures
from vaelab.pruning.train import PrunedRun, PruningConfig, build_objective, load_pruned, train_pruned
from vaelab.training import evaluation_mode

UNMASKED, KEEP = "unmasked", "keep_"
"""Name of the setting without a mask, and the beginning of the names of settings with hard top-k."""


def lambda_name(value: float) -> str:
    """Return the name of the setting with this lambda."""
    return f"lambda_{value:g}"


def sweep_settings(
    config: PruningConfig, lambdas: Sequence[float] = (), kept: Sequence[int] = ()
) -> dict[str, PruningConfig]:
    """Make the settings of a sweep, by name.

    ``unmasked`` is ``config`` without a mask; ``lambda_<value>`` is ``config`` with that lambda; ``keep_<k>`` is hard
    top-k with one mask for all pictures and a decoder that reads the masked latent.

    Raises:
        ValueError: a lambda is below 0, or fewer than one channel is kept.
    """
    for value in lambdas:
        at_least("lambdas", value, 0)
    settings = {UNMASKED: config.with_latent(mask="none", sparsity=0.0)}
    settings |= {lambda_name(value): config.with_latent(sparsity=float(value)) for value in lambdas}
    top_k = {"mask": "topk", "shared": True, "decoder_reads": "masked", "sparsity": 0.0}
    return settings | {f"{KEEP}{k}": config.with_latent(keep=k, **top_k) for k in kept}


def run_folder(folder: str | Path, setting: str, seed: int) -> Path:
    """Return the folder of the run of a setting and seed."""
    return Path(folder, f"{setting}-seed{seed}")


def sweep(
    model: str,
    settings: Mapping[str, PruningConfig],
    seeds: Sequence[int],
    pictures: tuple[Images, Images],
    folder: str | Path,
    *,
    fid_reference: FIDReference | None = None,
    revision: str | None = None,
) -> list[PrunedRun]:
    """Train and evaluate every setting with every seed.

    Runs with the same seed share the order of the data, the noise, and the initial weights of the networks that they
    have in common.

    Raises:
        ValueError: there are fewer than two seeds, a seed occurs twice, or a setting does not fit the model or the
            pictures. This is checked before anything is trained.
    """
    if len(set(seeds)) < len(seeds) or len(seeds) < 2:
        raise ValueError(f"seeds: an interval needs two or more different seeds, got {list(seeds)}")
    for config in settings.values():
        build_objective(model, config, pictures[0].resolution, revision)
    return [
        train_pruned(
            model,
            name,
            config.with_seed(seed),
            pictures,
            run_folder(folder, name, seed),
            fid_reference=fid_reference,
            revision=revision,
        )
        for seed in seeds
        for name, config in settings.items()
    ]


def metrics_table(runs: Sequence[PrunedRun]) -> pd.DataFrame:
    """Make a table with one row per run: ``setting``, ``seed``, and all measures."""
    return pd.DataFrame([{"setting": run.setting, "seed": run.seed, **run.measures} for run in runs])


def log_table(runs: Sequence[PrunedRun], part: str) -> pd.DataFrame:
    """Join one of the logs of several runs (``history``, ``masks`` or ``spectrum``) to a table, with the columns
    ``setting``, ``condition`` (the same as ``setting``) and ``seed``."""
    return pd.DataFrame(
        [{"setting": run.setting, "condition": run.setting, "seed": run.seed, **row}
         for run in runs for row in getattr(run, part)]
    )  # fmt: skip


def scaling_control(
    model: str,
    setting: str,
    config: PruningConfig,
    seeds: Sequence[int],
    images: Images,
    folder: str | Path,
    scales: Sequence[float],
) -> pd.DataFrame:
    """Evaluate the trained denoisers of one setting on latents multiplied by each of ``scales``, without further
    training.

    Returns:
        One row per seed and scale: ``seed``; ``scale``; ``latent_scale``, the standard deviation of the scaled latents;
        ``diffusion_loss`` of the unchanged denoiser; ``matched_loss`` of the denoiser evaluated at the timestep with
        the same signal-to-noise ratio (:func:`vaelab.pruning.noise_loss.predictor_of_scaled_latents`); and
        ``closed_form_loss``.
    """
    rows = []
    for seed in seeds:
        objective = load_sweep(model, {setting: config}, seed, images.resolution, folder)[setting]
        latents = sample_latents(objective, images, seed)[1]
        scheduler, predict = objective.scheduler, noise_loss.noise_predictor(objective.unet)
        timesteps = noise_loss.spread_timesteps(scheduler, config.evaluation.loss_timesteps)
        abar, options = noise_loss.alpha_bar(scheduler, timesteps), {"batch_size": EVALUATION_BATCH, "seed": seed}
        for scale in scales:
            at_least("scales", scale, 0)
            variance = noise_loss.channel_variances(scale * latents).cpu()
            matched = noise_loss.predictor_of_scaled_latents(predict, scheduler, scale)
            inputs = (scale * latents, scheduler, timesteps)
            rows.append({
                "seed": seed, "scale": scale, "latent_scale": float(variance.mean().sqrt()),
                "diffusion_loss": _loss(noise_loss.noise_errors(predict, *inputs, **options)),
                "matched_loss": _loss(noise_loss.noise_errors(matched, *inputs, **options)),
                "closed_form_loss": _loss(noise_loss.closed_form_error(variance, abar)),
            })  # fmt: skip
    return pd.DataFrame(rows)


@torch.no_grad()
def picture_rows(
    objectives: Mapping[str, PruningObjective], images: Images, config: PruningConfig, count: int = 8
) -> dict[str, Tensor]:
    """Make rows of pictures (count, 3, R, R) for a figure: held-out pictures and, for every trained objective, their
    reconstructions from the latents and from the masked latents, and samples of the denoiser."""
    shown = images.stack(count)
    rows = {"held out": shown}
    for name, objective in objectives.items():
        with evaluation_mode(objective):
            latents = models.encode_latents(objective.vae, shown.to(objective.vae.device))
            masked = objective.denoiser_input(models.scale_latents(objective.vae, latents)).latents
            few = replace(config.evaluation, fid_images=count)
            rows[f"{name}, latent"] = models.decode_latents(objective.vae, latents, shown.shape)
            if objective.config.mask != "none":
                rows[f"{name}, masked"] = objective.decode(masked, shown.shape)
            rows[f"{name}, drawn"] = sample_pictures(
                objective, few, tuple(masked.shape[1:]), images.resolution, config.train.seed
            )
    return rows


def decompose_improvement(
    model: str,
    runs: Sequence[PrunedRun],
    reference: str,
    settings: Mapping[str, PruningConfig],
    images: Images,
    folder: str | Path,
    revision: str | None = None,
) -> pd.DataFrame:
    """Split the improvement of each setting's diffusion loss over the reference into the part that scaling alone
    explains and the rest.

    To measure the effect of scaling, the reference's denoiser is evaluated, without further training, on its own
    latents times the ``factor`` that gives them the setting's closed-form loss.

    Returns:
        One row per run: ``setting``, ``seed``, ``factor``, ``improvement`` (how much lower the loss is than the
        reference's), ``by_scaling`` (the part that scaling explains) and ``left`` (their difference).
    """
    measured, rows = {(run.setting, run.seed): run.measures for run in runs}, []
    for seed in dict.fromkeys(run.seed for run in runs):
        config = settings[reference].with_seed(seed)
        objective = load_pruned(model, config, images.resolution, run_folder(folder, reference, seed), revision)
        latents = sample_latents(objective, images, seed)[1]
        scheduler, reference_loss = objective.scheduler, measured[reference, seed]["diffusion_loss"]
        timesteps = noise_loss.spread_timesteps(scheduler, config.evaluation.loss_timesteps)
        variance, abar = noise_loss.channel_variances(latents).cpu(), noise_loss.alpha_bar(scheduler, timesteps)
        for (setting, other), values in measured.items():
            if other != seed or setting == reference:
                continue
            factor = noise_loss.factor_for_loss(variance, values["closed_form_loss"], abar)
            matched = noise_loss.predictor_of_scaled_latents(
                noise_loss.noise_predictor(objective.unet), scheduler, factor
            )
            scaled = noise_loss.noise_errors(
                matched, factor * latents, scheduler, timesteps, batch_size=EVALUATION_BATCH, seed=seed
            )
            improvement, by_scaling = reference_loss - values["diffusion_loss"], reference_loss - _loss(scaled)
            rows.append({"setting": setting, "seed": seed, "factor": factor, "improvement": improvement,
                          "by_scaling": by_scaling, "left": improvement - by_scaling})  # fmt: skip
    return pd.DataFrame(rows)


def load_sweep(
    model: str,
    settings: Mapping[str, PruningConfig],
    seed: int,
    resolution: int,
    folder: str | Path,
    revision: str | None = None,
) -> dict[str, PruningObjective]:
    """Load the objectives that a sweep trained with one seed, by setting."""
    return {
        name: load_pruned(model, config.with_seed(seed), resolution, run_folder(folder, name, seed), revision)
        for name, config in settings.items()
    }


def _loss(errors: Tensor) -> float:
    return float(errors.mean())
