"""Sparse autoencoders of other libraries, read into :class:`vaelab.sae.model.SAE`.

====================== ============================================ ===============================================
format                 files                                        architectures
====================== ============================================ ===============================================
``sdxl-unbox``         ``config.json``, ``state_dict.pth``          top-k; ``mean.pt`` and ``std.pt``, of each
                                                                    feature's activation, are read too
``sae-lens``           ``cfg.json``, ``sae_weights.safetensors``    standard, topk, jumprelu (as which SAELens also
                                                                    saves batchtopk)
``sparsify``           ``cfg.json``, ``sae.safetensors``            top-k, also SAeUron's
``dictionary-learning`` ``ae.pt``, ``config.json`` if it exists     AutoEncoder, AutoEncoderNew, AutoEncoderTopK,
                                                                    BatchTopKSAE, MatryoshkaBatchTopKSAE, JumpReLU
``saev``               ``sae.pt``                                   Relu, TopK, BatchTopK
``gemma-scope``        ``params.npz``                               JumpReLU
====================== ============================================ ===============================================

The codes are the same as in the other library up to rounding, with one exception: in architectures that select features
without a top-k, the features are scaled to unit length and their activations accordingly. Every key of a configuration
and every tensor is either used, or listed here as irrelevant to the codes, or refused with an error that names it.
"""

import io
import json
import pickle
import zipfile
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from vaelab.core.finite import all_finite
from vaelab.core.hub import find_folder
from vaelab.core.paths import local
from vaelab.core.validate import at_least
from vaelab.sae.model import FORMAT, SAE, SAEConfig, read_config_file

REQUIRED: Any = object()
"""Stands for the default of a key that has none, because it must be there."""
OF_TRAINING = {
    "sparsify": ("normalize_decoder", "multi_topk"),
    "sdxl-unbox": ("dead_steps_threshold",),
    "sae-lens": (
        "dtype", "device", "metadata", "decoder_init_norm", "l1_coefficient", "lp_norm", "l1_warm_up_steps",
        "use_sparse_activations", "aux_loss_coefficient", "jumprelu_init_threshold", "jumprelu_bandwidth",
        "jumprelu_sparsity_loss_mode", "jumprelu_tanh_scale", "jumprelu_ste_to_input", "l0_coefficient",
        "l0_warm_up_steps", "pre_act_loss_coefficient", "target_l0",
        # what was trained on, beside the autoencoder itself before version 6
        "model_name", "model_class_name", "model_from_pretrained_kwargs", "hook_name", "hook_point", "hook_layer",
        "hook_point_layer", "hook_head_index", "hook_point_head_index", "hf_hook_name", "prepend_bos",
        "exclude_special_tokens", "neuronpedia_id", "context_size", "seqpos_slice", "dataset_path",
        "dataset_trust_remote_code", "sae_lens_version", "sae_lens_training_version",
    ),
    "dictionary-learning": (
        "trainer_class", "lr", "steps", "auxk_alpha", "top_k_aux", "warmup_steps", "decay_start", "threshold_beta",
        "threshold_start_step", "seed", "device", "layer", "lm_name", "wandb_name", "submodule_name", "l1_penalty",
        "resample_steps", "sparsity_warmup_steps", "bandwidth", "sparsity_penalty", "target_l0", "sparsity_function",
        "p_start", "p_end", "anneal_start", "sparsity_queue_length", "n_sparsity_updates", "group_fractions",
        "group_weights", "group_sizes", "k_anneal_steps",
    ),
    "saev": (
        "n_reinit_samples", "remove_parallel_grads", "normalize_w_dec", "seed", "sparsity_coeff", "ghost_grads",
        "l1_coeff", "use_ghost_grads", "reinit_blend", "reinit_enc_dec_tranpose",
    ),
}  # fmt: skip
"""Keys of each format's configuration that say how or on what an autoencoder was trained; they do not affect its
codes."""


class LoadedSAE(NamedTuple):
    """An autoencoder with the format that it was read from; made by :func:`load_sae`."""

    sae: SAE
    """The autoencoder, in evaluation mode and in float32."""
    format: str
    """The name of the format: one of :data:`READERS`, or :data:`vaelab.sae.model.FORMAT`."""
    mean: Tensor | None = None
    """(n_features,) mean activations of the features; None if the folder has none."""
    std: Tensor | None = None
    """(n_features,) standard deviations of the activations; None if the folder has none."""


def load_sae(
    name: str | Path,
    *,
    device: str | torch.device = "cpu",
    revision: str | None = None,
    subfolder: str = "",
    input_scale: float | None = None,
) -> LoadedSAE:
    """Read an autoencoder of any format of :data:`FILES`.

    Args:
        name: a local folder, or an id on the hub (owner/name).
        device: the device to put the autoencoder on.
        revision: a branch, tag or commit on the hub.
        subfolder: the part of the folder to read, such as a hookpoint; empty means the folder itself.
        input_scale: the factor by which vectors are multiplied before they are encoded. SAELens'
            ``normalize_activations: expected_average_only_in`` needs it, because the factor (the square root of the
            width over the mean length of the vectors) is not in the folder. None means no factor.

    Raises:
        ValueError: there is no such folder, its format is unknown, a file is damaged, a weight is not finite, or
            :class:`vaelab.sae.model.SAE` does not support the configuration. The error names the file and the key or
            tensor.
    """
    files = [] if local(name) else hub_files(str(name), revision, subfolder)
    folder = find_folder(name, revision=revision, subfolder=subfolder, files=files)
    kind = detect_format(folder)
    if input_scale is not None:
        at_least("input_scale", input_scale, 0, exclusive=True)
        if kind != "sae-lens":
            raise ValueError(f"input_scale: belongs to sae-lens; {folder.name} is a folder of {kind}")
    if kind == FORMAT:
        return LoadedSAE(SAE.from_pretrained(folder, device=device), kind)
    loaded = read_sae_lens(folder, input_scale) if kind == "sae-lens" else READERS[kind](folder)
    return loaded._replace(sae=loaded.sae.to(device).eval())


def detect_format(folder: Path) -> str:
    """Detect the format of a folder by the names of its files.

    Raises:
        ValueError: the format is unknown; the error lists the folder's files, or its subfolders that hold autoencoders.
    """
    levels = (folder.glob(pattern) for pattern in ("*", "*/*", "*/*/*"))
    return _detect([path.relative_to(folder).as_posix() for level in levels for path in level], folder.name)


def hub_files(name: str, revision: str | None, subfolder: str) -> list[str]:
    """List the files to download for an autoencoder on the hub; its format is detected before anything is downloaded.

    If the hub cannot be reached, the format is not known. Then the list has the files of all formats, because they may
    be in the cache.

    Raises:
        ValueError: the format is unknown; the error lists the files, or the subfolders that hold autoencoders.
    """
    from huggingface_hub import list_repo_files
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    names_of_all = [*FILES.values(), *OPTIONAL_FILES.values()]
    try:
        paths = list_repo_files(name, revision=revision)
    except (HfHubHTTPError, *HfHubHTTPError.__bases__, HFValidationError, OSError):  # bases: errors of the connection
        return list(dict.fromkeys(file for names in names_of_all for file in names))
    prefix = f"{subfolder}/" if subfolder else ""
    inside = [path.removeprefix(prefix) for path in paths if path.startswith(prefix)]
    kind = _detect(inside, f"{name}/{subfolder}" if subfolder else name)
    return [*FILES[kind], *(file for file in OPTIONAL_FILES.get(kind, ()) if file in inside)]


def _detect(files: Collection[str], name: str) -> str:
    """Detect the format of a folder, by the paths of its files inside it."""
    parts: dict[str, set[str]] = {}
    for path in files:
        folder, _, file = path.rpartition("/")
        parts.setdefault(folder, set()).add(file)
    formats = {folder: kind for folder, own in parts.items() for kind in reversed(FILES) if own.issuperset(FILES[kind])}
    if "" in formats:
        return formats[""]
    if formats:
        listed = ", ".join(sorted(formats)[:20]) + (f" and {len(formats) - 20} more" if len(formats) > 20 else "")
        raise ValueError(f"{name}: holds {len(formats)} autoencoders; choose one as subfolder: {listed}")
    there = ", ".join(sorted({path.partition("/")[0] for path in files})[:8]) or "nothing"
    known = "; ".join(f"{kind} ({', '.join(names)})" for kind, names in FILES.items())
    raise ValueError(f"{name}: no autoencoder of a known format; it has {there}. Known are {known}")


def read_sdxl_unbox(folder: Path) -> LoadedSAE:
    """Read a folder that sdxl-unbox's ``SparseAutoencoder.save_to_disk`` wrote (Surkov et al.)."""
    config = Fields(folder / "config.json", read_config_file(folder / "config.json"))
    d, n, k = (config.take(name, int) for name in ("d_model", "n_dirs_local", "k"))
    settings = SAEConfig(
        d, n, k, aux_weight=config.take("auxk_coef", float, 1 / 32), k_aux=config.take("auxk", int, 256)
    )
    config.ignore(*OF_TRAINING["sdxl-unbox"])
    config.require_empty()
    path = folder / "state_dict.pth"
    outer = Fields(path, read_torch_file(path))
    state = Tensors(path, outer.take("state_dict", dict))
    outer.require_empty()
    state.ignore("stats_last_nonzero")
    sae = build_sae(
        settings, encoder=state.take("encoder.weight", n, d), decoder=state.take("decoder.weight", d, n).T,
        latent_bias=state.take("latent_bias", n), pre_bias=state.take("pre_bias", d),
    )  # fmt: skip
    state.require_empty()
    statistics = {file: folder / f"{file}.pt" for file in ("mean", "std")}
    found = {
        name: Tensors(path, {name: read_torch_file(path)}).take(name, n) if path.exists() else None
        for name, path in statistics.items()
    }
    return LoadedSAE(sae, "sdxl-unbox", found["mean"], found["std"])


def read_sparsify(folder: Path) -> LoadedSAE:
    """Read a folder that sparsify's ``SparseCoder.save_to_disk`` or SAeUron's ``Sae`` wrote.

    SAeUron's ``input_unit_norm`` becomes ``input_norm: layer_norm``. Its ``batch_topk`` affects only training: before
    SAeUron itself uses an autoencoder it switches this off, and takes the k largest pre-activations of each vector.
    """
    path = folder / "cfg.json"
    config = Fields(path, read_config_file(path))
    config.require("activation", "topk")
    for name in ("skip_connection", "transcode", "signed", "sample_topk"):
        config.require(name, False)
    config.take("batch_topk", bool, False)
    d, k, factor = config.take("d_in", int), config.take("k", int), config.take("expansion_factor", int, 32)
    n = config.take("num_latents", int, 0) or d * factor
    norm = "layer_norm" if config.take("input_unit_norm", bool, False) else "none"
    config.ignore(*OF_TRAINING["sparsify"])
    config.require_empty()
    state = read_safetensors_file(folder / "sae.safetensors")
    sae = build_sae(
        SAEConfig(d, n, k, input_norm=norm), encoder=state.take("encoder.weight", n, d),
        decoder=state.take("W_dec", n, d), latent_bias=state.take("encoder.bias", n), pre_bias=state.take("b_dec", d),
    )  # fmt: skip
    state.require_empty()
    return LoadedSAE(sae, "sparsify")


def read_sae_lens(folder: Path, input_scale: float | None = None) -> LoadedSAE:
    """Read a folder that SAELens's ``SAE.save_model`` or one of its training autoencoders wrote.

    Args:
        folder: the folder.
        input_scale: the factor for the vectors, see :func:`load_sae`.
    """
    path = folder / "cfg.json"
    config = Fields(path, read_config_file(path))
    architecture, k = config.take("architecture", str, "standard"), config.take("k", int, None)
    functions = {config.take(name, str, None) for name in ("activation_fn", "activation_fn_str")} - {None}
    options = config.take("activation_fn_kwargs", dict, {})
    if "topk" in functions and architecture in ("standard", "topk"):  # before version 6
        architecture, k = "topk", Fields(path, options).take("k", int)
    elif functions - {"relu"}:
        raise ValueError(f"{path}: its activation_fn is {sorted(functions)[0]!r}; only 'relu' or 'topk' can be read")
    variants = {"standard": "relu_l1", "topk": "topk", "jumprelu": "jumprelu"}
    if architecture not in variants:
        expected = " or ".join(map(repr, variants))
        raise ValueError(f"{path}: its architecture is {architecture!r}; only {expected} can be read")
    variant = variants[architecture]
    if variant == "topk" and k is None:
        raise ValueError(f"{path}: has no 'k'")
    norm = config.take("normalize_activations", (str, bool), "none")
    norm = {True: "expected_average_only_in", False: "none"}.get(norm, norm)
    norms = {"none": "none", "expected_average_only_in": "none", "layer_norm": "layer_norm",
             "constant_norm_rescale": "constant_norm"}  # fmt: skip
    if norm not in norms:
        expected = " or ".join(map(repr, norms))
        raise ValueError(f"{path}: its normalize_activations is {norm!r}; only {expected} can be read")
    if (norm == "expected_average_only_in") != (input_scale is not None):
        raise ValueError(
            f"{path}: its normalize_activations is {norm!r}, which "
            + ("takes no input_scale" if input_scale else "needs input_scale: its factor is not in the folder")
        )
    config.require("reshape_activations", "none")
    config.require("finetuning_scaling_factor", False)
    subtracted, rescaled = (
        config.take(name, bool, default)
        for name, default in (("apply_b_dec_to_input", True), ("rescale_acts_by_decoder_norm", False))
    )
    d, n = config.take("d_in", int), config.take("d_sae", int)
    config.ignore(*OF_TRAINING["sae-lens"])
    config.require_empty()
    state, scale = read_safetensors_file(folder / "sae_weights.safetensors"), input_scale or 1.0
    if state.holds("scaling_factor") and (state.take("scaling_factor", n) != 1).any():
        raise ValueError(f"{state.path}: its scaling_factor is not 1, which cannot be read")
    more = {"threshold": state.take("threshold", n)} if variant == "jumprelu" else {}
    sae = build_sae(
        SAEConfig(d, n, k if variant == "topk" else min(10, n), variant, input_norm=norms[norm]),
        encoder=state.take("W_enc", d, n).T * scale, decoder=state.take("W_dec", n, d) / scale,
        latent_bias=state.take("b_enc", n), pre_bias=state.take("b_dec", d) / scale, subtracted=subtracted,
        unit_length=variant != "topk" or rescaled, **more,
    )  # fmt: skip
    state.require_empty(f"which SAELens' architecture {architecture!r} does not have")
    return LoadedSAE(sae, "sae-lens")


def read_dictionary_learning(folder: Path) -> LoadedSAE:
    """Read a folder with dictionary-learning's ``ae.pt``.

    ``config.json`` is needed only for the two classes that have the same tensors, ``AutoEncoderTopK`` and
    ``BatchTopKSAE``.
    """
    path, stated = folder / "ae.pt", None
    state = Tensors(path, read_torch_file(path))
    width = features = k = None
    if (folder / "config.json").is_file():
        outer = Fields(folder / "config.json", read_config_file(folder / "config.json"))
        config = Fields(folder / "config.json", outer.take("trainer", dict))
        outer.ignore("buffer")
        outer.require_empty()
        stated = config.take("dict_class", str)
        width, features = config.take("activation_dim", int, None), config.take("dict_size", int, None)
        k = config.take("k", int, None)
        config.ignore(*OF_TRAINING["dictionary-learning"])
        config.require_empty()
    names = {name for name in state.names if name not in ("k", "threshold", "group_sizes")}
    linear = {"encoder.weight", "encoder.bias", "decoder.weight"}
    if names == linear | {"bias"}:
        kinds = ["AutoEncoder"]
    elif names == linear | {"decoder.bias"}:
        kinds = ["AutoEncoderNew"]
    elif names == linear | {"b_dec"}:
        kinds = ["AutoEncoderTopK", "BatchTopKSAE"]
    elif names == {"W_enc", "b_enc", "W_dec", "b_dec"}:
        kinds = ["MatryoshkaBatchTopKSAE" if state.holds("group_sizes") else "JumpReluAutoEncoder"]
    else:
        raise ValueError(f"{path}: holds {', '.join(sorted(names))}, which is none of the classes that can be read")
    if (stated or kinds[0]) not in kinds or (stated is None and len(kinds) > 1):
        said = f"config.json says {stated}" if stated else "a config.json with trainer.dict_class is needed"
        raise ValueError(f"{path}: its tensors are those of {' or '.join(kinds)}; {said}")
    kind = stated or kinds[0]
    if "W_enc" in names:
        d, n = state.shape("W_enc")
        encoder, latent_bias = state.take("W_enc", d, n).T, state.take("b_enc", n)
        decoder, pre_bias = state.take("W_dec", n, d), state.take("b_dec", d)
    else:
        n, d = state.shape("encoder.weight")
        encoder, latent_bias = state.take("encoder.weight", n, d), state.take("encoder.bias", n)
        decoder = state.take("decoder.weight", d, n).T
        pre_bias = state.take(*(names - linear), d)
    for name, expected, found in (("activation_dim", width, d), ("dict_size", features, n)):
        if expected not in (None, found):
            raise ValueError(f"{folder / 'config.json'}: its {name} is {expected}, that of ae.pt is {found}")
    weights = {"encoder": encoder, "decoder": decoder, "latent_bias": latent_bias, "pre_bias": pre_bias}
    if kind in ("AutoEncoder", "AutoEncoderNew"):
        settings, more = (
            SAEConfig(d, n, min(10, n), "relu_l1"),
            {"subtracted": kind == "AutoEncoder", "unit_length": True},
        )
    elif kind == "JumpReluAutoEncoder":
        settings = SAEConfig(d, n, min(10, n), "jumprelu")
        more = {"threshold": state.take("threshold", n), "subtracted": False, "unit_length": True}
    else:
        k_there = int(state.take("k"))
        if k not in (None, k_there):
            raise ValueError(f"{folder / 'config.json'}: its k is {k}, that of ae.pt is {k_there}")
        threshold = state.take("threshold")
        state.ignore("group_sizes")
        settings = SAEConfig(d, n, k_there, "topk" if kind == "AutoEncoderTopK" else "batchtopk")
        more = {} if kind == "AutoEncoderTopK" else {"threshold": threshold}
    sae = build_sae(settings, **weights, **more)
    state.require_empty(f"which {kind} does not have")
    return LoadedSAE(sae, "dictionary-learning")


def read_saev(folder: Path) -> LoadedSAE:
    """Read a folder with saev's ``sae.pt``: a line of JSON, then a state dict.

    Early versions of saev subtracted ``b_dec`` from the input; their files have no schema. Versions that call the width
    ``d_model`` do not subtract it. Files from in between have a schema but call the width ``d_vit``; they do not say
    whether ``b_dec`` is subtracted, and are refused.
    """
    path = folder / "sae.pt"
    line, _, rest = path.read_bytes().partition(b"\n")
    header = Fields(path, _parsed(path, lambda: json.loads(line)))
    legacy = not header.holds("schema")
    if legacy:
        config = header
    else:
        schema = header.take("schema", int)
        if schema > 5:
            raise ValueError(f"{path}: its schema is {schema}; only 1 to 5 can be read")
        config = Fields(path, header.take("cfg", dict))
        header.ignore("commit", "lib", "cls")
        header.require_empty()
        if config.holds("d_vit"):
            raise ValueError(
                f"{path}: has a schema and calls the width 'd_vit'; such files do not say whether b_dec is subtracted "
                "from the input; save it again with a newer saev"
            )
    d = config.take("d_vit" if legacy else "d_model", int)
    factor, n = config.take("exp_factor", int, None), config.take("d_sae", int, None)
    if factor is None and n is None:
        raise ValueError(f"{path}: has neither 'd_sae' nor 'exp_factor'")
    n = n or d * factor
    kind, k = "Relu", None
    if not legacy:
        activation = Fields(path, config.take("activation", dict))
        kind, params = activation.take("cls", str), Fields(path, activation.take("params", dict))
        activation.require_empty()
        if kind not in ("Relu", "TopK", "BatchTopK"):
            raise ValueError(f"{path}: its activation is {kind!r}; only 'Relu', 'TopK' or 'BatchTopK' can be read")
        k = params.take("top_k", int) if kind != "Relu" else None
        params.ignore("key", "kind", "sparsity", "aux", "momentum")
        params.require_empty()
    config.ignore(*OF_TRAINING["saev"])
    config.require_empty()
    state = Tensors(path, read_torch_file(path, rest))
    more: dict[str, Any] = {}
    if kind == "Relu":
        settings = SAEConfig(d, n, min(10, n), "relu_l1")
    elif state.holds("activation.threshold"):
        settings, more = SAEConfig(d, n, k, "batchtopk"), {"threshold": state.take("activation.threshold")}
    else:  # the k largest, negative ones among them
        settings = SAEConfig(d, n, k, "k_sae")
    sae = build_sae(
        settings, encoder=state.take("W_enc", d, n).T, decoder=state.take("W_dec", n, d),
        latent_bias=state.take("b_enc", n), pre_bias=state.take("b_dec", d), subtracted=legacy,
        unit_length=kind == "Relu", **more,
    )  # fmt: skip
    state.require_empty()
    return LoadedSAE(sae, "saev")


def read_gemma_scope(folder: Path) -> LoadedSAE:
    """Read a folder with Gemma Scope's ``params.npz`` (Lieberum et al., 2024)."""
    path = folder / "params.npz"

    def arrays() -> dict[str, Tensor]:
        with np.load(path, allow_pickle=False) as file:
            return {name: torch.from_numpy(file[name]) for name in file.files}

    state = Tensors(path, _parsed(path, arrays))
    d, n = state.shape("W_enc")
    sae = build_sae(
        SAEConfig(d, n, min(10, n), "jumprelu"), encoder=state.take("W_enc", d, n).T, decoder=state.take("W_dec", n, d),
        latent_bias=state.take("b_enc", n), pre_bias=state.take("b_dec", d), threshold=state.take("threshold", n),
        subtracted=False, unit_length=True,
    )  # fmt: skip
    state.require_empty()
    return LoadedSAE(sae, "gemma-scope")


FILES = {
    FORMAT: ("config.json", "sae.safetensors"),
    "sdxl-unbox": ("config.json", "state_dict.pth"),
    "sae-lens": ("cfg.json", "sae_weights.safetensors"),
    "sparsify": ("cfg.json", "sae.safetensors"),
    "dictionary-learning": ("ae.pt",),
    "saev": ("sae.pt",),
    "gemma-scope": ("params.npz",),
}
"""The files by which a folder of each format is recognised."""
OPTIONAL_FILES = {"sdxl-unbox": ("mean.pt", "std.pt"), "dictionary-learning": ("config.json",)}
"""Further files that a folder of a format may hold; they are read too."""
READERS: Mapping[str, Callable[[Path], LoadedSAE]] = {
    "sdxl-unbox": read_sdxl_unbox,
    "sae-lens": read_sae_lens,
    "sparsify": read_sparsify,
    "dictionary-learning": read_dictionary_learning,
    "saev": read_saev,
    "gemma-scope": read_gemma_scope,
}
"""The function that reads a folder of each format."""


def build_sae(
    config: SAEConfig,
    *,
    encoder: Tensor,
    decoder: Tensor,
    latent_bias: Tensor,
    pre_bias: Tensor,
    threshold: Tensor | None = None,
    subtracted: bool = True,
    unit_length: bool = False,
) -> SAE:
    """Build an autoencoder with given weights.

    Args:
        config: the autoencoder's configuration.
        encoder: (n_features, d), the rows of the encoder.
        decoder: (n_features, d), the rows of the decoder.
        latent_bias: (n_features,), added to the pre-activations.
        pre_bias: (d,), added to reconstructions.
        threshold: (n_features,) for ``jumprelu``, a scalar for ``batchtopk``. A negative threshold acts as 0, because
            the libraries apply ReLU before they compare.
        subtracted: whether the library also subtracts ``pre_bias`` from the input. If not, ``latent_bias`` is changed
            such that the subtraction, which this lab always does, has no effect on the pre-activations.
        unit_length: scale the features to unit length and their activations accordingly. If each feature is selected
            independently of the others, this changes no reconstruction.
    """
    weights = {"encoder": encoder, "decoder": decoder, "latent_bias": latent_bias, "pre_bias": pre_bias}
    weights = {name: value.double() for name, value in weights.items()}
    threshold = None if threshold is None else threshold.double().clamp_min(0)
    if not subtracted:
        weights["latent_bias"] = weights["latent_bias"] + weights["encoder"] @ weights["pre_bias"]
    if unit_length:
        lengths = torch.linalg.vector_norm(weights["decoder"], dim=1).clamp_min(1e-8)
        weights["decoder"] = weights["decoder"] / lengths[:, None]
        weights["encoder"] = weights["encoder"] * lengths[:, None]
        weights["latent_bias"] = weights["latent_bias"] * lengths
        threshold = None if threshold is None else threshold * lengths
    sae = SAE(config)
    with torch.no_grad():
        for name, value in weights.items():
            getattr(sae, name).copy_(value)
        if config.variant == "jumprelu":
            sae.set_thresholds(threshold)
        elif config.variant == "batchtopk":
            sae.threshold.copy_(threshold)
    return sae


class Fields:
    """A JSON object whose keys must all be taken or ignored by name; a key that is left is an error."""

    def __init__(self, path: Path, values: Any):
        if not isinstance(values, dict):
            raise ValueError(f"{path}: expected named values, got {type(values).__name__}")
        self.path, self._values = path, dict(values)

    def holds(self, name: str) -> bool:
        """Say whether a key is there and not taken yet."""
        return name in self._values

    def take(self, name: str, kind: Any, default: Any = REQUIRED) -> Any:
        """Take a value, which must be of a type or one of several types; ``default`` if the key is missing or null."""
        value = self._values.pop(name, None)
        if value is None:
            if default is REQUIRED:
                raise ValueError(f"{self.path}: has no {name!r}")
            return default
        kinds = kind if isinstance(kind, tuple) else (kind,)
        if float in kinds and type(value) is int:
            return float(value)
        if type(value) not in kinds and not (dict in kinds and isinstance(value, dict)):
            expected = " or ".join(one.__name__ for one in kinds)
            raise ValueError(f"{self.path}: its {name} is {value!r}; expected {expected}")
        return value

    def require(self, name: str, expected: Any) -> None:
        """Raise ValueError if the key is there with another value than ``expected``."""
        value = self._values.pop(name, None)
        if value is not None and value != expected:
            raise ValueError(f"{self.path}: its {name} is {value!r}; only {expected!r} can be read")

    def ignore(self, *names: str) -> None:
        """Drop keys that do not affect the codes."""
        for name in names:
            self._values.pop(name, None)

    def require_empty(self) -> None:
        """Raise ValueError if a key was neither taken nor ignored."""
        for name, value in self._values.items():
            raise ValueError(f"{self.path}: has the key {name!r} ({value!r}), which this lab does not understand")


class Tensors:
    """Named tensors that must all be taken or ignored by name; a tensor that is left is an error."""

    def __init__(self, path: Path, values: Any):
        if not isinstance(values, Mapping) or not all(isinstance(value, Tensor) for value in values.values()):
            raise ValueError(f"{path}: expected named tensors")
        self.path, self._values = path, dict(values)

    @property
    def names(self) -> list[str]:
        """The names of the tensors that are left."""
        return list(self._values)

    def holds(self, name: str) -> bool:
        """Say whether a tensor is there and not taken yet."""
        return name in self._values

    def shape(self, name: str) -> tuple[int, int]:
        """Return the shape of a matrix."""
        if name not in self._values or self._values[name].ndim != 2:
            raise ValueError(f"{self.path}: has no matrix {name!r}")
        return tuple(self._values[name].shape)

    def take(self, name: str, *shape: int) -> Tensor:
        """Take a tensor in float64, which must have a shape and be finite."""
        if name not in self._values:
            raise ValueError(f"{self.path}: has no tensor {name!r}")
        value = self._values.pop(name)
        if tuple(value.shape) != shape:
            raise ValueError(f"{self.path}: its {name} is {tuple(value.shape)}; its configuration says {shape}")
        value = value.detach().double()
        if not all_finite(value):
            raise ValueError(f"{self.path}: {name} holds NaN or infinity")
        return value

    def ignore(self, *names: str) -> None:
        """Drop tensors that do not affect the codes."""
        for name in names:
            self._values.pop(name, None)

    def require_empty(self, reason: str = "which this lab does not understand") -> None:
        """Raise ValueError if a tensor was neither taken nor ignored."""
        for name in self._values:
            raise ValueError(f"{self.path}: holds the tensor {name!r}, {reason}")


def read_safetensors_file(path: Path) -> Tensors:
    """Read the tensors of a safetensors file; a damaged file is a ValueError with its path."""
    return Tensors(path, _parsed(path, lambda: load_file(path)))


def read_torch_file(path: Path, data: bytes | None = None) -> Any:
    """Read a file that ``torch.save`` wrote, weights only (no code runs). A damaged file is a ValueError with its path.

    Args:
        path: the file; errors name it.
        data: the bytes to read instead of the file; None means that the file is read.
    """
    source = path if data is None else io.BytesIO(data)
    return _parsed(path, lambda: torch.load(source, map_location="cpu", weights_only=True))


def _parsed(path: Path, parse: Callable[[], Any]) -> Any:
    damage = (OSError, EOFError, KeyError, RuntimeError, SafetensorError, UnicodeDecodeError, ValueError,
              pickle.UnpicklingError, zipfile.BadZipFile)  # fmt: skip
    try:
        return parse()
    except damage as error:
        reason = (str(error).splitlines() or [""])[0][:200]
        raise ValueError(f"{path}: damaged, or not a file of that kind ({type(error).__name__}: {reason})") from error
