from dataclasses import replace

import pandas as pd
import planted_pictures
import pytest
import torch

from vaelab.activations import denoiser
from vaelab.data.labelled import LabelledPicture, LabelledPictures
from vaelab.models import loading
from vaelab.models.block_names import blocks
from vaelab.models.clip import load_clip
from vaelab.probing import classifiers, dataset, layer_features, tasks
from vaelab.probing.clip import ZeroShotClip, prompt_texts
from vaelab.probing.diffc import DiffC, DiffCConfig, classify_stored
from vaelab.probing.diffusion_classifier import DiffusionClassifier, Stages
from vaelab.probing.layer_features import LayerConfig
from vaelab.probing.linear import measure_accuracy
from vaelab.probing.tasks import Task

LAYER = "up.t25"
SMALL = DiffCConfig(width=8, epochs=14, batch_size=16, learning_rate=1e-2, final_rate=5e-3, device="cpu")


MODEL = {"model": "planted"}
PICTURES = LabelledPictures("world[train][90:150]", 32, planted_pictures.CLASSES, range(60), lambda image: None)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Two slices of one data set: 90 pictures, and the 60 that follow."""
    place = tmp_path_factory.mktemp("readout")
    for seed, (begin, end) in enumerate(((0, 90), (90, 150))):
        truth = planted_pictures.labels(end - begin, seed)
        planted_pictures.fill(
            place / str(seed), truth, seed=seed, images=list(range(begin, end)),
            dataset=f"world[train][{begin}:{end}]", resolution=32,
        )  # fmt: skip
    return str(place / "0"), str(place / "1")


@pytest.fixture(scope="module")
def by_factor(folders):
    return tasks.build_tasks(*folders, PICTURES, MODEL, validation_share=0.25)


def test_probes_and_diffcs_read_what_is_planted(by_factor, tmp_path):
    probed = classifiers.probe_layers(by_factor).set_index("factor")
    assert probed.loc["shape", "accuracy"] > 0.95 and probed["layer"].tolist() == [LAYER] * 2
    assert probed.loc["colour", "low"] < 0.55 < probed.loc["colour", "high"] + 0.1
    rows, models = classifiers.train_diffcs({"shape": by_factor["shape"]}, {"shape": [LAYER]}, SMALL, tmp_path)
    row, task = rows.iloc[0], by_factor["shape"]
    predicted = classify_stored([models[LAYER, "shape"]], task.test, LAYER + ".maps")[0]
    again = measure_accuracy(predicted, task.test.labels, task.training.labels)
    assert (row["accuracy"], row["low"], row["high"], row["chance"], row["count"], row["uniform"]) == again
    assert row["accuracy"] > 0.9 and (row["classifier"], row["layer"]) == ("diffc", LAYER)


def test_all_diffcs_share_one_progress_bar_which_leaves_one_line(by_factor, tmp_path, capsys):
    brief = replace(SMALL, epochs=1)
    layers = {factor: [LAYER] for factor in by_factor}
    for _ in range(2):  # the second time, both are finished
        classifiers.train_diffcs(by_factor, layers, brief, tmp_path)
        lines = capsys.readouterr().out.split("\n")
        assert [line.split("\r")[-1][:21] for line in lines] == ["Diff-C, layer 1 of 1:", ""]


@pytest.fixture(scope="module")
def shown():
    """Three pictures, of which the second cannot be read."""
    generator = torch.Generator().manual_seed(0)
    pixels = [torch.rand(3, 32, 32, generator=generator) * 2 - 1 for _ in range(3)]
    read = [(one, {"shape": 2, "colour": number % 2}) for number, one in enumerate(pixels)]
    return replace(PICTURES, numbers=range(3), read=lambda i: None if i == 1 else read[i])


def stored_task(pipeline, shown, folder, **options):
    """What is tested are the maps of the pictures, collected as ``options``."""
    config = LayerConfig(("up_ft0",), (25,), maps=True, precision="float32", **options)
    learn = planted_pictures.fill(folder / "learn", planted_pictures.labels(8))
    stored = layer_features.collect_layer_features(pipeline, shown, config, folder / "test")
    return Task(dataset.load_examples(learn, "colour"), None, dataset.load_examples(stored, "colour"))


def test_the_zero_shot_classifier_and_diffc_are_scored_and_timed_on_the_same_pictures(
    small_pipeline, shown, clip_folder, tmp_path
):
    pipeline, prompts = small_pipeline("sd"), ["a red thing", "a blue thing"]
    classifier = DiffusionClassifier(pipeline, prompts, Stages((2,), (1,)))
    model = DiffC(blocks(pipeline)["up_ft0"].shape[-1], 2, width=4)
    own = {"layer": "up_ft0.t25", "factor": "colour", "classifier": "diffc", "accuracy": 0.7, "low": 0.6, "high": 0.8,
           "chance": 0.5, "count": 60, "uniform": 0.5, "validation": 0.7, "chosen": 3}  # fmt: skip
    rows, trained = pd.DataFrame([own]), {("up_ft0.t25", "colour"): model}
    task = stored_task(pipeline, shown, tmp_path)
    compared = classifiers.compare_classifiers(
        classifier, rows, trained, shown, task, "colour", 9, clip=str(clip_folder), template="a {} thing"
    )
    first, second, third = compared.to_dict("records")
    readable = torch.stack([shown[0].pixels, shown[2].pixels])
    alone = [classifier.classify(one[None])[0].predicted for one in readable]
    assert first["accuracy"] == first["accuracy_on_these"] == sum(chosen == 0 for chosen in alone) / 2
    assert (first["passes"], first["count"]) == (4, 2)
    assert (second["passes"], second["accuracy"], second["count"]) == (1, 0.7, 60)
    on_stored = classify_stored([model], task.test, "up_ft0.t25.maps")[0]
    assert second["accuracy_on_these"] == (on_stored == 0).float().mean()
    names = ZeroShotClip(load_clip(str(clip_folder), device="cpu"), {"colour": prompts})
    assert third["accuracy"] == sum(one["colour"] == 0 for one in names.classify(readable)) / 2
    assert (third["classifier"], third["passes"]) == ("clip", 0) and third["seconds_per_image"] > 0


def test_diffc_is_timed_with_what_the_denoiser_was_told(small_pipeline, shown, clip_folder, monkeypatch, tmp_path):
    """A prompt with the true class, or with the class that CLIP infers."""
    pipeline, calls, plain = small_pipeline("sd"), [], denoiser.from_pictures
    monkeypatch.setattr(
        denoiser, "from_pictures", lambda *args, **kwargs: calls.append((args, kwargs)) or plain(*args, **kwargs)
    )
    model, place = DiffC(blocks(pipeline)["up_ft0"].shape[-1], 2, width=4), str(clip_folder)
    names = ZeroShotClip(load_clip(place, device="cpu"), prompt_texts("a {colour} thing", planted_pictures.CLASSES))
    inferred = planted_pictures.CLASSES["colour"][names.classify(shown[0].pixels[None])[0]["colour"]]
    for options, expected in (
        ({}, None), ({"prompt": "a {colour} thing"}, ["a red thing"]),
        ({"prompt": "a {colour} thing", "clip": place, "side": "input"}, [f"a {inferred} thing"]),
    ):  # fmt: skip
        task = stored_task(pipeline, shown, tmp_path / str(len(options)), **options)
        found, _ = classifiers.classify_from_pixels(pipeline, model, "up_ft0.t25", shown, task, [shown[0]])
        args, kwargs = calls[-1]
        assert kwargs["prompts"] == expected and kwargs["side"] == options.get("side", "output")
        assert args[2] == [task.test.store.items[0]["seed"]] and found[0] in (0, 1)


def test_a_store_that_other_weights_made_is_refused(pipeline_folder, shown, tmp_path):
    pipeline = loading.load_pipeline(str(pipeline_folder("sd")), device="cpu")
    task = stored_task(pipeline, shown, tmp_path)
    with torch.no_grad():
        for one in pipeline.unet.parameters():
            one.mul_(1.1)
    model = DiffC(blocks(pipeline)["up_ft0"].shape[-1], 2, width=4)
    with pytest.raises(ValueError, match=r"^test_activations: the model does not reproduce up_ft0.t25 of picture 0"):
        classifiers.classify_from_pixels(pipeline, model, "up_ft0.t25", shown, task, [shown[0]])


def test_each_picture_is_timed_once_by_itself_after_one_that_is_not():
    shown = [LabelledPicture(i, torch.full((3, 2, 2), float(i)), {}) for i in range(4)]
    seen = []
    answers, seconds = classifiers.time_each(
        lambda picture: seen.append(picture.image) or picture.image + 10, shown, torch.device("cpu")
    )
    assert seen == [0, 0, 1, 2, 3] and answers == [10, 11, 12, 13] and seconds >= 0


def test_no_readable_test_picture_is_refused(small_pipeline, shown, tmp_path):
    classifier = DiffusionClassifier(small_pipeline("sd"), ["a red thing", "a blue thing"], Stages((2,), (1,)))
    task = stored_task(small_pipeline("sd"), shown, tmp_path)
    unreadable = replace(shown, read=lambda image: None)
    with pytest.raises(ValueError, match=r"^dataset: none of the first 3 pictures of .* can be read"):
        classifiers.compare_classifiers(classifier, pd.DataFrame(), {}, unreadable, task, "colour", 3)
