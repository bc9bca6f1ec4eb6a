"""Every params file names a run its notebook can make."""

import re
from pathlib import Path

import pytest
import yaml

from vaelab.runner import execute

ROOT = Path(__file__).parent.parent
FILES = sorted((ROOT / "params").glob("*/*.yaml"))
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


@pytest.fixture(autouse=True)
def in_the_project(monkeypatch):
    monkeypatch.chdir(ROOT)


@pytest.mark.parametrize("path", FILES, ids=execute.label)
def test_every_key_is_known_to_the_notebook_and_of_its_type(path):
    assert execute.load_params(path)


@pytest.mark.parametrize("path", FILES, ids=execute.label)
def test_no_machine_path_and_a_first_line_that_says_what_it_is(path):
    text = path.read_text()
    assert text.startswith("# ")
    assert not re.search(r"(^|[\s\"'])(/|~/)\w", text)


def test_expected_seconds_are_of_runs_that_exist():
    seconds = yaml.safe_load((ROOT / "params" / "seconds.yaml").read_text())
    assert set(seconds) <= {execute.label(path) for path in FILES}
    assert all(value > 0 for value in seconds.values())


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
@pytest.mark.parametrize("run", ["demo", "smoke"])
def test_every_notebook_has_a_demo_and_a_smoke_run(notebook, run):
    assert (ROOT / "params" / notebook.stem / f"{run}.yaml").exists()


@pytest.mark.parametrize("path", [p for p in FILES if p.stem.startswith("paper")], ids=execute.label)
def test_paper_runs_name_real_checkpoints_and_the_offline_runs_none(path):
    assert any("/" in str(value) for key, value in yaml.safe_load(path.read_text()).items() if key != "output_dir")


@pytest.mark.parametrize("path", [p for p in FILES if p.stem.startswith(("demo", "smoke"))], ids=execute.label)
def test_demo_and_smoke_runs_need_no_hub(path):
    params = yaml.safe_load(path.read_text())
    assert params.get("device", "cpu") == "cpu" and ("device" in params or path.parent.name == "99_report")
    assert params.get("model", "embedded").startswith(("embedded", "outputs/"))
    assert "/" not in params.get("dataset", "")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"learning_rte": 1.0e-3}, "learning_rate"),
        ({"learning_rate": "5e-5"}, "5.0e-5"),
        ({"seeds": 3}, "seeds: expected a list"),
        ({"steps": 2.5}, "steps: expected int"),
        ({"steps": 0}, "steps: must be above 0, got 0"),
        ({"output_dir": "outputs/elsewhere"}, "output_dir must be"),
    ],
)
def test_a_wrong_params_file_is_refused_before_anything_runs(tmp_path, change, message):
    wrong = tmp_path / "10_finetune_vae" / "wrong.yaml"
    wrong.parent.mkdir()
    wrong.write_text(yaml.safe_dump({"output_dir": "outputs/10_finetune_vae/wrong", **change}))
    with pytest.raises(ValueError, match=re.escape(message)):
        execute.load_params(wrong)


def test_yaml_reads_an_exponent_without_a_point_as_text():
    assert yaml.safe_load("learning_rate: 5e-5") == {"learning_rate": "5e-5"}
    assert yaml.safe_load("learning_rate: 5.0e-5") == {"learning_rate": 5.0e-5}


def test_a_missing_params_file_lists_the_nearest():
    with pytest.raises(ValueError, match=re.escape("params/12_channel_census/demo.yaml")):
        execute.load_params(Path("params/12_channel_census/demoo.yaml"))
