"""Path resolution: relative paths start at the project root."""

from pathlib import Path


def project_root() -> Path:
    """Return the folder that relative paths start from.

    papermill's kernels run in the caller's folder, but JupyterLab's kernels run in the notebook's folder. In
    ``notebooks/`` and in ``outputs/lab/``, which holds copies of the notebooks, the project root is therefore above.
    """
    here = Path.cwd()
    if here.name == "notebooks" and (here.parent / "vaelab").is_dir():
        return here.parent
    if here.parts[-2:] == ("outputs", "lab") and (here.parents[1] / "notebooks").is_dir():
        return here.parents[1]
    return here


def resolve(path: str | Path) -> Path:
    """Expand ``~`` in ``path`` and, if the path is relative, put it under :func:`project_root`."""
    path = Path(path).expanduser()
    return path if path.is_absolute() else project_root() / path


def local(path: str | Path) -> Path | None:
    """Return the local file or folder that ``path`` names; None if it does not exist."""
    resolved = resolve(path)
    return resolved if str(path) and resolved.exists() else None
