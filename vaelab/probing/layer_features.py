"""What layers of a denoiser make of noised pictures, over timesteps, into a store with the labels beside it.

As Kim et al. ("Revelio", sections 3.2 and 4.1): a picture goes through the autoencoder, is noised to
timestep t and passes once through the denoiser; the features are a block's output, as a map and as
its mean over positions. All blocks share the pass of a timestep, which ends after the last of them.
"""

import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from torch import Tensor
from tqdm import tqdm

from vaelab import activations, store
from vaelab.core import devices
from vaelab.core.validate import at_least, one_of, unknown
from vaelab.data.labelled import Picture, Pictures, crop_and_flip
from vaelab.hooks import SIDES
from vaelab.models import block_names
from vaelab.models.block_names import denoiser
from vaelab.models.conditioning import by_class
from vaelab.probing import clip as probing_clip
from vaelab.probing.clip import ClipNames
from vaelab.probing.dataset import Examples
from vaelab.probing.linear import class_share

MAPS = ".maps"


@dataclass(frozen=True)
class LayerConfig:
    """What is taken of which layers."""

    blocks: tuple[str, ...]
    """Short names, globs or module paths."""
    timesteps: tuple[int, ...]
    """From 0, the picture, to the scheduler's last, noise."""
    prompt: str = ""
    """Of every picture; empty for none. A factor in braces, ``a photo of a {label}``, stands for the
    picture's true class, so that the features have been told what they are asked; of a
    class-conditional model it names one of its classes, or is the class's number where they have no names."""
    clip: str = ""
    """Id or folder of a CLIP model that infers what stands in braces from the picture; empty for the true class."""
    clip_revision: str = ""
    """Of it, on the hub."""
    side: str = "output"
    """``output``, ``input`` or ``update`` of the blocks."""
    maps: bool = False
    """Whether the maps are kept beside their means over positions."""
    views: int = 1
    """Items of a picture: itself, and so many less one random crops and flips of it."""
    smallest_crop: float = 0.6
    """Side of the smallest crop, as a share of the picture's."""
    flips: bool = True
    """Whether views are mirrored half of the time, which changes what is left and right."""
    batch_size: int = 16
    """Pictures at once."""
    seed: int = 0
    """With a picture's number it fixes the picture's noise and its views."""
    precision: str = "float16"
    """Of what is stored."""
    items_per_shard: int = 256
    """About how many items a shard holds: as many as make whole batches."""

    def __post_init__(self) -> None:
        for name in ("batch_size", "views", "items_per_shard"):
            at_least(name, getattr(self, name), 1)
        one_of("side", self.side, SIDES)
        one_of("stored_precision", self.precision, devices.PRECISIONS)
        if not 0 < self.smallest_crop <= 1:
            raise ValueError(f"smallest_crop: expected a share above 0, at most 1, got {self.smallest_crop!r}")
        for name in ("blocks", "timesteps"):
            given = getattr(self, name)
            if not given or len(set(given)) < len(given):
                raise ValueError(f"{name}: expected one or more different ones, got {list(given)}")


class Captures(NamedTuple):
    """What one batch gave: n items."""

    items: list[dict[str, Any]]
    """``image``, ``view``, ``number``, ``seed``, ``timestep`` (all of them), ``labels`` and, with CLIP,
    ``inferred`` of each."""
    maps: dict[str, Tensor]
    """(n, d) under the name of each layer and timestep, and (n, h, w, d) under that name with ``.maps``."""


def name(block: str, timestep: int) -> str:
    """What a block at a timestep is called in the store."""
    return f"{block}.t{timestep}"


def parts(layer: str) -> tuple[str, int]:
    """The block and the timestep that :func:`name` made a layer's name of."""
    block, _, timestep = layer.rpartition(".t")
    return block, int(timestep)


def placed(rows: pd.DataFrame) -> pd.DataFrame:
    """Rows with the ``block`` and the ``timestep`` of their ``layer``."""
    found = [parts(layer) for layer in rows["layer"]]
    return rows.assign(block=[block for block, _ in found], timestep=[timestep for _, timestep in found])


def namer(pipeline: Any, pictures: Pictures, config: LayerConfig) -> ClipNames | None:
    """What infers the classes that stand in the prompt's braces; None where they are the true ones.

    Raises:
        ValueError: with CLIP, a prompt without a factor in braces, or no such model.
    """
    if not config.clip:
        return None
    texts = probing_clip.texts(config.prompt, pictures.classes)
    device = str(denoiser(pipeline).device)
    return probing_clip.load(config.clip, texts, device=device, revision=config.clip_revision or None)


def captures(
    pipeline: Any, pictures: Pictures, config: LayerConfig, *, start: int = 0, names: ClipNames | None = None
) -> Iterator[Captures]:
    """Batches of features, view by view; what cannot be read is left out with its labels.

    Args:
        pipeline: a diffusers pipeline.
        pictures: labelled ones.
        config: what is taken.
        start: views, of readable pictures or not, to pass over; a whole number of batches.
        names: from :func:`namer`; None where ``config.clip`` is empty, else it is made here.
    """
    names = names or namer(pipeline, pictures, config)
    total = len(pictures) * config.views
    for first in range(start, total, config.batch_size):
        numbers = range(first, min(first + config.batch_size, total))
        found = [(number, pictures[number // config.views]) for number in numbers]
        readable = [(number, picture) for number, picture in found if picture is not None]
        if readable:
            yield _captured(pipeline, pictures, config, readable, names)


def _captured(
    pipeline: Any, pictures: Pictures, config: LayerConfig, readable: Sequence[tuple[int, Picture]],
    names: ClipNames | None,
) -> Captures:  # fmt: skip
    views = [number % config.views for number, _ in readable]
    seeds = [_seed(config.seed, picture.image, view) for view, (_, picture) in zip(views, readable, strict=True)]
    pixels = [
        crop_and_flip(picture.pixels, np.random.default_rng(seed), config.smallest_crop, config.flips)
        if view
        else picture.pixels
        for seed, view, (_, picture) in zip(seeds, views, readable, strict=True)
    ]
    labels = [picture.labels for _, picture in readable]
    inferred = names(torch.stack([picture.pixels for _, picture in readable])) if names else None
    features = activations.from_pictures(
        pipeline, torch.stack(pixels), seeds, config.timesteps, config.blocks, side=config.side,
        prompts=prompts(pipeline, pictures, config.prompt, inferred or labels),
    )  # fmt: skip
    maps = {}
    for block, each in features.maps.items():
        for timestep, one in zip(config.timesteps, each, strict=True):
            maps[name(block, timestep)] = one.float().mean((1, 2))
            if config.maps:
                maps[name(block, timestep) + MAPS] = one
    items = [
        {"image": picture.image, "view": view, "number": number, "seed": seed, "timestep": list(config.timesteps),
         "labels": picture.labels}
        for seed, view, (number, picture) in zip(seeds, views, readable, strict=True)
    ]  # fmt: skip
    for item, one in zip(items, inferred or [], strict=False):
        item["inferred"] = one
    return Captures(items, maps)


def collect(
    pipeline: Any,
    pictures: Pictures,
    config: LayerConfig,
    folder: str | Path,
    *,
    settings: dict[str, Any] | None = None,
) -> store.Store:
    """Write the features of all pictures to a store, going on where a killed call left it.

    Args:
        pipeline: a diffusers pipeline.
        pictures: labelled ones.
        config: what is taken.
        folder: of the store.
        settings: what else decides the numbers, plain JSON, such as the model's name.

    Raises:
        ValueError: no picture can be read, a store of other settings, or values that the precision
            cannot hold.
    """
    names = namer(pipeline, pictures, config)
    first = next(captures(pipeline, pictures, config, names=names), None)
    if first is None:
        raise ValueError(f"dataset: no picture of {pictures.name!r} can be read")
    layout = {block: store.BlockShape(tuple(one.shape[1:-1]), one.shape[-1]) for block, one in first.maps.items()}
    decides = {key: value for key, value in asdict(config).items() if key not in ("items_per_shard", "batch_size")}
    named = {
        **decides, **(settings or {}), "blocks": list(block_names.resolve(pipeline, config.blocks)),
        "timesteps": list(config.timesteps), "classes": pictures.classes, "pictures": len(pictures),
        "dataset": pictures.name, "resolution": pictures.resolution,
    }  # fmt: skip
    per_shard = -(-config.items_per_shard // config.batch_size) * config.batch_size
    with store.create(folder, layout, precision=config.precision, items_per_shard=per_shard, settings=named) as writer:
        after = -1
        if writer.items_done and not writer.complete:
            after = store.open(folder).items[writer.items_done - 1]["number"]
        start = (after + 1) // config.batch_size * config.batch_size
        total = len(pictures) * config.views
        with tqdm(
            total=total, initial=start, desc="layer features", unit="view", file=sys.stdout, mininterval=2, ncols=100
        ) as bar:
            for batch in [] if writer.complete else captures(pipeline, pictures, config, start=start, names=names):
                fresh = [place for place, item in enumerate(batch.items) if item["number"] > after]
                writer.add(
                    {block: maps[fresh].cpu() for block, maps in batch.maps.items()}, [batch.items[i] for i in fresh]
                )
                bar.update(min(config.batch_size, total - bar.n))
    return store.open(folder)


def _seed(seed: int, image: int, view: int) -> int:
    return int(np.random.SeedSequence([seed, image, view]).generate_state(1, np.uint64)[0] >> 1)


def prompts(pipeline: Any, pictures: Pictures, prompt: str, labels: Sequence[dict[str, int]]) -> list[str | int] | None:
    """The prompts of pictures of these classes, see :class:`LayerConfig`; None where there is no prompt.

    Raises:
        ValueError: an unknown factor in braces, or one whose class is withheld.
    """
    if not prompt:
        return None
    numbered = by_class(pipeline) and not getattr(pipeline, "labels", None)
    words = labels if numbered else [{k: v.replace("_", " ") for k, v in pictures.named(one).items()} for one in labels]
    try:
        return [prompt.format_map(one) for one in words]
    except (KeyError, IndexError, ValueError) as error:
        raise unknown("prompt (what stands in braces)", str(error).strip("'"), pictures.classes) from error


def inferred_right(kept: store.Store) -> dict[str, float]:
    """By factor, how often the class that CLIP inferred is the picture's; empty where it inferred none."""
    told = [(item["inferred"], item["labels"]) for item in kept.items if item["view"] == 0 and "inferred" in item]
    factors = told[0][0] if told else ()
    return {factor: sum(one[factor] == truth[factor] for one, truth in told) / len(told) for factor in factors}


def shares(by_factor: Mapping[str, Examples], blocks: Sequence[str], timesteps: Sequence[int]) -> pd.DataFrame:
    """How loud each factor is, see :func:`vaelab.probing.linear.class_share`.

    Args:
        by_factor: the same pictures with the classes of each factor.
        blocks: short names, as in the store's settings.
        timesteps: those of the store.

    Returns:
        A row a block and timestep: ``layer``, and a column a factor.
    """
    rows = []
    for layer in (name(block, timestep) for block in blocks for timestep in timesteps):
        each = {factor: class_share(*one.vectors(layer)) for factor, one in by_factor.items()}
        rows.append({"layer": layer, **each})
    return pd.DataFrame(rows)


def refuse_other_pictures(kept: store.Store, pictures: Pictures, model: str, parameter: str) -> None:
    """Raise ValueError unless a store holds features of these pictures and of the model of that name.

    Args:
        kept: the store, which the parameter of that name named.
        pictures: as they were loaded here.
        model: its name.
        parameter: what errors call the store.
    """
    told = {"model": model, "dataset": pictures.name, "resolution": pictures.resolution}
    for setting, here in told.items():
        there = kept.settings.get(setting)
        if there != here:
            raise ValueError(f"{parameter}: made with {setting} {there!r}, here it is {here!r}; give the same")


def pooled(kept: store.Store) -> list[str]:
    """The names of a store's layers and timesteps whose items are means over positions."""
    return [layer for layer in kept.layout if not layer.endswith(MAPS)]


def whole_maps(pipeline: Any, pictures: Pictures, config: LayerConfig) -> tuple[list[int], dict[str, Tensor]]:
    """The maps of a few pictures, kept in memory: the numbers of those that could be read, and for each
    layer and timestep (N, h, w, d) on the CPU.

    Raises:
        ValueError: no picture can be read.
    """
    made = list(captures(pipeline, pictures, config))
    if not made:
        raise ValueError(f"dataset: no picture of {pictures.name!r} can be read")
    names = [layer for layer in made[0].maps if layer.endswith(MAPS)]
    maps = {layer.removesuffix(MAPS): torch.cat([batch.maps[layer].cpu() for batch in made]) for layer in names}
    return [item["image"] for batch in made for item in batch.items], maps
