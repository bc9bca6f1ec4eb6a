"""Training or fine-tuning a VAE with its channels tracked and nudged.

From Shi, Wang and Roshka, sections 4 and 5. One call of :func:`train_vae` is one condition and one
seed; the notebooks pair runs that share everything but the condition.
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
from vaelab.core.validate import at_least, one_of
from vaelab.data.images import Images
from vaelab.training.checkpoint import Rows, require_same_settings
from vaelab.training.loop import EXECUTION_ONLY, TrainConfig, Watcher, train
from vaelab.vae import channels
from vaelab.vae.nudge import NudgeConfig, nudge, random_active
from vaelab.vae.objective import VAEObjective, evaluate

CONDITIONS = ("baseline", "nudge", "control")


@dataclass(frozen=True)
class StudyConfig:
    """What is trained, watched and done in one training."""

    train: TrainConfig
    nudge: NudgeConfig = field(default_factory=NudgeConfig)
    batch_size: int = 16
    """Pictures to a batch."""
    kl_weight: float = 1e-6
    """beta_KL, the weight of the KL term."""
    threshold: float = 1e-3
    """theta_act: a channel with m_c below it is suppressed."""
    relative: bool = False
    """Whether the threshold is in units of the layer's median m_c."""
    layers: str = "*"
    """GroupNorm layers to watch, as a glob."""
    track_every: int = 20
    """Steps between tracked ones; the steps of an intervention are tracked too."""
    near_zero_threshold: float = 1e-8
    """A convolution's weight below it is near zero."""
    evaluate_every: int = 0
    """Steps between validations; 0 validates at the start and the end only."""

    @classmethod
    def of(cls, params: dict[str, Any], **changes: Any) -> "StudyConfig":
        """The configuration that a notebook's parameters describe: each field takes the parameter
        of its name, ``changes`` override, and what is in neither keeps its default."""
        return configured(cls, {**params, **changes}, train=TrainConfig, nudge=NudgeConfig)

    def __post_init__(self) -> None:
        if self.relative and self.nudge.strategy == "adaptive":
            raise ValueError("strategy: adaptive raises m_c to an absolute threshold; it cannot go with relative")
        at_least("batch_size", self.batch_size, 1)
        at_least("track_every", self.track_every, 1)
        at_least("threshold", self.threshold, 0)
        at_least("kl_weight", self.kl_weight, 0)
        at_least("evaluate_every", self.evaluate_every, 0)
        at_least("near_zero_threshold", self.near_zero_threshold, 0)


class ChannelWatcher(Watcher):
    """Tracks the channels of a VAE in training and nudges them where the condition says so.

    ``rows`` gets, for every tracked step, the number of suppressed channels and the near-zero
    fractions; ``interventions`` a row a touched channel.
    """

    def __init__(self, vae: nn.Module, condition: str, config: StudyConfig):
        one_of("conditions", condition, CONDITIONS)
        self._vae, self._condition, self._config = vae, condition, config
        self._tracker = channels.ActivityTracker(vae, config.layers)
        self.rows: list[dict[str, Any]] = []
        self.interventions: list[dict[str, Any]] = []

    def around(self, step: int) -> AbstractContextManager:
        """Hooks exist during tracked steps only."""
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
            targets = random_active(activity, suppressed, rng) if self._condition == "control" else suppressed
            log = nudge(
                self._vae, targets, config.nudge, activity=activity, threshold=config.threshold, optimizer=optimizer
            )
        self.interventions += [{"step": step, **one._asdict()} for one in log]
        near_zero = channels.near_zero_weights(self._vae, config.near_zero_threshold)
        row = {"step": step, "suppressed": channels.count(suppressed), "nudged": len(log), "near_zero": near_zero}
        self.rows.append(row)

    def logs(self) -> dict[str, Rows]:
        """Both lists."""
        return {"tracked": self.rows, "interventions": self.interventions}

    def _tracked(self, step: int) -> bool:
        return step % self._config.track_every == 0 or step == 1 or self._is_intervention_step(step)

    def _is_intervention_step(self, step: int) -> bool:
        # none after the last step, which would be measured before the model could adapt to it
        return step % self._config.nudge.interval == 0 and step < self._config.train.steps

    def _intervenes(self, step: int) -> bool:
        return self._condition != "baseline" and self._is_intervention_step(step)


class Validator(Watcher):
    """Reconstructions and suppressed channels of held-out pictures, at the start, at the end, and
    every so many steps; a row each."""

    def __init__(self, vae: nn.Module, images: Images, config: StudyConfig):
        self._vae, self._images, self._config = vae, images, config
        self.rows: list[dict[str, float]] = []

    def after(self, step: int, optimizer: torch.optim.Optimizer) -> None:
        """Measure if it is time."""
        every = self._config.evaluate_every
        if step == self._config.train.steps or (every and step % every == 0):
            self.measure(step)

    def measure(self, step: int) -> None:
        """Measure now."""
        config = self._config
        tracker = channels.ActivityTracker(self._vae, config.layers)
        with tracker.track():
            result = evaluate(self._vae, self._images.batches(config.batch_size))
        suppressed = channels.classify(self._vae, tracker.read(), threshold=config.threshold, relative=config.relative)
        self.rows.append({"step": step, **result._asdict(), "suppressed": channels.count(suppressed)})

    def logs(self) -> dict[str, Rows]:
        """The rows."""
        return {"validation": self.rows}


class VAERun(NamedTuple):
    """One training, as its ``run.json`` has it."""

    condition: str
    seed: int
    history: list[dict[str, float]]
    """Training losses, see :class:`vaelab.training.loop.Trained`."""
    tracked: list[dict[str, Any]]
    """A row for every tracked step: ``step``, ``suppressed``, ``nudged``, ``near_zero``."""
    interventions: list[dict[str, Any]]
    """A row for every touched channel: ``step``, ``layer``, ``channel``, ``before``, ``after``."""
    validation: list[dict[str, float]]
    """A row for every validation, the first before training: ``step``, the fields of
    :class:`vaelab.vae.objective.Reconstruction`, ``suppressed``."""


def train_vae(
    model: str,
    condition: str,
    config: StudyConfig,
    pictures: tuple[Images, Images],
    folder: str | Path,
    *,
    revision: str | None = None,
    changes: dict[str, Any] | None = None,
    keep_weights: bool = False,
) -> VAERun:
    """Train ``model`` under one condition, going on from what an interrupted call left.

    Args:
        model: as in :func:`vaelab.models.loading.load_vae`.
        condition: ``baseline``; ``nudge``; ``control``, the same nudge on active channels.
        config: what is trained, watched and done; its ``train.seed`` is the run's seed.
        pictures: to train on, and to measure on.
        folder: where its checkpoint, ``run.json`` and, if kept, ``vae`` go.
        revision: of a model on the hub.
        changes: train from scratch, from the seed, with these changes (none: ``{}``) to the
            model's configuration; None fine-tunes its weights.
        keep_weights: save the trained VAE as a diffusers folder.
    """
    from accelerate import PartialState

    folder = Path(folder)
    finished, checkpoint = folder / "run.json", folder / "checkpoint.safetensors"
    settings = _settings(model, revision, condition, config, pictures, changes)
    if finished.exists() and (not keep_weights or (folder / "vae").exists()):
        return _reload(finished, settings)
    finished.unlink(missing_ok=True)
    models.check_precision(model, config.train.precision, revision)
    vae = models.load_vae(
        model, device=config.train.device, revision=revision, groupnorm=True, changes=changes, seed=config.train.seed
    )
    learning, held_out = pictures
    watcher, validator = ChannelWatcher(vae, condition, config), Validator(vae, held_out, config)
    if not checkpoint.exists():
        validator.measure(0)
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
        if keep_weights:
            shutil.rmtree(folder / "vae", ignore_errors=True)  # what a kill left half written
            vae.eval().save_pretrained(folder / "vae")
        write_json(finished, {"settings": settings, **result._asdict()})
        checkpoint.unlink()
    return result


def compare(
    model: str,
    conditions: list[str],
    seeds: list[int],
    config: StudyConfig,
    pictures: tuple[Images, Images],
    folder: str | Path,
    *,
    revision: str | None = None,
) -> list[VAERun]:
    """Fine-tune under every condition with every seed; of the first seed the weights are kept.

    A pair of runs with one seed shares its data, their order and the posterior's noise.
    """
    for condition in conditions:
        one_of("conditions", condition, CONDITIONS)
    if "baseline" not in conditions or len(set(conditions)) < len(conditions):
        raise ValueError(f"conditions: expected baseline and what is compared with it, each once, got {conditions}")
    if len(set(seeds)) < len(seeds) or not seeds:
        raise ValueError(f"seeds: expected one or more different numbers, got {seeds}")
    runs = []
    for seed in seeds:
        for condition in conditions:
            one = replace(config, train=replace(config.train, seed=seed))
            place = Path(folder, f"{condition}-seed{seed}")
            keep = seed == seeds[0]
            runs.append(train_vae(model, condition, one, pictures, place, revision=revision, keep_weights=keep))
    return runs


def decayless_scales(model: nn.Module) -> tuple[str, ...]:
    """The names that :class:`vaelab.training.loop.TrainConfig` must leave undecayed for weight decay to
    spare GroupNorm's scales and shifts."""
    return tuple(f"vae.{layer}.{part}" for layer in channels.groupnorms(model) for part in ("weight", "bias"))


def _settings(
    model: str,
    revision: str | None,
    condition: str,
    config: StudyConfig,
    pictures: tuple[Images, Images],
    changes: dict[str, Any] | None,
) -> dict[str, Any]:
    """All that decides the outcome, as it comes back from JSON."""
    decides = asdict(config)
    decides |= decides.pop("train") | decides.pop("nudge")
    for name in EXECUTION_ONLY:
        decides.pop(name)
    data = [f"{images.name} x {len(images)} at {images.resolution}" for images in pictures]
    named = {"model": model, "revision": revision, "condition": condition, "data": data, "changes": changes}
    return json.loads(json.dumps({**decides, **named}))


def _reload(path: Path, settings: dict[str, Any]) -> VAERun:
    stored = read_json(path)
    require_same_settings(path, stored.pop("settings"), settings)
    return VAERun(**stored)
