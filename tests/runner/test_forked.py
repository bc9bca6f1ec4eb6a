"""Kernels that are forked, in a process of their own: its end ends them."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import psutil

ROOT = Path(__file__).parents[2]
CELL = """
import os, signal, time
import psutil, torch
from vaelab import runner
run = runner.start("10_one", globals())
if act == "die":
    os.kill(os.getpid(), signal.SIGKILL)
if act == "wait":
    open("pid", "w").write(str(os.getpid()))
    time.sleep(60)
run.metric("forked", "forkserver" in " ".join(psutil.Process().parent().cmdline()))
run.metric("threads", torch.get_num_threads())
run.metric("leads_its_group", os.getpgid(0) == os.getpid())
run.save()
"""
SCRIPT = """
import os
from pathlib import Path
from vaelab.runner import execute, forked

if __name__ == "__main__":
    forked.LIBRARIES = ["torch", "matplotlib.pyplot", "ipykernel.kernelapp", "no_such_library"]
    os.environ["OMP_NUM_THREADS"] = "1"
    for name in ("work", "die", "wait"):
        try:
            execute.run(Path("params/10_one") / f"{name}.yaml", show_output=False, fork=True)
        except execute.RunFailed as error:
            Path("error").write_text(str(error))
"""


def test_forked_kernels_work_and_their_end_and_their_parents_are_seen(tmp_path):
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
    (tmp_path / "script.py").write_text(SCRIPT)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen([sys.executable, "script.py"], cwd=tmp_path, env=environment)
    while not (tmp_path / "pid").exists() or not (tmp_path / "pid").read_text():
        assert process.poll() is None
        time.sleep(0.1)
    waiting = psutil.Process(int((tmp_path / "pid").read_text()))
    process.kill()
    process.wait()
    waiting.wait(timeout=20)
    results = json.loads((tmp_path / "outputs" / "10_one" / "work" / "results.json").read_text())
    assert results["metrics"] == {"forked": True, "threads": 1, "leads_its_group": True}
    assert "10_one/die failed: the kernel died" in (tmp_path / "error").read_text()
