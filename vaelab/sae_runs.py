"""Autoencoders kept in the folder of a run of notebook 31, and read again to be put into the model beside
their baselines.
"""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
from safetensors.torch import load_file, save_file

from vaelab import fidelity, store
from vaelab.baselines import Dictionary, Moments, baselines, moments
from vaelab.checks import one_of, resolve, unknown
from vaelab.files import read_json, write_json
from vaelab.sae import SAE
from vaelab.sae_grid import KEY, refuse_other_model, vectors
from vaelab.sae_training import Wanted

WHO = ("sae", "zero", "mean", "random", "pca")
NAMES = ["block", "who", "k", "n_features"]
FOR_MOMENTS = 500_000
"""The most vectors of a block that its mean and covariance are taken of."""


def keep(saes: Mapping[str, SAE], wanted: Mapping[str, Wanted], kept: store.Store, folder: Path) -> None:
    """Save autoencoders, by block the moments of what they were trained on, and where that came from."""
    for name, sae in saes.items():
        sae.save_pretrained(folder / name)
    for block in dict.fromkeys(one.block for one in wanted.values()):
        one = moments(vectors(kept, block, FOR_MOMENTS))
        tensors = {"mean": one.mean.cpu(), "covariance": one.covariance.cpu().contiguous()}
        save_file(tensors, folder / f"{block}.moments.safetensors", metadata={"count": str(one.count)})
    write_json(folder / "source.json", kept.settings)


class SAERun(NamedTuple):
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
            found |= {(block, who, *size): one for who, one in baselines(measured, *size, seed).items()}
        return found


def read(folder: str, model: str, pipeline: Any) -> SAERun:
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
    names = {tuple(row[part] for part in KEY): row["name"] for row in stored}
    held_out = store.open(place / "held_out")
    found = SAERun(place / "saes", read_json(place / "saes" / "source.json"), names, held_out)
    refuse_other_model(held_out, pipeline, model, "saes")
    if found.source["side"] != "update":
        raise ValueError(f"saes: trained on the {found.source['side']} of blocks; only an update can be replaced")
    return found


def measure_each(dictionaries: Mapping[tuple, Dictionary], held_out: store.Store, device: Any = "cpu") -> pd.DataFrame:
    """Autoencoders and baselines, under :data:`NAMES`, on the held-out vectors of their blocks.

    Returns:
        A row each: :data:`NAMES` and the fields of :class:`vaelab.fidelity.Fidelity`.
    """
    measured = {}
    for block in dict.fromkeys(key[0] for key in dictionaries):
        own = {key: one for key, one in dictionaries.items() if key[0] == block}
        measured |= fidelity.measure(own, (batch.to(device) for batch in vectors(held_out, block)))
    return fidelity.table(measured, NAMES)


def select(
    dictionaries: Mapping[tuple, Dictionary], who: Iterable[str], size: tuple[int, int]
) -> dict[tuple, Dictionary]:
    """Those of one size that are an autoencoder or a baseline of these names.

    Raises:
        ValueError: a name that is not of :data:`WHO`.
    """
    who = list(who)
    for name in who:
        one_of("by_step", name, WHO)
    return {key: one for key, one in dictionaries.items() if key[1] in who and key[2:] == size}


def metrics(table: pd.DataFrame, size: tuple[int, int]) -> dict[str, float]:
    """``<block>.<measure>`` of the autoencoders of one size and ``<block>.<baseline>.<measure>``.

    Args:
        table: columns :data:`NAMES`, and the measures.
        size: k and n_features.
    """
    own = table[(table["k"] == size[0]) & (table["n_features"] == size[1])]
    named = {}
    for row in own.to_dict("records"):
        place = row["block"] if row["who"] == "sae" else f"{row['block']}.{row['who']}"
        measures = {name: value for name, value in row.items() if name not in NAMES}
        named |= {f"{place}.{name}": value for name, value in measures.items() if not isinstance(value, str)}
    return named
