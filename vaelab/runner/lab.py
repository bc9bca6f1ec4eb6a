"""JupyterLab on copies of the notebooks, so that running and saving them changes no file of the project."""

import os
import shutil
import sys
from pathlib import Path


def copy_notebooks(root: Path) -> Path:
    """Copy each notebook to ``outputs/lab`` unless it is there already; returns that folder."""
    folder = root / "outputs" / "lab"
    folder.mkdir(parents=True, exist_ok=True)
    for notebook in sorted((root / "notebooks").glob("*.ipynb")):
        copy = folder / notebook.name
        if not copy.exists():
            shutil.copyfile(notebook, copy)
        elif copy.stat().st_mtime < notebook.stat().st_mtime:
            print(f"{copy.relative_to(root)} is older than the notebook; it is kept, delete it to get the new one")
    return folder


def start(root: Path) -> None:
    """Replace this process by JupyterLab in the project's folder, opened at the copies."""
    folder = copy_notebooks(root).relative_to(root).as_posix()
    print(f"your copies of the notebooks are in {folder}; what you change there is never overwritten", flush=True)
    os.execv(
        sys.executable,
        [
            sys.executable,
            "-m",
            "jupyterlab",
            f"--ServerApp.root_dir={root}",
            f"--LabApp.default_url=/lab/tree/{folder}",
        ],
    )
