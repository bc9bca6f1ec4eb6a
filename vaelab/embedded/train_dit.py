"""Training of the small class-conditional diffusion transformer shipped with the package, from scratch on pictures of
the synthetic scene world (:mod:`vaelab.world`).

A DiT (Peebles and Xie 2023) on the latents of the text-to-image model's autoencoder, with that model's noise schedule
and v-prediction, so that a U-Net and a transformer can be compared on the same data. Every picture shows a single
object ("thing" in the code). Its colour and shape, such as ``red circle``, are its class; size, position and ground
vary.
"""

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from vaelab.core import devices
from vaelab.core.validate import at_least
from vaelab.embedded.curriculum import pixel_weights, scaled_latents, scene_batches, weighted_mse, without_offsets
from vaelab.embedded.train_unet import (
    ModelConfig,
    new_scheduler,
    new_vae,
    training_precision,
    unfused_attention_on_cpu,
)
from vaelab.training.batches import Batches
from vaelab.training.loop import TrainConfig, Trained, train
from vaelab.training.planning import TrainingPlan, plan_training
from vaelab.world.scenes import COLOURS, SHAPES, Scene, allowed_combinations, render

BATCH_SIZE = 32
NULL_CLASS = 1000
"""The class index that means no class; diffusers' ``DiTPipeline`` uses it for guidance with every model."""
CLASS_DROPOUT = 0.1
"""Fraction of the training pictures whose class is dropped, for classifier-free guidance."""
THING_PIXEL_WEIGHT = 5.0
"""Weight in the loss of a pixel that shows the object; a pixel of the ground has weight 1."""
EMBEDDING_STD = 0.02
"""Standard deviation of the initial timestep and class embeddings."""


@dataclass(frozen=True)
class DiTConfig:
    """Sizes of the transformer."""

    layers: int = 6
    """Number of transformer blocks."""
    heads: int = 3
    """Number of attention heads per block."""
    head_width: int = 64
    """Number of channels per attention head."""
    patch: int = 2
    """Side of the square of latent pixels that makes up one token."""

    def __post_init__(self) -> None:
        for name in ("layers", "heads", "head_width", "patch"):
            at_least(name, getattr(self, name), 1)


class TrainedDiT(NamedTuple):
    """Result of :func:`train_dit`."""

    pipeline: Any
    """A ``DiTPipeline``, in evaluation mode."""
    trained: Trained
    """The result of its training run."""

    @property
    def history(self) -> list[dict[str, Any]]:
        """The rows of the training history, with ``condition`` ``DiT``."""
        return [{**row, "condition": "DiT"} for row in self.trained.history]


def class_names() -> dict[int, str]:
    """List the names of the classes by index: those 56 of the 64 pairs of colour and shape that the training split
    has."""
    shown = {(colour, shape) for shape, colour, _, _ in allowed_combinations("train")}
    pairs = [(colour, shape) for colour in COLOURS for shape in SHAPES if (colour, shape) in shown]
    return {number: f"{colour} {shape}" for number, (colour, shape) in enumerate(pairs)}


def train_dit(
    folder: str | Path,
    vae: nn.Module,
    *,
    steps: int = 3000,
    device: str = "auto",
    seed: int = 0,
    model: DiTConfig | None = None,
) -> TrainedDiT:
    """Train the transformer from scratch on the latents of a trained autoencoder.

    An interrupted training run is resumed from the folder's checkpoint.

    Args:
        folder: the folder for the checkpoint.
        vae: the autoencoder, with its ``scaling_factor``; it is frozen and moved to the device.
        steps: the number of optimizer steps, with 32 pictures each.
        device: the device to train on.
        seed: determines the initial weights and all random choices of the training.
        model: the transformer's sizes; None means the defaults.
    """
    model = model or DiTConfig()
    pipeline = new_dit(vae.requires_grad_(False).to(devices.pick(device)), model, seed)
    config = _training(steps, device, seed)
    settings = {"model": asdict(model), "scaling_factor": round(vae.config.scaling_factor, 4), "batch_size": BATCH_SIZE,
                "class_dropout": CLASS_DROPOUT, "thing_pixel_weight": THING_PIXEL_WEIGHT}  # fmt: skip
    with unfused_attention_on_cpu(pipeline.transformer, device):
        trained = train(
            ClassObjective(pipeline), class_batches(BATCH_SIZE), config, folder=folder, settings=settings, title="DiT"
        )
    pipeline.set_progress_bar_config(disable=True)
    return TrainedDiT(pipeline, trained)


def plan_dit(*, steps: int = 3000, device: str = "auto", seed: int = 0) -> TrainingPlan:
    """Estimate what :func:`train_dit` takes, with its arguments and the sizes of the shipped models."""
    vae = new_vae(ModelConfig(), seed).requires_grad_(False).to(devices.pick(device))
    pipeline = new_dit(vae, DiTConfig(), seed)
    with unfused_attention_on_cpu(pipeline.transformer, device):
        return plan_training(
            ClassObjective(pipeline), class_batches(BATCH_SIZE), _training(steps, device, seed), "transformer (DiT)"
        )


def _training(steps: int, device: str, seed: int) -> TrainConfig:
    return TrainConfig(
        steps=steps, learning_rate=1e-3, weight_decay=0.01, warmup=min(200, steps // 10), schedule="cosine",
        log_every=50, precision=training_precision(device), device=device, seed=seed, checkpoint_every=100,
    )  # fmt: skip


def new_dit(vae: nn.Module, config: DiTConfig, seed: int = 0) -> Any:
    """Make a ``DiTPipeline`` of a trained autoencoder and an untrained transformer.

    Args:
        vae: the autoencoder.
        config: the transformer's sizes.
        seed: the seed of the initial weights.
    """
    from diffusers import DiTPipeline, DiTTransformer2DModel

    names = class_names()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        transformer = DiTTransformer2DModel(
            num_attention_heads=config.heads,
            attention_head_dim=config.head_width,
            in_channels=vae.config.latent_channels,
            out_channels=vae.config.latent_channels,
            num_layers=config.layers,
            sample_size=vae.config.sample_size // 2 ** (len(vae.config.block_out_channels) - 1),
            patch_size=config.patch,
            num_embeds_ada_norm=NULL_CLASS,
        )
        _initialise(transformer, len(names))
    pipeline = DiTPipeline(transformer, vae, new_scheduler(), names)
    pipeline.register_to_config(id2label={str(number): name for number, name in names.items()})
    return pipeline


def _initialise(transformer: nn.Module, shown: int) -> None:
    """Initialise every block as the identity (adaLN-Zero; Peebles and Xie, section 3.2), which diffusers does not do.

    The embeddings of classes that never occur are zero.
    """
    for module in transformer.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            nn.init.zeros_(module.bias)
    for block in transformer.transformer_blocks:
        nn.init.zeros_(block.norm1.linear.weight)
        timestep, table = block.norm1.emb.timestep_embedder, block.norm1.emb.class_embedder.embedding_table.weight
        for weight in (timestep.linear_1.weight, timestep.linear_2.weight, table):
            nn.init.normal_(weight, std=EMBEDDING_STD)
        table.data[shown:NULL_CLASS] = 0
    for last in (transformer.proj_out_1, transformer.proj_out_2):
        nn.init.zeros_(last.weight)


class ClassObjective(nn.Module):
    """The loss L = E ||v - v_theta(z_t, t, class)||^2 of v-prediction, with a higher weight on the objects' pixels.

    A class is dropped here for the whole transformer at once. In diffusers each block embeds the class by itself and
    would drop it independently of the others. Guidance needs pictures without a class in any block; with independent
    dropout hardly one picture in a million would be one.

    Args:
        pipeline: a ``DiTPipeline``; its transformer is trained.
    """

    def __init__(self, pipeline: Any):
        super().__init__()
        self.transformer = pipeline.transformer
        self._vae, self._scheduler = [pipeline.vae], pipeline.scheduler  # in a list it is no submodule: not trained
        for block in self.transformer.transformer_blocks:
            block.norm1.emb.class_embedder.dropout_prob = 0.0

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Compute the losses of a batch.

        Args:
            batch: ``pixels`` (B, 3, R, R) in [-1, 1]; ``classes`` (B,), the pictures' class indices; and ``weight``
                (B, 1, R, R), the weight of each pixel.

        Returns:
            Scalars: the ``loss`` and the unweighted ``velocity_mse``.
        """
        device = batch["pixels"].device
        latents = scaled_latents(self._vae[0], batch["pixels"])
        noise = torch.randn_like(latents)
        timesteps = torch.randint(0, self._scheduler.config.num_train_timesteps, (len(latents),)).to(device)
        dropped = torch.rand(len(latents)).to(device) < CLASS_DROPOUT
        noisy = self._scheduler.add_noise(latents, noise, timesteps)
        target = self._scheduler.get_velocity(latents, noise, timesteps)
        classes = batch["classes"].masked_fill(dropped, NULL_CLASS)
        predicted = self.transformer(noisy, timesteps, classes).sample
        loss, velocity_mse = weighted_mse(predicted, target, batch["weight"])
        return {"loss": loss, "velocity_mse": velocity_mse}


def class_batches(batch_size: int) -> Batches:
    """Make endless batches of training scenes with their class; only the first object of a scene is kept, and it is
    moved to the centre of its position."""
    numbers = {name: number for number, name in class_names().items()}

    def make(scenes: list[Scene], _: int) -> dict[str, Tensor]:
        alone = [without_offsets(replace(scene, things=scene.things[:1])) for scene in scenes]
        names = [f"{scene.things[0].colour} {scene.things[0].shape}" for scene in alone]
        return {
            "pixels": render(alone),
            "classes": torch.tensor([numbers[name] for name in names]),
            "weight": pixel_weights(alone, THING_PIXEL_WEIGHT),
        }

    return scene_batches(batch_size, make)
