import numpy as np
import pandas as pd
import pytest
from scipy import stats

from vaelab.core.io import write_json
from vaelab.training.checkpoint import LOG, TrainingLog
from vaelab.vae import compare
from vaelab.vae.finetune import LOGS, VAERun


def a_run(condition, seed, mse, suppressed=(5, 7)):
    ends = {"kl": 100 + seed, "psnr": 20.0, "ssim": 0.5, "kl_per_entry": 1.0}
    validation = [{"step": 0, "mse": 1.0, **ends, "suppressed": suppressed[0]}]
    validation.append({"step": 9, "mse": mse, **ends, "suppressed": suppressed[1]})
    tracked = [{"step": 3, "suppressed": 6, "nudged": 0, "near_zero": {"conv": 0.25}}]
    return VAERun(condition, seed, [{"step": 9, "loss": mse}], tracked, touched(seed), validation)


def touched(count):
    """One intervention in ``count`` channels of a layer."""
    return [{"step": 3, "layer": "norm", "channels": [*range(count)], "before": [0.1] * count, "after": [0.2] * count}]


BASE, NUDGED = [0.10, 0.20, 0.30], [0.11, 0.19, 0.33]
RUNS = [a_run("baseline", i, m) for i, m in enumerate(BASE)] + [a_run("nudge", i, m) for i, m in enumerate(NUDGED)]


def test_differences_are_paired_by_seed_whatever_the_order_of_the_runs():
    rows = compare.paired_differences(RUNS[::-1], "glyphs").set_index(["condition", "measure"])
    row = rows.loc["nudge", "mse"]
    expected = stats.ttest_rel(NUDGED, BASE).confidence_interval(0.95)
    assert row["difference"] == pytest.approx(np.mean(np.subtract(NUDGED, BASE)))
    assert (row["low"], row["high"]) == pytest.approx(tuple(expected))
    assert row["percent"] == pytest.approx(100 * row["difference"] / 0.2)
    assert set(rows.index.get_level_values("measure")) == {"mse", "kl", "psnr", "ssim", "kl_per_entry"}


def test_one_seed_has_a_difference_and_no_interval():
    row = compare.paired_differences([RUNS[0], RUNS[3]], "d").iloc[0]
    assert row["difference"] == pytest.approx(0.01)
    assert np.isnan(row["low"]) and np.isnan(row["high"])


def test_frames_have_condition_and_seed():
    table = compare.run_log_table(RUNS, "validation")
    assert len(table) == 12
    assert (
        table.loc[(table["condition"] == "nudge") & (table["seed"] == 2) & (table["step"] == 9), "mse"].item() == 0.33
    )
    near_zero = compare.near_zero_table(RUNS)
    assert set(near_zero["layer"]) == {"conv"} and len(near_zero) == 6


def test_summary_is_the_means_over_seeds():
    values = compare.condition_means(RUNS)
    assert values["suppressed.start"] == 5
    assert values["baseline.mse"] == pytest.approx(0.2)
    assert values["nudge.suppressed"] == 7
    assert values["nudge.touched"] == 1


@pytest.fixture
def stored(tmp_path):
    for run in RUNS:
        folder = tmp_path / "runs" / f"{run.condition}-seed{run.seed}"
        log = TrainingLog(folder / LOG, dict(zip(LOGS, run[2:], strict=True))).append()
        write_json(folder / "run.json", {"settings": {}, "condition": run.condition, "seed": run.seed, "log": log})
    params = {"seeds": [0, 1, 2], "conditions": ["baseline", "nudge"], "dataset": "frgfm/imagenette:320px"}
    write_json(tmp_path / "results.json", {"notebook": "10_finetune_vae", "params": params})
    return tmp_path


def test_a_stored_study_is_read_back(stored):
    study = compare.read_comparison(str(stored))
    assert study.dataset == "imagenette"
    assert sorted(study.runs) == sorted(RUNS)
    assert study.weights("nudge") == stored / "runs" / "nudge-seed0" / "vae"
    assert compare.suppressed_means([study]) == {"imagenette.suppressed.start": 5, "imagenette.suppressed.end": 7}


def test_two_studies_of_one_data_set_are_refused(stored):
    with pytest.raises(ValueError, match="one run of each data set"):
        compare.read_comparisons([str(stored), str(stored)])


def test_an_unfinished_study_is_refused(stored):
    (stored / "results.json").unlink()
    with pytest.raises(ValueError, match="run it first"):
        compare.read_comparison(str(stored))


def test_damaged_results_are_refused_by_name(stored):
    (stored / "results.json").write_text("{")
    with pytest.raises(ValueError, match=r"runs: .*results\.json' is damaged"):
        compare.read_comparison(str(stored))


def test_a_study_of_one_seed_is_refused(stored):
    params = {"seeds": [0], "conditions": ["baseline"], "dataset": "d"}
    write_json(stored / "results.json", {"notebook": "10_finetune_vae", "params": params})
    with pytest.raises(ValueError, match="one seed"):
        compare.read_comparison(str(stored))


def test_beside_the_paper_its_own_data_or_what_stands_for_it():
    table = compare.beside_paper(compare.paired_differences(RUNS, "glyphs")).set_index("measure")
    assert table.loc["mse", "paper's data"] == "Google Fonts"
    assert table.loc["mse", "paper %"] == pytest.approx(100 * (2.470 - 2.451) / 2.451)
    assert compare.beside_paper(compare.paired_differences(RUNS, "mine"))["paper %"].isna().all()


def test_a_study_is_described_by_its_channels_and_its_errors():
    runs = [*RUNS, *(a_run("control", seed, 2 * base) for seed, base in enumerate(BASE))]
    table, means = compare.paired_differences(runs, "glyphs"), compare.condition_means(runs)
    mse = table[table["measure"] == "mse"].set_index("condition")
    text = compare.describe_study(table, {**means, "nudge.suppressed": 3})
    assert "from 5 to 7; with the nudge it is 3, and" in text
    assert f"differs by +5 % ({mse.loc['nudge', 'percent_low']:+.2g} to" in text
    assert "active channels, the error differs by +100 % (" in text and "over 3 seeds" in text
    one_seed = [runs[0], runs[3]]
    text = compare.describe_study(compare.paired_differences(one_seed, "d"), compare.condition_means(one_seed))
    assert text.endswith("the held-out error differs by +10 %.")
    assert compare.describe_study(compare.paired_differences(RUNS[:3], "d"), means).endswith("from 5 to 7.")


def test_several_studies_are_described_by_the_intervals_that_exclude_zero():
    tables = [compare.paired_differences(RUNS, name) for name in ("photos", "glyphs")]
    shifted = tables[1].assign(low=0.01)
    text = compare.describe_comparisons(pd.concat([tables[0], shifted]))
    assert text.startswith(
        "With the nudge the held-out error differs from the baseline's by +5 % (photos), +5 % (glyphs)"
    )
    assert "excludes zero on 1 of 2 data sets" in text and "control" not in text


def test_the_verdict_names_what_differs_and_says_where_nothing_does():
    clear = [a_run("baseline", i, 1.0 + i / 1e3) for i in range(3)] + [
        a_run("nudge", i, 2.0 + i / 1e3 + i**2 / 1e4) for i in range(3)
    ]
    assert "mse +100 %" in compare.describe_differences(compare.paired_differences(clear, "d")).data
    assert "Of 4 intervals" in compare.describe_differences(compare.paired_differences(RUNS, "d")).data
    assert "no measure differs" in compare.describe_differences(compare.paired_differences(RUNS, "d")).data
