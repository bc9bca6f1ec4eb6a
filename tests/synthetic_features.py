"""Features that were never trained, for the widget's tests: the same functions and columns as
:class:`vaelab.browser.feature_data.FeatureData`, with answers that a test can predict.

Feature i has the frequency (i + 1) / n, lies at a place of a spiral, and has a thumbnail of one colour. Every picture
is grey; turning a feature by s makes its red brighter by 40 s, under the mask alone; the control does so with its blue.
"""

import io
from pathlib import Path

import numpy as np
import pandas as pd
from PIL import Image

MARKUP = "<img src=x onerror=\"document.title='owned'\"><b>bold</b>"
"""The caption of feature 5."""
VALUES = ("shape", "colour")
WORDS = ("star", "ring", "red", "blue", "stripes", "corner", "small", "ground")


def png(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


class SyntheticFeatures:
    block, passes = "up.1.2", 4

    def __init__(self, count: int, folder: Path):
        self.count, self.folder, self.shelf = count, folder, {}
        number = np.arange(count)
        random = np.random.default_rng(0)
        captions = [f"a {WORDS[i % 8]} near a {WORDS[i // 8 % 8]}" for i in range(count)]
        captions[5] = MARKUP
        self.table = pd.DataFrame({
            "feature": number, "frequency": (number + 1) / count, "density": random.random(count) ** 3,
            "mu": random.random(count) * 5, "words": [WORDS[i % 8] for i in range(count)],
            "specificity": random.random(count), "f1": np.where(number % 3, random.random(count), np.nan),
            "value": [f"{VALUES[i % 2]}: {WORDS[i % 3]}" if i % 3 else "" for i in range(count)],
            "stability": np.full(count, np.nan), "caption": captions, "caption_score": random.random(count),
        })  # fmt: skip
        angle, radius = number * 2.399963, np.sqrt((number + 0.5) / count)
        self.positions = (0.5 + 0.5 * radius * np.array([np.cos(angle), np.sin(angle)])).T.astype(np.float32)
        self.generations = 0
        self._draw_sheets()

    def _draw_sheets(self):
        side = 32 if self.count <= 20_480 else 16
        columns = min(int(np.ceil(np.sqrt(self.count))), 2048 // side)
        rows = min(-(-self.count // columns), 2048 // side)
        self.sprite_grid = (columns, rows, side)
        self.sprites = []
        y, x = np.mgrid[:side, :side] / side
        shade = (0.4 + 0.6 * ((x - 0.5) ** 2 + (y - 0.5) ** 2 < 0.16))[None, :, :, None]
        colours = np.random.default_rng(1).integers(40, 255, (self.count, 1, 1, 3))
        for begin in range(0, self.count, columns * rows):
            tiles = np.zeros((columns * rows, side, side, 3), np.uint8)
            own = colours[begin : begin + columns * rows]
            tiles[: len(own)] = own * shade
            sheet = tiles.reshape(rows, columns, side, side, 3).transpose(0, 2, 1, 3, 4)
            buffer = io.BytesIO()
            Image.fromarray(sheet.reshape(rows * side, columns * side, 3)).save(buffer, "JPEG", quality=80)
            self.sprites.append(buffer.getvalue())

    def card(self, feature):
        row = self.table.iloc[feature].to_dict()
        map_ = np.zeros((8, 8))
        map_[2:5, 3:7] = np.arange(1, 13).reshape(3, 4) * (feature + 1)
        pixels = np.full((32, 32, 3), 120, np.uint8)
        pixels[:, :16] = (30, 90, 200)
        groups = ["top"] * 4 + [f"decile {i}" for i in range(10, 0, -1)]
        examples = [
            {"group": group, "item": i, "prompt": f"a {WORDS[i % 8]} {MARKUP}", "seed": i, "timestep": 999.0,
             "activation": 3.0 / (i + 1), "picture": png(np.roll(pixels, 2 * i, 1)), "map": map_.tolist(),
             "vmin": float(feature + 1), "vmax": 12.0 * (feature + 1)}
            for i, group in enumerate(groups)
        ]  # fmt: skip
        others = [(feature + i) % self.count for i in range(1, 9)]
        return {
            **row, "examples": examples,
            "histogram": {"edges": list(range(21)), "counts": [2000 // 2**i for i in range(20)]},
            "timesteps": {"timestep": [999.0, 749.0, 499.0, 249.0], "mean": [0.2, 0.9, 0.6, 0.1], "density": [0.1] * 4},
            "co_active": [(other, 1 / (i + 2)) for i, other in enumerate(others)],
            "nearest": [(other, 0.9 - i / 10) for i, other in enumerate(others)],
            "twin": {"seed": 1, "feature": 3, "cosine": 0.93},
            "scores": [{"score": "specificity", "feature": 0.61, "neurons": 0.4, "random directions": 0.2},
                       {"score": "texture", "feature": float("nan"), "neurons": 0.1}],
            "reasoning": f"It is active on {MARKUP}.",
        }  # fmt: skip

    def generate(self, prompt, seed, steerings=(), step_range=None):
        if "zebra" in prompt:
            raise ValueError("prompt: the text model does not know 'zebra'")
        self.generations += 1
        pixels = np.full((64, 64, 3), 100 + seed % 50, np.float64)
        for one in steerings:
            mask = np.ones((64, 64)) if one["mask"] is None else one["mask"]
            pixels[..., 2 if one.get("control") else 0] += 40 * one["strength"] * mask
        return {"picture": png(pixels.clip(0, 255).astype(np.uint8)), "maps": {}}

    def active_at(self, prompt, seed, mask):
        """The feature with the number of the mask's first row, then that of its last column, plus 64."""
        rows, columns = np.nonzero(mask)
        return [(int(rows.min()), 3.0), (64 + int(columns.max()), 2.0)]

    def search_meaning(self, text):
        return [9, 3, 7]

    def load_shelf(self):
        return dict(self.shelf)

    def save_shelf(self, shelf):
        self.shelf = dict(shelf)

    def feature_page(self, feature):
        return f"<!doctype html><title>feature {feature}</title><p>feature {feature}"

    def shelf_page(self):
        return "<!doctype html><title>shelf</title>" + "".join(f"<p>{f}" for f in self.shelf)
