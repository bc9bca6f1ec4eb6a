"""A denoiser's features, of prompts or of pictures, for every supported kind of pipeline.

From prompts, the pipeline runs as it always does and blocks are captured at chosen steps (Surkov et
al., "Unpacking SDXL Turbo": the update D_out - D_in of equation 6). From pictures, each is encoded,
noised to a timestep and passed once through the denoiser (Kim et al., "Revelio", section 3).
"""

import contextlib
import math
from collections import ChainMap
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from inspect import signature
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from vaelab.core.validate import at_least
from vaelab.hooks import capture
from vaelab.models import block_names
from vaelab.models.block_names import denoiser, picture_entry
from vaelab.models.conditioning import add_noise, by_class, classes, condition, encode, last_timestep, patch, predict
from vaelab.models.vocabulary import report_unknown_words

__all__ = [
    "Features", "Sampling", "add_noise", "condition", "count_passes", "encode", "from_pictures", "from_prompts",
    "generate", "generate_all", "last_timestep", "predict", "validate_size",
]  # fmt: skip

OWN_ARGUMENTS = (
    "prompt", "class_labels", "generator", "num_inference_steps", "guidance_scale", "height", "width", "output_type",
    "num_images_per_prompt", "return_dict",
)  # fmt: skip
"""Arguments of a pipeline's call that cannot be among :attr:`Sampling.options`, since the lab sets them."""
SIDES = 8
"""Pixels of which both sides of a picture must be multiples in all of diffusers' pipelines."""
OTHER_PASSES = ("timesteps", "sigmas", "denoising_end", "true_cfg_scale", "skip_guidance_layers")
"""Options that change the number of passes of the denoiser, so that passes cannot be assigned to steps."""


class Features(NamedTuple):
    """Captured tensors of blocks for a batch of B prompts or pictures."""

    maps: dict[str, list[Tensor]]
    """For each block a list of tensors (B, h, w, d), one for each requested step (timestep), in that order."""
    unguided: dict[str, list[Tensor]]
    """The same for the half without the prompt, where there is classifier-free guidance; else empty."""
    pictures: Tensor | None
    """(B, 3, H, W) in [-1, 1]; None if no pictures were requested."""


@dataclass(frozen=True)
class Sampling:
    """How pictures are made from prompts."""

    steps: int = 4
    """Denoising steps."""
    guidance_scale: float = 3.0
    """Of classifier-free guidance; up to 1 there is none (SDXL Turbo: 0)."""
    height: int | None = None
    """Of the pictures, in pixels, together with the width; None takes the model's own."""
    width: int | None = None
    options: dict[str, Any] = field(default_factory=dict)
    """More arguments of the pipeline's own call."""

    def __post_init__(self) -> None:
        at_least("steps", self.steps, 1)
        at_least("guidance_scale", self.guidance_scale, 0)
        if (self.height is None) != (self.width is None):
            raise ValueError(f"height and width: expected both or neither, got {self.height} and {self.width}")
        for name in ("height", "width"):
            if getattr(self, name) is not None:
                at_least(f"resolution ({name})", getattr(self, name), 8)
        for name in self.options:
            if name in OWN_ARGUMENTS:
                raise ValueError(f"options: {name} is set by the lab; expected other arguments of the pipeline's call")


@torch.no_grad()
def generate(pipeline: Any, prompts: Sequence[str | int], seeds: Sequence[int], sampling: Sampling) -> Tensor:
    """Pictures (B, 3, H, W) in [-1, 1], each from its prompt and its own seed.

    Args:
        pipeline: a diffusers pipeline.
        prompts: B prompts; class numbers or names for a class-conditional model.
        seeds: one a prompt: a picture does not depend on the batch that it is made in.
        sampling: steps, guidance and size.

    Raises:
        ValueError: not one seed for each prompt, an unknown class, or a size for a model that has only one.
    """
    with _quiet(pipeline):
        pictures = pipeline(**_call(pipeline, prompts, seeds, sampling), output_type="np").images
    return torch.from_numpy(pictures).permute(0, 3, 1, 2).contiguous() * 2 - 1


def generate_all(
    pipeline: Any, prompts: Sequence[str | int], sampling: Sampling, *, batch_size: int = 16, seed: int = 0
) -> Tensor:
    """Pictures (N, 3, H, W) of any number of prompts, on the CPU; number i is drawn with ``seed + i``."""
    at_least("batch_size", batch_size, 1)
    at_least("prompts", len(prompts), 1)
    parts = [range(len(prompts))[first : first + batch_size] for first in range(0, len(prompts), batch_size)]
    made = [generate(pipeline, [prompts[i] for i in part], [seed + i for i in part], sampling) for part in parts]
    return torch.cat(made).cpu()


@torch.no_grad()
def from_prompts(
    pipeline: Any,
    prompts: Sequence[str | int],
    seeds: Sequence[int],
    blocks: str | Iterable[str],
    sampling: Sampling,
    *,
    side: str = "update",
    steps: Collection[int] | None = None,
    pictures: bool = False,
) -> Features:
    """Capture blocks while pictures are made.

    Args:
        pipeline: a diffusers pipeline.
        prompts: B prompts; class numbers or names for a class-conditional model.
        seeds: one a prompt: its features do not depend on the batch that it is in.
        blocks: short names (see :func:`vaelab.models.block_names.blocks`) or module paths.
        sampling: steps, guidance and size.
        side: ``update``, ``output`` or ``input`` of the block.
        steps: the captured steps, counted from 0; they are returned in rising order. None for all (see
            :func:`count_passes`).
        pictures: whether to return the pictures too; if not, the pass ends after the last capture.

    Raises:
        ValueError: an unknown block, a step that the sampling does not have, or what :func:`generate` refuses.
    """
    found = block_names.resolve(pipeline, blocks)
    n_passes = count_passes(pipeline, sampling)
    captured = sorted(set(range(n_passes) if steps is None else steps))
    if not captured or not 0 <= captured[0] <= captured[-1] < n_passes:
        raise ValueError(f"capture_steps: expected numbers from 0 to {n_passes - 1}, got {captured}")
    images = None
    model, paths = denoiser(pipeline), list(dict.fromkeys(found.values()))
    with _capture_pictures(model, paths, side, calls=captured, stop=not pictures) as seen:
        images = generate(pipeline, prompts, seeds, sampling)
    aspect = sampling.height / sampling.width if sampling.height else block_names.own_aspect(model)
    whole = {name: [block_names.maps(one, aspect) for one in seen[path]] for name, path in found.items()}
    guided, unguided = _halves(pipeline, whole, len(prompts))
    return Features(guided, unguided, images)


@torch.no_grad()
def from_pictures(
    pipeline: Any,
    pixels: Tensor,
    seeds: Sequence[int],
    timesteps: Sequence[int],
    blocks: str | Iterable[str],
    *,
    prompts: Sequence[str | int] | None = None,
    side: str = "output",
) -> Features:
    """Capture blocks in one pass of the denoiser over noised pictures, for each timestep.

    Args:
        pipeline: a diffusers pipeline.
        pixels: (B, 3, H, W) in [-1, 1].
        seeds: one a picture; they fix its noise, which is the same at every timestep.
        timesteps: from 0 (the picture) to the scheduler's last (noise).
        blocks: short names (see :func:`vaelab.models.block_names.blocks`) or module paths.
        prompts: one a picture; class numbers or names for a class-conditional model; None for none, see
            :func:`vaelab.models.conditioning.condition`.
        side: ``output``, ``input`` or ``update`` of the block.

    Raises:
        ValueError: an unknown block or class, a timestep that the scheduler does not have, a size
            that the model cannot take, or not a seed (a prompt) for each picture.
    """
    found, timesteps, last = block_names.resolve(pipeline, blocks), list(timesteps), last_timestep(pipeline)
    if not timesteps or min(timesteps) < 0 or max(timesteps) > last:
        raise ValueError(f"timesteps: expected numbers from 0 to {last}, got {timesteps}")
    _same_number("seeds", seeds, len(pixels))
    _same_number("prompts", pixels if prompts is None else prompts, len(pixels))
    model, paths = denoiser(pipeline), list(dict.fromkeys(found.values()))
    latents = encode(pipeline, pixels)
    noise = torch.stack([torch.randn(latents.shape[1:], generator=one) for one in _generators(seeds)]).to(latents)
    conditions = condition(pipeline, prompts, len(pixels), pixels.shape[-2:])
    captured: dict[str, list[Tensor]] = {name: [] for name in found}
    for timestep in timesteps:
        noisy = add_noise(pipeline, latents, noise, timestep)
        with _capture_pictures(model, paths, side, stop=True) as seen:
            predict(pipeline, noisy, timestep, conditions)
        for name, path in found.items():
            captured[name].append(block_names.maps(seen[path][0], latents.shape[-2] / latents.shape[-1]))
    return Features(captured, {}, None)


def count_passes(pipeline: Any, sampling: Sampling) -> int:
    """The number of passes of the denoiser that make a picture.

    It is the number of steps n for most schedulers, n + 1 for PNDM, and 2 n - 1 for schedulers of the second order.

    Raises:
        ValueError: an option that changes the number of passes.
    """
    for name in sampling.options:
        if name in OTHER_PASSES:
            raise ValueError(f"options: with {name} a step is no longer one pass, so none can be captured")
    scheduler = type(pipeline.scheduler).from_config(pipeline.scheduler.config)
    shift = {"mu": 1.0} if scheduler.config.get("use_dynamic_shifting") else {}
    scheduler.set_timesteps(sampling.steps, **shift)
    return len(scheduler.timesteps)


def validate_size(pipeline: Any, sampling: Sampling, only: int | None = None) -> None:
    """Check the size of the pictures before anything is drawn.

    Args:
        pipeline: a diffusers pipeline.
        sampling: gives the size.
        only: the required side in pixels, such as that of the pictures that an oracle reads; None for any.

    Raises:
        ValueError: a size that the model cannot make, or another than the required one.
    """
    model, vae = denoiser(pipeline), getattr(pipeline, "vae", None)
    scale = 2 ** (len(vae.config.block_out_channels) - 1) if vae else 1
    if sampling.height is None:
        own = model.config.get("sample_size") or 0
        height, width = (side * scale for side in ([own, own] if isinstance(own, int) else own))
    else:
        height, width = sampling.height, sampling.width
        rounds_by_itself = "use_resolution_binning" in signature(pipeline.__call__).parameters
        multiple = math.lcm(SIDES, 1 if rounds_by_itself else scale * patch(model))
        if height % multiple or width % multiple:
            raise ValueError(f"resolution: pictures of {height} x {width}; this model takes multiples of {multiple}")
    if only and height and (height, width) != (only, only):
        raise ValueError(f"resolution: pictures of {height} x {width}; of this dataset they must be {only} x {only}")


@contextlib.contextmanager
def _capture_pictures(
    model: nn.Module, paths: Sequence[str], side: str, *, calls: Collection[int] | None = None, stop: bool
) -> Iterator[Mapping[str, list[Tensor]]]:
    """Capture of each module the picture's tensor."""
    groups: dict[int, list[str]] = {}
    for path in paths:
        groups.setdefault(picture_entry(model, path), []).append(path)
    stop = stop and len(groups) == 1  # a pass that ends for one group would end before the other's last layer
    with contextlib.ExitStack() as stack:
        captures = [
            stack.enter_context(capture(model, group, side=side, entry=entry, calls=calls, stop=stop))
            for entry, group in groups.items()
        ]
        yield ChainMap(*captures)


def _halves(pipeline: Any, maps: dict[str, list[Tensor]], count: int) -> tuple[dict, dict]:
    """The maps with the prompts, and those without where the batch was doubled for guidance."""
    if all(len(one) == count for ones in maps.values() for one in ones):
        return maps, {}
    first, second = ({name: [one.chunk(2)[half] for one in ones] for name, ones in maps.items()} for half in (0, 1))
    return (first, second) if by_class(pipeline) else (second, first)  # the order of DiT's pipeline is its own


def _same_number(parameter: str, given: Sequence, count: int) -> None:
    if isinstance(given, str) or len(given) != count:
        raise ValueError(f"{parameter}: expected one for each of {count}, got {given!r}")


def _call(pipeline: Any, prompts: Sequence[str | int], seeds: Sequence[int], sampling: Sampling) -> dict[str, Any]:
    at_least("prompts", len(prompts), 1)
    accepted = signature(pipeline.__call__).parameters
    if "image" in accepted and "prompt" in accepted:
        raise ValueError(
            f"model: {type(pipeline).__name__} makes pictures from a picture and a prompt; "
            "supported are from_pictures, or a pipeline that makes them from a prompt alone"
        )
    _same_number("prompts", prompts, len(prompts))
    _same_number("seeds", seeds, len(prompts))
    if by_class(pipeline):
        if sampling.height is not None:
            raise ValueError("height and width: a class-conditional model makes pictures of its own size alone")
        arguments = {"class_labels": classes(pipeline, prompts)}
    else:
        arguments = {"prompt": [str(prompt) for prompt in prompts]}
        report_unknown_words(pipeline, arguments["prompt"])
    validate_size(pipeline, sampling)
    if sampling.height is not None:
        arguments |= {"height": sampling.height, "width": sampling.width}
    if "clean_caption" in accepted:  # cleaning depends on which packages are installed
        arguments["clean_caption"] = False
    return {
        **arguments,
        "generator": _generators(seeds),
        "num_inference_steps": sampling.steps,
        "guidance_scale": sampling.guidance_scale,
        **sampling.options,
    }


def _generators(seeds: Sequence[int]) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(int(seed)) for seed in seeds]


@contextlib.contextmanager
def _quiet(pipeline: Any) -> Iterator[None]:
    before = getattr(pipeline, "_progress_bar_config", {})
    pipeline.set_progress_bar_config(disable=True)
    try:
        yield
    finally:
        pipeline._progress_bar_config = before
