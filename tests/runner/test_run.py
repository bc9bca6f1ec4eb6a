import json
import math

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from vaelab import runner
from vaelab.core import stats as core_stats

NAME = "10_finetune_vae"


def namespace(folder, injected="", **changes):
    """What a notebook's ``globals()`` hold, with papermill's cell if something was injected."""
    kinds = {"steps": int, "rate": float, "dataset": str, "seeds": list[int], "fast": bool, "output_dir": str}
    values = {"steps": 5, "rate": 5e-5, "dataset": "glyphs", "seeds": [0, 1], "fast": True, "output_dir": str(folder)}
    cells = ["", "steps: int = 3", *([f"# Parameters\n{injected}"] if injected else [])]
    return {"__annotations__": kinds, "In": cells, **values, **changes}


def finish(folder, **changes):
    run = runner.start(NAME, namespace(folder, **changes))
    (run.workspace("runs") / "weights").write_text("w")
    return run.save()


def test_results_have_what_the_front_page_reads(tmp_path):
    run = runner.start(NAME, namespace(tmp_path / "out"))
    run.metric("mse", np.float32(0.25))
    run.record({"suppressed": 3})
    run.table("rows", pd.DataFrame({"layer": ["a", "b"], "value": [1.5, math.nan], "count": [1, 2]}))
    assert run.save() == "results.json"
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert {"notebook", "params", "metrics", "tables", "seconds", "environment"} <= results.keys()
    assert results["notebook"] == NAME
    assert results["metrics"] == {"mse": 0.25, "suppressed": 3}
    assert isinstance(results["metrics"]["suppressed"], int)
    assert results["tables"] == {
        "rows": [{"layer": "a", "value": 1.5, "count": 1}, {"layer": "b", "value": None, "count": 2}]
    }
    assert results["params"]["rate"] == 5e-5
    assert results["environment"]["device"] in ("cpu", "cuda", "mps")
    assert results["environment"]["torch"].startswith("2.")
    assert results["seconds"] >= 0


def test_results_name_no_folder_of_this_machine(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    places = {"dataset": f"photos+{tmp_path.parent}/pictures", "output_dir": str(tmp_path / "outputs" / "a")}
    assert runner.start(NAME, namespace("", **places)).save() == "outputs/a/results.json"
    results = (tmp_path / "outputs" / "a" / "results.json").read_text()
    assert str(tmp_path.parent) not in results
    assert json.loads(results)["params"]["dataset"] == "photos+pictures"
    assert json.loads(results)["params"]["output_dir"] == "outputs/a"


def test_unknown_injected_parameter_is_refused_with_the_nearest(tmp_path):
    with pytest.raises(ValueError, match=r"unknown name 'stepz'.*steps"):
        runner.start(NAME, namespace(tmp_path, injected="stepz = 3\nrate = 0.1", stepz=3))


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("batch_size", 0, "must be at least 1, got 0"),
        ("shown_images", -1, "must be at least 1"),
        ("lesson_steps", [2, 0], "must be at least 1, got 0"),
        ("seed", -1, "must be at least 0"),
        ("resolution", -64, "must be at least 0"),
        ("device", "gpu", "'gpu' is none"),
        ("device", "cuda:99", "'cuda:99' is not on this machine"),
        ("precision", "float8", "unknown name 'float8'.*float32"),
    ],
)
def test_what_no_notebook_takes_is_refused_at_the_start(tmp_path, name, value, message):
    given = namespace(tmp_path, **{name: value})
    kind = list[int] if isinstance(value, list) else type(value)
    given["__annotations__"] = {**given["__annotations__"], name: kind}
    with pytest.raises(ValueError, match=f"^{name}: {message}"):
        runner.start(NAME, given)
    assert not (tmp_path / "results.json").exists()


def test_known_injected_parameters_are_taken(tmp_path):
    run = runner.start(NAME, namespace(tmp_path, injected="steps = 7\nseeds = [4]", steps=7, seeds=[4]))
    assert run.params == {
        "steps": 7, "rate": 5e-5, "dataset": "glyphs", "seeds": [4], "fast": True, "output_dir": str(tmp_path)
    }  # fmt: skip


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("rate", "5e-5", r"rate: expected float, got str '5e-5' .*write 5\.0e-5"),
        ("rate", "fast", r"rate: expected float, got str 'fast'$"),
        ("rate", True, "rate: expected float, got bool"),
        ("steps", 2.5, "steps: expected int, got float"),
        ("steps", True, "steps: expected int, got bool"),
        ("steps", None, "steps: expected int, got NoneType"),
        ("fast", 1, "fast: expected bool, got int"),
        ("dataset", 3, "dataset: expected str, got int"),
        ("seeds", 3, r"seeds: expected a list \(list\[int\]\)"),
        ("seeds", [0, "1"], "seeds: expected int, got str '1'"),
    ],
)
def test_wrong_type_is_refused_by_name(tmp_path, name, value, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        runner.start(NAME, namespace(tmp_path, **{name: value}))
    assert not (tmp_path / "results.json").exists()


def test_whole_number_will_do_for_a_float(tmp_path):
    assert runner.start(NAME, namespace(tmp_path, rate=1)).params["rate"] == 1


def test_unwritable_output_folder_is_refused_by_name(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(OSError, match=r"^output_dir: cannot write to .*file"):
        runner.start(NAME, namespace(tmp_path / "file" / "out"))
    with pytest.raises(ValueError, match=r"^output_dir: expected str"):
        runner.start(NAME, namespace(tmp_path, output_dir=3))


def test_stale_results_are_gone_as_soon_as_a_run_starts(tmp_path):
    finish(tmp_path)
    runner.start(NAME, namespace(tmp_path))
    assert not (tmp_path / "results.json").exists()


def test_what_a_finished_run_made_is_gone_when_it_is_run_again(tmp_path):
    import matplotlib.pyplot as plt

    run = runner.start(NAME, namespace(tmp_path))
    run.figure("curve", plt.figure())
    (run.workspace("runs") / "weights").write_text("w")
    (tmp_path / "mine.txt").write_text("not made by the run")
    run.save()
    runner.start(NAME, namespace(tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_refused_run_takes_the_earlier_one_for_finished_no_longer_nor_lets_it_leak(tmp_path):
    finish(tmp_path)
    with pytest.raises(ValueError, match="rate"):
        runner.start(NAME, namespace(tmp_path, rate="5e-5"))
    assert not (tmp_path / "results.json").exists()
    run = runner.start(NAME, namespace(tmp_path, rate=0.1))
    assert list(run.workspace("runs").iterdir()) == []
    run.save()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["results.json", "runs"]


def test_workspace_of_an_unfinished_run_is_kept(tmp_path):
    run = runner.start(NAME, namespace(tmp_path))
    (run.workspace("runs") / "checkpoint").write_text("half way")
    again = runner.start(NAME, namespace(tmp_path))
    assert (again.workspace("runs") / "checkpoint").read_text() == "half way"


@pytest.mark.parametrize("value", [math.nan, math.inf, np.float32("nan")])
def test_metric_that_is_no_number_is_refused(tmp_path, value):
    run = runner.start(NAME, namespace(tmp_path))
    with pytest.raises(ValueError, match="metric 'mse'"):
        run.metric("mse", value)
    with pytest.raises(ValueError, match="metric 'kl'"):
        run.record({"kl": value})
    assert run.metrics == {}


def test_figure_is_saved_and_given_back(tmp_path):
    import matplotlib.pyplot as plt

    run = runner.start(NAME, namespace(tmp_path))
    figure, axes = plt.subplots()
    axes.plot([1, 2])
    assert run.figure("curve", figure) is figure
    assert (tmp_path / "curve.png").read_bytes().startswith(b"\x89PNG")
    assert not plt.fignum_exists(figure.number)


@pytest.mark.parametrize("level", [0.95, 0.8])
def test_paired_interval_is_that_of_the_paired_t_test(level):
    rng = np.random.default_rng(0)
    first = rng.normal(size=5)
    second = first + rng.normal(0.3, 0.1, size=5)
    expected = stats.ttest_rel(second, first).confidence_interval(level)
    got = core_stats.paired_interval(first, second, level)
    assert (got.low, got.high) == pytest.approx((expected.low, expected.high), rel=1e-12)
    assert got.mean == pytest.approx(np.mean(second - first))


@pytest.mark.parametrize("values", [[1.0], [[1.0, 2.0]]])
def test_interval_of_one_pair_is_refused(values):
    with pytest.raises(ValueError, match="at least two pairs"):
        core_stats.paired_interval(values, values)
