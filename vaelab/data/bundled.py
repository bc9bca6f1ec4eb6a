"""The embedded picture sets: ``photos``, ``digits``, ``glyphs``, and scenes of the synthetic ``world``.

The pictures of the first three come with the installed libraries. They stand for the three kinds of data in the
channel-suppression paper (Shi, Wang and Roshka): natural pictures, upscaled low-resolution pictures, and low-entropy
glyphs. The ``world`` is the synthetic scene world (:mod:`vaelab.world`). A set is built in seconds, the same on every
machine, as a ``datasets.Dataset`` with the columns ``image`` and ``label`` and the splits ``train`` and ``test``. The
label of a world scene is the texture of its ground; :func:`vaelab.world.scenes.dataset` has all other factors, that is,
attributes such as colour.
"""

import functools
import importlib.resources
import io
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import PIL.Image
import PIL.ImageDraw
import PIL.ImageFont

from vaelab import world
from vaelab.core.validate import one_of

if TYPE_CHECKING:
    import datasets

SPLITS = ("train", "test")
SIDE = 64
CROPS_PER_PHOTOGRAPH = 100
PHOTOGRAPHS = {
    "train": (
        *("astronaut.png", "brick.png", "camera.png", "cell.png", "coffee.png", "coins.png", "grass.png"),
        *("hubble_deep_field.jpg", "ihc.png", "moon.png", "retina.jpg", "rocket.jpg", "china.jpg"),
    ),
    "test": ("chelsea.png", "gravel.png", "motorcycle_right.png", "flower.jpg"),
}
CHARACTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789!?&@#%$+=<>"
FONTS = ("DejaVuSans", "DejaVuSerif", "DejaVuSansMono", "STIXGeneral", "cmr10", "cmss10", "cmtt10", "cmb10")
TEST_EVERY = 6
"""One in this number of digits and of glyphs is in the split ``test``."""
WORLD_SCENES = {"train": 3000, "test": 600}


def load_split(name: str, split: str) -> "datasets.Dataset":
    """Load one split of an embedded set.

    Raises:
        ValueError: the set or split is unknown.
    """
    one_of("dataset", name, NAMES)
    one_of(f"split (of {name!r})", split, SPLITS)
    return _build(name, split)


@functools.cache
def _build(name: str, split: str) -> "datasets.Dataset":
    import datasets

    pictures, labels = zip(*NAMES[name](split), strict=True)
    classes = sorted(set(labels))
    features = datasets.Features(image=datasets.Image(), label=datasets.ClassLabel(names=classes))
    columns = {"image": [_png(picture) for picture in pictures], "label": [classes.index(label) for label in labels]}
    return datasets.Dataset.from_dict(columns, features=features)


def _png(picture: PIL.Image.Image) -> dict[str, bytes | None]:
    buffer = io.BytesIO()
    picture.save(buffer, "PNG", compress_level=1)
    return {"bytes": buffer.getvalue(), "path": None}


def _photos(split: str) -> Iterator[tuple[PIL.Image.Image, str]]:
    """Yield crops of the sample photographs; each photograph is in one split only."""
    for file in PHOTOGRAPHS[split]:
        for crop in photograph_crops(file):
            yield crop, file.rsplit(".", 1)[0]


def photograph_crops(file: str) -> Iterator[PIL.Image.Image]:
    """Yield square crops of 48 to 320 pixels of one of the :data:`PHOTOGRAPHS`, resized to 64 x 64."""
    photograph = _read_photograph(file)
    rng = np.random.default_rng([len(file), *file.encode()])
    largest = min(320, *photograph.size)
    for _ in range(CROPS_PER_PHOTOGRAPH):
        side = int(np.exp(rng.uniform(np.log(48), np.log(largest))))
        left, top = (int(rng.integers(0, extent - side + 1)) for extent in photograph.size)
        box = (left, top, left + side, top + side)
        yield photograph.resize((SIDE, SIDE), PIL.Image.Resampling.LANCZOS, box=box)


def _read_photograph(file: str) -> PIL.Image.Image:
    package = "sklearn.datasets.images" if file in ("china.jpg", "flower.jpg") else "skimage.data"
    with importlib.resources.as_file(importlib.resources.files(package) / file) as path:
        return PIL.Image.open(path).convert("RGB")


def _digits(split: str) -> Iterator[tuple[PIL.Image.Image, str]]:
    """Yield scikit-learn's handwritten digits at 8 x 8 pixels; the preprocessing upscales them."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    for i, (picture, label) in enumerate(zip(digits.images, digits.target, strict=True)):
        if (i % TEST_EVERY == TEST_EVERY - 1) == (split == "test"):
            yield PIL.Image.fromarray((picture * 255 / 16).astype(np.uint8)), str(label)


def _glyphs(split: str) -> Iterator[tuple[PIL.Image.Image, str]]:
    """Yield dark characters on white, in fonts that come with matplotlib, so that they are the same on every
    machine."""
    rng = np.random.default_rng(0)
    number = 0
    for font in _font_files():
        for character in CHARACTERS:
            size = int(rng.integers(36, 60))
            if (number % TEST_EVERY == 0) == (split == "test"):
                yield _glyph(font, character, size), character
            number += 1


def _font_files() -> list[str]:
    import matplotlib

    variants = ("", "-Bold", "-Oblique", "-BoldOblique", "-Italic", "-BoldItalic", "Bol", "Italic", "BolIta")
    names = {family + variant for family in FONTS for variant in variants}
    fonts = Path(matplotlib.get_data_path(), "fonts", "ttf").glob("*.ttf")
    return [str(path) for path in sorted(fonts, key=lambda path: path.name) if path.stem in names]


def _glyph(font: str, character: str, size: int) -> PIL.Image.Image:
    picture = PIL.Image.new("L", (SIDE, SIDE), 255)
    draw = PIL.ImageDraw.Draw(picture)
    draw.text((SIDE / 2, SIDE / 2), character, fill=0, font=PIL.ImageFont.truetype(font, size), anchor="mm")
    return picture


def _world(split: str) -> Iterator[tuple[PIL.Image.Image, str]]:
    for seed in range(WORLD_SCENES[split]):
        scene = world.sample(seed, split)
        yield PIL.Image.fromarray((scene.picture() * 255).round().astype(np.uint8)), scene.texture


NAMES = {"photos": _photos, "digits": _digits, "glyphs": _glyphs, "world": _world}
"""The function that builds each embedded set."""
