import base64
import json
import math

import numpy as np
import pandas as pd
import PIL.Image
import pytest
from pydantic import NonNegativeInt, PositiveInt

from vaelab import runner

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


def test_results_have_the_key_numbers_the_finding_and_the_thumbnail_of_the_front_page(tmp_path):
    from matplotlib.figure import Figure
    from PIL import Image

    run = runner.start(NAME, namespace(tmp_path / "out"))
    run.key_number("change of the error", -0.4, unit="%", interval=(-1, 0.2))
    run.key_number("channels", 12, interval=(math.nan, math.nan))
    assert run.finding("Nothing changed.") == "Nothing changed."
    run.thumbnail(Figure(figsize=(20, 20)))
    run.save()
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert results["key_numbers"] == [
        {"label": "change of the error", "value": -0.4, "unit": "%", "interval": [-1.0, 0.2]},
        {"label": "channels", "value": 12.0, "unit": "", "interval": None},
    ]
    assert results["finding"] == "Nothing changed."
    assert results["files"] == ["thumbnail.png"]
    assert Image.open(tmp_path / "out" / "thumbnail.png").size == (480, 300)
    assert set(results["embedded_weights"]) == {"vae", "pipeline", "dit", "clip", "language_model"}


@pytest.mark.parametrize("interval", [None, (0.0, math.inf)])
def test_a_key_number_that_is_not_finite_is_refused(tmp_path, interval):
    run = runner.start(NAME, namespace(tmp_path / "out"))
    with pytest.raises(ValueError, match=r"'error' is (nan|inf)"):
        run.key_number("error", math.nan if interval is None else 1.0, interval=interval)


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
    ("name", "value", "kind", "message"),
    [
        ("batch_size", 0, PositiveInt, "must be above 0, got 0"),
        ("lesson_steps", [2, 0], list[PositiveInt], "must be above 0, got 0"),
        ("seed", -1, NonNegativeInt, "must be at least 0"),
        ("device", "gpu", str, "'gpu' is none"),
        ("device", "cuda:99", str, "'cuda:99' is not on this machine"),
        ("precision", "float8", str, "unknown name 'float8'.*float32"),
        ("stored_precision", "float8", str, "unknown name 'float8'.*float32"),
    ],
)
def test_impossible_value_is_refused_at_the_start(tmp_path, name, value, kind, message):
    given = namespace(tmp_path, **{name: value})
    given["__annotations__"] = {**given["__annotations__"], name: kind}
    with pytest.raises(ValueError, match=f"^{name}: {message}"):
        runner.start(NAME, given)
    assert not (tmp_path / "results.json").exists()


def test_known_injected_parameters_are_taken(tmp_path):
    run = runner.start(NAME, namespace(tmp_path, injected="steps = 7\nseeds = [4]", steps=7, seeds=[4]))
    assert run.params == {
        "steps": 7, "rate": 5e-5, "dataset": "glyphs", "seeds": [4], "fast": True, "output_dir": str(tmp_path)
    }  # fmt: skip


@pytest.mark.parametrize(("name", "value"), [("rate", "5e-5"), ("steps", 2.5), ("seeds", 3), ("fast", 1)])
def test_wrong_type_is_refused_by_name(tmp_path, name, value):
    with pytest.raises(ValueError, match=f"^{name}: expected "):
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


def content(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()
            and ".run" not in path.parts}  # fmt: skip


def test_finished_run_is_refused_without_overwrite_and_stays_whole(tmp_path):
    finish(tmp_path / "out")
    before = content(tmp_path / "out")
    with pytest.raises(ValueError, match=r"^output_dir: .* holds a finished run; give overwrite: true"):
        runner.start(NAME, namespace(tmp_path / "out"))
    with pytest.raises(ValueError, match="holds a finished run, made with another steps"):
        runner.start(NAME, namespace(tmp_path / "out", steps=6))
    assert content(tmp_path / "out") == before


def content_names(folder):
    return {path.name for path in folder.iterdir() if path.name != ".run"}


def overwriting(folder, **changes):
    given = namespace(folder, overwrite=True, **changes)
    given["__annotations__"] = {**given["__annotations__"], "overwrite": bool}
    return given


def test_overwrite_replaces_a_finished_run_when_the_new_one_is_whole(tmp_path):
    import matplotlib.pyplot as plt

    run = runner.start(NAME, namespace(tmp_path / "out"))
    run.figure("old", plt.figure())
    (run.workspace("runs") / "weights").write_text("old")
    run.save()
    (tmp_path / "out" / "mine.txt").write_text("not made by the run")
    run = runner.start(NAME, overwriting(tmp_path / "out", steps=6))
    assert list(run.workspace("runs").iterdir()) == []
    (run.workspace("runs") / "weights").write_text("new")
    run.figure("new", plt.figure())
    assert content(tmp_path / "out").keys() == {"old.png", "runs/weights", "results.json", "mine.txt"}
    assert (tmp_path / "out" / "runs" / "weights").read_text() == "old"
    run.save()
    assert content(tmp_path / "out").keys() == {"new.png", "runs/weights", "results.json", "mine.txt"}
    assert (tmp_path / "out" / "runs" / "weights").read_text() == "new"
    assert json.loads((tmp_path / "out" / "results.json").read_text())["params"]["steps"] == 6


def test_wrong_value_leaves_a_finished_run_as_it_was(tmp_path):
    finish(tmp_path / "out")
    before = content(tmp_path / "out")
    with pytest.raises(ValueError, match="rate"):
        runner.start(NAME, overwriting(tmp_path / "out", rate="5e-5"))
    assert content(tmp_path / "out") == before


def test_killed_overwrite_leaves_the_finished_run_and_is_resumed(tmp_path):
    finish(tmp_path / "out")
    before = content(tmp_path / "out")
    run = runner.start(NAME, overwriting(tmp_path / "out"))
    (run.workspace("runs") / "checkpoint").write_text("half way")
    assert content(tmp_path / "out") == before
    again = runner.start(NAME, overwriting(tmp_path / "out"))
    assert (again.workspace("runs") / "checkpoint").read_text() == "half way"


def test_interactive_run_rewrites_its_results_and_uses_its_workspace_again(tmp_path):
    import matplotlib.pyplot as plt

    folder = tmp_path / "interactive"
    for steps in (5, 6):
        run = runner.start(NAME, namespace(folder, steps=steps))
        (run.workspace("runs") / str(steps)).write_text("w")
        run.figure("curve", plt.figure())
        run.save()
    assert content_names(folder) == {"curve.png", "results.json", "runs"}
    assert {path.name for path in (folder / "runs").iterdir()} == {"5", "6"}
    assert json.loads((folder / "results.json").read_text())["params"]["steps"] == 6


@pytest.mark.parametrize("name", ["curve.png", "runs", "results.json"])
def test_what_the_user_put_into_the_output_folder_is_not_replaced(tmp_path, name):
    import matplotlib.pyplot as plt

    folder = tmp_path / "interactive"
    folder.mkdir()
    (folder / name).write_text("the user's")
    run = runner.start(NAME, namespace(folder))
    with pytest.raises(ValueError, match="was not made by a run of this notebook"):
        run.figure("curve", plt.figure())
        run.workspace("runs")
        run.save()
    assert (folder / name).read_text() == "the user's"


def test_dry_run_leaves_everything_as_it_was(tmp_path):
    finish(tmp_path / "out")
    before = content(tmp_path / "out")
    given = namespace(tmp_path / "out", dry_run=True)
    given["__annotations__"] = {**given["__annotations__"], "dry_run": bool}
    run = runner.start(NAME, given)
    run.metric("bytes", 5)
    with pytest.raises(ValueError, match=r"^dry_run: "):
        run.workspace("runs")
    assert run.save().endswith("dry_run.json")
    assert content(tmp_path / "out") == before


def test_numbers_recorded_before_a_failing_figure_are_not_lost(tmp_path):
    import matplotlib.pyplot as plt

    run = runner.start(NAME, namespace(tmp_path))
    run.record({"mse": 0.25})
    run.table("rows", pd.DataFrame({"value": [1.5]}))
    figure = plt.figure()
    figure.suptitle("$x^{$")  # cannot be drawn
    with pytest.raises(ValueError):
        run.figure("curve", figure)
    recorded = json.loads((tmp_path / ".run" / "recorded.json").read_text())
    assert recorded["metrics"] == {"mse": 0.25} and recorded["tables"] == {"rows": [{"value": 1.5}]}
    assert not (tmp_path / "results.json").exists()
    run.save()
    assert not (tmp_path / ".run" / "recorded.json").exists()


@pytest.mark.parametrize("text", ["{", "[]", "", "null", '{"metrics": 3}'])
def test_damaged_results_are_named(tmp_path, text):
    (tmp_path / "results.json").write_text(text)
    with pytest.raises(ValueError, match=r"results\.json. is damaged"):
        runner.read_results(tmp_path)
    with pytest.raises(ValueError, match="holds no finished run"):
        runner.read_results(tmp_path / "nowhere")


def test_results_of_another_notebook_are_refused_with_the_command_to_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    finish("outputs/10_finetune_vae/demo")
    assert runner.read_results("outputs/10_finetune_vae/demo", NAME, "runs")["params"]["steps"] == 5
    message = (
        "^runs: 'outputs/10_finetune_vae/demo' holds no finished run of 31_train_sae; run it first .vaelab run params/"
    )
    with pytest.raises(ValueError, match=message):
        runner.read_results("outputs/10_finetune_vae/demo", "31_train_sae", "runs")


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


def test_figure_is_saved_and_given_back_with_its_description(tmp_path):
    import matplotlib.pyplot as plt

    run = runner.start(NAME, namespace(tmp_path))
    figure, (left, right) = plt.subplots(1, 2)
    figure.suptitle("loss in \\$\nand pounds")
    for axis, name in ((left, "training"), (right, "held out")):
        axis.plot([1, 2], label="baseline")
        axis.set(xlabel="step", ylabel="loss", title=name)
        axis.legend()
    shown = run.figure("curve", figure)
    saved = (tmp_path / "curve.png").read_bytes()
    data, metadata = shown._repr_png_()
    assert saved.startswith(b"\x89PNG") and base64.b64decode(data) == saved
    assert metadata["alt"] == "loss in $ and pounds; training; loss against step; baseline; held out"
    assert metadata["width"] == pytest.approx(PIL.Image.open(tmp_path / "curve.png").width / 1.1, abs=1)
    assert not plt.fignum_exists(figure.number)
    assert run.figure("bare", plt.figure())._repr_png_()[1]["alt"] == "bare"


def test_a_grid_of_pictures_is_described_by_its_rows():
    import torch

    from vaelab import viz
    from vaelab.runner.run import LONGEST_ALT, describe_figure

    rows = {"picture": torch.zeros(2, 3, 4, 4), "no up.1.2": torch.zeros(2, 3, 4, 4)}
    assert describe_figure(viz.picture_grid(rows, "one prompt")) == "one prompt; picture; no up.1.2"
    assert len(describe_figure(viz.picture_grid(rows, "long " * 200))) == LONGEST_ALT + 3
