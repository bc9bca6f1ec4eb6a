"""Checksums of the weights that a run saves, in a ``checksums.json`` beside them.

A flipped bit in a weight changes the model without raising an error. The file holds the XXH3 checksum (128 bits,
hexadecimal) of each weight file in its folder, by name. It is optional: a folder without it, such as a download, is
loaded without this check.
"""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import xxhash

from vaelab.core.io import read_json, write_json

CHECKSUMS = "checksums.json"
PIECE = 2**22
"""Number of bytes that are read at a time."""


def save_with_checksums(model: Any, folder: str | Path) -> None:
    """Save a diffusers or transformers module, or a pipeline, with the checksums of its weight files.

    Each folder with weights has its own ``checksums.json``. Old files of this name are removed first, and new ones are
    written last, atomically. If the process is killed, no file remains that contradicts the weights beside it.
    """
    folder = Path(folder)
    for old in folder.rglob(CHECKSUMS):
        old.unlink()
    model.save_pretrained(folder)
    for place in sorted({file.parent for file in folder.rglob("*.safetensors")}):
        write_json(place / CHECKSUMS, {file.name: checksum(file) for file in sorted(place.glob("*.safetensors"))})


@contextmanager
def checksums_verified(folder: Path, name: str, only: str | None = None) -> Iterator[None]:
    """Compare the weight files of a local folder with its ``checksums.json``, if there is one, in a thread while the
    ``with`` block loads them.

    Loading does not take measurably longer for it: with a file of 335 MB (the SDXL-VAE in float32) in the system's
    cache, the loading thread takes 0.33 s of its core either way, and this thread takes 0.065 s of another one.

    Args:
        folder: the folder of one module.
        name: the name by which the user loads the model, for error messages.
        only: the name of the only file to check; None means all files that are listed.

    Raises:
        ValueError: at the end of the block: a weight file is missing or has another checksum, or ``checksums.json`` is
            damaged. It is raised in place of an error of the block, since damaged weights may cause any error.
    """
    with ThreadPoolExecutor(1) as pool:
        verified = pool.submit(_verify, folder, name, only)
        try:
            yield
        finally:
            verified.result()


def _verify(folder: Path, name: str, only: str | None) -> None:
    file = folder / CHECKSUMS
    if not file.is_file():
        return
    try:
        expected = read_json(file)
    except ValueError as error:
        raise ValueError(f"model: {CHECKSUMS} of {name!r} is damaged: it is no JSON ({error})") from error
    if not isinstance(expected, dict):
        raise ValueError(f"model: {CHECKSUMS} of {name!r} is damaged: expected an object, got {expected!r:.60}")
    for weights, digest in expected.items():
        if only is not None and weights != only:
            continue
        if not (folder / weights).is_file():
            raise ValueError(f"model: {weights} of {name!r} is missing; {CHECKSUMS} in {str(folder)!r} lists it")
        if checksum(folder / weights) != digest:
            raise ValueError(
                f"model: {weights} of {name!r} is damaged: its checksum differs from the one in {CHECKSUMS} beside it; "
                f"if you replaced the weights on purpose, remove {CHECKSUMS}"
            )


def checksum(file: Path) -> str:
    """Compute a file's XXH3 checksum (128 bits, hexadecimal)."""
    digest = xxhash.xxh3_128()
    with open(file, "rb") as source:
        while piece := source.read(PIECE):
            digest.update(piece)
    return digest.hexdigest()
