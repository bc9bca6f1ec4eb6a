"""Features of labelled pictures from a denoiser's layers, collected into a store; a layer is a block at a timestep.

Kim et al. ("Revelio", sections 3.2 and 4.1): a picture is encoded by the autoencoder, noised to timestep t and passed
once through the denoiser. The features are a block's output, as a map and as its mean over positions. All blocks share
one pass per timestep, which stops after the last of them. A layer is named after both, such as ``up_ft1.t25``.

A view is a version of a picture: the uncropped picture itself, or a random crop of it, which may be mirrored. A factor
is a set of classes that pictures are labelled with, such as the colour.
"""

import hashlib
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from torch import Tensor
from tqdm import tqdm

from vaelab import activations, store
from vaelab.core import devices
from vaelab.core.paths import local
from vaelab.core.validate import at_least, one_of, unknown
from vaelab.data.labelled import LabelledPicture, LabelledPictures, crop_and_flip
from vaelab.hooks import SIDES
from vaelab.models import block_names
from vaelab.models.block_names import find_denoiser
from vaelab.models.clip import load_clip
from vaelab.models.conditioning import is_class_conditional
from vaelab.models.registry import files_digest
from vaelab.probing.clip import ZeroShotClip, prompt_texts
from vaelab.probing.dataset import Examples
from vaelab.probing.linear import class_share

MAPS = ".maps"
"""Ending of a name in the store that holds a layer's maps; without it, the name holds their means over positions."""


@dataclass(frozen=True)
class LayerConfig:
    """Which features of which layers are collected."""

    blocks: tuple[str, ...]
    """Short names, globs or module paths of the blocks."""
    timesteps: tuple[int, ...]
    """The timesteps, from 0 (the picture without noise) to the schedule's last."""
    prompt: str = ""
    """The prompt for every picture; empty means no prompt. It may contain factors in braces, such as ``a photo of a
    {label}``; each is replaced by the name of the picture's class. With the true classes (see ``clip``), such features
    have been given the answer. For a class-conditional model the prompt is the name of one of the model's classes, or
    the index of the class if they have no names."""
    clip: str = ""
    """Id or folder of a CLIP model, which infers the classes in braces from the picture by zero-shot classification;
    empty means that the true classes are used."""
    clip_revision: str = ""
    """Revision of the CLIP model on the hub."""
    side: str = "output"
    """``output``, ``input`` or ``update`` (output minus input) of the blocks."""
    maps: bool = False
    """Whether maps are stored beside their means over positions."""
    views: int = 1
    """Number of views (items) per picture: the uncropped picture, and ``views`` - 1 random crops of it."""
    smallest_crop: float = 0.6
    """Side of the smallest crop, as a fraction of the picture's side."""
    flips: bool = True
    """Whether each crop is mirrored with probability 1/2, which exchanges left and right."""
    batch_size: int = 16
    """Number of views per pass."""
    seed: int = 0
    """Determines the noise and the crop of each view, together with the indices of the picture and of the view."""
    precision: str = "float16"
    """Floating point format of the stored values."""
    items_per_shard: int = 256
    """Number of items in a shard, rounded up to whole batches."""

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
    """For each view: ``image`` (index of the picture), ``view`` (index among the picture's views; 0 is uncropped),
    ``number`` (index among all views of all pictures), ``seed``, ``timestep`` (the list of all timesteps), ``labels``
    (class index by factor), ``digest`` (checksum of the uncropped picture) and, with CLIP, ``inferred`` (the inferred
    class index by factor)."""
    maps: dict[str, Tensor]
    """For each layer the means over positions (n, d), and under its name with ``.maps`` appended the maps
    (n, h, w, d)."""


def layer_name(block: str, timestep: int) -> str:
    """Return the store's name for a block at a timestep, such as ``up_ft1.t25``."""
    return f"{block}.t{timestep}"


def layer_names(blocks: Iterable[str], timesteps: Iterable[int]) -> list[str]:
    """Return the names of all blocks at all timesteps."""
    return [layer_name(block, timestep) for block, timestep in product(blocks, timesteps)]


def split_layer_name(layer: str) -> tuple[str, int]:
    """Split a :func:`layer_name` into the block and the timestep."""
    block, _, timestep = layer.rpartition(".t")
    return block, int(timestep)


def with_block_and_timestep(rows: pd.DataFrame) -> pd.DataFrame:
    """Add the columns ``block`` and ``timestep`` to a table with a column ``layer``."""
    pairs = [split_layer_name(layer) for layer in rows["layer"]]
    return rows.assign(block=[block for block, _ in pairs], timestep=[timestep for _, timestep in pairs])


def load_prompt_clip(pipeline: Any, pictures: LabelledPictures, config: LayerConfig) -> ZeroShotClip | None:
    """Load the CLIP model that infers the classes in the prompt's braces by zero-shot classification; None means that
    the true classes are used.

    Raises:
        ValueError: a CLIP model is given, but the prompt has no factor in braces, or the model does not exist.
    """
    if not config.clip:
        return None
    texts = prompt_texts(config.prompt, pictures.classes)
    device = str(find_denoiser(pipeline).device)
    return ZeroShotClip(load_clip(config.clip, device=device, revision=config.clip_revision or None), texts)


def feature_batches(
    pipeline: Any, pictures: LabelledPictures, config: LayerConfig, *, start: int = 0, clip: ZeroShotClip | None = None
) -> Iterator[FeatureBatch]:
    """Compute features in batches of views: all views of the first picture, then all views of the second, and so on.

    Pictures that cannot be read are left out together with their labels.

    Args:
        pipeline: a diffusers pipeline.
        pictures: the labelled pictures.
        config: says which features are computed.
        start: the number of views to skip, readable or not; a multiple of the batch size.
        clip: the model from :func:`load_prompt_clip`; None means that it is loaded here if ``config.clip`` names one.
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
    """Compute a checksum of a picture (3, R, R) in [-1, 1], rounded to 8 bits per channel: equal pictures have equal
    checksums."""
    rounded = ((pixels.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    return hashlib.blake2b(rounded.contiguous().numpy().tobytes(), digest_size=8).hexdigest()


def estimate(
    pipeline: Any, pictures: LabelledPictures, config: LayerConfig, folder: str | Path
) -> tuple[store.Plan, store.Layout]:
    """Estimate a collection before it starts: one batch is computed twice, and the second run is timed.

    Args:
        pipeline: a diffusers pipeline.
        pictures: the labelled pictures; for the estimate, all of them count as readable.
        config: says which features are collected.
        folder: the store's folder. If it holds an interrupted collection, the space it already uses is subtracted.

    Returns:
        The plan, with the numbers of items, vectors and bytes, the time, the memory and the free disk space
        (``print(plan)`` shows it); and the layout, with the shapes of the features, for
        :func:`collect_layer_features`.

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
        memory=devices.peak_memory(find_denoiser(pipeline).device), folder=folder,
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
    """Write the features of all pictures to a store. An interrupted collection is resumed.

    Args:
        pipeline: a diffusers pipeline.
        pictures: the labelled pictures.
        config: says which features are collected.
        folder: the store's folder.
        settings: everything else that determines the values, such as the model's identity, as plain JSON.
        layout: the layout from :func:`estimate`; None means that one batch is computed to find it.

    Raises:
        ValueError: no picture can be read, the folder holds a store with other settings, or the stored precision cannot
            hold a value.
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
    """Fill in the prompt for some pictures, see :class:`LayerConfig`; the result is None if there is no prompt.

    Args:
        pipeline: a diffusers pipeline.
        pictures: the data set, which knows the names of the classes.
        prompt: the prompt, with or without factors in braces.
        labels: for each picture its class indices by factor, true or inferred.

    Raises:
        ValueError: a factor in braces is unknown, or a picture has no label for it.
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
    """Compute by factor the share of pictures whose class CLIP inferred correctly; empty if no class was inferred."""
    items = [item for item in features.items if item["view"] == 0 and "inferred" in item]
    factors = items[0]["inferred"] if items else ()
    return {
        factor: sum(item["inferred"][factor] == item["labels"][factor] for item in items) / len(items)
        for factor in factors
    }


def class_shares(by_factor: Mapping[str, Examples], layers: Sequence[str]) -> pd.DataFrame:
    """Compute the share of variance between classes (:func:`vaelab.probing.linear.class_share`) for every layer and
    factor.

    Args:
        by_factor: for each factor, the same pictures with their classes of that factor.
        layers: the layers' names in the store, without ``.maps``.

    Returns:
        One row per layer: ``layer``, and one column per factor.
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
        pictures: the pictures that were loaded now.
        model: the settings that identify the model, by name; the store's settings of the same names must be equal.
        parameter: the notebook parameter that named the store; error messages begin with it.
    """
    expected = {**model, "dataset": pictures.name, "resolution": pictures.resolution}
    for setting, here in expected.items():
        require_same_setting(features, setting, here, parameter)
    if features.settings.get("classes") != pictures.classes:
        raise ValueError(
            f"{parameter}: made with other classes than those of {pictures.name!r}; give the same label_column"
        )


def require_same_setting(features: store.Store, setting: str, here: Any, parameter: str) -> None:
    """Raise ValueError unless a setting of a store has this value.

    The error begins with ``model`` or ``resolution`` if one of these is the setting, otherwise with ``parameter``,
    which named the store. If both values are mappings, it lists only the entries that differ.
    """
    there = features.settings.get(setting)
    if there == here:
        return
    if isinstance(there, Mapping) and isinstance(here, Mapping):
        keys = [key for key in {**there, **here} if there.get(key) != here.get(key)]
        there, here = ({key: each.get(key) for key in keys} for each in (there, here))
    raise _different(setting, there, here, parameter)


def require_same_model(features: store.Store, model: str, parameter: str) -> None:
    """Raise ValueError, beginning with ``model``, unless a store was made with this model, a name or a local folder.

    A folder is compared by the checksum of its files if the store was made with a local folder too, otherwise the names
    are compared. The store's setting ``model`` comes from :func:`vaelab.models.identity`.
    """
    there = features.settings.get("model")
    if isinstance(there, Mapping) and there.get("name") == "local" and local(model):
        here = {"sha256": files_digest(local(model))}
        same = there.get("sha256") == here["sha256"]
    else:
        here, there = model, there.get("name") if isinstance(there, Mapping) else there
        same = there == here
    if not same:
        raise _different("model", there, here, parameter)


def _different(setting: str, there: Any, here: Any, parameter: str) -> ValueError:
    if setting in ("model", "resolution"):  # names of notebook parameters
        return ValueError(f"{setting}: {here!r}, but {parameter} was made with {there!r}; give the same")
    return ValueError(f"{parameter}: made with {setting} {there!r}, here it is {here!r}; give the same")


def pooled_layers(features: store.Store) -> list[str]:
    """List the names in a store that hold means over positions rather than maps."""
    return [layer for layer in features.layout if not layer.endswith(MAPS)]


def maps_in_memory(
    pipeline: Any, pictures: LabelledPictures, config: LayerConfig
) -> tuple[list[int], dict[str, Tensor]]:
    """Compute the maps of a few pictures in memory, without a store.

    Returns:
        The picture index of each of the N readable views, and for each layer the maps (N, h, w, d) on the CPU.

    Raises:
        ValueError: no picture can be read, or the memory cannot hold the maps.
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
