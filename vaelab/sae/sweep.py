"""A grid of autoencoders (blocks, k, n_features, seeds): which are trained, on what vectors they are measured,
and the tables of it.

The paper's grid is that of Surkov et al. ("Unpacking SDXL Turbo", appendix D, Table 2).
"""

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
from safetensors.torch import load_file, save_file
from torch import Tensor

from vaelab import store
from vaelab.activations import collect
from vaelab.activations.collect import CollectConfig
from vaelab.activations.denoiser import Sampling, from_prompts, refuse_size
from vaelab.core.io import read_json, write_json
from vaelab.core.paths import resolve
from vaelab.core.validate import at_least, one_of, unknown
from vaelab.data.prompts import Prompts, load_prompts
from vaelab.sae import metrics as sae_metrics
from vaelab.sae.baselines import Dictionary, Moments, build_baselines, moments
from vaelab.sae.model import SAE, VARIANTS, SAEConfig
from vaelab.sae.train import SAESpec

# sae_runs: Autoencoders kept in the folder of a run of notebook 31, and read again to be put into the model beside
# their baselines.
#


METHODS = ("sae", "zero", "mean", "random", "pca")
METHOD_KEY = ["block", "who", "k", "n_features"]
MOMENT_VECTORS = 500_000
"""The most vectors of a block that its mean and covariance are taken of."""


def save_sweep(saes: Mapping[str, SAE], wanted: Mapping[str, SAESpec], kept: store.Store, folder: Path) -> None:
    """Save autoencoders, by block the moments of what they were trained on, and where that came from."""
    for name, sae in saes.items():
        sae.save_pretrained(folder / name)
    for block in dict.fromkeys(one.block for one in wanted.values()):
        one = moments(iterate_vectors(kept, block, MOMENT_VECTORS))
        tensors = {"mean": one.mean.cpu(), "covariance": one.covariance.cpu().contiguous()}
        save_file(tensors, folder / f"{block}.moments.safetensors", metadata={"count": str(one.count)})
    write_json(folder / "source.json", kept.settings)


class SAESweep(NamedTuple):
    """A finished run of notebook 31; made by :func:`read`."""

    folder: Path
    """Of the autoencoders."""
    source: dict[str, Any]
    """The settings of the store that they were trained on."""
    names: dict[tuple, str]
    """Of each autoencoder, by block, k, n_features and seed."""
    held_out: store.Store

    @property
    def blocks(self) -> list[str]:
        """The blocks that there are autoencoders of."""
        return list(dict.fromkeys(block for block, *_ in self.names))

    @property
    def widths(self) -> dict[str, int]:
        """The width d of each block's vectors."""
        return {block: shape.width for block, shape in self.held_out.layout.items()}

    def sizes(self) -> list[tuple[int, int]]:
        """The pairs of k and n_features."""
        return list(dict.fromkeys((k, size) for _, k, size, _ in self.names))

    def dictionaries(
        self, blocks: Sequence[str], size: tuple[int, int], *, others: bool, seed: int, device: Any = "cpu"
    ) -> dict[tuple[str, str, int, int], Dictionary]:
        """What updates are replaced by, under :data:`NAMES`: of each block the autoencoder of one size and its
        baselines, and the autoencoders of the other sizes; all of the first seed.

        Args:
            blocks: short names.
            size: k and n_features of the ones that have baselines.
            others: whether the other sizes are wanted too.
            seed: of the random dictionaries.
            device: where the autoencoders are.

        Raises:
            ValueError: no autoencoder of a block, or none of that size.
        """
        if size not in self.sizes():
            there = ", ".join(f"{k} and {n}" for k, n in self.sizes())
            raise ValueError(f"k and n_features: the run has none of {size[0]} and {size[1]}; it has {there}")
        sizes = [size, *([one for one in self.sizes() if one != size] if others else [])]
        first = next(iter(self.names))[3]
        found: dict[tuple[str, str, int, int], Dictionary] = {}
        for block in blocks:
            if block not in self.blocks:
                raise unknown("blocks (of the autoencoders)", block, self.blocks)
            folders = {one: self.folder / self.names[block, *one, first] for one in sizes}
            found |= {(block, "sae", *one): SAE.from_pretrained(place, device=device) for one, place in folders.items()}
            tensors = load_file(self.folder / f"{block}.moments.safetensors")
            measured = Moments(0, tensors["mean"], tensors["covariance"])
            found |= {(block, who, *size): one for who, one in build_baselines(measured, *size, seed).items()}
        return found


def load_sweep(folder: str, model: str, pipeline: Any) -> SAESweep:
    """Read what a run of notebook 31 left in its output folder.

    Args:
        folder: the run's.
        model: the name of the model to use them on, which must be the one that they were trained on.
        pipeline: that model.

    Raises:
        ValueError: the run has not finished; another model, or one whose weights have changed since; or
            other vectors than updates.
    """
    place = resolve(folder)
    results = read_json(place / "results.json") if (place / "results.json").is_file() else {}
    if results.get("notebook") != "31_train_sae" or not (place / "saes" / "source.json").is_file():
        raise ValueError(
            f"saes: {folder!r} holds no finished run of 31_train_sae; run it first "
            f"(make run P={folder.replace('outputs/', 'params/', 1)}.yaml)"
        )
    stored = results["tables"]["saes"]
    names = {tuple(row[part] for part in SAE_KEY): row["name"] for row in stored}
    held_out = store.open(place / "held_out")
    found = SAESweep(place / "saes", read_json(place / "saes" / "source.json"), names, held_out)
    require_same_model(held_out, pipeline, model, "saes")
    if found.source["side"] != "update":
        raise ValueError(f"saes: trained on the {found.source['side']} of blocks; only an update can be replaced")
    return found


def evaluate_methods(
    dictionaries: Mapping[tuple, Dictionary], held_out: store.Store, device: Any = "cpu"
) -> pd.DataFrame:
    """Autoencoders and baselines, under :data:`NAMES`, on the held-out vectors of their blocks.

    Returns:
        A row each: :data:`NAMES` and the fields of :class:`vaelab.sae.metrics.Fidelity`.
    """
    measured = {}
    for block in dict.fromkeys(key[0] for key in dictionaries):
        own = {key: one for key, one in dictionaries.items() if key[0] == block}
        measured |= sae_metrics.evaluate_dictionaries(
            own, (batch.to(device) for batch in iterate_vectors(held_out, block))
        )
    return sae_metrics.fidelity_table(measured, METHOD_KEY)


def select_methods(
    dictionaries: Mapping[tuple, Dictionary], who: Iterable[str], size: tuple[int, int]
) -> dict[tuple, Dictionary]:
    """Those of one size that are an autoencoder or a baseline of these names.

    Raises:
        ValueError: a name that is not of :data:`WHO`.
    """
    who = list(who)
    for name in who:
        one_of("by_step", name, METHODS)
    return {key: one for key, one in dictionaries.items() if key[1] in who and key[2:] == size}


def methods_metrics(table: pd.DataFrame, size: tuple[int, int]) -> dict[str, float]:
    """``<block>.<measure>`` of the autoencoders of one size and ``<block>.<baseline>.<measure>``.

    Args:
        table: columns :data:`NAMES`, and the measures.
        size: k and n_features.
    """
    own = table[(table["k"] == size[0]) & (table["n_features"] == size[1])]
    named = {}
    for row in own.to_dict("records"):
        place = row["block"] if row["who"] == "sae" else f"{row['block']}.{row['who']}"
        measures = {name: value for name, value in row.items() if name not in METHOD_KEY}
        named |= {f"{place}.{name}": value for name, value in measures.items() if not isinstance(value, str)}
    return named


SAE_KEY = ("block", "k", "n_features", "seed")
READ_AT_ONCE = 4096
SAME_MODEL = 0.1
"""How far, as a share of its length, an item made again may be from the stored one: more than precisions
and devices differ, less than weights that were trained further."""


def build_grid(
    layout: store.Layout,
    blocks: Sequence[str],
    ks: Sequence[int],
    sizes: Sequence[int],
    seeds: Sequence[int],
    kind: str = "topk",
    **options: Any,
) -> dict[str, SAESpec]:
    """What is to be trained, under the names of the folders that it is kept in.

    Args:
        layout: of the store, which says how wide a block's vectors are.
        blocks: whose updates are learned.
        ks: active features a vector.
        sizes: n_features.
        seeds: of the initial dictionaries.
        kind: of autoencoder, the ``variant`` of :class:`vaelab.sae.model.SAEConfig`.
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
        f"{block}-k{k}-n{size}-s{seed}": SAESpec(block, SAEConfig(layout[block].width, size, k, **options), seed)
        for block, k, size, seed in itertools.product(blocks, ks, sizes, seeds)
    }


def held_out_prompts(
    source: Mapping[str, Any], dataset: str, split: str, count: int, column: str = "", revision: str = ""
) -> Prompts:
    """``count`` prompts that a store was not made from: of the same data set and split those that follow.

    Args:
        source: the store's settings.
        dataset: see :func:`vaelab.data.prompts.load_prompts`, as the other arguments.
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


def collect_held_out(
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
    require_same_model(kept, pipeline, model, "activations")
    told = kept.settings
    sampling = Sampling(**told["sampling"])
    if resolution:
        sampling = replace(sampling, height=resolution, width=resolution)
    config = CollectConfig(
        tuple(blocks), sampling, side=told["side"], steps=tuple(told["steps"]), halves=told["halves"],
        batch_size=batch_size, seed=told["seed"] + told["prompts"], precision=kept.precision,
    )  # fmt: skip
    layout, per_prompt, _ = collect.run_trial_batch(pipeline, asked.texts, config)
    settings = {"model": model, "dataset": asked.name, "split": asked.split}
    return collect.collect_prompts(
        pipeline, asked.texts, config, folder, layout=layout, items_per_prompt=per_prompt, rows=asked.rows,
        settings=settings,
    )  # fmt: skip


def require_same_model(kept: store.Store, pipeline: Any, model: str, parameter: str) -> None:
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


def iterate_vectors(kept: store.Store, block: str, most: int = 0) -> Iterator[Tensor]:
    """A block's vectors in batches (n, d), shuffled; the first ``most`` of them, 0 for all."""
    left = most or kept.rows(block)
    for batch in kept.batches(block, READ_AT_ONCE, seed=0):
        yield batch[:left]
        left -= len(batch)
        if left <= 0:
            return


def evaluate_saes(saes: Mapping[str, SAE], wanted: Mapping[str, SAESpec], held_out: store.Store) -> pd.DataFrame:
    """Every autoencoder on the held-out vectors of its block.

    Returns:
        A row each: :data:`KEY`, ``name`` and the fields of :class:`vaelab.sae.metrics.Fidelity`.
    """
    parts = []
    for block in dict.fromkeys(one.block for one in wanted.values()):
        own = {name: saes[name] for name, one in wanted.items() if one.block == block}
        device = next(iter(own.values())).device
        batches = (batch.to(device) for batch in iterate_vectors(held_out, block))
        parts += sae_metrics.evaluate_dictionaries(own, batches).items()
    rows = [
        {"block": one.block, "k": one.config.k, "n_features": one.config.n_features, "seed": one.seed, "name": name,
         **measured._asdict()}
        for name, measured in parts for one in [wanted[name]]
    ]  # fmt: skip
    return pd.DataFrame(rows)


def label_history(history: pd.DataFrame, wanted: Mapping[str, SAESpec]) -> pd.DataFrame:
    """The history of a training, whose column ``sae`` has names, with the columns :data:`KEY`."""
    of = [wanted[name] for name in history["sae"]]
    sizes = {"k": [one.config.k for one in of], "n_features": [one.config.n_features for one in of]}
    return history.assign(block=[one.block for one in of], seed=[one.seed for one in of], **sizes)


def mean_over_seeds(table: pd.DataFrame, columns: Iterable[str]) -> pd.DataFrame:
    """Means over seeds of ``columns``, with the number of ``seeds`` and, of the first column, how far
    apart they are (``spread``)."""
    columns = list(columns)
    by_size = table.groupby(["block", "k", "n_features"], sort=False)
    first = by_size[columns[0]]
    whole = by_size[columns].mean().assign(seeds=by_size.size(), spread=first.max() - first.min())
    return whole.reset_index()


def sizes_metrics(means: pd.DataFrame) -> dict[str, float]:
    """``<block>.k<k>.n<n_features>.<measure>`` of what :func:`over_seeds` gave."""
    return {
        f"{row['block']}.k{row['k']}.n{row['n_features']}.{name}": row[name]
        for row in means.to_dict("records")
        for name in ("explained_variance", "l0", "dead_fraction")
    }
