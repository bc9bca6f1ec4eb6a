"""Figures of pictures with what belongs to them."""

import numpy as np
import pandas as pd
import torch

from vaelab import viz

PICTURES = torch.linspace(-1, 1, 5 * 3 * 8 * 8).reshape(5, 3, 8, 8)


def test_captioned_has_every_picture_with_its_caption():
    captions = [f"picture number {i} " + "of many words " * 4 for i in range(5)]
    figure = viz.captioned(PICTURES, captions, columns=3)
    shown = [axis for axis in figure.axes if axis.images]
    assert len(figure.axes) == 6 and len(shown) == 5
    for axis, caption in zip(shown, captions, strict=True):
        assert " ".join(axis.texts[0].get_text().split()) == caption.strip()
    np.testing.assert_allclose(shown[0].images[0].get_array(), (PICTURES[0].permute(1, 2, 0) + 1) / 2, atol=1e-6)


def test_masked_leaves_the_masked_pixels_and_fades_the_others():
    mask = np.zeros((1, 8, 8), bool)
    mask[0, 2, 3] = True
    figure = viz.masked(PICTURES[0], mask, ["a thing"])
    whole, faded = (axis.images[0].get_array() for axis in figure.axes)
    assert np.array_equal(whole[2, 3], faded[2, 3])
    assert np.abs(whole - faded).sum(-1)[~mask[0]].min() > 0.01
    assert figure.axes[1].get_title() == "a thing"


def test_strength_draws_the_length_of_every_vector():
    maps = {"up.0.1": torch.full((5, 4, 4, 9), 2.0), "mid.0": torch.zeros(5, 2, 2, 3)}
    figure = viz.strength(PICTURES, maps)
    images = [axis.images[0].get_array() for axis in figure.axes]
    assert len(images) == 15
    assert np.allclose(images[5], 6) and np.allclose(images[10], 0)


def test_matrix_writes_its_numbers():
    table = pd.DataFrame({"shape": [0.25, -0.5], "colour": [0.0, 1.0]}, index=["mid.0", "up.0.1"])
    figure = viz.matrix(table, "change", diverging=True)
    assert sorted(text.get_text() for text in figure.axes[0].texts) == ["-0.50", "0.00", "0.25", "1.00"]
