"""Steering: features turned up, down or on while pictures are generated.

A block's update D is its output minus its input (Surkov et al., "Unpacking SDXL Turbo", equation 6). S is the
activation of a feature at a position, f its decoder vector, mu its mean positive activation, and k the number of
active features at each position. The amount a is the strength times a unit: S, mu or k mu. The strength is the paper's
beta (equation 10) or gamma (equation 11; not the scale of a GroupNorm). The new update is

======== =================================== ==========================================================
way      new update                          use
======== =================================== ==========================================================
add      D + a f                             with a = beta S: activation modulation (equation 10)
replace  D - S f + a f                       what the feature wrote is removed, the new amount is written
clamp    D - S f + min(a, largest seen) f    the same, and the amount is at most the largest seen in data
only     a f                                 with a = gamma k mu: activation on the empty prompt (equation 11)
======== =================================== ==========================================================

Vectors are added to the update itself; the autoencoder's reconstruction is never used. Steering that adds nothing
(``add`` with strength 0, or ``replace`` with S itself) leaves the pictures as they are, bit for bit.
"""

import contextlib
import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import count
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vaelab import activations
from vaelab.activations.denoiser import Sampling
from vaelab.core.validate import at_least, one_of, unknown
from vaelab.hooks import edit
from vaelab.models.block_names import (
    example_outputs,
    find_blocks,
    find_denoiser,
    own_aspect,
    picture_entry,
    to_maps,
)
from vaelab.models.conditioning import is_class_conditional
from vaelab.sae.baselines import Dictionary
from vaelab.sae.feature_statistics import FeatureStatistics
from vaelab.sae.model import Codes
from vaelab.sae.transcoder import Transcoder

WAYS = ("add", "replace", "clamp", "only")
UNITS = ("activation", "mean", "k_mean")
HALVES = ("both", "guided", "unguided")


@dataclass(frozen=True, eq=False)
class Steering:
    """One feature of one block, and what is done with it."""

    block: str
    """The block's short name."""
    feature: int
    """The feature's number."""
    strength: float
    """The amount, as a multiple of ``unit``: beta of equation 10, gamma of equation 11."""
    way: str = "add"
    """``add``, ``replace``, ``clamp`` or ``only``; see the module."""
    unit: str = "activation"
    """``activation``: the feature's own activation at each position. ``mean``: its mean positive activation mu.
    ``k_mean``: k mu, since this feature stands in for the usual k."""
    mask: Tensor | None = None
    """(H, W): the weight of the change at each position, from 0 (none) to 1 (full); resized to the block's
    positions. None means 1 everywhere."""
    steps: tuple[int, ...] = ()
    """Passes of the denoiser, counted from 0; empty means all."""
    half: str = "both"
    """Which half of the batch is steered with classifier-free guidance: ``guided`` (with the prompt), ``unguided``
    or ``both``."""

    def __post_init__(self) -> None:
        one_of("way", self.way, WAYS)
        one_of("unit", self.unit, UNITS)
        one_of("half", self.half, HALVES)
        if isinstance(self.feature, bool) or not isinstance(self.feature, int) or self.feature < 0:
            raise ValueError(f"feature: expected a whole number, at least 0, got {self.feature!r}")
        if not math.isfinite(self.strength):
            raise ValueError(f"strength: expected a finite number, got {self.strength}")
        if len(set(self.steps)) < len(self.steps) or any(step < 0 for step in self.steps):
            raise ValueError(f"steps: expected different numbers, at least 0, got {list(self.steps)}")
        if self.mask is not None and (
            self.mask.ndim != 2 or not ((self.mask >= 0) & (self.mask <= 1)).all() or not self.mask.numel()
        ):
            raise ValueError(f"mask: expected (H, W) with numbers in [0, 1], got {tuple(self.mask.shape)}")


def modulate(block: str, feature: int, beta: float, **options: Any) -> Steering:
    """Activation modulation (equation 10): D + beta S f. With beta = -1 the feature is switched off."""
    return Steering(block, feature, beta, "add", "activation", **options)


def activate_alone(block: str, feature: int, gamma: float, **options: Any) -> Steering:
    """Activation with all other features of the block off (equation 11): gamma k mu f; the paper does it on the empty
    prompt."""
    return Steering(block, feature, gamma, "only", "k_mean", **options)


def turn_on(block: str, feature: int, strength: float, way: str = "add", **options: Any) -> Steering:
    """Turn a feature on at positions where it need not be active (Figures 9 and 10): by strength mu."""
    return Steering(block, feature, strength, way, "mean", **options)


class Directions(NamedTuple):
    """Directions of a block's update that can be steered."""

    dictionary: Dictionary
    """An autoencoder, or a dictionary with the same functions."""
    mean: Tensor
    """(n,) mu, the mean positive activation of each direction; 0 for those that were never active."""
    largest: Tensor
    """(n,): the largest activation of each direction."""
    k: float
    """The number of directions that are active at a position."""

    @classmethod
    def of(cls, sae: Any, statistics: FeatureStatistics) -> "Directions":
        """Take an autoencoder and the statistics of its features.

        Raises:
            ValueError: the statistics have another number of features.
        """
        if statistics.n_features != sae.config.n_features:
            raise ValueError(
                f"statistics: of {statistics.n_features} features, but the autoencoder has {sae.config.n_features}"
            )
        return cls(sae, statistics.mean_activation(), statistics.largest_activation(), sae.config.k)

    @torch.no_grad()
    def written_by(self, feature: int) -> Tensor:
        """Return what an activation of 1 adds to the reconstruction: (d,) float32."""
        device, n = getattr(self.dictionary, "device", "cpu"), len(self.mean)
        values = torch.zeros(2, n, device=device)
        values[1, feature] = 1
        one, nothing = torch.ones(2, 1, device=device), torch.zeros(2, 1, device=device)
        codes = Codes(values, torch.arange(n, device=device).expand(2, n), one, nothing)
        off, on = self.dictionary.decode(codes)
        return (on - off).float()


class Steerer:
    """Generates pictures from prompts with features steered."""

    def __init__(self, pipeline: Any, directions: Mapping[str, Directions]):
        """Take a pipeline, and for each block the directions that can be steered.

        Raises:
            ValueError: a block is unknown or has no update, its vectors are of another width than the dictionary's, or
                the dictionary is a transcoder.
        """
        self._pipeline, self._directions, self._model = pipeline, dict(directions), find_denoiser(pipeline)
        self._paths = find_blocks(pipeline, list(directions))
        shapes = example_outputs(pipeline, list(dict.fromkeys(self._paths.values())), side="update")
        for block, own in self._directions.items():
            if isinstance(own.dictionary, Transcoder):
                raise ValueError(
                    f"saes: that of {block} is a transcoder; only features of a block's update are steered"
                )
            shape, width = shapes[self._paths[block]].shape, own.dictionary.features().shape[-1]
            there = shape[1] if len(shape) == 4 else shape[-1]
            if there != width:
                raise ValueError(f"saes: the autoencoder of {block} is for vectors of {width} numbers; it has {there}")

    def validate(self, steerings: Iterable[Steering], sampling: Sampling) -> None:
        """Check what is asked for one picture, before anything is generated.

        Raises:
            ValueError: a block has no autoencoder, a feature does not exist or was never active, a step is beyond the
                last one, a half is requested although there is no guidance, or ``only`` is combined with another way.
        """
        ways: dict[str, set[bool]] = {}
        for one in steerings:
            if one.block not in self._directions:
                raise unknown("block (with an autoencoder)", one.block, self._directions)
            own = self._directions[one.block]
            features = len(own.mean)
            if one.feature >= features:
                raise ValueError(f"feature: {one.block} has features 0 to {features - 1}, got {one.feature}")
            if not own.mean[one.feature]:
                raise ValueError(
                    f"feature: {one.feature} of {one.block} was never active in the activations, so it has no mean "
                    "activation and nothing to steer"
                )
            passes = activations.count_passes(self._pipeline, sampling) if one.steps else 0
            if one.steps and max(one.steps) >= passes:
                raise ValueError(f"steps: expected numbers from 0 to {passes - 1}, got {list(one.steps)}")
            if one.half != "both" and sampling.guidance_scale <= 1:
                raise ValueError(f"half: {one.half!r} needs guidance; guidance_scale is {sampling.guidance_scale}")
            ways.setdefault(one.block, set()).add(one.way == "only")
        for block, found in ways.items():
            if len(found) > 1:
                raise ValueError(f"way: 'only' replaces the whole update of {block}, so it excludes the other ways")

    def generate(
        self, prompts: Sequence[str | int], steerings: Sequence[Sequence[Steering]], sampling: Sampling,
        seeds: Sequence[int], *, batch_size: int = 16,
    ) -> Tensor:  # fmt: skip
        """Generate pictures (N, 3, H, W) in [-1, 1] on the CPU, each with its own steering.

        Args:
            prompts: N prompts; the empty prompt is ``""``.
            steerings: for each picture what is steered, in any number of blocks; an empty list changes nothing.
            sampling: steps, guidance and size.
            seeds: N seeds.
            batch_size: pictures per batch.

        Raises:
            ValueError: the numbers of prompts, steerings and seeds differ; see also :meth:`validate`; or a strength
                gives numbers that are not finite.
        """
        at_least("batch_size", batch_size, 1)
        if not len(prompts) == len(steerings) == len(seeds):
            raise ValueError(f"steerings: got {len(steerings)}, with {len(prompts)} prompts and {len(seeds)} seeds")
        for each in steerings:
            self.validate(each, sampling)
        parts = [slice(begin, begin + batch_size) for begin in range(0, len(prompts), batch_size)]
        return torch.cat([self._batch(prompts[p], steerings[p], sampling, seeds[p]) for p in parts]).cpu()

    def _batch(
        self, prompts: Sequence[str | int], steerings: Sequence[Sequence[Steering]], sampling: Sampling,
        seeds: Sequence[int],
    ) -> Tensor:  # fmt: skip
        blocks = list(dict.fromkeys(one.block for each in steerings for one in each))
        aspect = sampling.height / sampling.width if sampling.height else own_aspect(self._model)
        with contextlib.ExitStack() as stack:
            for block in blocks:
                path, function = self._paths[block], self._function(block, steerings, aspect)
                entry = picture_entry(self._pipeline, path)
                stack.enter_context(edit(self._model, {path: function}, side="update", entry=entry))
            pictures = activations.generate(self._pipeline, prompts, seeds, sampling)
        for i, picture in enumerate(pictures):
            if not picture.isfinite().all():
                strengths = ", ".join(f"{one.strength:g}" for one in steerings[i]) or "none"
                raise ValueError(f"strength: the picture of {prompts[i]!r} is not finite (strengths: {strengths})")
        return pictures

    def _function(
        self, block: str, steerings: Sequence[Sequence[Steering]], aspect: float
    ) -> Callable[[Tensor], Tensor]:
        """Make the function that changes the block's update in each pass of the denoiser."""
        own, calls = self._directions[block], count()
        requests = [[one for one in each if one.block == block] for each in steerings]
        written = {one.feature: own.written_by(one.feature) for each in requests for one in each}
        guided_first = is_class_conditional(self._pipeline)

        def change(update: Tensor) -> Tensor:
            step, size = next(calls), len(requests)
            new = update
            for i in range(len(update)):
                guided = len(update) == size or (i < size) == guided_first
                active = [one for one in requests[i % size] if _applies(one, step, guided)]
                if active:
                    new = update.clone() if new is update else new
                    new[i] = steer_update(update[i], active, own, written, aspect)
            return new

        return change


def steer_update(
    update: Tensor, steerings: Collection[Steering], own: Directions, written: Mapping[int, Tensor], aspect: float = 1.0
) -> Tensor:
    """Steer the update of one picture.

    Args:
        update: the map (d, h, w), or the tokens (n, d).
        steerings: what is done; all of one block.
        own: the block's directions.
        written: for each feature what an activation of 1 writes, (d,).
        aspect: height / width of the picture, which determines the grid of tokens.

    Returns:
        The new update, in the shape and precision of the old one.

    Raises:
        ValueError: the new update is not finite.
    """
    is_map = update.ndim == 3
    vectors = update.flatten(1).T if is_map else update  # (n, d)
    grid = to_maps(update[None], aspect).shape[1:3]
    old = vectors.float()
    codes = own.dictionary.encode(old)
    scale = torch.ones_like(old[:, :1]) if codes.scale is None else codes.scale
    change, kept = torch.zeros_like(old), torch.ones_like(old[:, :1])
    for one in steerings:
        seen = (codes.values * (codes.indices == one.feature)).sum(-1, keepdim=True)  # S, (n, 1)
        mu = float(own.mean[one.feature])
        amount = one.strength * {"activation": seen, "mean": mu, "k_mean": own.k * mu}[one.unit]
        if one.way == "clamp":
            amount = torch.as_tensor(amount, device=old.device).clamp_max(float(own.largest[one.feature]))
        if one.way in ("replace", "clamp"):
            amount = amount - seen
        mask = _positions(one.mask, grid).to(old) if one.mask is not None else torch.ones_like(kept)
        change += mask * amount * scale * written[one.feature].to(old.device)
        if one.way == "only":
            kept = torch.minimum(kept, 1 - mask)
    new = kept * old + change
    if not new.isfinite().all() or not new.to(update.dtype).isfinite().all():
        strengths = ", ".join(f"{one.strength:g}" for one in steerings)
        raise ValueError(
            f"strength: the update of {next(iter(steerings)).block} is not finite (strengths: {strengths})"
        )
    new = torch.where(new == old, vectors, new.to(update.dtype))
    return new.T.reshape(update.shape) if is_map else new


def _applies(one: Steering, step: int, guided: bool) -> bool:
    return (not one.steps or step in one.steps) and one.half in ("both", "guided" if guided else "unguided")


def _positions(mask: Tensor, grid: Sequence[int]) -> Tensor:
    """Average a mask (H, W) over the positions of a grid: (h w, 1)."""
    return torch.nn.functional.adaptive_avg_pool2d(mask.float()[None, None], tuple(grid)).flatten()[:, None]
