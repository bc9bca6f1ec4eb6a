"""Pictures with their labels: a data set's classes, or every factor of the world's scenes.

Of the world these are the scenes with a single thing, so that shape, colour, size, position, texture
and ground are one label each.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import count, islice
from typing import Any, NamedTuple

import numpy as np
import PIL.Image
import torch
import torch.nn.functional as F
from torch import Tensor

from vaelab import world
from vaelab.core.validate import at_least, one_of
from vaelab.data.images import load_images
from vaelab.data.transforms import preprocess

SLICE = re.compile(r"(\w+)(?:\[(\d*):(\d*)\])?")


class LabelledPicture(NamedTuple):
    """A picture that could be read."""

    image: int
    """Its number in the data set; of the world the scene's seed."""
    pixels: Tensor
    """(3, R, R) in [-1, 1]."""
    labels: dict[str, int]
    """The number of its class, by factor; -1 where the label is withheld."""


@dataclass(frozen=True)
class LabelledPictures:
    """Labelled pictures; ``pictures[i]`` is a :class:`Picture`, or None where it cannot be read."""

    name: str
    resolution: int
    classes: dict[str, list[str]]
    """The names of the classes, by factor; empty where the data set has none."""
    numbers: Sequence[int]
    """The pictures' numbers in the data set."""
    read: Callable[[int], tuple[Tensor, dict[str, int]] | None]
    """Pixels and labels of the picture of a number."""
    read_mask: Callable[[int], Tensor] | None = None
    """Where the picture of a number shows its thing, (64, 64) bool; None where that is unknown."""
    read_labels: Callable[[], dict[str, list[int]]] | None = None
    """The class numbers of all pictures, by factor, without reading any; None where they are unknown before."""
    source: dict[str, list[list[int]]] = field(default_factory=dict)
    """Where the pictures were drawn from, for :func:`vaelab.data.images.shared_pictures`."""

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, index: int) -> LabelledPicture | None:
        number = self.numbers[index]
        content = self.read(number)
        return None if content is None else LabelledPicture(number, *content)

    def stack(self, numbers: Sequence[int]) -> Tensor:
        """Pixels (N, 3, R, R) of the pictures of these numbers in the data set, for a figure."""
        return torch.stack([self.read(number)[0] for number in numbers])

    def masks(self, numbers: Sequence[int]) -> Tensor | None:
        """Where the pictures of these numbers show their things, (N, 64, 64) bool; None where that is unknown."""
        return torch.stack([self.read_mask(number) for number in numbers]) if self.read_mask else None

    def class_names(self, labels: dict[str, int]) -> dict[str, str]:
        """The names of class numbers, by factor; without the factors whose label is withheld."""
        return {factor: self.classes[factor][label] for factor, label in labels.items() if label >= 0}


def load_labelled(
    dataset: str,
    *,
    split: str = "train",
    resolution: int = 64,
    max_images: int = 0,
    seed: int = 0,
    revision: str | None = None,
    labels: bool = True,
    image_column: str | None = None,
    label_column: str | None = None,
) -> LabelledPictures:
    """Load labelled pictures.

    Args:
        dataset: ``world``, or any name of :func:`vaelab.data.images.load_images`; its classes are the factor
            ``label``.
        split: a split's name, or a slice such as ``train[200:400]``.
        resolution: side R of the square pictures, in pixels.
        max_images: how many; of the world the first, of other data sets drawn by ``seed``; 0 takes all.
        seed: fixes which pictures are drawn.
        revision: a branch, tag or commit on the hub.
        labels: whether the data set must have labels.
        image_column: the column of pictures, as in :func:`vaelab.data.images.load_images`.
        label_column: the column of labels, as in :func:`vaelab.data.images.load_images`.

    Raises:
        ValueError: no such data set, split or column; no labels, or several columns of them and none chosen; or all
            of the world, which has no end.
    """
    if dataset == "world":
        if image_column or label_column:
            raise ValueError("label_column: the world has no columns; its factors are all labels")
        if revision:
            raise ValueError(f"revision: {revision!r} was given for the world, which has no revisions")
        return _scenes(split, resolution, max_images)
    images = load_images(
        dataset, split=split, resolution=resolution, max_images=max_images, seed=seed, revision=revision,
        image_column=image_column, label_column=label_column,
    )  # fmt: skip
    if labels and images.label_choices:
        raise ValueError(f"label_column: {dataset!r} needs one of {', '.join(images.label_choices)}")
    if labels and not images.classes:
        raise ValueError(
            f"dataset: {dataset!r} has no labels; expected a column of labels, or a folder of pictures for each class"
        )

    def read(index: int) -> tuple[Tensor, dict[str, int]] | None:
        item = images[index]
        return None if item is None else (item["pixels"], {"label": item["label"]} if "label" in item else {})

    return LabelledPictures(
        images.name,
        resolution,
        {"label": images.classes} if images.classes else {},
        range(len(images)),
        read,
        read_labels=(lambda: {"label": images.labels}) if images.classes else None,
        source=images.source,
    )


def validate_classes(pictures: LabelledPictures) -> None:
    """Validate, before any picture is read, that classes can be learned and tested.

    Raises:
        ValueError: a label is withheld, all pictures are of one class, or each is of another.
    """
    for factor, labels in (pictures.read_labels() if pictures.read_labels else {}).items():
        if withheld := sum(label < 0 for label in labels):
            raise ValueError(f"split: {withheld} of {len(labels)} pictures of {pictures.name!r} have no label")
        if not 1 < len(set(labels)) < len(labels):
            raise ValueError(
                f"dataset: {pictures.name!r} has {len(labels)} pictures of {len(set(labels))} classes ({factor}); "
                "expected two classes or more, and more pictures than classes (max_images, split)"
            )


def _scenes(split: str, resolution: int, max_images: int) -> LabelledPictures:
    at_least("resolution", resolution, 8)
    at_least("max_images", max_images, 0)
    match = SLICE.fullmatch(split)
    one_of("split (of 'world')", match[1] if match else split, world.SPLITS)
    base, begin, end = match[1], int(match[2] or 0), int(match[3]) if match[3] else None
    if max_images:
        end = min(begin + max_images, end or begin + max_images)
    if end is not None and end <= begin:
        raise ValueError(f"split: {split!r} holds no picture; it ends before it begins")
    if end is None:
        raise ValueError(f"max_images: the world has no end; take some of {split!r}, such as {base}[0:1000]")
    with_one_thing = (seed for seed in count() if len(world.sample(seed, base).things) == 1)
    seeds = list(islice(with_one_thing, begin, end))
    classes = {factor: list(values) for factor, values in world.FACTORS.items()}

    def labels(scene: world.Scene) -> dict[str, int]:
        holders: dict[str, Any] = dict.fromkeys(world.THING_FACTORS, scene.things[0])
        holders |= dict.fromkeys(world.SCENE_FACTORS, scene)
        return {factor: world.FACTORS[factor].index(getattr(holder, factor)) for factor, holder in holders.items()}

    def read(seed: int) -> tuple[Tensor, dict[str, int]]:
        scene = world.sample(seed, base)
        picture = PIL.Image.fromarray((scene.picture() * 255).round().astype(np.uint8))
        return preprocess(picture, resolution), labels(scene)

    def read_labels() -> dict[str, list[int]]:
        of_each = [labels(world.sample(seed, base)) for seed in seeds]
        return {factor: [labels[factor] for labels in of_each] for factor in classes}

    def read_mask(seed: int) -> Tensor:
        return torch.from_numpy(world.sample(seed, base).masks()[0])

    name, source = f"world[{base}][{begin}:{end}]", {f"world[{base}], scenes of one thing": [[begin, end]]}
    return LabelledPictures(name, resolution, classes, seeds, read, read_mask, read_labels, source)


def crop_and_flip(pixels: Tensor, rng: np.random.Generator, smallest: float, flip: bool) -> Tensor:
    """A random square of a picture, resized to the picture's size, mirrored half of the time.

    Args:
        pixels: (3, R, R) in [-1, 1].
        rng: decides the square and whether it is mirrored.
        smallest: side of the smallest square, as a share of R.
        flip: whether to mirror at all.

    Returns:
        (3, R, R) in [-1, 1].
    """
    whole = pixels.shape[-1]
    side = round(whole * rng.uniform(smallest, 1))
    top, left = rng.integers(0, whole - side + 1, 2)
    part = pixels[None, :, top : top + side, left : left + side]
    resized = F.interpolate(part, size=(whole, whole), mode="bilinear", antialias=True)[0].clamp(-1, 1)
    return resized.flip(-1) if flip and rng.random() < 0.5 else resized
