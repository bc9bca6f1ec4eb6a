"""Kernels that are forked: they work, their end is seen, and the end of their parent ends them."""

import json
import time
from pathlib import Path

import nbformat
import psutil
import pytest
from command_line import run_forked
from helpers import CHILDREN

from vaelab.runner import execute

CELL = """
import os, signal, time
from vaelab import runner
run = runner.start("10_one", globals())
if act == "die":
    os.kill(os.getpid(), signal.SIGKILL)
if act == "wait":
    open("pid", "w").write(str(os.getpid()))
    time.sleep(60)
import psutil, torch
run.metric("forked", "forkserver" in " ".join(psutil.Process().parent().cmdline()))
run.metric("threads", torch.get_num_threads())
run.metric("leads_its_group", os.getpgid(0) == os.getpid())
import logging
run.metric("transformers_warns", logging.getLogger("transformers").level == logging.WARNING)
run.metric("verbosity_is_inherited", "TRANSFORMERS_VERBOSITY" in os.environ)
run.save()
"""


@pytest.fixture
def project(tmp_path, monkeypatch, forked_kernels):
    monkeypatch.chdir(tmp_path)
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    nb = nbformat.v4.new_notebook(metadata={"kernelspec": kernel})
    parameters = 'act: str = ""  # what to do\noutput_dir: str = ""  # folder\noverwrite: bool = False'
    nb.cells = [nbformat.v4.new_code_cell(source) for source in (parameters, CELL)]
    nb.cells[0].metadata["tags"] = ["parameters"]
    for folder in ("notebooks", "params/10_one", "outputs"):
        (tmp_path / folder).mkdir(parents=True)
    nbformat.write(nb, tmp_path / "notebooks" / "10_one.ipynb")
    for name in ("work", "die", "wait"):
        text = f"act: {name}\noutput_dir: outputs/10_one/{name}\n"
        (tmp_path / "params" / "10_one" / f"{name}.yaml").write_text(text)
    return tmp_path


def test_forked_kernel_works(project):
    execute.run(Path("params/10_one/work.yaml"), show_output=False, fork=True)
    results = json.loads((project / "outputs" / "10_one" / "work" / "results.json").read_text())
    assert results["metrics"] == {
        "forked": True, "threads": 1, "leads_its_group": True, "transformers_warns": True,
        "verbosity_is_inherited": False,
    }  # fmt: skip


def test_end_of_a_forked_kernel_is_seen(project):
    with pytest.raises(execute.RunFailed, match="10_one/die failed: the kernel died"):
        execute.run(Path("params/10_one/die.yaml"), show_output=False, fork=True)


def test_forked_kernel_ends_with_its_parent(project):
    """Its server imports what is installed of a list."""
    libraries = ["torch", "matplotlib.pyplot", "ipykernel.kernelapp", "no_such_library"]
    process = CHILDREN.Process(target=run_forked, args=("params/10_one/wait.yaml", libraries))
    process.start()
    while not (project / "pid").exists() or not (project / "pid").read_text():
        assert process.is_alive()
        time.sleep(0.1)
    waiting = psutil.Process(int((project / "pid").read_text()))
    process.kill()
    process.join()
    waiting.wait(timeout=20)
