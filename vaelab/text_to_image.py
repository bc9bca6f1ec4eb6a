"""Training the embedded text-to-image model from scratch on the world.

A latent diffusion model (Rombach et al. 2022) with the cross-attention block structure of SDXL's
U-Net (Podell et al. 2023), made so that few steps suffice: v-prediction (Salimans and Ho 2022) on a
schedule whose last timestep is pure noise (Lin et al. 2023), guided without a classifier (Ho and
Salimans 2022). Half of the training timesteps are those that a four-step sampler visits.
"""

import itertools
import json
import string
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from vaelab import models
from vaelab.checks import at_least
from vaelab.training import TrainConfig, Trained, train
from vaelab.vae import VAEObjective
from vaelab.world import SIDE, Scene, render, sample

if TYPE_CHECKING:
    from transformers import CLIPTokenizer

MAX_TOKENS = 40
SPECIAL = ("<|startoftext|>", "<|endoftext|>")
PROMPTS_FOR_THE_TOKENIZER = 5000
SCENES_FOR_THE_SCALE = 256
VAE_BATCH = 16
BATCH = 32
KL_WEIGHT = 1e-6


@dataclass(frozen=True)
class ModelConfig:
    """The sizes of the three networks."""

    vae_channels: tuple[int, ...] = (32, 64)
    """Of the autoencoder's blocks; the latent's side is the picture's over 2 ** (blocks - 1)."""
    latent_channels: int = 4
    unet_channels: tuple[int, int, int] = (32, 64, 128)
    """Of the U-Net's three stages; like SDXL's, the first has no attention."""
    head_width: int = 32
    """Channels to an attention head."""
    text_width: int = 128
    """Of the text model's states, which the U-Net attends to."""
    text_layers: int = 3

    def __post_init__(self) -> None:
        at_least("text_layers", self.text_layers, 1)
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
    sampler_share: float = 0.5
    """Share of the timesteps drawn from that sampler's; the rest are uniform."""
    curriculum: int = 800
    """Steps over which the scenes go from one thing with every factor named to any scene, and a
    thing's pixels from ``thing_weight`` to the weight of all others."""
    thing_weight: float = 10.0
    """How much more a thing's pixels count at the start; most of a picture is ground."""

    def __post_init__(self) -> None:
        at_least("sampler_steps", self.sampler_steps, 1)
        at_least("curriculum", self.curriculum, 0)
        at_least("thing_weight", self.thing_weight, 1)
        for name in ("prompt_dropout", "sampler_share"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name}: must be between 0 and 1, got {getattr(self, name)!r}")


class TrainedPipeline(NamedTuple):
    """What :func:`train_pipeline` gives back."""

    pipeline: Any
    """A ``StableDiffusionPipeline``, in evaluation mode."""
    vae: Trained
    """How the autoencoder's training went."""
    denoiser: Trained
    """How that of U-Net and text model went."""


def train_pipeline(
    folder: str | Path,
    *,
    vae_steps: int = 2500,
    denoiser_steps: int = 1600,
    device: str = "auto",
    seed: int = 0,
    model: ModelConfig | None = None,
    schedule: ScheduleConfig | None = None,
) -> TrainedPipeline:
    """Train the autoencoder, then U-Net and text model together on its latents, from scratch on
    the world, going on from what an interrupted call left in ``folder``.

    Args:
        folder: where the checkpoints go.
        vae_steps: of the autoencoder, 16 pictures each.
        denoiser_steps: of U-Net and text model, 32 pictures each.
        device: where to train.
        seed: fixes the first weights and every step.
        model: the networks' sizes.
        schedule: what the denoiser's training draws.
    """
    model, schedule = model or ModelConfig(), schedule or ScheduleConfig()
    vae = new_vae(model, seed)
    settings = {"model": asdict(model), "batch_size": VAE_BATCH, "kl_weight": KL_WEIGHT}
    vae_trained = train(
        VAEObjective(vae, KL_WEIGHT), pictures(VAE_BATCH), _training(vae_steps, 100, device, seed),
        folder=Path(folder, "vae"), settings=settings, title="autoencoder",
    )  # fmt: skip
    vae.requires_grad_(False).register_to_config(scaling_factor=latent_scale(vae))
    pipeline = new_pipeline(vae, model, seed)
    settings = {"model": asdict(model), "schedule": asdict(schedule), "batch_size": BATCH}
    trained = train(
        DenoisingObjective(pipeline, schedule), prompted(BATCH, pipeline.tokenizer, schedule),
        _training(denoiser_steps, 200, device, seed), folder=Path(folder, "denoiser"), settings=settings,
        title="denoiser",
    )  # fmt: skip
    pipeline.set_progress_bar_config(disable=True)
    return TrainedPipeline(pipeline, vae_trained, trained)


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


def new_tokenizer() -> "CLIPTokenizer":
    """CLIP's byte-pair tokenizer, with a token for every word of the world's prompts.

    The merges are found here, ties broken by name: the tokenizers library's trainer breaks them
    otherwise in every process, and a training that is gone on from needs the same numbers.
    """
    from transformers import CLIPTokenizer

    prompts = (sample(seed).prompt for seed in range(PROMPTS_FOR_THE_TOKENIZER))
    merges = _merges(sorted({word for prompt in prompts for word in prompt.replace(",", " ,").split()}))
    characters = string.ascii_lowercase + string.digits + ".,!?'-"
    tokens = [*SPECIAL, *characters, *(f"{one}</w>" for one in characters), *map("".join, merges)]
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(tokens)}))
        Path(folder, "merges.txt").write_text("\n".join(["#version: 0.2", *map(" ".join, merges)]))
        return CLIPTokenizer.from_pretrained(folder, model_max_length=MAX_TOKENS)


def _merges(words: list[str]) -> list[tuple[str, str]]:
    """Byte-pair encoding (Sennrich et al. 2016) of words that count once each, until each is one token."""
    pieces = [[*word[:-1], f"{word[-1]}</w>"] for word in words]
    merges: list[tuple[str, str]] = []
    while counts := Counter(pair for word in pieces for pair in itertools.pairwise(word)):
        best = max(counts, key=lambda pair: (counts[pair], pair))
        merges.append(best)
        for word in pieces:
            for place in reversed(range(len(word) - 1)):
                if tuple(word[place : place + 2]) == best:
                    word[place : place + 2] = ["".join(best)]
    return merges


def new_pipeline(trained_vae: nn.Module, config: ModelConfig, seed: int = 0) -> Any:
    """A ``StableDiffusionPipeline`` of a trained autoencoder with an untrained text model and U-Net."""
    from diffusers import DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    tokenizer = new_tokenizer()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        text_model = CLIPTextModel(
            CLIPTextConfig(
                vocab_size=len(tokenizer),
                hidden_size=config.text_width,
                intermediate_size=4 * config.text_width,
                projection_dim=config.text_width,
                num_hidden_layers=config.text_layers,
                num_attention_heads=4,
                max_position_embeddings=MAX_TOKENS,
                bos_token_id=tokenizer.bos_token_id,
                eos_token_id=tokenizer.eos_token_id,
                pad_token_id=tokenizer.pad_token_id,
            )
        )
        unet = UNet2DConditionModel(
            sample_size=SIDE // 2 ** (len(config.vae_channels) - 1),
            in_channels=config.latent_channels,
            out_channels=config.latent_channels,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            block_out_channels=config.unet_channels,
            layers_per_block=2,
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
        trained_vae, text_model, tokenizer, unet, scheduler, None, None, requires_safety_checker=False
    )


class DenoisingObjective(nn.Module):
    """L = E ||v - v_theta(z_t, t, prompt)||^2, for the U-Net and the text model together."""

    def __init__(self, pipeline: Any, config: ScheduleConfig):
        super().__init__()
        self.unet, self.text_encoder = pipeline.unet, pipeline.text_encoder
        self._config, self._vae, self._scheduler = config, [pipeline.vae], pipeline.scheduler  # a list: not trained
        self._empty = tokenize(pipeline.tokenizer, [""])[0]
        pipeline.scheduler.set_timesteps(config.sampler_steps)
        self._visited = pipeline.scheduler.timesteps.clone()

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """The loss of ``pixels`` (B, 3, R, R) in [-1, 1], their ``tokens`` (B, L) and the ``weight``
        (B, 1, R, R) of each pixel."""
        pixels, tokens, device = batch["pixels"], batch["tokens"], batch["pixels"].device
        with torch.no_grad():
            latents = models.posterior(self._vae[0], pixels).mode() * self._vae[0].config.scaling_factor
        noise = torch.randn_like(latents)
        timesteps = self._timesteps(len(latents)).to(device)
        dropped = torch.rand(len(tokens), 1, device=device) < self._config.prompt_dropout
        states = self.text_encoder(torch.where(dropped, self._empty.to(device), tokens))[0]
        noisy = self._scheduler.add_noise(latents, noise, timesteps)
        target = self._scheduler.get_velocity(latents, noise, timesteps)
        predicted = self.unet(noisy, timesteps, states).sample
        error = (predicted.float() - target.float()).square().mean(1, keepdim=True)
        weight = nn.functional.adaptive_avg_pool2d(batch["weight"], error.shape[-2:])
        return {"loss": (weight * error).sum() / weight.sum(), "error": error.mean()}

    def _timesteps(self, count: int) -> Tensor:
        uniform = torch.randint(0, self._scheduler.config.num_train_timesteps, (count,))
        visited = self._visited[torch.randint(0, len(self._visited), (count,))]
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


def tokenize(tokenizer: "CLIPTokenizer", prompts: list[str]) -> Tensor:
    """Token numbers (B, L), padded as the pipelines of diffusers do."""
    return tokenizer(
        prompts, padding="max_length", max_length=tokenizer.model_max_length, truncation=True, return_tensors="pt"
    ).input_ids


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
        things = torch.from_numpy(np.stack([~scene.masks()[-1:] for scene in drawn]))
        return {
            "pixels": render(drawn),
            "tokens": tokenize(tokenizer, [scene.prompt for scene in drawn]),
            "weight": 1 + left * (config.thing_weight - 1) * things,
        }

    return _stream(batch_size, batch)


def _stream(batch_size: int, batch: Callable[[list[Scene], int], dict]) -> Callable[..., Iterator[dict[str, Tensor]]]:
    at_least("batch_size", batch_size, 1)

    def batches(start: int = 0, rank: int = 0, world: int = 1) -> Iterator[dict[str, Tensor]]:
        for number in itertools.count(start):
            first = (number * world + rank) * batch_size
            yield batch([sample(seed) for seed in range(first, first + batch_size)], number)

    return batches


def _easy(scene: Scene) -> Scene:
    """The scene's first thing alone, with everything named."""
    return replace(scene, things=scene.things[:1]).spelled_out()
