"""The command line: ``params/<notebook>/<run>.yaml`` gives ``outputs/<notebook>/<run>.ipynb``.

Plain ``papermill notebook out -f params`` runs a notebook as well. The command line adds validation before a kernel
starts, the runs that a run reads, an HTML page beside the notebook, and the front page::

    vaelab run params/10_finetune_vae/demo.yaml
    vaelab run params/10_finetune_vae/demo.yaml --overwrite
    vaelab all demo --jobs 2
    vaelab index
"""

import argparse
import logging
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import chdir
from pathlib import Path
from typing import Any

from vaelab.core.paths import project_root
from vaelab.core.validate import at_least, nearest, unknown
from vaelab.runner.output import RESULTS, Lock, recover
from vaelab.runner.parameters import changed, declared, validate
from vaelab.runner.run import read_results

ALONE = ("90_benchmarks",)
"""Notebooks that measure speed: nothing runs beside them."""


def notebook_of(params_file: Path) -> Path:
    """The notebook that a params file is for, by its folder's name."""
    notebook = project_root() / "notebooks" / f"{params_file.parent.name}.ipynb"
    if not notebook.exists():
        known = [path.stem for path in (project_root() / "notebooks").glob("*.ipynb")]
        raise unknown("params file's folder", params_file.parent.name, known)
    return notebook


def load_params(params_file: Path) -> dict[str, Any]:
    """The parameters of a run, validated against its notebook.

    Raises:
        ValueError: no such file, an unknown parameter, a wrong type or size, or an ``output_dir`` that is not the one
            the file's path names.
    """
    import yaml

    if not params_file.is_file():
        known = [str(path.relative_to(project_root())) for path in (project_root() / "params").glob("*/*.yaml")]
        raise ValueError(
            f"no params file {str(params_file)!r}; the nearest: {', '.join(nearest(str(params_file), known))}"
        )
    kinds = declared(notebook_of(params_file))
    params = yaml.safe_load(params_file.read_text()) or {}
    for name, value in params.items():
        if name not in kinds:
            raise unknown(f"{params_file}: parameters", name, kinds)
        try:
            validate(name, value, kinds[name])
        except ValueError as error:
            raise ValueError(f"{params_file}: {error}") from error
    expected = f"outputs/{params_file.parent.name}/{params_file.stem}"
    if params.get("output_dir") != expected:
        raise ValueError(f"{params_file}: output_dir must be {expected}, got {params.get('output_dir')!r}")
    return params


def needs(params: dict[str, Any]) -> list[Path]:
    """The params files of the runs whose outputs these parameters name, in order."""
    named = [entry for value in params.values() for entry in (value if isinstance(value, list) else [value])]
    found = []
    for name in named:
        match = re.match(r"outputs/([^/]+)/([^/]+)", name) if isinstance(name, str) else None
        path = project_root() / "params" / match[1] / f"{match[2]}.yaml" if match else None
        if path and path.exists() and name != params.get("output_dir") and path not in found:
            found.append(path)
    return found


def output_of(params_file: Path) -> Path:
    """The output folder of a params file's run."""
    return project_root() / "outputs" / params_file.parent.name / params_file.stem


def finished(params_file: Path) -> bool:
    """Whether the run of a params file is finished with the parameters the file has now.

    Raises:
        ValueError: the run was made with other values of parameters that decide its results, or its results file is
            damaged.
    """
    folder = output_of(params_file)
    recover(folder)
    if not (folder / RESULTS).exists():
        return False
    differing = changed(read_results(folder), load_params(params_file))
    if differing:
        raise ValueError(
            f"{label(params_file)} is finished, but was made with another {', '.join(differing)} than "
            f"{params_file.parent.name}/{params_file.name} has now; run it again with --overwrite, or restore the file"
        )
    return True


def run(params_file: Path, *, overwrite: bool = False) -> bool:
    """Run one params file, after the unfinished runs that it reads.

    Args:
        params_file: a file under ``params/``.
        overwrite: whether to replace the results of a finished run.

    Returns:
        Whether it ran; False if it was finished already.

    Raises:
        ValueError: see :func:`load_params` and :func:`finished`.
        papermill.exceptions.PapermillExecutionError: a cell raised; the notebook shows where.
    """
    params_file = Path(params_file).absolute()
    params = load_params(params_file)
    overwrite = overwrite or params.get("overwrite", False)
    if not overwrite and not params.get("dry_run", False) and finished(params_file):
        return False
    for needed in needs(params):
        if not finished(needed):
            print(f"{label(params_file)} reads {label(needed)}, which is not finished: running it first", flush=True)
            run(needed)
    folder = output_of(params_file)
    (folder / ".run").mkdir(parents=True, exist_ok=True)
    lock = Lock(folder / ".run" / "notebook.lock", label(params_file))
    try:
        _execute(params_file, {**params, "overwrite": True} if overwrite else params)
    finally:
        lock.release()
    return True


def _execute(params_file: Path, params: dict[str, Any]) -> None:
    """Execute the notebook; a finished run's notebook and page are replaced only when the new ones are complete."""
    import papermill

    output = output_of(params_file).with_name(f"{params_file.stem}.ipynb")
    replaces = (output_of(params_file) / RESULTS).exists()
    target = output.with_name(f"{params_file.stem}.new.ipynb") if replaces else output
    # relative, since papermill writes both paths into the executed notebook
    source, place = (path.relative_to(project_root()) for path in (notebook_of(params_file), target))
    with chdir(project_root()):
        papermill.execute_notebook(source, place, params, progress_bar=False, log_output=True)
    if not (output_of(params_file) / RESULTS).exists():
        return  # a dry run
    page = to_html(target)
    os.replace(page, output.with_suffix(".html"))
    os.replace(target, output)


def to_html(notebook: Path) -> Path:
    """Write an executed notebook as HTML beside it, progress bars reduced to their last line."""
    import nbformat
    from nbconvert import HTMLExporter

    from vaelab.core.io import atomic

    nb = nbformat.read(notebook, as_version=4)
    for cell in nb.cells:
        for out in cell.get("outputs", []):
            if out.output_type == "stream":
                out.text = re.sub(r"[^\n]*\r(?!\n)", "", out.text)
    body, _ = HTMLExporter().from_notebook_node(nb, resources={"metadata": {"name": f"{notebook.parent.name}"}})
    page = notebook.with_suffix(".html")
    with atomic(page) as draft:
        draft.write_text(body)
    return page


def label(params_file: Path) -> str:
    """``10_finetune_vae/demo``."""
    return f"{params_file.parent.name}/{params_file.stem}"


def matching(name: str) -> list[Path]:
    """The params files of every notebook called ``name`` or ``name-...``, in order."""
    found = sorted((project_root() / "params").glob("*/*.yaml"), key=lambda path: (path.parent.name, path.stem))
    return [path for path in found if path.stem == name or path.stem.startswith(f"{name}-")]


def run_all(name: str, jobs: int, *, overwrite: bool = False) -> list[str]:
    """Run every unfinished params file of one name, ``jobs`` at a time, each after those it reads.

    Notebooks that measure speed run alone, last.

    Args:
        name: such as ``demo``, which also selects ``demo-digits``.
        jobs: runs at a time.
        overwrite: whether to run finished ones again.

    Returns:
        The runs that failed.
    """
    at_least("jobs", jobs, 1)
    selected = matching(name)
    if not selected:
        raise ValueError(f"no params file called {name!r}")
    failed: set[Path] = set()
    todo = []
    for path in selected:
        try:
            if overwrite or not finished(path):
                todo.append(path)
        except ValueError as error:
            failed.add(path)
            print(f"{label(path)}  FAILED\n{error}", flush=True)
    waits = {path: {p for p in needs(load_params(path)) if p in todo or p in failed} for path in todo}
    alone = [path for path in todo if path.parent.name in ALONE]
    skipped = len(selected) - len(todo) - len(failed)
    print(f"{len(todo)} runs, {jobs} at a time; {skipped} are finished already", flush=True)
    ended = 0
    for batch, width in (([path for path in todo if path not in alone], jobs), (alone, 1)):
        for path, seconds, error in _scheduled(batch, waits, failed, width, overwrite):
            ended += 1
            print(f"[{ended:2}/{len(todo)}] {seconds:6.1f} s  {label(path)}{'  FAILED' if error else ''}", flush=True)
            if error is not None:
                failed.add(path)
                print(error, flush=True)
    return [label(path) for path in selected if path in failed]


def _scheduled(
    todo: list[Path], waits: dict[Path, set[Path]], failed: set[Path], jobs: int, overwrite: bool
) -> Iterator[tuple[Path, float, str | None]]:
    """Yield each run as it ends, with its seconds and its error or None; a run whose needs failed
    ends at once."""
    left, done, running = list(todo), set(), {}
    threads = max(1, (os.cpu_count() or 1) // jobs)
    with ThreadPoolExecutor(jobs) as pool:
        while left or running:
            for path in [p for p in left if waits[p] & failed]:
                left.remove(path)
                yield path, 0.0, f"not run: it reads {', '.join(label(p) for p in waits[path] & failed)}"
            ready = [p for p in left if not (waits[p] & set(todo)) - done]
            for path in ready[: jobs - len(running)]:
                left.remove(path)
                running[pool.submit(_in_a_process, path, threads, overwrite)] = path
            if running:
                ended: set[Future] = wait(running, return_when=FIRST_COMPLETED).done
                for future in ended:
                    path = running.pop(future)
                    done.add(path)
                    yield path, *future.result()


def _in_a_process(path: Path, threads: int, overwrite: bool) -> tuple[float, str | None]:
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    words = ["run", str(path), *(["--overwrite"] if overwrite else [])]
    started = time.perf_counter()
    ended = subprocess.run(
        [sys.executable, "-m", "vaelab.runner.cli", *words], env=environment, capture_output=True, text=True
    )
    return time.perf_counter() - started, None if ended.returncode == 0 else ended.stderr[-3000:]


def _show_output() -> None:
    """Let what the notebooks print, progress bars above all, through to the terminal."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stdout)
    logging.getLogger("papermill").setLevel(logging.INFO)


def main(arguments: list[str] | None = None) -> int:
    """The command line; see the module's first lines."""
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
    chosen = parser.parse_args(arguments)
    _show_output()
    from papermill.exceptions import PapermillExecutionError

    from vaelab.runner import index

    failed = []
    try:
        if chosen.verb == "all":
            failed = run_all(chosen.name, chosen.jobs, overwrite=chosen.overwrite)
        elif chosen.verb == "run" and not run(chosen.params, overwrite=chosen.overwrite):
            print(f"{label(chosen.params.absolute())} is finished already; --overwrite runs it again")
    except PapermillExecutionError as error:
        print(f"{error.ename}: {error.evalue}", file=sys.stderr)
        return 1
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    finally:
        page = index.write(project_root() / "outputs")
    print(f"front page: {page.relative_to(project_root())}")
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
