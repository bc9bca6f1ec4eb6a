from dataclasses import replace

import pandas as pd
import planted_pictures
import pytest
import torch

from vaelab import readout
from vaelab.blocks import blocks
from vaelab.diffc import DiffC, DiffCConfig, classify
from vaelab.diffusion_classifier import DiffusionClassifier, Stages
from vaelab.labelled import Picture, Pictures
from vaelab.probe import score

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
    return readout.tasks(*folders, PICTURES, "planted", share=0.25)


def test_parts_are_disjoint_and_the_same_for_every_factor(by_factor):
    items = {factor: [part.items for part in task] for factor, task in by_factor.items()}
    assert items["shape"] == items["colour"]
    learn, validate, test = items["shape"]
    assert (len(learn), len(validate), len(test)) == (68, 22, 60)
    assert not {one for views in learn for one in views} & {one for views in validate for one in views}


def test_probes_and_diffcs_read_what_is_planted(by_factor, tmp_path):
    probed = readout.probes(by_factor).set_index("factor")
    assert probed.loc["shape", "accuracy"] > 0.95 and probed["layer"].tolist() == [LAYER] * 2
    assert probed.loc["colour", "low"] < 0.55 < probed.loc["colour", "high"] + 0.1
    wide = readout.map_of(probed.reset_index())
    assert wide.loc[LAYER, "shape"] == probed.loc["shape", "accuracy"]
    assert wide.loc["chance"].tolist() == probed.loc[["shape", "colour"], "chance"].tolist()
    rows, models = readout.diffcs({"shape": by_factor["shape"]}, {"shape": [LAYER]}, SMALL, tmp_path)
    row, task = rows.iloc[0], by_factor["shape"]
    again = score(classify(models[LAYER, "shape"], task.test, LAYER + ".maps"), task.test.labels, task.learn.labels)
    assert (row["accuracy"], row["low"], row["high"], row["chance"], row["count"]) == again
    assert row["accuracy"] > 0.9 and (row["classifier"], row["layer"]) == ("diffc", LAYER)


def test_the_best_layer_is_that_of_the_validation_pictures():
    rows = pd.DataFrame({"layer": ["a", "b", "a", "b"], "factor": ["x", "x", "y", "y"],
                         "validation": [0.5, 0.6, 0.9, 0.1], "accuracy": [0.9, 0.1, 0.1, 0.9]})  # fmt: skip
    assert (readout.best(rows, "x"), readout.best(rows, "y")) == ("b", "a")


def test_the_zero_shot_classifier_and_diffc_are_scored_and_timed_on_the_same_pictures(small_pipeline, by_factor):
    pipeline, generator = small_pipeline("sd"), torch.Generator().manual_seed(0)
    pixels = [torch.rand(3, 32, 32, generator=generator) * 2 - 1 for _ in range(3)]
    shown = replace(PICTURES, rows=range(3), read=lambda i: None if i == 1 else (pixels[i], {"colour": i % 2}))
    classifier = DiffusionClassifier(pipeline, ["a red thing", "a blue thing"], Stages((2,), (1,)))
    model = DiffC(blocks(pipeline)["up_ft0"].shape[-1], 2, width=4)
    own = {"layer": "up_ft0.t25", "factor": "colour", "classifier": "diffc", "accuracy": 0.7, "low": 0.6, "high": 0.8,
           "chance": 0.5, "count": 60, "validation": 0.7, "chosen": 3}  # fmt: skip
    given = pd.DataFrame([own]), {("up_ft0.t25", "colour"): model}
    compared = readout.side_by_side(classifier, *given, shown, by_factor["colour"], "colour", 9)
    first, second = compared.to_dict("records")
    alone = [classifier.classify(pixels[i][None])[0].chosen for i in (0, 2)]
    assert first["accuracy"] == sum(chosen == 0 for chosen in alone) / 2 and first["count"] == 2
    assert (first["passes"], second["passes"], second["accuracy"]) == (4, 1, 0.7)
    named = readout.metrics(given[0], compared)
    assert named["up_ft0.t25.diffc.colour.accuracy"] == 0.7 and named["up_ft0.t25.diffc.colour.chance"] == 0.5
    assert named["diffusion_classifier.accuracy"] == first["accuracy"]
    seconds = named["diffusion_classifier.seconds_per_image"], named["diffc.seconds_per_image"]
    assert min(seconds) > 0 and named["diffusion_classifier.times_diffc"] == seconds[0] / seconds[1]


def test_each_picture_is_timed_once_by_itself_after_one_that_is_not():
    shown = [Picture(i, torch.full((3, 2, 2), float(i)), {}) for i in range(4)]
    seen = []
    answers, seconds = readout.timed(lambda pixels: seen.append(pixels.flatten()[0].item()) or pixels.shape, shown)
    assert seen == [0, 0, 1, 2, 3] and answers == [(1, 3, 2, 2)] * 4 and seconds >= 0


def test_what_would_be_no_test_is_refused(folders, by_factor, tmp_path):
    learned, tested = folders
    with pytest.raises(ValueError, match=r"^test_activations: 60 of their pictures are learned from"):
        readout.tasks(tested, tested, PICTURES, "planted")
    with pytest.raises(ValueError, match=r"^test_activations: made with dataset"):
        readout.tasks(tested, learned, PICTURES, "planted")
    with pytest.raises(ValueError, match=r"^test_activations: made with model 'planted', here it is 'embedded'"):
        readout.tasks(learned, tested, PICTURES, "embedded")
    told = planted_pictures.fill(
        tmp_path / "told", planted_pictures.labels(9), prompt="a {shape}", dataset="world[train][0:9]", resolution=32
    )
    with pytest.raises(ValueError, match=r"^test_activations: not of the layers, or of another classes, prompt"):
        readout.tasks(told.url, tested, PICTURES, "planted")
    with pytest.raises(ValueError, match=r"^factors: unknown name 'size'"):
        readout.tasks(learned, tested, PICTURES, "planted", factors=["size"])
    with pytest.raises(ValueError, match=r"^activations: no maps of 'mid.t25'"):
        readout.diffcs({"shape": by_factor["shape"]}, {"shape": ["mid.t25"]}, SMALL, tmp_path)
