"""The results page: entries for tables and figures, and the Markdown that is made from them."""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import pandas as pd
from matplotlib.figure import Figure

from vaelab.core.io import atomic
from vaelab.core.paths import project_root, resolve
from vaelab.report.markdown import Block, Chart, listed, number, table
from vaelab.report.runs import FinishedRun
from vaelab.runner.provenance import depends_on

DPI = 100


class Shown(NamedTuple):
    """What an entry shows."""

    finding: str
    """What was found, in one or two plain sentences."""
    blocks: Sequence[Block] = ()


@dataclass(frozen=True)
class Entry:
    """A table or figure of a paper, or a result of our own, and the runs that it is made from."""

    title: str
    """Such as ``Table 1: quality with and without the nudge``."""
    runs: tuple[str, ...]
    """Labels of the runs that it needs."""
    show: Callable[..., Shown]
    """A function of these runs, and of the optional ones, which are None where they are missing."""
    optional: tuple[str, ...] = ()
    paper: str = ""
    """What the paper shows."""
    differs: str = ""
    """How our setting differs from the paper's."""
    paper_runs: tuple[str, ...] = ()
    """The runs in the paper's own setting."""
    headline: bool = False
    """Whether its finding stands at the top of the page."""


@dataclass(frozen=True)
class Absent:
    """A table or figure of a paper that has no number here."""

    number: str
    """Such as ``Table 4, Figure 2``."""
    what: str
    run: str = ""
    """The label of the run that would make it; empty if the lab has nothing that makes it."""
    why: str = ""
    """Why there is no such run."""


@dataclass(frozen=True)
class Section:
    """A part of the page: a paper, or a subject of our own."""

    title: str
    introduction: str
    entries: tuple[Entry, ...]
    absent: tuple[Absent, ...] = ()


class Page(NamedTuple):
    """A finished page."""

    text: str
    charts: tuple[Chart, ...]


def build_page(sections: Sequence[Section], runs: Mapping[str, FinishedRun], pictures: str = "results") -> Page:
    """Make the page.

    Args:
        sections: the parts of the page, in order.
        runs: the finished runs by label.
        pictures: the folder of the runs and charts, as the page's links name it.

    Raises:
        ValueError: a run lacks a number or table that the page shows.
    """
    charts: list[Chart] = []
    shown = {
        entry.title: _show(entry, runs)
        for section in sections
        for entry in section.entries
        if all(name in runs for name in entry.runs)
    }
    parts = ["# Results", _box(runs), _headlines(sections, shown), _contents(sections)]
    for section in sections:
        parts += [f"## {section.title}", section.introduction]
        for entry in section.entries:
            parts += _entry(entry, shown.get(entry.title), runs, pictures, charts)
        parts += _absent(section.absent, runs)
    parts += ["## The runs", _runs(runs, pictures)]
    return Page("\n\n".join(part for part in parts if part) + "\n", tuple(charts))


def _show(entry: Entry, runs: Mapping[str, FinishedRun]) -> Shown:
    try:
        return entry.show(*(runs[name] for name in entry.runs), *(runs.get(name) for name in entry.optional))
    except (LookupError, StopIteration) as error:
        raise ValueError(
            f"{entry.title!r} cannot be made from the results of {listed(entry.runs)}: no {error}"
        ) from error


def write_page(page: Page, results: str | Path) -> None:
    """Write the charts into the folder of the results, and ``results.md`` beside it; the same page gives the same
    bytes."""
    folder = resolve(results)
    with atomic(folder.parent / "results.md") as draft:
        draft.write_text(page.text)
    for chart in page.charts:
        save_chart(chart, folder / f"{chart.name}.png")


def without_pictures(page: Page) -> str:
    """The page's text without the links to pictures, which lead nowhere from another folder."""
    return re.sub(r"^!\[.*\n\n", "", page.text, flags=re.MULTILINE)


def counts(sections: Sequence[Section], runs: Mapping[str, FinishedRun]) -> dict[str, int]:
    """How many runs are finished and stale, and how many results have their runs."""
    rows = entry_table(sections, runs)
    stale = sum(bool(run.changed_weights) for run in runs.values())
    return {"runs": len(runs), "runs.stale": stale, "entries": len(rows), "entries.shown": int(rows["shown"].sum())}


def entry_table(sections: Sequence[Section], runs: Mapping[str, FinishedRun]) -> pd.DataFrame:
    """One row per result: its section, its title, and whether all its runs are finished (``shown``)."""
    return pd.DataFrame([
        {"section": section.title, "title": entry.title, "shown": all(name in runs for name in entry.runs)}
        for section in sections
        for entry in section.entries
    ])  # fmt: skip


def summary(sections: Sequence[Section], runs: Mapping[str, FinishedRun]) -> str:
    """One sentence on what the page shows."""
    count = counts(sections, runs)
    return (
        f"{count['entries.shown']} of {count['entries']} results are shown, from {count['runs']} finished runs; "
        f"{count['runs.stale']} of the runs are stale."
    )


def coverage(sections: Sequence[Section], runs: Mapping[str, FinishedRun]) -> Figure:
    """Draw how many results of each section are shown, and how many wait for a run."""
    import matplotlib.pyplot as plt

    rows = entry_table(sections, runs).groupby("section", sort=False)["shown"].agg(["sum", "size"])
    names = [name.split(":")[0] for name in rows.index]
    figure, axis = plt.subplots(figsize=(4.8, 3.0), layout="constrained")
    axis.barh(names, rows["size"], color="#d9d9d9", label="not run yet")
    axis.barh(names, rows["sum"], color="#3b76af", label="shown")
    axis.invert_yaxis()
    axis.set_xlabel("results")
    axis.legend(fontsize=9)
    return figure


def save_chart(chart: Chart, path: Path) -> None:
    """Draw a chart into a PNG without a date or a version."""
    import matplotlib.pyplot as plt

    figure: Figure = chart.draw()
    with atomic(path) as draft:
        figure.savefig(draft, format="png", dpi=DPI, bbox_inches="tight", metadata={"Software": None})
    plt.close(figure)


def _box(runs: Mapping[str, FinishedRun]) -> str:
    devices = sorted({run.results["environment"]["device"] for run in runs.values()})
    real = [label for label in runs if label.split("/")[1].startswith("paper")]
    stale = [label for label, run in runs.items() if run.changed_weights]
    machines = sorted({machine(run) for run in runs.values()})
    lines = [
        "**What was measured on what.** This page is written by `make report` from the results of finished runs, and "
        "from nothing else. A test fails when one of its numbers is edited.",
        f"- {len(runs)} runs, {number(sum(run.results['seconds'] for run in runs.values()) / 3600, 2)} hours together, "
        f"on {listed(machines)}." if runs else "- No run has been made yet.",
        "- The models are the small ones that the lab ships, called *embedded*: a VAE for pictures of 32 x 32, and a "
        "text-to-image U-Net and a class-conditional transformer for pictures of 64 x 64 "
        "([how they were made](embedded_models.md)). What holds for them need not hold for larger models.",
        "- The real checkpoints (SDXL-VAE, SDXL Turbo, Stable Diffusion 1.5, DiT) have not been run: "
        "their params files are written, and the code is tested on networks of their shapes with random weights."
        if not real else f"- Runs on real checkpoints: {listed(real)}.",
        f"- Devices: {listed(devices)}." + ("" if "cuda" in devices else " Nothing on this page was measured on a "
        "GPU."),
        f"- *Stale*: {listed(stale)}. The embedded weights have changed since these runs." if stale else
        "- No run is stale: all used the embedded weights that the lab ships now.",
        "- A number in brackets after another is a 95 % interval, unless something else is said.",
    ]  # fmt: skip
    return "\n".join(f"> {line}\n>" if index == 0 else f"> {line}" for index, line in enumerate(lines))


def _headlines(sections: Sequence[Section], shown: Mapping[str, Shown]) -> str:
    lines = [
        f"- {shown[entry.title].finding} ([more](#{anchor(entry.title)}))"
        for section in sections
        for entry in section.entries
        if entry.headline and entry.title in shown
    ]
    return "\n".join(["## In short", "", *lines]) if lines else ""


def _contents(sections: Sequence[Section]) -> str:
    lines = ["## Contents", ""]
    for section in sections:
        titles = ", ".join(f"[{entry.title.split(':')[0]}](#{anchor(entry.title)})" for entry in section.entries)
        lines.append(f"- [{section.title}](#{anchor(section.title)}): {titles}")
    return "\n".join([*lines, "- [The runs](#the-runs)"])


def anchor(title: str) -> str:
    """The name by which GitHub links to a heading."""
    return re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-")


def _entry(
    entry: Entry, shown: Shown | None, runs: Mapping[str, FinishedRun], pictures: str, charts: list[Chart]
) -> list[str]:
    parts = [f"### {entry.title}", f"*The paper:* {entry.paper}" if entry.paper else ""]
    if shown is None:
        missing = [name for name in entry.runs if name not in runs]
        parts.append("*Not run:* " + ", ".join(command(name) for name in missing))
    else:
        used = [runs[name] for name in (*entry.runs, *entry.optional) if name in runs]
        links = listed([_run_link(run, pictures) for run in used])
        parts += [f"**{shown.finding}**" if shown.finding else "", f"*Runs:* {links}."]
        parts += [f"*The setting differs from the paper's:* {entry.differs}" if entry.differs else ""]
        for block in shown.blocks:
            parts.append(_block(block, pictures, charts))
    parts += [f"*In the paper's own setting* ({_run_link(runs[name], pictures)}): {runs[name].results['finding']}"
              for name in entry.paper_runs if name in runs]  # fmt: skip
    waiting = [command(name) for name in entry.paper_runs if name not in runs]
    return [*parts, f"*In the paper's own setting, not run:* {listed(waiting)}." if waiting else ""]


def _block(block: Block, pictures: str, charts: list[Chart]) -> str:
    if isinstance(block, str):
        return block
    if isinstance(block, Chart):
        charts.append(block)
        path = f"{block.name}.png"
    else:
        path = "/".join(block.path.parts[-3:])
    return f"![{block.caption.split('. ')[0].rstrip('.')}]({pictures}/{path})\n\n*{block.caption}*"


def _run_link(run: FinishedRun, pictures: str) -> str:
    stale = f" (**stale**: {listed(run.changed_weights)} changed since)" if run.changed_weights else ""
    return _link(run, pictures) + stale


def _link(run: FinishedRun, pictures: str) -> str:
    return f"[`{run.label}`]({pictures}/{run.label}/results.json)"


def command(label: str) -> str:
    """The command that makes a run."""
    return f"`make run P=params/{label}.yaml`"


def _absent(absent: Sequence[Absent], runs: Mapping[str, FinishedRun]) -> list[str]:
    if not absent:
        return []
    rows = []
    for item in absent:
        state = item.why
        if item.run and item.run in runs:
            state = runs[item.run].results["finding"] or "run, see the table of runs"
        elif item.run and (project_root() / f"params/{item.run}.yaml").is_file():
            state = f"not run: {command(item.run)}" + (f"; {item.why}" if item.why else "")
        elif item.run:
            state = f"the lab does not have it yet (`{item.run.split('/')[0]}`)"
        rows.append((item.number, item.what, state))
    return ["#### The paper's other tables and figures", table(("in the paper", "what it shows", "here"), rows)]


def machine(run: FinishedRun) -> str:
    """The processor or GPU that a run was made on."""
    environment = run.results["environment"]
    name = environment["processor"] if environment["device"] == "cpu" else environment["device_name"]
    if environment["device"] != "cpu":
        return name
    threads = environment["threads"]
    return f"{name} ({threads} thread{'s' if threads > 1 else ''})"


def _runs(runs: Mapping[str, FinishedRun], pictures: str) -> str:
    rows = []
    for run in runs.values():
        weights = run.results["embedded_weights"]
        used = depends_on(run.label, run.params)
        hashes = ", ".join(f"{name} {weights.get(name, 'unknown')[:8]}" for name in used) or "none"
        state = f"**stale** ({listed(run.changed_weights)})" if run.changed_weights else "current"
        rows.append((_link(run, pictures), number(run.results["seconds"]), machine(run), hashes,
                     state))  # fmt: skip
    return table(("run", "seconds", "machine", "embedded weights", "state"), rows)
