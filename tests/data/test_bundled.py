import io

import numpy as np
import PIL.Image
import pytest
from sklearn.datasets import load_digits

from vaelab.data import bundled

NAMES = sorted(bundled.NAMES)


def pictures(rows):
    return [np.asarray(picture) for picture in rows.with_format(None)["image"]]


def encoded(rows):
    import datasets

    return [row["bytes"] for row in rows.cast_column("image", datasets.Image(decode=False))["image"]]


@pytest.mark.parametrize("name", NAMES)
def test_splits_share_no_picture(name):
    learning, held_out = (set(encoded(bundled.load_split(name, split))) for split in bundled.SPLITS)
    assert len(learning) > len(held_out) >= 100
    assert len(learning & held_out) <= (name == "glyphs")  # two fonts draw one of them alike


@pytest.mark.parametrize("name", NAMES)
def test_made_again_it_is_the_same(name):
    rows = bundled.load_split(name, "test")
    again = bundled._build.__wrapped__(name, "test")  # past the cache, which the other tests share
    assert again is not rows
    assert encoded(again) == encoded(rows)
    assert again["label"] == rows["label"]


@pytest.mark.parametrize("name", NAMES)
def test_columns_are_a_picture_and_its_class(name):
    rows = bundled.load_split(name, "train")
    assert rows.column_names == ["image", "label"]
    assert set(rows["label"]) == set(range(rows.features["label"].num_classes))


def test_digits_are_scikit_learns():
    digits = load_digits()
    chosen = [i for i in range(len(digits.target)) if i % 6 == 5]
    rows = bundled.load_split("digits", "test")
    assert rows["label"] == [int(digits.target[i]) for i in chosen]
    expected = (digits.images[chosen] * 255 / 16).astype(np.uint8)
    np.testing.assert_array_equal(np.stack(pictures(rows)), expected)


def test_photographs_are_in_one_split_only():
    names = [set(bundled.load_split("photos", split).features["label"].names) for split in bundled.SPLITS]
    assert names[0].isdisjoint(names[1])
    sizes = {PIL.Image.open(io.BytesIO(one)).size for one in encoded(bundled.load_split("photos", "test"))}
    assert sizes == {(bundled.SIDE,) * 2}


def test_glyphs_are_dark_on_white_and_each_has_ink():
    glyphs = np.stack(pictures(bundled.load_split("glyphs", "test")))
    assert glyphs.mean() > 128
    assert (glyphs.min(axis=(1, 2)) < 64).all()
    assert np.median(glyphs[:, 0, 0]) == 255


def test_unknown_set_and_split():
    with pytest.raises(ValueError, match=r"^dataset: unknown name 'photo'.*photos"):
        bundled.load_split("photo", "train")
    with pytest.raises(ValueError, match=r"^split \(of 'photos'\): unknown name 'tran'.*train"):
        bundled.load_split("photos", "tran")
