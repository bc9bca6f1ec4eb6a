import nbformat

from vaelab.runner.page import to_html


def test_the_finding_and_key_numbers_stand_below_the_question(tmp_path):
    cells = [nbformat.v4.new_markdown_cell("# 42 · A question"), nbformat.v4.new_code_cell("x = 1")]
    nbformat.write(nbformat.v4.new_notebook(cells=cells), tmp_path / "run.ipynb")
    numbers = [
        {"label": "accuracy of <cats>", "value": 12.345, "unit": "%", "interval": [10.0, 15.0]},
        {"label": "chance", "value": 10.0, "unit": "%", "interval": None},
    ]
    results = {"finding": "cats & dogs differ in up_ft0 and up_ft1.", "key_numbers": numbers}
    page = to_html(tmp_path / "run.ipynb", results=results).read_text()
    summary = page[page.index("<section") : page.index("</section>")]
    assert "<p>cats &amp; dogs differ in up_ft0 and up_ft1.</p>" in summary
    assert "<dt>accuracy of &lt;cats&gt;</dt><dd>12.3 % <small>(10 to 15)</small></dd>" in summary
    assert "<dt>chance</dt><dd>10 %</dd>" in summary
    assert page.index("A question") < page.index("<section") < page.index("show code")
    assert "<section" not in to_html(tmp_path / "run.ipynb").read_text()
