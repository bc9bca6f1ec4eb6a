"""The notebooks as text, then run with wrong and with planted input."""

import ast
import json
import re
from pathlib import Path

import nbformat
import papermill
import planted_pictures
import pytest
from helpers import picture_folder
from notebook_cells import code, execute_cells
from papermill.exceptions import PapermillExecutionError

from vaelab.runner import execute
from vaelab.world.scenes import FACTORS

ROOT = Path(__file__).parent.parent
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
COMMON = {
    "model",
    "dataset",
    "split",
    "resolution",
    "max_images",
    "batch_size",
    "seed",
    "device",
    "output_dir",
    "overwrite",
}
OF_PICTURES = {"dataset", "split", "max_images", "resolution"}
ORDER = ["question", "parameters", "load", "run", "show", "save"]


@pytest.fixture(params=NOTEBOOKS, ids=lambda path: path.stem)
def notebook(request):
    return nbformat.read(request.param, as_version=4)


def test_committed_without_outputs(notebook):
    assert all(not cell.outputs and cell.execution_count is None for cell in code(notebook))


def test_thin(notebook):
    kinds = (ast.FunctionDef, ast.ClassDef, ast.AsyncFunctionDef)
    assert not any(isinstance(node, kinds) for cell in code(notebook) for node in ast.walk(ast.parse(cell.source)))


def test_cells_have_their_names_in_order(notebook):
    names = [re.split("-", cell.id)[0] for cell in notebook.cells if not cell.id.startswith("about")]
    assert names[:3] == ORDER[:3] and names[-1] == "save"
    assert set(names) == set(ORDER)


def assigned(cell):
    """The imports of a parameters cell, and its other statements."""
    body = ast.parse(cell.source).body
    imports = [statement for statement in body if isinstance(statement, ast.ImportFrom)]
    return imports, [statement for statement in body if statement not in imports]


def test_one_parameters_cell_annotated_and_explained(notebook):
    tagged = [cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", [])]
    assert [cell.id for cell in tagged] == ["parameters"]
    imports, statements = assigned(tagged[0])
    assert {statement.module for statement in imports} <= {"pydantic", "typing"}
    assert all(isinstance(statement, ast.AnnAssign) for statement in statements)
    only_reads = "vaelab.report" in "\n".join(cell.source for cell in code(notebook))
    expected = {"output_dir", "overwrite"} if only_reads else COMMON
    given = {statement.target.id for statement in statements}
    if {"saes", "activations"} <= given:  # its pictures are those of the runs that it reads
        expected = expected - OF_PICTURES
    assert given >= expected


def test_every_parameter_is_used(notebook):
    parameters = {statement.target.id for statement in assigned(code(notebook)[0])[1]}
    rest = "\n".join(cell.source for cell in code(notebook)[1:])
    named = {node.id for node in ast.walk(ast.parse(rest)) if isinstance(node, ast.Name)}
    from dataclasses import fields

    from vaelab.pruning.masks import LatentConfig
    from vaelab.pruning.metrics import EvaluationConfig
    from vaelab.pruning.train import PruningConfig
    from vaelab.training.loop import TrainConfig
    from vaelab.vae.finetune import StudyConfig
    from vaelab.vae.nudge import NudgeConfig

    parts = {
        StudyConfig: (TrainConfig, NudgeConfig),
        PruningConfig: (TrainConfig, LatentConfig, EvaluationConfig),
    }
    by_name = [kind for kind in parts if f"{kind.__name__}.of(run.params)" in rest]
    configured = {one.name for whole in by_name for kind in (whole, *parts[whole]) for one in fields(kind)}
    assert parameters - named - configured <= {"output_dir", "overwrite", "dry_run"}


CENSUS = {"max_images": 4, "batch_size": 4}


@pytest.fixture
def by_papermill(forked_kernels, tmp_path):
    """Executes a notebook as papermill does, in a kernel."""

    def execute_notebook(name, **params):
        given = {"device": "cpu", "output_dir": str(tmp_path / "run"), **params}
        options = {"cwd": ROOT, "progress_bar": False, **forked_kernels}
        papermill.execute_notebook(ROOT / "notebooks" / f"{name}.ipynb", tmp_path / "out.ipynb", given, **options)

    return execute_notebook


@pytest.fixture
def no_groupnorm(tmp_path):
    from diffusers import AutoencoderTiny

    small = {"encoder_block_out_channels": (8, 8), "decoder_block_out_channels": (8, 8)}
    blocks = {"num_encoder_blocks": (1, 1), "num_decoder_blocks": (1, 1)}
    AutoencoderTiny(**small, **blocks).save_pretrained(tmp_path / "tiny")
    return tmp_path / "tiny"


def test_an_unknown_parameter_is_refused_with_the_nearest_name(tmp_path, by_papermill):
    with pytest.raises(PapermillExecutionError, match=r"treshold.*threshold"):
        by_papermill("12_channel_census", treshold=1.0e-3)
    assert not list(tmp_path.rglob("results.json"))


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"threshold": "5e-5"}, "threshold: expected float.*5.0e-5"),
        ({"threshold": -1.0}, "threshold: must be at least 0"),
        ({"layers": "decoder.*.nrm1"}, "layers: unknown name.*norm1"),
        ({"dataset": "photoz"}, "dataset: 'photoz'.*photos"),
        ({"model": "no_groupnorm"}, "model: .* has no GroupNorm"),
        ({"output_dir": "a-file"}, "output_dir: cannot write"),
        ({"picture": 99}, "picture: .* has pictures 0 to 3, got 99"),
        ({"resolution": 30}, "resolution: pictures of 30 x 30 come back as 28 x 28; take a multiple of 4"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_wrong_input_is_one_clear_error_and_leaves_nothing_finished(
    tmp_path, monkeypatch, no_groupnorm, params, message
):
    monkeypatch.chdir(ROOT)
    (tmp_path / "a-file").write_text("in the way")
    places = {"no_groupnorm": str(no_groupnorm), "a-file": str(tmp_path / "a-file" / "run")}
    given = {key: places.get(value, value) if isinstance(value, str) else value for key, value in params.items()}
    with pytest.raises((ValueError, OSError), match=f"(?s){message}"):
        execute_cells("12_channel_census", *ORDER[2:], **{**CENSUS, "output_dir": str(tmp_path / "run"), **given})
    assert not list(tmp_path.rglob("results.json"))


@pytest.mark.parametrize(
    ("name", "params", "message"),
    [
        ("01_train_embedded_models", {"ship": ["vea"]}, "ship: unknown name 'vea'"),
        ("02_judge_embedded_models", {"class_model": "embedded"}, "class_model: .* have no names"),
        ("02_judge_embedded_models", {"resolution": 128}, "resolution: pictures of 128 x 128; .* must be 64 x 64"),
        ("30_collect_activations", {"resolution": 63}, "resolution: pictures of 63 x 63; .* takes multiples of 8"),
        ("31_train_sae", {"activations": "{folder}"}, "activations: .* is not a readable store of activations"),
        ("33_block_ablation", {"resolution": 128}, "resolution: pictures of 128 x 128; .* must be 64 x 64"),
        ("35_feature_scores", {"seeds": []}, "seeds: expected one or more different numbers"),
        ("40_layer_features", {"dataset": "{folder}"}, r"dataset: .* 3 pictures of 3 classes \(label\)"),
        ("41_label_purity", {"activations": "{folder}"}, "activations: .* is not a readable store of activations"),
        ("42_diffc", {"test_activations": "{folder}"}, "test_activations: .* is not a readable store of activations"),
        ("42_diffc", {"factor": "color"}, "factors: unknown name 'color'.*colour"),
        ("42_diffc", {"template": "a thing"}, "template: expected {}"),
        ("42_diffc", {"keep": [2, 2]}, "keep: expected decreasing numbers"),
        ("42_diffc", {"others": ["{folder}"]}, "others: .* holds no finished run of 42_diffc"),
    ],
    ids=lambda value: value if isinstance(value, str) else next(iter(value)),
)
def test_wrong_input_is_refused_before_anything_is_computed(tmp_path, monkeypatch, name, params, message):
    monkeypatch.chdir(ROOT)
    folder = picture_folder(tmp_path / "given", [f"{kind}/0.png" for kind in ("cat", "dog", "emu")])
    given = {key: json.loads(json.dumps(value).replace("{folder}", str(folder))) for key, value in params.items()}
    stores = two_stores(tmp_path) if name == "42_diffc" else {}
    with pytest.raises(ValueError, match=f"^{message}"):
        execute_cells(name, "load", **{"output_dir": str(tmp_path / "run"), **stores, **given})
    assert not (tmp_path / "run" / "results.json").exists()


@pytest.mark.parametrize(
    ("name", "params", "message"),
    [
        ("00_tour", {"block": "up.9.9"}, "block: unknown name 'up.9.9'.*up.1.2"),
        ("00_tour", {"block": "bottleneck"}, "block: unknown name 'bottleneck'"),
        ("00_tour", {"layer": "decoder.*"}, r"layer: unknown name 'decoder.\*'"),
        ("00_tour", {"pipeline": "embeded"}, "pipeline: 'embeded' is neither"),
        ("10_finetune_vae", {"layers": "decoder.*.nrm1"}, "layers: unknown name"),
        ("11_compare_interventions", {"layer": "encoder.conv_in"}, "layer: no GroupNorm with a scale"),
        ("12_channel_census", {"layers": "decoder.conv_in"}, "layers: no GroupNorm with a scale"),
        ("13_logit_lens", {"layer": "encoder.conv_inn"}, "layer: unknown name 'encoder.conv_inn'.*encoder.conv_in"),
        ("30_collect_activations", {"blocks": ["up.9.9"]}, "blocks: unknown name 'up.9.9'"),
        ("30_collect_activations", {"blocks": ["up_ft0"]}, "blocks: up_blocks.0 .* has no update"),
        ("33_block_ablation", {"blocks": ["down.1.1", "up.9.9"]}, "blocks: unknown name 'up.9.9'"),
        ("33_block_ablation", {"column": "text"}, "column: "),
        ("34_feature_gallery", {"blocks": ["up.9.9"]}, "blocks: unknown name 'up.9.9'"),
        ("34_feature_gallery", {"mask": [0.5, 0.0, 0.5, 1.0]}, "mask: expected"),
        ("40_layer_features", {"blocks": ["up_ft9"]}, "blocks: unknown name 'up_ft9'.*up_ft0"),
        ("42_diffc", {"blocks": ["up_ft9"]}, "blocks: unknown name 'up_ft9'.*up_ft0"),
        ("42_diffc", {"timesteps": [25, 1000]}, "timesteps: expected numbers from 0 to 999, got .25, 1000."),
        ("42_diffc", {"diffc_layers": ["up_ft1.t26"]}, "diffc_layers: unknown name 'up_ft1.t26'.*up_ft1.t25"),
        ("43_pca_maps", {"other_model": "embedded-dit", "other_blocks": ["block9"]}, "other_blocks: unknown name"),
        ("43_pca_maps", {"other_model": "embeded", "other_blocks": ["block9"]}, "other_model: 'embeded' is neither"),
        ("90_benchmarks", {"blocks": ["up.9.9"]}, "blocks: unknown name 'up.9.9'"),
        ("90_benchmarks", {"pipeline": "embeded"}, "pipeline: 'embeded' is neither"),
    ],
    ids=lambda value: value if isinstance(value, str) else next(iter(value)),
)
def test_wrong_names_are_refused_before_weights_are_loaded(tmp_path, monkeypatch, name, params, message):
    from vaelab import models

    monkeypatch.chdir(ROOT)
    for loader in ("load_pipeline", "load_vae"):
        monkeypatch.setattr(models, loader, lambda *args, **options: pytest.fail("weights were loaded"))
    with pytest.raises(ValueError, match=f"^{message}"):
        execute_cells(name, "load", output_dir=str(tmp_path / "run"), **params)


def two_stores(folder):
    """Features to learn from and to test on, as notebook 40 leaves them, for the parameters of 42."""
    from vaelab import models

    settings = {
        "model": models.identity("embedded", precision="float32"),
        "resolution": 64,
        "classes": {name: list(each) for name, each in FACTORS.items()},
    }
    truth = [dict.fromkeys(FACTORS, number % 2) for number in range(9)]
    for part, begin in (("activations", 100), ("test_activations", 0)):
        images, dataset = list(range(begin, begin + 9)), f"world[train][{begin}:{begin + 9}]"
        planted_pictures.fill(folder / part, truth, images=images, dataset=dataset, **settings)
    return {part: str(folder / part) for part in ("activations", "test_activations")} | {"split": "train[0:9]"}


@pytest.mark.parametrize(
    ("name", "params"),
    [
        ("30_collect_activations", {"blocks": ["up.0.*"], "max_images": 1, "steps": 1}),
        ("43_pca_maps", {"blocks": ["bottleneck"], "dataset": "{folder}", "split": "train"}),
    ],
    ids=lambda value: value if isinstance(value, str) else next(iter(value)),
)
def test_globs_and_own_pictures_are_taken_to_the_end(tmp_path, monkeypatch, name, params):
    monkeypatch.chdir(ROOT)
    folder = str(picture_folder(tmp_path / "given", ["a.png", "b.png"]))
    given = {key: folder if value == "{folder}" else value for key, value in params.items()}
    execute_cells(name, *ORDER[2:], output_dir=str(tmp_path / "run"), **given)
    assert (tmp_path / "run" / "results.json").exists()


def classify_own_pictures(folder, output):
    """Run the README's command for own pictures in this process, on one layer."""
    small = {"blocks": ["up_ft0"], "timesteps": [25], "width": 8, "epochs": 2, "zero_shot_images": 0}
    execute_cells("42_diffc", *ORDER[2:], dataset=str(folder), output_dir=str(output), **small)


def test_one_folder_of_class_folders_gives_an_accuracy(tmp_path, monkeypatch):
    import numpy as np
    import PIL.Image

    monkeypatch.chdir(ROOT)
    for number in range(24):
        grey = np.full((40, 30, 3), 100 + 5 * number, np.uint8)
        grey[:, ::4] //= 1 + number % 2  # every second picture has stripes
        place = tmp_path / "own" / ("plain", "striped")[number % 2] / f"{number}.png"
        place.parent.mkdir(parents=True, exist_ok=True)
        PIL.Image.fromarray(grey).save(place)
    classify_own_pictures(tmp_path / "own", tmp_path / "run")
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    probe, diffc = results["tables"]["accuracy"]
    assert (probe["classifier"], probe["accuracy"], probe["uniform"]) == ("probe", 1.0, 0.5)
    assert diffc["classifier"] == "diffc" and 0 <= diffc["low"] <= diffc["accuracy"] <= diffc["high"] <= 1
    assert probe["count"] == diffc["count"] == 5, "a fifth of the pictures"
    assert "label: the linear probe is correct for 100.0% of 5 test pictures" in results["finding"]


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ([], "dataset: '.*own'"),
        (["0.png", "1.png"], "dataset: .* has no labels; expected .* a folder of pictures for each class"),
        (
            ["cat/0.png", "cat/1.png", "cat/2.png"],
            "dataset: .* has no labels; expected .* a folder of pictures for each class",
        ),
        (["cat/0.png", "dog/1.png"], r"dataset: .* 2 pictures of 2 classes \(label\); expected .* more pictures than"),
    ],
    ids=["wrong folder", "no classes", "one class", "two pictures"],
)
def test_own_pictures_that_cannot_be_classified_are_refused_at_once(tmp_path, monkeypatch, names, message):
    from vaelab import models

    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(models, "load_pipeline", lambda *args, **options: pytest.fail("weights were loaded"))
    picture_folder(tmp_path / "own", names)
    with pytest.raises(ValueError, match=f"^{message}"):
        classify_own_pictures(tmp_path / "own", tmp_path / "run")
    assert not (tmp_path / "run" / "results.json").exists()


def test_planted_channels_are_found_by_the_census_and_no_others(tmp_path, by_papermill):
    import numpy as np
    import PIL.Image
    import torch

    from vaelab import models
    from vaelab.vae import channels

    vae = models.load_vae("embedded", device="cpu", changes={}, seed=3)
    rng = np.random.default_rng(5)
    layers = rng.choice(list(channels.groupnorms(vae)), 5, replace=False)
    planted = set()
    with torch.no_grad():
        for layer in layers:
            norm = vae.get_submodule(str(layer))
            for channel in rng.choice(norm.num_channels, 4, replace=False):
                norm.weight[channel] = norm.bias[channel] = 0
                planted.add((str(layer), int(channel)))
    vae.save_pretrained(tmp_path / "vae")
    (tmp_path / "pictures").mkdir()
    for i in range(6):
        PIL.Image.fromarray(rng.integers(0, 256, (40, 50, 3), dtype=np.uint8)).save(tmp_path / "pictures" / f"{i}.png")
    by_papermill("12_channel_census", **CENSUS, model=str(tmp_path / "vae"), dataset=str(tmp_path / "pictures"))
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    rows = results["tables"]["suppressed"]
    assert len(planted) == 20
    assert {(row["layer"], row["channel"]) for row in rows} == planted
    assert all(row.keys() == {"layer", "channel", "mean_abs", "gamma", "beta"} for row in rows)
    assert str(tmp_path) not in json.dumps(results)


def test_a_run_reads_finished_runs_only(by_papermill):
    with pytest.raises(PapermillExecutionError, match="run it first"):
        by_papermill("11_compare_interventions", runs=["outputs/10_finetune_vae/never"])


def test_a_params_file_names_the_runs_it_needs(monkeypatch):
    monkeypatch.chdir(ROOT)
    params = execute.load_params(Path("params/11_compare_interventions/demo.yaml"))
    names = [execute.label(path) for path in execute.needs(params)]
    assert names == ["10_finetune_vae/demo-photos", "10_finetune_vae/demo-digits", "10_finetune_vae/demo"]
