"""``outputs/index.html``, the front page: the maps of knowledge, then each run with its pictures and numbers.

The page's layout is the template ``index.html`` beside this module.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vaelab.core.io import atomic
from vaelab.runner.run import read_results

PICTURES, NUMBERS = 3, 8
"""How many of a run's figures and metrics are shown."""
SMOKE = "smoke"
PREFERRED, FEATURED = "full", "knowledge"
"""A figure of the second name, with or without a suffix, stands above all runs: for each notebook that has one,
that of the run of the first name, else of the first run."""


@dataclass
class Entry:
    """One run as the page shows it."""

    folder: str
    """The notebook's name, which is also the folder below ``outputs``."""
    name: str
    """The run's name."""
    page: str = ""
    """Its executed notebook, as HTML where there is one."""
    problem: str = ""
    """Why there are no results."""
    seconds: float = 0.0
    device: str = ""
    numbers: list[tuple[str, str]] = field(default_factory=list)
    more: int = 0
    """Metrics that are not shown."""
    files: list[str] = field(default_factory=list)
    """Its figures, in the order in which they were made."""

    @property
    def pictures(self) -> list[str]:
        """The figures that are shown."""
        return self.files[:PICTURES]


def write(outputs: Path) -> Path:
    """Write the front page of everything run under ``outputs``; returns its path."""
    from jinja2 import Environment

    notebooks = []
    for folder in sorted(path for path in outputs.glob("*/") if path.is_dir()):
        names = {path.stem for path in folder.glob("*.ipynb") if not path.stem.endswith(".new")}
        names |= {path.parent.name for path in folder.glob("*/results.json")}
        if names:
            question = _question(outputs.parent / "notebooks" / f"{folder.name}.ipynb")
            runs = [_entry(folder, name) for name in sorted(names)]
            notebooks.append({"name": folder.name, "question": question, "runs": runs})
    template = Environment(autoescape=True).from_string(Path(__file__).with_name("index.html").read_text())
    page = outputs / "index.html"
    with atomic(page) as draft:
        draft.write_text(template.render(notebooks=notebooks, featured=_featured(notebooks), smoke=SMOKE) + "\n")
    return page


def _featured(notebooks: list[dict[str, Any]]) -> list[tuple[Entry, list[str], str]]:
    """The runs whose figures stand above all others, these figures, and what their notebook asks."""
    found = []
    for notebook in reversed(notebooks):
        for run in sorted(notebook["runs"], key=lambda run: run.name != PREFERRED):
            files = [file for file in run.files if file[:-4].split("-")[0] == FEATURED]
            if files and run.name != SMOKE:
                found.append((run, files, notebook["question"]))
                break
    return found


def _question(notebook: Path) -> str:
    """What a notebook asks: the heading of its first cell, without the number."""
    try:
        heading = "".join(json.loads(notebook.read_text())["cells"][0]["source"]).split("\n")[0]
    except (OSError, ValueError, LookupError):
        return ""
    return heading.removeprefix("# ").split(" · ")[-1] if heading.startswith("# ") else ""


def _entry(folder: Path, name: str) -> Entry:
    pages = [f"{name}{ending}" for ending in (".html", ".ipynb") if (folder / f"{name}{ending}").exists()]
    entry = Entry(folder.name, name, page=f"{folder.name}/{pages[0]}" if pages else "")
    if not (folder / name / "results.json").exists():
        entry.problem = "not finished: failed, killed or running"
        return entry
    try:
        results = read_results(folder / name)
        metrics, environment = results.get("metrics", {}), results.get("environment", {})
        entry.numbers = [(str(key), _number(value)) for key, value in list(metrics.items())[:NUMBERS]]
        entry.more = max(0, len(metrics) - NUMBERS)
        entry.seconds, entry.device = float(results["seconds"]), str(environment.get("device_name", ""))
        files = [file for file in results.get("files", []) if isinstance(file, str) and file.endswith(".png")]
        entry.files = [file for file in files if file == Path(file).name]
    except (ValueError, TypeError, LookupError, AttributeError) as error:
        entry.problem = f"its results cannot be read: {error}"
    return entry


def _number(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
