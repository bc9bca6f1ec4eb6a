"""A folder by its name: a local one, or one that is downloaded from the hub."""

from pathlib import Path

from vaelab.core.paths import local


def find(name: str | Path, *, revision: str | None = None, subfolder: str = "", parameter: str = "sae") -> Path:
    """The local folder that ``name`` stands for.

    Args:
        name: a local folder, or an id on the hub (owner/name), whose files are then downloaded.
        revision: a branch, tag or commit on the hub.
        subfolder: which part of it.
        parameter: what errors call the name.

    Raises:
        ValueError: neither a folder nor an id on the hub, or one without that part.
    """
    folder = local(name)
    if folder is None:
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

        if str(name).count("/") != 1 or str(name).startswith((".", "/", "~")):
            raise ValueError(f"{parameter}: {str(name)!r} is neither a folder nor an id on the hub (owner/name)")
        try:
            patterns = f"{subfolder}/*" if subfolder else None
            folder = Path(snapshot_download(str(name), revision=revision, allow_patterns=patterns))
        except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
            raise ValueError(f"{parameter}: {str(name)!r} could not be read from the hub ({error})") from error
    if not (folder / subfolder).is_dir():
        raise ValueError(f"{parameter}: {str(name)!r} is no folder, or has no folder {subfolder!r}")
    return folder / subfolder
