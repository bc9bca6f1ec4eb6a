"""The logit lens: what a layer's activation looks like as a picture.

From Shi, Wang and Roshka, section 4.5, after nostalgebraist's lens for language models. A lens
through an untrained decoder shows the decoder, so here the mini-decoder is trained for the layer
it reads and scored on held-out pictures, beside the same decoder trained and scored on
activations that belong to other pictures. Where it can, :func:`through_model` needs no training.
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from vaelab import models
from vaelab.core.validate import at_least
from vaelab.data.images import Images
from vaelab.hooks import capture, edit
from vaelab.training.batches import NumberedBatches
from vaelab.training.evaluation import evaluation_mode
from vaelab.training.loop import TrainConfig, train

EPSILON = 1e-12


class MiniDecoder(nn.Module):
    """Transposed convolutions with ReLU between them and a Sigmoid at the end.

    ``groups`` decoders of the same shape lie side by side and share nothing: with one, it reads
    the full map; with as many as channels, each reads its own channel alone.

    Args:
        channels: input channels to each of the decoders.
        upsampling: the factor from the map's side to the picture's, a power of two.
        width: hidden channels of each decoder.
        groups: how many decoders.
    """

    def __init__(self, channels: int, upsampling: int, *, width: int = 32, groups: int = 1):
        super().__init__()
        at_least("width", width, 1)
        if upsampling < 1 or upsampling & (upsampling - 1):
            raise ValueError(f"upsampling: expected a power of two, got {upsampling}")
        self.groups = groups
        widths = [channels, *[width] * max(1, upsampling.bit_length() - 1), 3]
        layers: list[nn.Module] = []
        for place, (taken, given) in enumerate(pairwise(widths)):
            doubles = place < upsampling.bit_length() - 1
            size, stride, padding = (4, 2, 1) if doubles else (3, 1, 1)
            layers += [
                nn.ConvTranspose2d(taken * groups, given * groups, size, stride, padding, groups=groups),
                nn.ReLU(),
            ]
        self.layers = nn.Sequential(*layers[:-1], nn.Sigmoid())
        self.register_buffer("shift", torch.zeros(1, channels * groups, 1, 1))
        self.register_buffer("scale", torch.ones(1, channels * groups, 1, 1))

    def standardise(self, activations: Tensor) -> None:
        """Take each channel's mean and deviation from these activations (N, groups x channels, H, W).

        Without it the decoder could not see a channel whose scale is small, however much it says.
        """
        std, mean = torch.std_mean(activations, dim=(0, 2, 3), keepdim=True, correction=0)
        self.shift.copy_(mean)
        self.scale.copy_(1 / std.clamp(min=EPSILON))

    def forward(self, activation: Tensor) -> Tensor:
        """Pictures (N, groups, 3, R, R) in [0, 1] from activations (N, groups x channels, H, W)."""
        return self.layers((activation - self.shift) * self.scale).unflatten(1, (self.groups, 3))


class LensScore(NamedTuple):
    """How well held-out pictures are read off; each (groups,)."""

    r2: np.ndarray
    """1 - squared error over that of the mean training picture: 0 is what knowing nothing gets."""
    psnr: np.ndarray
    """10 log10(1 / MSE) of pictures in [0, 1], in dB."""


class Lens(NamedTuple):
    """A trained mini-decoder with its scores."""

    decoder: MiniDecoder
    score: LensScore
    shuffled: LensScore
    """Of the same decoder trained and scored on activations paired with the wrong pictures."""
    channels: list[int] | None
    """What the decoders read, one each; None is the full map."""


class _LensObjective(nn.Module):
    def __init__(self, decoder: MiniDecoder):
        super().__init__()
        self.decoder = decoder

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        target = batch["pictures"].unsqueeze(1)
        # summed over the decoders, which share no weight: each has its own mean squared error
        return {"loss": (self.decoder(batch["activation"]) - target).square().mean(dim=(0, 2, 3, 4)).sum()}


@torch.no_grad()
def layer_activations(vae: nn.Module, layer: str, images: Images, batch_size: int) -> tuple[Tensor, Tensor]:
    """A layer's activations for a data set, with its pictures.

    Args:
        vae: an autoencoder; ``layer`` is a path in it whose output is (B, C, H, W).
        layer: the layer.
        images: what to run.
        batch_size: pictures at a time.

    Returns:
        float32 activations (N, C, H, W) and pictures (N, 3, R, R) in [0, 1], on the CPU.
    """
    seen, shown = [], []
    parameter = next(vae.parameters())
    with evaluation_mode(vae), capture(vae, layer, to="cpu") as captured:
        for batch in images.batches(batch_size):
            models.reconstruct(vae, batch["pixels"].to(parameter.device, parameter.dtype))
            (calls,) = captured.values()
            if len(calls) != 1 or calls[0].dim() != 4:
                raise ValueError(f"layer: {layer!r} must be one layer that runs once and gives (B, C, H, W)")
            seen.append(calls[0].float())
            shown.append((batch["pixels"] + 1) / 2)
            captured.clear()
    return torch.cat(seen), torch.cat(shown)


def train_lens(
    learning: tuple[Tensor, Tensor],
    held_out: tuple[Tensor, Tensor],
    config: TrainConfig,
    *,
    channels: Sequence[int] | None = None,
    width: int = 32,
    batch_size: int = 32,
) -> Lens:
    """Train a lens for one layer, and its shuffled control.

    Args:
        learning: activations (N, C, H, W) and pictures (N, 3, R, R) in [0, 1], see
            :func:`activations`; of several models, concatenated, for panels that share a lens.
        held_out: the same, to score on.
        config: how to train each of the two decoders.
        channels: read each of these channels by a decoder of its own; None reads the full map.
        width: hidden channels of a decoder.
        batch_size: pictures to a batch.
    """
    taken = list(channels) if channels is not None else None
    (maps, pictures), (held_maps, held_pictures) = (_taking(pair, taken) for pair in (learning, held_out))
    upsampling = pictures.shape[-1] // maps.shape[-1]
    rng = np.random.default_rng(config.seed)
    order, held_order = rng.permutation(len(maps)), rng.permutation(len(held_maps))
    lenses = []
    pairings = {"lens": (pictures, held_pictures), "shuffled": (pictures[order], held_pictures[held_order])}
    for name, (paired, held_paired) in pairings.items():
        torch.manual_seed(config.seed)
        groups = len(taken) if taken else 1
        decoder = MiniDecoder(maps.shape[1] // groups, upsampling, width=width, groups=groups)
        decoder.standardise(maps)
        batches = _batches(maps, paired, batch_size, config.seed)
        train(_LensObjective(decoder), batches, config, title=f"lens ({name})")
        lenses.append((decoder, _score(decoder, held_maps, held_paired, pictures.mean(dim=0))))
    (decoder, score), (_, shuffled) = lenses
    return Lens(decoder, score, shuffled, taken)


def extreme_channels(maps: Tensor, count: int) -> list[int]:
    """The ``count`` most active and the ``count`` least active channels of (N, C, H, W) maps, by
    their mean absolute activation; fewer where there are not as many."""
    order = maps.abs().mean(dim=(0, 2, 3)).argsort(descending=True).tolist()
    return list(dict.fromkeys([*order[:count], *order[-count:]]))


@torch.no_grad()
def apply_lens(lens: Lens, activation: Tensor) -> Tensor:
    """Look through a lens.

    Args:
        lens: from :func:`fit`.
        activation: (N, C, H, W), all channels of the layer.

    Returns:
        Pictures (N, groups, 3, R, R) in [-1, 1], on the CPU: a group a channel, or one group.
    """
    device = next(lens.decoder.parameters()).device
    taken = activation[:, lens.channels] if lens.channels is not None else activation
    return lens.decoder(taken.float().to(device)).cpu() * 2 - 1


@torch.no_grad()
def decode_single_channel(vae: nn.Module, layer: str, pixels: Tensor, channel: int | None, *, keep: bool) -> Tensor:
    """The lens that needs no training: a channel pushed through the model's own remaining layers.

    Args:
        vae: an autoencoder.
        layer: a layer of it whose output is (B, C, H, W).
        pixels: (B, 3, R, R) in [-1, 1].
        channel: which channel; None pushes the full map through, which is the reconstruction.
        keep: True keeps this channel's map and holds every other at its mean over batch and
            positions; False holds this channel alone.

    Returns:
        Pictures (B, 3, R, R).
    """

    def held(activation: Tensor) -> Tensor:
        if channel is None:
            return activation
        if not 0 <= channel < activation.shape[1]:
            raise ValueError(f"channel: {layer} has channels 0 to {activation.shape[1] - 1}, got {channel}")
        flat = activation.mean(dim=(0, 2, 3), keepdim=True).expand_as(activation)
        mixed = (flat if keep else activation).clone()
        mixed[:, channel] = (activation if keep else flat)[:, channel]
        return mixed

    parameter = next(vae.parameters())
    with evaluation_mode(vae), edit(vae, {layer: held}):
        return models.reconstruct(vae, pixels.to(parameter.device, parameter.dtype)).float()


def _taking(pair: tuple[Tensor, Tensor], channels: list[int] | None) -> tuple[Tensor, Tensor]:
    maps, pictures = pair
    if channels is not None:
        beyond = [channel for channel in channels if not 0 <= channel < maps.shape[1]]
        if beyond or not channels:
            raise ValueError(f"channels: the layer has channels 0 to {maps.shape[1] - 1}, got {channels}")
        maps = maps[:, channels]
    return maps, pictures


def _batches(maps: Tensor, pictures: Tensor, batch_size: int, seed: int) -> NumberedBatches:
    def draw(number: int) -> dict[str, Tensor]:
        rows = np.random.default_rng([seed, number]).integers(0, len(maps), batch_size)
        return {"activation": maps[rows], "pictures": pictures[rows]}

    return NumberedBatches(draw)


@torch.no_grad()
def _score(decoder: MiniDecoder, maps: Tensor, pictures: Tensor, mean_picture: Tensor) -> LensScore:
    device = next(decoder.parameters()).device
    errors, total = [], (pictures - mean_picture).square().mean().item()
    for part, shown in zip(maps.split(64), pictures.split(64), strict=True):
        read_off = decoder(part.to(device)).cpu()
        errors.append((read_off - shown.unsqueeze(1)).square().mean(dim=(2, 3, 4)))
    mse = torch.cat(errors).mean(dim=0).double().numpy()
    return LensScore(1 - mse / max(total, EPSILON), 10 * np.log10(1 / np.maximum(mse, EPSILON)))
