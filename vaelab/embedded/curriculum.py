"""What the embedded denoiser learns from: pictures of the world with their prompts, easy ones first, and
the loss on them."""

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
from vaelab.world.scenes import CENTRES, POSITIONS, SIDE, Scene, render, sample

if TYPE_CHECKING:
    from transformers import CLIPTokenizer


@dataclass(frozen=True)
class ScheduleConfig:
    """What the training of the denoiser draws."""

    prompt_dropout: float = 0.1
    """Share of the prompts replaced by the empty one, for classifier-free guidance."""
    sampler_steps: int = 4
    """The sampler whose timesteps are drawn more often."""
    sampler_share: float = 0.7
    """Share of the timesteps drawn from that sampler's, the noisier the more often, since the less
    is seen of a picture the more is learned from its prompt; the rest are uniform."""
    curriculum: int = 1000
    """Steps over which the easy examples become fewer, in which every factor is named."""
    alone: bool = True
    """Whether the easy examples have one thing only."""
    pure_noise: bool = True
    """Whether the easy examples are to be drawn out of pure noise: there is nothing to be seen there, so
    that the prompt must be read."""
    exact: bool = False
    """Whether things stand exactly at their places. A prompt does not tell by how much they are off, so
    that what is learned of their outlines otherwise is the mean over that."""
    noise_chooses: bool = False
    """Whether a thing whose place is not named stands where the noise says, see :func:`let_noise_choose`."""
    place_weight: float = 0.1
    """Of knowing where one is."""
    thing_weight: tuple[float, float] = (10.0, 3.0)
    """How much a thing's pixels count beside the ground's, of which there are many more: where examples
    are all easy, and where none is."""

    def __post_init__(self) -> None:
        at_least("sampler_steps", self.sampler_steps, 1)
        at_least("curriculum", self.curriculum, 0)
        at_least("place_weight", self.place_weight, 0)
        at_least("thing_weight", min(self.thing_weight), 1)
        for name in ("prompt_dropout", "sampler_share"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name}: must be between 0 and 1, got {getattr(self, name)!r}")


LESSONS = {
    "placing": ScheduleConfig(curriculum=800, exact=True, thing_weight=(10.0, 10.0)),
    "outlines": ScheduleConfig(
        sampler_share=0.5, curriculum=1500, alone=False, pure_noise=False, exact=True, thing_weight=(10.0, 10.0)
    ),
    "practice": ScheduleConfig(curriculum=0, exact=True, noise_chooses=True, thing_weight=(5.0, 5.0)),
}
"""First what is named comes in its place, then with its outline, then as people write, with much left unsaid."""


class DenoisingObjective(nn.Module):
    """L = E ||v - v_theta(z_t, t, prompt)||^2, for the U-Net and the text model together.

    Beside it, what a transformer block takes in must tell each position's row and column to one
    linear map. A convolution learns of places only at the picture's edge, from the padding (Islam
    et al. 2020); in pure noise there is nothing else to see, and as long as no layer knows where it
    is, nothing is gained by reading in a prompt where a thing should be.
    """

    def __init__(self, pipeline: Any, config: ScheduleConfig):
        super().__init__()
        self.unet, self.text_encoder = pipeline.unet, pipeline.text_encoder
        self._config, self._vae, self._scheduler = config, [pipeline.vae], pipeline.scheduler  # a list: not trained
        self._empty = tokenize(pipeline.tokenizer, [""])[0]
        pipeline.scheduler.set_timesteps(config.sampler_steps)
        self._visited = pipeline.scheduler.timesteps.clone()
        found = models.blocks(pipeline).items()
        # the first stage has seen too few convolutions for the edge to be felt in the middle
        self._knowing = {
            block.path: block.shape for name, block in found if re.fullmatch(r"(down\.[1-9]|mid|up)[.\d]+", name)
        }
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            heads = [nn.Linear(width, height + wide) for height, wide, width in self._knowing.values()]
        self.places = nn.ModuleList(heads)

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """The loss of ``pixels`` (B, 3, R, R) in [-1, 1], their ``tokens`` (B, L), the ``weight``
        (B, 1, R, R) of each pixel, which are ``blank`` (B,), to be made of pure noise, and the
        things whose place is ``unsaid`` (B, 9)."""
        pixels, tokens, device = batch["pixels"], batch["tokens"], batch["pixels"].device
        latents = scaled_latents(self._vae[0], pixels)
        noise = torch.randn_like(latents)
        timesteps = torch.where(batch["blank"], self._visited[0], self._timesteps(len(latents)).to(device))
        dropped = torch.rand(len(tokens), 1, device=device) < self._config.prompt_dropout
        if self._config.noise_chooses:
            noise = torch.where(dropped[..., None, None], noise, let_noise_choose(noise, batch["unsaid"]))
        states = self.text_encoder(torch.where(dropped, self._empty.to(device), tokens))[0]
        noisy = self._scheduler.add_noise(latents, noise, timesteps)
        target = self._scheduler.get_velocity(latents, noise, timesteps)
        with hooks.capture(self.unet, self._knowing, side="input", grad=True) as seen:
            predicted = self.unet(noisy, timesteps, states).sample
        place = self._place([seen[path][0] for path in self._knowing])
        loss, error = weighted_error(predicted, target, batch["weight"])
        return {"loss": loss + self._config.place_weight * place, "error": error, "place": place}

    def _place(self, maps: list[Tensor]) -> Tensor:
        """Cross-entropy of every position's row and column, mean over blocks; ``maps`` are (B, C, H, W)."""
        losses = []
        for head, each in zip(self.places, maps, strict=True):
            height, wide = each.shape[-2:]
            rows, columns = head(each.movedim(1, -1)).float().split((height, wide), -1)
            row = torch.arange(height, device=each.device)[:, None].expand(rows.shape[:-1])
            column = torch.arange(wide, device=each.device).expand(columns.shape[:-1])
            for answer, truth in ((rows, row), (columns, column)):
                losses.append(nn.functional.cross_entropy(answer.flatten(0, -2), truth.flatten()))
        return torch.stack(losses).mean()

    def _timesteps(self, count: int) -> Tensor:
        uniform = torch.randint(0, self._scheduler.config.num_train_timesteps, (count,))
        shares = torch.arange(len(self._visited), 0, -1.0)
        visited = self._visited[torch.multinomial(shares, count, replacement=True)]
        return torch.where(torch.rand(count) < self._config.sampler_share, visited, uniform)


@torch.no_grad()
def scaled_latents(vae: nn.Module, pixels: Tensor) -> Tensor:
    """What a denoiser is taught to draw: the posteriors' means (B, c, h, w), brought to deviation one."""
    return models.posterior(vae, pixels).mode() * vae.config.scaling_factor


def weighted_error(predicted: Tensor, target: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """The weighted mean of the squared error, and the plain one.

    Args:
        predicted: (B, c, h, w).
        target: of the same shape.
        weight: (B, 1, R, R), of each pixel.
    """
    error = (predicted.float() - target.float()).square().mean(1, keepdim=True)
    weight = nn.functional.adaptive_avg_pool2d(weight, error.shape[-2:])
    return (weight * error).sum() / weight.sum(), error.mean()


def pictures(batch_size: int) -> Callable[..., Iterator[dict[str, Tensor]]]:
    """Endless batches of pictures of training scenes, none of them twice, for the autoencoder."""
    return stream(batch_size, lambda drawn, _: {"pixels": render(drawn)})


def prompted(
    batch_size: int, tokenizer: "CLIPTokenizer", config: ScheduleConfig
) -> Callable[..., Iterator[dict[str, Tensor]]]:
    """Endless batches of training scenes with their prompts' tokens and their pixels' weights."""

    def batch(drawn: list[Scene], number: int) -> dict[str, Tensor]:
        left = max(0.0, 1 - number / config.curriculum) if config.curriculum else 0.0
        easy = round(left * len(drawn))
        drawn = [*(_easy(scene, config.alone) for scene in drawn[:easy]), *drawn[easy:]]
        drawn = [*map(exactly_placed, drawn)] if config.exact else drawn
        first, last = config.thing_weight
        return {
            "pixels": render(drawn),
            "tokens": tokenize(tokenizer, [scene.prompt for scene in drawn]),
            "weight": pixel_weights(drawn, last + left * (first - last)),
            "blank": torch.arange(len(drawn)) < easy * config.pure_noise,
            "unsaid": unsaid_places(drawn),
        }

    return stream(batch_size, batch)


def unsaid_places(scenes: Sequence[Scene]) -> Tensor:
    """What a prompt leaves open of each of the nine positions: (B, 9) int64, i for its i-th thing whose
    place is not named, counted from 1, 0 where nothing stands and -1 where a thing's place is named."""
    places = torch.zeros(len(scenes), len(POSITIONS), dtype=torch.long)
    for row, scene in zip(places, scenes, strict=True):
        unsaid = itertools.count(1)
        for thing in scene.things:
            row[list(POSITIONS).index(thing.position)] = -1 if "position" in thing.named else next(unsaid)
    return places


def let_noise_choose(noise: Tensor, unsaid: Tensor) -> Tensor:
    """Noise that tells where the things stand whose places a prompt does not name.

    Of pure noise and a prompt that leaves a place open, a denoiser can only draw the mean over all
    places, a few faint copies of the thing, and the steps of a short sampler are too few to part
    from it. So noise and picture are drawn together (as in multisample flow matching, Pooladian et
    al. 2023, where the coupling is that of optimal transport): the first such thing stands where of
    all places left the noise in the middle is highest, the second where it is next highest. What is
    exchanged are like parts of white noise, so that noise by itself, and given any prompt, is as it was
    where all places left are equally likely (nearly so in a split, which leaves some combinations
    out); the paths from noise to picture are straighter, and a deterministic sampler follows them.

    Args:
        noise: (B, c, h, w).
        unsaid: as :func:`unsaid_places` gives it.
    """
    noise = noise.clone()
    for each, places in zip(noise, unsaid.tolist(), strict=True):
        middles = [each[:, rows, columns] for rows, columns in _middles(each.shape[-2:])]
        left = [i for i, place in enumerate(places) if place >= 0]
        for _, i in sorted((place, i) for i, place in enumerate(places) if place > 0):
            best = max(left, key=lambda j: middles[j].mean().item())
            middles[i][:], middles[best][:] = middles[best].clone(), middles[i].clone()
            left.remove(i)
    return noise


def _middles(shape: Sequence[int]) -> list[tuple[slice, slice]]:
    """Rows and columns of a latent picture in the middle of each position: an eighth of its side."""
    rows, columns = (
        [slice(first, first + max(1, side // 8)) for first in (round(c * side / SIDE - side / 16) for c in CENTRES)]
        for side in shape
    )
    return list(itertools.product(rows, columns))


def stream(batch_size: int, batch: Callable[[list[Scene], int], dict]) -> Callable[..., Iterator[dict[str, Tensor]]]:
    """Endless batches, each made of training scenes that come once only, and of the batch's number."""
    at_least("batch_size", batch_size, 1)

    def batches(start: int = 0, rank: int = 0, world: int = 1) -> Iterator[dict[str, Tensor]]:
        for number in itertools.count(start):
            first = (number * world + rank) * batch_size
            yield batch([sample(seed) for seed in range(first, first + batch_size)], number)

    return batches


def pixel_weights(scenes: list[Scene], things: float) -> Tensor:
    """The weight (B, 1, 64, 64) of every pixel: that of things, 1 for the ground's."""
    return 1 + (things - 1) * torch.from_numpy(np.stack([~scene.masks()[-1:] for scene in scenes]))


def exactly_placed(scene: Scene) -> Scene:
    """The scene with its things exactly at their places."""
    return replace(scene, things=tuple(replace(thing, offset=(0, 0)) for thing in scene.things))


def _easy(scene: Scene, alone: bool) -> Scene:
    """The scene with everything named, or its first thing so."""
    return (replace(scene, things=scene.things[:1]) if alone else scene).spelled_out()
