"""What is loaded is what the user sees in the folder, counted and said."""

import io
import json
import os

import datasets
import numpy as np
import PIL.Image
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from helpers import picture_folder, pixels, png

from vaelab.data import load_pair
from vaelab.data.images import load_images
from vaelab.data.transforms import preprocess


@pytest.fixture(autouse=True)
def own_cache(monkeypatch, tmp_path_factory):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


def load(folder, split="train", **options):
    return load_images(str(folder), split=split, resolution=16, **options)


def of_file(index):
    return preprocess(PIL.Image.fromarray(pixels(index)), 16)


def write_metadata(folder, kind, rows):
    if kind == "csv":
        lines = [",".join(rows[0])] + [",".join(map(str, row.values())) for row in rows]
        (folder / "metadata.csv").write_text("\n".join(lines) + "\n")
    elif kind == "jsonl":
        (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        pq.write_table(pa.Table.from_pylist(rows), folder / "metadata.parquet")


@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet"])
@pytest.mark.parametrize(("labels", "classes"), [(("dog", "NA", "dog"), ["NA", "dog"]), ((10, 9, 10), ["9", "10"])])
def test_metadata_beside_pictures_gives_their_classes(tmp_path, kind, labels, classes):
    picture_folder(tmp_path, ["a.png", "b.png", "deep/c.png"])
    names = ("deep/c.png", "a.png", "b.png")
    rows = [{"file_name": name, "label": label} for name, label in zip(names, labels, strict=True)]
    write_metadata(tmp_path, kind, rows)
    images = load(tmp_path)
    assert images.classes == classes
    assert images.labels == [0, 1, 1]  # a, b, deep/c
    torch.testing.assert_close(images[2]["pixels"], of_file(2))
    assert "3 pictures of 2 classes (label)" in images.summary


def test_what_the_metadata_leaves_out_is_counted_and_said(tmp_path, capsys):
    picture_folder(tmp_path, ["a.png", "b.png", "c.png"])
    rows = [{"file_name": "a.png", "label": "x"}, {"file_name": "gone.png", "label": "y"},
            {"file_name": "../b.png", "label": "x"}, {"file_name": "b.png", "label": ""}]  # fmt: skip
    write_metadata(tmp_path, "csv", rows)
    images = load(tmp_path)
    assert len(images) == 2 and images.labels == [0, -1]
    said = capsys.readouterr().out
    assert "left out: 2 of 4 rows of metadata.csv, of no picture" in said
    assert "left out: 1 pictures that the metadata does not name" in said


def test_metadata_of_several_levels_needs_a_choice_and_each_split_has_its_own(tmp_path):
    picture_folder(tmp_path, ["train/a.png", "train/b.png", "test/c.png"])
    levels = [{"file_name": "a.png", "family": "737", "maker": "Boeing"},
              {"file_name": "b.png", "family": "A320", "maker": "Airbus"}]  # fmt: skip
    write_metadata(tmp_path / "train", "jsonl", levels)
    write_metadata(tmp_path / "test", "csv", [{"file_name": "c.png", "family": "A320", "maker": "Airbus"}])
    images = load(tmp_path)
    assert images.classes == [] and images.label_choices == ["family", "maker"]
    assert "no classes chosen; label_column may be family, maker" in images.summary
    assert [load(tmp_path, label_column="maker").labels, load(tmp_path, "test", label_column="maker").labels] == [
        [1, 0], [0],
    ]  # fmt: skip
    assert load(tmp_path, "test", label_column="maker").classes == ["Airbus", "Boeing"]


def test_metadata_without_labels_leaves_the_folders_classes(tmp_path):
    picture_folder(tmp_path, ["cat/0.png", "dog/1.png"])
    rows = [{"file_name": name, "width": 20.5} for name in ("cat/0.png", "dog/1.png")]
    write_metadata(tmp_path, "jsonl", rows)
    images = load(tmp_path)
    assert images.classes == ["cat", "dog"] and "classes are the names of the folders" in images.summary


def test_two_files_of_metadata_for_the_same_pictures_are_refused(tmp_path):
    picture_folder(tmp_path, ["a.png"])
    for kind in ("csv", "jsonl"):
        write_metadata(tmp_path, kind, [{"file_name": "a.png", "label": "x"}])
    with pytest.raises(ValueError, match=r"^dataset: .* has metadata.csv and metadata.jsonl; expected one of them"):
        load(tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [("file_name,label\n", r"\(metadata.csv\) names no picture there"),
     ("name,label\na.png,x\n", "row without file_name"),
     (b"\xff\xfe", "metadata.csv' cannot be read")],
)  # fmt: skip
def test_metadata_that_says_nothing_is_refused(tmp_path, content, message):
    picture_folder(tmp_path, ["a.png"])
    (tmp_path / "metadata.csv").write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=f"^dataset: .*{message}"):
        load(tmp_path)


def test_flat_splits_have_no_classes(tmp_path):
    picture_folder(tmp_path, ["train/a.png", "test/b.png"])
    for split, index in (("train", 0), ("test", 1), ("eval", 1)):
        images = load(tmp_path, split)
        assert len(images) == 1 and images.classes == [] and "label" not in images[0]
        torch.testing.assert_close(images[0]["pixels"], of_file(index))
    with pytest.raises(ValueError, match=r"^split .*'validation'; the nearest of 2: .*train"):
        load(tmp_path, "validation")


def test_a_sorted_split_has_classes_and_a_flat_one_beside_it_has_none(tmp_path):
    picture_folder(tmp_path, ["all/train/cat/a.png", "all/train/dog/b.png", "all/test/c.png"])
    assert load(tmp_path).classes == ["cat", "dog"]
    assert load(tmp_path, "test").classes == [] and len(load(tmp_path, "test")) == 1


@pytest.mark.parametrize(
    ("names", "classes"),
    [
        (["train/0.png", "bus/1.png"], ["bus", "train"]),  # a railway
        (["test_cat.png", "train_dog.png"], []),  # names of files are no splits
        (["__cats__/0.png", "dogs/1.png"], ["__cats__", "dogs"]),
        (["n01/images/0.png", "n02/images/1.png"], ["n01/images", "n02/images"]),
        (["0.png", "dogs/1.png"], []),
        (["a$$b/0.png", "c_{^d/1.png"], ["a$$b", "c_{^d"]),
    ],
)
def test_names_of_folders_mean_what_they_seem_to(tmp_path, names, classes):
    picture_folder(tmp_path, names)
    images = load(tmp_path)
    assert len(images) == 2 and images.classes == classes


def test_splits_beside_other_folders_are_refused(tmp_path):
    picture_folder(tmp_path, ["train/0.png", "test/1.png", "more/2.png"])
    with pytest.raises(ValueError, match=r"^dataset: .*folders of the splits test, train, and besides more"):
        load(tmp_path)


def test_links_are_followed_and_what_is_left_out_is_said(tmp_path, capsys):
    outside = picture_folder(tmp_path / "outside", ["x.png", "deep/y.png"])
    folder = picture_folder(tmp_path / "folder", ["a.png", ".hidden.png", ".cache/b.png", "notes.txt"])
    (folder / "x.png").symlink_to(outside / "x.png")
    (folder / "linked").symlink_to(outside / "deep")
    (folder / "loop").symlink_to(folder)
    (folder / "gone.png").symlink_to(outside / "gone.png")
    images = load(folder)
    assert len(images) == 3 and all(images[i] is not None for i in range(3))
    said = capsys.readouterr().out
    for kind in ("hidden file", r"hidden folder (.cache)", "link that leads nowhere", "link to a folder above it",
                 "file that is no picture (.txt)"):  # fmt: skip
        assert f"left out: 1 x {kind}" in said


@pytest.mark.parametrize("name", ["a$$b", "a [x] *", "50% é", "hf:x"])
def test_odd_names_of_folders_are_only_names(tmp_path, name):
    (tmp_path / name).mkdir()
    pq.write_table(pa.table({"image": [png(0)]}), tmp_path / name / "a.parquet")
    assert len(load(tmp_path / name)) == len(load(tmp_path / name / "a.parquet")) == 1
    (tmp_path / name / "a.parquet").rename(tmp_path / "a.parquet")
    (tmp_path / name / "0.png").write_bytes(png(0))
    (tmp_path / name / os.fsdecode(b"\xff.png")).write_bytes(png(1))
    images = load(tmp_path / name)
    torch.testing.assert_close(images[0]["pixels"], of_file(0))
    assert len(images) == 1 and "left out: 1 x file whose name is no UTF-8" in images.summary


def test_two_colons_are_no_part_of_a_parquet_files_path(tmp_path):
    (tmp_path / "a::b").mkdir()
    pq.write_table(pa.table({"image": [png(0)]}), tmp_path / "a::b" / "a.parquet")
    with pytest.raises(ValueError, match=r"^dataset: .*a::b/a.parquet' has '::' in its path"):
        load(tmp_path / "a::b")
    picture_folder(tmp_path / "c::d", ["a.png"])
    assert len(load(tmp_path / "c::d")) == 1


def test_of_several_frames_the_first_is_read_and_said(tmp_path, capsys):
    frames = [PIL.Image.new("RGB", (16, 16), colour) for colour in ("white", "black")]
    for kind in ("gif", "tiff", "webp"):
        frames[0].save(tmp_path / f"a.{kind}", save_all=True, append_images=frames[1:])
    frames[0].save(tmp_path / "b.png")
    images = load(tmp_path)
    assert all(item["pixels"].min() > 0.98 for item in images)
    assert images.first_frames == {0, 1, 2}
    assert "row 0 has several frames; only the first is read" in capsys.readouterr().out
    assert "3 with several frames, of which the first is read" in images.report()


@pytest.mark.parametrize("kind", ["parquet", "picture"])
def test_a_file_replaced_under_the_same_name_size_and_time_is_read_anew(tmp_path, kind):
    def write(index):
        picture = png(index)
        if kind == "picture":
            (tmp_path / "a.png").write_bytes(picture)
        else:
            pq.write_table(pa.table({"image": [picture]}), tmp_path / "a.parquet")
        for file in tmp_path.iterdir():
            os.utime(file, (10**9, 10**9))

    for index in (0, 1):
        write(index)
        torch.testing.assert_close(load(tmp_path)[0]["pixels"], of_file(index))


def test_rows_that_name_pictures_find_them_beside_their_file_and_nowhere_else(tmp_path, monkeypatch):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "x.png").write_bytes(png(5))
    monkeypatch.chdir(tmp_path / "elsewhere")
    for number, part in enumerate(("one", "two")):
        folder = tmp_path / "set" / part
        folder.mkdir(parents=True)
        (folder / "x.png").write_bytes(png(number))
        rows = [{"bytes": None, "path": path} for path in ("x.png", "../../elsewhere/x.png", "/etc/hostname")]
        pq.write_table(pa.table({"image": rows}), folder / "rows.parquet")
    images = load(tmp_path / "set")
    assert [images[i] is not None for i in range(6)] == [True, False, False] * 2
    for row, index in ((0, 0), (3, 1)):
        torch.testing.assert_close(images[row]["pixels"], of_file(index))
    assert "outside the data set's folder" in images.skipped[1] and "left out: 2 picture files" in images.summary
    torch.testing.assert_close(load(tmp_path / "set" / "two" / "rows.parquet")[0]["pixels"], of_file(1))


def test_the_column_that_holds_pictures_is_taken(tmp_path):
    table = {"hash": [b"12", b"34"], "jpg": [png(0), png(1)], "sound": [{"bytes": b"RIFF", "path": None}] * 2}
    pq.write_table(pa.table(table), tmp_path / "a.parquet")
    torch.testing.assert_close(load(tmp_path)[1]["pixels"], of_file(1))


@pytest.mark.parametrize("names", [("mask", "image"), ("mask", "photo")])
def test_of_several_picture_columns_image_is_taken_or_one_must_be_named(tmp_path, names):
    features = datasets.Features({name: datasets.Image() for name in names})
    columns = {name: [{"bytes": png(index), "path": None}] for index, name in enumerate(names)}
    datasets.Dataset.from_dict(columns, features=features).to_parquet(tmp_path / "a.parquet")
    if "image" in names:
        torch.testing.assert_close(load(tmp_path)[0]["pixels"], of_file(1))
    else:
        with pytest.raises(ValueError, match=r"^image_column: .* has 2 columns of pictures; give one of mask, photo"):
            load(tmp_path)
    for index, name in enumerate(names):
        images = load(tmp_path, image_column=name)
        torch.testing.assert_close(images[0]["pixels"], of_file(index))
        assert images.name == f"{tmp_path}[train], image_column {name}"
    with pytest.raises(ValueError, match=r"^image_column .*unknown name 'msk'"):
        load(tmp_path, image_column="msk")


def test_labels_of_parquet_agree_between_splits(tmp_path):
    for split, labels in (("train", ["b", "c", None]), ("test", ["a", "c", "b"])):
        rows = {"image": [png(i) for i in range(3)], "label": labels}
        pq.write_table(pa.table(rows), tmp_path / f"{split}-00000-of-00001.parquet")
    learning, held_out = load_pair(str(tmp_path), "train", "test", max_images=0, eval_images=0, resolution=16)
    assert learning.classes == held_out.classes == ["a", "b", "c"]
    assert learning.labels == [1, 2, -1] and held_out.labels == [0, 2, 1]
    assert load(tmp_path, "train[:2]").labels == [1, 2]


def test_parquet_files_of_no_split_are_left_out_and_said(tmp_path):
    for name in ("train-a", "validation/0000", "extra"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        pq.write_table(pa.table({"image": [png(0)]}), tmp_path / f"{name}.parquet")
    assert [len(load(tmp_path, split)) for split in ("train", "val")] == [1, 1]
    assert "left out: 1 parquet files of no split (extra.parquet)" in load(tmp_path).summary


def test_labels_that_are_no_classes_are_refused(tmp_path):
    pq.write_table(pa.table({"image": [png(0)] * 2, "label": [0.5, 1.0]}), tmp_path / "a.parquet")
    with pytest.raises(ValueError, match=r"^label_column: 'label' of .* holds 0.5; expected text or whole numbers"):
        load(tmp_path)


def test_composited_and_unreadable_pictures_are_said_once_and_counted(tmp_path, capsys):
    for number in range(3):
        PIL.Image.new("RGBA", (16, 16), (255, 0, 0, 0)).save(tmp_path / f"{number}.png")
    (tmp_path / "9.png").write_bytes(b"no picture")
    images = load(tmp_path)
    assert all(batch["pixels"].unique().tolist() == [1] for batch in images.batches(2))
    assert images.composited == {0, 1, 2} and list(images.skipped) == [3]
    said = capsys.readouterr().out
    assert said.count("row 0 has transparent pixels; they are composited on white") == 1
    assert "1 skipped as unreadable, first row 3" in said and "3 with transparent pixels composited on white" in said
    list(images.batches(2))
    assert capsys.readouterr().out == ""
    assert load(tmp_path, background="black")[0]["pixels"].unique().tolist() == [-1]
    with pytest.raises(ValueError, match=r"^background: 'whit' is no colour"):
        load(tmp_path, background="whit")


def test_pictures_that_metadata_names_twice_are_said(tmp_path):
    picture_folder(tmp_path, ["a.png"])
    write_metadata(tmp_path, "csv", [{"file_name": "a.png", "label": label} for label in ("x", "y")])
    images = load(tmp_path)
    assert images.labels == [0, 1] and "the metadata has 1 more rows than pictures" in images.summary


def test_white_level_reaches_the_pictures(tmp_path):
    ramp = np.linspace(0, 4095, 256).reshape(16, 16).astype(np.uint16)
    buffer = io.BytesIO()
    PIL.Image.fromarray(ramp).save(buffer, "PNG")
    (tmp_path / "a.png").write_bytes(buffer.getvalue())
    assert load(tmp_path)[0] is None
    np.testing.assert_allclose(load(tmp_path, white_level=4095)[0]["pixels"][0], ramp / 2047.5 - 1, atol=0.01)


@pytest.mark.parametrize(
    ("split", "eval_split", "shared"),
    [
        ("train", "train", 6),
        ("train[:4]", "train[3:]", 1),
        ("train[:50%]", "training[40%:]", 1),
        ("train", "train+val", 6),
    ],
)
def test_splits_that_overlap_are_refused(tmp_path, split, eval_split, shared):
    picture_folder(tmp_path, [*(f"train/{i}.png" for i in range(6)), "val/7.png"])
    with pytest.raises(ValueError, match=rf"^eval_split: .* have {shared} pictures in common"):
        load_pair(str(tmp_path), split, eval_split, max_images=1, eval_images=1, resolution=16)
    assert load_pair(str(tmp_path), "train[:3]", "train[3:]+val", max_images=0, eval_images=0, resolution=16)
