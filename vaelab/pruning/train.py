"""Train VAE, importance predictor and latent denoiser together, and evaluate the result.

From "PeLAP-A: Adaptive Latent Pruning for Lightweight Latent Diffusion Models". One call of :func:`train_pruned` trains
one setting with one seed. It measures what the paper reports (diffusion loss and reconstruction error), and measures
that do not improve when the latent is scaled to zero.
"""

import json
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from vaelab import models
from vaelab.core.config import configured
from vaelab.core.io import read_json, write_json
from vaelab.core.validate import at_least, one_of
from vaelab.data.images import Images
from vaelab.models.registry import access_model, locate_vae
from vaelab.pruning.fid import FIDReference
from vaelab.pruning.masks import LatentConfig, PruningObjective
from vaelab.pruning.metrics import EvaluationConfig, evaluate_pruning
from vaelab.training import evaluation_mode
from vaelab.training.checkpoint import CHECKPOINT, LOG, not_finite, read_tensors, require_same_settings, write_tensors
from vaelab.training.loop import EXECUTION_ONLY, TrainConfig, Watcher, train

AUTOENCODERS = ("scratch", "finetuned", "frozen")
TRACKED_PICTURES = 128
RESULTS, WEIGHTS = "run.json", "weights.safetensors"


@dataclass(frozen=True)
class PruningConfig:
    """What is trained, and how it is evaluated."""

    train: TrainConfig
    latent: LatentConfig = field(default_factory=LatentConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    batch_size: int = 16
    """Pictures per batch."""
    autoencoder: str = "scratch"
    """Whether the VAE is trained from ``scratch``, ``finetuned`` or ``frozen``."""
    vae_channels: tuple[int, ...] = ()
    """Numbers of channels of the blocks of a VAE from scratch; empty keeps the model's."""
    latent_channels: int = 0
    """Number of channels of the VAE's latent; 0 keeps the model's."""
    unet_channels: tuple[int, ...] = (32, 64)
    """Numbers of channels of the denoiser's stages."""
    unet_layers: int = 1
    """Residual blocks per stage."""
    timesteps: int = 1000
    """Number of timesteps of the linear DDPM schedule."""
    track_every: int = 50
    """Steps between measurements of the masks."""

    @classmethod
    def of(cls, params: dict[str, Any], **changes: Any) -> "PruningConfig":
        """Make the configuration from a notebook's parameters: each field takes the parameter of its name, ``changes``
        override the parameters, and fields without a parameter keep their defaults."""
        parts = {"train": TrainConfig, "latent": LatentConfig, "evaluation": EvaluationConfig}
        return configured(cls, {**params, **changes}, **parts)

    def __post_init__(self) -> None:
        one_of("autoencoder", self.autoencoder, AUTOENCODERS)
        for name in ("batch_size", "unet_layers", "timesteps", "track_every"):
            at_least(name, getattr(self, name), 1)
        at_least("latent_channels", self.latent_channels, 0)
        if self.evaluation.loss_timesteps > self.timesteps:
            raise ValueError(f"loss_timesteps: the schedule has {self.timesteps}, got {self.evaluation.loss_timesteps}")
        if self.latent.mask_from >= self.train.steps:
            raise ValueError(f"mask_from: must be below the {self.train.steps} steps, got {self.latent.mask_from}")
        if self.autoencoder != "scratch" and self.vae_channels:
            raise ValueError(f"vae_channels: a {self.autoencoder} autoencoder keeps its own, got {self.vae_channels}")

    def with_latent(self, **changes: Any) -> "PruningConfig":
        """Return a copy with other entries of ``latent``."""
        return replace(self, latent=replace(self.latent, **changes))

    def with_seed(self, seed: int) -> "PruningConfig":
        """Return a copy with another seed."""
        return replace(self, train=replace(self.train, seed=seed))


class PrunedRun(NamedTuple):
    """One training run, as stored in its ``run.json``; the weights are in a file beside it."""

    setting: str
    seed: int
    history: list[dict[str, float]]
    """Training losses, see :class:`vaelab.training.loop.Trained`."""
    masks: list[dict[str, Any]]
    """The mean mask of held-out pictures, one row per tracked step, class and channel: ``step``, ``class``,
    ``channel``, ``mask``; the class ``all`` stands for all pictures."""
    spectrum: list[dict[str, float]]
    """The loss by signal-to-noise ratio, one row per timestep and channel: ``timestep``, ``channel``, ``snr``,
    ``error``, ``closed_form``."""
    measures: dict[str, Any]
    """The fields of :class:`vaelab.pruning.metrics.PruningMetrics`."""


class SparsitySchedule(Watcher):
    """Sets lambda, and whether the mask is used, before every step."""

    def __init__(self, objective: PruningObjective):
        self._objective = objective

    def around(self, step: int) -> AbstractContextManager:
        """Set both before the step."""
        config = self._objective.config
        self._objective.sparsity = config.sparsity_at(step)
        self._objective.masks.enabled = step > config.mask_from
        return nullcontext()


class MaskWatcher(Watcher):
    """Measures the mean mask of held-out pictures for every channel and class, every ``every`` steps."""

    def __init__(self, objective: PruningObjective, images: Images, every: int):
        self._objective, self._every = objective, every
        self._images, self._classes = images, images.classes
        self.rows: list[dict[str, Any]] = []

    def after(self, step: int, optimizer: torch.optim.Optimizer) -> None:
        """Measure the masks if the step is a multiple of ``every``."""
        if step % self._every == 0:
            self.measure(step)

    @torch.no_grad()
    def measure(self, step: int) -> None:
        """Measure the masks now, and add a row for each class and channel."""
        objective = self._objective
        device = next(objective.parameters()).device
        batch = next(self._images.batches(min(TRACKED_PICTURES, len(self._images))))
        with evaluation_mode(objective):
            latents = models.encode_latents(objective.vae, batch["pixels"].to(device))
            mask = objective.denoiser_input(models.scale_latents(objective.vae, latents)).mask.float().cpu()
        groups = {"all": torch.ones(len(mask), dtype=torch.bool)}
        groups |= {name: batch["label"] == number for number, name in enumerate(self._classes)}
        self.rows += [
            {"step": step, "class": name, "channel": channel, "mask": value}
            for name, members in groups.items()
            if members.any()
            for channel, value in enumerate(mask[members].mean(0).tolist())
        ]

    def state(self) -> dict[str, Any]:
        """The rows so far, for a checkpoint."""
        return {"rows": self.rows}

    def restore(self, state: dict[str, Any]) -> None:
        """Take the rows of an interrupted run."""
        self.rows = state["rows"]


def build_objective(
    model: str, config: PruningConfig, resolution: int, revision: str | None = None
) -> PruningObjective:
    """Make VAE, importance predictor, denoiser and schedule. They are untrained, except that a VAE to be fine-tuned or
    frozen has its pretrained weights.

    Raises:
        ValueError: the VAE's configuration lacks ``latent_channels`` or has another number of them, or the VAE's latent
            does not fit the resolution and the denoiser.
    """
    from diffusers import DDPMScheduler, UNet2DModel

    changes, seed = None, config.train.seed
    if config.autoencoder == "scratch":
        changes = {**_unit_scale(model, revision), **_widths(config.vae_channels)}
        changes |= {"latent_channels": config.latent_channels} if config.latent_channels else {}
    vae = models.load_vae(model, device=config.train.device, revision=revision, changes=changes, seed=seed)
    if "latent_channels" not in vae.config:
        raise ValueError(
            f"model: {model!r} is a {type(vae).__name__} without latent_channels in its configuration; take an "
            "AutoencoderKL"
        )
    if config.latent_channels not in (0, vae.config.latent_channels):
        raise ValueError(
            f"latent_channels: {model!r} has {vae.config.latent_channels}, got {config.latent_channels}; only an "
            "autoencoder from scratch can have another number"
        )
    vae.requires_grad_(config.autoencoder != "frozen")
    side, stages = _latent_side(vae, resolution), len(config.unet_channels)
    if side % 2 ** (stages - 1):
        raise ValueError(
            f"resolution: the VAE's latent of {side} x {side} does not fit a denoiser of {stages} stages, which "
            f"halves it {stages - 1} times; take another resolution, or fewer unet_channels"
        )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        unet = UNet2DModel(
            sample_size=side,
            in_channels=vae.config.latent_channels,
            out_channels=vae.config.latent_channels,
            down_block_types=["DownBlock2D"] * stages,
            up_block_types=["UpBlock2D"] * stages,
            block_out_channels=config.unet_channels,
            layers_per_block=config.unet_layers,
            norm_num_groups=8,
        )
        scheduler = DDPMScheduler(num_train_timesteps=config.timesteps, clip_sample=False)
        return PruningObjective(vae, unet, scheduler, config.latent).to(vae.device)


def train_pruned(
    model: str,
    setting: str,
    config: PruningConfig,
    pictures: tuple[Images, Images],
    folder: str | Path,
    *,
    fid_reference: FIDReference | None = None,
    revision: str | None = None,
) -> PrunedRun:
    """Train and evaluate one setting; an interrupted run is resumed from its checkpoint.

    Args:
        model: the model's name, as in :func:`vaelab.models.loading.load_vae`.
        setting: the setting's name.
        config: the settings; its ``train.seed`` is the run's seed.
        pictures: the pictures to train on, and the pictures to evaluate on.
        folder: the run's folder, for its checkpoint, ``run.json`` and ``weights.safetensors``.
        fid_reference: the pictures with which samples are compared; needed only if ``config.evaluation.fid_images`` is
            not 0.
        revision: a branch, tag or commit of a model on the hub.
    """
    from accelerate import PartialState

    folder = Path(folder)
    finished, weights = folder / RESULTS, folder / WEIGHTS
    settings = _settings(model, revision, setting, config, pictures)
    if finished.exists() and weights.exists():
        stored = read_json(finished)
        require_same_settings(finished, stored.pop("settings"), settings)
        return PrunedRun(**stored)
    learning, held_out = pictures
    objective = build_objective(model, config, learning.resolution, revision)
    watcher = MaskWatcher(objective, held_out, config.track_every)
    if not (folder / CHECKPOINT).exists():
        watcher.measure(0)
    trained = train(
        objective,
        learning.shuffled(config.batch_size, config.train.seed),
        config.train,
        folder=folder,
        watchers=[SparsitySchedule(objective), watcher],
        settings=settings,
        title=f"{setting}, seed {config.train.seed}",
    )
    metrics, spectrum = evaluate_pruning(objective, held_out, config.evaluation, config.train.seed, fid_reference)
    run = PrunedRun(setting, config.train.seed, trained.history, watcher.rows, spectrum, metrics._asdict())
    if PartialState().is_main_process:
        write_tensors(weights, objective.state_dict(), {})
        write_json(finished, {"settings": settings, **run._asdict()})  # holds the rows of the log too
        for name in (CHECKPOINT, LOG):
            (folder / name).unlink()
    return run


def load_pruned(
    model: str, config: PruningConfig, resolution: int, folder: str | Path, revision: str | None = None
) -> PruningObjective:
    """Load the objective that :func:`train_pruned` trained, in evaluation mode.

    Raises:
        ValueError: the file of its weights is missing or damaged, belongs to another setting, or has values that are
            not finite; the error names the file.
    """
    objective, file = build_objective(model, config, resolution, revision), Path(folder, WEIGHTS)
    weights, _ = read_tensors(file)
    if name := not_finite(weights):
        raise ValueError(f"{file} is damaged: {name} has NaN or infinite values")
    try:
        objective.load_state_dict(weights)
    except RuntimeError as error:
        raise ValueError(f"{file} was trained in another setting: {error}") from error
    return objective.eval()


def _latent_side(vae: nn.Module, resolution: int) -> int:
    pixels = torch.zeros(1, 3, resolution, resolution, device=vae.device, dtype=vae.dtype)
    with torch.no_grad():
        latent = models.encode_latents(vae, pixels)
        models.decode_latents(vae, latent, pixels.shape)
    return latent.shape[-1]


def _unit_scale(model: str, revision: str | None) -> dict[str, Any]:
    """Make the changes to a VAE's configuration that leave its latents unscaled: the scale of trained weights has no
    meaning for untrained ones."""
    with access_model(model, revision):
        entries = locate_vae(model, revision).config
    return {"scaling_factor": 1.0} | {
        name: None for name in ("shift_factor", "latents_mean", "latents_std") if entries.get(name) is not None
    }


def _widths(channels: tuple[int, ...]) -> dict[str, Any]:
    depth = len(channels)
    return {
        "block_out_channels": list(channels), "down_block_types": ["DownEncoderBlock2D"] * depth,
        "up_block_types": ["UpDecoderBlock2D"] * depth,
    } if channels else {}  # fmt: skip


def _settings(
    model: str, revision: str | None, setting: str, config: PruningConfig, pictures: tuple[Images, Images]
) -> dict[str, Any]:
    """Everything that determines the result, as it is after a round trip through JSON."""
    decides = asdict(config)
    decides |= decides.pop("train") | decides.pop("latent") | decides.pop("evaluation")
    for name in EXECUTION_ONLY:
        decides.pop(name)
    data = [f"{images.name} x {len(images)} at {images.resolution}" for images in pictures]
    return json.loads(json.dumps({**decides, "model": model, "revision": revision, "setting": setting, "data": data}))
