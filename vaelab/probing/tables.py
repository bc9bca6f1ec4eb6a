"""Tables of what classifiers read off layers: the map of knowledge, the best layers, and runs of several models."""

from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import PurePath

import pandas as pd

from vaelab.core.io import read_json
from vaelab.core.paths import resolve
from vaelab.core.validate import unknown
from vaelab.probing.layer_features import placed

MEASURES = {"probe": "linear probe,\ntest accuracy", "diffc": "Diff-C,\ntest accuracy"}
PURITY = "purity: share of\nthe commonest class"


def joined(probes: pd.DataFrame, diffcs: pd.DataFrame) -> pd.DataFrame:
    """The rows of both."""
    return pd.concat([probes, diffcs], ignore_index=True)


def best(rows: pd.DataFrame, factor: str) -> str:
    """The layer and timestep that reads a factor best on the validation pictures."""
    own = rows[rows["factor"] == factor]
    return own.loc[own["validation"].idxmax(), "layer"]


def asked(probes: pd.DataFrame, patterns: Sequence[str]) -> dict[str, list[str]]:
    """For each factor the layers that Diff-C is to read it from.

    Args:
        probes: rows of the linear probes, of every layer and factor.
        patterns: names such as ``up_ft1.t25``, or globs such as ``up_ft1.*``; none for the layer that the probe
            reads each factor best from.

    Raises:
        ValueError: a pattern that fits no layer.
    """
    chosen = fitting(list(dict.fromkeys(probes["layer"])), patterns)
    return {factor: chosen or [best(probes, factor)] for factor in dict.fromkeys(probes["factor"])}


def fitting(layers: Sequence[str], patterns: Sequence[str]) -> list[str]:
    """The layers that one of some names or globs fits.

    Raises:
        ValueError: a pattern that fits no layer.
    """
    for pattern in patterns:
        if not any(fnmatchcase(layer, pattern) for layer in layers):
            raise unknown("diffc_layers", pattern, layers)
    return [layer for layer in layers if any(fnmatchcase(layer, pattern) for pattern in patterns)]


def refuse_unfinished(folders: Sequence[str], notebook: str) -> None:
    """Raise ValueError where one of the runs that :func:`models` is to read has not finished."""
    for folder in folders:
        stored(folder, notebook, "accuracy", "others")


def at_the_best(rows: pd.DataFrame) -> pd.DataFrame:
    """The rows of the layers from which a classifier reads a factor best, by the validation pictures: those of all
    classifiers there, so that they stand beside each other.

    Args:
        rows: of several classifiers, with ``layer``, ``factor``, ``classifier`` and ``validation``.
    """
    kinds = [part for _, part in rows.groupby("classifier", sort=False)]
    chosen = {(factor, best(part, factor)) for part in kinds for factor in set(part["factor"])}
    kept = rows[[pair in chosen for pair in zip(rows["factor"], rows["layer"], strict=True)]]
    places = [{name: place for place, name in enumerate(dict.fromkeys(rows[by]))} for by in ("factor", "layer")]
    keys = [(places[0][row.factor], places[1][row.layer]) for row in kept.itertuples()]
    return kept.iloc[sorted(range(len(kept)), key=keys.__getitem__)]


def knowledge(rows: pd.DataFrame, purity: pd.DataFrame | None = None) -> dict[str, pd.DataFrame]:
    """The map of knowledge for :func:`vaelab.probing.plots.knowledge`: for each measure ``block``, ``timestep``,
    ``factor``, ``value`` and ``chance``.

    Args:
        rows: of classifiers, each of every layer that it is asked about.
        purity: the table of a run of 41 on the same layers; None for none.
    """
    made = {
        label: placed(rows[rows["classifier"] == classifier]).rename(columns={"accuracy": "value"})
        for classifier, label in MEASURES.items()
        if (rows["classifier"] == classifier).any()
    }
    return made if purity is None else {**made, **purities(purity)}


def purities(table: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """The table of :func:`vaelab.probing.purity.table` as a measure of :func:`knowledge`."""
    chance = placed(table.drop(columns="chance", errors="ignore"))
    return {PURITY: chance.rename(columns={"majority": "value", "majority_chance": "chance"})}


def stored(folder: str, notebook: str, table: str, parameter: str) -> pd.DataFrame:
    """A table of a finished run, with the column ``model``.

    Args:
        folder: of the run.
        notebook: that it must be of.
        table: its name.
        parameter: what errors call the folder.

    Raises:
        ValueError: no finished run of that notebook, or one without that table.
    """
    file = resolve(folder) / "results.json"
    results = read_json(file) if file.exists() else {}
    if results.get("notebook") != notebook:
        raise ValueError(
            f"{parameter}: {folder!r} holds no finished run of {notebook}; run it first "
            f"(make run P={folder.replace('outputs/', 'params/', 1)}.yaml)"
        )
    if table not in results["tables"]:
        raise unknown(f"{parameter} (tables of {folder!r})", table, results["tables"])
    return pd.DataFrame(results["tables"][table]).assign(model=results["params"]["model"])


def models(own: pd.DataFrame, model: str, folders: Sequence[str], notebook: str) -> pd.DataFrame:
    """One or several models beside each other, each from the layers of :func:`at_the_best`.

    Args:
        own: accuracies of this run.
        model: its model.
        folders: finished runs of the same notebook, of other models or prompts.
        notebook: its name.

    Returns:
        The rows with ``model``, factor by factor; of a model that was there already (with another prompt, say) with
        the run's name.

    Raises:
        ValueError: a run that is named twice, or what :func:`stored` refuses.
    """
    parts = {model: own.assign(model=model)}
    for folder in folders:
        other = stored(folder, notebook, "accuracy", "others")
        name = other["model"].iloc[0]
        name = f"{name}, {PurePath(folder).name}" if name in parts else name
        if name in parts:
            raise ValueError(f"others: {folder!r} is named twice")
        parts[name] = other.assign(model=name)
    rows = pd.concat([at_the_best(each) for each in parts.values()], ignore_index=True)
    order = {factor: place for place, factor in enumerate(dict.fromkeys(rows["factor"]))}
    return rows.sort_values("factor", key=lambda each: each.map(order), kind="stable", ignore_index=True)


def metrics(rows: pd.DataFrame, compared: pd.DataFrame) -> Mapping[str, float]:
    """``<layer>.t<timestep>.<classifier>.<factor>.accuracy`` and ``.chance``, ``diffusion_classifier.accuracy``,
    ``diffusion_classifier.seconds_per_image``, ``diffc.seconds_per_image`` and how many times that is.

    Args:
        rows: of probes and Diff-Cs.
        compared: from :func:`vaelab.probing.suite.side_by_side`.
    """
    named = {
        f"{row['layer']}.{row['classifier']}.{row['factor']}.{name}": row[name]
        for row in rows.to_dict("records")
        for name in ("accuracy", "chance")
    }
    by_name = compared.set_index("classifier")
    seconds = by_name["seconds_per_image"]
    named |= {f"{name}.seconds_per_image": seconds[name] for name in by_name.index}
    named |= {f"{name}.accuracy_on_these": by_name.loc[name, "accuracy_on_these"] for name in by_name.index}
    named["diffusion_classifier.accuracy"] = by_name.loc["diffusion_classifier", "accuracy"]
    return {**named, "diffusion_classifier.times_diffc": seconds["diffusion_classifier"] / seconds["diffc"]}
