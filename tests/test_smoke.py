"""Every notebook's smoke.yaml, run by the runner."""

import json
import os
import re
import subprocess
import sys

import nbformat
import pytest
from notebook_cells import ROOT, code

pytestmark = pytest.mark.smoke
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


@pytest.fixture(scope="session")
def smoked():
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "vaelab.runner.cli", "all", "smoke", "--jobs", "2", "--overwrite"]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=1500)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_smoke(smoked, path):
    folder = ROOT / "outputs" / path.stem
    assert (folder / "smoke" / "results.json").exists(), smoked.stdout[-4000:] + smoked.stderr[-4000:]
    results = json.loads((folder / "smoke" / "results.json").read_text())
    assert results["notebook"] == path.stem
    assert {"params", "metrics", "tables", "seconds", "environment"} <= results.keys()
    assert results["metrics"]
    assert (folder / "smoke.html").stat().st_size > 10_000
    executed = nbformat.read(folder / "smoke.ipynb", as_version=4)
    assert any(out.output_type == "display_data" or "data" in out for cell in code(executed) for out in cell.outputs)
    for text in ((folder / "smoke" / "results.json").read_text(), (folder / "smoke.ipynb").read_text()):
        assert str(ROOT) not in text


def test_the_front_page_links_every_run(smoked):
    page = (ROOT / "outputs" / "index.html").read_text()
    assert smoked.returncode == 0, smoked.stdout[-4000:] + smoked.stderr[-4000:]
    for path in NOTEBOOKS:
        assert f'href="{path.stem}/smoke.html"' in page
    for link in re.findall(r'(?:href|src)="([^"#][^"]*)"', page):
        assert (ROOT / "outputs" / link).exists(), link
