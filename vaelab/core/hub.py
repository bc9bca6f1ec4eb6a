"""Read models, data sets and folders from the Hugging Face hub, or from a local folder."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

from tqdm import tqdm

from vaelab.core.disk import readable, require_free
from vaelab.core.paths import local

TIMEOUT = 5.0
"""Seconds to wait for the hub's answer before it counts as out of reach."""
OFFLINE = "HF_HUB_OFFLINE is set"


@contextmanager
def access_repository(
    name: str, *, revision: str | None = None, dataset: bool = False, parameter: str = "model", hint: str = ""
) -> Iterator[Any]:
    """Ask the hub for a repository, and turn the hub's errors in the ``with`` block that loads it into one ValueError.

    The hub is asked once, beforehand. If it cannot be reached, a line says so, and only its local
    cache is used. Without this check the libraries would try each file six times, for about half a minute.

    Args:
        name: an id on the hub (owner/name).
        revision: a branch, tag or commit.
        dataset: whether the repository holds a data set, not a model.
        parameter: the notebook parameter that gave ``name``; error messages begin with it.
        hint: what error messages end with, such as the repository's new name.

    Yields:
        The hub's description of the repository with the sizes of its files (``huggingface_hub.ModelInfo`` or
        ``DatasetInfo``); None if only the local cache is read.

    Raises:
        ValueError: the hub cannot be reached and its local cache lacks the files, access is denied, or there is no such
            repository or revision. Other errors of the wrapped code are raised unchanged.
    """
    from huggingface_hub.errors import HFValidationError

    failed = f"{parameter}: {name!r} could not be read from the hub"
    absent = f"and its local cache lacks it; give a local folder{hint}"
    obstacle, info = None, None
    try:
        info = _describe(name, revision, dataset)
    except HFValidationError as error:
        raise ValueError(f"{failed}: {error}") from error
    except network_errors() as error:
        if reason := _refusal(error):
            raise ValueError(f"{failed}: {reason}{hint}") from error
        obstacle = _obstacle(error)
        if not dataset and not _in_cache(name):  # before the import of large libraries
            raise ValueError(f"{failed}: {obstacle}, {absent}") from error
        if obstacle != OFFLINE:
            print(f"{name}: {obstacle}; only its local cache is read")
    with _cache_only() if obstacle else nullcontext():
        try:
            yield info
        except (OSError, RuntimeError, ValueError, *network_errors()) as error:
            causes = [error]
            while (cause := causes[-1].__cause__ or causes[-1].__context__) is not None:
                causes.append(cause)
            if reason := next(filter(None, map(_refusal, causes)), None):
                raise ValueError(f"{failed}: {reason}{hint}") from error
            if obstacle and any(isinstance(cause, ConnectionError | FileNotFoundError) for cause in causes):
                raise ValueError(f"{failed}: {obstacle}, {absent}") from error
            if lost := next((cause for cause in causes if isinstance(cause, network_errors()[0])), None):
                raise ValueError(f"{failed}: {_obstacle(lost)}{hint}") from error
            raise


def announce_download(
    name: str,
    files: Sequence[str],
    *,
    revision: str | None = None,
    dataset: bool = False,
    parameter: str = "model",
    prepared: bool = False,
) -> None:
    """Print how many files and bytes of a repository will be downloaded, and require the disk space for them; print
    nothing if all are in the local cache.

    Args:
        name: an id on the hub (owner/name).
        files: the names or globs of the files that will be loaded; empty means all files.
        revision: a branch, tag or commit.
        dataset: whether the repository holds a data set, not a model.
        parameter: the notebook parameter that gave ``name``; the error begins with it.
        prepared: whether the files are converted after the download, which takes as much space again.

    Raises:
        ValueError: the disk of the local cache does not have enough free space.
    """
    from huggingface_hub import constants, snapshot_download

    planned = snapshot_download(
        name, revision=revision, repo_type="dataset" if dataset else "model", allow_patterns=list(files) or None,
        dry_run=True, tqdm_class=_NoBar,
    )  # fmt: skip
    sizes = [file.file_size or 0 for file in planned if file.will_download]
    if not sizes:
        return
    needed = sum(sizes) * (2 if prepared else 1)
    again = f", and {readable(needed)} on disk once they are converted" if prepared else ""
    print(f"{name}: {len(sizes)} files of {readable(sum(sizes))} are downloaded from the hub{again}")
    require_free(
        needed, constants.HF_HUB_CACHE, parameter=parameter, what=f"the download of {name!r}",
        advice="free some, or set HF_HOME to a folder on a larger disk",
    )  # fmt: skip


class _NoBar(tqdm):
    """A progress bar that is not shown."""

    def __init__(self, *given: Any, **options: Any):
        super().__init__(*given, **{key: value for key, value in options.items() if key != "name"} | {"disable": True})


def _describe(name: str, revision: str | None, dataset: bool) -> Any:
    from huggingface_hub import HfApi

    kind = "dataset" if dataset else "model"
    return HfApi().repo_info(name, revision=revision, repo_type=kind, timeout=TIMEOUT, files_metadata=True)


def _in_cache(name: str) -> bool:
    from huggingface_hub import constants
    from huggingface_hub.file_download import repo_folder_name

    return (Path(constants.HF_HUB_CACHE) / repo_folder_name(repo_id=name, repo_type="model")).is_dir()


def network_errors() -> tuple[type[Exception], ...]:
    """The errors of a request: those of the HTTP library, which differs between versions of ``huggingface_hub``, and
    OSError."""
    from huggingface_hub.errors import HfHubHTTPError

    return HfHubHTTPError.__bases__


def _refusal(error: BaseException) -> str | None:
    """Explain an answer of the hub that refuses a repository; None if the hub gave no such answer."""
    status = getattr(getattr(error, "response", None), "status_code", None)
    if status in (401, 403):
        return (
            f"access is denied ({status}); it does not exist, or it is private or behind a licence, which needs "
            "the licence's acceptance on its page and HF_TOKEN"
        )
    return "it has no such repository or revision (404)" if status == 404 else None


def _obstacle(error: Exception) -> str:
    from huggingface_hub.errors import OfflineModeIsEnabled

    return OFFLINE if isinstance(error, OfflineModeIsEnabled) else f"the hub cannot be reached ({error})"


@contextmanager
def _cache_only() -> Iterator[None]:
    """Switch the hub's clients to their local cache."""
    import datasets
    from huggingface_hub import constants

    before = constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE = before


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

        if str(name).count("/") != 1 or str(name).startswith((".", "/", "~")):
            raise ValueError(f"{parameter}: {str(name)!r} is neither a folder nor an id on the hub (owner/name)")
        prefix = f"{subfolder}/" if subfolder else ""
        patterns = [prefix + pattern for pattern in files or (["*"] if subfolder else [])]
        with access_repository(str(name), revision=revision, parameter=parameter) as info:
            if info:
                announce_download(str(name), patterns, revision=revision, parameter=parameter)
            folder = Path(snapshot_download(str(name), revision=revision, allow_patterns=patterns or None))
        if files and not any(path for pattern in files for path in (folder / subfolder).glob(pattern)):
            raise ValueError(f"{parameter}: {str(name)!r} on the hub has none of the files {', '.join(files)}")
    if not (folder / subfolder).is_dir():
        raise ValueError(f"{parameter}: {str(name)!r} is no folder, or has no folder {subfolder!r}")
    return folder / subfolder
