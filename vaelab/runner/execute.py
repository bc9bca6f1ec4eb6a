"""Params files, and the execution of one: ``params/<notebook>/<run>.yaml`` gives ``outputs/<notebook>/<run>.ipynb``."""

import builtins
import errno
import os
import re
from pathlib import Path
from typing import Any

from vaelab.core.paths import project_root
from vaelab.core.validate import nearest, unknown
from vaelab.runner.output import RESULTS, Lock, recover
from vaelab.runner.parameters import changed, declared, portable, validate
from vaelab.runner.run import read_results

QUIET = ["--log-level=CRITICAL"]
"""Arguments of the kernel, whose own log would stand between the lines of the terminal; it has no errors of cells."""


class RunFailed(Exception):
    """A run stopped before its end; the message is one sentence."""

    def __init__(self, message: str, *, by_input: bool):
        super().__init__(message)
        self.by_input = by_input
        """Whether the cause lies in the input or the machine, such as a wrong parameter or a full disk."""


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
    if not params_file.is_file():
        known = {label(path): path for path in (project_root() / "params").glob("*/*.yaml")}
        close = [portable(str(known[name])) for name in nearest(label(params_file), known)]
        raise ValueError(f"no params file {str(params_file)!r}; the nearest: {', '.join(close)}")
    kinds = declared(notebook_of(params_file))
    params = read_yaml(params_file)
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


def read_yaml(path: Path) -> dict[str, Any]:
    """A file of lines of the form ``name: value``.

    Raises:
        ValueError: it is another kind of file.
    """
    import yaml

    try:
        params = yaml.safe_load(path.read_text())
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not a text file in UTF-8") from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f" in line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise ValueError(f"{path}: not valid YAML{where} ({getattr(error, 'problem', error)})") from error
    if params is None:
        return {}
    if not isinstance(params, dict):
        raise ValueError(f"{path}: expected lines of the form 'name: value', got a {type(params).__name__}")
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


def run(params_file: Path, *, overwrite: bool = False, show_output: bool = True, fork: bool = False) -> bool:
    """Run one params file, after the unfinished runs that it reads.

    Args:
        params_file: a file under ``params/``.
        overwrite: whether to replace the results of a finished run.
        show_output: whether to log what the notebook prints.
        fork: whether its kernel shares the imports of this process' other kernels, see :mod:`vaelab.runner.forked`.

    Returns:
        Whether it ran; False if it was finished already.

    Raises:
        ValueError: see :func:`load_params` and :func:`finished`.
        RunFailed: a cell raised, or the kernel died; the executed notebook shows where.
    """
    params_file = Path(params_file).absolute()
    params = load_params(params_file)
    overwrite = overwrite or params.get("overwrite", False)
    if not overwrite and not params.get("dry_run", False) and finished(params_file):
        return False
    for needed in needs(params):
        if not finished(needed):
            print(f"{label(params_file)} reads {label(needed)}, which is not finished: running it first", flush=True)
            run(needed, show_output=show_output, fork=fork)
    folder = output_of(params_file)
    (folder / ".run").mkdir(parents=True, exist_ok=True)
    lock = Lock(folder / ".run" / "notebook.lock", label(params_file))
    try:
        _execute(params_file, {**params, "overwrite": True} if overwrite else params, show_output, fork)
    finally:
        lock.release()
    return True


def _execute(params_file: Path, params: dict[str, Any], show_output: bool, fork: bool) -> None:
    """Execute the notebook; a finished run's notebook and page are replaced only when the new ones are complete."""
    import papermill
    from nbclient.exceptions import DeadKernelError
    from papermill.exceptions import PapermillExecutionError

    from vaelab.runner.forked import ForkedKernelManager
    from vaelab.runner.page import to_html

    output = output_of(params_file).with_name(f"{params_file.stem}.ipynb")
    replaces = (output_of(params_file) / RESULTS).exists()
    target = output.with_name(f"{params_file.stem}.new.ipynb") if replaces else output
    # relative, since papermill writes both paths into the executed notebook
    source, place = (path.relative_to(project_root()) for path in (notebook_of(params_file), target))
    options = {"kernel_manager_class": ForkedKernelManager} if fork else {}
    try:
        papermill.execute_notebook(
            source, place, params, progress_bar=False, log_output=show_output, extra_arguments=QUIET, **options
        )
    except PapermillExecutionError as error:
        raise _failure(params_file, error.ename, error.evalue, place) from error
    except DeadKernelError as error:
        raise RunFailed(
            f"{label(params_file)} failed: the kernel died, often for lack of memory; the notebook is {place}",
            by_input=True,
        ) from error
    if not (output_of(params_file) / RESULTS).exists():
        return  # a dry run
    results = read_results(output_of(params_file))
    page = to_html(target, front_page=project_root() / "outputs" / "index.html", results=results)
    os.replace(page, output.with_suffix(".html"))
    os.replace(target, output)


def _failure(params_file: Path, kind: str, message: str, notebook: Path) -> RunFailed:
    """The error of a cell as one sentence; errors of these two kinds are caused by the input or the machine."""
    by_input = issubclass(getattr(builtins, kind, Exception), (ValueError, OSError))
    first = " ".join(message.split("\n\n")[0].split())
    first = f"the disk is full ({first})" if f"Errno {errno.ENOSPC}]" in first else f"{kind}: {first}"
    return RunFailed(f"{label(params_file)} failed: {first}; the executed notebook is {notebook}", by_input=by_input)


def label(params_file: Path) -> str:
    """``10_finetune_vae/demo``."""
    return f"{params_file.parent.name}/{params_file.stem}"


def matching(name: str) -> list[Path]:
    """The params files of every notebook called ``name`` or ``name-...``, in order."""
    found = sorted((project_root() / "params").glob("*/*.yaml"), key=lambda path: (path.parent.name, path.stem))
    return [path for path in found if path.stem == name or path.stem.startswith(f"{name}-")]
