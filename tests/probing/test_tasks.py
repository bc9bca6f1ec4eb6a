from types import SimpleNamespace

import numpy as np
import planted_pictures
import pytest
from helpers import picture_folder

from vaelab.data.labelled import LabelledPictures, load_labelled
from vaelab.probing import classifiers, layer_features, tasks
from vaelab.probing.diffc import DiffCConfig
from vaelab.probing.tasks import build_tasks, find_duplicates

MODEL = {"model": "planted"}
PICTURES = LabelledPictures("world[train][90:150]", 32, planted_pictures.CLASSES, range(60), lambda image: None)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Two slices of one data set: 90 pictures, and the 60 that follow."""
    place = tmp_path_factory.mktemp("tasks")
    for seed, (begin, end) in enumerate(((0, 90), (90, 150))):
        planted_pictures.fill(
            place / str(seed), planted_pictures.labels(end - begin, seed), seed=seed, images=list(range(begin, end)),
            dataset=f"world[train][{begin}:{end}]", resolution=32,
        )  # fmt: skip
    return str(place / "0"), str(place / "1")


@pytest.fixture(scope="module")
def by_factor(folders):
    return build_tasks(*folders, PICTURES, MODEL, validation_share=0.25)


def test_parts_are_disjoint_and_the_same_for_every_factor(by_factor):
    items = {factor: [part.items for part in task] for factor, task in by_factor.items()}
    assert items["shape"] == items["colour"]
    training, validation, test = items["shape"]
    assert (len(training), len(validation), len(test)) == (68, 22, 60)
    assert not {one for views in training for one in views} & {one for views in validation for one in views}


def test_classes_that_are_tested_and_never_learned_are_refused(by_factor):
    task = by_factor["shape"]
    stars = task.training.labels == 2
    sorted_by_class = task._replace(training=task.training.take((~stars).nonzero().flatten().numpy()))
    tasks.require_known_classes(sorted_by_class, "shape")  # of a third of the pictures nothing is learned
    only = sorted_by_class._replace(test=task.test.take((task.test.labels == 2).nonzero().flatten().numpy()))
    with pytest.raises(
        ValueError, match=r"^test_activations: (\d+) of \1 pictures have a shape that no training picture has"
    ):
        tasks.require_known_classes(only, "shape")


def test_what_would_be_no_test_is_refused(folders, by_factor, tmp_path):
    learned, tested = folders
    with pytest.raises(ValueError, match=r"^test_activations: 60 of their 60 pictures are also training pictures"):
        build_tasks(tested, tested, PICTURES, MODEL)
    with pytest.raises(ValueError, match=r"^test_activations: made with dataset"):
        build_tasks(tested, learned, PICTURES, MODEL)
    with pytest.raises(ValueError, match=r"^model: 'embedded', but test_activations was made with 'planted'"):
        build_tasks(learned, tested, PICTURES, {"model": "embedded"})
    options = planted_pictures.fill(
        tmp_path / "options", planted_pictures.labels(9), prompt="a {shape}", dataset="world[train][0:9]", resolution=32
    )
    with pytest.raises(ValueError, match=r"^test_activations: made with prompt '', activations with 'a .shape.'"):
        build_tasks(options.url, tested, PICTURES, MODEL)
    with pytest.raises(ValueError, match=r"^factors: unknown name 'size'"):
        build_tasks(learned, tested, PICTURES, MODEL, factors=["size"])
    with pytest.raises(ValueError, match=r"^diffc_layers: unknown name 'mid.\*'"):
        build_tasks(learned, tested, PICTURES, MODEL, diffc_layers=["mid.*"])
    for which, places in enumerate(((str(tmp_path), tested), (learned, str(tmp_path)))):
        with pytest.raises(
            ValueError, match=rf"^{('activations', 'test_activations')[which]}: .* is not a readable store"
        ):
            build_tasks(*places, PICTURES, MODEL)
    with pytest.raises(ValueError, match=r"^activations: no maps of 'mid.t25'"):
        classifiers.train_diffcs(
            {"shape": by_factor["shape"]}, {"shape": ["mid.t25"]}, DiffCConfig(device="cpu"), tmp_path
        )


def test_one_store_is_split_by_class_and_equal_pictures_stay_together(tmp_path, capsys):
    truth = [{"shape": number % 3, "colour": number % 2} for number in range(60)]
    stored = planted_pictures.fill(tmp_path / "one", truth)
    made = tasks.split_tasks(stored, ["shape"], test_share=0.25, validation_share=0.25, seed=1)["shape"]
    parts = [{views[0] for views in part.items} for part in made]
    assert set.union(*parts) == set(range(60)) and sum(map(len, parts)) == 60
    assert len(made.test) == 15 and set(made.test.labels.tolist()) == {0, 1, 2}
    labels, pairs = made.test.labels.numpy()[:1].repeat(60), [number // 2 for number in range(60)]
    for part in tasks._stratified(np.arange(60), labels, pairs, 0.25, 0, "test_share"):
        assert len(part) in (16, 44) and all(number ^ 1 in part for number in part)
    assert "split by seed 1" in capsys.readouterr().out
    again = tasks.split_tasks(stored, ["shape"], test_share=0.25, validation_share=0.25, seed=1)["shape"]
    assert again.test.items == made.test.items
    with pytest.raises(ValueError, match=r"^test_share: 0.0 of 60 pictures"):
        tasks.split_tasks(stored, test_share=0.0)


def test_classes_without_training_pictures_are_named(by_factor, capsys):
    task = by_factor["shape"]
    without = task._replace(training=task.training.take((task.training.labels != 2).nonzero().flatten().numpy()))
    tasks.require_known_classes(without, "shape")
    count = int((task.test.labels == 2).sum())
    assert (
        f"shape: {count} of 60 test pictures are of 1 classes that no training picture has" in capsys.readouterr().out
    )


def made_of(dataset, digests, images=None):
    items = [
        {"image": image, "view": 0, "digest": text}
        for image, text in zip(images or range(len(digests)), digests, strict=True)
    ]
    return SimpleNamespace(settings={"dataset": dataset}, items=items)


def test_the_same_pictures_under_other_numbers_names_or_splits_are_found():
    """A number is a place in a drawn selection, so other selections may hold the same picture under another one."""
    first = made_of("pets[train[0:100]]", [str(i) for i in range(100)])
    for name in ("pets[train[90:190]]", "pets[train], 100 drawn by seed 3"):
        with pytest.raises(ValueError, match=r"^test_activations: 10 of their 100 pictures are also training pictures"):
            find_duplicates(first, made_of(name, [str(i) for i in range(90, 190)]))
    copied = made_of("folder/of/copies[test]", [str(i) for i in range(90, 190)])
    with pytest.raises(ValueError, match=r"^test_activations: 10 of their 100 pictures"):
        find_duplicates(first, copied)
    assert not find_duplicates(first, made_of("pets[test]", [str(i) for i in range(100, 200)]))
    assert not find_duplicates(made_of("world[train][0:9]", list("abc")), made_of("world[test][0:9]", list("def")))
    with pytest.raises(ValueError, match=r"^test_activations: 1 of their 100 pictures are also training pictures"):
        numbers = [str(i) for i in range(100, 200)]
        find_duplicates(
            made_of("world[train][0:9]", list("abcdefghi")), made_of("world[train][8:108]", numbers, range(8, 108))
        )


def test_test_pictures_that_equal_a_training_picture_are_left_out(tmp_path, capsys):
    """Three of the 60 test pictures get the content of a training picture."""
    digests = {image: f"content {image}" for image in range(150)}
    duplicates = {100: digests[10], 101: digests[11], 140: digests[11]}
    stores = [
        planted_pictures.fill(
            tmp_path / str(begin), planted_pictures.labels(end - begin, begin), images=list(range(begin, end)),
            digests=digests | duplicates, dataset=f"world[train][{begin}:{end}]", resolution=32,
        )
        for begin, end in ((0, 90), (90, 150))
    ]  # fmt: skip
    built = build_tasks(*(each.url for each in stores), PICTURES, MODEL, validation_share=0.25)
    assert "3 of 60 test pictures equal a training picture and are left out of the test" in capsys.readouterr().out
    truth = planted_pictures.labels(60, 90)
    for factor, task in built.items():
        assert task.test.images() == [image for image in range(90, 150) if image not in duplicates]
        assert task.test.labels.tolist() == [truth[image - 90][factor] for image in task.test.images()]


def test_the_same_files_in_another_folder_are_found(small_pipeline, tmp_path):
    """Two folders with the same three pictures, loaded and collected; the second has one more."""
    picture_folder(tmp_path / "a", [f"{kind}/{i}.png" for kind in ("cat", "dog") for i in range(3)])
    picture_folder(tmp_path / "b", [f"{kind}/{i}.png" for kind in ("cat", "dog") for i in range(3)])
    config = layer_features.LayerConfig(("bottleneck",), (25,), precision="float32")
    stores = [
        layer_features.collect_layer_features(
            small_pipeline("sd"), load_labelled(str(tmp_path / name), resolution=32), config, tmp_path / f"store-{name}"
        )
        for name in "ab"
    ]
    assert [item["digest"] for item in stores[0].items] == [item["digest"] for item in stores[1].items]
    with pytest.raises(ValueError, match=r"^test_activations: 6 of their 6 pictures are also training pictures"):
        find_duplicates(*stores)


def test_a_store_of_the_same_model_in_another_precision_is_refused(folders):
    """Both stores must have every setting that identifies the model."""
    with pytest.raises(ValueError, match=r"^test_activations: made with precision None, here it is 'float16'"):
        build_tasks(*folders, PICTURES, {**MODEL, "precision": "float16"})
