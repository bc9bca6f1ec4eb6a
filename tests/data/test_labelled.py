import json
from dataclasses import replace

import datasets
import numpy as np
import pytest
import torch
from helpers import picture_folder, png

from vaelab import world
from vaelab.data.images import shared_pictures
from vaelab.data.labelled import LabelledPictures, crop_and_flip, load_labelled, validate_classes


def test_the_worlds_scenes_of_one_thing_have_every_factor():
    pictures = load_labelled("world", split="train[2:6]", resolution=64)
    assert len(pictures) == 4 and pictures.name == "world[train][2:6]"
    alone = [seed for seed in range(100) if len(world.sample(seed, "train").things) == 1]
    assert list(pictures.numbers) == alone[2:6]
    assert pictures.classes.keys() == world.FACTORS.keys()
    for place, seed in enumerate(pictures.numbers):
        picture, scene = pictures[place], world.sample(seed, "train")
        named = pictures.class_names(picture.labels)
        thing = scene.things[0]
        assert (named["shape"], named["colour"], named["size"], named["position"]) == (
            thing.shape, thing.colour, thing.size, thing.position,
        )  # fmt: skip
        assert (named["texture"], named["ground"]) == (scene.texture, scene.ground)
        torch.testing.assert_close(picture.pixels, world.render([scene])[0], atol=1 / 127, rtol=0)


def test_masks_exist_for_the_world_alone():
    pictures = load_labelled("world", split="test", resolution=32, max_images=3)
    masks = pictures.masks(pictures.numbers)
    assert masks.shape == (3, 64, 64) and masks.dtype == torch.bool
    for seed, mask in zip(pictures.numbers, masks, strict=True):
        (thing,) = world.sample(seed, "test").things
        assert torch.equal(mask, torch.from_numpy(thing.coverage() >= 0.5))
    assert load_labelled("digits", split="test", resolution=8, max_images=2).masks([0]) is None


def test_slices_of_the_world_are_disjoint_and_can_be_cut_short():
    first, rest = load_labelled("world", split="train[:3]"), load_labelled("world", split="train[3:]", max_images=2)
    both = load_labelled("world", max_images=5)
    assert [*first.numbers, *rest.numbers] == list(both.numbers)
    assert len(load_labelled("world", split="test[0:9]", max_images=4)) == 4
    assert load_labelled("world", resolution=32, max_images=1)[0].pixels.shape == (3, 32, 32)


@pytest.mark.parametrize(
    ("given", "message"),
    [({}, "max_images: the world has no end"), ({"split": "train[5:]"}, "max_images: "),
     ({"split": "train[5:5]"}, r"split: 'train\[5:5\]' holds no picture"), ({"split": "trian[0:5]"}, "split .*train"),
     ({"split": "[0:5]"}, "split "), ({"resolution": 4, "max_images": 1}, "resolution: ")],
)  # fmt: skip
def test_splits_that_the_world_has_not_are_refused(given, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        load_labelled("world", **given)


def test_a_folder_of_classes_and_a_picture_that_cannot_be_read(tmp_path):
    picture_folder(tmp_path, [f"{kind}/{i}.png" for kind in ("cat", "dog") for i in range(3)])
    (tmp_path / "cat" / "1.png").write_bytes(b"no picture")
    pictures = load_labelled(str(tmp_path), resolution=16)
    assert pictures.classes == {"label": ["cat", "dog"]}
    read = [pictures[i] for i in range(6)]
    assert read[1] is None
    assert [picture.labels["label"] for picture in read if picture] == [0, 0, 1, 1, 1]
    assert pictures.class_names({"label": -1}) == {}
    assert torch.equal(pictures.stack([4, 0]), torch.stack([read[4].pixels, read[0].pixels]))


def test_transparent_and_deep_grey_pixels_become_what_the_options_say(tmp_path):
    import PIL.Image

    for name in ("cat", "dog"):
        (tmp_path / name).mkdir()
    PIL.Image.new("RGBA", (16, 16), (255, 0, 0, 0)).save(tmp_path / "cat" / "0.png")
    PIL.Image.fromarray(np.full((16, 16), 30000, np.uint16)).save(tmp_path / "dog" / "1.png")
    for background, white_level, shown in (("white", None, (1, -1 + 60000 / 65535)), ("black", 40000.0, (-1, 0.5))):
        pictures = load_labelled(str(tmp_path), resolution=8, background=background, white_level=white_level)
        for number, value in enumerate(shown):
            torch.testing.assert_close(pictures[number].pixels, torch.full((3, 8, 8), float(value)), rtol=0, atol=1e-2)
    with pytest.raises(ValueError, match=r"^background: 'whit' is no colour"):
        load_labelled(str(tmp_path), resolution=8, background="whit")


def test_a_data_set_without_labels_has_no_classes(tmp_path):
    folder = str(picture_folder(tmp_path, ["a.png", "b.png"]))
    pictures = load_labelled(folder, resolution=16, labels=False)
    assert pictures.classes == {} and pictures[0].labels == {}
    with pytest.raises(ValueError, match=r"^dataset: .* has no labels; expected a column of labels"):
        load_labelled(folder, resolution=16)


def test_labels_that_are_whole_numbers_are_classes_without_class_labels(tmp_path):
    pictures = [{"path": None, "bytes": png(i)} for i in range(3)]
    rows = datasets.Dataset.from_dict({"image": pictures, "label": [10, 9, 9]})
    rows.cast_column("image", datasets.Image()).to_parquet(tmp_path / "plain.parquet")
    pictures = load_labelled(str(tmp_path / "plain.parquet"), resolution=16)
    assert pictures.classes == {"label": ["9", "10"]}
    assert [picture.labels["label"] for picture in pictures] == [1, 0, 0]


def test_one_of_several_label_columns_is_chosen_by_name(tmp_path):
    levels = [datasets.ClassLabel(names=names) for names in (["737", "A320"], ["Airbus", "Boeing"])]
    features = datasets.Features(image=datasets.Image(), family=levels[0], manufacturer=levels[1])
    columns = {"image": [{"bytes": png(i), "path": None} for i in range(2)], "family": [0, 1], "manufacturer": [1, 0]}
    datasets.Dataset.from_dict(columns, features=features).to_parquet(tmp_path / "aircraft.parquet")
    dataset = str(tmp_path / "aircraft.parquet")
    with pytest.raises(ValueError, match=r"^label_column: .*aircraft.parquet' needs one of family, manufacturer"):
        load_labelled(dataset, resolution=16)
    assert load_labelled(dataset, resolution=16, labels=False).classes == {}
    pictures = load_labelled(dataset, resolution=16, label_column="manufacturer")
    assert pictures.classes == {"label": ["Airbus", "Boeing"]}
    assert [picture.labels["label"] for picture in pictures] == [1, 0]
    with pytest.raises(ValueError, match=r"^label_column .*unknown name 'familly'; the nearest of 2: family"):
        load_labelled(dataset, resolution=16, label_column="familly")
    with pytest.raises(ValueError, match=r"^label_column: the world has no columns"):
        load_labelled("world", max_images=2, label_column="shape")
    with pytest.raises(ValueError, match=r"^revision: 'v2' was given for the world"):
        load_labelled("world", max_images=2, revision="v2")


@pytest.mark.parametrize(
    ("dataset", "split", "other", "shared"),
    [("world", "train[0:6]", "train[4:9]", 2), ("world", "train[0:6]", "test[4:9]", 0),
     ("digits", "test[:60%]", "test[40%:]", 59), ("digits", "test[:50%]", "test[50%:]", 0)],
)  # fmt: skip
def test_what_two_splits_have_in_common_is_counted(dataset, split, other, shared):
    first, second = (load_labelled(dataset, split=name, resolution=8) for name in (split, other))
    assert shared_pictures(first.source, second.source) == shared
    assert shared_pictures(json.loads(json.dumps(first.source)), first.source) == len(first)


def test_classes_are_known_before_a_picture_is_read(tmp_path):
    folder = str(picture_folder(tmp_path, [f"{kind}/{i}.png" for kind in ("cat", "dog") for i in range(3)]))
    for pictures in (load_labelled("world", max_images=6), load_labelled(folder, resolution=8)):
        labels = [picture.labels for picture in pictures]
        assert pictures.read_labels() == {factor: [label[factor] for label in labels] for factor in pictures.classes}
    flat = str(picture_folder(tmp_path / "flat", ["a.png"]))
    assert load_labelled(flat, resolution=8, labels=False).read_labels is None


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([0, -1, 1], "split: 1 of 3 pictures of 'p' have no label"),
        ([1, 1, 1], r"dataset: 'p' has 3 pictures of 1 classes \(label\)"),
        ([0, 2, 1], r"dataset: 'p' has 3 pictures of 3 classes \(label\); expected .* more pictures than classes"),
    ],
)
def test_classes_that_cannot_be_learned_are_refused(labels, message):
    pictures = LabelledPictures("p", 8, {"label": ["a", "b", "c"]}, range(3), lambda i: None)
    validate_classes(pictures)
    validate_classes(replace(pictures, read_labels=lambda: {"label": [0, 1, 1]}))
    with pytest.raises(ValueError, match=f"^{message}"):
        validate_classes(replace(pictures, read_labels=lambda: {"label": labels}))


def test_a_crop_is_a_square_of_the_picture_brought_back_to_its_size():
    ramp = torch.linspace(-1, 1, 32)[None, None].expand(3, 32, 32).contiguous()
    seen = [crop_and_flip(ramp, np.random.default_rng(seed), 0.5, True) for seed in range(30)]
    directions = {bool(one[0, 0, -1] > one[0, 0, 0]) for one in seen}
    assert directions == {True, False}
    spans = [float((one[0, 0, -1] - one[0, 0, 0]).abs()) for one in seen]
    assert 0.8 < min(spans) < 1.3 < max(spans) < 2.01 and all(one.shape == ramp.shape for one in seen)
    assert all(crop_and_flip(ramp, np.random.default_rng(s), 0.5, False)[0, 0].diff().min() >= -1e-6 for s in range(9))
    assert torch.equal(crop_and_flip(ramp, np.random.default_rng(0), 1.0, False), ramp)
