"""Sparse autoencoders that others trained: their folders read into :class:`vaelab.sae.model.SAE`.

- ``sdxl-unbox`` (Surkov et al.): ``config.json``, ``state_dict.pth``, and beside them ``mean.pt`` and
  ``std.pt`` of each feature's activation;
- ``sae-lens``: ``cfg.json``, ``sae_weights.safetensors``, of the architectures standard, topk and jumprelu
  (as which it also saves batchtopk);
- ``sparsify``: ``cfg.json``, ``sae.safetensors``.

What such an autoencoder does to a vector stays what it was, to rounding. Where that allows it, features
are brought to unit length and their activations scaled instead.
"""

import json
import pickle
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from vaelab.core.hub import find
from vaelab.sae.model import FORMAT, SAE, SAEConfig


class Loaded(NamedTuple):
    """An autoencoder that was read."""

    sae: SAE
    """In evaluation mode, in float32."""
    format: str
    """Whose folder it was."""
    mean: Tensor | None = None
    """(n_features,) mean activations, where the folder has them."""
    std: Tensor | None = None
    """(n_features,) their standard deviations."""


def load(
    name: str | Path, *, device: str | torch.device = "cpu", revision: str | None = None, subfolder: str = ""
) -> Loaded:
    """Read an autoencoder of any known format, this lab's among them.

    Args:
        name: a local folder, or an id on the hub (owner/name).
        device: where to put it.
        revision: a branch, tag or commit on the hub.
        subfolder: which part of it.

    Raises:
        ValueError: no such folder, one of another format, or an autoencoder that does something that
            :class:`vaelab.sae.model.SAE` does not, which is named.
    """
    folder = find(name, revision=revision, subfolder=subfolder)
    kind = format_of(folder)
    if kind == FORMAT:
        return Loaded(SAE.from_pretrained(folder, device=device), kind)
    try:
        loaded = READERS[kind](folder)
    except (KeyError, OSError, SafetensorError, json.JSONDecodeError, pickle.UnpicklingError) as error:
        raise ValueError(f"{name}: not what {kind} writes ({type(error).__name__}: {error})") from error
    return loaded._replace(sae=loaded.sae.to(device).eval())


def format_of(folder: Path) -> str:
    """Whose folder it is, by its files.

    Raises:
        ValueError: nobody's that is known; it says which files there are.
    """
    for kind, files in FILES.items():
        if all((folder / file).is_file() for file in files):
            return kind
    there = ", ".join(sorted(path.name for path in folder.iterdir())[:8]) or "nothing"
    known = "; ".join(f"{kind} ({', '.join(files)})" for kind, files in FILES.items())
    raise ValueError(f"{folder.name}: no autoencoder of a known format; it has {there}. Known are {known}")


def read_unbox(folder: Path) -> Loaded:
    """A folder of sdxl-unbox's ``SparseAutoencoder.save_to_disk``."""
    told = json.loads((folder / "config.json").read_text())
    config = SAEConfig(
        told["d_model"], told["n_dirs_local"], told["k"], aux_weight=told.get("auxk_coef", 1 / 32),
        k_aux=told.get("auxk") or 256,
    )  # fmt: skip
    state = _unpickled(folder / "state_dict.pth")["state_dict"]
    sae = _filled(
        config, folder, encoder=state["encoder.weight"], decoder=state["decoder.weight"].T,
        latent_bias=state["latent_bias"], pre_bias=state["pre_bias"],
    )  # fmt: skip
    mean, std = (_unpickled(folder / file) if (folder / file).exists() else None for file in ("mean.pt", "std.pt"))
    return Loaded(sae, "sdxl-unbox", mean, std)


def read_sparsify(folder: Path) -> Loaded:
    """A folder of sparsify's ``SparseCoder.save_to_disk``."""
    told = json.loads((folder / "cfg.json").read_text())
    _only(folder, told, activation=("topk",), skip_connection=(False,), transcode=(False,), signed=(False,))
    d = told["d_in"]
    config = SAEConfig(d, told.get("num_latents") or d * told["expansion_factor"], told["k"])
    state = load_file(folder / "sae.safetensors")
    sae = _filled(
        config, folder, encoder=state["encoder.weight"], decoder=state["W_dec"], latent_bias=state["encoder.bias"],
        pre_bias=state["b_dec"],
    )  # fmt: skip
    return Loaded(sae, "sparsify")


def read_sae_lens(folder: Path) -> Loaded:
    """A folder of SAELens's ``SAE.save_model``, or of one of its training autoencoders."""
    told = json.loads((folder / "cfg.json").read_text())
    _only(
        folder, told, architecture=("standard", "topk", "jumprelu"), normalize_activations=("none", False),
        reshape_activations=("none",), activation_fn=("relu", "topk"), activation_fn_str=("relu", "topk"),
    )  # fmt: skip
    state = load_file(folder / "sae_weights.safetensors")
    d, n = state["W_enc"].shape
    architecture, k = told.get("architecture", "standard"), told.get("k")
    if "topk" in (told.get("activation_fn"), told.get("activation_fn_str")):
        architecture, k = "topk", told["activation_fn_kwargs"]["k"]
    variant = {"standard": "relu_l1", "topk": "topk", "jumprelu": "jumprelu"}[architecture]
    encoder, decoder, bias, threshold = state["W_enc"].T, state["W_dec"], state["b_enc"], state.get("threshold")
    if not told.get("apply_b_dec_to_input", True):
        bias = bias + encoder @ state["b_dec"]  # of what is done here, W (x - b_dec) + bias
    if variant != "topk" or told.get("rescale_acts_by_decoder_norm", False):
        lengths = decoder.norm(dim=1).clamp_min(1e-8)
        encoder, decoder, bias = encoder * lengths[:, None], decoder / lengths[:, None], bias * lengths
        threshold = None if threshold is None else (threshold * lengths).clamp_min(0)
    if variant == "jumprelu" and threshold is None:
        raise KeyError("threshold")
    more = {"threshold": threshold} if variant == "jumprelu" else {}
    config = SAEConfig(d, n, k if variant == "topk" else min(10, n), variant)
    return Loaded(
        _filled(
            config, folder, encoder=encoder, decoder=decoder, latent_bias=bias, pre_bias=state["b_dec"], **more
        ),
        "sae-lens",
    )  # fmt: skip


FILES = {
    FORMAT: ("config.json", "sae.safetensors"),
    "sdxl-unbox": ("config.json", "state_dict.pth"),
    "sae-lens": ("cfg.json", "sae_weights.safetensors"),
    "sparsify": ("cfg.json", "sae.safetensors"),
}
READERS: Mapping[str, Callable[[Path], Loaded]] = {
    "sdxl-unbox": read_unbox,
    "sae-lens": read_sae_lens,
    "sparsify": read_sparsify,
}


def _only(folder: Path, told: Mapping[str, Any], **allowed: tuple[Any, ...]) -> None:
    for key, values in allowed.items():
        if key in told and told[key] not in values:
            expected = " or ".join(map(repr, values))
            raise ValueError(f"{folder.name}: its {key} is {told[key]!r}; only {expected} can be read")


def _filled(config: SAEConfig, folder: Path, **weights: Tensor) -> SAE:
    sae = SAE(config)
    for name, value in weights.items():
        own = getattr(sae, name)
        if own.shape != value.shape:
            raise ValueError(
                f"{folder.name}: its {name} is {tuple(value.shape)}; by its configuration {tuple(own.shape)} "
                "was expected"
            )
        own.data.copy_(value)
    return sae


def _unpickled(path: Path) -> Any:
    return torch.load(path, map_location="cpu", weights_only=True)
