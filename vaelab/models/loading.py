"""Any diffusers autoencoder or text-to-image pipeline by one name: ``embedded``, a hub id, or a local
diffusers folder; and the short names of a denoiser's blocks.

By ``embedded`` :func:`load_pipeline` means the text-to-image model that was trained on the world, which
has an autoencoder of its own, and :func:`load_vae` the one that the study of silent channels is about;
``embedded-dit`` is the class-conditional transformer, with the former's autoencoder.
"""

import logging
from collections.abc import Iterable
from inspect import signature
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vaelab.core import devices
from vaelab.core.validate import one_of, unknown
from vaelab.models.block_names import DENOISERS, EXAMPLES, Block, blocks, denoiser
from vaelab.models.registry import (
    embedded_dit_path,
    embedded_path,
    embedded_vae_path,
    hub_hint,
    locate_vae,
    pipeline_folder,
)

__all__ = [
    "Block", "blocks", "check_precision", "decode", "denoiser", "embedded_dit_path", "embedded_path",
    "embedded_vae_path", "latent", "load_pipeline", "load_vae", "posterior", "put_in_place", "reconstruct",
    "require_groupnorm", "ship",
]  # fmt: skip

LEFT_OUT = {
    "safety_checker": None, "requires_safety_checker": False, "watermarker": None, "add_watermarker": False,
    "feature_extractor": None, "image_encoder": None,
}  # fmt: skip
"""Arguments of pipelines for parts that neither make the picture nor are looked at here."""
SHIPPED = ("vae", "pipeline", "dit")
"""The embedded models."""
SDXL_SCALING_FACTOR = 0.13025


def load_pipeline(
    name: str = "embedded",
    *,
    device: str = "auto",
    precision: str = "float32",
    revision: str | None = None,
    variant: str | None = None,
) -> Any:
    """Load a text-to-image (or class-conditional) pipeline by diffusers' own auto class.

    Safety checkers, watermarkers and image encoders are left out: they are not looked at.

    Args:
        name: ``embedded``, ``embedded-dit``, a hub id, or a local diffusers folder with a ``model_index.json``.
        device: ``auto``, ``cpu``, ``cuda``, ``mps``.
        precision: ``float32``, ``bfloat16`` or ``float16``, of all weights.
        revision: a branch, tag or commit on the hub.
        variant: of the weight files, such as ``fp16``.

    Returns:
        The diffusers pipeline, its progress bar off.

    Raises:
        ValueError: no such pipeline, or one whose denoiser the lab does not know.
    """
    from diffusers import DiffusionPipeline

    path, dtype, device = pipeline_folder(name), devices.dtype(precision), devices.pick(device)
    try:
        index = DiffusionPipeline.load_config(path, revision=revision)
        kind = _pipeline_class(index, name)
        given = {part: nothing for part, nothing in LEFT_OUT.items() if part in signature(kind).parameters}
        if "id2label" in index:  # JSON has made text of the numbers, of which diffusers warns
            given["id2label"] = {int(number): label for number, label in index["id2label"].items()}
        pipeline = kind.from_pretrained(path, dtype=dtype, revision=revision, variant=variant, **given)
    except OSError as error:
        raise ValueError(f"model: {name!r} could not be read as a pipeline.{hub_hint(name)} ({error})") from error
    pipeline.set_progress_bar_config(disable=True)
    return pipeline.to(device)


def _pipeline_class(index: dict[str, Any], name: str) -> type:
    """The class that a ``model_index.json`` names, refused before anything large is read."""
    import diffusers

    kind = _quietly_imported(index.get("_class_name"))
    if not (isinstance(kind, type) and issubclass(kind, diffusers.DiffusionPipeline)):
        raise ValueError(f"model: {name!r} is a {index.get('_class_name')}; expected a diffusers pipeline")
    denoisers = [index[part][1] for part in DENOISERS if part in index]
    if not set(denoisers) & set(EXAMPLES):
        what = " and ".join(map(str, denoisers)) or "no denoiser"
        raise ValueError(f"model: {name!r} has {what}; known are {', '.join(EXAMPLES)}")
    return kind


def _quietly_imported(name: Any) -> Any:
    """A class of diffusers; on the way to a pipeline transformers warns about image processors, unused here."""
    import diffusers

    logger = logging.getLogger("transformers.utils.import_utils")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        return getattr(diffusers, str(name), None)
    finally:
        logger.setLevel(level)


def ship(model: Any, folder: Path) -> None:
    """Save a module or pipeline in float16 as a diffusers folder; its own weights are float16 afterwards.

    A text model stays in float32: transformers loads it in the precision it has on disk, the rest of
    a pipeline comes in float32, and the two would not fit together.
    """
    model.to(dtype=torch.float16)
    if hasattr(model, "text_encoder"):
        model.text_encoder.to(torch.float32)
    model.save_pretrained(folder)


def put_in_place(made: dict[str, Any], names: Iterable[str]) -> None:
    """Ship those of the models made whose names are given, in place of the embedded ones.

    Args:
        made: modules or pipelines by name: ``vae``, ``pipeline``, ``dit``.
        names: of them, which.

    Raises:
        ValueError: a name of none.
    """
    folders = {"vae": embedded_vae_path(), "pipeline": embedded_path(), "dit": embedded_dit_path()}
    for name in names:
        if name not in made:
            raise unknown("ship", name, made)
    for name in names:
        ship(made[name], folders[name])


def refuse_unshipped(names: Iterable[str]) -> None:
    """Raise ValueError for a name that :func:`put_in_place` does not know, before there is anything to ship."""
    for name in names:
        one_of("ship", name, SHIPPED)


def load_vae(
    name: str = "embedded",
    *,
    device: str = "auto",
    precision: str = "float32",
    revision: str | None = None,
    groupnorm: bool = False,
    changes: dict[str, Any] | None = None,
    seed: int = 0,
) -> nn.Module:
    """Load an autoencoder in evaluation mode.

    Args:
        name: ``embedded``, a hub id, or a local diffusers folder; of a whole pipeline, local or
            on the hub, its ``vae`` is taken.
        device: ``auto``, ``cpu``, ``cuda``, ``mps``.
        precision: ``float32``, ``bfloat16`` or ``float16``, of the weights.
        revision: a branch, tag or commit on the hub.
        groupnorm: refuse a model that has no GroupNorm with a scale, where the study needs one.
        changes: make an untrained model of this configuration with these entries replaced, such
            as ``block_out_channels`` (none: ``{}``); None loads the weights.
        seed: fixes an untrained model's weights.

    Returns:
        The diffusers autoencoder: ``encode(x)`` and ``decode(z)`` on pictures of shape
        (B, 3, H, W) in [-1, 1].

    Raises:
        ValueError: no such model, a model that is no autoencoder, no GroupNorm where one is
            needed, or float16 for the SDXL-VAE, whose activations pass float16's 65,504.
    """
    path, subfolder, config = locate_vae(name, revision)
    _refuse_overflow(config, precision, name)
    kind, dtype = _autoencoder_class(config, name), devices.dtype(precision)
    if changes is None:
        vae = kind.from_pretrained(path, subfolder=subfolder, revision=revision, torch_dtype=dtype)
    else:
        vae = nn.Module.to(_untrained(kind, {**config, **changes}, seed), dtype)
    if groupnorm:
        require_groupnorm(vae, name)
    return vae.to(devices.pick(device)).eval()


def posterior(vae: nn.Module, pixels: Tensor) -> Any:
    """The Gaussian posterior q(z|x) of pictures (B, 3, R, R), a diffusers distribution.

    Raises:
        ValueError: an autoencoder whose latent is no distribution.
    """
    encoded = vae.encode(pixels)
    if not hasattr(encoded, "latent_dist"):
        raise ValueError(f"model: {type(vae).__name__} has no Gaussian posterior; the KL term needs one")
    return encoded.latent_dist


@torch.no_grad()
def reconstruct(vae: nn.Module, pixels: Tensor) -> Tensor:
    """Pictures (B, 3, R, R) through encoder and decoder; of a posterior, its mean. Keeps no graph."""
    return decode(vae, latent(vae, pixels), pixels.shape)


def latent(vae: nn.Module, pixels: Tensor) -> Tensor:
    """The latents (B, c, h, w) of pictures (B, 3, R, R), not yet scaled; of a posterior, its mean."""
    encoded = vae.encode(pixels)
    if hasattr(encoded, "latent_dist"):
        return encoded.latent_dist.mode()
    return encoded.latents if hasattr(encoded, "latents") else encoded.latent


def decode(vae: nn.Module, latent: Tensor, shape: torch.Size) -> Tensor:
    """Pictures from latents, refused where their shape is not that of what was encoded.

    Raises:
        ValueError: pictures whose side is no multiple of the model's downsampling.
    """
    decoded = vae.decode(latent).sample
    if decoded.shape != shape:
        raise ValueError(
            f"resolution: pictures of {shape[-2]} x {shape[-1]} come back as {decoded.shape[-2]} x "
            f"{decoded.shape[-1]}; take a multiple of {max(1, decoded.shape[-1] // latent.shape[-1])}"
        )
    return decoded


def require_groupnorm(model: nn.Module, name: str) -> None:
    """Raise ValueError where ``model`` has no GroupNorm with a learned scale."""
    if not any(isinstance(module, nn.GroupNorm) and module.affine for module in model.modules()):
        raise ValueError(
            f"model: {name!r} ({type(model).__name__}) has no GroupNorm layer with a scale, "
            "and channel suppression is a matter of that scale; take a model that has, "
            "such as stabilityai/sdxl-vae or embedded"
        )


def check_precision(name: str, precision: str, revision: str | None = None) -> None:
    """Raise ValueError for the SDXL-VAE in float16, in which its activations overflow.

    It is known by ``force_upcast`` in its configuration, or by its latents' scaling factor where
    the configuration does not say (``sdxl-vae-fp16-fix`` says that it need not).
    """
    _refuse_overflow(locate_vae(name, revision).config, precision, name)


def _refuse_overflow(config: dict[str, Any], precision: str, name: str) -> None:
    is_sdxl = abs((config.get("scaling_factor") or 0) - SDXL_SCALING_FACTOR) < 1e-6
    if devices.dtype(precision) == torch.float16 and config.get("force_upcast", is_sdxl):
        raise ValueError(
            f"precision: float16 is refused for {name!r}: it is the SDXL-VAE, or its configuration says "
            "force_upcast like that one's, whose activations pass float16's largest number (65,504) so that "
            "its pictures turn to NaN; use bfloat16 or float32"
        )


def _untrained(kind: type, config: dict[str, Any], seed: int) -> nn.Module:
    strange = set(config) - set(kind._get_init_keys(kind)) - {"_class_name"}
    if strange:
        raise unknown("changes", sorted(strange)[0], kind._get_init_keys(kind))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return kind.from_config(config)


def _autoencoder_class(config: dict[str, Any], name: str) -> type:
    import diffusers

    kind = getattr(diffusers, str(config.get("_class_name")), None)
    if kind is None or not (hasattr(kind, "encode") and hasattr(kind, "decode")):
        raise ValueError(f"model: {name!r} is a {config.get('_class_name')}; expected a diffusers autoencoder")
    return kind
