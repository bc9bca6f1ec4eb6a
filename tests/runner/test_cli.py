import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from command_line import call, start, start_holding

from vaelab.runner import execute, index
from vaelab.runner.output import Lock
from vaelab.runner.provenance import embedded_weights

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
    """The project as the current folder."""
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
    """The command as users give it, in a new process."""
    line = [sys.executable, "-m", "vaelab.runner.cli", *words]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(line, cwd=project, env=environment, capture_output=True, text=True)


def test_the_path_is_the_name_and_what_is_read_is_run_first(ran):
    project, process = ran
    assert process.returncode == 0, process.stderr
    assert "IPKernelApp" not in process.stdout + process.stderr
    assert "running it first" in process.stdout
    for name in ("10_one", "20_two"):
        for made in ("demo.ipynb", "demo.html", "demo/results.json"):
            assert (project / "outputs" / name / made).exists()
    page = (project / "outputs" / "10_one" / "demo.html").read_text()
    assert page.count(" begun") == 1  # in the source, no longer in the output


def test_a_failed_run_is_told_and_never_taken_for_a_finished_one(project, forked_kernels):
    write_params(project, "10_one", "wrong", "fail: true")
    ran = call("run", "params/10_one/wrong.yaml")
    assert ran.returncode == 1
    assert "AssertionError: it was to fail" in ran.stderr
    assert ran.stderr.splitlines()[-1].endswith("the executed notebook is outputs/10_one/wrong.ipynb")
    assert "Traceback" not in ran.stdout + ran.stderr
    assert not (project / "outputs" / "10_one" / "wrong" / "results.json").exists()
    assert not (project / "outputs" / "10_one" / "wrong.html").exists()
    assert "no results" in (project / "outputs" / "index.html").read_text()


def test_a_wrong_parameter_is_told_in_one_line(project):
    write_params(project, "10_one", "wrong", "fial: true")
    ran = command(project, "run", "params/10_one/wrong.yaml")
    assert ran.returncode == 2
    assert "fial" in ran.stderr and "fail" in ran.stderr and "Traceback" not in ran.stderr


def test_all_runs_go_on_past_a_failure_but_not_what_reads_it(project, forked_kernels):
    write_params(project, "10_one", "demo", "fail: true")
    write_params(project, "10_one", "demo-other", "")
    ran = call("all", "demo", "--jobs", "2")
    assert ran.returncode == 1
    assert "failed: 10_one/demo, 20_two/demo" in ran.stderr
    assert (project / "outputs" / "10_one" / "demo-other" / "results.json").exists()
    assert not (project / "outputs" / "20_two" / "demo" / "results.json").exists()


def inodes(folder):
    return {path: (path.stat().st_ino, path.stat().st_mtime_ns) for path in folder.rglob("*")
            if path.is_file() and ".run" not in path.parts}  # fmt: skip


def test_finished_run_is_not_run_again_without_overwrite(finished):
    before = inodes(finished / "outputs")
    again = call("run", "params/10_one/demo.yaml")
    assert again.returncode == 0 and "10_one/demo is finished already; --overwrite" in again.stdout
    assert (
        "outputs/index.html shows the progress: 0 runs, 1 at a time; 2 are finished already"
        in call("all", "demo", "--jobs", "1").stdout
    )
    page = finished / "outputs" / "index.html"
    assert {**inodes(finished / "outputs"), page: 0} == {**before, page: 0}


def test_overwrite_replaces_what_the_run_made(finished, forked_kernels):
    before = inodes(finished / "outputs" / "10_one")
    assert call("run", "params/10_one/demo.yaml", "--overwrite").returncode == 0
    after = inodes(finished / "outputs" / "10_one")
    assert after.keys() == before.keys() and all(after[path] != before[path] for path in before)


def test_failed_overwrite_leaves_the_finished_run_and_its_notebook(finished, forked_kernels):
    before = inodes(finished / "outputs" / "10_one")
    write_params(finished, "10_one", "demo", "fail: true")
    failed = call("run", "params/10_one/demo.yaml", "--overwrite")
    assert failed.returncode == 1 and "it was to fail" in failed.stderr
    after = inodes(finished / "outputs" / "10_one")
    assert (finished / "outputs" / "10_one" / "demo.new.ipynb") in after
    assert {path: after[path] for path in before} == before


def test_run_that_is_finished_with_other_parameters_is_neither_taken_nor_replaced(finished):
    before = inodes(finished / "outputs" / "10_one")
    write_params(finished, "10_one", "demo", "runs: [outputs/10_one/other]")
    write_params(finished, "20_two", "new", "runs: [outputs/10_one/demo]")
    for params in ("params/10_one/demo.yaml", "params/20_two/new.yaml"):
        refused = call("run", params)
        assert refused.returncode == 2
        assert "10_one/demo is finished, but was made with another runs than" in refused.stderr
    assert inodes(finished / "outputs" / "10_one") == before
    assert not (finished / "outputs" / "20_two" / "new").exists()


def test_damaged_results_are_named_and_cost_the_front_page_one_row(finished):
    damaged = finished / "outputs" / "10_one" / "demo" / "results.json"
    damaged.write_text('{"metrics": ')
    refused = call("run", "params/10_one/demo.yaml")
    assert refused.returncode == 2 and "outputs/10_one/demo/results.json' is damaged" in refused.stderr
    assert "Traceback" not in refused.stderr
    page = (finished / "outputs" / "index.html").read_text()
    assert page.count("its results cannot be read: ") == 1 and "&lt;b&gt;n&lt;/b&gt;" in page


def test_two_commands_on_one_run_are_told_apart(project):
    params = write_params(project, "10_one", "slow", "")
    first = start_holding(project, "run", str(params))
    lock = project / "outputs" / "10_one" / "slow" / ".run" / "notebook.lock"
    while not (lock.exists() and lock.read_text()):
        assert first.is_alive()
    second = call("run", "params/10_one/slow.yaml")
    first.kill()
    first.join()
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


@pytest.mark.parametrize("words", [["run", "params/10_one/slow.yaml"], ["all", "slow", "--jobs", "1"]])
def test_a_stopped_command_leaves_no_process_and_says_one_line(project, words):
    import signal
    import time

    import psutil

    write_params(project, "10_one", "slow", "")
    nb = nbformat.read(project / "notebooks" / "10_one.ipynb", as_version=4)
    nb.cells.insert(1, nbformat.v4.new_code_cell('open("begun", "w").close()\nimport time; time.sleep(60)'))
    nbformat.write(nb, project / "notebooks" / "10_one.ipynb")
    process = start(project, *words)
    while not (project / "begun").exists():
        assert process.is_alive()
        time.sleep(0.1)
    children = psutil.Process(process.pid).children(recursive=True)
    assert children
    process.terminate()
    process.join(timeout=20)
    assert process.exitcode == 128 + signal.SIGTERM
    said = (project / "stderr").read_text()
    assert said.splitlines()[-1] == "stopped by SIGTERM; every process was ended, and finished runs are kept"
    assert "Traceback" not in said
    assert not [child for child in children if child.is_running() and child.status() != psutil.STATUS_ZOMBIE]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: [1", "not valid YAML in line"),
        ("- 1\n- 2", "expected lines of the form 'name: value', got a list"),
        ("just words", "expected lines of the form 'name: value', got a str"),
    ],
)
def test_a_params_file_that_is_no_mapping_is_one_sentence(project, text, message):
    path = write_params(project, "10_one", "wrong", "")
    path.write_text(text)
    with pytest.raises(ValueError, match=message) as raised:
        execute.load_params(path)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("path", ["outputs/10_one/demo", "outputs/10_one/demo.ipynb", "params/10_one/dmo.yaml"])
def test_a_path_that_is_no_params_file_names_the_nearest(project, path):
    with pytest.raises(ValueError, match=r"the nearest: params/10_one/demo\.yaml"):
        execute.load_params(project / path)


def test_a_full_disk_in_a_cell_is_one_sentence_about_the_machine(project):
    failure = execute._failure(
        project / "params/10_one/demo.yaml",
        "OSError",
        "[Errno 28] No space left on device: 'a.png'",
        Path("demo.ipynb"),
    )
    assert failure.by_input
    assert str(failure).startswith("10_one/demo failed: the disk is full (")
    assert "\n" not in str(failure) and "demo.ipynb" in str(failure)


def test_outside_of_a_project_the_error_says_what_is_missing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    ran = call("all", "demo")
    assert ran.returncode == 2 and "no folders 'notebooks' and 'params'" in ran.stderr
    assert len(ran.stderr.splitlines()) == 1


def test_the_page_of_a_notebook_needs_no_network_and_folds_its_code(tmp_path):
    from vaelab.runner.page import to_html

    display = nbformat.v4.new_output(
        "display_data",
        {"application/vnd.jupyter.widget-view+json": {"model_id": "x"}, "text/plain": "the widget as text"},
    )
    bar = [nbformat.v4.new_output("stream", name="stdout", text=f"\rbar {n}0%") for n in range(5)]
    figures = [
        nbformat.v4.new_output("display_data", {"image/png": "eA=="}, metadata={"image/png": metadata})
        for metadata in ({"alt": "error < 5", "width": 700}, {})
    ]
    outputs = [*bar, display, *figures]
    cells = [nbformat.v4.new_markdown_cell("# 10 · Why?"), nbformat.v4.new_code_cell("x = 1", outputs=outputs)]
    nbformat.write(nbformat.v4.new_notebook(cells=cells), tmp_path / "a.ipynb")
    page = to_html(tmp_path / "a.ipynb", front_page=tmp_path.parent / "index.html").read_text()
    assert "<script" not in page and "https://" not in page
    assert "<title>10 · Why?</title>" in page and 'href="../index.html"' in page
    assert page.count("bar ") == 1 and "bar 40%" in page
    assert "the widget as text" in page
    assert 'alt="error &lt; 5"' in page and "min-width: 420px" in page
    assert page.count('alt="figure of this cell"') == 1
    assert re.search(r"<details class=\"code\"><summary>show code</summary>.*x", page, re.DOTALL)


def finish(project, folder, **results):
    (project / "outputs" / folder).mkdir(parents=True)
    stored = {"notebook": folder.split("/")[0], "metrics": {}, "seconds": 1, "environment": {}, **results}
    (project / "outputs" / folder / "results.json").write_text(json.dumps(stored))


def test_the_front_page_shows_findings_key_numbers_and_changed_parameters(project):
    (project / "notebooks" / "10_one.ipynb").rename(project / "notebooks" / "11_compare_interventions.ipynb")
    key = [{"label": "error", "value": -0.4, "unit": "%", "interval": [-1.0, 0.2]}]
    finish(project, "11_compare_interventions/demo", key_numbers=key, finding="Of the demo.")
    finish(project, "11_compare_interventions/study", key_numbers=key, finding="Of the study.", params={"fail": True},
           files=["a.png", "thumbnail.png"])  # fmt: skip
    page = index.write(project / "outputs").read_text()
    cards = page[page.index("Main findings") : page.index("<nav")]
    assert "Of the study." in cards and "Of the demo." not in cards
    assert "-0.4 %" in cards and "-1 to 0.2" in cards
    assert "fail: True" in page
    assert re.findall('src="([^"]+)"', page) == ["11_compare_interventions/study/thumbnail.png"]


def test_the_front_page_tells_running_stopped_and_stale_runs(project):
    for name in ("running", "stopped"):
        (project / "outputs" / "10_one" / name / ".run").mkdir(parents=True)
    lock = Lock(project / "outputs" / "10_one" / "running" / ".run" / "lock", "a run")
    params = {"model": "embedded"}
    finish(project, "11_compare_interventions/demo", params=params, embedded_weights=embedded_weights(), finding="New.")
    finish(project, "11_compare_interventions/study", params=params, embedded_weights={"vae": "edited"}, finding="Old.")
    entries = {row[: row.index("<")]: row for row in index.write(project / "outputs").read_text().split("<h4>")[1:]}
    lock.release()
    assert "no results" not in entries["running"] and ">running</p>" in entries["running"]
    assert "no results: it failed or was stopped" in entries["stopped"]
    assert "Stale: the embedded weights of vae have changed" in entries["study"] and "Stale" not in entries["demo"]


def test_the_front_page_lists_ones_own_runs_with_their_notebooks(project):
    finish(project, "own/deeper/train")
    (project / "outputs" / "own" / "deeper" / "train.ipynb").write_text("{}")
    finish(project, "10_one/mine")
    executed = nbformat.v4.new_notebook(metadata={"papermill": {"parameters": {"output_dir": "outputs/10_one/mine"}}})
    nbformat.write(executed, project / "outputs" / "10_one" / "by-papermill.ipynb")
    page = index.write(project / "outputs").read_text()
    assert 'href="own/deeper/train.ipynb"' in page and 'href="10_one/by-papermill.ipynb"' in page
    assert "Your own runs" in page


def test_the_front_page_reloads_only_while_runs_are_left(project):
    progress = index.RunStates(
        running=["10_one/demo"], waiting=["20_two/demo"], ended=1, time_left="about 2 minutes left"
    )
    page = index.write(project / "outputs", progress).read_text()
    assert "location.reload" in page and "1 of 3 runs have ended" in page and "About 2 minutes left" in page
    assert "location.reload" not in index.write(project / "outputs").read_text()


def test_copies_for_jupyterlab_are_made_once_and_change_no_tracked_file(project):
    from vaelab.runner import lab

    git = ["git", "-c", "user.name=a", "-c", "user.email=a@b.c"]
    (project / ".gitignore").write_text("outputs/*\n")
    for words in (["init", "-q"], ["add", "."], ["commit", "-qm", "all"]):
        subprocess.run([*git, *words], cwd=project, check=True)
    folder = lab.copy_notebooks(project)
    copy = folder / "10_one.ipynb"
    nb = nbformat.read(copy, as_version=4)
    nb.cells[0].source = "edited"
    nbformat.write(nb, copy)
    assert lab.copy_notebooks(project) == project / "outputs" / "lab"
    assert nbformat.read(copy, as_version=4).cells[0].source == "edited"
    assert (folder / "20_two.ipynb").read_bytes() == (project / "notebooks" / "20_two.ipynb").read_bytes()
    assert not subprocess.run([*git, "status", "--porcelain"], cwd=project, capture_output=True).stdout
    assert "edited" not in index.write(project / "outputs").read_text()
