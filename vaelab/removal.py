"""Taking channels of a latent away for good.

A channel that is off for every picture need not be encoded, denoised or decoded: the convolutions that
write and read the latent lose its weights. All that lies between them stays.
"""

import copy
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn


class Narrowed(NamedTuple):
    """A VAE and a denoiser whose latent has the kept channels only."""

    vae: nn.Module
    unet: nn.Module


def remove(vae: nn.Module, unet: nn.Module, kept: Sequence[int]) -> Narrowed:
    """Copies of an ``AutoencoderKL`` and its ``UNet2DModel`` without the channels that are not ``kept``.

    The narrow decoder gives of (B, k, h, w) what the whole one gives of the same with zeros in the other
    channels, the narrow encoder's posterior is the whole one's in the kept channels, and so for the
    denoiser.

    Raises:
        ValueError: a channel there is not, or none kept.
    """
    channels = vae.config.latent_channels
    strange = [channel for channel in kept if not 0 <= channel < channels]
    if strange or not kept or len(set(kept)) < len(kept):
        raise ValueError(f"kept: expected different channels from 0 to {channels - 1}, got {list(kept)}")
    index = torch.tensor(sorted(kept))
    vae, unet = copy.deepcopy(vae), copy.deepcopy(unet)
    writer = (vae, "quant_conv") if vae.quant_conv is not None else (vae.encoder, "conv_out")
    reader = (vae, "post_quant_conv") if vae.post_quant_conv is not None else (vae.decoder, "conv_in")
    _narrow(*writer, outputs=torch.cat([index, channels + index]))  # means, then log variances
    _narrow(*reader, inputs=index)
    _narrow(unet, "conv_in", inputs=index)
    _narrow(unet, "conv_out", outputs=index)
    vae.register_to_config(latent_channels=len(index))
    unet.register_to_config(in_channels=len(index), out_channels=len(index))
    return Narrowed(vae, unet)


def _narrow(
    owner: nn.Module, name: str, *, inputs: Tensor | slice = slice(None), outputs: Tensor | slice = slice(None)
) -> None:
    whole = getattr(owner, name)
    weight = whole.weight.detach()[outputs][:, inputs]
    narrow = nn.Conv2d(
        weight.shape[1], weight.shape[0], whole.kernel_size, whole.stride, whole.padding, bias=whole.bias is not None
    ).to(weight)
    narrow.weight.data.copy_(weight)
    if whole.bias is not None:
        narrow.bias.data.copy_(whole.bias.detach()[outputs])
    setattr(owner, name, narrow)
