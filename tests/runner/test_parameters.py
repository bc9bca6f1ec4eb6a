import json
import math

import nbformat
import pytest
from pydantic import NonNegativeInt, PositiveFloat, PositiveInt

from vaelab.runner import parameters


def notebook(folder, *sources):
    nb = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source) for source in sources])
    for cell in nb.cells:
        cell.metadata["tags"] = ["parameters"]
    nbformat.write(nb, folder / "10_one.ipynb")
    return folder / "10_one.ipynb"


def test_declared_types_are_those_of_the_parameters_cell(tmp_path):
    source = (
        "from pydantic import PositiveInt\n\nsteps: PositiveInt = 3  # of training\nseeds: list[int] = [0]\nx: str = ''"
    )
    assert parameters.declared(notebook(tmp_path, source)) == {"steps": PositiveInt, "seeds": list[int], "x": str}


@pytest.mark.parametrize("annotation", ["complex", "__import__('os')", "list[Positive]"])
def test_unknown_annotation_is_refused_by_the_parameters_name(tmp_path, annotation):
    with pytest.raises(ValueError, match=r"10_one\.ipynb: steps: the annotation .* is not understood"):
        parameters.declared(notebook(tmp_path, f"steps: {annotation} = 3"))


@pytest.mark.parametrize("cells", [[], ["a: int = 1", "b: int = 2"]])
def test_exactly_one_cell_is_tagged(tmp_path, cells):
    with pytest.raises(ValueError, match=f"expected one cell tagged 'parameters', found {len(cells)}"):
        parameters.declared(notebook(tmp_path, *cells))


@pytest.mark.parametrize(
    ("value", "kind", "message"),
    [
        ("5e-5", float, r"expected float, got str '5e-5' .*write 5\.0e-5"),
        ("fast", float, r"expected float, got str 'fast'$"),
        (True, float, "expected float, got bool"),
        (2.5, int, "expected int, got float"),
        (True, int, "expected int, got bool"),
        (None, int, "expected int, got NoneType"),
        (1, bool, "expected bool, got int"),
        (3, str, "expected str, got int"),
        (3, list[int], "expected a list, got int 3"),
        ([0, "1"], list[int], "expected int, got str '1'"),
        (0, PositiveInt, "must be above 0, got 0"),
        ([2, 0], list[PositiveInt], "must be above 0, got 0"),
        (-1, NonNegativeInt, "must be at least 0, got -1"),
        (-0.5, PositiveFloat, "must be above 0, got -0.5"),
        (math.nan, float, "expected a finite number, got nan"),
        (math.inf, PositiveFloat, "expected a finite number, got inf"),
    ],
)
def test_wrong_value_is_one_sentence_that_names_the_parameter(value, kind, message):
    with pytest.raises(ValueError, match=f"^rate: {message}"):
        parameters.validate("rate", value, kind)


@pytest.mark.parametrize(("value", "kind"), [(1, float), (3, PositiveInt), (0, NonNegativeInt), ([], list[int])])
def test_right_value_passes(value, kind):
    parameters.validate("rate", value, kind)


def test_fingerprint_is_of_what_a_path_points_to(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pictures").mkdir()
    (tmp_path / "linked").symlink_to("pictures")
    same = ["pictures", "./pictures", str(tmp_path / "pictures"), "linked", "outputs/../pictures"]
    (tmp_path / "outputs").mkdir()
    assert len({parameters.fingerprints({"dataset": name})["dataset"] for name in same}) == 1
    assert parameters.fingerprints({"dataset": "pictures"}) != parameters.fingerprints({"dataset": "outputs"})
    assert str(tmp_path) not in json.dumps(parameters.fingerprints({"dataset": str(tmp_path / "pictures")}))


def test_only_parameters_that_decide_the_results_are_compared():
    made = {"steps": 3, "rate": 1.0, "batch_size": 8, "device": "cpu", "output_dir": "a", "verify": True}
    results = {"fingerprints": parameters.fingerprints(made, ["batch_size"]), "execution_only": ["batch_size"]}
    now = {**made, "batch_size": 4, "device": "cuda", "verify": False, "output_dir": "b", "rate": 1}
    assert parameters.changed(results, now) == []
    assert parameters.changed(results, {"steps": 4, "rate": 1.0}) == ["steps"]
    assert parameters.changed(results, {"momentum": 0.9}) == ["momentum"]


def test_results_without_fingerprints_are_compared_by_their_params():
    results = {"params": {"steps": 3, "device": "cpu"}}
    assert parameters.changed(results, {"steps": 3, "device": "cuda"}) == []
    assert parameters.changed(results, {"steps": 4}) == ["steps"]
