"""Training or fine-tuning of a VAE, with suppressed channels tracked and nudged.

From Shi, Wang and Roshka, sections 4 and 5. :func:`train_vae` trains under one condition with one seed;
:func:`train_conditions` pairs trainings that share everything but the condition. A training records
which pictures it used, so that a model is not evaluated on them (:func:`require_unseen`).
"""

import json
import shutil
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
from vaelab.training.checkpoint import CHECKPOINT, LOG, Rows, TrainingLog, read_tensors, require_same_settings
from vaelab.training.loop import EXECUTION_ONLY, TrainConfig, Watcher, train
from vaelab.vae import channels
from vaelab.vae.nudge import Intervention, NudgeConfig, nudge_scales, random_active_channels
from vaelab.vae.objective import VAEObjective, evaluate_reconstruction

CONDITIONS = ("baseline", "nudge", "control")
Source = dict[str, list[list[int]]]
"""Where pictures were drawn from, see :attr:`vaelab.data.images.Images.source`."""
LOGS = ("history", "ChannelWatcher 0: tracked", "ChannelWatcher 0: interventions", "Validator 1: validation")
"""The lists of rows in a training's log, in the order of the fields of :class:`VAERun`."""


@dataclass(frozen=True)
class StudyConfig:
    """The settings of one training of a VAE."""

    train: TrainConfig
    nudge: NudgeConfig = field(default_factory=NudgeConfig)
    batch_size: int = 16
    """Pictures per batch."""
    kl_weight: float = 1e-6
    """beta_KL, the weight of the KL term."""
    threshold: float = 1e-3
    """theta_act: a channel with m_c below it is suppressed."""
    relative: bool = False
    """Whether the threshold is in units of the layer's median m_c."""
    layers: str = "*"
    """GroupNorm layers to track, as a glob."""
    track_every: int = 20
    """Steps between tracked steps; the steps of interventions are tracked too."""
    near_zero_threshold: float = 1e-8
    """A convolution's weight below it is near zero."""
    evaluate_every: int = 0
    """Steps between validations; 0 validates at the start and the end only."""

    @classmethod
    def of(cls, params: dict[str, Any], **changes: Any) -> "StudyConfig":
        """The configuration that a notebook's parameters describe: each field takes the parameter
        of its name, ``changes`` override, and the other fields have their defaults."""
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

    ``rows`` gets a row per tracked step, ``interventions`` a row per intervention and layer; see
    :class:`VAERun`.
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
        """Read the tracked step, classify, and intervene if it is time."""
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
        """The rows ``tracked`` and ``interventions``."""
        return {"tracked": self.rows, "interventions": self.interventions}

    def _tracked(self, step: int) -> bool:
        return step % self._config.track_every == 0 or step == 1 or self._is_intervention_step(step)

    def _is_intervention_step(self, step: int) -> bool:
        # none after the last step, which would be measured before the model could adapt to it
        return step % self._config.nudge.interval == 0 and step < self._config.train.steps

    def _intervenes(self, step: int) -> bool:
        return self._condition != "baseline" and self._is_intervention_step(step)


class Validator(Watcher):
    """Reconstruction quality and suppressed channels on held-out pictures: a row at the start, at the
    end, and every ``evaluate_every`` steps."""

    def __init__(self, vae: nn.Module, images: Images, config: StudyConfig):
        self._vae, self._images, self._config = vae, images, config
        self.rows: list[dict[str, float]] = []

    def after(self, step: int, optimizer: torch.optim.Optimizer) -> None:
        """Validate if it is time."""
        every = self._config.evaluate_every
        if step == self._config.train.steps or (every and step % every == 0):
            self.validate(step)

    def validate(self, step: int) -> None:
        """Validate now, and add a row for ``step``."""
        config = self._config
        tracker = channels.ActivityTracker(self._vae, config.layers)
        with tracker.track():
            result = evaluate_reconstruction(self._vae, self._images.batches(config.batch_size))
        suppressed = channels.classify(self._vae, tracker.read(), threshold=config.threshold, relative=config.relative)
        self.rows.append({"step": step, **result._asdict(), "suppressed": channels.count_suppressed(suppressed)})

    def logs(self) -> dict[str, Rows]:
        """The rows ``validation``."""
        return {"validation": self.rows}


class VAERun(NamedTuple):
    """One training: its ``run.json``, and the rows of its ``log.jsonl``."""

    condition: str
    seed: int
    history: list[dict[str, float]]
    """Training losses, see :class:`vaelab.training.loop.Trained`."""
    tracked: list[dict[str, Any]]
    """A row per tracked step: ``step``, ``suppressed``, ``nudged`` (numbers of channels) and
    ``near_zero`` (a fraction per layer)."""
    interventions: list[dict[str, Any]]
    """A row per intervention and layer: ``step``, ``layer``, and lists of the ``channels`` whose scale
    was changed and of its values ``before`` and ``after``."""
    validation: list[dict[str, float]]
    """A row per validation, the first before training: ``step``, the fields of
    :class:`vaelab.vae.objective.Reconstruction`, ``suppressed``."""


def read_run(folder: str | Path, settings: dict[str, Any] | None = None) -> VAERun:
    """Read a finished training from its folder.

    Args:
        folder: the folder that :func:`train_vae` was given.
        settings: the settings it must have been made with; None accepts any.

    Raises:
        ValueError: a missing or damaged file, or other settings.
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
    """Train ``model`` under one condition, or resume an interrupted training; a finished one is read.

    Args:
        model: as in :func:`vaelab.models.loading.load_vae`.
        condition: ``baseline``; ``nudge``; or ``control``, the same nudge on active channels.
        config: the settings; its ``train.seed`` is the run's seed.
        pictures: pictures to train on, and held-out ones to validate on.
        folder: holds the checkpoint during training, then ``run.json``, ``log.jsonl`` and, with
            ``save_weights``, the diffusers folder ``vae``.
        revision: of a model on the hub.
        variant: of the weight files, such as ``fp16``.
        changes: train from scratch, from the seed, with these changes (none: ``{}``) to the
            model's configuration; None fine-tunes its weights.
        save_weights: save the trained VAE as a diffusers folder.

    Raises:
        ValueError: a model that cannot be loaded or has no GroupNorm; or a folder that holds a training with
            other settings, or a damaged one.
        FloatingPointError: a loss or weight that is not finite.
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
            shutil.rmtree(folder / "vae", ignore_errors=True)  # a kill may have left a part of it
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

    Trainings with the same seed share their data, its order and the posterior's noise. The arguments
    are those of :func:`train_vae`.

    Returns:
        The trainings, by seed and then by condition.

    Raises:
        ValueError: conditions without ``baseline``, or a condition or seed that occurs twice.
    """
    for condition in conditions:
        one_of("conditions", condition, CONDITIONS)
    if "baseline" not in conditions or len(set(conditions)) < len(conditions):
        raise ValueError(f"conditions: expected baseline and others to compare with it, each once, got {conditions}")
    if len(set(seeds)) < len(seeds) or not seeds:
        raise ValueError(f"seeds: expected one or more numbers, each once, got {seeds}")
    runs = []
    for seed in seeds:
        for condition in conditions:
            seeded = replace(config, train=replace(config.train, seed=seed))
            run_folder = Path(folder, f"{condition}-seed{seed}")
            run = train_vae(
                model, condition, seeded, pictures, run_folder, revision=revision, variant=variant,
                save_weights=seed == seeds[0],
            )  # fmt: skip
            runs.append(run)
    return runs


def training_source(model: str) -> Source | None:
    """Where the pictures were drawn from that a model was trained on.

    Args:
        model: as in :func:`vaelab.models.loading.load_vae`.

    Returns:
        The recorded source of a model that :func:`train_vae` saved (its folder ``vae`` or the folder around it);
        None for any other model, of which it is not known.

    Raises:
        ValueError: a damaged record.
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
    """A sentence on whether a model was trained on these pictures, for a notebook's output."""
    source = training_source(model)
    if source is None:
        return f"it is not known which pictures {model!r} was trained on"
    if not (count := shared_pictures(source, images.source)):
        return f"{model!r} was not trained on {images.name}"
    return f"{model!r} was trained on pictures of {images.name}: the two splits share {count}"


def require_unseen(model: str, images: Images, parameter: str) -> str:
    """Return :func:`describe_overlap` of a model that was not trained on pictures which it is evaluated on.

    Args:
        model: as in :func:`vaelab.models.loading.load_vae`.
        images: pictures to evaluate on.
        parameter: the notebook parameter that chose their split, which begins the error.

    Raises:
        ValueError: the model was trained on the split, or on a part of it.
    """
    sentence = describe_overlap(model, images)
    if shared_pictures(training_source(model) or {}, images.source):
        raise ValueError(f"{parameter}: {sentence}; expected a split that the model was not trained on")
    return sentence


def scale_parameters(model: nn.Module) -> tuple[str, ...]:
    """The names of GroupNorm's scales and shifts in :class:`vaelab.vae.objective.VAEObjective`, for
    ``undecayed`` of :class:`vaelab.training.loop.TrainConfig`."""
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
    """Everything that decides the result, as it is after a round trip through JSON."""
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
    """The source of these pictures, and of those that the model was trained on before, where that is known."""
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
