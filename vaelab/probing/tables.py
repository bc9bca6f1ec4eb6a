"""Tables of accuracies: the best layers, accuracy by block and timestep, and several runs side by side.

A layer is a block of the denoiser at a timestep, such as ``up_ft1.t25``. A factor is a set of classes that pictures are
labelled with, such as the colour. The classifiers are the linear probe and Diff-C, the convolutional classifier of Kim
et al. (:mod:`vaelab.probing.diffc`), each trained on one layer for one factor. Purity is the share of the most frequent
class among the pictures that activate a feature most (:mod:`vaelab.probing.purity`).
"""

from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import PurePath

import pandas as pd

from vaelab.core.validate import unknown
from vaelab.probing.layer_features import with_block_and_timestep
from vaelab.runner.run import read_results

CLASSIFIERS = {"probe": "linear probe,\ntest accuracy", "diffc": "Diff-C,\ntest accuracy"}
PURITY = "purity: share of the\nmost frequent class"


def best_layer(rows: pd.DataFrame, factor: str) -> str:
    """Find the layer with the highest validation accuracy for a factor.

    Args:
        rows: accuracies, with columns ``layer``, ``factor`` and ``validation`` (validation accuracy).
        factor: the factor's name.
    """
    own = rows[rows["factor"] == factor]
    return own.loc[own["validation"].idxmax(), "layer"]


def layers_by_factor(probes: pd.DataFrame, patterns: Sequence[str]) -> dict[str, list[str]]:
    """Choose for each factor the layers that Diff-C is trained on.

    Args:
        probes: accuracies of the linear probes, for every layer and factor.
        patterns: the layers to train on, as names such as ``up_ft1.t25`` or globs such as ``up_ft1.*``. If empty, each
            factor gets the layer on which its linear probe has the best validation accuracy.

    Raises:
        ValueError: a pattern matches no layer.
    """
    chosen = matching_layers(list(dict.fromkeys(probes["layer"])), patterns)
    return {factor: chosen or [best_layer(probes, factor)] for factor in dict.fromkeys(probes["factor"])}


def matching_layers(layers: Sequence[str], patterns: Sequence[str]) -> list[str]:
    """List the layers that match at least one name or glob.

    Raises:
        ValueError: a pattern matches no layer.
    """
    for pattern in patterns:
        if not any(fnmatchcase(layer, pattern) for layer in layers):
            raise unknown("diffc_layers", pattern, layers)
    return [layer for layer in layers if any(fnmatchcase(layer, pattern) for pattern in patterns)]


def at_best_layers(rows: pd.DataFrame) -> pd.DataFrame:
    """Keep for each factor the layers on which some classifier reaches its best validation accuracy, and return the
    rows of all classifiers on those layers.

    Args:
        rows: accuracies of several classifiers, with columns ``layer``, ``factor``, ``classifier`` and ``validation``.
    """
    by_classifier = [part for _, part in rows.groupby("classifier", sort=False)]
    chosen = {(factor, best_layer(part, factor)) for part in by_classifier for factor in set(part["factor"])}
    selected = rows[[pair in chosen for pair in zip(rows["factor"], rows["layer"], strict=True)]]
    order = {column: list(dict.fromkeys(rows[column])).index for column in ("factor", "layer")}
    return selected.sort_values(["factor", "layer"], key=lambda each: each.map(order[each.name]), kind="stable")


def knowledge_tables(rows: pd.DataFrame, purity: pd.DataFrame | None = None) -> dict[str, pd.DataFrame]:
    """Make the tables of accuracy over block and timestep, per factor, that :func:`vaelab.probing.plots.knowledge`
    draws.

    Args:
        rows: accuracies, with columns ``layer``, ``factor``, ``classifier``, ``accuracy`` and ``chance``.
        purity: the purity table of a run of notebook 41 (how pure features are) on the same layers; None means no
            table for purity.

    Returns:
        For each classifier, and for purity, a table with columns ``block``, ``timestep``, ``factor``, ``value`` and
        ``chance``.
    """
    tables = {
        title: with_block_and_timestep(rows[rows["classifier"] == classifier]).rename(columns={"accuracy": "value"})
        for classifier, title in CLASSIFIERS.items()
        if (rows["classifier"] == classifier).any()
    }
    return tables if purity is None else {**tables, **purity_tables(purity)}


def purity_tables(purity: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """Bring the table of :func:`vaelab.probing.purity.purity_table` into the form of :func:`knowledge_tables`."""
    rows = with_block_and_timestep(purity.drop(columns="chance", errors="ignore"))
    return {PURITY: rows.rename(columns={"majority": "value", "majority_chance": "chance"})}


def read_table(folder: str, notebook: str, table: str, parameter: str) -> pd.DataFrame:
    """Read a table of a finished run, and add the run's model as a column ``model``.

    Args:
        folder: the run's folder.
        notebook: the name of the notebook that must have made the run.
        table: the table's name.
        parameter: the notebook parameter that named the folder; error messages begin with it.

    Raises:
        ValueError: the folder holds no finished run of that notebook, the run's results are damaged, or they have no
            such table.
    """
    results = read_results(folder, notebook, parameter)
    tables, model = results.get("tables", {}), results.get("params", {}).get("model")
    if table not in tables:
        raise unknown(f"{parameter} (tables of {folder!r})", table, tables)
    return pd.DataFrame(tables[table]).assign(model=model)


def require_finished(folders: Sequence[str], notebook: str) -> None:
    """Raise ValueError if one of the runs for :func:`compare_models` has not finished."""
    for folder in folders:
        read_table(folder, notebook, "accuracy", "others")


def compare_models(own: pd.DataFrame, model: str, folders: Sequence[str], notebook: str) -> pd.DataFrame:
    """Join the accuracies of this run and of other runs, each on the layers of :func:`at_best_layers`.

    Args:
        own: the accuracies of this run.
        model: the name of this run's model.
        folders: the folders of finished runs of the same notebook, with other models or prompts.
        notebook: the notebook's name.

    Returns:
        The rows, sorted by factor, with a column ``model``. If several runs use the same model, the run's name is
        appended to the model's name of the later ones.

    Raises:
        ValueError: a run is listed twice, or :func:`read_table` cannot read it.
    """
    parts = {model: own.assign(model=model)}
    for folder in folders:
        other = read_table(folder, notebook, "accuracy", "others")
        name = other["model"].iloc[0]
        name = f"{name}, {PurePath(folder).name}" if name in parts else name
        if name in parts:
            raise ValueError(f"others: {folder!r} is named twice")
        parts[name] = other.assign(model=name)
    rows = pd.concat([at_best_layers(each) for each in parts.values()], ignore_index=True)
    order = list(dict.fromkeys(rows["factor"])).index
    return rows.sort_values("factor", key=lambda each: each.map(order), kind="stable", ignore_index=True)


def accuracy_metrics(rows: pd.DataFrame, compared: pd.DataFrame) -> Mapping[str, float]:
    """Collect the metrics of notebook 42, which compares probes, Diff-C and the denoiser itself as classifiers.

    Args:
        rows: the accuracies of linear probes and of Diff-C.
        compared: the table of :func:`vaelab.probing.classifiers.compare_classifiers`, which times classifiers on the
            same few test pictures.

    Returns:
        For each row ``<layer>.<classifier>.<factor>.accuracy`` and ``.chance``. For each compared classifier
        ``<classifier>.seconds_per_image`` and ``<classifier>.accuracy_on_these``, its accuracy on those few pictures.
        For the denoiser as a classifier, if it was asked, also ``diffusion_classifier.accuracy`` and
        ``diffusion_classifier.times_diffc``, a ratio of times: its seconds per picture divided by those of Diff-C.
    """
    metrics = {
        f"{row['layer']}.{row['classifier']}.{row['factor']}.{name}": row[name]
        for row in rows.to_dict("records")
        for name in ("accuracy", "chance")
    }
    by_name = compared.set_index("classifier")
    seconds = by_name["seconds_per_image"]
    metrics |= {f"{name}.seconds_per_image": seconds[name] for name in by_name.index}
    metrics |= {f"{name}.accuracy_on_these": by_name.loc[name, "accuracy_on_these"] for name in by_name.index}
    if "diffusion_classifier" not in by_name.index:
        return metrics
    metrics["diffusion_classifier.accuracy"] = by_name.loc["diffusion_classifier", "accuracy"]
    return {**metrics, "diffusion_classifier.times_diffc": seconds["diffusion_classifier"] / seconds["diffc"]}
