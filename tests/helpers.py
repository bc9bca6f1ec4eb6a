"""What several test modules need: pictures, and a small VAE with silent channels, on disk."""

import io
import multiprocessing
import resource
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import PIL.Image
import torch

# one server for each process that runs tests; its children have these imports and the environment that it began with
CHILDREN = multiprocessing.get_context("forkserver")
PRELOADED = [
    "accelerate", "datasets", "diffusers.models.autoencoders.autoencoder_kl", "ipykernel.kernelapp",
    "matplotlib.pyplot", "papermill", "sklearn.datasets", "torchmetrics.image", "vaelab.runner.cli",
    "vaelab.runner.forked", "vaelab.store.reader", "vaelab.vae.finetune",
]  # fmt: skip
CHILDREN.set_forkserver_preload(PRELOADED)
SILENT = {"decoder.conv_norm_out": (1, 3), "encoder.mid_block.resnets.0.norm1": (0, 2, 5)}


def pixels(index: int = 0, size: tuple[int, int] = (20, 16)) -> np.ndarray:
    """Random RGB values of a picture of ``size`` (width, height)."""
    return np.random.default_rng(index).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)


def png(index: int = 0, size: tuple[int, int] = (20, 16)) -> bytes:
    buffer = io.BytesIO()
    PIL.Image.fromarray(pixels(index, size)).save(buffer, "PNG")
    return buffer.getvalue()


def picture_folder(folder: Path, names: list[str]) -> Path:
    for index, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(png(index))
    return folder


@torch.no_grad()
def save_silenced(vae: torch.nn.Module, folder: Path) -> Path:
    """Save ``vae`` with the scales and shifts of the channels in SILENT at almost 0."""
    for layer, channels in SILENT.items():
        norm = vae.get_submodule(layer)
        norm.weight[list(channels)] = 2e-3
        norm.bias[list(channels)] = 0
    vae.save_pretrained(folder)
    return folder


def without_groupnorm() -> torch.nn.Module:
    """A relative of the VAE that has no GroupNorm and no posterior."""
    from diffusers import AutoencoderTiny

    blocks = {"encoder_block_out_channels": (8, 8), "decoder_block_out_channels": (8, 8)}
    return AutoencoderTiny(**blocks, num_encoder_blocks=(1, 1), num_decoder_blocks=(1, 1), upsampling_scaling_factor=2)


@contextmanager
def files_of_at_most(size):
    """No file may grow beyond ``size`` bytes: what is beyond is refused, as by a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
