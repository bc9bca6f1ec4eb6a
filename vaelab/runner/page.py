"""An executed notebook as one HTML file, which needs no network.

Results come first; the code of each cell is folded below them. The page's layout is the template ``notebook.html``
beside this module.
"""

import os
import re
from collections.abc import Mapping
from html import escape
from pathlib import Path
from types import MappingProxyType
from typing import Any

from vaelab.runner.index import shown_number

INTERACTIVE = ("application/vnd.jupyter.widget-view+json", "application/javascript")
"""Outputs that need a running kernel or scripts; their text or picture is shown instead."""


def to_html(
    notebook: Path, *, front_page: Path | None = None, results: Mapping[str, Any] = MappingProxyType({})
) -> Path:
    """Write an executed notebook as HTML beside it; returns the page.

    Args:
        notebook: an executed notebook.
        front_page: what the page links back to.
        results: the run's results, whose finding and key numbers stand below the question.
    """
    import nbformat
    from jinja2 import Environment
    from nbconvert import HTMLExporter
    from pygments.formatters import HtmlFormatter

    from vaelab.core.io import atomic

    nb = nbformat.read(notebook, as_version=4)
    for cell in nb.cells:
        cell.outputs = _shown(cell.get("outputs", [])) if cell.cell_type == "code" else []
    nb.metadata.pop("widgets", None)
    if results.get("finding"):
        nb.cells.insert(1, nbformat.v4.new_markdown_cell(_summary(results)))
    exporter = HTMLExporter(raw_template=CELLS, template_name="basic", embed_images=True)
    body, _ = exporter.from_notebook_node(nb)
    template = Environment(autoescape=True).from_string(Path(__file__).with_name("notebook.html").read_text())
    page = notebook.with_suffix(".html")
    with atomic(page) as draft:
        draft.write_text(
            template.render(
                title=_title(nb) or notebook.stem,
                body=body,
                light=HtmlFormatter(style="default").get_style_defs(".highlight"),
                dark=HtmlFormatter(style="github-dark").get_style_defs(".highlight"),
                back=Path(os.path.relpath(front_page, notebook.parent)).as_posix() if front_page else "",
            )
        )
    return page


CELLS = """
{%- extends 'basic/index.html.j2' -%}
{% block input_group -%}
<details class="code"><summary>show code</summary>{{ cell.source | highlight_code(metadata=cell.metadata) }}</details>
{%- endblock input_group %}
{% block output_area_prompt %}{% endblock output_area_prompt %}
{% block data_png scoped -%}
{%- set width = output | get_metadata('width', 'image/png') -%}
<div class="output_png output_subarea">
<img src="data:image/png;base64,{{ output.data['image/png'] | escape_html }}"
alt="{{ (output | get_metadata('alt', 'image/png') or 'figure of this cell') | escape_html }}"
{%- if width %} width="{{ width }}" style="min-width: {{ (width * 0.6) | int }}px"{% endif %}>
</div>
{%- endblock data_png %}
"""
"""How nbconvert writes the cells: without prompts, their code folded; figures with their alternative text. On a narrow
screen a figure is scrolled before its text becomes too small to read."""


def _title(nb: Any) -> str:
    heading = nb.cells[0].source.split("\n")[0] if nb.cells and nb.cells[0].cell_type == "markdown" else ""
    return heading.lstrip("# ") if heading.startswith("# ") else ""


def _summary(results: Mapping[str, Any]) -> str:
    items = ""
    for number in results.get("key_numbers", []):
        label, value, ends = map(escape, shown_number(number))
        items += f"<div><dt>{label}</dt><dd>{value}{f' <small>({ends})</small>' if ends else ''}</dd></div>"
    return f'<section class="result" aria-label="Result"><p>{escape(results["finding"])}</p><dl>{items}</dl></section>'


def _shown(outputs: list[Any]) -> list[Any]:
    """The outputs of a cell: pieces of one stream joined, of a progress bar only its last line."""
    shown: list[Any] = []
    for out in outputs:
        if out.output_type == "stream" and shown and shown[-1].get("name") == out.name:
            shown[-1].text += out.text
            continue
        kinds = [kind for kind in INTERACTIVE if kind in out.get("data", {})]
        for kind in kinds:
            del out.data[kind]
        if kinds and re.search(r"\d%\|", out.data.get("text/plain", "")):
            continue  # a progress bar, whose text stays at its start
        shown.append(out)
    for out in shown:
        if out.output_type == "stream":
            out.text = re.sub(r"[^\n]*\r(?!\n)", "", out.text)
    return [out for out in shown if out.output_type != "stream" or out.text.strip()]
