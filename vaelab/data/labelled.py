"""Pictures with their labels: a data set's classes, or the factors of scenes of the synthetic world.

A factor is an attribute such as colour. Of the synthetic scene world (:mod:`vaelab.world`) only scenes with a single
object are used, so that shape, colour, size, position, texture and ground have one label each.
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
    """The picture's index in the data set; for the world, the scene's seed."""
    pixels: Tensor
    """(3, R, R) in [-1, 1]."""
    labels: dict[str, int]
    """The picture's class index, by factor; -1 if the label is withheld."""


@dataclass(frozen=True)
class LabelledPictures:
    """Labelled pictures; ``pictures[i]`` is a :class:`LabelledPicture`, or None if the picture cannot be read."""

    name: str
    resolution: int
    classes: dict[str, list[str]]
    """The names of the classes, by factor; empty if the data set has no classes."""
    numbers: Sequence[int]
    """The pictures' indices in the data set; for the world, the scenes' seeds."""
    read: Callable[[int], tuple[Tensor, dict[str, int]] | None]
    """Reads the pixels and labels of a picture, given an entry of ``numbers``."""
    read_mask: Callable[[int], Tensor] | None = None
    """Returns the pixels in which a picture shows its object, (64, 64) bool; None if they are unknown."""
    read_labels: Callable[[], dict[str, list[int]]] | None = None
    """Returns the class indices of all pictures, by factor, without reading pictures; None if they are unknown."""
    source: dict[str, list[list[int]]] = field(default_factory=dict)
    """Which pictures of which splits these are, for :func:`vaelab.data.images.shared_pictures`."""

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, index: int) -> LabelledPicture | None:
        number = self.numbers[index]
        content = self.read(number)
        return None if content is None else LabelledPicture(number, *content)

    def stack(self, numbers: Sequence[int]) -> Tensor:
        """Read the pixels (N, 3, R, R) of some pictures for a figure; ``numbers`` are entries of ``self.numbers``."""
        return torch.stack([self.read(number)[0] for number in numbers])

    def masks(self, numbers: Sequence[int]) -> Tensor | None:
        """Return the pixels in which some pictures show their objects, (N, 64, 64) bool; None if they are unknown."""
        return torch.stack([self.read_mask(number) for number in numbers]) if self.read_mask else None

    def class_names(self, labels: dict[str, int]) -> dict[str, str]:
        """Return the names of the classes of ``labels``, by factor; factors whose label is withheld are left out."""
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
    background: str = "white",
    white_level: float | None = None,
) -> LabelledPictures:
    """Load labelled pictures.

    Args:
        dataset: ``world``, or any name of :func:`vaelab.data.images.load_images`; its classes are the factor
            ``label``.
        split: a split's name, or a slice such as ``train[200:400]``.
        resolution: side R of the square pictures, in pixels.
        max_images: the number of pictures: of the world the first ones, of other data sets a random sample by
            ``seed``; 0 takes all.
        seed: determines which pictures are sampled.
        revision: a branch, tag or commit on the hub.
        labels: whether the data set must have labels.
        image_column: the column of pictures, as in :func:`vaelab.data.images.load_images`.
        label_column: the column of labels, as in :func:`vaelab.data.images.load_images`.
        background: the colour behind transparent pixels, as in :func:`vaelab.data.images.load_images`.
        white_level: the value that is white in deep greyscale pictures, likewise.

    Raises:
        ValueError: there is no such data set, split or column; labels are required and there are none, or several
            columns of labels and none is chosen; or all pictures of the world, which has no end, were asked for.
    """
    if dataset == "world":
        if image_column or label_column:
            raise ValueError("label_column: the world has no columns; its factors are all labels")
        if revision:
            raise ValueError(f"revision: {revision!r} was given for the world, which has no revisions")
        return _scenes(split, resolution, max_images)
    images = load_images(
        dataset, split=split, resolution=resolution, max_images=max_images, seed=seed, revision=revision,
        image_column=image_column, label_column=label_column, background=background, white_level=white_level,
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


def validate_classes(pictures: LabelledPictures, factors: Sequence[str] = ()) -> None:
    """Check, before any picture is read, that the classes can be learned and tested.

    Args:
        pictures: the pictures.
        factors: names of factors, which must exist.

    Raises:
        ValueError: a factor is unknown, a label is withheld, all pictures are of one class, or each picture is of
            another class.
    """
    for factor in factors:
        one_of("factors", factor, pictures.classes)
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
    """Crop a random square of a picture, resize it to the picture's size, and mirror it with probability 1/2.

    Args:
        pixels: the picture (3, R, R) in [-1, 1].
        rng: determines the square and whether it is mirrored.
        smallest: the side of the smallest square, as a fraction of R.
        flip: whether squares may be mirrored.

    Returns:
        (3, R, R) in [-1, 1].
    """
    whole = pixels.shape[-1]
    side = round(whole * rng.uniform(smallest, 1))
    top, left = rng.integers(0, whole - side + 1, 2)
    part = pixels[None, :, top : top + side, left : left + side]
    resized = F.interpolate(part, size=(whole, whole), mode="bilinear", antialias=True)[0].clamp(-1, 1)
    return resized.flip(-1) if flip and rng.random() < 0.5 else resized
