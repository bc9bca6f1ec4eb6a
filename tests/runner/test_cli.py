import json
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest

from vaelab.runner import execute, index

ROOT = Path(__file__).parents[2]
PARAMETERS = """output_dir: str = "outputs/20_two/interactive"  # folder
fail: bool = False  # whether to
runs: list[str] = []  # to read
overwrite: bool = False
"""
BODY = """
from pathlib import Path
from vaelab import runner
run = runner.start("20_two", globals())
assert not fail, "it was to fail"
assert all((Path(folder) / "results.json").exists() for folder in runs)
(run.workspace("kept") / "file").write_text("made")
run.metric("<b>n</b>", 0.123456)
print("\\r begun\\r ended")
run.save()
"""


def new_project(folder):
    """A project of two notebooks, of which the second reads what the first made."""
    for name in ("10_one", "20_two"):
        kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
        nb = nbformat.v4.new_notebook(metadata={"kernelspec": kernel})
        nb.cells = [nbformat.v4.new_code_cell(PARAMETERS), nbformat.v4.new_code_cell(BODY)]
        nb.cells[0].metadata["tags"] = ["parameters"]
        (folder / "notebooks").mkdir(exist_ok=True)
        nbformat.write(nb, folder / "notebooks" / f"{name}.ipynb")
    write_params(folder, "10_one", "demo", "")
    write_params(folder, "20_two", "demo", "runs: [outputs/10_one/demo]")
    (folder / "outputs").mkdir()
    return folder


@pytest.fixture
def project(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return new_project(tmp_path)


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    """The project after its second notebook was run, and what the command said."""
    folder = new_project(tmp_path_factory.mktemp("ran"))
    return folder, command(folder, "run", "params/20_two/demo.yaml")


@pytest.fixture
def finished(ran, tmp_path, monkeypatch):
    """A copy of the project, in which both runs are finished."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(ran[0], tmp_path, dirs_exist_ok=True)
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


def test_the_path_is_the_name_and_what_is_read_is_run_first(ran):
    project, process = ran
    assert process.returncode == 0, process.stderr
    assert "running it first" in process.stdout
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
    assert "no results" in (project / "outputs" / "index.html").read_text()


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


def inodes(folder):
    return {path: (path.stat().st_ino, path.stat().st_mtime_ns) for path in folder.rglob("*")
            if path.is_file() and ".run" not in path.parts}  # fmt: skip


def test_finished_run_is_not_run_again_without_overwrite(finished):
    before = inodes(finished / "outputs")
    again = command(finished, "run", "params/10_one/demo.yaml")
    assert again.returncode == 0 and "10_one/demo is finished already; --overwrite" in again.stdout
    assert (
        "outputs/index.html shows the progress: 0 runs, 1 at a time; 2 are finished already"
        in command(finished, "all", "demo", "--jobs", "1").stdout
    )
    page = finished / "outputs" / "index.html"
    assert {**inodes(finished / "outputs"), page: 0} == {**before, page: 0}


def test_overwrite_replaces_what_the_run_made(finished):
    before = inodes(finished / "outputs" / "10_one")
    assert command(finished, "run", "params/10_one/demo.yaml", "--overwrite").returncode == 0
    after = inodes(finished / "outputs" / "10_one")
    assert after.keys() == before.keys() and all(after[path] != before[path] for path in before)


def test_failed_overwrite_leaves_the_finished_run_and_its_notebook(finished):
    before = inodes(finished / "outputs" / "10_one")
    write_params(finished, "10_one", "demo", "fail: true")
    failed = command(finished, "run", "params/10_one/demo.yaml", "--overwrite")
    assert failed.returncode == 1 and "it was to fail" in failed.stderr
    after = inodes(finished / "outputs" / "10_one")
    assert (finished / "outputs" / "10_one" / "demo.new.ipynb") in after
    assert {path: after[path] for path in before} == before


def test_run_that_is_finished_with_other_parameters_is_neither_taken_nor_replaced(finished):
    before = inodes(finished / "outputs" / "10_one")
    write_params(finished, "10_one", "demo", "runs: [outputs/10_one/other]")
    write_params(finished, "20_two", "new", "runs: [outputs/10_one/demo]")
    for params in ("params/10_one/demo.yaml", "params/20_two/new.yaml"):
        refused = command(finished, "run", params)
        assert refused.returncode == 2
        assert "10_one/demo is finished, but was made with another runs than" in refused.stderr
    assert inodes(finished / "outputs" / "10_one") == before
    assert not (finished / "outputs" / "20_two" / "new").exists()


def test_damaged_results_are_named_and_cost_the_front_page_one_row(finished):
    damaged = finished / "outputs" / "10_one" / "demo" / "results.json"
    damaged.write_text('{"metrics": ')
    refused = command(finished, "run", "params/10_one/demo.yaml")
    assert refused.returncode == 2 and "outputs/10_one/demo/results.json' is damaged" in refused.stderr
    assert "Traceback" not in refused.stderr
    page = (finished / "outputs" / "index.html").read_text()
    assert page.count("its results cannot be read: ") == 1 and "&lt;b&gt;n&lt;/b&gt;" in page


def test_two_commands_on_one_run_are_told_apart(project):
    params = write_params(project, "10_one", "slow", "")
    nb = nbformat.read(project / "notebooks" / "10_one.ipynb", as_version=4)
    nb.cells.insert(1, nbformat.v4.new_code_cell("import time; time.sleep(30)"))
    nbformat.write(nb, project / "notebooks" / "10_one.ipynb")
    line = [sys.executable, "-m", "vaelab.runner.cli", "run", str(params)]
    first = subprocess.Popen(line, cwd=project, env=environment(), stdout=subprocess.DEVNULL)
    lock = project / "outputs" / "10_one" / "slow" / ".run" / "notebook.lock"
    while not (lock.exists() and lock.read_text()):
        assert first.poll() is None
    second = command(project, "run", "params/10_one/slow.yaml")
    first.kill()
    first.wait()
    assert second.returncode == 2
    assert f"10_one/slow is in use by process {first.pid} since" in second.stderr


def test_matching_takes_a_name_and_its_variants_only(project):
    write_params(project, "10_one", "demo-x", "")
    write_params(project, "10_one", "demolition", "")
    assert [execute.label(path) for path in execute.matching("demo")] == ["10_one/demo", "10_one/demo-x", "20_two/demo"]


def test_an_unknown_notebook_lists_the_nearest(project):
    with pytest.raises(ValueError, match="10_one"):
        execute.load_params(write_params(project, "10_onne", "demo", ""))


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
    assert "demo</h4>" in demo and "smoke</h4>" in smoke


def test_an_empty_front_page_says_what_to_do(tmp_path):
    assert "make demo" in index.write(tmp_path).read_text()
