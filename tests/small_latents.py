"""A small denoiser, and a small setting to train, for the tests of masks on latents."""

import torch
from diffusers import UNet2DModel

from vaelab.pruning.masks import LatentConfig
from vaelab.pruning.metrics import EvaluationConfig
from vaelab.pruning.train import PruningConfig
from vaelab.training.loop import TrainConfig


def small_unet(channels=4):
    with torch.random.fork_rng():
        torch.manual_seed(2)
        return UNet2DModel(
            sample_size=8, in_channels=channels, out_channels=channels, block_out_channels=(8, 16),
            layers_per_block=1, down_block_types=["DownBlock2D"] * 2, up_block_types=["UpBlock2D"] * 2,
            norm_num_groups=4, add_attention=False,
        ).eval()  # fmt: skip


def small_config(steps=2, latent=None, training=None, **changes):
    training = {"learning_rate": 3e-3, "log_every": 1, "device": "cpu", **(training or {})}
    evaluation = EvaluationConfig(loss_timesteps=3, sampler_steps=2)
    defaults = {"batch_size": 4, "vae_channels": (8, 8), "unet_channels": (8, 16), "track_every": 2}
    return PruningConfig(
        TrainConfig(steps=steps, **training), LatentConfig(**(latent or {})), evaluation, **{**defaults, **changes}
    )
