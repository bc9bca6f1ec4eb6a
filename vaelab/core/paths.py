"""Path resolution: relative paths start at the project root."""

from pathlib import Path


def project_root() -> Path:
    """The folder that relative paths start from.

    papermill's kernels work in the caller's folder, JupyterLab's in the notebook's: seen from
    ``notebooks/``, a path in a params file begins one folder up.
    """
    here = Path.cwd()
    beside_package = here.name == "notebooks" and (here.parent / "vaelab").is_dir()
    return here.parent if beside_package else here


def resolve(path: str | Path) -> Path:
    """``path`` with ``~`` expanded and, where it is relative, put under :func:`project_root`."""
    path = Path(path).expanduser()
    return path if path.is_absolute() else project_root() / path


def local(path: str | Path) -> Path | None:
    """The local file or folder that ``path`` names, or None where there is none."""
    resolved = resolve(path)
    return resolved if str(path) and resolved.exists() else None
