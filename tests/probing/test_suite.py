from dataclasses import replace

import pandas as pd
import planted_pictures
import pytest
import torch

from vaelab.activations import denoiser
from vaelab.data.labelled import Picture, Pictures
from vaelab.models import loading
from vaelab.models.block_names import blocks
from vaelab.probing import clip as probing_clip
from vaelab.probing import dataset, layer_features, suite
from vaelab.probing.diffc import DiffC, DiffCConfig, classify
from vaelab.probing.diffusion_classifier import DiffusionClassifier, Stages
from vaelab.probing.layer_features import LayerConfig
from vaelab.probing.linear import score

LAYER = "up.t25"
SMALL = DiffCConfig(width=8, epochs=14, batch_size=16, learning_rate=1e-2, final_rate=5e-3, device="cpu")


PICTURES = Pictures("world[train][90:150]", 32, planted_pictures.CLASSES, range(60), lambda image: None)


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
    return suite.tasks(*folders, PICTURES, "planted", share=0.25)


def test_parts_are_disjoint_and_the_same_for_every_factor(by_factor):
    items = {factor: [part.items for part in task] for factor, task in by_factor.items()}
    assert items["shape"] == items["colour"]
    learn, validate, test = items["shape"]
    assert (len(learn), len(validate), len(test)) == (68, 22, 60)
    assert not {one for views in learn for one in views} & {one for views in validate for one in views}


def test_probes_and_diffcs_read_what_is_planted(by_factor, tmp_path):
    probed = suite.probes(by_factor).set_index("factor")
    assert probed.loc["shape", "accuracy"] > 0.95 and probed["layer"].tolist() == [LAYER] * 2
    assert probed.loc["colour", "low"] < 0.55 < probed.loc["colour", "high"] + 0.1
    rows, models = suite.diffcs({"shape": by_factor["shape"]}, {"shape": [LAYER]}, SMALL, tmp_path)
    row, task = rows.iloc[0], by_factor["shape"]
    again = score(classify(models[LAYER, "shape"], task.test, LAYER + ".maps"), task.test.labels, task.learn.labels)
    assert (row["accuracy"], row["low"], row["high"], row["chance"], row["count"]) == again
    assert row["accuracy"] > 0.9 and (row["classifier"], row["layer"]) == ("diffc", LAYER)


@pytest.fixture(scope="module")
def shown():
    """Three pictures, of which the second cannot be read."""
    generator = torch.Generator().manual_seed(0)
    pixels = [torch.rand(3, 32, 32, generator=generator) * 2 - 1 for _ in range(3)]
    read = [(one, {"shape": 2, "colour": number % 2}) for number, one in enumerate(pixels)]
    return replace(PICTURES, rows=range(3), read=lambda i: None if i == 1 else read[i])


def kept_task(pipeline, shown, folder, **told):
    """What is tested are the maps of the pictures, collected as ``told``."""
    config = LayerConfig(("up_ft0",), (25,), maps=True, precision="float32", **told)
    learn = planted_pictures.fill(folder / "learn", planted_pictures.labels(8))
    kept = layer_features.collect(pipeline, shown, config, folder / "test")
    return suite.Task(dataset.read(learn, "colour"), None, dataset.read(kept, "colour"))


def test_the_zero_shot_classifier_and_diffc_are_scored_and_timed_on_the_same_pictures(
    small_pipeline, shown, clip_folder, tmp_path
):
    pipeline, prompts = small_pipeline("sd"), ["a red thing", "a blue thing"]
    classifier = DiffusionClassifier(pipeline, prompts, Stages((2,), (1,)))
    model = DiffC(blocks(pipeline)["up_ft0"].shape[-1], 2, width=4)
    own = {"layer": "up_ft0.t25", "factor": "colour", "classifier": "diffc", "accuracy": 0.7, "low": 0.6, "high": 0.8,
           "chance": 0.5, "count": 60, "validation": 0.7, "chosen": 3}  # fmt: skip
    rows, trained = pd.DataFrame([own]), {("up_ft0.t25", "colour"): model}
    task = kept_task(pipeline, shown, tmp_path)
    compared = suite.side_by_side(
        classifier, rows, trained, shown, task, "colour", 9, clip=str(clip_folder), template="a {} thing"
    )
    first, second, third = compared.to_dict("records")
    readable = torch.stack([shown[0].pixels, shown[2].pixels])
    alone = [classifier.classify(one[None])[0].chosen for one in readable]
    assert first["accuracy"] == first["accuracy_on_these"] == sum(chosen == 0 for chosen in alone) / 2
    assert (first["passes"], first["count"]) == (4, 2)
    assert (second["passes"], second["accuracy"], second["count"]) == (1, 0.7, 60)
    on_stored = classify(model, task.test, "up_ft0.t25.maps")
    assert second["accuracy_on_these"] == (on_stored == 0).float().mean()
    names = probing_clip.load(str(clip_folder), {"colour": prompts}, device="cpu")
    assert third["accuracy"] == sum(one["colour"] == 0 for one in names(readable)) / 2
    assert (third["classifier"], third["passes"]) == ("clip", 0) and third["seconds_per_image"] > 0


def test_diffc_is_timed_with_what_the_denoiser_was_told(small_pipeline, shown, clip_folder, monkeypatch, tmp_path):
    """A prompt with the true class, or with the class that CLIP infers."""
    pipeline, asked, plain = small_pipeline("sd"), [], denoiser.from_pictures
    monkeypatch.setattr(
        denoiser, "from_pictures", lambda *args, **kwargs: asked.append((args, kwargs)) or plain(*args, **kwargs)
    )
    model, clip = DiffC(blocks(pipeline)["up_ft0"].shape[-1], 2, width=4), str(clip_folder)
    names = probing_clip.load(clip, probing_clip.texts("a {colour} thing", planted_pictures.CLASSES), device="cpu")
    inferred = planted_pictures.CLASSES["colour"][names(shown[0].pixels[None])[0]["colour"]]
    for told, expected in (
        ({}, None), ({"prompt": "a {colour} thing"}, ["a red thing"]),
        ({"prompt": "a {colour} thing", "clip": clip, "side": "input"}, [f"a {inferred} thing"]),
    ):  # fmt: skip
        task = kept_task(pipeline, shown, tmp_path / str(len(told)), **told)
        found, _ = suite.as_it_comes(pipeline, model, "up_ft0.t25", shown, task, [shown[0]])
        args, kwargs = asked[-1]
        assert kwargs["prompts"] == expected and kwargs["side"] == told.get("side", "output")
        assert args[2] == [task.test.kept.items[0]["seed"]] and found[0] in (0, 1)


def test_a_store_that_other_weights_made_is_refused(pipeline_folder, shown, tmp_path):
    pipeline = loading.load_pipeline(str(pipeline_folder("sd")), device="cpu")
    task = kept_task(pipeline, shown, tmp_path)
    with torch.no_grad():
        for one in pipeline.unet.parameters():
            one.mul_(1.1)
    model = DiffC(blocks(pipeline)["up_ft0"].shape[-1], 2, width=4)
    with pytest.raises(ValueError, match=r"^test_activations: up_ft0.t25 of picture 0 is not what the model gives now"):
        suite.as_it_comes(pipeline, model, "up_ft0.t25", shown, task, [shown[0]])


def test_each_picture_is_timed_once_by_itself_after_one_that_is_not():
    shown = [Picture(i, torch.full((3, 2, 2), float(i)), {}) for i in range(4)]
    seen = []
    answers, seconds = suite.timed(lambda picture: seen.append(picture.image) or picture.image + 10, shown)
    assert seen == [0, 0, 1, 2, 3] and answers == [10, 11, 12, 13] and seconds >= 0


def test_classes_that_are_tested_and_never_learned_are_refused(by_factor):
    task = by_factor["shape"]
    stars = task.learn.labels == 2
    sorted_by_class = task._replace(learn=task.learn.take((~stars).nonzero().flatten().numpy()))
    suite.refuse_unlearned(sorted_by_class, "shape")  # of a third of the pictures nothing is learned
    only = sorted_by_class._replace(test=task.test.take((task.test.labels == 2).nonzero().flatten().numpy()))
    with pytest.raises(
        ValueError, match=r"^test_activations: (\d+) of \1 pictures have a shape that none to learn from"
    ):
        suite.refuse_unlearned(only, "shape")


def test_what_would_be_no_test_is_refused(folders, by_factor, tmp_path):
    learned, tested = folders
    with pytest.raises(ValueError, match=r"^test_activations: 60 of their pictures are learned from"):
        suite.tasks(tested, tested, PICTURES, "planted")
    with pytest.raises(ValueError, match=r"^test_activations: made with dataset"):
        suite.tasks(tested, learned, PICTURES, "planted")
    with pytest.raises(ValueError, match=r"^test_activations: made with model 'planted', here it is 'embedded'"):
        suite.tasks(learned, tested, PICTURES, "embedded")
    told = planted_pictures.fill(
        tmp_path / "told", planted_pictures.labels(9), prompt="a {shape}", dataset="world[train][0:9]", resolution=32
    )
    with pytest.raises(ValueError, match=r"^test_activations: not of the layers, or of another classes, prompt"):
        suite.tasks(told.url, tested, PICTURES, "planted")
    with pytest.raises(ValueError, match=r"^factors: unknown name 'size'"):
        suite.tasks(learned, tested, PICTURES, "planted", factors=["size"])
    with pytest.raises(ValueError, match=r"^diffc_layers: unknown name 'mid.\*'"):
        suite.tasks(learned, tested, PICTURES, "planted", diffc_layers=["mid.*"])
    for which, places in enumerate(((str(tmp_path), tested), (learned, str(tmp_path)))):
        with pytest.raises(ValueError, match=rf"^{('activations', 'test_activations')[which]}: .* is no store"):
            suite.tasks(*places, PICTURES, "planted")
    with pytest.raises(ValueError, match=r"^activations: no maps of 'mid.t25'"):
        suite.diffcs({"shape": by_factor["shape"]}, {"shape": ["mid.t25"]}, SMALL, tmp_path)
