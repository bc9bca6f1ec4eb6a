"""Training data and objective of the embedded model, the small text-to-image model shipped with the package.

The data are scenes of the synthetic scene world (:mod:`vaelab.world`) with their prompts. A scene shows one to three
objects ("things" in the code) on a ground; its factors are attributes such as an object's colour. Training follows a
curriculum of several stages (``LESSONS``). Early in a stage most examples are easy: the prompt names every factor, and
in some stages the scene shows a single object. The U-Net and the text encoder are trained together on the loss of the
velocity (v-prediction).
"""

import itertools
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from vaelab import hooks, models
from vaelab.core.validate import at_least
from vaelab.embedded.text_encoder import tokenize
from vaelab.training.batches import Batches, NumberedBatches
from vaelab.world.scenes import CENTRES, POSITIONS, SIDE, Scene, render, sample

if TYPE_CHECKING:
    from transformers import CLIPTokenizer


@dataclass(frozen=True)
class CurriculumConfig:
    """The examples, timesteps and loss weights of one stage of the curriculum."""

    prompt_dropout: float = 0.1
    """Fraction of the prompts that are replaced by the empty prompt, for classifier-free guidance."""
    sampler_steps: int = 4
    """Number of steps of a sampler whose timesteps are trained more often than others."""
    sampler_timestep_share: float = 0.7
    """Fraction of the examples whose timestep is one of that sampler's. Among these, noisier timesteps are more likely,
    because the prompt matters more the less is visible of the picture. The other timesteps are uniform."""
    easy_steps: int = 1000
    """Number of steps over which the share of easy examples falls from 1 to 0. An easy example's prompt names every
    factor."""
    single_thing: bool = True
    """Whether an easy example shows a single object."""
    pure_noise: bool = True
    """Whether easy examples are always predicted from pure noise, in which only the prompt tells what to draw."""
    exact_positions: bool = False
    """Whether every object stands exactly at the centre of its position (offset 0). A prompt does not name the offset,
    so a model that is trained with random offsets learns outlines averaged over them."""
    coupled_noise: bool = False
    """Whether the noise determines the positions that a prompt does not name, see :func:`couple_noise_to_positions`."""
    position_loss_weight: float = 0.1
    """Weight of the auxiliary loss that makes blocks encode the row and column of each position of their maps."""
    thing_pixel_weight: tuple[float, float] = (10.0, 3.0)
    """Weight in the loss of a pixel that shows an object, first while all examples are easy, then when none is. Pixels
    that show the ground have weight 1."""

    def __post_init__(self) -> None:
        at_least("sampler_steps", self.sampler_steps, 1)
        at_least("easy_steps", self.easy_steps, 0)
        at_least("position_loss_weight", self.position_loss_weight, 0)
        at_least("thing_pixel_weight", min(self.thing_pixel_weight), 1)
        for name in ("prompt_dropout", "sampler_timestep_share"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name}: must be between 0 and 1, got {getattr(self, name)!r}")


LESSONS = {
    "placing": CurriculumConfig(easy_steps=800, exact_positions=True, thing_pixel_weight=(10.0, 10.0)),
    "outlines": CurriculumConfig(
        sampler_timestep_share=0.5,
        easy_steps=1500,
        single_thing=False,
        pure_noise=False,
        exact_positions=True,
        thing_pixel_weight=(10.0, 10.0),
    ),
    "practice": CurriculumConfig(easy_steps=0, exact_positions=True, coupled_noise=True, thing_pixel_weight=(5.0, 5.0)),
}
"""The three stages of the curriculum, in order: positions first, then outlines, then ordinary prompts, which leave
factors out."""


class DenoisingObjective(nn.Module):
    """The loss L = E ||v - v_theta(z_t, t, prompt)||^2 of the U-Net and the text encoder together, where v is the
    velocity of v-prediction.

    In an auxiliary task, linear maps (one per block) predict the row and column of each position from the input of the
    cross-attention blocks; the first down stage has no such task. A convolution knows positions only from the padding
    at the picture's edge (Islam et al. 2020). Pure noise contains no other cue, and the positions that a prompt names
    cannot be used before some layer knows which part of the picture it processes.

    Args:
        pipeline: a ``StableDiffusionPipeline``; its U-Net and text encoder are trained.
        config: the stage of the curriculum.
    """

    def __init__(self, pipeline: Any, config: CurriculumConfig):
        super().__init__()
        self.unet, self.text_encoder = pipeline.unet, pipeline.text_encoder
        # in a list the autoencoder is no submodule, so it is not trained
        self._config, self._vae, self._scheduler = config, [pipeline.vae], pipeline.scheduler
        self._empty = tokenize(pipeline.tokenizer, [""])[0]
        pipeline.scheduler.set_timesteps(config.sampler_steps)
        self._sampler_timesteps = pipeline.scheduler.timesteps.clone()
        # the first down stage is left out: after so few convolutions the padding does not reach the middle
        self._positioned = {
            block.path: block.shape
            for name, block in models.blocks(pipeline).items()
            if re.fullmatch(r"(down\.[1-9]|mid|up)[.\d]+", name)
        }
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            heads = [nn.Linear(channels, height + width) for height, width, channels in self._positioned.values()]
        self.position_heads = nn.ModuleList(heads)

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Compute the losses of a batch.

        Args:
            batch: ``pixels`` (B, 3, R, R) in [-1, 1]; ``tokens`` (B, L), the tokens of the prompts; ``weight``
                (B, 1, R, R), the weight of each pixel; ``pure_noise`` (B,) bool, whether an example is predicted from
                pure noise; and ``unnamed`` (B, 9), see :func:`unnamed_positions`.

        Returns:
            Scalars: the ``loss``, the unweighted ``velocity_mse`` and the ``position_loss``.
        """
        pixels, tokens, device = batch["pixels"], batch["tokens"], batch["pixels"].device
        latents = scaled_latents(self._vae[0], pixels)
        noise = torch.randn_like(latents)
        first = self._sampler_timesteps[0]
        timesteps = torch.where(batch["pure_noise"], first, self._timesteps(len(latents)).to(device))
        dropped = torch.rand(len(tokens), 1, device=device) < self._config.prompt_dropout
        if self._config.coupled_noise:
            coupled = couple_noise_to_positions(noise, batch["unnamed"])
            noise = torch.where(dropped[..., None, None], noise, coupled)
        states = self.text_encoder(torch.where(dropped, self._empty.to(device), tokens))[0]
        noisy = self._scheduler.add_noise(latents, noise, timesteps)
        target = self._scheduler.get_velocity(latents, noise, timesteps)
        with hooks.capture(self.unet, self._positioned, side="input", grad=True) as captured:
            predicted = self.unet(noisy, timesteps, states).sample
        position_loss = self._position_loss([captured[path][0] for path in self._positioned])
        loss, velocity_mse = weighted_mse(predicted, target, batch["weight"])
        return {
            "loss": loss + self._config.position_loss_weight * position_loss,
            "velocity_mse": velocity_mse,
            "position_loss": position_loss,
        }

    def _position_loss(self, maps: list[Tensor]) -> Tensor:
        """Compute the cross-entropy of the row and column of every position, averaged over blocks; ``maps`` are
        (B, C, H, W)."""
        losses = []
        for head, features in zip(self.position_heads, maps, strict=True):
            height, width = features.shape[-2:]
            rows, columns = head(features.movedim(1, -1)).float().split((height, width), -1)
            row = torch.arange(height, device=features.device)[:, None].expand(rows.shape[:-1])
            column = torch.arange(width, device=features.device).expand(columns.shape[:-1])
            for logits, truth in ((rows, row), (columns, column)):
                losses.append(nn.functional.cross_entropy(logits.flatten(0, -2), truth.flatten()))
        return torch.stack(losses).mean()

    def _timesteps(self, count: int) -> Tensor:
        uniform = torch.randint(0, self._scheduler.config.num_train_timesteps, (count,))
        weights = torch.arange(len(self._sampler_timesteps), 0, -1.0)
        from_sampler = self._sampler_timesteps[torch.multinomial(weights, count, replacement=True)]
        return torch.where(torch.rand(count) < self._config.sampler_timestep_share, from_sampler, uniform)


@torch.no_grad()
def scaled_latents(vae: nn.Module, pixels: Tensor) -> Tensor:
    """Compute the latents (B, c, h, w) that a denoiser learns to generate: posterior means, scaled to about unit
    variance.

    Args:
        vae: the autoencoder; its configuration says how latents are scaled.
        pixels: the pictures, (B, 3, R, R) in [-1, 1].
    """
    return models.scale_latents(vae, models.posterior(vae, pixels).mode())


def weighted_mse(predicted: Tensor, target: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Compute the weighted mean and the plain mean of the squared error.

    Args:
        predicted: (B, c, h, w), in the latent space.
        target: (B, c, h, w), in the latent space.
        weight: (B, 1, R, R), the weight of each pixel of the picture. The weights are averaged over the patch of pixels
            that each latent position stands for, to (B, 1, h, w).
    """
    error = (predicted.float() - target.float()).square().mean(1, keepdim=True)
    weight = nn.functional.adaptive_avg_pool2d(weight, error.shape[-2:])
    return (weight * error).sum() / weight.sum(), error.mean()


def scene_batches(batch_size: int, make: Callable[[list[Scene], int], dict[str, Tensor]]) -> Batches:
    """Make endless batches of training scenes; each scene has a seed of its own.

    Args:
        batch_size: the number of scenes per batch.
        make: a function (scenes, step) -> batch, where ``step`` is the training step, counted from 0.
    """
    at_least("batch_size", batch_size, 1)

    def batches(start: int = 0, rank: int = 0, world: int = 1) -> Iterator[dict[str, Tensor]]:
        def numbered(number: int) -> dict[str, Tensor]:
            return make([sample(number * batch_size + i) for i in range(batch_size)], number // world)

        return NumberedBatches(numbered)(start, rank, world)

    return batches


def picture_batches(batch_size: int) -> Batches:
    """Make endless batches of pictures of training scenes, for the autoencoder: ``pixels`` (B, 3, 64, 64)."""
    return scene_batches(batch_size, lambda scenes, _: {"pixels": render(scenes)})


def prompted_batches(batch_size: int, tokenizer: "CLIPTokenizer", config: CurriculumConfig) -> Batches:
    """Make endless batches of training scenes with their prompts, for :meth:`DenoisingObjective.forward`.

    Early in training most examples are easy; their share falls to 0 over ``config.easy_steps`` steps.
    """

    def make(scenes: list[Scene], step: int) -> dict[str, Tensor]:
        share = max(0.0, 1 - step / config.easy_steps) if config.easy_steps else 0.0
        easy = round(share * len(scenes))
        scenes = [*(_easy(scene, config.single_thing) for scene in scenes[:easy]), *scenes[easy:]]
        scenes = [*map(without_offsets, scenes)] if config.exact_positions else scenes
        first, last = config.thing_pixel_weight
        return {
            "pixels": render(scenes),
            "tokens": tokenize(tokenizer, [scene.prompt for scene in scenes]),
            "weight": pixel_weights(scenes, last + share * (first - last)),
            "pure_noise": torch.arange(len(scenes)) < easy * config.pure_noise,
            "unnamed": unnamed_positions(scenes),
        }

    return scene_batches(batch_size, make)


def unnamed_positions(scenes: Sequence[Scene]) -> Tensor:
    """Say which of the nine positions (cells) hold an object whose position the prompt does not name.

    Returns:
        (B, 9) int64: 0 for an empty cell, -1 for an object whose position the prompt names, i (from 1) for the i-th
        object whose position it omits.
    """
    table = torch.zeros(len(scenes), len(POSITIONS), dtype=torch.long)
    for row, scene in zip(table, scenes, strict=True):
        unnamed = itertools.count(1)
        for thing in scene.things:
            row[list(POSITIONS).index(thing.position)] = -1 if "position" in thing.named else next(unnamed)
    return table


def couple_noise_to_positions(noise: Tensor, unnamed: Tensor) -> Tensor:
    """Rearrange noise such that it determines the positions which the prompt does not name.

    Given pure noise and a prompt without a position, the best prediction is an average over all positions. A sampler of
    few steps cannot recover from that blur. So noise and picture are coupled, as in multisample flow matching
    (Pooladian et al. 2023, who couple them by optimal transport). A position is free if it is empty or holds an object
    whose position the prompt does not name. The scene is kept, and patches of the noise are exchanged: afterwards the
    first object without a named position stands at the free position whose central patch of noise has the highest mean,
    the second at the next highest. Patches of white noise are interchangeable, so the noise stays white if all free
    positions are equally likely. The training split leaves out some combinations of factors, so there this holds only
    approximately. The paths from noise to picture become straighter, and a deterministic sampler can follow them.

    Args:
        noise: (B, c, h, w), white noise in the latent space.
        unnamed: (B, 9), the table of :func:`unnamed_positions`.

    Returns:
        A copy of the noise with patches exchanged.
    """
    noise = noise.clone()
    for picture, table in zip(noise, unnamed.tolist(), strict=True):
        patches = [picture[:, rows, columns] for rows, columns in _central_patches(picture.shape[-2:])]
        free = [i for i, number in enumerate(table) if number >= 0]
        for _, i in sorted((number, i) for i, number in enumerate(table) if number > 0):
            best = max(free, key=lambda j: patches[j].mean().item())
            patches[i][:], patches[best][:] = patches[best].clone(), patches[i].clone()
            free.remove(i)
    return noise


def _central_patches(shape: Sequence[int]) -> list[tuple[slice, slice]]:
    """Return the rows and columns of the latent patch at the centre of each position; the patch's side is an eighth of
    the latent's."""
    rows, columns = (
        [slice(first, first + max(1, side // 8)) for first in (round(c * side / SIDE - side / 16) for c in CENTRES)]
        for side in shape
    )
    return list(itertools.product(rows, columns))


def pixel_weights(scenes: list[Scene], things: float) -> Tensor:
    """Compute the weight (B, 1, 64, 64) of every pixel: ``things`` if the pixel shows an object, 1 if it shows the
    ground."""
    return 1 + (things - 1) * torch.from_numpy(np.stack([~scene.masks()[-1:] for scene in scenes]))


def without_offsets(scene: Scene) -> Scene:
    """Copy a scene, with every object moved to the centre of its position (offset 0)."""
    return replace(scene, things=tuple(replace(thing, offset=(0, 0)) for thing in scene.things))


def _easy(scene: Scene, single_thing: bool) -> Scene:
    """Copy a scene, or only its first object and the ground, with every factor named in the prompt."""
    return (replace(scene, things=scene.things[:1]) if single_thing else scene).spelled_out()
