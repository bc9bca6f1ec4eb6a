"""An executed notebook as one HTML file, which needs no network."""

import re
from pathlib import Path


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
