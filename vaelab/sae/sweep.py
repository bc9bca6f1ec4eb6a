"""A sweep of autoencoders over blocks, k, n_features and seeds.

This module builds the grid to train, collects held-out vectors, makes tables, and loads a saved sweep together with its
baselines. The paper is Surkov et al. ("Unpacking SDXL Turbo", appendix D, Table 2). A block's update is its output
minus its input.
"""

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
from safetensors.torch import save_file
from torch import Tensor

from vaelab import store
from vaelab.activations import collect
from vaelab.activations.collect import CollectConfig, prompts_digest
from vaelab.activations.denoiser import Sampling, from_prompts, validate_size
from vaelab.core.io import atomic, write_json
from vaelab.core.paths import local, resolve
from vaelab.core.validate import at_least, one_of, unknown
from vaelab.data.prompts import Prompts, load_prompts
from vaelab.runner.run import read_results
from vaelab.sae.baselines import Dictionary, Moments, build_baselines, moments
from vaelab.sae.formats import read_safetensors_file
from vaelab.sae.metrics import evaluate_dictionaries, fidelity_table
from vaelab.sae.model import SAE, VARIANTS, SAEConfig, read_config_file
from vaelab.sae.train import SAESpec
from vaelab.sae.transcoder import PAIRS, OfOutput, TranscoderConfig, load_trained

SAE_KEY = ("block", "k", "n_features", "seed")
"""Columns that identify an autoencoder in a sweep."""
METHODS = ("sae", "zero", "mean", "random", "pca")
"""The autoencoder, and the baselines of :func:`vaelab.sae.baselines.build_baselines`."""
METHOD_KEY = ["block", "method", "k", "n_features"]
"""Columns that identify a replacement of a block's update; ``method`` is one of :data:`METHODS`."""
MOMENT_VECTORS = 500_000
"""The largest number of vectors of a block from which its mean and covariance are computed."""
EVALUATION_BATCH = 4096
"""Number of vectors per batch in evaluation."""
WEIGHTS = ("kind", "name", "variant", "sha256", "commit")
"""Entries of :func:`vaelab.models.identity` that determine a model's weights. The precision is not among them: a model
may be used in another precision."""
SAME_MODEL = 0.1
"""The largest relative difference between a stored item and the same item generated again with the same model. Other
precisions and devices cause smaller differences, further training of the weights larger ones."""


def build_grid(
    layout: store.Layout,
    blocks: Sequence[str],
    ks: Sequence[int],
    sizes: Sequence[int],
    seeds: Sequence[int],
    kind: str = "topk",
    side: str = "update",
    skip: bool = False,
    **options: Any,
) -> dict[str, SAESpec]:
    """Specify the autoencoders to train (or, on pairs of input and output, transcoders), by the names of the folders in
    which they will be saved.

    Args:
        layout: the store's layout, which holds the width of each block's vectors.
        blocks: the blocks on whose vectors autoencoders are trained.
        ks: the numbers of active features.
        sizes: the dictionary sizes, n_features.
        seeds: the seeds of the initial dictionaries.
        kind: the ``variant`` in :class:`vaelab.sae.model.SAEConfig`.
        side: the store's side; with ``input_output`` its vectors are pairs, and transcoders are specified.
        skip: whether transcoders have a linear term.
        options: further fields of :class:`vaelab.sae.model.SAEConfig`.

    Raises:
        ValueError: the store does not have a block, a list is empty or repeats a value, the kind is unknown, or k is
            above n_features.
    """
    one_of("kind", kind, VARIANTS)
    options = {"variant": kind, **options}
    if skip and side != PAIRS:
        raise ValueError(f"skip: only transcoders have a linear term; these activations are of the side {side!r}")
    for name, values in (("blocks", blocks), ("k", ks), ("n_features", sizes), ("seeds", seeds)):
        if not values or len(set(values)) < len(values):
            raise ValueError(f"{name}: expected one or more different values, got {list(values)}")
    for block in blocks:
        if block not in layout:
            raise unknown("blocks (of the activations)", block, layout)
    specs = {}
    for block, k, size, seed in itertools.product(blocks, ks, sizes, seeds):
        width = layout[block].width
        if side == PAIRS:
            config = TranscoderConfig(width // 2, size, k, skip=skip, **options)
        else:
            config = SAEConfig(width, size, k, **options)
        specs[f"{block}-k{k}-n{size}-s{seed}"] = SAESpec(block, config, seed)
    return specs


def held_out_prompts(
    source: Mapping[str, Any], dataset: str, split: str, count: int, column: str = "", revision: str = ""
) -> Prompts:
    """Load ``count`` prompts that a store was not collected from.

    If the data set begins with the store's prompts, these are the prompts that follow. The prompts themselves are
    compared, so that the spelling of a path does not matter.

    Args:
        source: the store's settings.
        dataset: the data set, see :func:`vaelab.data.prompts.load_prompts`.
        split: the split of the data set.
        count: the number of prompts.
        column: the column that holds the prompts.
        revision: the revision on the hub; empty means the main one.

    Raises:
        ValueError: :func:`vaelab.data.prompts.load_prompts` cannot load the prompts, the count is below 1, no prompt is
            left, or data set and split are the store's but the column or the revision is another, so that the prompts
            may come from the same rows.
    """
    at_least("max_images", count, 1)
    used, same = source["prompts"], _same_split(source, dataset, split)
    may_overlap = same or _local_data(dataset) is not None
    found = load_prompts(
        dataset, split=split, count=count + (used if may_overlap else 0), column=column, revision=revision or None
    )
    if may_overlap and prompts_digest(found.texts[:used], found.rows[:used]) == source["prompts_sha256"]:
        if len(found.texts) <= used:
            raise ValueError(
                f"dataset: {dataset!r} has no prompt in {split!r} beyond those that the activations were collected from"
            )
        return found._replace(texts=found.texts[used:], rows=found.rows[used:])
    if same:
        raise ValueError(
            f"column: the activations were collected from {dataset!r}, but not from its first {used} prompts with this "
            "column and dataset_revision; give those of the activations, or another split"
        )
    return found._replace(texts=found.texts[:count], rows=found.rows[:count])


def _same_split(source: Mapping[str, Any], dataset: str, split: str) -> bool:
    """Say whether a store was collected from this split; a single file counts as one split, whatever its name."""
    here, there = _local_data(dataset), _local_data(source.get("dataset") or "")
    if here is None or there is None:
        return (dataset, split) == (source.get("dataset"), source.get("split"))
    return here.samefile(there) and (here.is_file() or split == source.get("split"))


def _local_data(dataset: str) -> Path | None:
    """Find the local file or folder of a data set; None for the synthetic scene world and for data on the hub."""
    return None if dataset == "world" else local(dataset)


def collect_held_out(
    activation_store: store.Store,
    pipeline: Any,
    identity: Mapping[str, str],
    prompts: Prompts,
    folder: Path,
    *,
    blocks: Sequence[str],
    batch_size: int,
    resolution: int = 0,
) -> store.Store:
    """Collect vectors of other prompts and other noise with the settings of an existing store.

    Args:
        activation_store: the store of the training vectors.
        pipeline: the model that it was collected from.
        identity: the model's :func:`vaelab.models.identity`. It is one of the new store's settings, so that a
            collection with other weights is not resumed.
        prompts: prompts that the store does not hold.
        folder: the folder of the new store.
        blocks: the blocks of the store to collect.
        batch_size: the number of prompts per batch.
        resolution: the side of the pictures in pixels; 0 means the store's.

    Raises:
        ValueError: the model is not the store's (see :func:`require_same_model`), or the folder holds a store with
            other settings.
    """
    if resolution:
        validate_size(pipeline, Sampling(height=resolution, width=resolution))
    require_same_model(activation_store, pipeline, identity, "activations")
    source = activation_store.settings
    sampling = Sampling(**source["sampling"])
    if resolution:
        sampling = replace(sampling, height=resolution, width=resolution)
    config = CollectConfig(
        tuple(blocks), sampling, side=source["side"], steps=tuple(source["steps"]), halves=source["halves"],
        batch_size=batch_size, seed=source["seed"] + source["prompts"], precision=activation_store.precision,
    )  # fmt: skip
    layout, per_prompt, _ = collect.run_trial_batch(pipeline, prompts.texts, config)
    settings = {"identity": dict(identity), "dataset": prompts.name, "split": prompts.split}
    return collect.collect_prompts(
        pipeline, prompts.texts, config, folder, layout=layout, items_per_prompt=per_prompt, rows=prompts.rows,
        settings=settings,
    )  # fmt: skip


def require_same_model(
    activation_store: store.Store, pipeline: Any, identity: Mapping[str, str], parameter: str
) -> None:
    """Raise ValueError unless a store was collected from this model with its present weights.

    The identities are compared except for the precision, and the first item is generated again.

    Args:
        activation_store: the store.
        pipeline: the model.
        identity: its :func:`vaelab.models.identity`.
        parameter: the notebook parameter that named the store; error messages begin with it.
    """
    source = activation_store.settings
    if not {"identity", "sampling", "side", "steps", "halves", "seed", "prompts"} <= source.keys() or not len(
        activation_store.items
    ):
        raise ValueError(
            f"{parameter}: {activation_store.url} does not say how it was collected, or is empty; make it again with "
            "30_collect_activations"
        )
    there, here = ({name: known.get(name) for name in WEIGHTS} for known in (source["identity"], identity))
    if there != here:
        raise ValueError(
            f"{parameter}: {activation_store.url} was collected from {_describe(there)}; the parameters model, "
            f"model_revision and variant say {_describe(here)}"
        )
    item, block = activation_store.items[0], next(iter(activation_store.layout))
    now = from_prompts(
        pipeline, [item["prompt"]], [item["seed"]], block, Sampling(**source["sampling"]), side=source["side"],
        steps=[item["step"]],
    ).maps[block][0].float().cpu()  # fmt: skip
    stored = activation_store.maps(block, [0]).float()
    if now.shape != stored.shape or (now - stored).norm() > SAME_MODEL * stored.norm():
        raise ValueError(
            f"{parameter}: {activation_store.url} was collected with other weights than {_describe(here)} has now: its "
            "first item differs when it is generated again; collect it again"
        )


def _describe(identity: Mapping[str, str | None]) -> str:
    """Describe a model's identity in words: its name, the beginning of its checksum or commit, and its variant."""
    digest = (identity.get("sha256") or identity.get("commit") or "unknown")[:12]
    variant = f", variant {identity['variant']}" if identity.get("variant") else ""
    return f"{identity.get('name')} ({digest}{variant})"


def iterate_vectors(activation_store: store.Store, block: str, most: int = 0) -> Iterator[Tensor]:
    """Yield shuffled batches (n, d) of a block's vectors, at most ``most`` vectors; 0 means all."""
    left = most or activation_store.rows(block)
    for batch in activation_store.batches(block, EVALUATION_BATCH, seed=0):
        yield batch[:left]
        left -= len(batch)
        if left <= 0:
            return


def evaluate_saes(saes: Mapping[str, SAE], specs: Mapping[str, SAESpec], held_out: store.Store) -> pd.DataFrame:
    """Evaluate every autoencoder on the held-out vectors of its block.

    Returns:
        One row per autoencoder: :data:`SAE_KEY`, ``name`` and the fields of :class:`vaelab.sae.metrics.Fidelity`.
    """
    parts = []
    for block in dict.fromkeys(spec.block for spec in specs.values()):
        own = {name: saes[name] for name, spec in specs.items() if spec.block == block}
        first = next(iter(own.values()))
        batches = (batch.to(first.device) for batch in iterate_vectors(held_out, block))
        parts += evaluate_dictionaries(own, batches, target=first.target).items()
    return pd.DataFrame([{**_sae_key(specs[name]), "name": name, **fidelity._asdict()} for name, fidelity in parts])


def _sae_key(spec: SAESpec) -> dict[str, Any]:
    """Return an autoencoder's values of :data:`SAE_KEY`."""
    return {"block": spec.block, "k": spec.config.k, "n_features": spec.config.n_features, "seed": spec.seed}


def label_history(history: pd.DataFrame, specs: Mapping[str, SAESpec]) -> pd.DataFrame:
    """Add the columns :data:`SAE_KEY` to a training history, whose column ``sae`` holds the autoencoders' names."""
    keys = pd.DataFrame([_sae_key(specs[name]) for name in history["sae"]], columns=list(SAE_KEY), index=history.index)
    return history.assign(**keys)


def mean_over_seeds(table: pd.DataFrame, columns: Iterable[str]) -> pd.DataFrame:
    """Average ``columns`` over seeds; add the number of seeds (``seeds``) and the range of the first column
    (``spread``)."""
    columns = list(columns)
    by_size = table.groupby(["block", "k", "n_features"], sort=False)
    first = by_size[columns[0]]
    return by_size[columns].mean().assign(seeds=by_size.size(), spread=first.max() - first.min()).reset_index()


def sizes_metrics(means: pd.DataFrame) -> dict[str, float]:
    """Collect the metrics ``<block>.k<k>.n<n_features>.<measure>`` from a table of :func:`mean_over_seeds`."""
    return {
        f"{row['block']}.k{row['k']}.n{row['n_features']}.{name}": row[name]
        for row in means.to_dict("records")
        for name in ("explained_variance", "l0", "dead_fraction")
    }


def save_sweep(
    saes: Mapping[str, SAE], specs: Mapping[str, SAESpec], activation_store: store.Store, folder: Path
) -> None:
    """Save autoencoders, the moments of each block's training vectors, and the settings of their store."""
    for name, sae in saes.items():
        sae.save_pretrained(folder / name)
    for block in dict.fromkeys(spec.block for spec in specs.values()):
        measured = moments(iterate_vectors(activation_store, block, MOMENT_VECTORS))
        tensors = {"mean": measured.mean.cpu(), "covariance": measured.covariance.cpu().contiguous()}
        with atomic(folder / f"{block}.moments.safetensors") as draft:
            save_file(tensors, draft, metadata={"count": str(measured.count)})
    write_json(folder / "source.json", activation_store.settings)


class SAESweep(NamedTuple):
    """A finished run of notebook 31, which trains autoencoders; made by :func:`load_sweep`."""

    folder: Path
    """The folder of the autoencoders."""
    source: dict[str, Any]
    """The settings of the store that they were trained on."""
    names: dict[tuple, str]
    """Folder names of the autoencoders, by block, k, n_features and seed."""
    held_out: store.Store
    """Vectors that they were not trained on."""

    @property
    def blocks(self) -> list[str]:
        """The blocks of the autoencoders."""
        return list(dict.fromkeys(block for block, *_ in self.names))

    @property
    def side(self) -> str:
        """The side of the blocks: ``update``, or ``input_output`` for transcoders."""
        return self.source["side"]

    @property
    def widths(self) -> dict[str, int]:
        """The width d of each block's vectors."""
        return {block: shape.width for block, shape in self.held_out.layout.items()}

    def validate(self, blocks: Sequence[str], size: tuple[int, int]) -> list[str]:
        """Return the blocks, or all that have autoencoders if there are none.

        Args:
            blocks: the blocks' short names.
            size: k and n_features.

        Raises:
            ValueError: a block has no autoencoder, or there are none of that size.
        """
        if size not in self.sizes():
            there = ", ".join(f"{k} and {n}" for k, n in self.sizes())
            raise ValueError(f"k and n_features: the run has none of {size[0]} and {size[1]}; it has {there}")
        for block in blocks:
            if block not in self.blocks:
                raise unknown("blocks (of the autoencoders)", block, self.blocks)
        return list(blocks) or self.blocks

    def sizes(self) -> list[tuple[int, int]]:
        """List the pairs of k and n_features."""
        return list(dict.fromkeys((k, size) for _, k, size, _ in self.names))

    def dictionaries(
        self, blocks: Sequence[str], size: tuple[int, int], *, others: bool, seed: int, device: Any = "cpu"
    ) -> dict[tuple[str, str, int, int], Dictionary]:
        """Load the replacements of the blocks' updates, by :data:`METHOD_KEY`: for each block the autoencoder of one
        size with its baselines, and the autoencoders of the other sizes. All autoencoders are those with the first
        seed.

        Args:
            blocks: the blocks' short names.
            size: k and n_features of the autoencoders that get baselines.
            others: whether to include the other sizes.
            seed: the seed of the random dictionaries.
            device: the device of the autoencoders.

        Raises:
            ValueError: the run has no autoencoder for a block, or none of that size.
        """
        blocks = self.validate(blocks, size)
        sizes = [size, *([other for other in self.sizes() if other != size] if others else [])]
        first_seed = next(iter(self.names))[3]
        dictionaries: dict[tuple[str, str, int, int], Dictionary] = {}
        for block in blocks:
            for each in sizes:
                folder = self.folder / self.names[block, *each, first_seed]
                dictionaries[block, "sae", *each] = load_trained(folder, device=device)
            tensors, d = read_safetensors_file(self.folder / f"{block}.moments.safetensors"), self.widths[block]
            mean, covariance = tensors.take("mean", d), tensors.take("covariance", d, d)
            if self.side == PAIRS:
                mean, covariance = mean[d // 2 :], covariance[d // 2 :, d // 2 :]
            for method, baseline in build_baselines(Moments(0, mean, covariance), *size, seed).items():
                dictionaries[block, method, *size] = OfOutput(baseline) if self.side == PAIRS else baseline
        return dictionaries


def open_sweep(folder: str) -> SAESweep:
    """Open the autoencoders of a finished run of notebook 31, whatever model is at hand.

    Args:
        folder: the run's output folder.

    Raises:
        ValueError: the run is unfinished or damaged, or the autoencoders were trained neither on updates nor on pairs
            of input and output.
    """
    place, results = resolve(folder), read_results(folder, "31_train_sae", "saes")
    if not (place / "saes" / "source.json").is_file():
        raise ValueError(f"saes: {folder!r} has no saes/source.json; run 31_train_sae again")
    names = {tuple(row[column] for column in SAE_KEY): row["name"] for row in results["tables"]["saes"]}
    held_out = store.open(place / "held_out")
    sweep = SAESweep(place / "saes", read_config_file(place / "saes" / "source.json"), names, held_out)
    if sweep.side not in ("update", PAIRS):
        raise ValueError(f"saes: trained on the {sweep.side} of blocks; only an update can be replaced")
    return sweep


def load_sweep(folder: str, identity: Mapping[str, str], pipeline: Any) -> SAESweep:
    """Open the autoencoders of a finished run of notebook 31 to use them on a model.

    Args:
        folder: the run's output folder.
        identity: the :func:`vaelab.models.identity` of ``pipeline``.
        pipeline: the model; it must be the one that the autoencoders were trained on.

    Raises:
        ValueError: as :func:`open_sweep`; or the model is another, or its weights have changed.
    """
    sweep = open_sweep(folder)
    require_same_model(sweep.held_out, pipeline, identity, "saes")
    return sweep


def evaluate_methods(
    dictionaries: Mapping[tuple, Dictionary], held_out: store.Store, device: Any = "cpu"
) -> pd.DataFrame:
    """Evaluate autoencoders and baselines, by :data:`METHOD_KEY`, on the held-out vectors of their blocks.

    Returns:
        One row per dictionary: :data:`METHOD_KEY` and the fields of :class:`vaelab.sae.metrics.Fidelity`.
    """
    fidelities = {}
    for block in dict.fromkeys(key[0] for key in dictionaries):
        own = {key: dictionary for key, dictionary in dictionaries.items() if key[0] == block}
        batches = (batch.to(device) for batch in iterate_vectors(held_out, block))
        target = next((each.target for key, each in own.items() if key[1] == "sae"), None)
        fidelities |= evaluate_dictionaries(own, batches, target=target)
    return fidelity_table(fidelities, METHOD_KEY)


def select_methods(
    dictionaries: Mapping[tuple, Dictionary], methods: Iterable[str], size: tuple[int, int]
) -> dict[tuple, Dictionary]:
    """Select the dictionaries of some methods and one size.

    Raises:
        ValueError: a name is not in :data:`METHODS`.
    """
    methods = list(methods)
    for name in methods:
        one_of("by_step", name, METHODS)
    return {key: value for key, value in dictionaries.items() if key[1] in methods and key[2:] == size}


def methods_metrics(table: pd.DataFrame, size: tuple[int, int]) -> dict[str, float]:
    """Collect the metrics ``<block>.<measure>`` of the autoencoders of one size, and ``<block>.<baseline>.<measure>``.

    Args:
        table: columns :data:`METHOD_KEY` and the measures.
        size: k and n_features.
    """
    own = table[(table["k"] == size[0]) & (table["n_features"] == size[1])]
    named = {}
    for row in own.to_dict("records"):
        place = row["block"] if row["method"] == "sae" else f"{row['block']}.{row['method']}"
        measures = {name: value for name, value in row.items() if name not in METHOD_KEY}
        named |= {f"{place}.{name}": value for name, value in measures.items() if not isinstance(value, str)}
    return named
