"""The command line: ``params/<notebook>/<run>.yaml`` gives ``outputs/<notebook>/<run>.ipynb``.

Plain ``papermill notebook out -f params`` runs a notebook as well. The command line adds validation before a kernel
starts, the runs that a run reads, an HTML page beside the notebook, and the front page::

    vaelab run params/10_finetune_vae/demo.yaml
    vaelab run params/10_finetune_vae/demo.yaml --overwrite
    vaelab all demo --jobs 2
    vaelab index
    vaelab lab
"""

import argparse
import logging
import os
import signal
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from vaelab.core.paths import project_root
from vaelab.runner import index, lab
from vaelab.runner.execute import RunFailed, label, run
from vaelab.runner.schedule import Schedule


def main(arguments: list[str] | None = None) -> int:
    """The command line; see the module's first lines."""
    chosen = _parse(arguments)
    try:
        os.chdir(_root())
        _show_output()
        if chosen.verb == "lab":
            lab.start(project_root())
        return _stoppable(lambda: _execute(chosen))
    except (RunFailed, ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2 if not isinstance(error, RunFailed) or error.by_input else 1


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="vaelab", description=__doc__.split("\n")[0])
    verbs = parser.add_subparsers(dest="verb", required=True)
    one = verbs.add_parser("run", help="run one params file")
    one.add_argument("params", type=Path)
    everything = verbs.add_parser("all", help="run every notebook's params file of one name, then the front page")
    everything.add_argument("name")
    everything.add_argument("--jobs", type=int, default=max(1, min(2, os.cpu_count() or 1)))
    for verb in (one, everything):
        verb.add_argument("--overwrite", action="store_true", help="replace what is finished")
    verbs.add_parser("index", help="write the front page")
    verbs.add_parser("lab", help="open JupyterLab on copies of the notebooks")
    chosen = parser.parse_args(arguments)
    if chosen.verb == "run" and chosen.params.exists():  # a path from the caller's folder
        chosen.params = chosen.params.absolute()
    return chosen


def _root() -> Path:
    """The project's folder: the nearest one above the current folder that holds notebooks.

    Raises:
        ValueError: there is none.
    """
    here = Path.cwd()
    for folder in (project_root(), *here.parents):
        if (folder / "notebooks").is_dir() and (folder / "params").is_dir():
            return folder
    raise ValueError(f"no folders 'notebooks' and 'params' in {str(here)!r} or above it; run vaelab inside the project")


def _execute(chosen: argparse.Namespace) -> int:
    failed: list[str] = []
    try:
        if chosen.verb == "all":
            failed = Schedule(chosen.name, chosen.jobs, overwrite=chosen.overwrite).execute()
        elif chosen.verb == "run":
            path = chosen.params.absolute()
            index.write(project_root() / "outputs", index.RunStates(running=[label(path)]))
            # in a thread, since signals are handled in the main thread
            with ThreadPoolExecutor(1) as pool:
                if not pool.submit(run, path, overwrite=chosen.overwrite).result():
                    print(f"{label(path)} is finished already; --overwrite runs it again")
    except (RunFailed, ValueError):
        index.write(project_root() / "outputs")
        raise
    page = index.write(project_root() / "outputs")
    print(f"front page: {page.relative_to(project_root())}", flush=True)
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


def _stoppable(function: Callable[[], int]) -> int:
    """Call a function; Ctrl-C and SIGTERM end it with every process that it started, and print one line."""
    numbers = [signal.SIGINT, signal.SIGTERM, *([signal.SIGHUP] if hasattr(signal, "SIGHUP") else [])]
    previous = {number: signal.signal(number, _stop) for number in numbers}
    try:
        return function()
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _stop(number: int, frame: object) -> None:
    """End all kernels and this process at once: threads that wait for a kernel are not waited for."""
    import psutil

    logging.disable()  # libraries would log that their kernels end
    while children := psutil.Process().children(recursive=True):
        for child in children:
            child.kill()
        psutil.wait_procs(children, timeout=3)
    outputs = project_root() / "outputs"
    if outputs.is_dir():
        index.write(outputs)
    print(f"stopped by {signal.Signals(number).name}; every process was ended, and finished runs are kept",
          file=sys.stderr, flush=True)  # fmt: skip
    os._exit(128 + number)


def _show_output() -> None:
    """Let what the notebooks print, progress bars above all, through to the terminal."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stdout)
    logging.getLogger("papermill").setLevel(logging.INFO)


if __name__ == "__main__":
    sys.exit(main())
