"""Labelled examples from a store of pictures' features, for training, validation and test."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from vaelab.core.devices import dtype
from vaelab.core.validate import unknown
from vaelab.store.reader import Store
from vaelab.training.batches import NumberedBatches, shuffled_batches

HELD_BYTES = 2**30
"""Maps of one layer that take at most so many bytes are held in memory by :meth:`Examples.hold`."""


@dataclass(frozen=True)
class Examples:
    """Pictures in a store, with the classes of one factor (a set of classes, such as the colours).

    A picture may have several views: the uncropped picture, and random crops of it, some of them mirrored.
    """

    store: Store
    """The features; each view of a picture is one item."""
    items: list[list[int]]
    """For each picture the indices of its views among the store's items. The first view is the uncropped picture."""
    labels: Tensor
    """(N,) int64 class indices; (N, factors) if :func:`join_factors` made the examples."""
    classes: list[str]
    """The class names."""
    held: dict[str, tuple[dict[int, int], Tensor]] = field(default_factory=dict)
    """Layers whose maps are in memory: the row of each item of the store, and the maps in the store's precision."""

    def __len__(self) -> int:
        return len(self.items)

    def images(self) -> list[int]:
        """Return the pictures' indices in their data set; for the world, the scenes' seeds."""
        return [self.store.items[views[0]]["image"] for views in self.items]

    def take(self, chosen: np.ndarray) -> "Examples":
        """Return the examples with these indices."""
        return replace(self, items=[self.items[i] for i in chosen], labels=self.labels[torch.from_numpy(chosen)])

    def split(self, share: float, seed: int) -> tuple["Examples", "Examples"]:
        """Split into a training and a validation part at random; all views of a picture stay together.

        Args:
            share: the fraction of the pictures that go into the validation part.
            seed: determines which pictures these are.

        Raises:
            ValueError: the share leaves either part empty.
        """
        held_out = round(share * len(self))
        if not 0 < held_out < len(self):
            raise ValueError(f"validation_share: {share} of {len(self)} pictures leaves one of the two parts empty")
        order = np.random.default_rng(seed).permutation(len(self))
        return self.take(np.sort(order[held_out:])), self.take(np.sort(order[:held_out]))

    def vectors(self, layer: str) -> tuple[np.ndarray, np.ndarray]:
        """Read the pooled vectors (N, d) float32 of the uncropped pictures, and their class indices (N,)."""
        rows = self.store.maps(layer, [views[0] for views in self.items])
        return rows.float().reshape(len(self), -1).numpy(), self.labels.numpy()

    def hold(self, layer: str) -> "Examples":
        """Return the examples with a layer's maps held in memory, if all views take at most :data:`HELD_BYTES`."""
        shape, items = self.store.layout[layer], [item for views in self.items for item in views]
        if len(items) * shape.count * shape.width * dtype(self.store.precision).itemsize > HELD_BYTES:
            return self
        rows = {item: row for row, item in enumerate(items)}
        return replace(self, held={**self.held, layer: (rows, self.store.maps(layer, items))})

    def maps(self, layer: str, items: Sequence[int]) -> Tensor:
        """Read the maps (n, h, w, d) float32 of some of the store's items."""
        if layer not in self.held:
            return self.store.maps(layer, items).float()
        rows, maps = self.held[layer]
        return maps[[rows[item] for item in items]].float()

    def batches(self, layer: str, batch_size: int) -> Iterator[dict[str, Tensor]]:
        """Read the uncropped pictures once, in order: ``maps`` (B, h, w, d) float32 and ``labels`` (B,)."""
        for begin in range(0, len(self), batch_size):
            part = range(begin, min(begin + batch_size, len(self)))
            maps = self.maps(layer, [self.items[i][0] for i in part])
            yield {"maps": maps, "labels": self.labels[begin : begin + batch_size]}

    def shuffled(self, layer: str, batch_size: int, seed: int) -> NumberedBatches:
        """Make endless shuffled batches for :func:`vaelab.training.loop.train`; each epoch has one random view of every
        picture.

        The order and the views of an epoch depend only on ``seed`` and the epoch's index, so training can resume at any
        batch. The last batch of an epoch is filled up with the epoch's first pictures.
        """

        @lru_cache(maxsize=2)
        def views(epoch: int) -> np.ndarray:
            rng = np.random.default_rng([seed, epoch])
            rng.permutation(len(self))  # the same generator has given the order
            return rng.random(len(self))

        def take(pictures: np.ndarray, epoch: int) -> dict[str, Tensor]:
            drawn = views(epoch)
            items = [self.items[i][int(drawn[i] * len(self.items[i]))] for i in pictures]
            return {"maps": self.maps(layer, items), "labels": self.labels[torch.from_numpy(pictures)]}

        return shuffled_batches(len(self), batch_size, seed, take, remainder="wrap")

    def vector_batches(self, layers: Sequence[str], batch_size: int, seed: int) -> NumberedBatches:
        """Make endless shuffled batches (batch_size, d) of several layers' pooled vectors, of the uncropped pictures.

        They are for :func:`vaelab.sae.train.train_saes`. A batch may span two epochs. The order of an epoch depends
        only on ``seed`` and the epoch's index. All vectors are held in memory, in the store's precision.

        Raises:
            ValueError: a layer holds maps instead of pooled vectors.
        """
        for layer in layers:
            if self.store.layout[layer].positions:
                raise ValueError(f"layers: {layer!r} holds maps, expected vectors averaged over positions")
        vectors = {layer: self.store.maps(layer, [views[0] for views in self.items]) for layer in layers}

        def take(pictures: np.ndarray, epoch: int) -> dict[str, Tensor]:
            return {layer: rows[torch.from_numpy(pictures)].float() for layer, rows in vectors.items()}

        return shuffled_batches(len(self), batch_size, seed, take, remainder="join")

    def steps(self, batch_size: int) -> int:
        """Compute the number of batches per epoch."""
        return -(-len(self) // batch_size)


def load_examples(store: Store, factor: str = "") -> Examples:
    """Load the labelled pictures of a store that :mod:`vaelab.probing.layer_features` wrote.

    Args:
        store: the store; each of its items has ``image``, ``view`` and ``labels``.
        factor: the name of the set of classes; empty means the first.

    Raises:
        ValueError: the store has no such factor, or a picture has no label.
    """
    classes: Mapping[str, list[str]] = store.settings.get("classes", {})
    if not classes:
        raise ValueError(f"dataset: the pictures of {store.url} have no labels")
    factor = factor or next(iter(classes))
    if factor not in classes:
        raise unknown("factors", factor, classes)
    items: dict[int, list[tuple[int, int]]] = {}
    labels: dict[int, int] = {}
    for number, item in enumerate(store.items):
        items.setdefault(item["image"], []).append((item["view"], number))
        labels[item["image"]] = item["labels"][factor]
    unlabelled = [image for image, label in labels.items() if label < 0]
    if unlabelled:
        raise ValueError(f"split: {len(unlabelled)} of {len(labels)} pictures have no label, first {unlabelled[0]}")
    ordered = [[number for _, number in sorted(views)] for views in items.values()]
    return Examples(store, ordered, torch.tensor(list(labels.values())), list(classes[factor]))


def join_factors(examples: Sequence[Examples]) -> Examples:
    """Join the labels of several factors of the same pictures: ``labels`` (N, factors); the class names are left out.

    Raises:
        ValueError: the pictures are not the same.
    """
    first = examples[0]
    if any(each.store is not first.store or each.items != first.items for each in examples):
        raise ValueError("examples: the factors have different pictures")
    return replace(first, labels=torch.stack([each.labels for each in examples], 1), classes=[])
