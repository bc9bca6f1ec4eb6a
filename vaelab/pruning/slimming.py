"""What taking channels of a latent away saves in time and memory, measured."""

import weakref
from collections.abc import Callable, Sequence
from typing import Any

import pandas as pd
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from vaelab import bench, removal
from vaelab.data import Images
from vaelab.latents import PruningObjective
from vaelab.masked_measures import latents_of
from vaelab.removal import Narrowed

PARTS = ("denoise", "decode")
TIMESTEP = 500
TIMED = 16


def of_trained(objective: PruningObjective, images: Images, rounds: int, seed: int) -> pd.DataFrame:
    """:func:`savings` of a trained objective on ``TIMED`` latents of ``images``, the least used channels
    removed first, whether or not they are off."""
    _, seen, mask = latents_of(objective, images, seed)
    order = mask.mean(0).argsort(descending=True).tolist()
    return savings(objective.vae, objective.unet, order, seen[:TIMED], rounds)


def savings(vae: nn.Module, unet: nn.Module, order: Sequence[int], latents: Tensor, rounds: int) -> pd.DataFrame:
    """One denoising step and one decoding, with fewer and fewer channels.

    Args:
        vae: an ``AutoencoderKL``.
        unet: its denoiser, a ``UNet2DModel``.
        order: the channels, the one to keep longest first.
        latents: (B, c, h, w) that are denoised and decoded.
        rounds: how often each is timed, in turns.

    Returns:
        A row a ``part`` (``denoise``, ``decode``) and number of channels ``kept``, and one for the whole
        model's ``twin``: ``parameters``, ``peak_bytes``, ``milliseconds`` (median), and ``saved`` with
        ``saved_low`` and ``saved_high``, the time against the whole model in percent of it, median and
        quartiles of the paired differences.
    """
    whole, device, rows = Narrowed(vae, unet), latents.device, []
    models = {"whole": whole, "twin": whole}
    models |= {str(count): removal.remove(vae, unet, order[:count]) for count in range(len(order) - 1, 0, -1)}
    for part in PARTS:
        actions = {name: _action(part, model, latents) for name, model in models.items()}
        seconds = bench.interleaved(actions, rounds, device=device)
        for name, model in models.items():
            longer, low, high = bench.paired_percent(seconds, name, "whole")
            own = model.unet if part == "denoise" else model.vae.decoder
            rows.append({
                "part": part, "kept": len(order) if name in ("whole", "twin") else int(name), "twin": name == "twin",
                "parameters": sum(parameter.numel() for parameter in own.parameters()),
                "peak_bytes": peak_bytes(actions[name], device), "milliseconds": 1000 * seconds[name].median(),
                "saved": -longer, "saved_low": -high, "saved_high": -low,
            })  # fmt: skip
    return pd.DataFrame(rows)


def peak_bytes(action: Callable[[int], object], device: torch.device) -> int:
    """The most memory that ``action`` holds at once beyond what was held before it: on a GPU as its
    allocator counts, on a CPU what its tensors take."""
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
    """Counts the bytes of all tensors that live at once, of those made inside it; what an operation needs
    for itself is not seen."""

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
