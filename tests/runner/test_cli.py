import json
import re
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest

from vaelab.runner import cli, index

ROOT = Path(__file__).parent.parent
PARAMETERS = """output_dir: str = "outputs/20_two/interactive"  # folder
fail: bool = False  # whether to
runs: list[str] = []  # to read
"""
BODY = """
from pathlib import Path
assert not fail, "it was to fail"
assert all((Path(folder) / "results.json").exists() for folder in runs)
Path(output_dir).mkdir(parents=True, exist_ok=True)
(Path(output_dir) / "results.json").write_text(
    '{"metrics": {"<b>n</b>": 0.123456}, "files": ["a b.png"], "seconds": 1.0, "environment": {}}'
)
print("\\r begun\\r ended")
"""


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A project of two notebooks, of which the second reads what the first made."""
    for name in ("10_one", "20_two"):
        kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
        nb = nbformat.v4.new_notebook(metadata={"kernelspec": kernel})
        nb.cells = [nbformat.v4.new_code_cell(PARAMETERS), nbformat.v4.new_code_cell(BODY)]
        nb.cells[0].metadata["tags"] = ["parameters"]
        (tmp_path / "notebooks").mkdir(exist_ok=True)
        nbformat.write(nb, tmp_path / "notebooks" / f"{name}.ipynb")
    write_params(tmp_path, "10_one", "demo", "")
    write_params(tmp_path, "20_two", "demo", "runs: [outputs/10_one/demo]")
    (tmp_path / "outputs").mkdir()
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write_params(root, notebook, name, text):
    path = root / "params" / notebook / f"{name}.yaml"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"output_dir: outputs/{notebook}/{name}\n{text}\n")
    return path


def command(project, *words):
    line = [sys.executable, "-m", "vaelab.runner.cli", *words]
    return subprocess.run(line, cwd=project, env=environment(), capture_output=True, text=True)


def environment():
    import os

    return {**os.environ, "PYTHONPATH": str(ROOT)}


def test_the_path_is_the_name_and_what_is_read_is_run_first(project):
    ran = command(project, "run", "params/20_two/demo.yaml")
    assert ran.returncode == 0, ran.stderr
    assert "running it first" in ran.stdout
    for name in ("10_one", "20_two"):
        for made in ("demo.ipynb", "demo.html", "demo/results.json"):
            assert (project / "outputs" / name / made).exists()
    page = (project / "outputs" / "10_one" / "demo.html").read_text()
    assert page.count(" begun") == 1  # in the source, no longer in the output


def test_a_failed_run_is_told_and_never_taken_for_a_finished_one(project):
    write_params(project, "10_one", "wrong", "fail: true")
    ran = command(project, "run", "params/10_one/wrong.yaml")
    assert ran.returncode == 1
    assert "AssertionError: it was to fail" in ran.stderr
    assert not (project / "outputs" / "10_one" / "wrong" / "results.json").exists()
    assert not (project / "outputs" / "10_one" / "wrong.html").exists()
    assert "not finished" in (project / "outputs" / "index.html").read_text()


def test_a_wrong_parameter_is_told_in_one_line(project):
    write_params(project, "10_one", "wrong", "fial: true")
    ran = command(project, "run", "params/10_one/wrong.yaml")
    assert ran.returncode == 2
    assert "fial" in ran.stderr and "fail" in ran.stderr and "Traceback" not in ran.stderr


def test_all_runs_go_on_past_a_failure_but_not_what_reads_it(project):
    write_params(project, "10_one", "demo", "fail: true")
    write_params(project, "10_one", "demo-other", "")
    ran = command(project, "all", "demo", "--jobs", "2")
    assert ran.returncode == 1
    assert "failed: 10_one/demo, 20_two/demo" in ran.stderr
    assert (project / "outputs" / "10_one" / "demo-other" / "results.json").exists()
    assert not (project / "outputs" / "20_two" / "demo" / "results.json").exists()


def test_a_run_whose_params_file_changed_is_no_longer_finished(project):
    params = write_params(project, "10_one", "demo", "")
    assert not cli.finished(params)
    folder = project / "outputs" / "10_one" / "demo"
    folder.mkdir(parents=True)
    stored = {"params": {"output_dir": "outputs/10_one/demo", "fail": False, "runs": []}}
    (folder / "results.json").write_text(json.dumps(stored))
    assert cli.finished(params)
    assert not cli.finished(write_params(project, "10_one", "demo", "fail: true"))


def test_matching_takes_a_name_and_its_variants_only(project):
    write_params(project, "10_one", "demo-x", "")
    write_params(project, "10_one", "demolition", "")
    assert [cli.label(path) for path in cli.matching("demo")] == ["10_one/demo", "10_one/demo-x", "20_two/demo"]


def test_an_unknown_notebook_lists_the_nearest(project):
    with pytest.raises(ValueError, match="10_one"):
        cli.load_params(write_params(project, "10_onne", "demo", ""))


def test_the_front_page_escapes_what_it_shows(project):
    folder = project / "outputs" / "10_one" / "demo"
    folder.mkdir(parents=True)
    results = {
        "metrics": {"<b>n</b>": 0.5},
        "files": ["a b.png", "runs"],
        "seconds": 2.0,
        "environment": {"device_name": "<i>"},
    }
    (folder / "results.json").write_text(json.dumps(results))
    page = index.write(project / "outputs").read_text()
    assert "<b>" not in page and "&lt;b&gt;n&lt;/b&gt;" in page and "<i>" not in page
    assert 'src="10_one/demo/a%20b.png"' in page
    assert "2.0 s" in page


def test_the_front_page_says_what_a_notebook_asks_and_folds_its_smoke_run(project):
    folder = project / "outputs" / "10_one"
    for name in ("demo", "smoke"):
        (folder / name).mkdir(parents=True)
        (folder / name / "results.json").write_text('{"metrics": {}, "seconds": 1, "environment": {}}')
    nb = nbformat.v4.new_notebook(cells=[nbformat.v4.new_markdown_cell("# 10 · Why <so>?\nBecause.")])
    nbformat.write(nb, project / "notebooks" / "10_one.ipynb")
    page = index.write(project / "outputs").read_text()
    assert "Why &lt;so&gt;?" in page
    demo, smoke = page.split("<details>")
    assert "demo</h3>" in demo and "smoke</h3>" in smoke


def test_the_map_of_knowledge_stands_above_all_runs_the_full_one_first(project):
    for notebook, name, files in (
        ("10_one", "demo", ["knowledge-a.png"]), ("10_one", "full", ["other.png", "knowledge-a.png", "knowledge.txt"]),
        ("10_one", "smoke", ["knowledge-a.png"]), ("20_two", "demo", ["knowledge.png"]), ("20_two", "x", ["k.png"]),
    ):  # fmt: skip
        folder = project / "outputs" / notebook / name
        folder.mkdir(parents=True)
        results = {"metrics": {}, "seconds": 1, "environment": {}, "files": files}
        (folder / "results.json").write_text(json.dumps(results))
    above, below = index.write(project / "outputs").read_text().split("<h2>10_one</h2>")
    shown = re.findall(r'<img src="([^"]+)"', above)
    assert shown == ["20_two/demo/knowledge.png", "10_one/full/knowledge-a.png"]
    assert 'src="10_one/demo/knowledge-a.png"' in below


def test_an_empty_front_page_says_what_to_do(tmp_path):
    assert "make demo" in index.write(tmp_path).read_text()
