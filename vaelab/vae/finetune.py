"""Train or fine-tune a VAE while its suppressed channels are tracked and nudged.

From "Investigating the Functional Role of Learned Channel Suppression in Diffusion VAEs" (Shi, Wang and
Roshka), sections 4 and 5. A nudge raises the GroupNorm scale gamma of a suppressed channel
(:mod:`vaelab.vae.nudge`). There are three conditions: ``baseline`` changes no scale, ``nudge`` nudges the
suppressed channels, and ``control`` nudges as many active channels instead.

:func:`train_vae` trains under one condition with one seed. :func:`train_conditions` trains every condition with
every seed; runs with the same seed differ only in the condition. Each run records which pictures it was trained
on, so that a model is not evaluated on them (:func:`require_unseen`).
"""

import json
import shutil
import time
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn

from vaelab import models
from vaelab.core.config import configured
from vaelab.core.io import read_json, write_json
from vaelab.core.paths import local
from vaelab.core.validate import at_least, one_of
from vaelab.data.images import Images, shared_pictures
from vaelab.runner.parameters import portable
from vaelab.training.checkpoint import CHECKPOINT, LOG, Rows, TrainingLog, read_tensors, require_same_settings
from vaelab.training.loop import EXECUTION_ONLY, TrainConfig, Watcher, train
from vaelab.training.planning import MEASURED_FROM, TrainingPlan, plan_training
from vaelab.vae import channels
from vaelab.vae.nudge import Intervention, NudgeConfig, nudge_scales, random_active_channels
from vaelab.vae.objective import VAEObjective, evaluate_reconstruction

CONDITIONS = ("baseline", "nudge", "control")
Source = dict[str, list[list[int]]]
"""Which rows of which splits the pictures are from, see :attr:`vaelab.data.images.Images.source`."""
LOGS = ("history", "ChannelWatcher 0: tracked", "ChannelWatcher 0: interventions", "Validator 1: validation")
"""The lists of rows in the log of a training run, in the order of the fields of :class:`VAERun`."""


@dataclass(frozen=True)
class StudyConfig:
    """The settings of one training run of a VAE."""

    train: TrainConfig
    nudge: NudgeConfig = field(default_factory=NudgeConfig)
    batch_size: int = 16
    """Pictures per batch."""
    kl_weight: float = 1e-6
    """beta_KL, the weight of the KL term."""
    threshold: float = 1e-3
    """theta_act: a channel is suppressed if its mean absolute activation m_c is below this value."""
    relative: bool = False
    """Whether the threshold is multiplied by the layer's median m_c."""
    layers: str = "*"
    """GroupNorm layers to track, as a glob."""
    track_every: int = 20
    """Steps between tracked steps; the first step and the steps of interventions are tracked too."""
    near_zero_threshold: float = 1e-8
    """A weight of a convolution or linear layer is near zero if its magnitude is below this value."""
    evaluate_every: int = 0
    """Steps between validations; 0 validates at the start and the end only."""

    @classmethod
    def of(cls, params: dict[str, Any], **changes: Any) -> "StudyConfig":
        """Make the configuration from a notebook's parameters: each field takes the parameter of its name, ``changes``
        override the parameters, and fields without a parameter keep their defaults."""
        return configured(cls, {**params, **changes}, train=TrainConfig, nudge=NudgeConfig)

    def __post_init__(self) -> None:
        if self.relative and self.nudge.strategy == "adaptive":
            raise ValueError("strategy: adaptive raises m_c to an absolute threshold; relative must be false with it")
        at_least("batch_size", self.batch_size, 1)
        at_least("track_every", self.track_every, 1)
        at_least("threshold", self.threshold, 0)
        at_least("kl_weight", self.kl_weight, 0)
        at_least("evaluate_every", self.evaluate_every, 0)
        at_least("near_zero_threshold", self.near_zero_threshold, 0)


class ChannelWatcher(Watcher):
    """Tracks the channels of a VAE in training, and intervenes under the conditions ``nudge`` and ``control``.

    ``rows``, which is logged as ``tracked``, gets one row per tracked step; ``interventions`` gets one row per
    intervention and layer. :class:`VAERun` describes the columns.
    """

    def __init__(self, vae: nn.Module, condition: str, config: StudyConfig):
        one_of("conditions", condition, CONDITIONS)
        self._vae, self._condition, self._config = vae, condition, config
        self._tracker = channels.ActivityTracker(vae, config.layers)
        self.rows: list[dict[str, Any]] = []
        self.interventions: list[dict[str, Any]] = []

    def around(self, step: int) -> AbstractContextManager:
        """Record activations during tracked steps only."""
        return self._tracker.track() if self._tracked(step) else nullcontext()

    def after(self, step: int, optimizer: torch.optim.Optimizer) -> None:
        """At a tracked step, classify the channels and record the counts; at an intervention step, also change
        scales."""
        if not self._tracked(step):
            return
        config = self._config
        activity = self._tracker.read()
        suppressed = channels.classify(self._vae, activity, threshold=config.threshold, relative=config.relative)
        log = []
        if self._intervenes(step):
            rng = np.random.default_rng([config.train.seed, step])
            targets = random_active_channels(activity, suppressed, rng) if self._condition == "control" else suppressed
            log = nudge_scales(
                self._vae, targets, config.nudge, activity=activity, threshold=config.threshold, optimizer=optimizer
            )
        self.interventions += [{"step": step, **row} for row in _by_layer(log)]
        near_zero = channels.near_zero_weights(self._vae, config.near_zero_threshold)
        count = channels.count_suppressed(suppressed)
        self.rows.append({"step": step, "suppressed": count, "nudged": len(log), "near_zero": near_zero})

    def logs(self) -> dict[str, Rows]:
        """Return the two lists of rows, by the names ``tracked`` and ``interventions``."""
        return {"tracked": self.rows, "interventions": self.interventions}

    def _tracked(self, step: int) -> bool:
        return step % self._config.track_every == 0 or step == 1 or self._is_intervention_step(step)

    def _is_intervention_step(self, step: int) -> bool:
        # no intervention after the last step: the model would be evaluated before it could adapt to the change
        return step % self._config.nudge.interval == 0 and step < self._config.train.steps

    def _intervenes(self, step: int) -> bool:
        return self._condition != "baseline" and self._is_intervention_step(step)


class Validator(Watcher):
    """Measures reconstruction quality and suppressed channels on held-out pictures: one row at the start, one at the
    end, and one every ``evaluate_every`` steps."""

    def __init__(self, vae: nn.Module, images: Images, config: StudyConfig):
        self._vae, self._images, self._config = vae, images, config
        self.rows: list[dict[str, float]] = []

    def after(self, step: int, optimizer: torch.optim.Optimizer) -> None:
        """Validate after the last step, and every ``evaluate_every`` steps."""
        every = self._config.evaluate_every
        if step == self._config.train.steps or (every and step % every == 0):
            self.validate(step)

    def validate(self, step: int) -> None:
        """Validate now, and add one row for ``step``."""
        config = self._config
        tracker = channels.ActivityTracker(self._vae, config.layers)
        with tracker.track():
            result = evaluate_reconstruction(self._vae, self._images.batches(config.batch_size))
        suppressed = channels.classify(self._vae, tracker.read(), threshold=config.threshold, relative=config.relative)
        self.rows.append({"step": step, **result._asdict(), "suppressed": channels.count_suppressed(suppressed)})

    def logs(self) -> dict[str, Rows]:
        """Return the list of rows, by the name ``validation``."""
        return {"validation": self.rows}


class VAERun(NamedTuple):
    """One finished training run: its ``run.json``, and the rows of its ``log.jsonl``."""

    condition: str
    seed: int
    history: list[dict[str, float]]
    """Training losses, see :class:`vaelab.training.loop.Trained`."""
    tracked: list[dict[str, Any]]
    """One row per tracked step: ``step``, ``suppressed`` and ``nudged`` (numbers of channels), and ``near_zero``
    (the fraction of near-zero weights, by layer)."""
    interventions: list[dict[str, Any]]
    """One row per intervention and layer: ``step``, ``layer``, and three lists: the ``channels`` whose scale was
    changed, and their scales ``before`` and ``after``."""
    validation: list[dict[str, float]]
    """One row per validation, the first one before training: ``step``, the fields of
    :class:`vaelab.vae.objective.Reconstruction`, and ``suppressed`` (the number of suppressed channels)."""


def read_run(folder: str | Path, settings: dict[str, Any] | None = None) -> VAERun:
    """Read a finished training run from its folder.

    Args:
        folder: the folder that was given to :func:`train_vae`.
        settings: the settings that the run must have been made with; None accepts any settings.

    Raises:
        ValueError: a file is missing or damaged, or the run was made with other settings.
    """
    path = Path(folder, "run.json")
    try:
        stored = read_json(path)
        made_with, condition, seed, log = (stored[key] for key in ("settings", "condition", "seed", "log"))
    except FileNotFoundError as error:
        raise ValueError(f"{path} is missing: no finished training is in its folder") from error
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is damaged or of another version ({error!r})") from error
    if settings is not None:
        require_same_settings(path, made_with, settings)
    rows: dict[str, Rows] = {name: [] for name in LOGS}
    TrainingLog(Path(folder, LOG), rows).restore(log)
    return VAERun(condition, seed, *rows.values())


def train_vae(
    model: str,
    condition: str,
    config: StudyConfig,
    pictures: tuple[Images, Images],
    folder: str | Path,
    *,
    revision: str | None = None,
    variant: str | None = None,
    changes: dict[str, Any] | None = None,
    save_weights: bool = False,
) -> VAERun:
    """Train ``model`` under one condition, or resume an interrupted run; a finished run is only read.

    Args:
        model: the model's name, as in :func:`vaelab.models.loading.load_vae`.
        condition: ``baseline``, ``nudge`` or ``control``; see the module's docstring.
        config: the settings; its ``train.seed`` is the run's seed.
        pictures: the pictures to train on, and the held-out pictures to validate on.
        folder: the run's folder. It holds the checkpoint during training, and afterwards ``run.json``, ``log.jsonl``
            and, with ``save_weights``, the diffusers folder ``vae``.
        revision: a branch, tag or commit of a model on the hub.
        variant: the variant of the weight files, such as ``fp16``.
        changes: if a dict, train from random initialisation with these changes to the model's configuration (``{}``
            for no change); if None, fine-tune the pretrained weights.
        save_weights: whether to save the trained VAE as a diffusers folder.

    Raises:
        ValueError: the model cannot be loaded or has no GroupNorm; or the folder holds a run with other settings, or
            a damaged run.
        FloatingPointError: a loss or weight is not finite.
    """
    from accelerate import PartialState

    folder = Path(folder)
    finished, checkpoint = folder / "run.json", folder / CHECKPOINT
    settings = _settings(model, revision, variant, condition, config, pictures, changes)
    if finished.exists() and (not save_weights or (folder / "vae").exists()):
        return read_run(folder, settings)
    finished.unlink(missing_ok=True)
    models.validate_precision(model, config.train.precision, revision)
    vae = models.load_vae(
        model, device=config.train.device, revision=revision, variant=variant, groupnorm=True, changes=changes,
        seed=config.train.seed,
    )  # fmt: skip
    learning, held_out = pictures
    watcher, validator = ChannelWatcher(vae, condition, config), Validator(vae, held_out, config)
    if not checkpoint.exists():
        validator.validate(0)
    trained = train(
        VAEObjective(vae.requires_grad_(True), config.kl_weight),
        learning.shuffled(config.batch_size, config.train.seed),
        config.train,
        folder=folder,
        watchers=[watcher, validator],
        settings=settings,
        title=f"{condition}, seed {config.train.seed}",
    )
    result = VAERun(condition, config.train.seed, trained.history, watcher.rows, watcher.interventions, validator.rows)
    if PartialState().is_main_process:
        if save_weights:
            shutil.rmtree(folder / "vae", ignore_errors=True)  # an interrupted run may have left a part of it
            models.save_with_checksums(vae.eval(), folder / "vae")
        _, documents = read_tensors(checkpoint)
        named = {"condition": condition, "seed": config.train.seed, "log": documents["log"]}
        source = _trained_on(None if changes is not None else model, learning)
        write_json(finished, {"settings": settings, **named, "trained_on": source})
        checkpoint.unlink()
    return result


def train_conditions(
    model: str,
    conditions: list[str],
    seeds: list[int],
    config: StudyConfig,
    pictures: tuple[Images, Images],
    folder: str | Path,
    *,
    revision: str | None = None,
    variant: str | None = None,
) -> list[VAERun]:
    """Fine-tune under every condition with every seed; the weights of the first seed are saved.

    Runs with the same seed share their data, its order and the posterior's noise; they differ only in the condition.
    The arguments are those of :func:`train_vae`.

    Returns:
        The training runs, ordered by seed and then by condition.

    Raises:
        ValueError: ``baseline`` is not among the conditions, a condition or seed occurs twice, or there is no seed;
            also the errors of :func:`train_vae`.
    """
    validate_conditions(conditions, seeds)
    runs = []
    for seed in seeds:
        for condition in conditions:
            seeded = replace(config, train=replace(config.train, seed=seed))
            run_folder = _run_folder(folder, condition, seed)
            run = train_vae(
                model, condition, seeded, pictures, run_folder, revision=revision, variant=variant,
                save_weights=seed == seeds[0],
            )  # fmt: skip
            runs.append(run)
    return runs


def validate_conditions(conditions: list[str], seeds: list[int]) -> None:
    """Raise ValueError unless ``baseline`` and other known conditions are given, each once, and each seed once."""
    for condition in conditions:
        one_of("conditions", condition, CONDITIONS)
    if "baseline" not in conditions or len(set(conditions)) < len(conditions):
        raise ValueError(f"conditions: expected baseline and others to compare with it, each once, got {conditions}")
    if len(set(seeds)) < len(seeds) or not seeds:
        raise ValueError(f"seeds: expected one or more numbers, each once, got {seeds}")


def _run_folder(folder: str | Path, condition: str, seed: int) -> Path:
    return Path(folder, f"{condition}-seed{seed}")


def plan_conditions(
    model: str,
    conditions: list[str],
    seeds: list[int],
    config: StudyConfig,
    pictures: tuple[Images, Images],
    folder: str | Path,
    *,
    revision: str | None = None,
    variant: str | None = None,
) -> TrainingPlan:
    """Estimate what :func:`train_conditions` takes; the arguments and the errors are its own."""
    validate_conditions(conditions, seeds)
    runs = {(condition, seed): _run_folder(folder, condition, seed) for seed in seeds for condition in conditions}
    left = [seed for (_, seed), run in runs.items() if not (run / "run.json").exists()]
    return plan_vae(
        model, config, pictures, trainings=len(left), saved=left.count(seeds[0]), revision=revision, variant=variant
    )


def plan_vae(
    model: str,
    config: StudyConfig,
    pictures: tuple[Images, Images],
    *,
    trainings: int = 1,
    saved: int = 1,
    revision: str | None = None,
    variant: str | None = None,
    changes: dict[str, Any] | None = None,
) -> TrainingPlan:
    """Estimate what one or several trainings by :func:`train_vae` take: one training step and the validation of one
    batch are timed.

    Args:
        model: the model's name, as in :func:`vaelab.models.loading.load_vae`.
        config: the settings of each training.
        pictures: the pictures to train on, and the held-out pictures to validate on.
        trainings: the number of trainings.
        saved: the number of trainings whose weights are saved.
        revision: a branch, tag or commit of a model on the hub.
        variant: the variant of the weight files, such as ``fp16``.
        changes: as for :func:`train_vae`.

    Raises:
        ValueError: the model cannot be loaded or has no GroupNorm, or ``config`` does not fit it or this machine.
    """
    models.validate_precision(model, config.train.precision, revision)
    vae = models.load_vae(
        model, device=config.train.device, revision=revision, variant=variant, groupnorm=True, changes=changes,
        seed=config.train.seed,
    )  # fmt: skip
    (learning, held_out), validating = pictures, 0.0
    if trainings and config.train.steps >= MEASURED_FROM:
        batch = next(held_out.batches(config.batch_size))
        for _ in range(2):  # the second is timed
            began = time.perf_counter()
            evaluate_reconstruction(vae, [batch])
            validating = (time.perf_counter() - began) * len(held_out) / len(batch["pixels"])
    between = (config.train.steps - 1) // config.evaluate_every if config.evaluate_every else 0
    objective = VAEObjective(vae.requires_grad_(True), config.kl_weight)
    batches, title = (
        learning.shuffled(config.batch_size, config.train.seed),
        "VAE" if changes is None else "VAE, from scratch",
    )
    return plan_training(
        objective, batches, config.train, title, trainings=trainings, saved=saved,
        other_seconds=(2 + between) * validating,
    )  # fmt: skip


def training_source(model: str) -> Source | None:
    """Read which pictures a model was trained on.

    Args:
        model: the model's name, as in :func:`vaelab.models.loading.load_vae`.

    Returns:
        The recorded source of the training pictures, if :func:`train_vae` saved the model (``model`` is then its folder
        ``vae`` or the folder around it). None for any other model, whose training pictures are not known.

    Raises:
        ValueError: the record is damaged.
    """
    folder = local(model)
    if folder is None:
        return None
    path = next((place / "run.json" for place in (folder, folder.parent) if (place / "run.json").is_file()), None)
    if path is None or not (path.parent / "vae").is_dir():
        return None
    try:
        source = read_json(path).get("trained_on")
        if source is not None:
            shared_pictures(source, source)
    except (ValueError, AttributeError, TypeError) as error:
        raise ValueError(f"{path} is damaged or of another version ({error!r})") from error
    return source


def describe_overlap(model: str, images: Images) -> str:
    """Say in a sentence whether a model was trained on these pictures, for a notebook's output."""
    source, name = training_source(model), portable(model)  # a notebook's output names no folder of this machine
    if source is None:
        return f"it is not known which pictures {name!r} was trained on"
    if not (count := shared_pictures(source, images.source)):
        return f"{name!r} was not trained on {images.name}"
    return f"{name!r} was trained on pictures of {images.name}: the two splits share {count}"


def require_unseen(model: str, images: Images, parameter: str) -> str:
    """Raise an error if the model was trained on the evaluation pictures; otherwise return the sentence of
    :func:`describe_overlap`.

    Args:
        model: the model's name, as in :func:`vaelab.models.loading.load_vae`.
        images: the pictures to evaluate on.
        parameter: the notebook parameter that chose their split; error messages begin with it.

    Raises:
        ValueError: the model was trained on the split of the pictures, or on a part of it.
    """
    sentence = describe_overlap(model, images)
    if shared_pictures(training_source(model) or {}, images.source):
        raise ValueError(f"{parameter}: {sentence}; expected a split that the model was not trained on")
    return sentence


def scale_parameters(model: nn.Module) -> tuple[str, ...]:
    """Return the parameter names of all GroupNorm scales (gamma) and shifts (beta) of a VAE, as they are called in
    :class:`vaelab.vae.objective.VAEObjective`; for ``undecayed`` of :class:`vaelab.training.loop.TrainConfig`."""
    return tuple(f"vae.{layer}.{part}" for layer in channels.groupnorms(model) for part in ("weight", "bias"))


def _settings(
    model: str,
    revision: str | None,
    variant: str | None,
    condition: str,
    config: StudyConfig,
    pictures: tuple[Images, Images],
    changes: dict[str, Any] | None,
) -> dict[str, Any]:
    """Everything that determines the result, as it is after a round trip through JSON."""
    decides = asdict(config)
    decides |= decides.pop("train") | decides.pop("nudge")
    for name in EXECUTION_ONLY:
        decides.pop(name)
    data = [f"{images.name} x {len(images)} at {images.resolution}" for images in pictures]
    # weights by their content, since a folder may be replaced; from scratch only the configuration is used
    start = {"model": model, "revision": revision}
    if changes is None:
        start = {"model": models.identity(model, revision=revision, variant=variant, kind="vae")}
    named = {**start, "condition": condition, "data": data, "changes": changes}
    return json.loads(json.dumps({**decides, **named}))


def _trained_on(model: str | None, learning: Images) -> Source:
    """The source of these pictures and, if known, of the pictures that the model was trained on before."""
    source = dict(learning.source)
    earlier = (training_source(model) if model else None) or {}
    for identity, ranges in earlier.items():
        here = source.get(identity, [])
        source[identity] = [*here, *(part for part in ranges if part not in here)]
    return source


def _by_layer(interventions: list[Intervention]) -> list[dict[str, Any]]:
    rows: dict[str, dict[str, Any]] = {}
    for layer, channel, before, after in interventions:
        row = rows.setdefault(layer, {"layer": layer, "channels": [], "before": [], "after": []})
        row["channels"].append(channel)
        row["before"].append(before)
        row["after"].append(after)
    return list(rows.values())
