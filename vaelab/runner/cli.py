"""Running params files: ``params/<notebook>/<run>.yaml`` gives ``outputs/<notebook>/<run>.ipynb``.

Nothing here is needed to run a notebook: ``papermill notebook out -f params`` does. This adds the
checks before the kernel starts, the runs that a run reads, the HTML beside it and the front page::

    python -m vaelab.runner.cli run params/10_finetune_vae/demo.yaml
    python -m vaelab.runner.cli all demo --jobs 2
    python -m vaelab.runner.cli index
"""

import argparse
import ast
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

from vaelab.core.io import read_json
from vaelab.core.paths import project_root
from vaelab.core.validate import at_least, nearest, unknown
from vaelab.runner.report import check_value

ALONE = ("90_benchmarks",)


def notebook_of(params_file: Path) -> Path:
    """The notebook that a params file is for, by its folder's name."""
    notebook = project_root() / "notebooks" / f"{params_file.parent.name}.ipynb"
    if not notebook.exists():
        known = [path.stem for path in (project_root() / "notebooks").glob("*.ipynb")]
        raise unknown("params file's folder", params_file.parent.name, known)
    return notebook


def declared(notebook: Path) -> dict[str, str]:
    """The parameters of a notebook and their kinds, from the cell tagged ``parameters``."""
    import nbformat

    cells = nbformat.read(notebook, as_version=4).cells
    source = next(cell.source for cell in cells if "parameters" in cell.metadata.get("tags", []))
    return {
        statement.target.id: ast.unparse(statement.annotation)
        for statement in ast.parse(source).body
        if isinstance(statement, ast.AnnAssign)
    }


def load_params(params_file: Path) -> dict[str, Any]:
    """The parameters of a run, checked against its notebook.

    Raises:
        ValueError: no such file, an unknown parameter, a wrong type, or an ``output_dir`` that
            is not the one the file's path names.
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
            check_value(name, value, kinds[name])
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


def finished(params_file: Path) -> bool:
    """Whether the run of a params file has written its results, with the parameters it has now."""
    results = project_root() / "outputs" / params_file.parent.name / params_file.stem / "results.json"
    if not results.exists():
        return False
    stored = read_json(results).get("params", {})
    return all(name in stored and stored[name] == value for name, value in load_params(params_file).items())


def run(params_file: Path) -> None:
    """Run one params file, after the unfinished runs that it reads.

    Raises:
        ValueError: see :func:`load_params`.
        papermill.exceptions.PapermillExecutionError: a cell raised; the notebook shows where.
    """
    import papermill

    params_file = Path(params_file).absolute()
    params = load_params(params_file)
    for needed in needs(params):
        if not finished(needed):
            print(
                f"{label(params_file)} reads {label(needed)}, which has not been run as it now stands: running it first"
            )
            run(needed)
    folder = project_root() / "outputs" / params_file.parent.name
    folder.mkdir(parents=True, exist_ok=True)
    output, page = (folder / f"{params_file.stem}{ending}" for ending in (".ipynb", ".html"))
    page.unlink(missing_ok=True)
    # relative, since papermill writes both paths into the executed notebook
    source, target = (path.relative_to(project_root()) for path in (notebook_of(params_file), output))
    with chdir(project_root()):
        papermill.execute_notebook(source, target, params, progress_bar=False, log_output=True)
    to_html(output)


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


def run_all(name: str, jobs: int) -> list[str]:
    """Run every params file of one name, ``jobs`` at a time, each after those it reads.

    What measures speed runs alone, last. Returns the runs that failed.
    """
    at_least("jobs", jobs, 1)
    todo = matching(name)
    if not todo:
        raise ValueError(f"no params file called {name!r}")
    waits = {path: {p for p in needs(load_params(path)) if p in todo} for path in todo}
    alone = [path for path in todo if path.parent.name in ALONE]
    failed: set[Path] = set()
    ended = 0
    print(f"{len(todo)} runs, {jobs} at a time", flush=True)
    for batch, width in (([path for path in todo if path not in alone], jobs), (alone, 1)):
        for path, seconds, error in _scheduled(batch, waits, failed, width):
            ended += 1
            print(f"[{ended:2}/{len(todo)}] {seconds:6.1f} s  {label(path)}{'  FAILED' if error else ''}", flush=True)
            if error is not None:
                failed.add(path)
                print(error, flush=True)
    return [label(path) for path in todo if path in failed]


def _scheduled(todo: list[Path], waits: dict, failed: set, jobs: int) -> Iterator[tuple[Path, float, str | None]]:
    """Yield each run as it ends, with its seconds and its error or None; a run whose needs failed
    ends at once."""
    left, done, going = list(todo), set(), {}
    threads = max(1, (os.cpu_count() or 1) // jobs)
    with ThreadPoolExecutor(jobs) as pool:
        while left or going:
            for path in [p for p in left if waits[p] & failed]:
                left.remove(path)
                yield path, 0.0, f"not run: it reads {', '.join(label(p) for p in waits[path] & failed)}"
            ready = [p for p in left if not (waits[p] & set(todo)) - done]
            for path in ready[: jobs - len(going)]:
                left.remove(path)
                going[pool.submit(_in_a_process, path, threads)] = path
            if going:
                ended: set[Future] = wait(going, return_when=FIRST_COMPLETED).done
                for future in ended:
                    path = going.pop(future)
                    done.add(path)
                    yield path, *future.result()


def _in_a_process(path: Path, threads: int) -> tuple[float, str | None]:
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    began = time.perf_counter()
    ended = subprocess.run(
        [sys.executable, "-m", "vaelab.runner.cli", "run", str(path)], env=environment, capture_output=True, text=True
    )
    return time.perf_counter() - began, None if ended.returncode == 0 else ended.stderr[-3000:]


def _show_output() -> None:
    """Let what the notebooks print, progress bars above all, through to the terminal."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stdout)
    logging.getLogger("papermill").setLevel(logging.INFO)


def main(arguments: list[str] | None = None) -> int:
    """The command line; see the module's first lines."""
    parser = argparse.ArgumentParser(prog="python -m vaelab.runner.cli", description=__doc__.split("\n")[0])
    verbs = parser.add_subparsers(dest="verb", required=True)
    verbs.add_parser("run", help="run one params file").add_argument("params", type=Path)
    everything = verbs.add_parser("all", help="run every notebook's params file of one name, then the front page")
    everything.add_argument("name")
    everything.add_argument("--jobs", type=int, default=max(1, min(2, os.cpu_count() or 1)))
    verbs.add_parser("index", help="write the front page")
    chosen = parser.parse_args(arguments)
    _show_output()
    from papermill.exceptions import PapermillExecutionError

    from vaelab.runner import index

    try:
        failed = run_all(chosen.name, chosen.jobs) if chosen.verb == "all" else []
        if chosen.verb == "run":
            run(chosen.params)
    except PapermillExecutionError as error:
        print(f"{error.ename}: {error.evalue}", file=sys.stderr)
        return 1
    except ValueError as error:
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
