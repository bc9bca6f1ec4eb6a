import io
from itertools import chain
from pathlib import Path
from types import SimpleNamespace

import datasets
import huggingface_hub
import numpy as np
import PIL.Image
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from helpers import picture_folder, pixels, png

from vaelab import data
from vaelab.data import images as images_module
from vaelab.data.images import load_images
from vaelab.data.transforms import preprocess


@pytest.fixture(autouse=True)
def offline(monkeypatch, tmp_path_factory):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)


def labelled(count, names=("cat", "dog")):
    features = datasets.Features(picture=datasets.Image(), kind=datasets.ClassLabel(names=list(names)))
    columns = {
        "picture": [{"bytes": png(i), "path": None} for i in range(count)],
        "kind": [i % len(names) for i in range(count)],
    }
    return datasets.Dataset.from_dict(columns, features=features)


def plain_parquet(path, **columns):
    pq.write_table(pa.table(columns), path)
    return str(path)


def of_file(index, resolution=16):
    return preprocess(PIL.Image.open(io.BytesIO(png(index))), resolution)


def test_folder_of_pictures(tmp_path):
    picture_folder(tmp_path, ["0.png", "1.png", "2.png"])
    images = load_images(str(tmp_path), resolution=16)
    assert len(images) == 3
    assert images.classes == []
    for index in range(3):
        assert images[index].keys() == {"pixels", "index"}
        torch.testing.assert_close(images[index]["pixels"], of_file(index))


def test_folder_with_splits_and_classes(tmp_path):
    picture_folder(tmp_path, ["train/cat/0.png", "train/dog/1.png", "train/dog/2.png", "test/cat/3.png"])
    learning, held_out = (load_images(str(tmp_path), split=split, resolution=16) for split in ("train", "test"))
    assert learning.classes == ["cat", "dog"]
    assert [learning[i]["label"] for i in range(3)] == [0, 1, 1]
    assert len(held_out) == 1
    torch.testing.assert_close(held_out[0]["pixels"], of_file(3))


def test_folder_with_brackets_and_plain_classes(tmp_path):
    folder = picture_folder(tmp_path / "photos [2020]", ["cat/0.png", "dog/1.png"])
    images = load_images(str(folder), resolution=16)
    assert [images[i]["label"] for i in range(2)] == [0, 1]


def test_relative_folder_is_found_from_the_notebooks(tmp_path, monkeypatch):
    picture_folder(tmp_path / "mine", ["0.png"])
    (tmp_path / "vaelab").mkdir()
    (tmp_path / "notebooks").mkdir()
    monkeypatch.chdir(tmp_path / "notebooks")
    assert len(load_images("mine", resolution=16)) == 1


def test_parquet_with_features(tmp_path):
    labelled(4).to_parquet(tmp_path / "some.parquet")
    images = load_images(str(tmp_path / "some.parquet"), split="validation", resolution=16)
    assert images.classes == ["cat", "dog"]
    assert [images[i]["label"] for i in range(4)] == [0, 1, 0, 1]
    torch.testing.assert_close(images[3]["pixels"], of_file(3))


def test_column_of_pictures_is_preferred_to_other_bytes(tmp_path):
    labelled(2).add_column("a", [b"12", b"34"]).select_columns(["a", "kind", "picture"]).to_parquet(
        tmp_path / "1.parquet"
    )
    assert load_images(str(tmp_path / "1.parquet"), resolution=16)[0]["label"] == 0
    shots = [{"bytes": png(i), "path": "x"} for i in (0, 1)]
    path = plain_parquet(tmp_path / "some.parquet", hash=[b"12", b"34"], row=[7, 8], shot=shots)
    images = load_images(path, resolution=16)
    assert "label" not in images[1]
    torch.testing.assert_close(images[1]["pixels"], of_file(1))


@pytest.mark.parametrize("kind", [pa.binary(), pa.large_binary()])
def test_parquet_with_plain_bytes(tmp_path, kind):
    path = plain_parquet(tmp_path / "some.parquet", number=[1, 2], data=pa.array([png(0), png(1)], kind))
    images = load_images(path, resolution=16)
    assert len(images) == 2
    torch.testing.assert_close(images[1]["pixels"], of_file(1))


def test_folder_of_parquet_files(tmp_path):
    labelled(4).to_parquet(tmp_path / "train-00000-of-00002.parquet")
    labelled(2).to_parquet(tmp_path / "train-00001-of-00002.parquet")
    labelled(3).to_parquet(tmp_path / "test-00000-of-00001.parquet")
    assert len(load_images(str(tmp_path), resolution=16)) == 6
    assert len(load_images(str(tmp_path), split="test", resolution=16)) == 3


def test_slice_of_a_split(tmp_path):
    picture_folder(tmp_path, [f"{i}.png" for i in range(4)])
    images = load_images(str(tmp_path), split="train[50%:]", resolution=16)
    assert len(images) == 2
    torch.testing.assert_close(images[0]["pixels"], of_file(2))


def test_first_class_label_is_the_label(tmp_path):
    rows = labelled(2).add_column("number", [5, 6]).add_column("text", ["a", "b"])
    rows.to_parquet(tmp_path / "some.parquet")
    images = load_images(str(tmp_path / "some.parquet"), resolution=16)
    assert images.classes == ["cat", "dog"]


def test_no_image_column_lists_the_columns(tmp_path):
    path = plain_parquet(tmp_path / "some.parquet", caption=["a"], width=[3])
    with pytest.raises(ValueError, match=r"^dataset: no image column in .*caption.*width"):
        load_images(path)


@pytest.mark.parametrize("name", ["some.parquet", "folder", "text", "sketch"])
def test_empty_data_set_is_refused(tmp_path, name):
    plain_parquet(tmp_path / "some.parquet", image=pa.array([], pa.binary()))
    (tmp_path / "folder").mkdir()
    for file in ("text/notes.txt", "sketch/drawing.pdf"):
        (tmp_path / file).parent.mkdir()
        (tmp_path / file).write_text("x")
    with pytest.raises(ValueError, match=f"^dataset: .*{name}"):
        load_images(str(tmp_path / name))


def test_a_revision_of_pictures_that_are_not_on_the_hub_is_refused(tmp_path):
    picture_folder(tmp_path, ["a.png"])
    for name in ("digits", str(tmp_path), f"digits+{tmp_path}"):
        with pytest.raises(ValueError, match=r"^revision: 'v2' was given for .*, which is not on the hub"):
            load_images(name, resolution=16, revision="v2")


def test_empty_slice_is_refused():
    with pytest.raises(ValueError, match="'digits' has no picture in its split 'train\\[:0\\]'"):
        load_images("digits", split="train[:0]")


def test_damaged_parquet_is_refused(tmp_path):
    (tmp_path / "some.parquet").write_bytes(b"PAR1 and no more")
    with pytest.raises(ValueError, match=r"^dataset: .*some.parquet"):
        load_images(str(tmp_path / "some.parquet"))


def test_picture_file_is_no_data_set(tmp_path):
    picture_folder(tmp_path, ["0.png"])
    with pytest.raises(ValueError, match=r"^dataset: .*no .parquet"):
        load_images(str(tmp_path / "0.png"))


@pytest.mark.parametrize("name", ["glyph", "glphs", "./glyps", ""])
def test_unknown_name_lists_the_nearest(name):
    with pytest.raises(ValueError, match=r"^dataset: .*photos, digits, glyphs.*did you mean '[a-z]"):
        load_images(name)


def test_nearest_name():
    with pytest.raises(ValueError, match="did you mean 'glyphs'"):
        load_images("glphs")


def test_unknown_split_lists_the_splits(tmp_path):
    picture_folder(tmp_path, ["train/0.png", "test/1.png"])
    for dataset in (str(tmp_path), "digits"):
        with pytest.raises(ValueError, match=r"^split .*'tset'.*test"):
            load_images(dataset, split="tset")


@pytest.mark.parametrize(
    ("name", "replacement"),
    [
        ("frgfm/imagenette", "refs/convert/parquet"),
        ("rcugarte/genfonts_data", "glyphs"),
        ("cifar10", "uoft-cs/cifar10"),
    ],
)
def test_moved_hub_id_is_named(name, replacement):
    with pytest.raises(ValueError, match=f"^dataset: '{name}'.*{replacement}"):
        load_images(name)


def test_hub_id_out_of_reach_is_one_error():
    with pytest.raises(ValueError, match=r"^dataset: 'nobody/nothing' could not be read from the hub"):
        load_images("nobody/nothing")


@pytest.mark.parametrize(
    ("name", "revision", "expected"),
    [
        ("owner/set", None, {"revision": None}),
        ("owner/set:small", "v2", {"revision": "v2", "name": "small"}),
        ("owner/set:small", "refs/convert/parquet", {"revision": "refs/convert/parquet", "data_dir": "small"}),
    ],
)
def test_hub_id_with_subset_and_revision(monkeypatch, name, revision, expected):
    asked = []

    def from_hub(path, **options):
        asked.append((path, options))
        return labelled(3)

    monkeypatch.setattr(datasets, "load_dataset", from_hub)
    assert len(load_images(name, split="test", revision=revision, resolution=16)) == 3
    assert asked == [("owner/set", {"split": "test", **expected})]


def test_the_download_of_a_data_set_is_announced_unless_it_is_prepared(monkeypatch, tmp_path):
    url, announced = "hf://datasets/owner/set@" + "a" * 40, []
    files = {"train": [f"{url}/small/train-0.parquet", f"{url}/small/train-1.parquet"], "test": [f"{url}/test.parquet"]}
    builder = SimpleNamespace(cache_dir=tmp_path / "prepared", config=SimpleNamespace(data_files=files))
    monkeypatch.setattr(datasets, "load_dataset_builder", lambda name, **options: builder)
    monkeypatch.setattr(datasets, "load_dataset", lambda *given, **options: labelled(3))
    monkeypatch.setattr(images_module.hub, "_describe", lambda *given: "a description")
    monkeypatch.setattr(images_module.hub, "announce_download", lambda *given, **options: announced.append(given))
    load_images("owner/set", resolution=16)
    # the library downloads all splits for one
    assert announced == [("owner/set", ["small/train-0.parquet", "small/train-1.parquet", "test.parquet"])]
    builder.cache_dir.mkdir()
    load_images("owner/set", resolution=16)
    assert len(announced) == 1


def test_a_hub_id_that_needs_a_script_names_the_way(monkeypatch):
    def refuse(*given, **options):
        raise RuntimeError("Dataset scripts are no longer supported, but found it.py")

    monkeypatch.setattr(datasets, "load_dataset", refuse)
    with pytest.raises(
        ValueError, match=r"^dataset: 'some/set' .*needs a loading script.*revision refs/convert/parquet"
    ):
        load_images("some/set")
    with pytest.raises(ValueError, match=r"^dataset: .*needs a loading script.*use a folder: .*metadata.csv"):
        load_images("HuggingFaceM4/FGVC-Aircraft")


def test_no_params_file_names_a_hub_id_that_needs_a_script():
    scripts = {"frgfm/imagenette": images_module.PARQUET_CONVERSION, "HuggingFaceM4/FGVC-Aircraft": None}
    files = sorted((Path(__file__).parents[2] / "params").glob("*/*.yaml"))
    named = [yaml.safe_load(file.read_text()) for file in files]
    named = [params for params in named if params.get("dataset", "").split(":")[0] in scripts]
    assert named
    for params in named:
        assert params["dataset_revision"] == scripts[params["dataset"].split(":")[0]]


@pytest.mark.parametrize(("split", "expected"), [("train+test", 5), ("train[:2]+test[1:]", 4)])
def test_labels_of_text_on_the_hub_are_those_of_all_splits(monkeypatch, split, expected):
    def part(labels):
        features = datasets.Features(image=datasets.Image(), label=datasets.Value("string"))
        rows = {"image": [{"bytes": png(i), "path": None} for i in range(len(labels))], "label": labels}
        return datasets.Dataset.from_dict(rows, features=features)

    parts = datasets.DatasetDict(train=part(["b", "c"]), test=part(["a", None, "b"]))
    monkeypatch.setattr(datasets, "load_dataset", lambda name, split=None, **options: parts[split] if split else parts)
    assert load_images("owner/set", resolution=16).classes == ["a", "b", "c"]
    images = load_images("owner/set", split=split, resolution=16)
    assert images.labels == [1, 2, 0, -1, 1][:2] + [0, -1, 1][5 - expected :]
    assert [item["label"] for item in images] == images.labels


@pytest.fixture
def with_broken(tmp_path):
    picture_folder(tmp_path, [f"{kind}/{i}.png" for i in range(3) for kind in ("cat", "dog")])
    (tmp_path / "cat" / "1.png").write_bytes(b"no picture")
    (tmp_path / "dog" / "0.png").write_bytes(png()[:100])
    return load_images(str(tmp_path), resolution=16)


def test_broken_picture_goes_with_its_label(with_broken):
    batches = list(with_broken.batches(2))
    assert [batch["index"].tolist() for batch in batches] == [[0], [2], [4, 5]]
    assert [batch["label"].tolist() for batch in batches] == [[0], [0], [1, 1]]
    assert [len(batch["pixels"]) for batch in batches] == [1, 1, 2]


def test_broken_pictures_are_counted_once_and_reported(with_broken):
    assert "every picture" in with_broken.report()
    for _ in range(2):
        list(with_broken.batches(4))
    assert sorted(with_broken.skipped) == [1, 3]
    assert "2 skipped as unreadable, first row 1 (cannot identify" in with_broken.report()
    assert with_broken[3] is None
    assert with_broken[4]["label"] == 1


def test_row_without_a_picture_is_skipped(tmp_path):
    path = plain_parquet(tmp_path / "some.parquet", image=[png(0), None, png(2)])
    images = load_images(path, resolution=16)
    assert [batch["index"].tolist() for batch in images.batches(3)] == [[0, 2]]
    assert images.skipped == {1: "the row holds NoneType, not a picture"}


@pytest.mark.filterwarnings("ignore:.*(Tag data|EXIF|Truncated File)")
def test_damaged_files_never_stop_a_run(tmp_path):
    rng = np.random.default_rng(0)
    rows = []
    for kind in ("PNG", "JPEG", "GIF", "WEBP", "TIFF", "BMP"):
        buffer = io.BytesIO()
        PIL.Image.fromarray(pixels(1, (24, 18))).save(buffer, kind)
        for _ in range(25):
            damaged = bytearray(buffer.getvalue()[: rng.integers(1, buffer.tell())])
            damaged[rng.integers(len(damaged))] ^= 0xFF
            rows.append({"bytes": bytes(damaged), "path": None})
    rows.append({"bytes": buffer.getvalue(), "path": None})
    images = load_images(plain_parquet(tmp_path / "damaged.parquet", image=rows), resolution=16)
    read = sum(len(batch["pixels"]) for batch in images.batches(16))
    assert read + len(images.skipped) == len(rows)
    assert len(images.skipped) > len(rows) / 2


def test_decoder_that_gives_up_is_a_broken_picture(monkeypatch):
    def give_up(source):
        raise RuntimeError("Failed to decode image")

    images = load_images("digits", split="test[:2]", resolution=16)
    monkeypatch.setattr(PIL.Image, "open", give_up)
    assert images[0] is None
    assert images.skipped == {0: "Failed to decode image"}


def test_sum_of_data_sets(tmp_path):
    picture_folder(tmp_path, ["cat/0.png", "dog/1.png"])
    images = load_images(f"digits+{tmp_path}", split="train", resolution=16)
    digits = load_images("digits", resolution=16)
    assert len(images) == len(digits) + 2
    assert images.classes == []
    assert torch.equal(images[5]["pixels"], digits[5]["pixels"])
    torch.testing.assert_close(images[len(digits) + 1]["pixels"], of_file(1))


def test_max_images_is_fixed_by_its_seed():
    def indices(**options):
        return load_images("digits", resolution=16, **options).stack()

    first = indices(max_images=9, seed=3)
    assert len(first) == 9
    assert torch.equal(first, indices(max_images=9, seed=3))
    assert not torch.equal(first, indices(max_images=9, seed=4))


def test_drawn_pictures_are_different_rows_of_the_whole():
    whole = {picture.numpy().tobytes() for picture in load_images("glyphs", split="test", resolution=16).stack()}
    drawn = [
        picture.numpy().tobytes()
        for picture in load_images("glyphs", split="test", resolution=16, max_images=50).stack()
    ]
    assert len(set(drawn)) == 50
    assert set(drawn) <= whole


def test_name_contains_how_the_pictures_were_drawn():
    names = [
        load_images("digits", max_images=count, seed=seed).name for count, seed in ((0, 0), (9, 0), (9, 1), (10**6, 1))
    ]
    assert names[0] == names[3] == "digits[train]"
    assert len(set(names)) == 3


@pytest.mark.parametrize("options", [{"resolution": 4}, {"max_images": -1}])
def test_bad_number_is_refused_by_name(options):
    with pytest.raises(ValueError, match=f"^{next(iter(options))}:"):
        load_images("digits", **options)


def test_batch_size_of_nothing_is_refused():
    images = load_images("digits", split="test[:4]", resolution=16)
    with pytest.raises(ValueError, match=r"^batch_size:"):
        next(images.batches(0))
    with pytest.raises(ValueError, match=r"^batch_size:"):
        images.shuffled(0, seed=0)


def first_batches(images, count, *, batch_size=4, seed=0, **options):
    stream = images.shuffled(batch_size, seed)(**options)
    return [next(stream)["index"].tolist() for _ in range(count)]


@pytest.fixture
def twelve():
    return load_images("digits", split="test[:12]", resolution=16)


def test_shuffled_gives_every_picture_once_an_epoch(twelve):
    batches = first_batches(twelve, 6)
    epochs = [[*chain(*batches[:3])], [*chain(*batches[3:])]]
    assert [sorted(epoch) for epoch in epochs] == [list(range(12))] * 2
    assert epochs[0] != epochs[1]
    assert epochs[0] != list(range(12))


def test_shuffled_is_fixed_by_its_seed(twelve):
    assert first_batches(twelve, 4) == first_batches(twelve, 4)
    assert first_batches(twelve, 4) != first_batches(twelve, 4, seed=1)


@pytest.mark.parametrize("start", [1, 3, 5])
def test_shuffled_can_be_resumed_at_any_batch(twelve, start):
    assert first_batches(twelve, 7 - start, start=start) == first_batches(twelve, 7)[start:]


def test_two_ranks_share_an_epoch(twelve):
    ranks = [first_batches(twelve, 4, batch_size=3, rank=rank, world=2) for rank in (0, 1)]
    for epoch in (slice(0, 2), slice(2, 4)):
        first, second = (set(chain(*rank[epoch])) for rank in ranks)
        assert first.isdisjoint(second)
        assert first | second == set(range(12))


def test_batch_larger_than_the_data_set_holds_all_pictures(twelve):
    assert [sorted(batch) for batch in first_batches(twelve, 2, batch_size=100)] == [list(range(12))] * 2


def test_batch_that_cannot_be_read_at_all_is_an_error(tmp_path):
    path = plain_parquet(tmp_path / "some.parquet", image=[b"1", b"2"])
    images = load_images(path, resolution=16)
    with pytest.raises(ValueError, match=r"whole batch .* cannot be read.*2 skipped"):
        next(images.shuffled(2, seed=0)())
    with pytest.raises(ValueError, match=r"no picture of .* can be read"):
        images.stack()


def test_stack_leaves_out_broken_pictures(with_broken):
    assert torch.equal(with_broken.stack(2), torch.stack([with_broken[i]["pixels"] for i in (0, 2)]))
    assert len(with_broken.stack()) == 4


def test_pair_of_the_same_pictures_is_refused(tmp_path):
    options = {"max_images": 4, "eval_images": 3, "resolution": 16}
    labelled(8).to_parquet(tmp_path / "some.parquet")
    learning, held_out = data.load_pair(str(tmp_path / "some.parquet"), "train[:50%]", "train[50%:]", **options)
    assert (len(learning), len(held_out)) == (4, 3)
    for dataset, split, eval_split in (
        ("digits", "train", "train"),
        (str(tmp_path / "some.parquet"), "train", "test"),
    ):
        with pytest.raises(ValueError, match=r"^eval_split:"):
            data.load_pair(dataset, split, eval_split, **options)


def test_picture_takes_the_next_readable_one_or_is_refused(tmp_path):
    for name in ("a", "c"):
        (tmp_path / f"{name}.png").write_bytes(b"no picture")
    PIL.Image.new("RGB", (20, 20), "red").save(tmp_path / "b.png")
    images = data.load_images(str(tmp_path), resolution=16)
    assert torch.equal(images.picture(0), images.picture(1))
    with pytest.raises(ValueError, match=r"picture: .* has pictures 0 to 2, got 3"):
        images.picture(3)
    with pytest.raises(ValueError, match=r"picture: none of .* from 2 on can be read"):
        images.picture(2)


def test_data_set_without_a_readable_picture_is_refused(tmp_path):
    (tmp_path / "a.png").write_bytes(b"no picture")
    with pytest.raises(ValueError, match="dataset: no picture can be read"):
        list(data.load_images(str(tmp_path), resolution=16).batches(4))


def test_a_plus_in_a_folders_name_is_no_sum(tmp_path):
    (tmp_path / "a+b").mkdir()
    PIL.Image.new("RGB", (20, 20), "red").save(tmp_path / "a+b" / "a.png")
    assert len(data.load_images(str(tmp_path / "a+b"), resolution=16)) == 1


def test_a_withheld_label_is_minus_one(tmp_path):
    features = datasets.Features(image=datasets.Image(), label=datasets.ClassLabel(names=["x"]))
    rows = {"image": [{"bytes": png(), "path": None}] * 2, "label": [0, None]}
    datasets.Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "withheld.parquet")
    images = load_images(str(tmp_path / "withheld.parquet"), resolution=16)
    assert next(images.batches(2))["label"].tolist() == [0, -1] == images.labels
