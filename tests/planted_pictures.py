"""A small store of layer features of pictures with known classes, in the layout that notebook 40 writes."""

import numpy as np
import torch

from vaelab import store
from vaelab.store.format import BlockShape

CLASSES = {"shape": ["circle", "square", "star"], "colour": ["red", "blue"]}
WIDTH = 6
LAYOUT = {"up.t25": BlockShape((), WIDTH), "up.t25.maps": BlockShape((4, 4), WIDTH)}


def labels(count, seed=0):
    rng = np.random.default_rng(seed)
    return [{factor: int(rng.integers(len(names))) for factor, names in CLASSES.items()} for _ in range(count)]


def planted_maps(truth, noise=0.1, seed=0):
    """Maps (N, 4, 4, WIDTH): the channel of a picture's shape is raised by 4 in one place; colours leave no trace."""
    generator = torch.Generator().manual_seed(seed)
    maps = noise * torch.randn(len(truth), 4, 4, WIDTH, generator=generator)
    for number, classes in enumerate(truth):
        maps[number, number % 4, number // 4 % 4, classes["shape"]] += 4
    return maps


def fill(folder, truth, *, noise=0.1, seed=0, views=1, images=None, digests=None, **more):
    """Write a complete store with ``views`` items of every picture, each with its own noise; ``digests`` are the
    checksums of the pictures' contents."""
    images = list(range(len(truth))) if images is None else images
    drawn = [planted_maps(truth, noise, 100 * seed + view) for view in range(views)]
    maps = torch.stack(drawn, 1).flatten(0, 1)
    items = [
        {"image": image, "view": view, "seed": seed, "timestep": [25], "labels": classes}
        for image, classes in zip(images, truth, strict=True) for view in range(views)
    ]  # fmt: skip
    for item in items if digests else ():
        item["digest"] = digests[item["image"]]
    settings = {"classes": CLASSES, "model": "planted", "timesteps": [25], "blocks": ["up"], **more}
    with store.create(folder, LAYOUT, precision="float32", items_per_shard=7, settings=settings) as writer:
        writer.add({"up.t25": maps.mean((1, 2)), "up.t25.maps": maps}, items)
    return store.open(folder)
