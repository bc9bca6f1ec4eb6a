"""A grid of autoencoders (blocks, k, n_features, seeds): which are trained, on what vectors they are measured,
and the tables of it.

The paper's grid is that of Surkov et al. ("Unpacking SDXL Turbo", appendix D, Table 2).
"""

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
from torch import Tensor

from vaelab import collect, fidelity, store
from vaelab.checks import at_least, one_of, unknown
from vaelab.collect import CollectConfig
from vaelab.denoise import Sampling, from_prompts, refuse_size
from vaelab.prompts import Prompts, load_prompts
from vaelab.sae import SAE, VARIANTS, SAEConfig
from vaelab.sae_training import Wanted

KEY = ("block", "k", "n_features", "seed")
READ_AT_ONCE = 4096
SAME_MODEL = 0.1
"""How far, as a share of its length, an item made again may be from the stored one: more than precisions
and devices differ, less than weights that were trained further."""


def grid(
    layout: store.Layout,
    blocks: Sequence[str],
    ks: Sequence[int],
    sizes: Sequence[int],
    seeds: Sequence[int],
    kind: str = "topk",
    **options: Any,
) -> dict[str, Wanted]:
    """What is to be trained, under the names of the folders that it is kept in.

    Args:
        layout: of the store, which says how wide a block's vectors are.
        blocks: whose updates are learned.
        ks: active features a vector.
        sizes: n_features.
        seeds: of the initial dictionaries.
        kind: of autoencoder, the ``variant`` of :class:`vaelab.sae.SAEConfig`.
        options: other fields of it.

    Raises:
        ValueError: a block that the store does not have, no or repeated values, an unknown kind, or k
            above n_features.
    """
    one_of("kind", kind, VARIANTS)
    options = {"variant": kind, **options}
    for name, values in (("blocks", blocks), ("k", ks), ("n_features", sizes), ("seeds", seeds)):
        if not values or len(set(values)) < len(values):
            raise ValueError(f"{name}: expected one or more different values, got {list(values)}")
    for block in blocks:
        if block not in layout:
            raise unknown("blocks (of the activations)", block, layout)
    return {
        f"{block}-k{k}-n{size}-s{seed}": Wanted(block, SAEConfig(layout[block].width, size, k, **options), seed)
        for block, k, size, seed in itertools.product(blocks, ks, sizes, seeds)
    }


def other_prompts(
    source: Mapping[str, Any], dataset: str, split: str, count: int, column: str = "", revision: str = ""
) -> Prompts:
    """``count`` prompts that a store was not made from: of the same data set and split those that follow.

    Args:
        source: the store's settings.
        dataset: see :func:`vaelab.prompts.load_prompts`, as the other arguments.
        split: its split.
        count: how many.
        column: of the prompts.
        revision: on the hub; empty for its main one.

    Raises:
        ValueError: as there; a number of prompts below 1; or none that follow.
    """
    at_least("max_images", count, 1)
    used = source["prompts"] if (dataset, split) == (source.get("dataset"), source.get("split")) else 0
    found = load_prompts(dataset, split=split, count=used + count, column=column, revision=revision or None)
    if len(found.texts) <= used:
        raise ValueError(f"dataset: {dataset!r} has no prompt of {split!r} but those that the activations are of")
    return found._replace(texts=found.texts[used:], rows=found.rows[used:])


def hold_out(
    kept: store.Store,
    pipeline: Any,
    model: str,
    asked: Prompts,
    folder: Path,
    *,
    blocks: Sequence[str],
    batch_size: int,
    resolution: int = 0,
) -> store.Store:
    """Collect vectors of other prompts, and of other noise, in just the way in which a store's were.

    Args:
        kept: the store that is learned from.
        pipeline: the model that it was made with.
        model: its name, which must be the store's.
        asked: prompts that the store has not.
        folder: of the new store.
        blocks: which of the store's.
        batch_size: prompts at once.
        resolution: side of the pictures, pixels; 0 takes the store's.

    Raises:
        ValueError: see :func:`refuse_other_model`.
    """
    if resolution:
        refuse_size(pipeline, Sampling(height=resolution, width=resolution))
    refuse_other_model(kept, pipeline, model, "activations")
    told = kept.settings
    sampling = Sampling(**told["sampling"])
    if resolution:
        sampling = replace(sampling, height=resolution, width=resolution)
    config = CollectConfig(
        tuple(blocks), sampling, side=told["side"], steps=tuple(told["steps"]), halves=told["halves"],
        batch_size=batch_size, seed=told["seed"] + told["prompts"], precision=kept.precision,
    )  # fmt: skip
    layout, per_prompt, _ = collect.probe(pipeline, asked.texts, config)
    settings = {"model": model, "dataset": asked.name, "split": asked.split}
    return collect.collect(
        pipeline, asked.texts, config, folder, layout=layout, items_per_prompt=per_prompt, rows=asked.rows,
        settings=settings,
    )  # fmt: skip


def refuse_other_model(kept: store.Store, pipeline: Any, model: str, parameter: str) -> None:
    """Raise ValueError unless a store was made with this model as it now is: its name is compared, and its
    first item is made again.

    Args:
        kept: the store.
        pipeline: the model.
        model: its name.
        parameter: what named the store, for the message.
    """
    told = kept.settings
    if not {"model", "sampling", "side", "steps", "halves", "seed", "prompts"} <= told.keys() or not len(kept.items):
        raise ValueError(
            f"{parameter}: {kept.url} does not say how it was collected, or is empty; make it with "
            "30_collect_activations"
        )
    if told["model"] != model:
        raise ValueError(f"{parameter}: of the model {told['model']!r}; expected {model!r}, the parameter model")
    item, block = kept.items[0], next(iter(kept.layout))
    now = from_prompts(
        pipeline, [item["prompt"]], [item["seed"]], block, Sampling(**told["sampling"]), side=told["side"],
        steps=[item["step"]],
    ).maps[block][0].float().cpu()  # fmt: skip
    stored = kept.maps(block, [0]).float()
    if now.shape != stored.shape or (now - stored).norm() > SAME_MODEL * stored.norm():
        raise ValueError(
            f"{parameter}: {kept.url} was made with other weights than {model!r} has now: its first item comes out "
            "otherwise; collect it anew"
        )


def vectors(kept: store.Store, block: str, most: int = 0) -> Iterator[Tensor]:
    """A block's vectors in batches (n, d), shuffled; the first ``most`` of them, 0 for all."""
    left = most or kept.rows(block)
    for batch in kept.batches(block, READ_AT_ONCE, seed=0):
        yield batch[:left]
        left -= len(batch)
        if left <= 0:
            return


def measure(saes: Mapping[str, SAE], wanted: Mapping[str, Wanted], held_out: store.Store) -> pd.DataFrame:
    """Every autoencoder on the held-out vectors of its block.

    Returns:
        A row each: :data:`KEY`, ``name`` and the fields of :class:`vaelab.fidelity.Fidelity`.
    """
    parts = []
    for block in dict.fromkeys(one.block for one in wanted.values()):
        own = {name: saes[name] for name, one in wanted.items() if one.block == block}
        device = next(iter(own.values())).device
        batches = (batch.to(device) for batch in vectors(held_out, block))
        parts += fidelity.measure(own, batches).items()
    rows = [
        {"block": one.block, "k": one.config.k, "n_features": one.config.n_features, "seed": one.seed, "name": name,
         **measured._asdict()}
        for name, measured in parts for one in [wanted[name]]
    ]  # fmt: skip
    return pd.DataFrame(rows)


def described(history: pd.DataFrame, wanted: Mapping[str, Wanted]) -> pd.DataFrame:
    """The history of a training, whose column ``sae`` has names, with the columns :data:`KEY`."""
    of = [wanted[name] for name in history["sae"]]
    sizes = {"k": [one.config.k for one in of], "n_features": [one.config.n_features for one in of]}
    return history.assign(block=[one.block for one in of], seed=[one.seed for one in of], **sizes)


def over_seeds(table: pd.DataFrame, columns: Iterable[str]) -> pd.DataFrame:
    """Means over seeds of ``columns``, with the number of ``seeds`` and, of the first column, how far
    apart they are (``spread``)."""
    columns = list(columns)
    by_size = table.groupby(["block", "k", "n_features"], sort=False)
    first = by_size[columns[0]]
    whole = by_size[columns].mean().assign(seeds=by_size.size(), spread=first.max() - first.min())
    return whole.reset_index()


def by_size(means: pd.DataFrame) -> dict[str, float]:
    """``<block>.k<k>.n<n_features>.<measure>`` of what :func:`over_seeds` gave."""
    return {
        f"{row['block']}.k{row['k']}.n{row['n_features']}.{name}": row[name]
        for row in means.to_dict("records")
        for name in ("explained_variance", "l0", "dead_fraction")
    }
