"""The tools for autoencoders at the size of SDXL, without its weights: seconds and memory of each.

A U-Net with SDXL's configuration (2.6 billion parameters) gets random weights in bfloat16. Vectors of one of its
blocks are collected, an autoencoder of the paper's size is trained on them for a few steps, its features are scored,
and one of them is steered. Text models and VAE are small, since the autoencoders do not depend on them.

Run it as ``python -m vaelab.bench.full_size``. It needs about 8 GB.
"""

import resource
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vaelab.activations import collect
from vaelab.activations.denoiser import Sampling
from vaelab.core import devices
from vaelab.data.prompts import load_prompts
from vaelab.sae.feature_statistics import collect_statistics
from vaelab.sae.metrics import evaluate_dictionaries
from vaelab.sae.model import SAEConfig
from vaelab.sae.steering import Directions, Steerer, modulate
from vaelab.sae.sweep import iterate_vectors
from vaelab.sae.train import SAESpec, store_batches, train_saes
from vaelab.store.format import BlockShape
from vaelab.training import TrainConfig

SDXL = {
    "sample_size": 64, "in_channels": 4, "out_channels": 4, "block_out_channels": (320, 640, 1280),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"), "layers_per_block": 2,
    "attention_head_dim": (5, 10, 20), "transformer_layers_per_block": (1, 2, 10), "cross_attention_dim": 2048,
    "use_linear_projection": True, "addition_embed_type": "text_time", "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}  # fmt: skip
"""Configuration of SDXL Turbo's U-Net."""
TILE = 1_048_573
"""Number of different random weights; longer tensors repeat them. It is prime, so that no two rows are the same."""


class _WideLinear(nn.Linear):
    """A linear layer that computes in float32 with weights in half precision."""

    def forward(self, x: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.float()
        return F.linear(x.float(), self.weight.float(), bias).to(x.dtype)


class _WideConv(nn.Conv2d):
    """A convolution that computes in float32 with weights in half precision."""

    def forward(self, x: Tensor) -> Tensor:
        return self._conv_forward(x.float(), self.weight.float(), self.bias.float()).to(x.dtype)


def random_unet(config: dict[str, Any], dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> nn.Module:
    """Make a U-Net with random weights, without ever holding them in float32.

    On a CPU its linear layers and convolutions compute in float32, one layer at a time: many CPUs have no instructions
    for bfloat16, and torch's convolution is then a hundred times as slow.

    Args:
        config: the arguments of ``diffusers.UNet2DConditionModel``.
        dtype: the type of the weights.
        seed: determines the weights.
    """
    import diffusers

    with torch.device("meta"):
        unet = diffusers.UNet2DConditionModel(**config)
    unet = unet.to(dtype).to_empty(device="cpu").eval().requires_grad_(False)
    tile = torch.randn(TILE, generator=torch.Generator().manual_seed(seed))
    for name, weight in unet.named_parameters():
        if weight.ndim > 1:
            scaled, flat = (tile * weight[0].numel() ** -0.5).to(dtype), weight.view(-1)
            for first in range(0, len(flat), TILE):
                flat[first : first + TILE] = scaled[: len(flat) - first]
        else:
            weight.fill_(1.0 if name.endswith("weight") else 0.0)
    for module in unet.modules():
        kinds = {nn.Linear: _WideLinear, nn.Conv2d: _WideConv}
        if type(module) in kinds:
            module.__class__ = kinds[type(module)]
    return unet


def random_sdxl(config: dict[str, Any], seed: int = 0) -> Any:
    """Make a ``StableDiffusionXLPipeline`` with a U-Net of :func:`random_unet`, small text models and a small VAE.

    Args:
        config: the U-Net's configuration; half of ``cross_attention_dim`` is the width of each text model.
        seed: determines the weights.
    """
    import diffusers
    import transformers

    from vaelab import models

    tokenizer, texts = models.load_pipeline("embedded", device="cpu").tokenizer, []
    pooled = config["projection_class_embeddings_input_dim"] - 6 * config["addition_time_embed_dim"]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for kind in (transformers.CLIPTextModel, transformers.CLIPTextModelWithProjection):
            size = config["cross_attention_dim"] // 2
            texts.append(kind(transformers.CLIPTextConfig(
                vocab_size=len(tokenizer), hidden_size=size, intermediate_size=size, projection_dim=pooled,
                num_hidden_layers=2, num_attention_heads=2, max_position_embeddings=tokenizer.model_max_length,
                bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
                pad_token_id=tokenizer.pad_token_id,
            )))  # fmt: skip
        vae = diffusers.AutoencoderKL(
            block_out_channels=(8,) * 4, down_block_types=["DownEncoderBlock2D"] * 4, latent_channels=4,
            up_block_types=["UpDecoderBlock2D"] * 4, layers_per_block=1, norm_num_groups=4,
        )  # fmt: skip
    scheduler = diffusers.EulerAncestralDiscreteScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", timestep_spacing="trailing"
    )
    half = [part.to(torch.bfloat16).eval().requires_grad_(False) for part in (vae, *texts)]
    return diffusers.StableDiffusionXLPipeline(
        vae=half[0], text_encoder=half[1], text_encoder_2=half[2], tokenizer=tokenizer, tokenizer_2=tokenizer,
        unet=random_unet(config, seed=seed), scheduler=scheduler, add_watermarker=False,
    )  # fmt: skip


def measure_full_size(
    config: dict[str, Any] = SDXL, *, block: str = "down.2.1", side: int = 512, prompts: int = 2,
    n_features: int = 5120, k: int = 10, steps: int = 5, progress: Callable[[str], None] = print,
) -> pd.DataFrame:  # fmt: skip
    """Measure every stage at the size of SDXL.

    Args:
        config: the U-Net's configuration.
        block: the block.
        side: side of the pictures in pixels; one denoising step without guidance.
        prompts: number of prompts to collect.
        n_features: size of the autoencoder.
        k: its active features.
        steps: training steps.
        progress: called with a line for each stage.

    Returns:
        One row per stage: ``stage``, ``seconds`` (wall clock), ``cpu_seconds``, and ``peak_gb``, the largest memory of
        the process so far.

    Raises:
        RuntimeError: vectors or pictures are not finite.
    """
    rows: list[dict[str, Any]] = []
    started = [time.perf_counter(), _cpu_seconds()]

    def done(stage: str) -> None:
        now = [time.perf_counter(), _cpu_seconds()]
        seconds = [after - before for after, before in zip(now, started, strict=True)]
        peak = devices.peak_memory(torch.device("cpu")) / 1e9
        rows.append({"stage": stage, "seconds": seconds[0], "cpu_seconds": seconds[1], "peak_gb": peak})
        progress(f"{stage}: {seconds[0]:.1f} s, {seconds[1]:.1f} CPU seconds, peak {peak:.2f} GB")
        started[:] = [time.perf_counter(), _cpu_seconds()]

    sampling = Sampling(1, 0.0, side, side)
    texts = load_prompts("world", count=prompts).texts
    pipeline = random_sdxl(config)
    done("make the U-Net")
    settings = collect.CollectConfig((block,), sampling, batch_size=1, precision="bfloat16")
    with tempfile.TemporaryDirectory() as folder:
        trial = next(collect.capture_batches(pipeline, texts[:1], settings))
        done("collect one prompt")
        layout = {name: BlockShape(tuple(x.shape[1:-1]), x.shape[-1]) for name, x in trial.maps.items()}
        stored = collect.collect_prompts(
            pipeline, texts, settings, Path(folder, "store"), layout=layout, items_per_prompt=1, progress=False
        )
        done(f"collect {prompts} prompts into a store")
        vectors = min(256, stored.rows(block))
        spec = SAESpec(block, SAEConfig(layout[block].width, n_features, k))
        trained = train_saes(
            {"sae": spec}, store_batches(stored, [block], vectors, 0),
            TrainConfig(steps, 1e-4, clip_norm=0.0, device="cpu", log_every=steps),
        )  # fmt: skip
        sae = trained.saes["sae"]
        done(f"train {steps} steps of {vectors} vectors, {n_features} features")
        fidelity = evaluate_dictionaries({"sae": sae}, iterate_vectors(stored, block))["sae"]
        statistics = collect_statistics(sae, stored, block)
        (feature,) = statistics.most_active(1)
        done("score all features")
    steerer = Steerer(pipeline, {block: Directions.of(sae, statistics)})
    steered = steerer.generate(texts[:1], [[modulate(block, feature, 5.0)]], sampling, [0], batch_size=1)
    done("generate one steered picture")
    if not (torch.isfinite(steered).all() and -1e9 < fidelity.explained_variance <= 1):
        raise RuntimeError("full_size: pictures or vectors are not finite")
    return pd.DataFrame(rows)


def _cpu_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


if __name__ == "__main__":
    print(measure_full_size().to_string(index=False))
