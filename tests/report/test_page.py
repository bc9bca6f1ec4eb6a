"""The committed page is what the committed results give, and each of its findings follows its numbers."""

import copy
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vaelab.report import SECTIONS, page, pelap, revelio, runs, suppression, turbo
from vaelab.report.markdown import Chart, Picture, number, percent, signed
from vaelab.runner.provenance import changed_weights, embedded_weights

DOCS = Path(__file__).parent.parent.parent / "docs"
TODAY = embedded_weights()


@pytest.fixture(scope="module")
def finished():
    return runs.read_runs(DOCS / "results")


@pytest.fixture(scope="module")
def built(finished):
    return page.build_page(SECTIONS, finished)


def planted(label, metrics=(), tables=(), params=(), *, weights=TODAY):
    """A finished run with these results."""
    results = {
        "notebook": label.split("/")[0], "params": {"model": "embedded", **dict(params)}, "metrics": dict(metrics),
        "tables": dict(tables), "key_numbers": [], "finding": "", "seconds": 1.0, "embedded_weights": weights,
        "environment": {"device": "cpu", "device_name": "cpu", "processor": "a processor", "threads": 1},
    }  # fmt: skip
    return runs.FinishedRun(label, Path("results", label), results, changed_weights(results, TODAY))


def save(run, folder):
    path = folder / run.label / "results.json"
    path.parent.mkdir(parents=True)
    path.write_text(runs.as_text(run.results))
    return path


def differences(low, high):
    rows = []
    for condition, ends in (("nudge", (low, high)), ("control", (10.0, 14.0))):
        for measure in ("mse", "kl", "psnr", "ssim"):
            row = {"dataset": "photos", "condition": condition, "measure": measure, "seeds": 5}
            rows.append({**row, "percent": sum(ends) / 2, "percent_low": ends[0], "percent_high": ends[1]})
    return planted("11_compare_interventions/study", tables={"differences": rows})


def test_the_committed_page_is_what_the_committed_results_give(built):
    assert (DOCS / "results.md").read_text() == built.text, "make report writes docs/results.md anew"


def test_an_edited_number_is_noticed(finished, built):
    edited = {label: copy.deepcopy(run.results) for label, run in finished.items()}
    edited["33_block_ablation/full"]["tables"]["blocks"][-1]["shape"] -= 0.1
    again = {
        label: runs.FinishedRun(label, run.folder, edited[label], run.changed_weights)
        for label, run in finished.items()
    }
    assert page.build_page(SECTIONS, again).text != built.text


def test_every_picture_and_link_of_the_page_exists(built):
    anchors = {page.anchor(title) for title in re.findall(r"^#+ (.*)$", built.text, re.MULTILINE)}
    for link in re.findall(r"\]\(([^)]+)\)", built.text):
        assert link[1:] in anchors if link.startswith("#") else (DOCS / link).is_file(), link
    for run in re.findall(r"P=params/(\S+)\.yaml`", built.text):
        assert (DOCS.parent / "params" / f"{run}.yaml").is_file() or run.split("/")[0] not in {
            path.stem for path in (DOCS.parent / "notebooks").glob("*.ipynb")
        }, run


def test_no_heading_stands_twice(built):
    headings = re.findall(r"^##+ (.*)$", built.text, re.MULTILINE)
    linked = [heading for heading in headings if heading != "The paper's other tables and figures"]
    assert len(set(linked)) == len(linked)


def test_charts_are_the_same_bytes_when_drawn_again(built, tmp_path):
    chart = next(chart for chart in built.charts if chart.name == "differences")
    for name in ("a.png", "b.png"):
        page.save_chart(chart, tmp_path / name)
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


def test_a_page_without_runs_names_the_commands():
    text = page.build_page(SECTIONS, {}).text
    assert "*Not run:* `make run P=params/11_compare_interventions/study.yaml`" in text
    assert "No run has been made yet" in text


def test_changed_weights_make_a_run_stale():
    run = differences(-1.0, 1.0)
    small = (page.Section("Small", "", suppression.SECTION.entries[:1]),)
    current = page.build_page(small, {run.label: run}).text
    old = planted(run.label, tables=run.results["tables"], weights={**TODAY, "vae": "another"})
    stale = page.build_page(small, {run.label: old}).text
    assert "stale" not in current.split("## Contents")[1]
    assert "(**stale**: vae changed since)" in stale and "**stale** (vae)" in stale
    assert "*Stale*: 11_compare_interventions/study" in stale


@pytest.mark.parametrize(
    ("low", "high", "sentence"),
    [
        (-1.0, 1.0, "all 4 intervals of its effect contain zero"),
        (1.0, 3.0, "4 of the 4 intervals of its effect exclude zero"),
    ],
)
def test_the_finding_on_the_nudge_follows_its_intervals(low, high, sentence):
    assert sentence in suppression.table_1(differences(low, high)).finding


@pytest.mark.parametrize(
    ("alone", "penalised", "sentence"),
    [
        (0.02, 0.01, "needs no penalty"),
        (1.5, 0.01, "needs the penalty"),
        (1.5, 1.2, "does not collapse"),
    ],
)
def test_the_finding_on_the_collapse_follows_the_scales(alone, penalised, sentence):
    scales = {"unmasked": 2.0, "lambda_0": alone, "lambda_0.01": penalised}
    metrics = {
        f"{setting}.{measure}{end}": scale if measure == "scale" else 1.0
        for setting, scale in scales.items()
        for measure in pelap.MEASURES
        for end in ("", ".low", ".high")
    }
    differences = [{"measure": "diffusion_loss", "paper": -0.1, "here": 0.2, "low": -1.0, "high": 1.0}]
    measured = [{"setting": "unmasked", "seed": 0}]
    run = planted("21_sparsity_collapse/cifar10", metrics, {"measures": measured, "paper_differences": differences})
    assert sentence in pelap.collapse(run).finding


@pytest.mark.parametrize(
    ("share", "sentence"), [(0.0, "suppresses the channels here"), (0.15, "does not explain the suppression")]
)
def test_the_finding_on_causes_follows_the_shares(share, sentence):
    rows = [
        {"variant": variant, "seed": 0, "final": True, "mse": 1.0, "share": own}
        for variant, own in (
            ("reference", 0.2),
            ("no weight decay", 0.0),
            ("scales not decayed", share),
            ("photos", 0.3),
        )
    ]
    run = planted("15_causes_of_suppression/study", {}, {"validation": rows}, {"threshold": 0.01, "dataset": "a+b"})
    shown = suppression.causes(run)
    assert sentence in shown.finding
    few = "no weight decay and scales not decayed" if share == 0 else "no weight decay"
    assert f"Almost none are suppressed with {few}." in shown.blocks[-1].caption


def test_blocks_that_draw_are_told_from_the_others():
    rows = [
        {"block": block, "manhattan": 1.0, **dict.fromkeys(turbo.FACTORS, 0.0), "shape": shape}
        for block, shape in (("up.0.0", -0.04), ("up.0.1", -0.5))
    ]
    shown = turbo.figure_3(planted("33_block_ablation/full", {}, {"blocks": rows}, {"max_images": 9}))
    assert shown.finding == "1 of 2 blocks do the drawing: `up.0.1`. Of the other 1, none costs more than 4 points."


def scored(column, value, **f1):
    """Rows of features against the truth: methods that are 0.1 better and worse than the trained autoencoder."""
    return [
        {column: value, "method": method, "f1": found, "f1_low": found - 0.01, "f1_high": found + 0.01, "auroc": 0.7,
         "iou": 0.2, "coverage": 0.5, "ahead": f1["sae"] - found, "ahead_low": f1["sae"] - found - 0.01,
         "ahead_high": f1["sae"] - found + 0.01}
        for method, found in f1.items()
    ]  # fmt: skip


def test_features_are_scored_against_the_truth_beside_their_rivals():
    f1 = {"sae": 0.4, "neurons": 0.5, "pca": 0.3, "ica": 0.4, "frozen_decoder": 0.3}
    shown = turbo.truth(planted("35_feature_scores/full", {}, {"truth": scored("block", "up.1.2", **f1)}))
    assert "it is behind neurons in 1" in shown.finding
    assert "ahead of PCA and a frozen decoder in 1 of 1 blocks" in shown.finding
    lines = shown.blocks[1].splitlines()
    assert lines[0] == "| features | `up.1.2` |" and "0.40 (0.39 to 0.41)" in lines[2]
    assert "0.70 | 0.20 | 50 % |" in shown.blocks[3]


@pytest.mark.parametrize(("ica", "words"), [(0.3, "is ahead of neurons"), (0.5, "at no number")])
def test_where_autoencoders_must_win_is_told(ica, words):
    rows = scored("concepts_per_dimension", 2.0, sae=0.4, neurons=0.1, pca=0.1, ica=ica, frozen_decoder=0.3)
    shown = turbo.positive_controls(planted("35_feature_scores/full", {}, {"planted": rows}))
    assert words in shown.finding and shown.finding.startswith("Planted directions: ")


def test_steering_is_told_beside_the_prompt_and_beside_finding():
    ends = {f"{name}{end}": 0.5 for name in ("effect", "selectivity", "damage", "distance") for end in turbo.ENDS}
    rows = [
        {"block": block, "direction": direction, "way": way, "strength": 2.0, **ends, "effect": effect}
        for block in ("up.1.1", "up.1.2", "all")
        for direction, way, effect in (
            ("sae", "add", 0.3), ("mean_difference", "add", 0.6), ("random", "add", 0.1), ("prompt", "prompt", 1.0),
        )
    ]  # fmt: skip
    scores = planted("35_feature_scores/full", {}, {"truth": scored("block", "up.1.2", sae=0.4, random=0.2, pca=0.5)})
    tables = {"steering": rows, "steering_curve": rows[:8]}
    shown = turbo.steered(scores, planted("35_feature_scores/full-steering", {}, tables, {"steered_values": 10}))
    assert "60 % of pictures (difference of means, damage 0.50)" in shown.finding
    assert "| prompt | the prompt that names it | 1.00 (0.50 to 0.50)" in shown.blocks[1]
    assert len(shown.blocks[1].splitlines()) == 2 + 4
    found = shown.blocks[3].splitlines()
    assert len(found) == 4 and "| `up.1.2` | trained SAE | 0.40 | add | 0.30 |" in found[3]


def test_a_missing_number_is_one_sentence():
    run = planted("33_block_ablation/full", {}, {"blocks": [{"block": "up.0.0", "manhattan": 1.0}]})
    with pytest.raises(
        ValueError, match=r"^columns of the table 'blocks' of 33_block_ablation/full: unknown name 'shape'"
    ):
        page.build_page(SECTIONS, {run.label: run})


def test_damaged_and_incomplete_results_are_one_sentence(tmp_path):
    path = save(planted("33_block_ablation/full"), tmp_path)
    path.write_text(path.read_text()[:-20])
    with pytest.raises(ValueError, match=r"results\.json' is damaged"):
        runs.read_runs(tmp_path)
    path.write_text(json.dumps({"notebook": "33_block_ablation", "params": {}, "metrics": {}, "tables": {}}))
    with pytest.raises(ValueError, match=r"have no key_numbers, finding, seconds, .*; run it again"):
        runs.read_runs(tmp_path)


def test_finished_runs_are_copied_and_read_back_alike(tmp_path):
    outputs, folder = tmp_path / "outputs", tmp_path / "results"
    long = [{"channel": number} for number in range(runs.LONGEST_TABLE + 1)]
    run = planted("33_block_ablation/full", {"a": 0.1}, {"blocks": [{"x": 1.5, "y": None}], "channels": long})
    save(run, outputs)
    save(planted("33_block_ablation/demo"), outputs)
    save(planted("33_block_ablation/mine"), outputs)
    assert runs.copy_runs(outputs, folder) == ["33_block_ablation/full: copied"]
    assert runs.copy_runs(outputs, folder) == []
    (read,) = runs.read_runs(folder).values()
    assert read.results == {**run.results, "tables": {"blocks": [{"x": 1.5, "y": None}]}}


def test_a_stale_run_does_not_replace_a_current_one(tmp_path):
    outputs, folder = tmp_path / "outputs", tmp_path / "results"
    save(planted("33_block_ablation/full", {"a": 1.0}), folder)
    save(planted("33_block_ablation/full", {"a": 2.0}, weights={**TODAY, "pipeline": "another"}), outputs)
    (line,) = runs.copy_runs(outputs, folder)
    assert "stale" in line
    assert runs.read_runs(folder)["33_block_ablation/full"].metric("a") == 1.0
    shutil.rmtree(folder)
    assert runs.copy_runs(outputs, folder) == ["33_block_ablation/full: copied"]


def test_copying_needs_export_and_a_folder(tmp_path):
    with pytest.raises(ValueError, match=r"^outputs_folder: runs are copied only with export: true"):
        runs.require_export("outputs", False)
    with pytest.raises(ValueError, match=r"^outputs_folder: no folder"):
        runs.require_export(str(tmp_path / "none"), True)


def test_copied_pictures_are_small_and_the_same_every_time(tmp_path):
    Image.effect_noise((3000, 60), 50).save(tmp_path / "large.png")
    for name in ("a.png", "b.png"):
        runs.copy_picture(tmp_path / "large.png", tmp_path / name)
    with Image.open(tmp_path / "a.png") as picture:
        assert picture.size == (runs.WIDEST, 28)
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


def test_a_copied_picture_keeps_the_colours_of_small_areas(tmp_path):
    """A black, an orange and a purple spot in a picture of many shades of pink, beige and teal."""
    rows = np.linspace(0.6, 1.0, 300)[:, None, None, None]
    shades = (rows * np.array([[215, 160, 170], [215, 195, 160], [95, 150, 150]])[None, :, None]).repeat(200, 2)
    pixels = (shades.reshape(300, 600, 3) + np.random.default_rng(0).normal(0, 4, (300, 600, 3))).clip(0, 255)
    spots = {(20, 20): (0, 0, 0), (120, 300): (255, 140, 0), (220, 500): (150, 40, 190)}
    for (top, left), colour in spots.items():
        pixels[top : top + 12, left : left + 12] = colour
    Image.fromarray(pixels.astype(np.uint8)).save(tmp_path / "a.png")
    runs.copy_picture(tmp_path / "a.png", tmp_path / "b.png")
    with Image.open(tmp_path / "b.png") as picture:
        copied = np.asarray(picture.convert("RGB")).astype(int)
    for (top, left), colour in spots.items():
        assert np.abs(copied[top + 6, left + 6] - colour).max() <= 32


def test_pictures_are_linked_where_they_lie(tmp_path):
    charts = []
    picture = Picture(tmp_path / "43_pca_maps" / "full" / "jointly.png", "First. Second.")
    assert page._block(picture, "results", charts).startswith("![First](results/43_pca_maps/full/jointly.png)")
    page._block(Chart("drawn", None, "A chart."), "results", charts)
    assert [chart.name for chart in charts] == ["drawn"]


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.0476, "0.0476"), (1234.5, "1,230"), (0.9999, "1.00"), (0, "0"), (-2.345, "-2.35"), (12.0, "12.0")],
)
def test_numbers_have_three_digits(value, text):
    assert number(value) == text


def test_signs_and_shares():
    assert [signed(value) for value in (0.5, -0.5, 0.0)] == ["+0.50", "-0.50", "0"]
    assert [percent(share) for share in (0.984, -0.001, 1)] == ["98 %", "0 %", "100 %"]


def test_captions_stand_beside_their_controls():
    means = [("caption", 0.7, 0.6, 0.8), ("untrained autoencoder", 0.5, 0.4, 0.6)]
    scores = [dict(zip(("block", "who", "mean", "low", "high"), ("up", *row), strict=True)) for row in means]
    captions = [
        {"block": "up", "feature": i, "caption": "a star" if i else "", "score": 0.9 if i else None, "words": "red",
         "words_score": 0.25} for i in range(9)
    ]  # fmt: skip
    run = planted("36_annotate_features/full", tables={"scores": scores, "captions": captions}, params={"pool": 20})
    shown = "\n".join(map(str, turbo.captions(run).blocks))
    assert "| `up` | 0.70 (0.60 to 0.80) | 0.50 (0.40 to 0.60) |" in shown and "Each of 9 features" in shown
    assert "| `up` | 0 | none |  | red | 0.25 |" in shown and "| `up` | 4 | a star | 0.90 | red | 0.25 |" in shown
    assert "| `up` | 5 |" not in shown


def test_granularity_stands_beside_random_pictures_and_the_paper():
    names = list(revelio.TABLE_1["up_ft1"])
    rows = [("up", 0.1, 0.6, 0.2, 0.1), ("random pictures", 0, 0, 0.05, 0.95)]
    table = [dict(zip(("block", *names), row, strict=True)) | {"features": 20} for row in rows]
    params = {"granularity_pictures": 10, "granularity_features": 20}
    shown = revelio.granularity(planted("36_annotate_features/full", tables={"granularity": table}, params=params))
    assert shown.finding == (
        "60 % of the features of `up` are moderately granular; 95 % of random sets of pictures have no pattern."
    )
    assert "| `up` | 10 % | 60 % | 20 % | 10 % |" in shown.blocks[1]
    assert "| paper, `up_ft1` | 47 % | 41 % | 11 % | 1 % |" in shown.blocks[1]
