"""The synthetic scene world: a data set of small pictures with known factors, prompts and masks.

A scene is one to three objects ("things" in the code) on a ground. A factor is one of their attributes: an object has
shape, colour, size and position, the ground has texture and colour. A split and a seed determine a scene. The splits
share no combination of factors: the combination of shape, colour, size and position of an object in ``test`` never
occurs in ``train``, and the pair of shape and colour of an object in ``unseen`` occurs in neither. Pictures are 64 x 64
pixels and antialiased.
"""

import functools
import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import PIL.Image
import PIL.ImageDraw
import torch
from torch import Tensor

from vaelab.core.validate import at_least, one_of

if TYPE_CHECKING:
    import datasets

SIDE = 64
"""Side of a picture, in pixels."""
SUPERSAMPLING = 8
"""Samples per pixel, along each side, from which the pixel's coverage is averaged."""
SHAPES = ("circle", "square", "triangle", "star", "ring", "cross", "diamond", "heart")
COLOURS = {
    "red": (214, 39, 40), "orange": (255, 140, 20), "yellow": (250, 225, 40), "green": (35, 150, 50),
    "blue": (35, 75, 215), "purple": (140, 50, 180), "white": (250, 250, 250), "black": (15, 15, 15),
}  # fmt: skip
SIZES = {"large": 20, "small": 14}
"""Side of an object, in pixels."""
POSITIONS = {
    "top left": (0, 0), "top": (1, 0), "top right": (2, 0),
    "left": (0, 1), "centre": (1, 1), "right": (2, 1),
    "bottom left": (0, 2), "bottom": (1, 2), "bottom right": (2, 2),
}  # fmt: skip
"""Column and row of each position."""
PHRASES = {
    "top left": "in the top left", "top": "at the top", "top right": "in the top right",
    "left": "on the left", "centre": "in the centre", "right": "on the right",
    "bottom left": "in the bottom left", "bottom": "at the bottom", "bottom right": "in the bottom right",
}  # fmt: skip
CENTRES = (12, 32, 52)
"""The pixel at the centre of each column or row of positions."""
JITTER = 1
"""Largest offset of a sampled object from the centre of its position, in pixels."""
TEXTURES = ("plain", "striped", "checkered", "dotted", "shaded")
GROUNDS = {"grey": (150, 150, 150), "beige": (215, 195, 160), "teal": (95, 150, 150), "pink": (215, 160, 170)}
SHADE = 0.72
"""Brightness of a texture's dark parts, relative to the ground's colour."""
FACTORS = {
    "shape": SHAPES,
    "colour": tuple(COLOURS),
    "size": tuple(SIZES),
    "position": tuple(POSITIONS),
    "texture": TEXTURES,
    "ground": tuple(GROUNDS),
}
THING_FACTORS = ("shape", "colour", "size", "position")
SCENE_FACTORS = ("texture", "ground")
SPLITS = ("train", "test", "unseen")
OMISSION_RATES = {"shape": 0.1, "colour": 0.15, "size": 0.25, "position": 0.25, "texture": 0.2, "ground": 0.2}
"""Probability that a prompt does not name a factor."""


def with_article(words: str) -> str:
    """Put the indefinite article before words."""
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


@dataclass(frozen=True)
class Thing:
    """One object of a scene."""

    shape: str
    colour: str
    size: str
    position: str
    offset: tuple[int, int] = (0, 0)
    """Pixels to the right of and below the position's centre."""
    named: tuple[str, ...] = THING_FACTORS
    """The factors that the prompt names."""

    def __post_init__(self) -> None:
        for factor in THING_FACTORS:
            one_of(factor, getattr(self, factor), FACTORS[factor])
        for factor in self.named:
            one_of("named", factor, THING_FACTORS)
        for cell, shift in zip(POSITIONS[self.position], self.offset, strict=True):
            first = CENTRES[cell] - SIZES[self.size] // 2 + shift
            if not 0 <= first <= SIDE - SIZES[self.size]:
                raise ValueError(f"offset: {self.offset} moves a {self.size} object at {self.position} off the picture")

    @property
    def phrase(self) -> str:
        """Describe the object in words, such as ``a large red star on the left``. If the shape is not named, the noun
        is ``thing``."""
        size, colour = (getattr(self, factor) if factor in self.named else "" for factor in ("size", "colour"))
        noun = self.shape if "shape" in self.named else "thing"
        words = " ".join(word for word in (size, colour, noun) if word)
        return with_article(words) + (f" {PHRASES[self.position]}" if "position" in self.named else "")

    def coverage(self) -> np.ndarray:
        """Compute the fraction of each pixel that the object covers: (64, 64) float32 in [0, 1]."""
        column, row = POSITIONS[self.position]
        stamp = _stamp(self.shape, self.size)
        canvas = np.zeros((SIDE, SIDE), np.float32)
        left, top = (
            CENTRES[cell] - stamp.shape[0] // 2 + shift for cell, shift in zip((column, row), self.offset, strict=True)
        )
        canvas[top : top + stamp.shape[0], left : left + stamp.shape[1]] = stamp
        return canvas


@dataclass(frozen=True)
class Scene:
    """Objects on a ground."""

    things: tuple[Thing, ...]
    texture: str
    ground: str
    named: tuple[str, ...] = SCENE_FACTORS
    """The factors of the ground that the prompt names."""

    def __post_init__(self) -> None:
        for factor in SCENE_FACTORS:
            one_of(factor, getattr(self, factor), FACTORS[factor])
        for factor in self.named:
            one_of("named", factor, SCENE_FACTORS)
        if len({thing.position for thing in self.things}) < len(self.things):
            raise ValueError("things: two of them share a position")

    @property
    def prompt(self) -> str:
        """Describe the scene in English, with the named factors only; a scene without objects begins with
        ``nothing``."""
        phrases = [thing.phrase for thing in self.things]
        listed = ", ".join(phrases[:-1]) + " and " + phrases[-1] if len(phrases) > 1 else (phrases or ["nothing"])[0]
        words = [getattr(self, factor) for factor in SCENE_FACTORS if factor in self.named]
        return listed + (f", on a {' '.join(words)} background" if words else "")

    def spelled_out(self) -> "Scene":
        """Return the same scene with a prompt that names every factor."""
        things = tuple(replace(thing, named=THING_FACTORS) for thing in self.things)
        return replace(self, things=things, named=SCENE_FACTORS)

    def picture(self) -> np.ndarray:
        """Draw the scene: (64, 64, 3) float32 in [0, 1]."""
        canvas = background(self.texture, self.ground).copy()
        for thing in self.things:
            alpha = thing.coverage()[..., None]
            canvas += alpha * (np.array(COLOURS[thing.colour], np.float32) / 255 - canvas)
        return canvas

    def masks(self) -> np.ndarray:
        """Compute a mask of the pixels of each object, and as the last one that of the ground: (things + 1, 64, 64)
        bool.

        Every pixel belongs to exactly one mask. If two objects overlap, the later one is on top.
        """
        covered = np.array([thing.coverage() >= 0.5 for thing in self.things], bool).reshape(-1, SIDE, SIDE)
        for i, mask in enumerate(covered):
            mask &= ~covered[i + 1 :].any(0)
        return np.concatenate([covered, ~covered.any(0, keepdims=True)])


def allowed_combinations(split: str) -> list[tuple[str, str, str, str]]:
    """List the combinations (shape, colour, size, position) that the objects of a split can have.

    One colour of each shape is reserved for ``unseen``. For every other combination of shape, colour and
    size, one position is reserved for ``test``.
    """
    one_of("split", split, SPLITS)
    return [
        tuple(FACTORS[factor][i] for factor, i in zip(THING_FACTORS, indices, strict=True))
        for indices in itertools.product(*(range(len(FACTORS[factor])) for factor in THING_FACTORS))
        if _split_of(*indices) == split
    ]


def _split_of(shape: int, colour: int, size: int, position: int) -> str:
    if colour == (3 * shape + 1) % len(COLOURS):
        return "unseen"
    return "test" if (2 * shape + colour + 4 * size) % len(POSITIONS) == position else "train"


@functools.cache
def _allowed_at(split: str) -> dict[str, list[tuple[str, str, str, str]]]:
    every = allowed_combinations(split)
    return {position: [choice for choice in every if choice[3] == position] for position in POSITIONS}


def sample(seed: int, split: str = "train") -> Scene:
    """Generate the scene of a split that belongs to a seed, 0 or more; the same seed always gives the same scene."""
    one_of("split", split, SPLITS)
    at_least("seed", seed, 0)
    rng = np.random.default_rng([SPLITS.index(split), seed])
    choices = _allowed_at(split)
    things = []
    for place in rng.permutation(len(POSITIONS))[: 1 + rng.choice(3, p=(0.4, 0.35, 0.25))]:
        options = choices[FACTORS["position"][place]]
        shape, colour, size, position = options[rng.integers(len(options))]
        offset = tuple(int(shift) for shift in rng.integers(-JITTER, JITTER + 1, 2))
        things.append(Thing(shape, colour, size, position, offset, _named(THING_FACTORS, rng)))
    texture, ground = (FACTORS[factor][rng.integers(len(FACTORS[factor]))] for factor in SCENE_FACTORS)
    return Scene(tuple(things), texture, ground, _named(SCENE_FACTORS, rng))


def _named(factors: tuple[str, ...], rng: np.random.Generator) -> tuple[str, ...]:
    return tuple(factor for factor in factors if rng.random() >= OMISSION_RATES[factor])


def render(scenes: Iterable[Scene]) -> Tensor:
    """Draw scenes: (N, 3, 64, 64) float32 in [-1, 1]."""
    pictures = np.array([scene.picture() for scene in scenes], np.float32).reshape(-1, SIDE, SIDE, 3)
    return torch.from_numpy(pictures).permute(0, 3, 1, 2).contiguous() * 2 - 1


@functools.cache
def background(texture: str, ground: str) -> np.ndarray:
    """Draw a ground without objects: (64, 64, 3) float32 in [0, 1], read-only."""
    one_of("texture", texture, TEXTURES)
    one_of("ground", ground, GROUNDS)
    y, x = np.mgrid[:SIDE, :SIDE].astype(np.float32) + 0.5
    dark = {
        "plain": np.zeros_like(x),
        "striped": x % 8 >= 4,
        "checkered": (x // 8 + y // 8) % 2,
        "dotted": np.clip(2.9 - np.hypot(x % 8 - 4, y % 8 - 4), 0, 1),
        "shaded": y / SIDE,
    }[texture]
    colour = np.array(GROUNDS[ground], np.float32) / 255
    canvas = (colour * (1 - (1 - SHADE) * dark[..., None])).astype(np.float32)
    canvas.flags.writeable = False
    return canvas


@functools.cache
def _stamp(shape: str, size: str) -> np.ndarray:
    """Compute how much of each pixel a shape covers, in a square of its size: (side, side) float32 in [0, 1]."""
    side = SIZES[size] * SUPERSAMPLING
    picture = PIL.Image.new("L", (side, side), 0)
    draw = PIL.ImageDraw.Draw(picture)
    if shape in ("circle", "ring"):
        draw.ellipse((0, 0, side - 1, side - 1), fill=255)
    if shape == "ring":
        hole = 0.27 * side
        draw.ellipse((hole, hole, side - 1 - hole, side - 1 - hole), fill=0)
    if shape in _OUTLINES:
        draw.polygon([(x * (side - 1), y * (side - 1)) for x, y in _OUTLINES[shape]()], fill=255)
    return np.asarray(picture.reduce(SUPERSAMPLING), np.float32) / 255


def _star() -> list[tuple[float, float]]:
    angles = np.pi * (np.arange(10) / 5 - 0.5)
    radii = np.where(np.arange(10) % 2, 0.22, 0.52)
    return [(0.5 + r * np.cos(a), 0.53 + r * np.sin(a)) for a, r in zip(angles, radii, strict=True)]


def _heart() -> list[tuple[float, float]]:
    t = np.linspace(0, 2 * np.pi, 60)
    x = 16 * np.sin(t) ** 3
    y = 13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t)
    return list(zip(0.5 + x / 32, (12 - y) / 29, strict=True))


_OUTLINES = {
    "square": lambda: [(0.06, 0.06), (0.94, 0.06), (0.94, 0.94), (0.06, 0.94)],
    "triangle": lambda: [(0.5, 0.02), (1, 0.95), (0, 0.95)],
    "star": _star,
    "cross": lambda: [
        (0.34, 0), (0.66, 0), (0.66, 0.34), (1, 0.34), (1, 0.66), (0.66, 0.66),
        (0.66, 1), (0.34, 1), (0.34, 0.66), (0, 0.66), (0, 0.34), (0.34, 0.34),
    ],
    "diamond": lambda: [(0.5, 0), (0.95, 0.5), (0.5, 1), (0.05, 0.5)],
    "heart": _heart,
}  # fmt: skip


def table_rows(split: str, seeds: Iterable[int]) -> Iterator[dict[str, Any]]:
    """Yield the rows of :func:`dataset`: ``image``, ``prompt``, ``seed``, ``masks`` and the label of every factor."""
    for seed in seeds:
        scene = sample(seed, split)
        labels = {factor: [getattr(thing, factor) for thing in scene.things] for factor in THING_FACTORS}
        labels |= {factor: getattr(scene, factor) for factor in SCENE_FACTORS}
        picture = PIL.Image.fromarray((scene.picture() * 255).round().astype(np.uint8))
        yield {"image": picture, "prompt": scene.prompt, "seed": seed, "masks": scene.masks(), **labels}


def dataset(split: str, count: int, first_seed: int = 0) -> "datasets.Dataset":
    """Make a ``datasets.Dataset`` of the scenes of ``count`` consecutive seeds, starting with ``first_seed``.

    Its columns are ``image``; ``prompt``; ``seed``; ``masks``, (things + 1, 64, 64) as in :meth:`Scene.masks`;
    ``shape``, ``colour``, ``size`` and ``position``, each a list with one label per object; ``texture`` and ``ground``,
    one label each.
    """
    import datasets

    at_least("count", count, 1)
    one_of("split", split, SPLITS)
    kinds = {factor: datasets.ClassLabel(names=list(values)) for factor, values in FACTORS.items()}
    features = datasets.Features(
        image=datasets.Image(),
        prompt=datasets.Value("string"),
        seed=datasets.Value("int64"),
        masks=datasets.List(datasets.Array2D((SIDE, SIDE), "bool")),
        **{factor: datasets.List(kinds[factor]) for factor in THING_FACTORS},
        **{factor: kinds[factor] for factor in SCENE_FACTORS},
    )
    table = table_rows(split, range(first_seed, first_seed + count))
    columns = {
        name: list(values)
        for name, *values in zip(features, *([row[n] for n in features] for row in table), strict=True)
    }
    return datasets.Dataset.from_dict(columns, features=features)
