"""Features of labelled pictures from a denoiser's layers at several timesteps, collected into a store.

Kim et al. ("Revelio", sections 3.2 and 4.1): a picture is encoded by the autoencoder, noised to timestep t and passed
once through the denoiser. The features are a block's output, as a map and as its mean over positions. All blocks share
the pass of a timestep, which stops after the last of them. "Layer" means a block at a timestep, such as ``up_ft1.t25``.
"""

import hashlib
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from torch import Tensor
from tqdm import tqdm

from vaelab import activations, store
from vaelab.activations.collect import peak_memory
from vaelab.core import devices
from vaelab.core.paths import local
from vaelab.core.validate import at_least, one_of, unknown
from vaelab.data.labelled import LabelledPicture, LabelledPictures, crop_and_flip
from vaelab.hooks import SIDES
from vaelab.models import block_names
from vaelab.models.block_names import find_denoiser
from vaelab.models.conditioning import is_class_conditional
from vaelab.models.registry import files_digest
from vaelab.probing.clip import ZeroShotClip, load_clip, prompt_texts
from vaelab.probing.dataset import Examples
from vaelab.probing.linear import class_share

MAPS = ".maps"
"""Ending of the store's name for a layer's maps; without it stand their means over positions."""


@dataclass(frozen=True)
class LayerConfig:
    """Which features of which layers are collected."""

    blocks: tuple[str, ...]
    """Short names, globs or module paths."""
    timesteps: tuple[int, ...]
    """From 0, the picture without noise, to the schedule's last."""
    prompt: str = ""
    """For every picture; empty for none. A factor in braces, ``a photo of a {label}``, is replaced by the picture's
    true class: such features have been given the answer. For a class-conditional model it names one of its classes, or
    is the class's number if they have no names."""
    clip: str = ""
    """Id or folder of a CLIP model that infers the classes in braces from the picture; empty for the true ones."""
    clip_revision: str = ""
    """Of the CLIP model, on the hub."""
    side: str = "output"
    """``output``, ``input`` or ``update`` (output minus input) of the blocks."""
    maps: bool = False
    """Whether maps are stored beside their means over positions."""
    views: int = 1
    """Items per picture: the uncropped picture, and ``views`` - 1 random crops and flips of it."""
    smallest_crop: float = 0.6
    """Side of the smallest crop, as a share of the picture's."""
    flips: bool = True
    """Whether each crop is mirrored with probability 1/2, which exchanges left and right."""
    batch_size: int = 16
    """Views per pass."""
    seed: int = 0
    """Together with a picture's number, it fixes the noise and the crops."""
    precision: str = "float16"
    """Of the stored numbers."""
    items_per_shard: int = 256
    """Items of a shard, rounded up to whole batches."""

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
                raise ValueError(f"{name}: expected one or more, each once, got {list(given)}")


class FeatureBatch(NamedTuple):
    """The features of one batch of n views."""

    items: list[dict[str, Any]]
    """For each view ``image`` (the picture's number), ``view``, ``number`` (of the view among all), ``seed``,
    ``timestep`` (all of them), ``labels``, ``digest`` (of the uncropped picture) and, with CLIP, ``inferred``."""
    maps: dict[str, Tensor]
    """For each layer (n, d), and with ``.maps`` appended to its name (n, h, w, d)."""


def layer_name(block: str, timestep: int) -> str:
    """The store's name for a block at a timestep: ``up_ft1.t25``."""
    return f"{block}.t{timestep}"


def split_layer_name(layer: str) -> tuple[str, int]:
    """The block and the timestep in a :func:`layer_name`."""
    block, _, timestep = layer.rpartition(".t")
    return block, int(timestep)


def with_block_and_timestep(rows: pd.DataFrame) -> pd.DataFrame:
    """A table with a column ``layer``, and from it the columns ``block`` and ``timestep``."""
    pairs = [split_layer_name(layer) for layer in rows["layer"]]
    return rows.assign(block=[block for block, _ in pairs], timestep=[timestep for _, timestep in pairs])


def load_prompt_clip(pipeline: Any, pictures: LabelledPictures, config: LayerConfig) -> ZeroShotClip | None:
    """The CLIP model that infers the classes in the prompt's braces; None if the true ones are used.

    Raises:
        ValueError: with CLIP, a prompt without a factor in braces, or no such model.
    """
    if not config.clip:
        return None
    texts = prompt_texts(config.prompt, pictures.classes)
    device = str(find_denoiser(pipeline).device)
    return load_clip(config.clip, texts, device=device, revision=config.clip_revision or None)


def feature_batches(
    pipeline: Any, pictures: LabelledPictures, config: LayerConfig, *, start: int = 0, clip: ZeroShotClip | None = None
) -> Iterator[FeatureBatch]:
    """Features in batches, view by view. Unreadable pictures are left out together with their labels.

    Args:
        pipeline: a diffusers pipeline.
        pictures: labelled ones.
        config: which features.
        start: views to skip, readable or not; a multiple of the batch size.
        clip: from :func:`load_prompt_clip`; None to load it here if ``config.clip`` names one.
    """
    clip = clip or load_prompt_clip(pipeline, pictures, config)
    total = len(pictures) * config.views
    for first in range(start, total, config.batch_size):
        numbers = range(first, min(first + config.batch_size, total))
        loaded = [(number, pictures[number // config.views]) for number in numbers]
        readable = [(number, picture) for number, picture in loaded if picture is not None]
        if readable:
            yield _features(pipeline, pictures, config, readable, clip)


def _features(
    pipeline: Any, pictures: LabelledPictures, config: LayerConfig, readable: Sequence[tuple[int, LabelledPicture]],
    clip: ZeroShotClip | None,
) -> FeatureBatch:  # fmt: skip
    views = [number % config.views for number, _ in readable]
    seeds = [_seed(config.seed, picture.image, view) for view, (_, picture) in zip(views, readable, strict=True)]
    pixels = [
        crop_and_flip(picture.pixels, np.random.default_rng(seed), config.smallest_crop, config.flips)
        if view
        else picture.pixels
        for seed, view, (_, picture) in zip(seeds, views, readable, strict=True)
    ]
    labels = [picture.labels for _, picture in readable]
    inferred = clip.classify(torch.stack([picture.pixels for _, picture in readable])) if clip else None
    features = activations.from_pictures(
        pipeline, torch.stack(pixels), seeds, config.timesteps, config.blocks, side=config.side,
        prompts=prompts_for(pipeline, pictures, config.prompt, inferred or labels),
    )  # fmt: skip
    maps = {}
    for block, each in features.maps.items():
        for timestep, values in zip(config.timesteps, each, strict=True):
            maps[layer_name(block, timestep)] = values.float().mean((1, 2))
            if config.maps:
                maps[layer_name(block, timestep) + MAPS] = values
    items = [
        {"image": picture.image, "view": view, "number": number, "seed": seed, "timestep": list(config.timesteps),
         "labels": picture.labels, "digest": digest(picture.pixels)}
        for seed, view, (number, picture) in zip(seeds, views, readable, strict=True)
    ]  # fmt: skip
    for item, classes in zip(items, inferred or [], strict=False):
        item["inferred"] = classes
    return FeatureBatch(items, maps)


def digest(pixels: Tensor) -> str:
    """A checksum of a picture (3, R, R) in [-1, 1] at 8 bits per channel: equal pictures have equal checksums."""
    rounded = ((pixels.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    return hashlib.blake2b(rounded.contiguous().numpy().tobytes(), digest_size=8).hexdigest()


def estimate(
    pipeline: Any, pictures: LabelledPictures, config: LayerConfig, folder: str | Path
) -> tuple[store.Plan, store.Layout]:
    """Estimate a collection before it starts: one batch is computed twice, and the second run is timed.

    Args:
        pipeline: a diffusers pipeline.
        pictures: labelled ones; unreadable ones count as readable.
        config: which features.
        folder: of the store. What it already holds, of a collection to be resumed, needs no further space.

    Returns:
        Items, vectors, bytes, time, memory and free disk space, shown by ``print(plan)``; and the shapes of the
        features, for :func:`collect_layer_features`.

    Raises:
        ValueError: no picture can be read.
    """
    clip = load_prompt_clip(pipeline, pictures, config)
    first = _first_batch(pipeline, pictures, config, clip).items[0]["number"]
    began = time.perf_counter()
    batch = next(
        feature_batches(pipeline, pictures, config, start=first // config.batch_size * config.batch_size, clip=clip)
    )
    layout = _layout({layer: values.cpu() for layer, values in batch.maps.items()})
    seconds = (time.perf_counter() - began) / len(batch.items)
    plan = store.plan(
        layout, len(pictures) * config.views, config.precision, seconds_per_item=seconds,
        memory=peak_memory(find_denoiser(pipeline).device), folder=folder,
    )  # fmt: skip
    return plan, layout


def _first_batch(
    pipeline: Any, pictures: LabelledPictures, config: LayerConfig, clip: ZeroShotClip | None
) -> FeatureBatch:
    batch = next(feature_batches(pipeline, pictures, config, clip=clip), None)
    if batch is None:
        raise ValueError(f"dataset: no picture of {pictures.name!r} can be read")
    return batch


def _layout(maps: Mapping[str, Tensor]) -> store.Layout:
    return {name: store.BlockShape(tuple(values.shape[1:-1]), values.shape[-1]) for name, values in maps.items()}


def collect_layer_features(
    pipeline: Any,
    pictures: LabelledPictures,
    config: LayerConfig,
    folder: str | Path,
    *,
    settings: dict[str, Any] | None = None,
    layout: store.Layout | None = None,
) -> store.Store:
    """Write the features of all pictures to a store. A collection that was killed is resumed.

    Args:
        pipeline: a diffusers pipeline.
        pictures: labelled ones.
        config: which features.
        folder: of the store.
        settings: whatever else decides the numbers, as plain JSON: the model's identity.
        layout: from :func:`estimate`; None to compute one batch for it.

    Raises:
        ValueError: no picture can be read, a store with other settings, or values that the stored precision cannot
            hold.
    """
    clip = load_prompt_clip(pipeline, pictures, config)
    layout = layout or _layout(_first_batch(pipeline, pictures, config, clip).maps)
    deciding = {key: value for key, value in asdict(config).items() if key not in ("items_per_shard", "batch_size")}
    signature = {
        **deciding, **(settings or {}), "blocks": list(block_names.find_blocks(pipeline, config.blocks)),
        "timesteps": list(config.timesteps), "classes": pictures.classes, "pictures": len(pictures),
        "dataset": pictures.name, "resolution": pictures.resolution,
    }  # fmt: skip
    per_shard = -(-config.items_per_shard // config.batch_size) * config.batch_size
    with store.create(
        folder, layout, precision=config.precision, items_per_shard=per_shard, settings=signature
    ) as writer:
        last = -1
        if writer.items_done and not writer.complete:
            last = store.open(folder).items[writer.items_done - 1]["number"]
        start = (last + 1) // config.batch_size * config.batch_size
        total = len(pictures) * config.views
        with tqdm(
            total=total, initial=start, desc="layer features", unit="view", file=sys.stdout, mininterval=2, ncols=100
        ) as bar:
            batches = [] if writer.complete else feature_batches(pipeline, pictures, config, start=start, clip=clip)
            for batch in batches:
                fresh = [place for place, item in enumerate(batch.items) if item["number"] > last]
                writer.add(
                    {layer: maps[fresh].cpu() for layer, maps in batch.maps.items()}, [batch.items[i] for i in fresh]
                )
                bar.update(min(config.batch_size, total - bar.n))
    return store.open(folder)


def _seed(seed: int, image: int, view: int) -> int:
    return int(np.random.SeedSequence([seed, image, view]).generate_state(1, np.uint64)[0] >> 1)


def prompts_for(
    pipeline: Any, pictures: LabelledPictures, prompt: str, labels: Sequence[dict[str, int]]
) -> list[str | int] | None:
    """The prompts of some pictures, see :class:`LayerConfig`; None if there is no prompt.

    Args:
        pipeline: a diffusers pipeline.
        pictures: with the names of the classes.
        prompt: with or without factors in braces.
        labels: each picture's class numbers by factor, true or inferred.

    Raises:
        ValueError: an unknown factor in braces, or one for which a picture has no label.
    """
    if not prompt:
        return None
    numbered = is_class_conditional(pipeline) and not getattr(pipeline, "labels", None)
    words = (
        labels
        if numbered
        else [{k: v.replace("_", " ") for k, v in pictures.class_names(one).items()} for one in labels]
    )
    try:
        return [prompt.format_map(one) for one in words]
    except (KeyError, IndexError, ValueError) as error:
        raise unknown("prompt (what stands in braces)", str(error).strip("'"), pictures.classes) from error


def clip_accuracies(features: store.Store) -> dict[str, float]:
    """By factor, how often the class that CLIP inferred is the true one; empty if none was inferred."""
    items = [item for item in features.items if item["view"] == 0 and "inferred" in item]
    factors = items[0]["inferred"] if items else ()
    return {
        factor: sum(item["inferred"][factor] == item["labels"][factor] for item in items) / len(items)
        for factor in factors
    }


def class_shares(by_factor: Mapping[str, Examples], layers: Sequence[str]) -> pd.DataFrame:
    """The share of variance between classes, :func:`vaelab.probing.linear.class_share`, of every layer and factor.

    Args:
        by_factor: the same pictures with the classes of each factor.
        layers: names in the store, of means over positions.

    Returns:
        A row per layer: ``layer``, and a column per factor.
    """
    return pd.DataFrame(
        [
            {"layer": layer, **{factor: class_share(*each.vectors(layer)) for factor, each in by_factor.items()}}
            for layer in layers
        ]
    )


def require_same_source(
    features: store.Store, pictures: LabelledPictures, model: Mapping[str, Any], parameter: str
) -> None:
    """Raise ValueError unless a store holds features of these pictures, made with this model.

    Args:
        features: the store.
        pictures: as loaded here.
        model: settings of the store that identify the model; those that are given here are compared.
        parameter: the notebook parameter that named the store.
    """
    expected = {**model, "dataset": pictures.name, "resolution": pictures.resolution}
    for setting, here in expected.items():
        require_same_setting(features, setting, here, parameter)
    if features.settings.get("classes") != pictures.classes:
        raise ValueError(
            f"{parameter}: made with other classes than those of {pictures.name!r}; give the same label_column"
        )


def require_same_setting(features: store.Store, setting: str, here: Any, parameter: str) -> None:
    """Raise ValueError unless a store was made with this value of a setting; of a mapping, name what differs."""
    there = features.settings.get(setting)
    if there == here:
        return
    if isinstance(there, Mapping) and isinstance(here, Mapping):
        keys = [key for key in {**there, **here} if there.get(key) != here.get(key)]
        there, here = ({key: each.get(key) for key in keys} for each in (there, here))
    raise ValueError(f"{parameter}: made with {setting} {there!r}, here it is {here!r}; give the same")


def require_same_model(features: store.Store, model: str, parameter: str) -> None:
    """Raise ValueError unless a store was made with the model of this name, or with the files of this folder.

    The store's setting ``model`` is that of :func:`vaelab.models.identity`.
    """
    there = features.settings.get("model")
    if isinstance(there, Mapping) and there.get("name") == "local" and local(model):
        here = {"sha256": files_digest(local(model))}
        same = there.get("sha256") == here["sha256"]
    else:
        here, there = model, there.get("name") if isinstance(there, Mapping) else there
        same = there == here
    if not same:
        raise ValueError(f"{parameter}: made with model {there!r}, here it is {here!r}; give the same")


def pooled_layers(features: store.Store) -> list[str]:
    """The names of a store's layers whose items are means over positions."""
    return [layer for layer in features.layout if not layer.endswith(MAPS)]


def maps_in_memory(
    pipeline: Any, pictures: LabelledPictures, config: LayerConfig
) -> tuple[list[int], dict[str, Tensor]]:
    """The maps of a few pictures, without a store.

    Returns:
        The numbers of the N readable pictures, and for each layer (N, h, w, d) on the CPU.

    Raises:
        ValueError: no picture can be read, or maps that the memory cannot hold.
    """
    config = replace(config, maps=True)
    batches = feature_batches(pipeline, pictures, config)
    collected = []
    for batch in batches:
        maps = {layer: values.cpu() for layer, values in batch.maps.items() if layer.endswith(MAPS)}
        if not collected:
            _require_memory(maps, len(pictures) * config.views / len(batch.items))
        collected.append((batch.items, maps))
    if not collected:
        raise ValueError(f"dataset: no picture of {pictures.name!r} can be read")
    layers = list(collected[0][1])
    images = [item["image"] for items, _ in collected for item in items]
    return images, {layer.removesuffix(MAPS): torch.cat([maps[layer] for _, maps in collected]) for layer in layers}


def _require_memory(maps: Mapping[str, Tensor], batches: float) -> None:
    import psutil

    # all maps once, and the largest again while its batches are joined
    sizes = [values.nbytes * batches for values in maps.values()]
    needed, free = sum(sizes) + max(sizes), psutil.virtual_memory().available
    if needed > free:
        raise ValueError(
            f"max_images: their maps take {needed / 1e9:,.1f} GB of memory, {free / 1e9:,.1f} GB are free; take fewer "
            "pictures, blocks or timesteps"
        )
