"""Pages and figures of features: self-contained, and safe whatever captions, notes and prompts hold."""

import base64
import hashlib
import re
from html.parser import HTMLParser

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch

from vaelab.browser import feature_figures, feature_pages
from vaelab.browser.feature_data import FeatureData
from vaelab.viz.encoding import decode_picture, encode_picture, encode_pixels

MARKUP = '<img src=x onerror="alert(1)"></title><script>alert(2)</script> & "quotes" \'too\' {{ 7 * 7 }}'
PICTURE = torch.linspace(-1, 1, 3 * 16 * 16).reshape(3, 16, 16)


class Features(FeatureData):
    """Planted cards; feature 1 was never active."""

    def __init__(self):
        self.block, self.sprite_grid, self._sheets = "up.1.2", (2, 1, 32), {}
        tiles = np.zeros((32, 64, 4), np.uint8)
        tiles[:, :32] = (200, 30, 30, 255)
        self.sprites = [encode_pixels(tiles, "WEBP", lossless=True)]
        self.positions = np.array([[0.2, 0.3], [0.9, 0.8]], np.float32)
        self.table = pd.DataFrame({"feature": [0, 1], "frequency": [0.5, 0.0], "f1": [0.7, np.nan]})

    def __len__(self):
        return 2

    def load_shelf(self):
        return {}

    def card(self, feature):
        self._require(feature)
        example = {
            "group": "top", "item": 3, "prompt": MARKUP, "seed": 5, "timestep": 999.0, "activation": 0.25,
            "picture": encode_picture(PICTURE), "map": [[0.0, 1.0], [2.0, 4.0]], "vmin": 1.0, "vmax": 4.0,
        }  # fmt: skip
        known = {"frequency": 0.5, "density": 0.004, "mu": 2.5, "specificity": np.nan, "stability": 0.91,
                 "caption_score": 0.8, "f1": 0.7, "control": 0.4, "value": "shape: star"}  # fmt: skip
        return {
            **known, "feature": feature, "caption": MARKUP, "words": MARKUP, "reasoning": MARKUP,
            "examples": [] if feature else [example, {**example, "group": "decile 3"}],
            "histogram": {"edges": [], "counts": []} if feature else {"edges": [0.5, 1.0, 2.0], "counts": [9, 3]},
            "timesteps": {"timestep": [999.0, 499.0], "mean": [1.0, 2.0], "density": [0.1, 0.2]},
            "co_active": [(1, 0.25)], "nearest": [(1, 0.5)], "twin": {"seed": 1, "feature": 8, "cosine": 0.91},
            "scores": [{"score": "specificity", "feature": 0.6, "neurons": 0.4}, {"score": MARKUP, "feature": 0.1}],
        }  # fmt: skip


class Elements(HTMLParser):
    """Collects what a browser would make of a page."""

    def __init__(self, page):
        super().__init__(convert_charrefs=True)
        self.tags, self.attributes, self.text = [], [], ""
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, *pair) for pair in attrs]

    def handle_data(self, data):
        self.text += data


@pytest.fixture(scope="module")
def page():
    return feature_pages.shelf_page(Features(), {0: MARKUP, 1: ""})


def test_markup_in_captions_notes_and_prompts_is_shown_as_text(page):
    found = Elements(page)
    assert found.tags.count("script") == 1 and "onerror" not in {name for _, name, _ in found.attributes}
    assert found.text.count(MARKUP) >= 6  # the note, the reasoning, captions, words, prompts, a score
    sources = [value for tag, name, value in found.attributes if (tag, name) == ("img", "src")]
    assert sources and all(value.startswith("data:image/") for value in sources)
    assert ("img", "alt", MARKUP) in found.attributes


def test_a_page_asks_no_host_and_allows_its_own_script_alone(page):
    assert not re.search(r"https?://|//[a-z]|@import|url\(", page)
    script = re.search(r"<script>(.*?)</script></body>", page, re.DOTALL)[1]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{digest}'" in page


def test_a_page_shows_pictures_numbers_and_controls(page):
    found = Elements(page)
    assert f"data:image/png;base64,{base64.b64encode(encode_picture(PICTURE)).decode()}" in page
    texts = [
        "50 %",
        "0.4 %",
        "F1 for shape: star",
        "the best random direction",
        "8, cosine 0.91",
        "decile 3",
        "neurons",
    ]
    for text in [*texts, "The feature was never active in the store."]:
        assert text in found.text, text
    assert found.tags.count("article") == 2 and "nan" not in found.text
    ids = [value for _, name, value in found.attributes if name == "id"]
    assert len(set(ids)) == len(ids)
    assert {value[1:] for tag, name, value in found.attributes if tag == "a" and name == "href"} <= set(ids)


def test_pages_of_one_feature_and_of_an_empty_shelf():
    assert "<title>Feature 0 of up.1.2</title>" in feature_pages.feature_page(Features(), 0)
    assert "No feature was kept yet." in Features().shelf_page()
    assert "<title>A feature of up.1.2</title>" in Features().shelf_page([1])
    with pytest.raises(ValueError, match=r"^feature: up\.1\.2 has features 0 to 1, got 2$"):
        feature_pages.feature_page(Features(), 2)


def test_heat_is_blue_at_the_lowest_red_at_the_highest_and_nothing_where_it_is_not_active():
    example = Features().card(0)["examples"][0]
    pixels = feature_figures.heat_pixels(example)
    assert pixels[..., 3].tolist() == [[0, 255], [255, 255]]
    assert pixels[0, 1, 2] > pixels[0, 1, 0] and pixels[1, 1, 0] > pixels[1, 1, 2]
    shown, plain = feature_figures.overlaid(example), decode_picture(example["picture"])
    assert torch.equal(shown[:, :8, :8], plain[:, :8, :8]) and not torch.equal(shown[:, 8:, 8:], plain[:, 8:, 8:])


def test_the_change_of_a_picture_is_the_mean_distance_of_its_pixels():
    assert feature_figures.mean_change(*(encode_picture(PICTURE),) * 2) == 0
    white, black = (encode_picture(torch.full((3, 8, 8), value)) for value in (1.0, -1.0))
    assert feature_figures.mean_change(white, black) == pytest.approx(765)


def test_figures_are_drawn_with_markup_and_without_examples():
    data = Features()
    figures = [feature_figures.draw_card(data.card(feature)) for feature in (0, 1)]
    figures += [feature_figures.draw_map(data, "f1", "F1", "a $ sign"), feature_figures.draw_summary(data, [0], "two")]
    assert len(figures[0].axes) == 4 and len(figures[1].axes) == 2
    assert len(figures[2].axes[1].images) == 1  # feature 1 has no thumbnail
    pictures = [encode_picture(PICTURE * share) for share in (0.0, 1.0, 0.5)]
    turn = feature_figures.draw_turn(*pictures, 3)
    assert [axis.get_title() for axis in turn.axes] == ["before", "after", "difference", "", "", ""]
    differences = [turn.axes[place].images[0].get_array() for place in (2, 5)]
    assert differences[0].max() == 1 and differences[1].max() == pytest.approx(0.5, abs=0.01)
    plt.close("all")


def test_what_is_found_first():
    table = pd.DataFrame({"feature": [0, 1, 2], "frequency": [0.1, 0.9, 0.5], "f1": np.nan, "caption_score": np.nan,
                          "specificity": np.nan, "caption": ""})  # fmt: skip
    assert feature_figures.find_table(table, 2).to_dict("list") == {"feature": [1, 2], "frequency": [0.9, 0.5]}
    table["f1"] = [np.nan, 0.1, 0.8]
    assert feature_figures.find_table(table)["feature"].tolist() == [2, 1, 0]
