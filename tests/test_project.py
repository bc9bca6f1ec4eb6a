"""What stands around the package: pins, licence, ignored outputs, the README's commands."""

import re
import subprocess
import tomllib
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parent.parent


def pins(lines):
    return {line.split("==")[0].lower(): line.split("==")[1] for line in lines if re.match(r"[A-Za-z0-9_.-]+==", line)}


LOCK = pins((ROOT / "requirements.lock").read_text().splitlines())


def test_conda_users_get_the_same_pins():
    environment = yaml.safe_load((ROOT / "environment.yml").read_text())
    (pip,) = [entry["pip"] for entry in environment["dependencies"] if isinstance(entry, dict)]
    assert pins(pip) == LOCK
    assert "python=3.11" in environment["dependencies"]


def test_every_dependency_is_pinned_within_its_range():
    from packaging.requirements import Requirement

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for entry in map(Requirement, project["dependencies"]):
        assert entry.specifier.contains(LOCK[entry.name]), entry


def test_torch_is_spelled_so_that_pip_finds_the_cpu_build():
    assert LOCK["torch"] == "2.13.0"


def test_the_citation_names_the_four_papers():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    titles = " ".join(paper["title"] for paper in citation["references"])
    assert len(citation["references"]) == 4
    for word in ("Channel Suppression", "PeLAP-A", "Unpacking SDXL Turbo", "Revelio"):
        assert word in titles


def test_make_help_names_every_target():
    helped = subprocess.run(["make", "help"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for target in ("demo", "test", "lint", "run", "bench", "help"):
        assert re.search(rf"make {target}\b", helped)


def test_make_run_without_a_params_file_says_what_to_name():
    ran = subprocess.run(["make", "run", "PYTHON=python"], cwd=ROOT, capture_output=True, text=True)
    assert ran.returncode != 0
    assert "make run P=params/" in ran.stderr


@pytest.mark.parametrize("pattern", [r"\.cuda\(", r"trust_remote_code=True", r"pickle\.load", r"except Exception"])
def test_what_the_package_never_does(pattern):
    for path in [*(ROOT / "vaelab").rglob("*.py"), *(ROOT / "notebooks").glob("*.ipynb")]:
        assert not re.search(pattern, path.read_text()), path


def test_the_readme_names_files_that_exist():
    readme = (ROOT / "README.md").read_text()
    for link in re.findall(r"\]\(([^)#]+)\)", readme):
        assert link.startswith("http") or (ROOT / link).exists(), link
    for params in re.findall(r"P=(params/\S+\.yaml)", readme):
        assert (ROOT / params).exists(), params
    for notebook in (ROOT / "notebooks").glob("*.ipynb"):
        assert notebook.stem in readme
