"""Labelled examples out of a store of pictures' features: what is learned from, chosen by and tested on."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import count

import numpy as np
import torch
from torch import Tensor

from vaelab.core.validate import at_least, unknown
from vaelab.store.reader import Store
from vaelab.training.loop import Batches


@dataclass(frozen=True)
class Examples:
    """Pictures of a store with their classes. One may have several views (crops and flips), an item each."""

    kept: Store
    items: list[list[int]]
    """Of each picture its items, first that of the picture as it is."""
    labels: Tensor
    """(N,) int64 class numbers."""
    classes: list[str]
    """Their names."""

    def __len__(self) -> int:
        return len(self.items)

    def take(self, chosen: np.ndarray) -> "Examples":
        """The examples of these numbers."""
        return replace(self, items=[self.items[i] for i in chosen], labels=self.labels[torch.from_numpy(chosen)])

    def split(self, share: float, seed: int) -> tuple["Examples", "Examples"]:
        """All but a share of the pictures, and that share, drawn by ``seed``.

        Raises:
            ValueError: a share that leaves one of the two without a picture.
        """
        count = round(share * len(self))
        if not 0 < count < len(self):
            raise ValueError(f"validation_share: {share} of {len(self)} pictures leaves nothing on one side")
        order = np.random.default_rng(seed).permutation(len(self))
        return self.take(np.sort(order[count:])), self.take(np.sort(order[:count]))

    def vectors(self, block: str) -> tuple[np.ndarray, np.ndarray]:
        """The pooled vectors (N, d) float32 of the pictures as they are, and their classes (N,)."""
        rows = self.kept.maps(block, [views[0] for views in self.items])
        return rows.float().reshape(len(self), -1).numpy(), self.labels.numpy()

    def batches(self, block: str, batch_size: int) -> Iterator[dict[str, Tensor]]:
        """The pictures as they are, once, in order: ``maps`` (B, h, w, d) float32 and ``labels`` (B,)."""
        for begin in range(0, len(self), batch_size):
            part = range(begin, min(begin + batch_size, len(self)))
            maps = self.kept.maps(block, [self.items[i][0] for i in part]).float()
            yield {"maps": maps, "labels": self.labels[begin : begin + batch_size]}

    def shuffled(self, block: str, batch_size: int, seed: int) -> Batches:
        """Endless shuffled batches for :func:`vaelab.training.loop.train`, of each picture a view drawn anew in
        every epoch; epoch e is fixed by (seed, e) alone. The last batch of one is filled with its first
        pictures."""
        at_least("batch_size", batch_size, 1)

        def batches(start: int = 0, rank: int = 0, world: int = 1) -> Iterator[dict[str, Tensor]]:
            per_epoch = self.steps(batch_size * world)
            order, views, ordered = None, None, -1
            while True:
                epoch, place = divmod(start, per_epoch)
                if epoch != ordered:
                    rng = np.random.default_rng([seed, epoch])
                    order, views, ordered = rng.permutation(len(self)), rng.random(len(self)), epoch
                begin = (place * world + rank) * batch_size
                part = np.take(order, range(begin, begin + batch_size), mode="wrap")
                chosen = [self.items[i][int(views[i] * len(self.items[i]))] for i in part]
                maps = self.kept.maps(block, chosen).float()
                yield {"maps": maps, "labels": self.labels[torch.from_numpy(part)]}
                start += 1

        return batches

    def vector_batches(self, blocks: Sequence[str], batch_size: int, seed: int) -> Batches:
        """Endless shuffled batches (batch_size, d) of the pooled vectors of the pictures as they are, by block,
        for :func:`vaelab.sae.train.train_saes`. Pass follows upon pass without a gap; pass e is fixed by
        (seed, e) alone. The vectors of all pictures are held in memory, as they are stored.

        Raises:
            ValueError: a block whose items are maps.
        """
        at_least("batch_size", batch_size, 1)
        for block in blocks:
            if self.kept.layout[block].positions:
                raise ValueError(f"blocks: {block!r} holds maps, expected vectors that are means over positions")
        vectors = {block: self.kept.maps(block, [views[0] for views in self.items]) for block in blocks}
        order = lru_cache(maxsize=2)(lambda turn: np.random.default_rng([seed, turn]).permutation(len(self)))

        def batches(start: int = 0, rank: int = 0, world: int = 1) -> Iterator[dict[str, Tensor]]:
            for batch in count(start * world + rank, world):
                turns, places = np.divmod(np.arange(batch * batch_size, (batch + 1) * batch_size), len(self))
                parts = [order(int(turn))[places[turns == turn]] for turn in np.unique(turns)]
                chosen = torch.from_numpy(np.concatenate(parts))
                yield {block: rows[chosen].float() for block, rows in vectors.items()}

        return batches

    def steps(self, batch_size: int) -> int:
        """Batches to an epoch."""
        return -(-len(self) // batch_size)


def read(kept: Store, factor: str = "") -> Examples:
    """The labelled pictures of a store that :mod:`vaelab.probing.layer_features` wrote.

    Args:
        kept: the store; each item has ``image``, ``view`` and ``labels``.
        factor: which label; empty for the only one, or the first.

    Raises:
        ValueError: no such label, or pictures whose labels are withheld.
    """
    classes: Mapping[str, list[str]] = kept.settings.get("classes", {})
    if not classes:
        raise ValueError(f"dataset: the pictures of {kept.url} have no labels")
    factor = factor or next(iter(classes))
    if factor not in classes:
        raise unknown("factors", factor, classes)
    items: dict[int, list[tuple[int, int]]] = {}
    labels: dict[int, int] = {}
    for number, item in enumerate(kept.items):
        items.setdefault(item["image"], []).append((item["view"], number))
        labels[item["image"]] = item["labels"][factor]
    withheld = [image for image, label in labels.items() if label < 0]
    if withheld:
        raise ValueError(f"split: {len(withheld)} of {len(labels)} pictures have no label, first {withheld[0]}")
    ordered = [[number for _, number in sorted(views)] for views in items.values()]
    return Examples(kept, ordered, torch.tensor(list(labels.values())), list(classes[factor]))
