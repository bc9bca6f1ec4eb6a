"""Training the embedded text-to-image model from scratch on the world.

A latent diffusion model (Rombach et al. 2022) with the cross-attention block structure of SDXL's
U-Net (Podell et al. 2023), made so that few steps suffice: v-prediction (Salimans and Ho 2022) on a
schedule whose last timestep is pure noise (Lin et al. 2023), guided without a classifier (Ho and
Salimans 2022). Half of the training timesteps are those that a four-step sampler visits.
"""

import itertools
import re
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from vaelab import hooks, models
from vaelab.checks import at_least
from vaelab.text_model import ReadingObjective, new_text_model, new_tokenizer, readings, tokenize
from vaelab.training import TrainConfig, Trained, train
from vaelab.vae import VAEObjective
from vaelab.world import SIDE, Scene, render, sample

if TYPE_CHECKING:
    from transformers import CLIPTextModel, CLIPTokenizer

SCENES_FOR_THE_SCALE = 256
VAE_BATCH = 16
TEXT_BATCH = 64
BATCH = 32
KL_WEIGHT = 1e-6
HORIZON = 1.7
"""Of the first lesson's schedule, in lessons: the second begins before the learning rate is low."""


@dataclass(frozen=True)
class ModelConfig:
    """The sizes of the three networks."""

    vae_channels: tuple[int, ...] = (32, 64, 64)
    """Of the autoencoder's blocks; the latent's side is the picture's over 2 ** (blocks - 1)."""
    latent_channels: int = 4
    unet_channels: tuple[int, ...] = (64, 128)
    """Of the U-Net's stages, from the latent's side to half of it and so on."""
    unet_layers: int = 2
    """Of a stage on its way down, each a residual block and a transformer."""
    head_width: int = 32
    """Channels to an attention head."""
    text_width: int = 128
    """Of the text model's states, which the U-Net attends to."""
    text_layers: int = 3

    def __post_init__(self) -> None:
        for name in ("unet_layers", "text_layers"):
            at_least(name, getattr(self, name), 1)
        for name in ("vae_channels", "unet_channels"):
            if any(width % 16 for width in getattr(self, name)):
                raise ValueError(f"{name}: expected multiples of 16, got {getattr(self, name)}")


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
    """Steps over which the easy examples become fewer: one thing, with every factor named."""
    pure_noise: bool = True
    """Whether the easy examples are to be drawn out of pure noise: there is nothing to be seen there, so
    that the prompt must be read."""
    exact: bool = False
    """Whether things stand exactly at their places. A prompt does not tell by how much they are off, so
    that what is learned of their outlines otherwise is the mean over that."""
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


OUTLINES = ScheduleConfig(sampler_share=0.5, curriculum=800, pure_noise=False, exact=True, thing_weight=(10.0, 10.0))
"""The second lesson: once things come in their places, what their outlines are."""


class TrainedPipeline(NamedTuple):
    """What :func:`train_pipeline` gives back."""

    pipeline: Any
    """A ``StableDiffusionPipeline``, in evaluation mode."""
    vae: Trained
    """How the autoencoder's training went."""
    text: Trained
    """How the text model learned to read."""
    denoiser: Trained
    """How U-Net and text model learned to draw what is named where it is named."""
    outlines: Trained
    """How they went on with the things' outlines."""

    @property
    def history(self) -> list[dict[str, Any]]:
        """The rows of both lessons' histories, steps counted through, ``condition`` the lesson."""
        later = self.denoiser.history[-1]["step"]
        first = [{**row, "condition": "first lesson"} for row in self.denoiser.history]
        return first + [{**row, "step": row["step"] + later, "condition": "outlines"} for row in self.outlines.history]

    @property
    def seconds(self) -> dict[str, float]:
        """What each took in this process, as numbers of a run."""
        named = {"world_vae": self.vae, "text_model": self.text, "denoiser": self.denoiser, "outlines": self.outlines}
        return {f"{name}.seconds": trained.seconds for name, trained in named.items()}


def train_pipeline(
    folder: str | Path,
    *,
    vae_steps: int = 2500,
    text_steps: int = 800,
    denoiser_steps: int = 2000,
    outline_steps: int = 1100,
    device: str = "auto",
    seed: int = 0,
    model: ModelConfig | None = None,
) -> TrainedPipeline:
    """Train the autoencoder, teach the text model to read, then train U-Net and text model together
    on the latents, all from scratch on the world, going on from what an interrupted call left.

    Args:
        folder: where the checkpoints go.
        vae_steps: of the autoencoder, 16 pictures each.
        text_steps: of the text model, 64 prompts each.
        denoiser_steps: of U-Net and text model, 32 pictures each, with :class:`ScheduleConfig`'s defaults.
        outline_steps: of the same, with ``OUTLINES``.
        device: where to train.
        seed: fixes the first weights and every step.
        model: the networks' sizes.
    """
    model = model or ModelConfig()
    vae = new_vae(model, seed)
    settings = {"channels": [*model.vae_channels, model.latent_channels], "batch_size": VAE_BATCH, "kl": KL_WEIGHT}
    vae_trained = train(
        VAEObjective(vae, KL_WEIGHT), pictures(VAE_BATCH), _training(vae_steps, 100, device, seed),
        folder=Path(folder, "vae"), settings=settings, title="autoencoder",
    )  # fmt: skip
    vae.requires_grad_(False).register_to_config(scaling_factor=latent_scale(vae))
    tokenizer = new_tokenizer()
    text_encoder = new_text_model(tokenizer, model.text_width, model.text_layers, seed)
    settings = {"width": model.text_width, "layers": model.text_layers, "batch_size": TEXT_BATCH}
    text_trained = train(
        ReadingObjective(text_encoder, seed), readings(TEXT_BATCH, tokenizer), _training(text_steps, 100, device, seed),
        folder=Path(folder, "text"), settings=settings, title="text model",
    )  # fmt: skip
    pipeline = new_pipeline(vae, text_encoder, tokenizer, model, seed)
    lessons, places = [], None
    for name, steps, horizon, schedule in (
        ("denoiser", denoiser_steps, round(HORIZON * denoiser_steps), ScheduleConfig()),
        ("outlines", outline_steps, 0, OUTLINES),
    ):
        objective = DenoisingObjective(pipeline, schedule)
        objective.places = places = places or objective.places
        settings = {"model": asdict(model), "schedule": asdict(schedule), "batch_size": BATCH}
        config = replace(_training(steps, 200 if horizon else 50, device, seed), horizon=horizon)
        stream = prompted(BATCH, tokenizer, schedule)
        lessons.append(train(objective, stream, config, folder=Path(folder, name), settings=settings, title=name))
    pipeline.set_progress_bar_config(disable=True)
    return TrainedPipeline(pipeline, vae_trained, text_trained, *lessons)


def _training(steps: int, warmup: int, device: str, seed: int) -> TrainConfig:
    return TrainConfig(
        steps=steps, learning_rate=1e-3, weight_decay=0.01, warmup=warmup, schedule="cosine", log_every=50,
        precision="bfloat16", device=device, seed=seed, checkpoint_every=100,
    )  # fmt: skip


def new_vae(config: ModelConfig, seed: int = 0) -> nn.Module:
    """An untrained autoencoder."""
    from diffusers import AutoencoderKL

    depth = len(config.vae_channels)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return AutoencoderKL(
            block_out_channels=config.vae_channels,
            down_block_types=["DownEncoderBlock2D"] * depth,
            up_block_types=["UpDecoderBlock2D"] * depth,
            latent_channels=config.latent_channels,
            layers_per_block=1,
            norm_num_groups=8,
            sample_size=SIDE,
            mid_block_add_attention=False,
        )


def new_pipeline(
    vae: nn.Module, text_encoder: "CLIPTextModel", tokenizer: "CLIPTokenizer", config: ModelConfig, seed: int = 0
) -> Any:
    """A ``StableDiffusionPipeline`` of a trained autoencoder and text model with an untrained U-Net."""
    from diffusers import DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel

    stages = len(config.unet_channels)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        unet = UNet2DConditionModel(
            sample_size=SIDE // 2 ** (len(config.vae_channels) - 1),
            in_channels=config.latent_channels,
            out_channels=config.latent_channels,
            down_block_types=["CrossAttnDownBlock2D"] * stages,
            up_block_types=["CrossAttnUpBlock2D"] * stages,
            block_out_channels=config.unet_channels,
            layers_per_block=config.unet_layers,
            cross_attention_dim=config.text_width,
            # by diffusers' misnomer, the number of heads
            attention_head_dim=tuple(width // config.head_width for width in config.unet_channels),
            use_linear_projection=True,
            norm_num_groups=16,
        )
    scheduler = DDIMScheduler(
        # more noise than Stable Diffusion's: a thing is seen through that one's at three quarters of the
        # way, so that nothing but the first step would learn to read the prompt
        beta_start=0.0001,
        beta_end=0.02,
        beta_schedule="linear",
        prediction_type="v_prediction",
        rescale_betas_zero_snr=True,
        timestep_spacing="trailing",
        clip_sample=False,
        set_alpha_to_one=True,
        steps_offset=1,
    )
    return StableDiffusionPipeline(
        vae, text_encoder, tokenizer, unet, scheduler, None, None, requires_safety_checker=False
    )


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
        (B, 1, R, R) of each pixel, and which are ``blank`` (B,), to be made of pure noise."""
        pixels, tokens, device = batch["pixels"], batch["tokens"], batch["pixels"].device
        with torch.no_grad():
            latents = models.posterior(self._vae[0], pixels).mode() * self._vae[0].config.scaling_factor
        noise = torch.randn_like(latents)
        timesteps = torch.where(batch["blank"], self._visited[0], self._timesteps(len(latents)).to(device))
        dropped = torch.rand(len(tokens), 1, device=device) < self._config.prompt_dropout
        states = self.text_encoder(torch.where(dropped, self._empty.to(device), tokens))[0]
        noisy = self._scheduler.add_noise(latents, noise, timesteps)
        target = self._scheduler.get_velocity(latents, noise, timesteps)
        with hooks.capture(self.unet, self._knowing, side="input", grad=True) as seen:
            predicted = self.unet(noisy, timesteps, states).sample
        place = self._place([seen[path][0] for path in self._knowing])
        error = (predicted.float() - target.float()).square().mean(1, keepdim=True)
        weight = nn.functional.adaptive_avg_pool2d(batch["weight"], error.shape[-2:])
        loss = (weight * error).sum() / weight.sum() + self._config.place_weight * place
        return {"loss": loss, "error": error.mean(), "place": place}

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
def latent_scale(vae: nn.Module) -> float:
    """diffusers' ``scaling_factor``: one over the standard deviation of the posteriors' means.

    The U-Net is trained on the means: the posterior's noise is what the decoder forgives, not what
    a denoiser should have to make.
    """
    pictures = render(sample(seed) for seed in range(SCENES_FOR_THE_SCALE))
    parameter = next(vae.parameters())
    means = [
        models.posterior(vae, part.to(parameter.device, parameter.dtype)).mode().cpu().double()
        for part in pictures.split(32)
    ]
    return float(1 / torch.cat(means).std())


def pictures(batch_size: int) -> Callable[..., Iterator[dict[str, Tensor]]]:
    """Endless batches of pictures of training scenes, none of them twice, for the autoencoder."""
    return _stream(batch_size, lambda drawn, _: {"pixels": render(drawn)})


def prompted(
    batch_size: int, tokenizer: "CLIPTokenizer", config: ScheduleConfig
) -> Callable[..., Iterator[dict[str, Tensor]]]:
    """Endless batches of training scenes with their prompts' tokens and their pixels' weights."""

    def batch(drawn: list[Scene], number: int) -> dict[str, Tensor]:
        left = max(0.0, 1 - number / config.curriculum) if config.curriculum else 0.0
        easy = round(left * len(drawn))
        drawn = [*map(_easy, drawn[:easy]), *drawn[easy:]]
        drawn = [*map(_exact, drawn)] if config.exact else drawn
        first, last = config.thing_weight
        things = torch.from_numpy(np.stack([~scene.masks()[-1:] for scene in drawn]))
        return {
            "pixels": render(drawn),
            "tokens": tokenize(tokenizer, [scene.prompt for scene in drawn]),
            "weight": 1 + (last - 1 + left * (first - last)) * things,
            "blank": torch.arange(len(drawn)) < easy * config.pure_noise,
        }

    return _stream(batch_size, batch)


def _stream(batch_size: int, batch: Callable[[list[Scene], int], dict]) -> Callable[..., Iterator[dict[str, Tensor]]]:
    at_least("batch_size", batch_size, 1)

    def batches(start: int = 0, rank: int = 0, world: int = 1) -> Iterator[dict[str, Tensor]]:
        for number in itertools.count(start):
            first = (number * world + rank) * batch_size
            yield batch([sample(seed) for seed in range(first, first + batch_size)], number)

    return batches


def _exact(scene: Scene) -> Scene:
    """The scene with its things exactly at their places."""
    return replace(scene, things=tuple(replace(thing, offset=(0, 0)) for thing in scene.things))


def _easy(scene: Scene) -> Scene:
    """The scene's first thing alone, with everything named."""
    return replace(scene, things=scene.things[:1]).spelled_out()
