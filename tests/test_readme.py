"""The README: its length, its numbers, and its library example, run from another folder with the installed wheel."""

import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def numbers(text):
    """The numbers of a text that are results, without those in code, names and links."""
    text = re.sub(r"```.*?```|`[^`]*`|\]\([^)]*\)", " ", text, flags=re.DOTALL)
    return re.findall(r"[+-]?\d+(?:\.\d+)?", text)


def test_it_is_short():
    assert len(README.split()) <= 1200


def test_every_number_of_a_finding_stands_on_the_results_page():
    findings = README.split("## Five findings")[1].split("\n## ")[0]
    known = {number.lstrip("+-") for number in numbers((ROOT / "docs" / "results.md").read_text())}
    assert [number for number in numbers(findings) if number.lstrip("+-") not in known] == []


def test_a_number_that_no_run_gave_would_be_found():
    assert numbers("by +0.053 % (-0.021 to 0.13) in `up.1.2` ![a](b9.png)") == ["+0.053", "-0.021", "0.13"]
    assert "+0.054" not in numbers((ROOT / "docs" / "results.md").read_text())


@pytest.mark.slow
def test_the_library_example_runs_from_another_folder_with_the_installed_wheel(tmp_path):
    source = tmp_path / "source"  # a copy, since setuptools leaves its build folder in the source
    shutil.copytree(ROOT / "vaelab", source / "vaelab", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    build = f"from setuptools import build_meta; build_meta.build_wheel({str(tmp_path)!r})"  # as pip does, without pip
    subprocess.run([sys.executable, "-c", build], check=True, cwd=source, stdout=subprocess.DEVNULL)
    (wheel,) = tmp_path.glob("*.whl")
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    code = "\n".join(re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL))
    assert 15 <= len(code.splitlines()) <= 30
    (tmp_path / "example.py").write_text(code + "\nimport vaelab\nprint(vaelab.__file__)\n")
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "site"), "HF_HUB_OFFLINE": "1"}
    line = [sys.executable, "example.py"]
    ran = subprocess.run(line, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    assert "channels are suppressed" in ran.stdout and "torch.Size([4, 16, 16, 64])" in ran.stdout
    assert str(tmp_path / "site") in ran.stdout
