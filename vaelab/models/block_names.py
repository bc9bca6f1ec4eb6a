"""A denoiser's blocks by the papers' short names, their shapes, and example inputs for each kind of denoiser.

``down.2.1``, ``mid.0`` and ``up.0.1`` are cross-attention transformer blocks of a U-Net (Surkov et al., "Unpacking
SDXL Turbo", Figure 2). ``bottleneck`` is the U-Net's middle, and ``up_ft0`` to ``up_ft3`` are the stages of its upward
half; ``block14`` is a block of a transformer (Kim et al., "Revelio").
"""

import fnmatch
import json
import math
from collections import ChainMap
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from vaelab.core.validate import unknown
from vaelab.hooks import capture

PROMPT_TOKENS = 77
FLUX_TOKENS = (64, 64)
"""The grid of tokens of a picture of FLUX's default size: latents of 128 x 128, in patches of 2 x 2."""
DENOISERS = ("unet", "transformer")
"""The attributes in which pipelines hold their denoiser."""
PICTURE = -1
"""Index of the picture's tensor in a block's output; blocks with a text stream return the text's tensor first."""
TEXT_LAYERS = (
    "context_embedder", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out", "norm_added_q", "norm_added_k",
    "caption_projection", "encoder_hid_proj",
)  # fmt: skip
"""Names of modules that work on the prompt; modules whose name ends in ``_context`` do too."""
_example_outputs: dict[tuple[type, str, tuple[str, ...], str], dict[str, Tensor]] = {}
"""What :func:`example_outputs` has found, by the denoiser's class and configuration, the layers and the side: a pass on
the meta device takes half a second for a small model and several for a large one."""
LARGEST_ROUNDING = 1.15
"""Largest accepted ratio between a token grid's aspect ratio and the picture's: a model's stages round their sides."""


class Block(NamedTuple):
    """A block that can be captured or edited."""

    path: str
    """The module's path inside the denoiser."""
    shape: tuple[int, int, int]
    """(height, width, channels) of the block's output for a picture of the model's default size."""


def architecture(model: nn.Module | type) -> str | None:
    """Return the name of the supported denoiser class that a module (or class) is or inherits from; None if it is not
    supported."""
    kind = model if isinstance(model, type) else type(model)
    return next((base.__name__ for base in kind.__mro__ if base.__name__ in EXAMPLES), None)


def find_denoiser(pipeline: Any) -> nn.Module:
    """Return a pipeline's U-Net or transformer; a denoiser is returned unchanged.

    Raises:
        ValueError: the pipeline has no denoiser, or its denoiser is not supported.
    """
    parts = [pipeline] if isinstance(pipeline, nn.Module) else [getattr(pipeline, name, None) for name in DENOISERS]
    found = next((part for part in parts if part is not None), None)
    if architecture(found) is None:
        what = "no denoiser" if found is None else f"{type(found).__name__} for its denoiser"
        raise ValueError(f"model: {type(pipeline).__name__} has {what}; supported are {', '.join(EXAMPLES)}")
    return found


def paths_by_name(pipeline: Any) -> dict[str, str]:
    """Return the module path of each block by its short name, in the order in which the blocks run."""
    model = find_denoiser(pipeline)
    if hasattr(model, "mid_block"):
        return _unet_paths(model)
    return {
        f"{short}{i}": f"{stack}.{i}"
        for stack, short in (("transformer_blocks", "block"), ("single_transformer_blocks", "single"))
        for i in range(len(getattr(model, stack, ())))
    }


def _unet_paths(unet: nn.Module) -> dict[str, str]:
    from diffusers.models import Transformer2DModel

    def transformers(short: str, path: str) -> dict[str, str]:
        attentions = getattr(unet.get_submodule(path), "attentions", None) or []
        return {
            f"{short}.{i}": f"{path}.attentions.{i}"
            for i, module in enumerate(attentions)
            if isinstance(module, Transformer2DModel)
        }

    found = {}
    for i in range(len(unet.down_blocks)):
        found |= transformers(f"down.{i}", f"down_blocks.{i}")
    found |= {**transformers("mid", "mid_block"), "bottleneck": "mid_block"}
    for i in range(len(unet.up_blocks)):
        found |= {**transformers(f"up.{i}", f"up_blocks.{i}"), f"up_ft{i}": f"up_blocks.{i}"}
    return found


def blocks(pipeline: Any) -> dict[str, Block]:
    """List every named block with its shape, in the order in which the blocks run.

    The shapes come from a pass on the meta device, which computes no values and takes no memory.

    Args:
        pipeline: a diffusers pipeline, or its U-Net or transformer.

    Raises:
        ValueError: the denoiser is not supported.
    """
    model, found = find_denoiser(pipeline), paths_by_name(pipeline)
    seen, aspect = example_outputs(model, list(found.values())), own_aspect(model)
    return {name: Block(path, tuple(to_maps(seen[path], aspect).shape[1:])) for name, path in found.items()}


def example_outputs(pipeline: Any, layers: Sequence[str], side: str = "output") -> dict[str, Tensor]:
    """Find the picture's outputs of layers for one picture of the model's default size, by module path: tensors on the
    meta device, which have shapes but no values.

    Args:
        pipeline: a diffusers pipeline, or its U-Net or transformer.
        layers: module paths.
        side: ``output``, ``input`` or ``update`` (output minus input).

    Raises:
        ValueError: the side is ``update`` and a layer's output and input differ in shape, or a layer has no output of
            the picture alone, see :func:`picture_entry`.
    """
    model = find_denoiser(pipeline)
    key = type(model), json.dumps(dict(model.config), default=str, sort_keys=True), tuple(layers), side
    if key in _example_outputs:
        return dict(_example_outputs[key])
    with torch.device("meta"), torch.no_grad():
        shape_only = type(model).from_config(dict(model.config)).to("meta").eval()
        inputs = EXAMPLES[architecture(model)](shape_only.config)
        try:
            with capture_pictures(shape_only, layers, side) as seen:
                shape_only(**inputs)
        except RuntimeError as error:
            raise ValueError(f"blocks: {error}") from error
    _example_outputs[key] = {layer: calls[0] for layer, calls in seen.items()}
    return dict(_example_outputs[key])


@contextmanager
def capture_pictures(
    model: nn.Module, layers: Sequence[str], side: str, *, calls: Collection[int] | None = None, stop: bool = False
) -> Iterator[Mapping[str, list[Tensor]]]:
    """Capture the picture's tensor of each layer while the ``with`` block runs. Layers with a text stream return
    several tensors, see :func:`picture_entry`.

    Args:
        model: the denoiser.
        layers: module paths.
        side: ``output``, ``input`` or ``update`` (output minus input).
        calls: the calls of each layer to capture, see :func:`vaelab.hooks.capture`.
        stop: whether the model's forward pass is stopped as soon as every layer has run, if that is possible.

    Yields:
        For every layer the list of its calls, in order.

    Raises:
        ValueError: a layer has no tensor of the picture alone; also the errors of :func:`vaelab.hooks.capture`.
    """
    groups: dict[int, list[str]] = {}
    for layer in layers:
        groups.setdefault(picture_entry(model, layer), []).append(layer)
    stop = stop and len(groups) == 1  # stopping after the last layer of one group could miss layers of the other
    with ExitStack() as stack:
        captures = [
            stack.enter_context(capture(model, group, side=side, entry=entry, calls=calls, stop=stop))
            for entry, group in groups.items()
        ]
        yield ChainMap(*captures)


def picture_entry(pipeline: Any, path: str) -> int:
    """Return the index of the picture's tensor among a module's output tensors.

    The kind of module determines it, not the shapes, which may be equal: blocks with a text stream return (text,
    picture), all other modules return the picture's tensor first.

    Raises:
        ValueError: the module works on text, or on text and picture in one sequence.
    """
    model = find_denoiser(pipeline)
    if path in paths_by_name(model).values():
        return PICTURE
    if any(part.endswith("_context") or part in TEXT_LAYERS for part in path.split(".")):
        raise ValueError(f"blocks: {path} works on the text's tokens; expected a layer of the picture's")
    if architecture(model) == "FluxTransformer2DModel" and path.startswith("single_transformer_blocks."):
        raise ValueError(
            f"blocks: {path} works on the tokens of text and picture in one sequence; take the whole block"
        )
    return 0


def own_aspect(model: nn.Module) -> float:
    """Return the aspect ratio (height / width) of the pictures that a denoiser makes by default."""
    height, width = _sides(model.config.get("sample_size") or 1)
    return height / width


def find_blocks(pipeline: Any, names: str | Iterable[str], parameter: str = "blocks") -> dict[str, str]:
    """Find the module paths of blocks, in the order of ``names``.

    Args:
        pipeline: a diffusers pipeline, or its U-Net or transformer.
        names: short names, globs of short names (``up.*``), or module paths.
        parameter: the notebook parameter that gave the names; error messages begin with it.

    Raises:
        ValueError: a name is unknown (the error lists the nearest names), a glob matches nothing, or ``names`` is
            empty.
    """
    names = [names] if isinstance(names, str) else list(names)
    if not names:
        raise ValueError(f"{parameter}: expected at least one, got none")
    model, known = find_denoiser(pipeline), paths_by_name(pipeline)
    modules = {path for path, _ in model.named_modules() if path}
    found: dict[str, str] = {}
    for name in names:
        matched = [name] if name in known or name in modules else fnmatch.filter(known, name)
        if not matched:
            raise unknown(parameter, name, [*known, *modules] if "_" in name or name.count(".") > 2 else known)
        found |= {one: known.get(one, one) for one in matched}
    return found


def to_maps(tensor: Tensor, aspect: float = 1.0) -> Tensor:
    """Arrange a block's output as maps (B, h, w, d).

    Args:
        tensor: the captured output: a map (B, d, h, w) or tokens (B, h w, d).
        aspect: the picture's aspect ratio (height / width), which determines the grid of tokens.

    Raises:
        ValueError: the output is neither a map nor tokens, or the tokens do not fill a grid of that aspect ratio.
    """
    if tensor.ndim == 4:
        return tensor.permute(0, 2, 3, 1).contiguous()
    if tensor.ndim != 3:
        raise ValueError(
            f"blocks: a block's output has shape {tuple(tensor.shape)}; expected a map (B, d, h, w) or tokens (B, n, d)"
        )
    return tensor.unflatten(1, _grid(tensor.shape[1], aspect))


def _grid(tokens: int, aspect: float) -> tuple[int, int]:
    """Find the sides of the token grid whose aspect ratio is nearest to the picture's: a model's stages round their
    sides."""

    def distance(height: int) -> float:
        return abs(math.log(height * height / tokens / aspect))

    height = min((side for side in range(1, tokens + 1) if tokens % side == 0), key=distance)
    if distance(height) > math.log(LARGEST_ROUNDING):
        raise ValueError(f"blocks: {tokens} tokens do not fill a grid of the picture's aspect, {aspect:.3g}")
    return height, tokens // height


def _sides(size: int | Iterable[int]) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else tuple(size)


def _one(*shape: int) -> Tensor:
    return torch.zeros(1, *shape)


def _unet_example(config: Any) -> dict[str, Any]:
    inputs = {"sample": _one(config.in_channels, *_sides(config.sample_size)), "timestep": torch.zeros(1)}
    width = config.encoder_hid_dim or config.cross_attention_dim
    inputs["encoder_hidden_states"] = _one(PROMPT_TOKENS, width if isinstance(width, int) else width[0])
    if config.addition_embed_type == "text_time":
        text = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
        inputs["added_cond_kwargs"] = {"text_embeds": _one(text), "time_ids": _one(6)}
    return inputs


def _patched(config: Any) -> dict[str, Any]:
    return {
        "hidden_states": _one(config.in_channels, *_sides(config.sample_size)),
        "timestep": torch.zeros(1, dtype=torch.long),
    }


def _dit_example(config: Any) -> dict[str, Any]:
    return {**_patched(config), "class_labels": torch.zeros(1, dtype=torch.long)}


def _pixart_example(config: Any) -> dict[str, Any]:
    return {
        **_patched(config),
        "encoder_hidden_states": _one(PROMPT_TOKENS, config.caption_channels),
        "added_cond_kwargs": {"resolution": _one(2), "aspect_ratio": _one(1)},
    }


def _sd3_example(config: Any) -> dict[str, Any]:
    return {
        **_patched(config),
        "encoder_hidden_states": _one(PROMPT_TOKENS, config.joint_attention_dim),
        "pooled_projections": _one(config.pooled_projection_dim),
    }


def _flux_example(config: Any) -> dict[str, Any]:
    tokens = math.prod(FLUX_TOKENS)
    return {
        "hidden_states": _one(tokens, config.in_channels),
        "encoder_hidden_states": _one(PROMPT_TOKENS, config.joint_attention_dim),
        "pooled_projections": _one(config.pooled_projection_dim),
        "timestep": torch.zeros(1),
        "img_ids": torch.zeros(tokens, 3),
        "txt_ids": torch.zeros(PROMPT_TOKENS, 3),
        "guidance": torch.zeros(1) if config.guidance_embeds else None,
    }


EXAMPLES = {
    "UNet2DConditionModel": _unet_example,
    "DiTTransformer2DModel": _dit_example,
    "PixArtTransformer2DModel": _pixart_example,
    "SD3Transformer2DModel": _sd3_example,
    "FluxTransformer2DModel": _flux_example,
}
