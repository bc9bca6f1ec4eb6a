"""Find folders by name: a local folder, or files downloaded from the Hugging Face hub."""

from collections.abc import Sequence
from pathlib import Path

from vaelab.core.paths import local


def find_folder(
    name: str | Path,
    *,
    revision: str | None = None,
    subfolder: str = "",
    files: Sequence[str] = (),
    parameter: str = "sae",
) -> Path:
    """Find the local folder for ``name``; files of a hub repository are downloaded first.

    Args:
        name: a local folder, or an id on the hub (owner/name).
        revision: a branch, tag or commit on the hub.
        subfolder: a folder inside the folder or repository; empty means the whole.
        files: globs of the files to download, relative to ``subfolder``, such as ``*.json``: only what will be loaded,
            since repositories often hold the same weights in several formats. Empty means all files.
        parameter: the notebook parameter that gave ``name``; error messages begin with it.

    Raises:
        ValueError: ``name`` is neither a folder nor an id on the hub, the repository cannot be read or has none of
            these files, or the subfolder does not exist.
    """
    folder = local(name)
    if folder is None:
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

        if str(name).count("/") != 1 or str(name).startswith((".", "/", "~")):
            raise ValueError(f"{parameter}: {str(name)!r} is neither a folder nor an id on the hub (owner/name)")
        prefix = f"{subfolder}/" if subfolder else ""
        patterns = [prefix + pattern for pattern in files or (["*"] if subfolder else [])]
        try:
            folder = Path(snapshot_download(str(name), revision=revision, allow_patterns=patterns or None))
        except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
            raise ValueError(f"{parameter}: {str(name)!r} could not be read from the hub ({error})") from error
        if files and not any(path for pattern in files for path in (folder / subfolder).glob(pattern)):
            raise ValueError(f"{parameter}: {str(name)!r} on the hub has none of the files {', '.join(files)}")
    if not (folder / subfolder).is_dir():
        raise ValueError(f"{parameter}: {str(name)!r} is no folder, or has no folder {subfolder!r}")
    return folder / subfolder
