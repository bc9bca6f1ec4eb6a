"""Load autoencoders and pipelines by name, and pass pictures through an autoencoder.

:func:`load_pipeline` and :func:`load_vae` take ``embedded`` (a small model shipped with the package), an id on the hub,
or a local diffusers folder. For :func:`load_pipeline`, ``embedded`` is the text-to-image model that was trained on the
synthetic scene world (:mod:`vaelab.world`); for :func:`load_vae` it is the autoencoder with suppressed channels.
Weights that are missing, unused, of another shape, NaN or infinite raise an error that names them; missing weights are
never filled with random values.
"""

import functools
import importlib
import inspect
import json
import logging
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from inspect import signature
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from vaelab.core import devices
from vaelab.core.finite import all_finite
from vaelab.core.hub import announce_download, network_errors
from vaelab.core.validate import one_of, unknown
from vaelab.models.block_names import DENOISERS, EXAMPLES, architecture
from vaelab.models.checksums import checksums_verified, save_with_checksums
from vaelab.models.registry import (
    access_model,
    embedded_clip_path,
    embedded_dit_path,
    embedded_language_path,
    embedded_path,
    embedded_vae_path,
    locate_vae,
    module_files,
    pipeline_folder,
    refuse_config,
    variants,
)

LEFT_OUT = {
    "safety_checker": None, "requires_safety_checker": False, "watermarker": None, "add_watermarker": False,
    "feature_extractor": None, "image_encoder": None,
}  # fmt: skip
"""Arguments that leave out parts of a pipeline which neither generate the picture nor are analysed here."""
SHIPPED = ("vae", "pipeline", "dit", "clip", "language_model")
"""Short names of the embedded models, which are shipped with the package."""
SDXL_SCALING_FACTOR = 0.13025
UNUSED_WEIGHTS = re.compile(r"(^|\.)position_ids$")
"""Names of tensors (0, 1, 2, ...) that older checkpoints hold and current models do not use."""
ADDED_EMBEDDINGS = (None, "text", "text_time")
"""Supported values of a U-Net's ``addition_embed_type``: embeddings that a prompt and a size determine."""
READ_ERRORS = (OSError, RuntimeError, ValueError, SafetensorError)
"""The errors with which diffusers, transformers and safetensors report files that they cannot read."""


def load_pipeline(
    name: str = "embedded",
    *,
    device: str = "auto",
    precision: str = "float32",
    revision: str | None = None,
    variant: str | None = None,
    parameter: str = "model",
) -> Any:
    """Load a text-to-image or class-conditional pipeline.

    Safety checkers, watermarkers and image encoders are left out: they are not analysed.

    Args:
        name: ``embedded``, ``embedded-dit``, an id on the hub, or a local diffusers folder with a ``model_index.json``.
        device: ``auto``, ``cpu``, ``cuda``, ``mps``.
        precision: the precision of all weights: ``float32``, ``bfloat16`` or ``float16``.
        revision: a branch, tag or commit on the hub.
        variant: the variant of the weight files, such as ``fp16``.
        parameter: the notebook parameter that gave ``name``; error messages about the model begin with it.

    Returns:
        The diffusers pipeline, with its progress bar switched off. If the pipeline ignores ``latents_mean`` of its
        autoencoder, this is printed (see :func:`uses_latent_statistics`).

    Raises:
        ValueError: there is no such pipeline or variant; the hub cannot be reached; a revision was given for a model
            that is not on the hub; the denoiser is not supported, or needs more than a prompt (an inpainting or editing
            model); or weights are damaged, missing, unused, NaN or infinite.
    """
    with access_model(name, revision, parameter) as described:
        return _load_pipeline(name, device, precision, revision, variant, described)


def _load_pipeline(
    name: str, device: str, precision: str, revision: str | None, variant: str | None, described: Any
) -> Any:
    path, dtype, device = pipeline_folder(name, revision), devices.dtype(precision), devices.pick(device)
    options = {"revision": revision, "variant": variant, "dtype": dtype}
    index, kind = _read_index(path, name, revision)
    given = {part: nothing for part, nothing in LEFT_OUT.items() if part in signature(kind).parameters}
    loaded = [part for part, entry in index.items() if isinstance(entry, list) and entry[0] and part not in given]
    _announce_download(name, described, ["", *loaded], variant, revision)
    for part, entry in index.items():
        if entry == [None, None]:  # a part that the pipeline does without, such as the third text encoder of SD3
            given.setdefault(part, None)
        elif part not in given and (module := _module_class(entry)) is not None:
            given[part] = _load_module(module, path, name, part, options)
    if "id2label" in index:  # JSON has made text of the numbers, of which diffusers warns
        given["id2label"] = {int(number): label for number, label in index["id2label"].items()}
    try:
        pipeline = kind.from_pretrained(path, **options, **given)
    except READ_ERRORS as error:
        raise ValueError(_could_not_be_read(name, error)) from error
    pipeline.set_progress_bar_config(disable=True)
    vae_config = pipeline.vae.config if getattr(pipeline, "vae", None) is not None else {}
    if vae_config.get("latents_mean") and not uses_latent_statistics(pipeline):
        print(
            f"{name}: the autoencoder's latents_mean and latents_std are not used; {kind.__name__} scales latents by "
            "scaling_factor and shift_factor alone"
        )
    return pipeline.to(device)


def denoiser_without_weights(
    name: str = "embedded", *, revision: str | None = None, parameter: str = "model"
) -> nn.Module:
    """Build a pipeline's U-Net or transformer from its configuration alone, on the meta device.

    It has all modules but no weights, so that names of blocks are checked before the weights are read or downloaded.

    Args:
        name: as for :func:`load_pipeline`.
        revision: a branch, tag or commit on the hub.
        parameter: the notebook parameter that gave ``name``; error messages about the model begin with it.

    Raises:
        ValueError: there is no such pipeline, the hub cannot be reached, or the denoiser is not supported.
    """
    import diffusers

    with access_model(name, revision, parameter):
        path = pipeline_folder(name, revision)
        index, _ = _read_index(path, name, revision)
        part = _denoiser_part(index)
        kind = getattr(diffusers, index[part][1])
        try:
            config = kind.load_config(path, subfolder=part, revision=revision)
        except OSError as error:
            raise ValueError(_damaged_file(path, name, part) or _could_not_be_read(name, error)) from error
        with torch.device("meta"):
            return kind.from_config(config).eval()


def load_scheduler(name: str = "embedded", *, revision: str | None = None) -> Any:
    """Load a pipeline's scheduler alone; arguments and errors are those of :func:`denoiser_without_weights`."""
    import diffusers

    with access_model(name, revision, "model"):
        path = pipeline_folder(name, revision)
        index, _ = _read_index(path, name, revision)
        try:
            return getattr(diffusers, index["scheduler"][1]).from_pretrained(
                path, subfolder="scheduler", revision=revision
            )
        except OSError as error:
            raise ValueError(_damaged_file(path, name, "scheduler") or _could_not_be_read(name, error)) from error


def vae_without_weights(
    name: str = "embedded",
    *,
    revision: str | None = None,
    config: str | None = None,
    groupnorm: bool = False,
    parameter: str = "model",
) -> nn.Module:
    """Build an autoencoder from its configuration alone, on the meta device.

    It has all modules but no weights, so that names of layers are checked before the weights are read or downloaded.

    Args:
        name: as for :func:`load_vae`.
        revision: a branch, tag or commit on the hub.
        config: for a single file, the folder of its config.json; None means the file's own folder.
        groupnorm: whether to require a GroupNorm with a learned scale, for studies of that scale.
        parameter: the notebook parameter that gave ``name``; error messages about the model begin with it.

    Raises:
        ValueError: there is no such model, the hub cannot be reached, it is not an autoencoder of RGB pictures, or a
            GroupNorm is required and there is none.
    """
    refuse_config(name, config)
    with access_model(name, revision, parameter):
        entries = locate_vae(name, revision, config).config
        with torch.device("meta"):
            vae = _autoencoder_class(entries, name).from_config(entries).eval()
        if groupnorm:
            require_groupnorm(vae, name)
        return vae


def load_vae(
    name: str = "embedded",
    *,
    device: str = "auto",
    precision: str = "float32",
    revision: str | None = None,
    variant: str | None = None,
    config: str | None = None,
    groupnorm: bool = False,
    changes: dict[str, Any] | None = None,
    seed: int = 0,
    parameter: str = "model",
) -> nn.Module:
    """Load an autoencoder in evaluation mode.

    Args:
        name: ``embedded``, an id on the hub, a local diffusers folder, or a local ``.safetensors`` file; of a whole
            pipeline, its ``vae`` is loaded.
        device: ``auto``, ``cpu``, ``cuda``, ``mps``.
        precision: the precision of the weights: ``float32``, ``bfloat16`` or ``float16``.
        revision: a branch, tag or commit on the hub.
        variant: the variant of the weight files, such as ``fp16``.
        config: for a single file, the folder of its config.json; None means the file's own folder.
        groupnorm: whether to require a GroupNorm with a learned scale, for studies of that scale.
        changes: if a dict, make a randomly initialised model of this configuration with these entries replaced, such
            as ``block_out_channels`` (``{}`` for no change); if None, load the pretrained weights.
        seed: determines the weights of a randomly initialised model.
        parameter: the notebook parameter that gave ``name``; error messages about the model begin with it.

    Returns:
        The diffusers autoencoder. Use :func:`encode_latents` and :func:`decode_latents` on pictures (B, 3, H, W) in
        [-1, 1]: they also handle autoencoders of videos.

    Raises:
        ValueError: there is no such model or variant; the model cannot have the given revision, variant or config; the
            model is not an autoencoder of RGB pictures; a GroupNorm is required and there is none; the precision is
            float16 for the SDXL-VAE, whose activations exceed float16's largest value (65,504); or weights are
            damaged, missing, unused, NaN or infinite.
    """
    refuse_config(name, config)
    with access_model(name, revision, parameter) as described:
        path, subfolder, entries = locate_vae(name, revision, config)
        _refuse_overflow(entries, precision, name)
        kind, dtype = _autoencoder_class(entries, name), devices.dtype(precision)
        single_file = Path(path).is_file()
        if variant is not None and (single_file or changes is not None):
            what = "a single file" if single_file else "an untrained model (changes)"
            raise ValueError(
                f"variant: {variant!r} was given for {name!r}, {what}; only folders of weights have variants"
            )
        if changes is not None:
            vae = nn.Module.to(_untrained(kind, {**entries, **changes}, seed), dtype)
        elif single_file:
            vae = _load_single_file(kind, path, config or str(Path(path).parent), name, dtype)
        else:
            options = {"revision": revision, "variant": variant, "dtype": dtype}
            _announce_download(name, described, [subfolder or ""], variant, revision)
            vae = _load_module(kind, path, name, subfolder or "", options)
        if groupnorm:
            require_groupnorm(vae, name)
        return vae.to(devices.pick(device)).eval()


def posterior(vae: nn.Module, pixels: Tensor) -> Any:
    """Compute the Gaussian posterior q(z|x) of pictures (B, 3, H, W): a diffusers distribution over latents
    (B, c, h, w).

    Raises:
        ValueError: the autoencoder's latent is not a distribution.
    """
    encoded = vae.encode(_with_frames(vae, pixels))
    if not hasattr(encoded, "latent_dist"):
        raise ValueError(f"model: {type(vae).__name__} has no Gaussian posterior; the KL term needs one")
    distribution = encoded.latent_dist
    if distribution.parameters.ndim == 5:
        return type(distribution)(distribution.parameters.squeeze(2))
    return distribution


@torch.no_grad()
def reconstruct(vae: nn.Module, pixels: Tensor) -> Tensor:
    """Pass pictures (B, 3, H, W) through encoder and decoder, using the posterior's mean, without gradients."""
    return decode_latents(vae, encode_latents(vae, pixels), pixels.shape)


def encode_latents(vae: nn.Module, pixels: Tensor) -> Tensor:
    """Encode pictures (B, 3, H, W) to unscaled latents (B, c, h, w): the posterior's mean, if there is a posterior.

    An autoencoder of videos gets each picture as a video of one frame.
    """
    encoded = vae.encode(_with_frames(vae, pixels))
    if hasattr(encoded, "latent_dist"):
        latents = encoded.latent_dist.mode()
    else:
        latents = encoded.latents if hasattr(encoded, "latents") else encoded.latent
    return latents.squeeze(2) if latents.ndim == 5 else latents


def decode_latents(vae: nn.Module, latents: Tensor, shape: torch.Size) -> Tensor:
    """Decode unscaled latents (B, c, h, w) to pictures of the given shape (B, 3, H, W).

    Raises:
        ValueError: the decoded pictures have another shape, because a side was not a multiple of the model's
            downsampling.
    """
    decoded = vae.decode(_with_frames(vae, latents)).sample
    decoded = decoded.squeeze(2) if decoded.ndim == 5 else decoded
    if decoded.shape != shape:
        raise ValueError(
            f"resolution: pictures of {shape[-2]} x {shape[-1]} come back as {decoded.shape[-2]} x "
            f"{decoded.shape[-1]}; take a multiple of {max(1, decoded.shape[-1] // latents.shape[-1])}"
        )
    return decoded


def scale_latents(vae: nn.Module, latents: Tensor, *, statistics: bool = True) -> Tensor:
    """Scale latents (B, c, h, w) as the denoiser takes them, in the same way as the autoencoder's own pipelines.

    The result is (z - latents_mean) / latents_std x scaling_factor if the configuration gives these, and
    (z - shift_factor) x scaling_factor otherwise. FLUX.2 standardizes with the running statistics of its batch norm,
    one for each channel of the 2 x 2 patches that its denoiser takes as tokens.

    Args:
        vae: the autoencoder.
        latents: z, the latents as the encoder returns them.
        statistics: whether ``latents_mean`` and ``latents_std`` are used; see :func:`uses_latent_statistics`.

    Raises:
        ValueError: the autoencoder is FLUX.2's and a side of the latents is odd.
    """
    mean, std = _latent_statistics(vae, latents, statistics)
    return (latents - mean) / std


def unscale_latents(vae: nn.Module, latents: Tensor) -> Tensor:
    """Convert a denoiser's latents (B, c, h, w) to unscaled latents for the decoder: the inverse of
    :func:`scale_latents`."""
    mean, std = _latent_statistics(vae, latents)
    return latents * std + mean


def uses_latent_statistics(pipeline: Any) -> bool:
    """Whether a pipeline decodes with ``latents_mean`` and ``latents_std`` if its autoencoder's configuration has them.

    Of the supported pipelines only SDXL's do. All others use only ``shift_factor`` and ``scaling_factor``, whatever
    autoencoder they are given. No configuration says so, so this function looks into the pipeline's own code.
    """
    return _call_mentions(type(pipeline), "latents_mean")


@functools.cache
def _call_mentions(pipeline_class: type, name: str) -> bool:
    return name in inspect.getsource(pipeline_class.__call__)


def _latent_statistics(
    vae: nn.Module, latents: Tensor, statistics: bool = True
) -> tuple[Tensor | float, Tensor | float]:
    config = vae.config
    norm = getattr(vae, "bn", None)
    if norm is not None:
        return (
            _unpatched(norm.running_mean, latents),
            _unpatched((norm.running_var + config.batch_norm_eps).sqrt(), latents),
        )
    factor = config.get("scaling_factor") or 1.0
    mean, std = (_per_channel(vae, name, latents) for name in ("latents_mean", "latents_std"))
    if statistics and mean is not None and std is not None:
        return mean, std / factor
    return config.get("shift_factor") or 0.0, 1 / factor


def _per_channel(vae: nn.Module, name: str, latents: Tensor) -> Tensor | None:
    values = vae.config.get(name)
    if values is None:  # some autoencoders of videos hold them as buffers
        values = dict(vae.named_buffers(recurse=False)).get(name)
    return None if values is None else torch.as_tensor(values).to(latents).view(-1, 1, 1)


def _unpatched(values: Tensor, latents: Tensor) -> Tensor:
    """Arrange values (4 c), one per channel of 2 x 2 patches, at every position of latents (B, c, h, w)."""
    channels, height, width = latents.shape[1:]
    if height % 2 or width % 2:
        raise ValueError(f"resolution: latents of {height} x {width}; this model takes patches of 2 x 2")
    return values.to(latents).view(channels, 2, 2).repeat(1, height // 2, width // 2)


def _with_frames(vae: nn.Module, images: Tensor) -> Tensor:
    """Add a frame axis (B, c, 1, h, w) to pictures or latents if the autoencoder convolves over time."""
    return images.unsqueeze(2) if any(isinstance(module, nn.Conv3d) for module in vae.modules()) else images


def require_groupnorm(model: nn.Module, name: str) -> None:
    """Raise ValueError if ``model`` has no GroupNorm with a learned scale."""
    if not any(isinstance(module, nn.GroupNorm) and module.affine for module in model.modules()):
        raise ValueError(
            f"model: {name!r} ({type(model).__name__}) has no GroupNorm layer with a scale, "
            "and channel suppression is about that scale; take a model that has one, "
            "such as stabilityai/sdxl-vae or embedded"
        )


def require_finite(tensors: Iterable[tuple[str, Tensor]], what: str) -> None:
    """Raise ValueError for the first tensor with a NaN or infinite entry.

    Args:
        tensors: names and tensors, such as a state dict's items.
        what: a description of the model, such as ``model: 'embedded' (vae)``; error messages begin with it.
    """
    for key, tensor in tensors:
        if not all_finite(tensor):
            raise ValueError(f"{what} has NaN or infinite entries in {key} ({tensor.dtype}); expected finite weights")


def validate_precision(name: str, precision: str, revision: str | None = None) -> None:
    """Raise ValueError for the SDXL-VAE in float16, in which its activations overflow.

    It is recognized by ``force_upcast`` in its configuration or, if the configuration has no such entry, by the
    scaling factor of its latents. (``sdxl-vae-fp16-fix`` has the entry, set to false.)
    """
    with access_model(name, revision):
        _refuse_overflow(locate_vae(name, revision).config, precision, name)


def save_in_float16(model: Any, folder: Path, *companions: Any) -> None:
    """Save a module or pipeline in float16 as a folder of diffusers or transformers, with its companions, such as a
    tokenizer; its own weights are float16 afterwards.

    A text model stays in float32: transformers loads it in the precision of its file, while the rest of a pipeline is
    loaded in float32, and the two would not fit together.
    """
    model.to(dtype=torch.float16)
    if hasattr(model, "text_encoder"):
        model.text_encoder.to(torch.float32)
    save_with_checksums(model, folder)
    for companion in companions:
        companion.save_pretrained(folder)


def replace_embedded(made: dict[str, Any], names: Iterable[str]) -> None:
    """Save trained models over the embedded ones.

    Args:
        made: the trained modules or pipelines, by name: ``vae``, ``pipeline``, ``dit``, and each with its processor or
            tokenizer, as a pair, ``clip`` and ``language_model``.
        names: the names of those to save.

    Raises:
        ValueError: a name is not in ``made``.
    """
    folders = {
        "vae": embedded_vae_path(), "pipeline": embedded_path(), "dit": embedded_dit_path(),
        "clip": embedded_clip_path(), "language_model": embedded_language_path(),
    }  # fmt: skip
    for name in names:
        if name not in made:
            raise unknown("ship", name, made)
    for name in names:
        model, *companions = made[name] if isinstance(made[name], tuple) else (made[name],)
        save_in_float16(model, folders[name], *companions)


def validate_embedded_names(names: Iterable[str]) -> None:
    """Raise ValueError for a name that is not the name of an embedded model, before there is a model to save."""
    for name in names:
        one_of("ship", name, SHIPPED)


def _read_index(path: str, name: str, revision: str | None) -> tuple[dict[str, Any], type]:
    """Read a pipeline's ``model_index.json``, and find its class; an unsupported pipeline is refused."""
    from diffusers import DiffusionPipeline

    try:
        index = DiffusionPipeline.load_config(path, revision=revision)
        kind = _pipeline_class(index, name)
        _validate_denoiser(path, index, name, revision)
    except OSError as error:
        raise ValueError(_damaged_file(path, name) or _could_not_be_read(name, error)) from error
    return index, kind


def _denoiser_part(index: dict[str, Any]) -> str:
    return next(part for part in DENOISERS if part in index and index[part][1] in EXAMPLES)


def _pipeline_class(index: dict[str, Any], name: str) -> type:
    """Find the class that a ``model_index.json`` names; an unsupported class is refused before large files are read."""
    import diffusers

    with quiet_imports():
        kind = getattr(diffusers, str(index.get("_class_name")), None)
    if not (isinstance(kind, type) and issubclass(kind, diffusers.DiffusionPipeline)):
        raise ValueError(f"model: {name!r} is a {index.get('_class_name')}; expected a diffusers pipeline")
    denoisers = [index[part][1] for part in DENOISERS if part in index]
    if not set(denoisers) & set(EXAMPLES):
        what = " and ".join(map(str, denoisers)) or "no denoiser"
        raise ValueError(f"model: {name!r} has {what}; supported are {', '.join(EXAMPLES)}")
    return kind


@contextmanager
def quiet_imports() -> Iterator[None]:
    """Silence the warnings with which transformers imports image processors where torchvision is not installed: the
    processors based on PIL do the same."""
    logger = logging.getLogger("transformers.utils.import_utils")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def _module_class(entry: Any) -> type | None:
    """Find the class of a pipeline's part by its entry (library, class); None for parts without weights."""
    if not (isinstance(entry, list | tuple) and len(entry) == 2 and entry[0] in ("diffusers", "transformers")):
        return None
    kind = getattr(importlib.import_module(entry[0]), str(entry[1]), None)
    return kind if isinstance(kind, type) and issubclass(kind, nn.Module) else None


def _validate_denoiser(path: str, index: dict[str, Any], name: str, revision: str | None) -> None:
    """Refuse, by its configuration, a denoiser that needs more than noisy latents, a timestep and a prompt."""
    import diffusers

    part = _denoiser_part(index)
    if not _has_part(path, part):
        return  # loading raises the error
    kind = getattr(diffusers, index[part][1])
    config = {**_defaults(kind), **kind.load_config(path, subfolder=part, revision=revision)}
    reason = None
    if index.get("vae", [None])[0] is not None and _has_part(path, "vae"):
        entries = diffusers.AutoencoderKL.load_config(path, subfolder="vae", revision=revision)
        channels = entries.get("latent_channels", 4) * (4 if architecture(kind) == "FluxTransformer2DModel" else 1)
        if config["in_channels"] != channels:
            reason = f"takes {config['in_channels']} channels where its autoencoder gives {channels}"
    elif config["in_channels"] != 3 and "vae" not in index:
        reason = f"takes {config['in_channels']} channels where a picture has 3"
    if config.get("class_embed_type") or config.get("num_class_embeds"):
        reason = "takes class labels or a noise level beside the prompt"
    if config.get("addition_embed_type") not in ADDED_EMBEDDINGS or "image" in str(config.get("encoder_hid_dim_type")):
        reason = "takes the embedding of a picture"
    if reason:
        raise ValueError(
            f"model: {name!r} is no text-to-image or class-conditional model: its {part} {reason}, as models for "
            "inpainting, editing or upscaling do; supported are denoisers of latents (or pixels) by a prompt or a class"
        )


def _defaults(kind: type) -> dict[str, Any]:
    return {key: value.default for key, value in signature(kind.__init__).parameters.items()}


def _has_part(path: str, part: str) -> bool:
    """Whether a part's configuration exists; for a repository on the hub this is assumed."""
    return not Path(path).is_dir() or (Path(path) / part / "config.json").is_file()


def _announce_download(
    name: str, described: Any, parts: Sequence[str], variant: str | None, revision: str | None
) -> None:
    """Announce the download of modules of a model on the hub, whose description lists its files; None means a local
    model, or that only the local cache is read."""
    if described:
        names = [file.rfilename for file in described.siblings]
        files = [file for part in parts for file in module_files(names, part, variant)]
        announce_download(name, files, revision=revision)


def _load_module(kind: type, path: str, name: str, part: str, options: dict[str, Any]) -> nn.Module:
    """Load a module; its file must have exactly the module's weights.

    Args:
        kind: a class of diffusers or transformers.
        path: a local folder or an id on the hub.
        name: the name by which the user loads the model, for error messages.
        part: the module's folder inside ``path``, or "".
        options: the options ``revision``, ``variant`` and ``dtype``.
    """
    given = {key: value for key, value in options.items() if value is not None}
    what = f"model: {name!r} ({part or kind.__name__})"
    with checksums_verified(Path(path) / part, name):
        try:
            module, report = kind.from_pretrained(path, subfolder=part, output_loading_info=True, **given)
        except READ_ERRORS as error:
            raise ValueError(_explanation(path, name, part, options, error)) from error
        _validate_report(report, what)
        require_finite(module.state_dict().items(), what)
    return module


def _validate_report(report: dict[str, Any], what: str) -> None:
    for key, wrong in (
        ("missing_keys", "lacks the weights"),
        ("unexpected_keys", "has weights that its configuration does not use:"),
        ("mismatched_keys", "has weights of another shape than its configuration says:"),
    ):
        names = sorted(entry if isinstance(entry, str) else str(entry[0]) for entry in report.get(key, ()))
        names = [tensor for tensor in names if not UNUSED_WEIGHTS.search(tensor)]
        if names:
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            raise ValueError(f"{what} {wrong} {', '.join(names[:3])}{more}")


def _load_single_file(kind: type, file: str, config: str, name: str, dtype: torch.dtype) -> nn.Module:
    if not hasattr(kind, "from_single_file"):
        raise ValueError(f"model: {name!r}: diffusers reads {kind.__name__} from a folder only, not from a single file")
    folder, subfolder, entries = locate_vae(config)
    what = f"model: {name!r}"
    with checksums_verified(Path(file).parent, name, only=Path(file).name):
        try:
            with safe_open(file, "pt") as stored:
                keys = set(stored.keys())
            with torch.device("meta"):
                expected = kind.from_config(entries).state_dict().keys()
            if keys & expected:  # names in another layout are converted by diffusers, so they cannot be compared here
                _validate_report({"missing_keys": expected - keys, "unexpected_keys": keys - expected}, what)
            vae = kind.from_single_file(file, config=str(Path(folder) / (subfolder or "")), local_files_only=True)
        except READ_ERRORS as error:
            if str(error).startswith(what):
                raise
            raise ValueError(f"{what} could not be read as a {kind.__name__}, or is damaged ({error})") from error
    vae = nn.Module.to(vae, dtype)
    require_finite(vae.state_dict().items(), what)
    return vae


def _explanation(path: str, name: str, part: str, options: dict[str, Any], error: Exception) -> str:
    """Explain in one sentence why weights could not be read: another variant, a damaged file, or the library's
    reason."""
    variant = options.get("variant") or "none"
    where = f" in {part}" if part else ""
    known = variants(_file_names(path, part, options.get("revision")))
    if known and variant not in known:
        return f"variant: {name!r} has no weights of variant {variant!r}{where}; it has {', '.join(known)}"
    return _damaged_file(path, name, part) or _could_not_be_read(name, error)


def _damaged_file(path: str, name: str, part: str = "") -> str | None:
    """Make the error for the first damaged JSON or safetensors file of a local folder; None if all can be read."""
    for file in sorted((Path(path) / part).rglob("*")):
        try:
            if file.suffix == ".json":
                json.loads(file.read_bytes())
            elif file.suffix == ".safetensors":
                with safe_open(file, "pt"):
                    pass
        except (ValueError, SafetensorError) as error:
            return f"model: {file.relative_to(path).as_posix()} of {name!r} is damaged ({error})"
    return None


def _file_names(path: str, part: str, revision: str | None) -> list[str]:
    """List the names of the files of a local folder, or of a repository on the hub (empty if it cannot be reached)."""
    if Path(path).exists():
        return [file.name for file in (Path(path) / part).glob("*")]
    from huggingface_hub import list_repo_files

    try:
        files = list_repo_files(path, revision=revision)
    except network_errors():
        return []
    return [file for file in files if str(Path(file).parent) == (part or ".")]


def _could_not_be_read(name: str, error: Exception) -> str:
    return f"model: {name!r} could not be read ({error})"


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
    """Find the class that a configuration names; it must be an autoencoder of RGB pictures (or of videos)."""
    import diffusers

    kind = getattr(diffusers, str(config.get("_class_name")), None)
    if kind is None or not (hasattr(kind, "encode") and hasattr(kind, "decode")):
        raise ValueError(f"model: {name!r} is a {config.get('_class_name')}; expected a diffusers autoencoder")
    entries = {**_defaults(kind), **config}
    if "audio_channels" in entries:
        raise ValueError(f"model: {name!r} is a {kind.__name__} of sounds; supported are autoencoders of RGB pictures")
    channels = entries.get("in_channels", entries.get("input_channels", 3))
    patch = entries.get("patch_size")
    of_patches = 3 * patch**2 if isinstance(patch, int) else 3  # some autoencoders turn squares of pixels into channels
    if channels not in (3, of_patches):
        raise ValueError(
            f"model: {name!r} is a {kind.__name__} of pictures with {channels} channel{'s' * (channels != 1)}; "
            "supported are autoencoders of RGB pictures (3 channels)"
        )
    return kind
