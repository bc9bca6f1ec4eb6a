"""The order of the runs, and the time left."""

import nbformat
import pytest
import yaml

from vaelab.runner.schedule import Schedule

SECONDS = {"10_long/demo": 100, "20_reads/demo": 200, "30_middle/demo": 150}


@pytest.fixture
def schedule(tmp_path, monkeypatch):
    """Two jobs for four runs, one of them never run anywhere; 20_reads reads what 10_long makes."""
    monkeypatch.chdir(tmp_path)
    parameters = nbformat.v4.new_code_cell('output_dir: str = ""\nruns: list[str] = []')
    parameters.metadata["tags"] = ["parameters"]
    (tmp_path / "notebooks").mkdir()
    for name in ("10_long", "20_reads", "30_middle", "40_new"):
        nbformat.write(nbformat.v4.new_notebook(cells=[parameters]), tmp_path / "notebooks" / f"{name}.ipynb")
        (tmp_path / "params" / name).mkdir(parents=True)
        runs = ["outputs/10_long/demo"] if name == "20_reads" else []
        text = yaml.safe_dump({"output_dir": f"outputs/{name}/demo", "runs": runs})
        (tmp_path / "params" / name / "demo.yaml").write_text(text)
    (tmp_path / "params" / "seconds.yaml").write_text(yaml.safe_dump(SECONDS))
    return Schedule("demo", 2)


def test_the_longest_chains_begin_first(schedule):
    order = sorted(schedule.todo, key=schedule._chain_seconds, reverse=True)
    assert [path.parent.name for path in order] == ["10_long", "20_reads", "30_middle", "40_new"]


def test_the_time_left_follows_the_pace_of_this_machine(schedule):
    assert schedule._time_left() == "; about 5 minutes left"  # (100 + 200 + 150 + 150) / 2 seconds
    (long,) = (path for path in schedule.todo if path.parent.name == "10_long")
    schedule.ended, schedule._took = [long], {long: 300.0}
    assert schedule._time_left() == "; about 12 minutes left"  # three times (200 + 150 + 150) / 2 seconds
