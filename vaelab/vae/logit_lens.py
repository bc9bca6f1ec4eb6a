"""The logit lens: a layer's activation decoded to a picture.

From Shi, Wang and Roshka ("Investigating the Functional Role of Learned Channel Suppression in Diffusion VAEs"),
section 4.5, after nostalgebraist's lens for language models. An untrained decoder would show its own random weights, so
here a small decoder is trained for the layer that it reads (:func:`train_lens`). It is scored on held-out pictures and
compared with a control: the same decoder trained and scored on activations that are paired with the wrong pictures.
:func:`decode_single_channel` needs no training: it runs the model's own remaining layers.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import xxhash
from torch import Tensor, nn

from vaelab import models
from vaelab.core import devices
from vaelab.core.stats import Interval
from vaelab.core.validate import at_least
from vaelab.data.images import Images
from vaelab.hooks import capture, edit
from vaelab.training.batches import NumberedBatches
from vaelab.training.checkpoint import not_finite, read_tensors, require_same_settings, write_tensors
from vaelab.training.evaluation import evaluation_mode
from vaelab.training.loop import EXECUTION_ONLY, TrainConfig, train

LENS = "lens.safetensors"
"""Name of the file of a trained lens in its folder."""
EPSILON = 1e-12
RESAMPLES = 2000
"""Number of bootstrap samples of an interval."""


class MiniDecoder(nn.Module):
    """Transposed convolutions with ReLU between them and a sigmoid at the end.

    ``groups`` decoders of the same shape are computed together and share no weight. One group decodes
    the full map; as many groups as channels decode each channel by itself.

    Args:
        channels: the number of input channels of each decoder.
        upsampling: the side of the picture divided by the side of the map, a power of two.
        width: the number of hidden channels of each decoder.
        groups: the number of decoders.

    Raises:
        ValueError: ``width`` is below 1, or ``upsampling`` is not a power of two.
    """

    def __init__(self, channels: int, upsampling: int, *, width: int = 32, groups: int = 1):
        super().__init__()
        at_least("width", width, 1)
        if upsampling < 1 or upsampling & (upsampling - 1):
            raise ValueError(f"upsampling: expected a power of two, got {upsampling}")
        self.options = {"channels": channels, "upsampling": upsampling, "width": width, "groups": groups}
        self.groups = groups
        widths = [channels, *[width] * max(1, upsampling.bit_length() - 1), 3]
        layers: list[nn.Module] = []
        for number, (inputs, outputs) in enumerate(pairwise(widths)):
            doubles = number < upsampling.bit_length() - 1
            size, stride, padding = (4, 2, 1) if doubles else (3, 1, 1)
            layers += [
                nn.ConvTranspose2d(inputs * groups, outputs * groups, size, stride, padding, groups=groups),
                nn.ReLU(),
            ]
        self.layers = nn.Sequential(*layers[:-1], nn.Sigmoid())
        self.register_buffer("shift", torch.zeros(1, channels * groups, 1, 1))
        self.register_buffer("scale", torch.ones(1, channels * groups, 1, 1))

    def fit_standardization(self, activations: Tensor) -> None:
        """Standardize each channel by its mean and standard deviation in activations (N, groups x channels, H, W).

        Without it the decoder could not read a channel with small values, whatever information the channel holds.
        """
        std, mean = torch.std_mean(activations, dim=(0, 2, 3), keepdim=True, correction=0)
        self.shift.copy_(mean)
        self.scale.copy_(1 / std.clamp(min=EPSILON))

    def forward(self, activation: Tensor) -> Tensor:
        """Decode activations (N, groups x channels, H, W) to pictures (N, groups, 3, R, R) in [0, 1]."""
        return self.layers((activation - self.shift) * self.scale).unflatten(1, (self.groups, 3))


class LensScore(NamedTuple):
    """How well held-out pictures are decoded; each field has the shape (groups,)."""

    r2: np.ndarray
    """1 - squared error / squared error of the mean training picture: 0 is the score without any information."""
    psnr: np.ndarray
    """10 log10(1 / MSE) of pictures in [0, 1], in dB."""


class Lens(NamedTuple):
    """A trained mini-decoder with its scores."""

    decoder: MiniDecoder
    score: LensScore
    shuffled: LensScore
    """The control: the same decoder trained and scored on activations paired with the wrong pictures."""
    channels: list[int] | None
    """The channel that each decoder reads; None means one decoder of the full map."""


class _LensObjective(nn.Module):
    def __init__(self, decoder: MiniDecoder):
        super().__init__()
        self.decoder = decoder

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        target = batch["pictures"].unsqueeze(1)
        # the sum over decoders trains each by its own mean squared error, since they share no weight
        return {"loss": (self.decoder(batch["activation"]) - target).square().mean(dim=(0, 2, 3, 4)).sum()}


@torch.no_grad()
def layer_activations(vae: nn.Module, layer: str, images: Images, batch_size: int) -> tuple[Tensor, Tensor]:
    """Capture a layer's activations for a data set, with the pictures.

    Args:
        vae: an autoencoder.
        layer: the path of one of its layers, whose output is (B, C, H, W).
        images: the data set.
        batch_size: pictures per batch.

    Returns:
        float32 activations (N, C, H, W) and pictures (N, 3, R, R) in [0, 1], on the CPU.

    Raises:
        ValueError: the layer runs more than once, or its output has another shape.
    """
    activations, pictures = [], []
    parameter = next(vae.parameters())
    with evaluation_mode(vae), capture(vae, layer, to="cpu") as captured:
        for batch in images.batches(batch_size):
            models.reconstruct(vae, batch["pixels"].to(parameter.device, parameter.dtype))
            (calls,) = captured.values()
            if len(calls) != 1 or calls[0].dim() != 4:
                raise ValueError(f"layer: {layer!r} must be one layer that runs once and gives (B, C, H, W)")
            activations.append(calls[0].float())
            pictures.append((batch["pixels"] + 1) / 2)
            captured.clear()
    return torch.cat(activations), torch.cat(pictures)


def train_lens(
    learning: tuple[Tensor, Tensor],
    held_out: tuple[Tensor, Tensor],
    config: TrainConfig,
    *,
    channels: Sequence[int] | None = None,
    width: int = 32,
    batch_size: int = 32,
    folder: str | Path | None = None,
) -> Lens:
    """Train a lens for one layer, and its shuffled control.

    Args:
        learning: activations (N, C, H, W) and pictures (N, 3, R, R) in [0, 1] from
            :func:`layer_activations`; those of several models, concatenated, train a shared lens.
        held_out: activations and pictures of held-out pictures, in the same form, to score on.
        config: how to train each of the two decoders.
        channels: decode each of these channels separately; None decodes the full map.
        width: the number of hidden channels of a decoder.
        batch_size: pictures per batch.
        folder: where the lens is saved. If a lens trained on the same activations and pictures with the same settings
            is there, it is loaded and nothing is trained. None saves nothing.

    Raises:
        ValueError: the layer does not have one of the channels; or the lens in ``folder`` is damaged, has a NaN or
            infinite weight, or was trained on other data or with other settings.
        FloatingPointError: the loss, or a weight that would be saved, is not finite.
    """
    chosen = list(channels) if channels is not None else None
    settings = _lens_settings(learning, held_out, config, chosen, width, batch_size) if folder else {}
    if folder and Path(folder, LENS).exists():
        lens = load_lens(folder, settings)
        lens.decoder.to(devices.pick(config.device))
        return lens
    (maps, pictures), (held_maps, held_pictures) = (_select_channels(pair, chosen) for pair in (learning, held_out))
    upsampling = pictures.shape[-1] // maps.shape[-1]
    rng = np.random.default_rng(config.seed)
    order, held_order = rng.permutation(len(maps)), rng.permutation(len(held_maps))
    lenses = []
    pairings = {"lens": (pictures, held_pictures), "shuffled": (pictures[order], held_pictures[held_order])}
    for name, (paired, held_paired) in pairings.items():
        torch.manual_seed(config.seed)
        groups = len(chosen) if chosen else 1
        decoder = MiniDecoder(maps.shape[1] // groups, upsampling, width=width, groups=groups)
        decoder.fit_standardization(maps)
        batches = _batches(maps, paired, batch_size, config.seed)
        train(_LensObjective(decoder), batches, config, title=f"lens ({name})")
        lenses.append((decoder, _score(decoder, held_maps, held_paired, pictures.mean(dim=0))))
    (decoder, score), (_, shuffled) = lenses
    lens = Lens(decoder, score, shuffled, chosen)
    if folder:
        save_lens(lens, folder, settings)
    return lens


def save_lens(lens: Lens, folder: str | Path, settings: dict[str, Any] | None = None) -> None:
    """Save a lens as ``lens.safetensors`` with a checksum, atomically.

    Args:
        lens: a trained lens.
        folder: where to save it.
        settings: everything that determines the lens, as plain JSON; :func:`load_lens` compares it.

    Raises:
        FloatingPointError: a weight or score is NaN or infinite; nothing is written.
    """
    path = Path(folder, LENS)
    tensors = {f"decoder/{name}": value for name, value in lens.decoder.state_dict().items()}
    for name, score in (("score", lens.score), ("shuffled", lens.shuffled)):
        tensors |= {f"{name}/{measure}": torch.from_numpy(values) for measure, values in score._asdict().items()}
    if bad := not_finite(tensors):
        raise FloatingPointError(f"{bad} of the lens is NaN or infinite; {path} was not written")
    write_tensors(path, tensors, {"lens": lens.decoder.options, "channels": lens.channels, "settings": settings or {}})


def load_lens(folder: str | Path, settings: dict[str, Any] | None = None) -> Lens:
    """Load what :func:`save_lens` saved, with the decoder on the CPU in evaluation mode.

    Args:
        folder: where the lens was saved.
        settings: the settings with which the lens must have been saved; None accepts any settings.

    Raises:
        ValueError: the file is missing, damaged or foreign, was saved with other settings, or has a NaN or infinite
            weight.
    """
    path = Path(folder, LENS)
    tensors, documents = read_tensors(path)
    if not {"lens", "channels", "settings"} <= documents.keys():
        raise ValueError(f"{path} is no lens")
    if settings is not None:
        require_same_settings(path, documents["settings"], settings)
    if bad := not_finite(tensors):
        raise ValueError(f"{path} cannot be used: {bad} is NaN or infinite")
    try:
        decoder = MiniDecoder(**documents["lens"])
        decoder.load_state_dict({n.removeprefix("decoder/"): t for n, t in tensors.items() if n.startswith("decoder/")})
        score, shuffled = (
            LensScore(**{measure: tensors[f"{name}/{measure}"].numpy() for measure in LensScore._fields})
            for name in ("score", "shuffled")
        )
    except (RuntimeError, KeyError, TypeError) as error:
        raise ValueError(f"{path} does not hold the tensors of its lens ({error})") from error
    return Lens(decoder.eval(), score, shuffled, documents["channels"])


def extreme_channels(maps: Tensor, count: int) -> list[int]:
    """Find the ``count`` most active and the ``count`` least active channels of activations (N, C, H, W) by mean
    absolute activation, in descending order; all channels if the layer has fewer than 2 ``count``."""
    order = maps.abs().mean(dim=(0, 2, 3)).argsort(descending=True).tolist()
    return list(dict.fromkeys([*order[:count], *order[-count:]]))


@torch.no_grad()
def apply_lens(lens: Lens, activation: Tensor) -> Tensor:
    """Decode an activation with a lens.

    Args:
        lens: a lens from :func:`train_lens` or :func:`load_lens`.
        activation: the activation of all channels of the layer, (N, C, H, W).

    Returns:
        Pictures (N, groups, 3, R, R) in [-1, 1], on the CPU: one group, or a group for each of the lens's channels.
    """
    device = next(lens.decoder.parameters()).device
    maps = activation[:, lens.channels] if lens.channels is not None else activation
    return lens.decoder(maps.float().to(device)).cpu() * 2 - 1


@torch.no_grad()
def r2_interval(lens: Lens, maps: Tensor, pictures: Tensor, mean_picture: Tensor, *, seed: int = 0) -> Interval:
    """Compute R^2 of pictures decoded by a lens of the full map, with a 95 % bootstrap interval over pictures.

    Args:
        lens: a lens of the full map.
        maps: the layer's activations (N, C, H, W); with one picture the interval's ends are NaN.
        pictures: (N, 3, R, R) in [0, 1].
        mean_picture: (3, R, R), the mean training picture, which has R^2 = 0.
        seed: determines the resampled pictures.
    """
    errors = _errors(lens.decoder, maps, pictures)[:, 0].double().numpy()
    totals = (pictures - mean_picture).square().mean(dim=(1, 2, 3)).double().numpy()
    value = float(1 - errors.sum() / max(totals.sum(), EPSILON))
    if len(errors) < 2:
        return Interval(value, float("nan"), float("nan"))
    drawn = np.random.default_rng(seed).integers(len(errors), size=(RESAMPLES, len(errors)))
    ratios = 1 - errors[drawn].sum(1) / np.maximum(totals[drawn].sum(1), EPSILON)
    return Interval(value, *np.quantile(ratios, (0.025, 0.975)).tolist())


def describe_scores(layer: str, scores: Mapping[str, Interval], full: Lens, single: Lens) -> str:
    """Describe in one sentence how well held-out pictures are decoded.

    Args:
        layer: the layer's path.
        scores: R^2 by model, from :func:`r2_interval`.
        full: the lens of the full map.
        single: the lens of single channels.
    """
    ends = {
        name: "" if math.isnan(each.low) else f", {each.low:.3g} to {each.high:.3g}" for name, each in scores.items()
    }
    values = ", ".join(f"{each.mean:.3g} ({name}{ends[name]})" for name, each in scores.items())
    best, worst = single.score.r2.argmax(), single.score.r2.argmin()
    return (
        f"A lens on {layer} decodes held-out pictures with an R^2 of {values}; its control, trained on the wrong "
        f"pictures, has {full.shuffled.r2[0]:.2g}. Of the channels decoded alone, {single.channels[best]} is the best "
        f"({single.score.r2[best]:.2g}) and {single.channels[worst]} the worst ({single.score.r2[worst]:.2g})."
    )


@torch.no_grad()
def decode_single_channel(vae: nn.Module, layer: str, pixels: Tensor, channel: int | None, *, keep: bool) -> Tensor:
    """Decode one channel of a layer by the model's own remaining layers: a lens that needs no training.

    Args:
        vae: an autoencoder.
        layer: the path of one of its layers, whose output is (B, C, H, W).
        pixels: pictures (B, 3, R, R) in [-1, 1].
        channel: the index of the channel; None decodes all channels, which gives the reconstruction.
        keep: True replaces every other channel by its mean over batch and positions (mean ablation);
            False replaces only this channel.

    Returns:
        Pictures (B, 3, R, R).

    Raises:
        ValueError: the layer does not have this channel.
    """

    def ablate(activation: Tensor) -> Tensor:
        if channel is None:
            return activation
        if not 0 <= channel < activation.shape[1]:
            raise ValueError(f"channel: {layer} has channels 0 to {activation.shape[1] - 1}, got {channel}")
        mean = activation.mean(dim=(0, 2, 3), keepdim=True).expand_as(activation)
        ablated = (mean if keep else activation).clone()
        ablated[:, channel] = (activation if keep else mean)[:, channel]
        return ablated

    parameter = next(vae.parameters())
    with evaluation_mode(vae), edit(vae, {layer: ablate}):
        return models.reconstruct(vae, pixels.to(parameter.device, parameter.dtype)).float()


def _lens_settings(
    learning: tuple[Tensor, Tensor],
    held_out: tuple[Tensor, Tensor],
    config: TrainConfig,
    channels: list[int] | None,
    width: int,
    batch_size: int,
) -> dict[str, Any]:
    """Everything that determines a lens, as plain JSON; activations and pictures are represented by checksums."""
    settings = {name: value for name, value in asdict(config).items() if name not in EXECUTION_ONLY}
    settings |= {"channels": channels, "width": width, "batch_size": batch_size}
    for name, (maps, pictures) in (("learning", learning), ("held_out", held_out)):
        settings |= {f"{name}.activations": _checksum(maps), f"{name}.pictures": _checksum(pictures)}
    return json.loads(json.dumps(settings))


def _checksum(values: Tensor) -> str:
    digest = xxhash.xxh3_128(f"{values.dtype} {tuple(values.shape)}".encode())
    for row in values:  # row by row: a whole copy of the activations may not fit
        digest.update(row.contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def _select_channels(pair: tuple[Tensor, Tensor], channels: list[int] | None) -> tuple[Tensor, Tensor]:
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
    total = (pictures - mean_picture).square().mean().item()
    mse = _errors(decoder, maps, pictures).mean(dim=0).double().numpy()
    return LensScore(1 - mse / max(total, EPSILON), 10 * np.log10(1 / np.maximum(mse, EPSILON)))


def _errors(decoder: MiniDecoder, maps: Tensor, pictures: Tensor) -> Tensor:
    """The mean squared errors (N, groups) of decoded pictures."""
    device = next(decoder.parameters()).device
    return torch.cat([
        (decoder(part.to(device)).cpu() - shown.unsqueeze(1)).square().mean(dim=(2, 3, 4))
        for part, shown in zip(maps.split(64), pictures.split(64), strict=True)
    ])  # fmt: skip
