"""Pictures with what is known of them: a data set's classes, or every factor of the world's scenes.

Of the world these are the scenes with a single thing, so that shape, colour, size, position, texture
and ground are one label each.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import count, islice
from typing import Any, NamedTuple

import numpy as np
import PIL.Image
import torch
import torch.nn.functional as F
from torch import Tensor

from vaelab import world
from vaelab.core.validate import at_least, one_of
from vaelab.data import images as data_images
from vaelab.data.transforms import preprocess

SLICE = re.compile(r"(\w+)(?:\[(\d*):(\d*)\])?")


class Picture(NamedTuple):
    """A picture that could be read."""

    image: int
    """Its number in the data set; of the world the scene's seed."""
    pixels: Tensor
    """(3, R, R) in [-1, 1]."""
    labels: dict[str, int]
    """The number of its class, by factor; -1 where it is withheld."""


@dataclass(frozen=True)
class Pictures:
    """Labelled pictures; ``pictures[i]`` is a :class:`Picture`, or None where it cannot be read."""

    name: str
    resolution: int
    classes: dict[str, list[str]]
    """The names of the classes, by factor; empty where nothing is known."""
    rows: Sequence[int]
    """Their numbers in the data set."""
    read: Callable[[int], tuple[Tensor, dict[str, int]] | None]
    """Pixels and labels of a number."""
    thing: Callable[[int], Tensor] | None = None
    """Where the picture of a number has its thing, (64, 64) bool; None where that is not known."""

    known: Callable[[], dict[str, list[int]]] | None = None
    """The class numbers of all of them, by factor, without reading any; None where only reading tells."""

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Picture | None:
        found = self.read(self.rows[index])
        return None if found is None else Picture(self.rows[index], *found)

    def stack(self, images: Sequence[int]) -> Tensor:
        """Pixels (N, 3, R, R) of pictures of these numbers of the data set, for a figure."""
        return torch.stack([self.read(image)[0] for image in images])

    def things(self, images: Sequence[int]) -> Tensor | None:
        """Where pictures of these numbers have their things, (N, 64, 64) bool; None where that is not known."""
        return torch.stack([self.thing(image) for image in images]) if self.thing else None

    def named(self, labels: dict[str, int]) -> dict[str, str]:
        """Class names of class numbers; those that are withheld are left out."""
        return {factor: self.classes[factor][label] for factor, label in labels.items() if label >= 0}


def load(
    dataset: str,
    *,
    split: str = "train",
    resolution: int = 64,
    max_images: int = 0,
    seed: int = 0,
    revision: str | None = None,
    labels: bool = True,
) -> Pictures:
    """Load labelled pictures.

    Args:
        dataset: ``world``, or any name of :func:`vaelab.data.images.load_images`, whose classes are the factor ``label``.
        split: its split, or a slice such as ``train[200:400]``.
        resolution: side R of the square pictures, in pixels.
        max_images: how many; of the world the first, else drawn by ``seed``; 0 takes all.
        seed: fixes which are drawn.
        revision: on the hub.
        labels: whether there must be any.

    Raises:
        ValueError: no such data set or split; one without labels; all of the world, which has no end.
    """
    if dataset == "world":
        return _scenes(split, resolution, max_images)
    images = data_images.load_images(
        dataset, split=split, resolution=resolution, max_images=max_images, seed=seed, revision=revision
    )

    if labels and not images.classes:
        raise ValueError(
            f"dataset: {dataset!r} has no labels; expected a column of class labels (datasets.ClassLabel), or a folder "
            "of pictures for each class"
        )

    def read(index: int) -> tuple[Tensor, dict[str, int]] | None:
        item = images[index]
        return None if item is None else (item["pixels"], {"label": item["label"]} if "label" in item else {})

    classes = {"label": images.classes} if images.classes else {}
    known = (lambda: {"label": images.labels}) if images.classes else None
    return Pictures(images.name, resolution, classes, range(len(images)), read, known=known)


def refuse_without_classes(pictures: Pictures) -> None:
    """Raise ValueError, before any picture is read, where classes cannot be told apart: one is withheld, all
    pictures are of one class, or each is of another."""
    for factor, labels in (pictures.known() if pictures.known else {}).items():
        if withheld := sum(label < 0 for label in labels):
            raise ValueError(f"split: {withheld} of {len(labels)} pictures of {pictures.name!r} have no label")
        if not 1 < len(set(labels)) < len(labels):
            raise ValueError(
                f"dataset: {pictures.name!r} has {len(labels)} pictures of {len(set(labels))} classes ({factor}); "
                "expected two classes or more, and more pictures than classes (max_images, split)"
            )


def _scenes(split: str, resolution: int, max_images: int) -> Pictures:
    at_least("resolution", resolution, 8)
    at_least("max_images", max_images, 0)
    found = SLICE.fullmatch(split)
    one_of("split (of 'world')", found[1] if found else split, world.SPLITS)
    base, begin, end = found[1], int(found[2] or 0), int(found[3]) if found[3] else None
    if max_images:
        end = min(begin + max_images, end or begin + max_images)
    if end is not None and end <= begin:
        raise ValueError(f"split: {split!r} holds no picture; it ends before it begins")
    if end is None:
        raise ValueError(f"max_images: the world has no end; take some of {split!r}, such as {base}[0:1000]")
    alone = (seed for seed in count() if len(world.sample(seed, base).things) == 1)

    def labels(scene: world.Scene) -> dict[str, int]:
        holders: dict[str, Any] = dict.fromkeys(world.THING_FACTORS, scene.things[0])
        holders |= dict.fromkeys(world.SCENE_FACTORS, scene)
        return {factor: world.FACTORS[factor].index(getattr(one, factor)) for factor, one in holders.items()}

    def read(seed: int) -> tuple[Tensor, dict[str, int]]:
        scene = world.sample(seed, base)
        picture = PIL.Image.fromarray((scene.picture() * 255).round().astype(np.uint8))
        return preprocess(picture, resolution), labels(scene)

    def known() -> dict[str, list[int]]:
        each = [labels(world.sample(seed, base)) for seed in numbers]
        return {factor: [one[factor] for one in each] for factor in classes}

    def thing(seed: int) -> Tensor:
        return torch.from_numpy(world.sample(seed, base).masks()[0])

    classes = {factor: list(values) for factor, values in world.FACTORS.items()}
    numbers = list(islice(alone, begin, end))
    return Pictures(f"world[{base}][{begin}:{end}]", resolution, classes, numbers, read, thing, known)


def crop_and_flip(pixels: Tensor, rng: np.random.Generator, smallest: float, flip: bool) -> Tensor:
    """A random square of a picture, brought back to its size, mirrored half of the time.

    Args:
        pixels: (3, R, R).
        rng: what decides.
        smallest: side of the smallest square, as a share of R.
        flip: whether to mirror at all.
    """
    whole = pixels.shape[-1]
    side = round(whole * rng.uniform(smallest, 1))
    top, left = rng.integers(0, whole - side + 1, 2)
    part = pixels[None, :, top : top + side, left : left + side]
    made = F.interpolate(part, size=(whole, whole), mode="bilinear", antialias=True)[0].clamp(-1, 1)
    return made.flip(-1) if flip and rng.random() < 0.5 else made
