"""The package's layout: quick to import, and every folder imports only from the folders below it."""

import shutil
import subprocess
import sys
from pathlib import Path

import vaelab

PACKAGE = Path(vaelab.__file__).parent
PROJECT = PACKAGE.parent
HEAVY = {"torch", "numpy", "pandas", "matplotlib", "scipy", "diffusers", "transformers", "accelerate", "datasets"}


def lint(project):
    """Run import-linter on the package in ``project``, by the contracts of its pyproject.toml."""
    lint_imports = [sys.executable, "-c", "import sys; from importlinter.cli import lint_imports_command as c; c()"]
    return subprocess.run([*lint_imports, "--no-cache"], cwd=project, capture_output=True, text=True)


def copied(folder):
    """A copy of the package without its weights, beside the project's contracts."""
    ignored = shutil.ignore_patterns("weights", "__pycache__")
    shutil.copytree(PACKAGE, folder / "vaelab", ignore=ignored)
    shutil.copy(PROJECT / "pyproject.toml", folder)
    return folder


def test_importing_the_package_imports_nothing_heavy_and_is_quick():
    script = (
        "import sys, time; before = set(sys.modules); start = time.perf_counter(); import vaelab; "
        "print(time.perf_counter() - start, *(set(sys.modules) - before))"
    )
    result = subprocess.run([sys.executable, "-c", script], cwd=PROJECT, capture_output=True, text=True, check=True)
    seconds, *loaded = result.stdout.split()
    assert float(seconds) < 0.3
    assert "vaelab" in loaded
    assert not HEAVY & set(loaded)


def test_every_folder_imports_only_from_folders_below_it():
    result = lint(PROJECT)
    assert result.returncode == 0, result.stdout + result.stderr


def add(project, module, line):
    path = project / "vaelab" / module
    path.parent.mkdir(exist_ok=True)
    path.write_text((path.read_text() if path.exists() else "") + f"\n\n{line}\n")


def test_other_imports_are_refused(tmp_path):
    project = copied(tmp_path)
    add(project, "hooks.py", "from vaelab import sae")
    add(project, "core/__init__.py", "def late():\n    import vaelab.bench")
    add(project, "pruning/__init__.py", "import vaelab.probing")
    result = lint(project)
    assert result.returncode == 1
    for chain in ("vaelab.hooks -> vaelab.sae", "vaelab.core -> vaelab.bench", "vaelab.pruning -> vaelab.probing"):
        assert chain in result.stdout + result.stderr


def test_a_folder_that_no_contract_names_is_refused(tmp_path):
    add(copied(tmp_path), "annex/__init__.py", "")
    result = lint(tmp_path)
    assert result.returncode == 1
    assert "vaelab.annex" in result.stdout + result.stderr
