"""Training the embedded class-conditional model from scratch on the world: a diffusion transformer.

DiT (Peebles and Xie 2023) on the latents of the text-to-image model's autoencoder, with that model's
schedule and v-prediction, so that a U-Net and a transformer can be compared on one world. A class is what
a picture's only thing is, ``red circle``; its size and place and the ground are left to chance.
"""

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from vaelab.core import devices
from vaelab.core.validate import at_least
from vaelab.embedded.curriculum import exactly_placed, pixel_weights, scaled_latents, stream, weighted_error
from vaelab.embedded.train_unet import attention_written_out, new_scheduler
from vaelab.training.loop import TrainConfig, Trained, train
from vaelab.world.scenes import COLOURS, SHAPES, Scene, allowed, render

BATCH = 32
NO_CLASS = 1000
"""The class that stands for none: diffusers' ``DiTPipeline`` guides with this number, whatever the model."""
CLASS_DROPOUT = 0.1
"""Share of the pictures that are shown without their class, for classifier-free guidance."""
THING_WEIGHT = 5.0
"""How much a thing's pixels count beside the ground's, of which there are many more."""
EMBEDDING_STD = 0.02


@dataclass(frozen=True)
class DiTConfig:
    """The transformer's sizes."""

    layers: int = 6
    """Blocks."""
    heads: int = 3
    """Of each block's attention."""
    head_width: int = 64
    """Channels to a head."""
    patch: int = 2
    """Side of the square of latent pixels that is a token."""

    def __post_init__(self) -> None:
        for name in ("layers", "heads", "head_width", "patch"):
            at_least(name, getattr(self, name), 1)


class TrainedDiT(NamedTuple):
    """What :func:`train_dit` gives back."""

    pipeline: Any
    """A ``DiTPipeline``, in evaluation mode."""
    trained: Trained
    """How its training went."""

    @property
    def history(self) -> list[dict[str, Any]]:
        """The rows of its history, ``condition`` being ``DiT``."""
        return [{**row, "condition": "DiT"} for row in self.trained.history]


def classes() -> dict[int, str]:
    """The names of the classes: the pairs of colour and shape that training shows, 56 of 64."""
    shown = {(colour, shape) for shape, colour, _, _ in allowed("train")}
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
    """Train the transformer from scratch on the latents of a trained autoencoder, going on from what an
    interrupted call left.

    Args:
        folder: where the checkpoint goes.
        vae: the autoencoder, with its ``scaling_factor``; it stays as it is, on the device.
        steps: of 32 pictures each.
        device: where to train.
        seed: fixes the first weights and every step.
        model: the transformer's sizes.
    """
    model = model or DiTConfig()
    pipeline = new_dit(vae.requires_grad_(False).to(devices.pick(device)), model, seed)
    config = TrainConfig(
        steps=steps, learning_rate=1e-3, weight_decay=0.01, warmup=min(200, steps // 10), schedule="cosine",
        log_every=50, precision="bfloat16", device=device, seed=seed, checkpoint_every=100,
    )  # fmt: skip
    settings = {"model": asdict(model), "scaling_factor": round(vae.config.scaling_factor, 4), "batch_size": BATCH,
                "class_dropout": CLASS_DROPOUT, "thing_weight": THING_WEIGHT}  # fmt: skip
    with attention_written_out(pipeline.transformer):
        trained = train(ClassObjective(pipeline), classed(BATCH), config, folder=folder, settings=settings, title="DiT")
    pipeline.set_progress_bar_config(disable=True)
    return TrainedDiT(pipeline, trained)


def new_dit(vae: nn.Module, config: DiTConfig, seed: int = 0) -> Any:
    """A ``DiTPipeline`` of a trained autoencoder with an untrained transformer.

    Args:
        vae: the autoencoder.
        config: the transformer's sizes.
        seed: fixes its weights.
    """
    from diffusers import DiTPipeline, DiTTransformer2DModel

    names = classes()
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
            num_embeds_ada_norm=NO_CLASS,
        )
        _initialise(transformer, len(names))
    pipeline = DiTPipeline(transformer, vae, new_scheduler(), names)
    pipeline.register_to_config(id2label={str(number): name for number, name in names.items()})
    return pipeline


def _initialise(transformer: nn.Module, shown: int) -> None:
    """Every block begins as the identity (adaLN-Zero; Peebles and Xie, section 3.2), which diffusers leaves to
    whoever trains one; of classes that are never shown the embedding is zero."""
    for module in transformer.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            nn.init.zeros_(module.bias)
    for block in transformer.transformer_blocks:
        nn.init.zeros_(block.norm1.linear.weight)
        timestep, table = block.norm1.emb.timestep_embedder, block.norm1.emb.class_embedder.embedding_table.weight
        for weight in (timestep.linear_1.weight, timestep.linear_2.weight, table):
            nn.init.normal_(weight, std=EMBEDDING_STD)
        table.data[shown:NO_CLASS] = 0
    for last in (transformer.proj_out_1, transformer.proj_out_2):
        nn.init.zeros_(last.weight)


class ClassObjective(nn.Module):
    """L = E ||v - v_theta(z_t, t, class)||^2, the things' pixels counting more.

    A class is dropped here, for the whole transformer at once. In diffusers each block has an embedding of
    its own, which would drop it by itself: hardly a picture in a million would be without it everywhere,
    as a picture is where guidance asks what would be drawn without a class.
    """

    def __init__(self, pipeline: Any):
        super().__init__()
        self.transformer = pipeline.transformer
        self._vae, self._scheduler = [pipeline.vae], pipeline.scheduler  # a list: not trained
        for block in self.transformer.transformer_blocks:
            block.norm1.emb.class_embedder.dropout_prob = 0.0

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """The loss of ``pixels`` (B, 3, R, R) in [-1, 1], their ``classes`` (B,) and the ``weight``
        (B, 1, R, R) of each pixel."""
        device = batch["pixels"].device
        latents = scaled_latents(self._vae[0], batch["pixels"])
        noise = torch.randn_like(latents)
        timesteps = torch.randint(0, self._scheduler.config.num_train_timesteps, (len(latents),)).to(device)
        dropped = torch.rand(len(latents)).to(device) < CLASS_DROPOUT
        noisy = self._scheduler.add_noise(latents, noise, timesteps)
        target = self._scheduler.get_velocity(latents, noise, timesteps)
        told = batch["classes"].masked_fill(dropped, NO_CLASS)
        loss, error = weighted_error(self.transformer(noisy, timesteps, told).sample, target, batch["weight"])
        return {"loss": loss, "error": error}


def classed(batch_size: int) -> Callable[..., Iterator[dict[str, Tensor]]]:
    """Endless batches of training scenes, of each the first thing alone and exactly at its place, with its class."""
    numbers = {name: number for number, name in classes().items()}

    def batch(drawn: list[Scene], _: int) -> dict[str, Tensor]:
        alone = [exactly_placed(replace(scene, things=scene.things[:1])) for scene in drawn]
        names = [f"{scene.things[0].colour} {scene.things[0].shape}" for scene in alone]
        return {
            "pixels": render(alone),
            "classes": torch.tensor([numbers[name] for name in names]),
            "weight": pixel_weights(alone, THING_WEIGHT),
        }

    return stream(batch_size, batch)
