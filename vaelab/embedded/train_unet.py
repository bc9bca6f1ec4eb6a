"""Training the embedded text-to-image model from scratch on the world.

A latent diffusion model (Rombach et al. 2022) with cross-attention in every stage of its U-Net, made
so that few steps suffice: v-prediction (Salimans and Ho 2022) on a schedule whose last timestep is
pure noise (Lin et al. 2023), guided without a classifier (Ho and Salimans 2022). What it is taught,
and in which order, is in :mod:`vaelab.embedded.curriculum`.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import nn

from vaelab import models
from vaelab.core.validate import at_least
from vaelab.embedded.curriculum import LESSONS, DenoisingObjective, pictures, prompted
from vaelab.embedded.text_encoder import ReadingObjective, new_text_model, new_tokenizer, readings
from vaelab.training.loop import TrainConfig, Trained, train
from vaelab.vae.objective import VAEObjective
from vaelab.world.scenes import SIDE, render, sample

if TYPE_CHECKING:
    from diffusers import DDIMScheduler
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


class TrainedPipeline(NamedTuple):
    """What :func:`train_pipeline` gives back."""

    pipeline: Any
    """A ``StableDiffusionPipeline``, in evaluation mode."""
    vae: Trained
    """How the autoencoder's training went."""
    text: Trained
    """How the text model learned to read."""
    lessons: dict[str, Trained]
    """How each of the lessons of U-Net and text model went."""

    @property
    def history(self) -> list[dict[str, Any]]:
        """The rows of all lessons' histories, steps counted through, ``condition`` the lesson."""
        rows, before = [], 0
        for name, trained in self.lessons.items():
            rows += [{**row, "step": row["step"] + before, "condition": name} for row in trained.history]
            before += trained.history[-1]["step"]
        return rows

    @property
    def seconds(self) -> dict[str, float]:
        """What each took in this process, as numbers of a run."""
        named = {"world_vae": self.vae, "text_model": self.text, **self.lessons}
        return {f"{name}.seconds": trained.seconds for name, trained in named.items()}


def train_pipeline(
    folder: str | Path,
    *,
    vae_steps: int = 3000,
    text_steps: int = 800,
    lesson_steps: Sequence[int] = (1200, 3000, 4000),
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
        lesson_steps: of U-Net and text model, 32 pictures each, in each of the ``LESSONS``.
        device: where to train.
        seed: fixes the first weights and every step.
        model: the networks' sizes.

    Raises:
        ValueError: another number of ``lesson_steps`` than of lessons.
    """
    if len(lesson_steps) != len(LESSONS):
        raise ValueError(f"lesson_steps: expected one for each of {', '.join(LESSONS)}, got {list(lesson_steps)}")
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
    lessons, places = {}, None
    with attention_written_out(pipeline.unet):
        for (name, schedule), steps in zip(LESSONS.items(), lesson_steps, strict=True):
            objective = DenoisingObjective(pipeline, schedule)
            objective.places = places = places or objective.places
            settings = {"model": asdict(model), "schedule": asdict(schedule), "batch_size": BATCH}
            config = _training(steps, 50 if lessons else 200, device, seed)
            if not lessons:
                config = replace(config, horizon=round(HORIZON * steps))
            stream = prompted(BATCH, tokenizer, schedule)
            lessons[name] = train(objective, stream, config, folder=Path(folder, name), settings=settings, title=name)
    pipeline.set_progress_bar_config(disable=True)
    return TrainedPipeline(pipeline, vae_trained, text_trained, lessons)


@contextmanager
def attention_written_out(network: nn.Module) -> Iterator[None]:
    """Without PyTorch's fused attention, whose backward pass is slow on a CPU: a training step of the U-Net
    takes a fifth less time there."""
    from diffusers.models.attention_processor import AttnProcessor

    fused = {module: module.processor for module in network.modules() if hasattr(module, "set_processor")}
    for attention in fused:
        attention.set_processor(AttnProcessor())
    try:
        yield
    finally:
        for attention, processor in fused.items():
            attention.set_processor(processor)


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
    from diffusers import StableDiffusionPipeline, UNet2DConditionModel

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
    return StableDiffusionPipeline(
        vae, text_encoder, tokenizer, unet, new_scheduler(), None, None, requires_safety_checker=False
    )


def new_scheduler() -> "DDIMScheduler":
    """The schedule of noise that the embedded denoisers are trained on; its last timestep is pure noise."""
    from diffusers import DDIMScheduler

    return DDIMScheduler(
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
