"""LPIPS (Zhang et al., 2018), an optional extra: its networks and their weights do not come with the lab."""

import importlib
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vaelab import devices
from vaelab.checks import one_of

NETS = ("alex", "vgg", "squeeze")


class Perceptual(NamedTuple):
    """LPIPS, or why there is none; made by :func:`load`."""

    model: Any
    """The network, or None."""
    why: str | None
    """Why there is no network; None where there is one."""

    @torch.no_grad()
    def distance(self, before: Tensor, after: Tensor, batch_size: int = 16) -> list[float]:
        """LPIPS of N pairs of pictures (N, 3, H, W) in [-1, 1]; not numbers where there is no network."""
        if self.model is None:
            return [float("nan")] * len(before)
        device = next(self.model.parameters()).device
        parts = zip(before.split(batch_size), after.split(batch_size), strict=True)
        return [one for x, y in parts for one in self.model(x.to(device), y.to(device)).flatten().tolist()]


def load(net: str = "alex", device: str | torch.device = "auto") -> Perceptual:
    """The network of the ``lpips`` package, if it is there and its weights can be had.

    Args:
        net: ``alex`` (the package's own choice, and here the paper's, which names none), ``vgg`` or ``squeeze``.
        device: where it runs.
    """
    one_of("lpips_net", net, NETS)
    try:
        package = importlib.import_module("lpips")
        model = package.LPIPS(net=net, verbose=False)
    except ModuleNotFoundError as error:
        return Perceptual(None, f"not measured: {error.name} is not installed (pip install vaelab[lpips])")
    except (ImportError, OSError, RuntimeError) as error:  # a torchvision of another torch; no network
        return Perceptual(None, f"not measured: {error}")
    return Perceptual(model.eval().requires_grad_(False).to(devices.pick(device)), None)
