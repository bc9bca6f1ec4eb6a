"""Training of the small text-to-image model shipped with the package, from scratch on pictures of the synthetic scene
world (:mod:`vaelab.world`).

A latent diffusion model (Rombach et al. 2022) with cross-attention in every stage of its U-Net. It needs few sampling
steps: v-prediction (Salimans and Ho 2022) on a schedule whose last timestep is pure noise (Lin et al. 2023), with
classifier-free guidance (Ho and Salimans 2022). It is trained in the stages of a curriculum, which are called lessons
in the code; :mod:`vaelab.embedded.curriculum` has its training data and their order.
"""

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import nn

from vaelab import models
from vaelab.core import devices
from vaelab.core.validate import at_least
from vaelab.embedded.curriculum import LESSONS, DenoisingObjective, picture_batches, prompted_batches
from vaelab.embedded.text_encoder import ReadingObjective, new_text_encoder, new_tokenizer, prompt_batches
from vaelab.training.loop import TrainConfig, Trained, train
from vaelab.training.planning import TrainingPlan, plan_training
from vaelab.vae.objective import VAEObjective
from vaelab.world.scenes import SIDE, render, sample

if TYPE_CHECKING:
    from diffusers import DDIMScheduler
    from transformers import CLIPTextModel, CLIPTokenizer

SCALE_SCENES = 256
VAE_BATCH_SIZE = 16
TEXT_BATCH_SIZE = 64
BATCH_SIZE = 32
KL_WEIGHT = 1e-6
HORIZON = 1.7
"""Length of the learning rate schedule of the curriculum's first stage, in units of the stage's steps. The schedule is
longer than the stage, so the stage ends at a high learning rate."""


@dataclass(frozen=True)
class ModelConfig:
    """Sizes of the autoencoder, the U-Net and the text encoder."""

    vae_channels: tuple[int, ...] = (32, 64, 64)
    """Numbers of channels of the autoencoder's blocks. The side of the latent is the side of the picture divided by
    2 ** (blocks - 1)."""
    latent_channels: int = 4
    """Number of channels of the latent."""
    unet_channels: tuple[int, ...] = (64, 128)
    """Numbers of channels of the U-Net's stages; each stage has half the side of the one before."""
    unet_layers: int = 2
    """Number of layers of a down stage; each layer is a residual block and a transformer block."""
    head_width: int = 32
    """Number of channels per attention head."""
    text_width: int = 128
    """Number of channels of the text encoder's states, which the U-Net attends to."""
    text_layers: int = 3
    """Number of transformer layers of the text encoder."""

    def __post_init__(self) -> None:
        for name in ("unet_layers", "text_layers"):
            at_least(name, getattr(self, name), 1)
        for name in ("vae_channels", "unet_channels"):
            if any(width % 16 for width in getattr(self, name)):
                raise ValueError(f"{name}: expected multiples of 16, got {getattr(self, name)}")


class TrainedPipeline(NamedTuple):
    """Result of :func:`train_pipeline`."""

    pipeline: Any
    """A ``StableDiffusionPipeline``, in evaluation mode."""
    vae: Trained
    """The result of training the autoencoder."""
    text: Trained
    """The result of pretraining the text encoder."""
    lessons: dict[str, Trained]
    """The results of training U-Net and text encoder, by stage of the curriculum."""

    @property
    def history(self) -> list[dict[str, Any]]:
        """The rows of the histories of all stages. ``step`` counts over all stages; ``condition`` names the stage."""
        rows, before = [], 0
        for name, trained in self.lessons.items():
            rows += [{**row, "step": row["step"] + before, "condition": name} for row in trained.history]
            before += trained.history[-1]["step"]
        return rows

    @property
    def seconds(self) -> dict[str, float]:
        """The seconds that each training run took in this process, as metrics."""
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
    """Train the autoencoder, then the text encoder, then U-Net and text encoder together on the latents.

    All start from random weights. An interrupted training run is resumed from the folder's checkpoints.

    Args:
        folder: the folder for the checkpoints.
        vae_steps: the number of steps of the autoencoder, with 16 pictures each.
        text_steps: the number of steps of the text encoder, with 64 prompts each.
        lesson_steps: the numbers of steps of U-Net and text encoder, with 32 pictures each; one number per stage of the
            curriculum (``LESSONS``).
        device: the device to train on.
        seed: determines the initial weights and all random choices of the training.
        model: the networks' sizes; None means the defaults.

    Raises:
        ValueError: ``lesson_steps`` does not have one number, at least 1, per stage of the curriculum.
    """
    require_lesson_steps(lesson_steps)
    model = model or ModelConfig()
    vae = new_vae(model, seed)
    settings = {"channels": [*model.vae_channels, model.latent_channels], "batch_size": VAE_BATCH_SIZE, "kl": KL_WEIGHT}
    vae_trained = train(
        VAEObjective(vae, KL_WEIGHT), picture_batches(VAE_BATCH_SIZE), _training(vae_steps, 100, device, seed),
        folder=Path(folder, "vae"), settings=settings, title="autoencoder",
    )  # fmt: skip
    vae.requires_grad_(False).register_to_config(scaling_factor=latent_mean_scale(vae))
    tokenizer = new_tokenizer()
    text_encoder = new_text_encoder(tokenizer, model.text_width, model.text_layers, seed)
    settings = {"width": model.text_width, "layers": model.text_layers, "batch_size": TEXT_BATCH_SIZE}
    text_trained = train(
        ReadingObjective(text_encoder, seed), prompt_batches(TEXT_BATCH_SIZE, tokenizer),
        _training(text_steps, 100, device, seed),
        folder=Path(folder, "text"), settings=settings, title="text encoder",
    )  # fmt: skip
    pipeline = new_pipeline(vae, text_encoder, tokenizer, model, seed)
    lessons, heads = {}, None
    with unfused_attention_on_cpu(pipeline.unet, device):
        for (name, schedule), steps in zip(LESSONS.items(), lesson_steps, strict=True):
            objective = DenoisingObjective(pipeline, schedule)
            objective.position_heads = heads = heads or objective.position_heads
            settings = {"model": asdict(model), "schedule": asdict(schedule), "batch_size": BATCH_SIZE}
            config = _training(steps, 50 if lessons else 200, device, seed)
            if not lessons:
                config = replace(config, horizon=round(HORIZON * steps))
            batches = prompted_batches(BATCH_SIZE, tokenizer, schedule)
            lessons[name] = train(objective, batches, config, folder=Path(folder, name), settings=settings, title=name)
    pipeline.set_progress_bar_config(disable=True)
    return TrainedPipeline(pipeline, vae_trained, text_trained, lessons)


def plan_pipeline(
    *,
    vae_steps: int,
    text_steps: int,
    lesson_steps: Sequence[int],
    device: str = "auto",
    seed: int = 0,
    model: ModelConfig | None = None,
) -> list[TrainingPlan]:
    """Estimate what :func:`train_pipeline` takes; the arguments and the errors are its own."""
    require_lesson_steps(lesson_steps)
    model = model or ModelConfig()
    vae, tokenizer = new_vae(model, seed), new_tokenizer()
    text_encoder = new_text_encoder(tokenizer, model.text_width, model.text_layers, seed)
    plans = [
        plan_training(
            VAEObjective(vae, KL_WEIGHT), picture_batches(VAE_BATCH_SIZE), _training(vae_steps, 0, device, seed),
            "the text-to-image model's VAE",
        ),
        plan_training(
            ReadingObjective(text_encoder, seed), prompt_batches(TEXT_BATCH_SIZE, tokenizer),
            _training(text_steps, 0, device, seed), "text encoder",
        ),
    ]  # fmt: skip
    vae.requires_grad_(False).to(devices.pick(device))
    pipeline = new_pipeline(vae, text_encoder, tokenizer, model, seed)
    schedule = list(LESSONS.values())[-1]
    with unfused_attention_on_cpu(pipeline.unet, device):
        lessons = plan_training(
            DenoisingObjective(pipeline, schedule), prompted_batches(BATCH_SIZE, tokenizer, schedule),
            _training(sum(lesson_steps), 0, device, seed), "U-Net and text encoder", checkpoints=len(lesson_steps),
        )  # fmt: skip
    return [*plans, lessons]


def require_lesson_steps(
    steps: Sequence[int], lessons: Collection[str] = tuple(LESSONS), parameter: str = "lesson_steps"
) -> None:
    """Raise ValueError, naming the parameter, unless there is one number of steps, at least 1, for each lesson."""
    if len(steps) != len(lessons):
        raise ValueError(f"{parameter}: expected one for each of {', '.join(lessons)}, got {list(steps)}")
    at_least(parameter, min(steps), 1)


@contextmanager
def unfused_attention_on_cpu(network: nn.Module, device: str) -> Iterator[None]:
    """Replace PyTorch's fused attention in a network that trains on the CPU, where its backward pass is slow.

    A training step of the U-Net takes a fifth less time there. On any other device nothing changes.

    Args:
        network: a diffusers model; its processors are restored afterwards.
        device: the device in a notebook's notation, such as ``auto``.
    """
    from diffusers.models.attention_processor import AttnProcessor

    if devices.pick(device).type != "cpu":
        yield
        return
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
        precision=training_precision(device), device=device, seed=seed, checkpoint_every=100,
    )  # fmt: skip


def training_precision(device: str) -> str:
    """Return the precision in which training on a device is fastest: bfloat16, but float32 on a CPU that has no
    instructions for bfloat16, where a step takes ten times as long in bfloat16."""
    if devices.pick(device).type != "cpu":
        return "bfloat16"
    capabilities = torch.cpu.get_capabilities()
    native = any(capabilities.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16"))
    return "bfloat16" if native else "float32"


def new_vae(config: ModelConfig, seed: int = 0) -> nn.Module:
    """Make an untrained ``AutoencoderKL`` for pictures of the scene world."""
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
    """Make a ``StableDiffusionPipeline`` of a trained autoencoder and text encoder with an untrained U-Net."""
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
            # diffusers' name is misleading: it is the number of heads
            attention_head_dim=tuple(width // config.head_width for width in config.unet_channels),
            use_linear_projection=True,
            norm_num_groups=16,
        )
    return StableDiffusionPipeline(
        vae, text_encoder, tokenizer, unet, new_scheduler(), None, None, requires_safety_checker=False
    )


def new_scheduler() -> "DDIMScheduler":
    """Make the noise schedule of the denoisers shipped with the package; its last timestep is pure noise."""
    from diffusers import DDIMScheduler

    return DDIMScheduler(
        # more noise than Stable Diffusion's schedule, in which an object is still visible after three quarters
        # of the timesteps, so that only the first sampling step would need to read the prompt
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
def latent_mean_scale(vae: nn.Module) -> float:
    """Compute diffusers' ``scaling_factor``: one over the standard deviation of the posterior means.

    The U-Net is trained on the means, because a denoiser should not have to reproduce the posterior's noise.
    """
    pictures = render(sample(seed) for seed in range(SCALE_SCENES))
    parameter = next(vae.parameters())
    means = [
        models.posterior(vae, part.to(parameter.device, parameter.dtype)).mode().cpu().double()
        for part in pictures.split(32)
    ]
    return float(1 / torch.cat(means).std())
