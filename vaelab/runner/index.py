"""``outputs/index.html``, the front page: what the lab found, then each run with its numbers and its picture.

The page's layout is the template ``index.html`` beside this module. It needs no network.
"""

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from vaelab.core.io import atomic, read_json
from vaelab.runner.output import in_use
from vaelab.runner.parameters import EXECUTION_ONLY, defaults, portable
from vaelab.runner.provenance import changed_weights, embedded_weights
from vaelab.runner.run import read_results

WINGS = {
    "The models": range(0, 10),
    "The VAE's channels": range(10, 20),
    "Latent pruning": range(20, 30),
    "Sparse autoencoders": range(30, 40),
    "What layers know": range(40, 50),
    "How fast, report": range(90, 100),
}
"""The sections of the page, and the numbers of their notebooks."""
FEATURED = (
    "11_compare_interventions",
    "21_sparsity_collapse",
    "32_evaluate_sae",
    "42_diffc",
    "02_judge_embedded_models",
)
"""Notebooks whose first key number and finding stand above all runs."""
PREFERRED = ("full", "study", "demo")
"""Runs whose numbers stand there, the best first."""
OWN = "Your own runs"
SMOKE = "smoke"
METRICS, LONGEST = 4, 60
"""How many metrics a run without key numbers shows; how many characters of a parameter's value."""
THUMBNAIL = "thumbnail.png"


@dataclass
class RunStates:
    """What ``vaelab all`` is doing; runs are named ``notebook/run``."""

    running: list[str] = field(default_factory=list)
    waiting: list[str] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)
    """The runs that failed, and why."""
    ended: int = 0
    """Number of runs that have ended."""
    time_left: str = ""

    @property
    def left(self) -> int:
        """Number of runs that have not ended."""
        return len(self.running) + len(self.waiting)


@dataclass
class Entry:
    """One run as the page shows it."""

    folder: str
    """The folder of the run, relative to ``outputs``."""
    notebook: str
    name: str
    page: str = ""
    """Its executed notebook relative to ``outputs``, as HTML where there is one."""
    state: str = "done"
    """``done``, ``running``, ``waiting`` or ``failed``."""
    problem: str = ""
    """Why there are no results."""
    seconds: float = 0.0
    device: str = ""
    finding: str = ""
    stale: str = ""
    """The embedded models that the run used and whose weights have changed since."""
    numbers: list[tuple[str, str, str]] = field(default_factory=list)
    """Label, value with unit, and 95 % interval of each number that is shown."""
    key: bool = False
    """Whether the numbers are those that the notebook named."""
    parameters: list[tuple[str, str]] = field(default_factory=list)
    """The parameters that differ from the notebook's defaults."""
    picture: str = ""
    """The figure that is shown."""
    figures: list[str] = field(default_factory=list)
    """The other figures."""


def page_of(outputs: Path) -> Path:
    """The front page's file."""
    return outputs / "index.html"


def write(outputs: Path, progress: RunStates | None = None) -> Path:
    """Write the front page of everything run under ``outputs``; returns its path.

    Args:
        outputs: the outputs folder.
        progress: the runs that are not finished; while there are any, the page reloads itself.
    """
    from jinja2 import Environment

    progress = progress or RunStates()
    known = sorted((outputs.parent / "notebooks").glob("*.ipynb"))
    entries = [*_entries(outputs, progress)]
    wings = []
    for wing, numbers in WINGS.items():
        notebooks = [
            {"name": path.stem, "question": _question(path), "runs": runs}
            for path in known
            if path.stem[:2].isdigit() and int(path.stem[:2]) in numbers
            if (runs := [entry for entry in entries if entry.notebook == path.stem])
        ]
        if notebooks:
            wings.append({"title": wing, "id": f"wing-{numbers.start}", "notebooks": notebooks})
    shown = {id(run) for wing in wings for notebook in wing["notebooks"] for run in notebook["runs"]}
    own = [entry for entry in entries if id(entry) not in shown]
    if own:
        wings.append({"title": OWN, "id": "own", "notebooks": [{"name": "", "question": "", "runs": own}]})
    template = Environment(autoescape=True).from_string(Path(__file__).with_name("index.html").read_text())
    page = page_of(outputs)
    with atomic(page) as draft:
        draft.write_text(template.render(wings=wings, cards=_cards(wings), progress=progress, smoke=SMOKE) + "\n")
    return page


def _cards(wings: list[dict[str, Any]]) -> list[tuple[Entry, str]]:
    """The runs whose first key number and finding stand above all others, and what their notebooks ask."""
    notebooks = {notebook["name"]: notebook for wing in wings for notebook in wing["notebooks"]}
    cards = []
    for name in FEATURED:
        runs = {run.name: run for run in notebooks.get(name, {}).get("runs", []) if run.key or run.finding}
        best = next((runs[preferred] for preferred in PREFERRED if preferred in runs), None)
        if best is not None:
            cards.append((best, notebooks[name]["question"]))
    return cards


def _entries(outputs: Path, progress: RunStates) -> Iterator[Entry]:
    """Every run under ``outputs``, those that have not begun, and notebooks without a run."""
    found = {str(folder.relative_to(outputs)): folder for folder in _run_folders(outputs)}
    executed = _executed(outputs)
    named = {*progress.running, *progress.waiting, *progress.failed}
    for folder in sorted({*found, *executed, *named}):
        entry = _entry(outputs, folder, executed.get(folder, ""))
        if folder in progress.running or folder in progress.waiting:
            entry.state = "running" if folder in progress.running else "waiting"
            entry.problem = entry.state
        elif folder in progress.failed:
            entry.state, entry.problem = "failed", progress.failed[folder].removeprefix("error: ")
        yield entry


def _run_folders(outputs: Path) -> Iterator[Path]:
    """The folders of runs, finished or not; what lies inside one is not searched."""
    for place, folders, files in os.walk(outputs):
        if "results.json" in files or ".run" in folders:
            folders.clear()
            yield Path(place)
        folders[:] = sorted(name for name in folders if not name.startswith("."))


def _executed(outputs: Path) -> dict[str, str]:
    """For each run's folder its executed notebook, as HTML where there is one; both relative to ``outputs``."""
    found = {}
    for path in sorted(outputs.rglob("*.ipynb")):
        relative = path.relative_to(outputs)
        if path.stem.endswith(".new") or any(part.startswith(".") or part == "lab" for part in relative.parts[:-1]):
            continue
        page = relative.with_suffix(".html") if path.with_suffix(".html").exists() else relative
        folder = str(relative.with_suffix(""))
        if not (outputs / folder).is_dir():  # executed by papermill itself: its parameters name the folder
            folder = _output_dir(path) or folder
        found.setdefault(folder, str(page))
    return found


def _output_dir(notebook: Path) -> str:
    """The output folder, relative to ``outputs``, that papermill gave an executed notebook."""
    try:
        given = read_json(notebook)["metadata"]["papermill"]["parameters"]["output_dir"]
    except (OSError, ValueError, LookupError, TypeError):
        return ""
    return given.removeprefix("outputs/") if isinstance(given, str) and given.startswith("outputs/") else ""


def _question(notebook: Path) -> str:
    """What a notebook asks: the heading of its first cell, without the number."""
    try:
        heading = "".join(json.loads(notebook.read_text())["cells"][0]["source"]).split("\n")[0]
    except (OSError, ValueError, LookupError):
        return ""
    return heading.removeprefix("# ").split(" · ")[-1] if heading.startswith("# ") else ""


def _entry(outputs: Path, folder: str, page: str) -> Entry:
    parts = Path(folder).parts
    entry = Entry(folder, parts[0] if len(parts) == 2 else "", parts[1] if len(parts) == 2 else folder, page)
    if not (outputs / folder / "results.json").exists():
        running = in_use(outputs / folder)
        entry.state = "running" if running else "failed"
        entry.problem = "running" if running else "no results: it failed or was stopped"
        return entry
    try:
        results = read_results(outputs / folder)
        entry.numbers = [shown_number(number) for number in results.get("key_numbers", [])]
        entry.key = bool(entry.numbers)
        if not entry.numbers:
            metrics = list(results.get("metrics", {}).items())[:METRICS]
            entry.numbers = [(str(name), _number(value), "") for name, value in metrics]
        entry.finding = str(results.get("finding", ""))
        if "embedded_weights" in results:
            entry.stale = ", ".join(changed_weights(results, _weights()))
        entry.parameters = _differing(outputs.parent / "notebooks", results)
        environment = results.get("environment", {})
        entry.seconds, entry.device = float(results["seconds"]), str(environment.get("device_name", ""))
        files = [file for file in results.get("files", []) if isinstance(file, str) and file.endswith(".png")]
        files = sorted((file for file in files if file == Path(file).name), key=lambda file: file != THUMBNAIL)
        entry.picture, entry.figures = (files[0], files[1:]) if files else ("", [])
    except (ValueError, TypeError, LookupError, AttributeError) as error:
        entry.state, entry.problem = "failed", f"its results cannot be read: {error}"
    return entry


@cache
def _weights() -> dict[str, str]:
    return embedded_weights()


def _differing(notebooks: Path, results: dict[str, Any]) -> list[tuple[str, str]]:
    """The parameters of a run that differ from its notebook's defaults."""
    path = notebooks / f"{results.get('notebook')}.ipynb"
    if not path.is_file():
        return []
    usual = defaults(path)
    return [
        (name, text if len(text) <= LONGEST else f"{text[: LONGEST - 1]}…")
        for name, value in results.get("params", {}).items()
        if name not in EXECUTION_ONLY and name in usual and portable(usual[name]) != value
        for text in [", ".join(map(str, value)) if isinstance(value, list) else str(value)]
    ]


def shown_number(number: Mapping[str, Any]) -> tuple[str, str, str]:
    """Format a key number of a run's results: its label, its value with unit, and its interval."""
    unit, interval = number.get("unit", ""), number.get("interval")
    ends = f"{_number(interval[0])} to {_number(interval[1])}" if interval else ""
    return str(number["label"]), f"{_number(number['value'])} {unit}".strip(), ends


def _number(value: Any) -> str:
    if not isinstance(value, float):
        return str(value)
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
