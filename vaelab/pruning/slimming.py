"""Remove channels of a latent permanently, and measure what that saves in time and memory.

A channel that is inactive for every picture need not be encoded, denoised or decoded: its weights are removed from the
convolutions that write and read the latent. All other layers stay unchanged.
"""

import copy
import weakref
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import pandas as pd
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from vaelab.core import timing
from vaelab.data.images import Images
from vaelab.pruning.masks import PruningObjective
from vaelab.pruning.metrics import sample_latents
from vaelab.training import evaluation_mode

PARTS = ("denoise", "decode")
TIMESTEP = 500
TIMED = 16
"""Number of latents that are denoised and decoded at a time."""


class Narrowed(NamedTuple):
    """A VAE and a denoiser whose latent has only the kept channels."""

    vae: nn.Module
    unet: nn.Module


def remove_channels(vae: nn.Module, unet: nn.Module, kept: Sequence[int]) -> Narrowed:
    """Copy an ``AutoencoderKL`` and its ``UNet2DModel``, keeping only the latent channels ``kept``.

    The narrow models compute the same values as the whole ones: the narrow decoder and denoiser, given (B, k, h, w), as
    the whole ones given zeros in the removed channels; and the narrow encoder's posterior equals the whole encoder's in
    the kept channels.

    Raises:
        ValueError: a channel does not exist or occurs twice, or no channel is kept.
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


def measure_savings(objective: PruningObjective, images: Images, rounds: int, seed: int) -> pd.DataFrame:
    """Make the :func:`savings_table` of a trained objective on ``TIMED`` latents of ``images``; the channels with the
    smallest mean mask are removed first, whether or not they are inactive."""
    _, seen, mask = sample_latents(objective, images, seed)
    order = mask.mean(0).argsort(descending=True).tolist()
    return savings_table(objective.vae, objective.unet, order, seen[:TIMED], rounds)


def savings_table(vae: nn.Module, unet: nn.Module, order: Sequence[int], latents: Tensor, rounds: int) -> pd.DataFrame:
    """Measure one denoising step and one decoding with fewer and fewer channels.

    Args:
        vae: an ``AutoencoderKL``.
        unet: the denoiser of its latents, a ``UNet2DModel``.
        order: the channels; the last one is removed first.
        latents: the latents (B, c, h, w) that are denoised and decoded.
        rounds: how often each model is timed; the models take turns.

    Returns:
        One row per ``part`` (``denoise``, ``decode``) and number of channels ``kept``, and a second row for the whole
        model (``repeat``): ``parameters``, ``peak_bytes``, ``milliseconds`` (median), and ``saved`` with ``saved_low``
        and ``saved_high``: the time saved in percent of the whole model's time, as median and quartiles of the paired
        differences.
    """
    with evaluation_mode(vae, unet):
        return _compared(Narrowed(vae, unet), order, latents, rounds)


def _compared(whole: Narrowed, order: Sequence[int], latents: Tensor, rounds: int) -> pd.DataFrame:
    device, rows = latents.device, []
    models = {"whole": whole, "repeat": whole}
    models |= {str(count): remove_channels(*whole, order[:count]) for count in range(len(order) - 1, 0, -1)}
    for part in PARTS:
        actions = {name: _action(part, model, latents) for name, model in models.items()}
        seconds = timing.interleaved(actions, rounds, device=device)
        for name, model in models.items():
            longer, low, high = timing.paired_percent(seconds, name, "whole")
            own = model.unet if part == "denoise" else model.vae.decoder
            rows.append({
                "part": part, "kept": model.vae.config.latent_channels, "repeat": name == "repeat",
                "parameters": sum(parameter.numel() for parameter in own.parameters()),
                "peak_bytes": peak_memory_bytes(actions[name], device), "milliseconds": 1000 * seconds[name].median(),
                "saved": -longer, "saved_low": -high, "saved_high": -low,
            })  # fmt: skip
    return pd.DataFrame(rows)


def peak_memory_bytes(action: Callable[[int], object], device: torch.device) -> int:
    """Measure the peak memory of ``action`` in bytes, beyond what was in use before: on a GPU as counted by its
    allocator, on a CPU the memory of its tensors."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        action(0)
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    with _Held() as held:
        action(0)
    return held.peak


class _Held(TorchDispatchMode):
    """Counts the bytes of all tensors made inside this context that exist at the same time; memory that an operation
    uses internally is not counted."""

    def __init__(self):
        super().__init__()
        self.peak, self._now, self._alive = 0, 0, set()

    def __torch_dispatch__(
        self, function: Callable, types: Any, arguments: tuple = (), named: dict | None = None
    ) -> Any:
        made = function(*arguments, **(named or {}))
        for tensor in tree_leaves(made):
            if isinstance(tensor, Tensor) and (storage := tensor.untyped_storage())._cdata not in self._alive:
                self._alive.add(storage._cdata)
                self._now += storage.nbytes()
                self.peak = max(self.peak, self._now)
                weakref.finalize(storage, self._gone, storage._cdata, storage.nbytes())
        return made

    def _gone(self, key: int, size: int) -> None:
        self._alive.discard(key)
        self._now -= size


def _action(part: str, model: Narrowed, latents: Tensor) -> Callable[[int], object]:
    own = latents[:, : model.unet.config.in_channels].contiguous()
    if part == "denoise":
        return torch.no_grad()(lambda _: model.unet(own, TIMESTEP).sample)
    return torch.no_grad()(lambda _: model.vae.decode(own).sample)
