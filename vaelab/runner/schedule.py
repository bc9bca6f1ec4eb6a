"""Every params file of one name, some at a time, each after the runs that it reads."""

import os
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from functools import partial
from pathlib import Path

from vaelab.core.io import read_json, write_json
from vaelab.core.paths import project_root
from vaelab.core.validate import at_least
from vaelab.runner import index
from vaelab.runner.execute import RunFailed, finished, label, load_params, matching, needs, read_yaml, run

ALONE = ("90_benchmarks",)
"""Notebooks that measure speed: nothing runs beside them."""
HISTORY = ".seconds.json"
"""How long each run took here the last time, in the outputs folder."""
ESTIMATES = "seconds.yaml"
"""How long runs took on another machine, in the params folder: for those that were never run here."""


class Schedule:
    """The runs of one name that are not finished.

    Args:
        name: such as ``demo``, which also selects ``demo-digits``.
        jobs: runs at a time.
        overwrite: whether to run finished ones again.

    Raises:
        ValueError: there is no params file of that name.
    """

    def __init__(self, name: str, jobs: int, *, overwrite: bool = False):
        at_least("jobs", jobs, 1)
        self.jobs, self.overwrite = jobs, overwrite
        self.selected = matching(name)
        if not self.selected:
            raise ValueError(f"no params file called {name!r}")
        self.errors: dict[Path, str] = {}
        self.todo: list[Path] = []
        for path in self.selected:
            try:
                if overwrite or not finished(path):
                    self.todo.append(path)
            except ValueError as error:
                self.errors[path] = f"error: {error}"
        known = {*self.todo, *self.errors}
        self.waits = {path: {p for p in needs(load_params(path)) if p in known} for path in self.todo}
        self.running: list[Path] = []
        self.ended: list[Path] = []
        self._history = _read_history()
        self._expected = {**_read_estimates(), **self._history}
        self._took: dict[Path, float] = {}

    def execute(self) -> list[str]:
        """Run them: the longest chains first, and notebooks that measure speed alone, last.

        Returns:
            The runs that failed.
        """
        done_before = len(self.selected) - len(self.todo) - len(self.errors)
        page = index.page_of(project_root() / "outputs").relative_to(project_root())
        print(f"{page} shows the progress: {len(self.todo)} runs, {self.jobs} at a time; "
              f"{done_before} are finished already{self._time_left()}", flush=True)  # fmt: skip
        for path, error in self.errors.items():
            print(f"{label(path)}  FAILED\n{error}", flush=True)
        self._write_page()
        together = [path for path in self.todo if path.parent.name not in ALONE]
        alone = [path for path in self.todo if path.parent.name in ALONE]
        # not for a few runs, whose own imports cost less; not on macOS, whose libraries do not survive a fork
        fork = len(together) > 2 * self.jobs and sys.platform == "linux"
        for batch, width, execute in ((together, self.jobs, partial(run, fork=fork)), (alone, 1, run)):
            for path, seconds, error in self._scheduled(batch, width, execute):
                self.ended.append(path)
                if error is None:
                    self._took[path] = seconds
                    self._history[label(path)] = round(seconds, 1)
                    write_json(project_root() / "outputs" / HISTORY, self._history)
                else:
                    self.errors[path] = error
                count = f"[{len(self.ended):2}/{len(self.todo)}] {seconds:6.1f} s  {label(path)}"
                print(f"{count}{'  FAILED' if error else ''}{self._time_left()}", flush=True)
                if error is not None:
                    print(error, flush=True)
                self._write_page()
        return [label(path) for path in self.selected if path in self.errors]

    def _scheduled(self, todo: list[Path], width: int, execute: Callable) -> Iterator[tuple[Path, float, str | None]]:
        """Yield each run as it ends, with its seconds and its error or None; a run whose needs failed ends at once."""
        left = sorted(todo, key=self._chain_seconds, reverse=True)
        running: dict[Future, Path] = {}
        os.environ["OMP_NUM_THREADS"] = str(max(1, (os.cpu_count() or 1) // width))
        pool = ThreadPoolExecutor(width)
        while left or running:
            for path in [p for p in left if self.waits[p] & self.errors.keys()]:
                left.remove(path)
                failed = ", ".join(sorted(label(p) for p in self.waits[path] & self.errors.keys()))
                yield path, 0.0, f"not run: it reads {failed}"
            ready = [p for p in left if not (self.waits[p] & {*left, *running.values()})]
            started = ready[: width - len(running)]
            for path in started:
                left.remove(path)
                running[pool.submit(_timed, execute, path, self.overwrite)] = path
            self.running = list(running.values())
            if started:
                self._write_page()
            for future in wait(running, return_when=FIRST_COMPLETED).done if running else ():
                path = running.pop(future)
                self.running = list(running.values())
                yield path, *future.result()
        pool.shutdown()

    def _seconds(self, path: Path) -> float:
        """What a run is expected to take; for one that is not known, the mean."""
        mean = sum(self._expected.values()) / len(self._expected) if self._expected else 0.0
        return self._expected.get(label(path), mean)

    def _chain_seconds(self, path: Path) -> tuple[float, int]:
        """Seconds and length of the longest chain of runs that begins with this one."""
        after = [self._chain_seconds(other) for other in self.todo if path in self.waits[other]]
        seconds, length = max(after, default=(0.0, 0))
        return self._seconds(path) + seconds, 1 + length

    def _time_left(self) -> str:
        left = [path for path in self.todo if path not in self.ended]
        if not self._expected or not left:
            return ""
        alone = sum(self._seconds(path) for path in left if path.parent.name in ALONE)
        together = sum(self._seconds(path) for path in left) - alone
        expected = sum(self._seconds(path) for path in self._took)
        pace = sum(self._took.values()) / expected if expected else 1.0  # of this machine, today
        return f"; about {max(1, round(pace * (alone + together / self.jobs) / 60))} minutes left"

    def _write_page(self) -> None:
        waiting = [path for path in self.todo if path not in self.running and path not in self.ended]
        status = index.RunStates(
            running=[label(path) for path in self.running],
            waiting=[label(path) for path in waiting],
            failed={label(path): error for path, error in self.errors.items()},
            ended=len(self.ended),
            time_left=self._time_left().removeprefix("; "),
        )
        index.write(project_root() / "outputs", status)


def _timed(execute: Callable, path: Path, overwrite: bool) -> tuple[float, str | None]:
    started, error = time.perf_counter(), None
    try:
        execute(path, overwrite=overwrite, show_output=False)
    except (RunFailed, ValueError, OSError) as failure:
        error = f"error: {failure}"
    return time.perf_counter() - started, error


def _read_history() -> dict[str, float]:
    try:
        stored = read_json(project_root() / "outputs" / HISTORY)
        return {str(name): float(seconds) for name, seconds in stored.items()}
    except (OSError, ValueError, TypeError, AttributeError):
        return {}


def _read_estimates() -> dict[str, float]:
    path = project_root() / "params" / ESTIMATES
    return read_yaml(path) if path.exists() else {}
