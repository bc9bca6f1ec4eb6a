import json

import pandas as pd
import pytest

from vaelab.probing import tables


def rows(classifier, **validation):
    """Accuracies of ``a`` and ``b`` for two factors: validation as given, test its opposite."""
    return pd.DataFrame([
        {"layer": f"{block}.t25", "factor": factor, "classifier": classifier, "accuracy": 1 - value, "low": 0.0,
         "high": 1.0, "chance": 0.25, "count": 8, "validation": value, "chosen": 1}
        for block in ("a", "b") for factor in ("x", "y") for value in (validation[f"{block}{factor}"],)
    ])  # fmt: skip


PROBES = rows("probe", ax=0.5, ay=0.9, bx=0.6, by=0.1)
DIFFCS = rows("diffc", ax=0.8, ay=0.7, bx=0.2, by=0.3)
BOTH = pd.concat([PROBES, DIFFCS], ignore_index=True)


def test_the_best_layer_is_that_of_the_validation_pictures():
    assert (tables.best_layer(PROBES, "x"), tables.best_layer(PROBES, "y")) == ("b.t25", "a.t25")


def test_layers_are_asked_by_name_by_glob_or_left_to_the_probe():
    assert tables.layers_by_factor(PROBES, []) == {"x": ["b.t25"], "y": ["a.t25"]}
    assert tables.layers_by_factor(PROBES, ["b.t25"]) == {"x": ["b.t25"], "y": ["b.t25"]}
    assert tables.layers_by_factor(PROBES, ["b.*", "*"]) == {factor: ["a.t25", "b.t25"] for factor in "xy"}
    with pytest.raises(ValueError, match=r"^diffc_layers: unknown name 'b.t26'.*b.t25"):
        tables.layers_by_factor(PROBES, ["*", "b.t26"])


def test_every_classifier_stands_where_any_is_best():
    found = tables.at_best_layers(BOTH)
    run = list(zip(found["factor"], found["layer"], found["classifier"], strict=True))
    assert run == [("x", "a.t25", "probe"), ("x", "a.t25", "diffc"), ("x", "b.t25", "probe"), ("x", "b.t25", "diffc"),
                    ("y", "a.t25", "probe"), ("y", "a.t25", "diffc")]  # fmt: skip


def test_the_map_has_a_measure_a_classifier_and_purity_where_it_is_given():
    made = tables.knowledge_tables(BOTH)
    assert list(made) == list(tables.CLASSIFIERS.values())
    first = made[tables.CLASSIFIERS["probe"]].iloc[3]
    assert (first["block"], first["timestep"], first["factor"], first["value"]) == ("b", 25, "y", 0.9)
    purity = pd.DataFrame([{"layer": "a.t300", "factor": "x", "majority": 0.6, "majority_chance": 0.3}])
    made = tables.knowledge_tables(PROBES, purity)
    assert list(made) == [tables.CLASSIFIERS["probe"], tables.PURITY]
    row = made[tables.PURITY].iloc[0]
    assert (row["block"], row["timestep"], row["value"], row["chance"]) == ("a", 300, 0.6, 0.3)


def finished(folder, model, table=BOTH, notebook="42_diffc"):
    folder.mkdir()
    saved = {"accuracy": table.to_dict("records")}
    results = {"notebook": notebook, "params": {"model": model}, "tables": saved}
    (folder / "results.json").write_text(json.dumps(results))
    return str(folder)


def test_models_stand_beside_each_other_factor_by_factor(tmp_path):
    alone = tables.compare_models(BOTH, "unet", [], "42_diffc")
    assert alone["model"].tolist() == ["unet"] * 6
    pd.testing.assert_frame_equal(alone.drop(columns="model"), tables.at_best_layers(BOTH).reset_index(drop=True))
    other = finished(tmp_path / "dit", "dit", PROBES)
    both = tables.compare_models(BOTH, "unet", [other], "42_diffc")
    assert both.groupby(["model", "factor"]).size().to_dict() == {
        ("dit", "x"): 1, ("dit", "y"): 1, ("unet", "x"): 4, ("unet", "y"): 2,
    }  # fmt: skip
    assert both["factor"].tolist() == ["x"] * 5 + ["y"] * 3


def test_runs_of_one_model_are_distinguished_by_their_names(tmp_path):
    run = finished(tmp_path / "run", "unet", PROBES)
    both = tables.compare_models(BOTH, "unet", [run], "42_diffc")
    assert set(both["model"]) == {"unet", "unet, run"} and (both["model"] == "unet, run").sum() == 2
    with pytest.raises(ValueError, match=r"^others: .*run' is named twice"):
        tables.compare_models(BOTH, "unet", [run, run], "42_diffc")


def test_what_is_no_finished_run_is_refused(tmp_path):
    same, foreign = (
        finished(tmp_path / "same", "unet"),
        finished(tmp_path / "foreign", "dit", notebook="41_label_purity"),
    )
    for folder in (foreign, str(tmp_path / "none")):
        with pytest.raises(ValueError, match=r"^others: .* holds no finished run of 42_diffc; run it first"):
            tables.compare_models(BOTH, "unet", [folder], "42_diffc")
    with pytest.raises(ValueError, match=r"^purity .*unknown name 'purity'.*accuracy"):
        tables.read_table(same, "42_diffc", "purity", "purity")


def test_the_runs_beside_it_are_looked_for_before_anything_is_learned(tmp_path):
    tables.require_finished([], "42_diffc")
    with pytest.raises(ValueError, match=r"^others: .* holds no finished run of 42_diffc"):
        tables.require_finished([str(tmp_path)], "42_diffc")


def test_metrics_have_the_names_that_were_promised():
    compared = pd.DataFrame({
        "classifier": ["diffusion_classifier", "diffc"], "accuracy": [0.6, 0.9], "accuracy_on_these": [0.6, 0.8],
        "seconds_per_image": [3.0, 0.1],
    })  # fmt: skip
    named = tables.accuracy_metrics(BOTH, compared)
    assert named["b.t25.diffc.x.accuracy"] == pytest.approx(0.8) and named["a.t25.probe.y.chance"] == 0.25
    assert named["diffusion_classifier.accuracy"] == 0.6 and named["diffc.accuracy_on_these"] == 0.8
    assert named["diffc.seconds_per_image"] == 0.1 and named["diffusion_classifier.times_diffc"] == pytest.approx(30)
    assert len(named) == 16 + 2 + 2 + 1 + 1
