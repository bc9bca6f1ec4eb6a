"""A finished collection of 300 items stays as it is, file for file, whatever is done without ``overwrite``."""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import collect_killed
import nbformat
import pytest
import yaml
from helpers import CHILDREN
from notebook_cells import ROOT, execute_cells

from vaelab import store
from vaelab.runner import execute
from vaelab.runner.output import OutputFolder

NAME = "30_collect_activations"
ALL = ("load", "run", "show", "save")
SETTINGS = {
    "blocks": ["mid.0"], "max_images": 75, "steps": 4, "guidance_scale": 1.0, "dataset": "prompts.txt", "batch_size": 5,
}  # fmt: skip
READER = f"""
from pathlib import Path
from vaelab import store
assert len(store.open("outputs/{NAME}/test/activations").items) == 300
Path(output_dir).mkdir(parents=True, exist_ok=True)
(Path(output_dir) / "results.json").write_text("{{}}")
"""


def files(folder):
    """Each file's inode, time and size."""
    return {
        path: (path.stat().st_ino, path.stat().st_mtime_ns, path.stat().st_size)
        for path in folder.rglob("*")
        if path.is_file() and ".run" not in path.parts
    }


def write_params(root, **params):
    path = root / "params" / NAME / "test.yaml"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump({"output_dir": f"outputs/{NAME}/test", **SETTINGS, **params}))
    return path


@pytest.fixture(scope="module")
def collected(tmp_path_factory):
    """A project with a finished collection."""
    root = tmp_path_factory.mktemp("project")
    (root / "prompts.txt").write_text("".join(f"a red star number {i}\n" for i in range(75)))
    (root / "notebooks").mkdir()
    shutil.copy(ROOT / "notebooks" / f"{NAME}.ipynb", root / "notebooks")
    write_params(root)
    here = Path.cwd()
    os.chdir(root)
    try:
        execute_cells(NAME, *ALL, output_dir=f"outputs/{NAME}/test", **SETTINGS)
    finally:
        os.chdir(here)
    assert len(store.open(root / "outputs" / NAME / "test" / "activations").items) == 300
    return root


@pytest.fixture
def project(collected, monkeypatch):
    """The project; whatever the test does, the finished run's files must be what they were."""
    monkeypatch.chdir(collected)
    finished = collected / "outputs" / NAME / "test"
    before = files(finished)
    assert before
    yield collected
    assert files(finished) == before


@pytest.mark.parametrize("change", [{"device": "auto"}, {"batch_size": 3}, {"items_per_shard": 20}, {"verify": False},
                                    {"dataset": "{root}/prompts.txt"}], ids=str)  # fmt: skip
def test_edit_that_decides_no_result_leaves_the_run_finished(project, change):
    given = {name: value.format(root=project) if isinstance(value, str) else value for name, value in change.items()}
    assert execute.run(write_params(project, **given)) is False
    write_params(project)


def test_edit_that_decides_results_is_refused(project):
    with pytest.raises(ValueError, match="is finished, but was made with another max_images than"):
        execute.run(write_params(project, max_images=80))
    write_params(project)


def test_run_that_reads_it_does_not_run_it_again(project, forked_kernels):
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    cells = [
        nbformat.v4.new_code_cell('output_dir: str = ""\nactivations: str = ""'),
        nbformat.v4.new_code_cell(READER),
    ]
    cells[0].metadata["tags"] = ["parameters"]
    nb = nbformat.v4.new_notebook(metadata={"kernelspec": kernel}, cells=cells)
    nbformat.write(nb, project / "notebooks" / "31_reads.ipynb")
    path = project / "params" / "31_reads" / "test.yaml"
    path.parent.mkdir(exist_ok=True)
    path.write_text(f"output_dir: outputs/31_reads/test\nactivations: outputs/{NAME}/test/activations\n")
    write_params(project, device="auto")
    assert execute.run(path, fork=True) is True
    write_params(project)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({}, "holds a finished run"),
        ({"max_images": 10}, "holds a finished run, made with another max_images"),
        ({"blocks": ["up.9.9"]}, "holds a finished run, made with another blocks"),
        ({"blocks": ["up.9.9"], "overwrite": True}, "blocks: unknown name 'up.9.9'"),
        ({"model": "no/such", "overwrite": True}, "model: "),
        ({"dataset": "nowhere.txt", "overwrite": True}, "dataset: "),
    ],
    ids=str,
)
def test_refused_start_changes_nothing(project, changes, message):
    with pytest.raises(ValueError, match=message):
        execute_cells(NAME, *ALL, output_dir=f"outputs/{NAME}/test", **{**SETTINGS, **changes})


def test_dry_run_changes_nothing(project):
    execute_cells(NAME, *ALL, output_dir=f"outputs/{NAME}/test", dry_run=True, **SETTINGS)
    assert json.loads((project / "outputs" / NAME / "test" / ".run" / "dry_run.json").read_text())["metrics"]


def test_second_start_is_told_who_is_at_work(project):
    script = (
        "import sys, time; from pathlib import Path; from vaelab.runner.output import OutputFolder; "
        "output = OutputFolder(Path(sys.argv[1])); print('held', flush=True); time.sleep(60)"
    )
    folder = f"outputs/{NAME}/test"
    OutputFolder(Path(folder)).release()  # a refused start in this process holds the lock as a kernel would
    holder = subprocess.Popen([sys.executable, "-c", script, folder], stdout=subprocess.PIPE)
    assert holder.stdout.readline() == b"held\n"
    with pytest.raises(ValueError, match=f"is in use by process {holder.pid} since"):
        execute_cells(NAME, "load", output_dir=folder, overwrite=True, **SETTINGS)
    holder.kill()
    holder.wait()


def test_forged_results_reach_nothing(project, tmp_path):
    victim = tmp_path / "victim"
    victim.write_text("precious")
    folder = tmp_path / "run"
    folder.mkdir()
    mine = folder / "activations"
    mine.mkdir()
    (mine / "precious").write_text("precious")
    entries = ["../victim", str(victim), ".", "..", "activations", str(project / "outputs")]
    (folder / "results.json").write_text(json.dumps({"files": entries, "notebook": NAME, "metrics": {}}))
    for changes in ({}, {"overwrite": True}):
        with pytest.raises(ValueError, match=r"holds a finished run|was not made by a run of this notebook"):
            execute_cells(NAME, *ALL, output_dir=str(folder), **{**SETTINGS, "max_images": 2, **changes})
    assert victim.read_text() == (mine / "precious").read_text() == "precious"


def test_overwrite_killed_under_way_leaves_the_finished_run(project):
    OutputFolder(project / "outputs" / NAME / "test").release()
    process = CHILDREN.Process(target=collect_killed.overwrite, args=(str(project), NAME, ALL, SETTINGS))
    process.start()
    while not (project / "added").exists():
        assert process.is_alive(), "the overwriting run ended before it collected anything"
        time.sleep(0.05)
    process.kill()
    process.join()
    staged = project / "outputs" / NAME / "test" / ".run" / "new" / "activations"
    assert staged.is_dir()
    store.open(f"outputs/{NAME}/test/activations").verify()
    OutputFolder(project / "outputs" / NAME / "test").release()  # the lock went with the process
