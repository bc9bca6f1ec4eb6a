"""The map keeps neighbours together, and every feature has a place among the thumbnails."""

import numpy as np
import pytest
import torch

from vaelab.browser import dictionary_map


def test_sheets_hold_all_tiles():
    for n in (1, 2, 40, 5120, 81_920):
        columns, rows, side = dictionary_map.sprite_grid(n)
        assert max(columns, rows) * side <= dictionary_map.SHEET and columns * rows * -(-n // (columns * rows)) >= n
    assert dictionary_map.sprite_grid(81_920)[2] == 16


def test_few_pictures_cover_many_features():
    tops = {0: ["a", "x"], 1: ["b", "x"], 2: ["c", "y"], 3: []}
    assert dictionary_map.choose_pictures(tops, 3) == {"a", "b", "c"}
    assert dictionary_map.choose_pictures(tops, 1) == {"x"}
    assert "x" in dictionary_map.choose_pictures(tops, 2)


@pytest.mark.parametrize("most", [40, 8])
def test_the_map_keeps_similar_directions_together(monkeypatch, most):
    monkeypatch.setattr(dictionary_map, "TSNE_MOST", most)
    generator = torch.Generator().manual_seed(0)
    centres = torch.eye(16)[:2].repeat_interleave(20, 0)
    directions = torch.nn.functional.normalize(centres + 0.05 * torch.randn(40, 16, generator=generator))
    places = dictionary_map.embed_directions(directions)
    assert places.dtype == np.float32 and places.min() == 0 and places.max() == 1
    gaps = np.linalg.norm(places[:, None] - places, axis=-1)
    assert gaps[:20, :20].max() < gaps[:20, 20:].min()
