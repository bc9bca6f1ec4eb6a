"""A denoiser's features, of prompts or of pictures, for every supported kind of pipeline.

From prompts, the pipeline runs as usual and blocks are captured at chosen steps. By default the block's
update, its output minus its input, is captured (D_out - D_in in equation 6 of Surkov et al., "Unpacking SDXL
Turbo"). From pictures, each picture is encoded, noised to a timestep and passed once through the denoiser
(Kim et al., "Revelio", section 3).
"""

import contextlib
import math
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from inspect import signature
from typing import Any, NamedTuple

import torch
from torch import Tensor
from tqdm.auto import tqdm

from vaelab.core.validate import at_least
from vaelab.models import block_names
from vaelab.models.block_names import capture_pictures, find_denoiser
from vaelab.models.conditioning import (
    add_noise,
    class_numbers,
    encode_pictures,
    encode_prompts,
    is_class_conditional,
    last_timestep,
    patch_size,
    predict,
    validate_timesteps,
)
from vaelab.models.vocabulary import report_unknown_words

__all__ = [
    "Features", "Sampling", "add_noise", "count_passes", "encode_pictures", "encode_prompts", "from_pictures",
    "from_prompts", "generate", "generate_all", "last_timestep", "maps_at_step", "predict", "validate_size",
]  # fmt: skip

OWN_ARGUMENTS = (
    "prompt", "class_labels", "generator", "num_inference_steps", "guidance_scale", "height", "width", "output_type",
    "num_images_per_prompt", "return_dict",
)  # fmt: skip
"""Arguments of a pipeline's call that the lab sets, so that :attr:`Sampling.options` must not contain them."""
SIDES = 8
"""All of diffusers' pipelines require both sides of a picture to be multiples of this number of pixels."""
OTHER_PASSES = ("timesteps", "sigmas", "denoising_end", "true_cfg_scale", "skip_guidance_layers")
"""Options that change the number of passes of the denoiser, so that passes cannot be assigned to steps."""


class Features(NamedTuple):
    """Captured tensors of blocks for a batch of B prompts or pictures."""

    maps: dict[str, list[Tensor]]
    """For each block a list of tensors (B, h, w, d): one per captured step in rising order (from prompts), or one per
    timestep in the order given (from pictures)."""
    unguided: dict[str, list[Tensor]]
    """The same for the half of the batch without the prompt, if there is classifier-free guidance; empty otherwise."""
    pictures: Tensor | None
    """The generated pictures (B, 3, H, W) in [-1, 1]; None if no pictures were requested."""


@dataclass(frozen=True)
class Sampling:
    """How pictures are generated from prompts."""

    steps: int = 4
    """Number of denoising steps that the scheduler is set to; :func:`count_passes` gives the denoiser's passes."""
    guidance_scale: float = 3.0
    """Scale of classifier-free guidance; values up to 1 switch guidance off (SDXL Turbo uses 0)."""
    height: int | None = None
    """Height of the pictures in pixels. Height and width are given together; None means the model's default size."""
    width: int | None = None
    """Width of the pictures in pixels."""
    options: dict[str, Any] = field(default_factory=dict)
    """Further arguments of the pipeline's own call."""

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
    """Generate pictures (B, 3, H, W) in [-1, 1], each from its prompt and its own seed.

    Args:
        pipeline: a diffusers pipeline.
        prompts: B prompts; for a class-conditional model class indices or class names.
        seeds: one seed per prompt, so that a picture does not depend on the batch in which it is generated.
        sampling: steps, guidance and size.

    Raises:
        ValueError: the numbers of seeds and prompts differ; a class is unknown; the model cannot make pictures of
            this size; or the pipeline also needs a picture.
    """
    with _quiet(pipeline):
        pictures = pipeline(**_call(pipeline, prompts, seeds, sampling), output_type="np").images
    return torch.from_numpy(pictures).permute(0, 3, 1, 2).contiguous() * 2 - 1


def generate_all(
    pipeline: Any, prompts: Sequence[str | int], sampling: Sampling, *, batch_size: int = 16, seed: int = 0
) -> Tensor:
    """Generate pictures (N, 3, H, W) from any number of prompts, on the CPU; picture i uses the seed ``seed + i``."""
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
    """Capture blocks while pictures are generated from prompts.

    Args:
        pipeline: a diffusers pipeline.
        prompts: B prompts; for a class-conditional model class indices or class names.
        seeds: one seed per prompt, so that its features do not depend on the batch in which they are captured.
        blocks: short names (see :func:`vaelab.models.block_names.blocks`) or module paths.
        sampling: steps, guidance and size.
        side: what to capture of each block: ``update`` (output minus input), ``output`` or ``input``; see
            :func:`vaelab.hooks.capture`.
        steps: the passes of the denoiser to capture, counted from 0; the features are in rising order. None means
            all passes (see :func:`count_passes`).
        pictures: whether to return the pictures too; if not, generation stops after the last capture.

    Raises:
        ValueError: a block is unknown, the sampling does not have one of the steps, or an option changes the number of
            passes; also the errors of :func:`generate`.
    """
    found = block_names.find_blocks(pipeline, blocks)
    n_passes = count_passes(pipeline, sampling)
    captured = sorted(set(range(n_passes) if steps is None else steps))
    if not captured or not 0 <= captured[0] <= captured[-1] < n_passes:
        raise ValueError(f"capture_steps: expected numbers from 0 to {n_passes - 1}, got {captured}")
    images = None
    model, paths = find_denoiser(pipeline), list(dict.fromkeys(found.values()))
    with capture_pictures(model, paths, side, calls=captured, stop=not pictures) as seen:
        images = generate(pipeline, prompts, seeds, sampling)
    aspect = sampling.height / sampling.width if sampling.height else block_names.own_aspect(model)
    whole = {name: [block_names.to_maps(one, aspect) for one in seen[path]] for name, path in found.items()}
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
        seeds: one seed per picture, which determines its noise; the noise is the same at every timestep.
        timesteps: timesteps from 0 (the picture) to the scheduler's last (noise).
        blocks: short names (see :func:`vaelab.models.block_names.blocks`) or module paths.
        prompts: one prompt per picture; for a class-conditional model class indices or class names. None means no
            prompt, see :func:`vaelab.models.conditioning.encode_prompts`.
        side: what to capture of each block: ``output``, ``input`` or ``update`` (output minus input); see
            :func:`vaelab.hooks.capture`.

    Raises:
        ValueError: a block or class is unknown, the scheduler does not have one of the timesteps, the model cannot
            take pictures of this size, or there is not exactly one seed (and prompt) per picture.
    """
    found = block_names.find_blocks(pipeline, blocks)
    validate_timesteps(pipeline, timesteps)
    _same_number("seeds", seeds, len(pixels))
    _same_number("prompts", pixels if prompts is None else prompts, len(pixels))
    model, paths = find_denoiser(pipeline), list(dict.fromkeys(found.values()))
    latents = encode_pictures(pipeline, pixels)
    noise = torch.stack([torch.randn(latents.shape[1:], generator=one) for one in _generators(seeds)]).to(latents)
    conditions = encode_prompts(pipeline, prompts, len(pixels), pixels.shape[-2:])
    captured: dict[str, list[Tensor]] = {name: [] for name in found}
    for timestep in timesteps:
        noisy = add_noise(pipeline, latents, noise, timestep)
        with capture_pictures(model, paths, side, stop=True) as seen:
            predict(pipeline, noisy, timestep, conditions)
        for name, path in found.items():
            captured[name].append(block_names.to_maps(seen[path][0], latents.shape[-2] / latents.shape[-1]))
    return Features(captured, {}, None)


def maps_at_step(
    pipeline: Any, prompts: Sequence[str], seeds: Sequence[int], blocks: Sequence[str], sampling: Sampling,
    step: int = 0, *, side: str = "update", batch_size: int = 16,
) -> dict[str, Tensor]:  # fmt: skip
    """Capture blocks at one pass of the denoiser for any number of prompts, batch by batch.

    Args:
        pipeline: a diffusers pipeline.
        prompts: N prompts.
        seeds: one seed per prompt.
        blocks: short names or module paths.
        sampling: steps, guidance and size.
        step: the pass, counted from 0.
        side: as in :func:`from_prompts`, whose errors are raised.
        batch_size: prompts per batch.

    Returns:
        For each block (N, h, w, d) in float32, on the CPU.
    """
    parts: dict[str, list[Tensor]] = {block: [] for block in blocks}
    for first in tqdm(range(0, len(prompts), batch_size), desc="activations"):
        part = slice(first, first + batch_size)
        found = from_prompts(
            pipeline, list(prompts[part]), list(seeds[part]), blocks, sampling, side=side, steps=[step]
        )
        for block in blocks:
            parts[block].append(found.maps[block][0].float().cpu())
    return {block: torch.cat(each) for block, each in parts.items()}


def count_passes(pipeline: Any, sampling: Sampling) -> int:
    """Count the passes of the denoiser that generate one picture.

    Most schedulers make as many passes as there are steps, n; PNDM makes n + 1, and schedulers of the second order
    make 2 n - 1.

    Raises:
        ValueError: ``sampling.options`` has an entry that changes the number of passes: ``timesteps``, ``sigmas``,
            ``denoising_end``, ``true_cfg_scale`` or ``skip_guidance_layers``.
    """
    for name in sampling.options:
        if name in OTHER_PASSES:
            raise ValueError(f"options: with {name} a step is no longer one pass, so none can be captured")
    scheduler = type(pipeline.scheduler).from_config(pipeline.scheduler.config)
    shift = {"mu": 1.0} if scheduler.config.get("use_dynamic_shifting") else {}
    scheduler.set_timesteps(sampling.steps, **shift)
    return len(scheduler.timesteps)


def validate_size(pipeline: Any, sampling: Sampling, required: int | None = None) -> None:
    """Check the size of the pictures before any is generated.

    Args:
        pipeline: a diffusers pipeline.
        sampling: its height and width are checked.
        required: the required height and width in pixels, for instance the size of the pictures that the scene reader
            (:mod:`vaelab.world.oracle`) can read; None accepts any size.

    Raises:
        ValueError: the model cannot make pictures of this size, or the size is not the required one.
    """
    model, vae = find_denoiser(pipeline), getattr(pipeline, "vae", None)
    scale = 2 ** (len(vae.config.block_out_channels) - 1) if vae else 1
    if sampling.height is None:
        own = model.config.get("sample_size") or 0
        height, width = (side * scale for side in ([own, own] if isinstance(own, int) else own))
    else:
        height, width = sampling.height, sampling.width
        rounds_by_itself = "use_resolution_binning" in signature(pipeline.__call__).parameters
        multiple = math.lcm(SIDES, 1 if rounds_by_itself else scale * patch_size(model))
        if height % multiple or width % multiple:
            raise ValueError(f"resolution: pictures of {height} x {width}; this model takes multiples of {multiple}")
    if required and height and (height, width) != (required, required):
        raise ValueError(
            f"resolution: pictures of {height} x {width}; of this dataset they must be {required} x {required}"
        )


def _halves(pipeline: Any, maps: dict[str, list[Tensor]], count: int) -> tuple[dict, dict]:
    """Split the maps into those with the prompts and those without; the latter exist if guidance doubled the batch."""
    if all(len(one) == count for ones in maps.values() for one in ones):
        return maps, {}
    first, second = ({name: [one.chunk(2)[half] for one in ones] for name, ones in maps.items()} for half in (0, 1))
    # DiT's pipeline puts the half with the prompts first, all others put it second
    return (first, second) if is_class_conditional(pipeline) else (second, first)


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
    if is_class_conditional(pipeline):
        if sampling.height is not None:
            raise ValueError("height and width: a class-conditional model makes pictures of its own size alone")
        arguments = {"class_labels": class_numbers(pipeline, prompts)}
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
