"""``outputs/index.html``: the map of knowledge, then a row a run with key pictures, main numbers, time and notebook."""

import os
from html import escape
from pathlib import Path
from urllib.parse import quote

from vaelab.core.io import atomic, read_json

PICTURES, NUMBERS = 3, 8
SMOKE = "smoke"
FIRST, HONOURED = "full", "knowledge"
"""A figure of this name, with or without an ending, stands above all runs: of each notebook that has one, that of the
run called ``FIRST``, else of the first."""
STYLE = """
:root { color-scheme: light dark; --line: #8884; --soft: #8882; --accent: #3b76af; }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 1200px; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.6rem; margin-bottom: 0; } h2 { font-size: 1.15rem; margin: 2.2rem 0 0; }
article { display: grid; grid-template-columns: minmax(230px, 1fr) 3fr; gap: 1.2rem; padding: 1rem 0;
  border-top: 1px solid var(--line); }
article h3 { margin: 0; font-size: 1rem; } a { color: var(--accent); }
.meta { opacity: .7; font-size: .85rem; margin: .1rem 0 .6rem; }
table { border-collapse: collapse; font-size: .85rem; width: 100%; } td { padding: .12rem 0; vertical-align: top; }
td + td { text-align: right; font-variant-numeric: tabular-nums; padding-left: .8rem; white-space: nowrap; }
.pictures { display: flex; gap: .8rem; flex-wrap: wrap; align-items: flex-start; }
figure { margin: 1rem 0; } figure img { max-width: 100%; background: white; border: 1px solid var(--soft); }
.pictures img { max-height: 210px; max-width: 100%; background: white; border: 1px solid var(--soft); }
.unfinished { color: #b3362b; } @media (max-width: 700px) { article { grid-template-columns: 1fr; } }
"""


def write(outputs: Path) -> Path:
    """Write the front page of everything run under ``outputs``; returns its path."""
    notebooks = outputs.parent / "notebooks"
    sections = []
    for folder in sorted(path for path in outputs.glob("*/") if path.is_dir()):
        names = {path.stem for path in folder.glob("*.ipynb")} | {
            path.parent.name for path in folder.glob("*/results.json")
        }
        if names:
            rows = {name: _row(folder, name) for name in sorted(names)}
            shown = "\n".join(row for name, row in rows.items() if name != SMOKE)
            hidden = f"<details><summary>its smoke run</summary>{rows[SMOKE]}</details>" if SMOKE in rows else ""
            asked = escape(_question(notebooks / f"{folder.name}.ipynb"))
            sections.append(f"<h2>{escape(folder.name)}</h2><p class=meta>{asked}</p>\n{shown}\n{hidden}")
    sections = [*_honoured(outputs, notebooks), *sections]
    body = "\n".join(sections) or "<p>Nothing has been run yet: try <code>make demo</code>.</p>"
    page = outputs / "index.html"
    with atomic(page) as draft:
        draft.write_text(
            f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>vaelab: what has been run</title>\n'
            f'<meta name="viewport" content="width=device-width, initial-scale=1"><style>{STYLE}</style></head>\n'
            f"<body><h1>vaelab</h1><p class=meta>What has been run, with its numbers as they came out. "
            f"A run's name leads to its notebook.</p>\n{body}\n</body></html>\n"
        )
    return page


def _honoured(outputs: Path, notebooks: Path) -> list[str]:
    """The figures that stand above all runs, each under what its notebook asks."""
    shown = []
    for folder in sorted(outputs.glob("*/"), reverse=True):
        runs = [path.parent for path in sorted(folder.glob("*/results.json")) if path.parent.name != SMOKE]
        for place in sorted(runs, key=lambda place: place.name != FIRST):
            files = read_json(place / "results.json").get("files", [])
            named = [file for file in files if file.endswith(".png") and file[:-4].split("-")[0] == HONOURED]
            if named:
                asked = escape(_question(notebooks / f"{folder.name}.ipynb"))
                images = "".join(
                    f'<a href="{_url(folder, place.name, file)}"><img src="{_url(folder, place.name, file)}" '
                    f'alt="{escape(file[:-4])}"></a>'
                    for file in named
                )
                told = f"{_link(folder, place.name, f'{folder.name}/{place.name}')}: {asked}"
                shown.append(f"<figure>{images}<figcaption class=meta>{told}</figcaption></figure>")
                break
    return [f"<h2>What its layers know</h2>\n{''.join(shown)}"] if shown else []


def _question(notebook: Path) -> str:
    """What a notebook asks: the heading of its first cell, without the number."""
    if not notebook.exists():
        return ""
    heading = "".join(read_json(notebook)["cells"][0]["source"]).split("\n")[0]
    return heading.removeprefix("# ").split(" · ")[-1] if heading.startswith("# ") else ""


def _row(folder: Path, name: str) -> str:
    results_file = folder / name / "results.json"
    if not results_file.exists():
        state = "<p class='meta unfinished'>not finished: failed, killed or running</p>"
        return f"<article><div><h3>{_link(folder, name)}</h3>{state}</div></article>"
    results = read_json(results_file)
    numbers = "".join(
        f"<tr><td>{escape(key)}</td><td>{_number(value)}</td></tr>"
        for key, value in list(results["metrics"].items())[:NUMBERS]
    )
    more = len(results["metrics"]) - NUMBERS
    rest = f"<p class=meta>and {more} more in {escape(name)}/results.json</p>" if more > 0 else ""
    pictures = "".join(
        f'<a href="{_url(folder, name, file)}"><img src="{_url(folder, name, file)}" alt="{escape(file[:-4])}"></a>'
        for file in [file for file in results.get("files", []) if file.endswith(".png")][:PICTURES]
    )
    device = results["environment"].get("device_name", "")
    return (
        f"<article><div><h3>{_link(folder, name)}</h3>"
        f"<p class=meta>{results['seconds']:.1f} s on {escape(str(device))}</p>"
        f"<table>{numbers}</table>{rest}</div><div class=pictures>{pictures}</div></article>"
    )


def _link(folder: Path, name: str, text: str = "") -> str:
    for ending in (".html", ".ipynb"):
        if (folder / f"{name}{ending}").exists():
            return f'<a href="{_url(folder, name + ending)}">{escape(text or name)}</a>'
    return escape(text or name)


def _url(folder: Path, *parts: str) -> str:
    return quote(os.path.join(folder.name, *parts))


def _number(value: float) -> str:
    return str(value) if isinstance(value, int) else f"{value:.4g}"
