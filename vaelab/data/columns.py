"""Find the columns of a data set that hold pictures and labels."""

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from vaelab.core.validate import one_of
from vaelab.data import folders
from vaelab.data.transforms import BROKEN, decode

if TYPE_CHECKING:
    import datasets

SAMPLED_ROWS = 64
"""Number of rows that are tried to find out whether a column of bytes holds pictures."""


def find_images(rows: "datasets.Dataset", dataset: str, requested: str) -> str:
    """Find the column of pictures; ``requested`` is a column, or ``""`` to choose one.

    Raises:
        ValueError: there is no column of pictures, the requested column holds none, or there are several and none of
            them is called ``image``.
    """
    import datasets

    if requested:
        one_of(f"image_column (of {dataset!r})", requested, rows.column_names)
    storing = [name for name, feature in rows.features.items() if _may_store_pictures(feature)]
    if requested in storing:
        return requested
    kinds = ", ".join(f"{name} ({type(feature).__name__})" for name, feature in rows.features.items())
    if not storing or requested:
        missing = f"image_column: {requested!r} holds no pictures" if requested else "dataset: no image column"
        raise ValueError(f"{missing} in {dataset!r}; its columns: {kinds or 'none'}")
    if len(storing) == 1:
        return storing[0]
    holding = [
        name for name in storing if isinstance(rows.features[name], datasets.Image) or _opens_as_picture(rows, name)
    ]
    if len(holding) == 1 or "image" in holding:
        return "image" if "image" in holding else holding[0]
    raise ValueError(
        f"image_column: {dataset!r} has {len(holding)} columns of pictures; give one of {', '.join(holding or storing)}"
    )


def _may_store_pictures(feature: Any) -> bool:
    import datasets

    return (
        isinstance(feature, datasets.Image)
        or (isinstance(feature, dict) and {"bytes", "path"} <= feature.keys())
        or (isinstance(feature, datasets.Value) and feature.dtype in ("binary", "large_binary"))
    )


def _opens_as_picture(rows: "datasets.Dataset", column: str) -> bool:
    for value in rows.select_columns([column])[:SAMPLED_ROWS][column]:
        stored = value if isinstance(value, dict) else {"bytes": value}
        if stored.get("bytes") is None and Path(stored.get("path") or "").suffix.lower() in folders.picture_suffixes():
            return True
        try:
            decode(stored)
        except BROKEN:
            continue
        return True
    return False


class Labels(NamedTuple):
    """The labels of a data set's rows."""

    numbers: np.ndarray | None
    """Class indices (rows,), -1 if a label is withheld; None if no column is chosen."""
    classes: list[str]
    column: str
    """The column of the labels, or ``""``."""
    choices: list[str]
    """Columns that could be labels, if none is chosen."""


def find_labels(
    rows: "datasets.Dataset", every_value: Callable[[str], Iterable[Any]], dataset: str, image: str, requested: str
) -> Labels:
    """Find the labels of the column ``requested``; if none is requested, of ``label`` or the only column of class
    labels.

    Args:
        rows: all rows of a split.
        every_value: returns the values of a column in all splits, so that a class has the same index in all splits.
        dataset: the data set's name, for error messages.
        image: the column of pictures.
        requested: the requested column, or ``""`` to choose one.

    Raises:
        ValueError: there is no such column, or its values are not classes.
    """
    import datasets

    features = {name: feature for name, feature in rows.features.items() if name != image}
    usable = [name for name, feature in features.items() if _may_be_labels(feature)]
    named = [name for name in usable if isinstance(features[name], datasets.ClassLabel)]
    if requested:
        one_of(f"label_column (of {dataset!r})", requested, usable)
    column = requested or ("label" if "label" in usable else named[0] if len(named) == 1 else "")
    if not column:
        return Labels(None, [], "", named or usable)
    values = rows.select_columns([column]).with_format("arrow")[:][column]
    if column in named:
        numbers = values.fill_null(-1).to_numpy().astype(np.int64)
        return Labels(numbers, list(features[column].names), column, [])
    try:
        labels, classes = _numbered(values.to_pylist(), every_value(column))
    except ValueError as error:
        raise ValueError(f"label_column: {column!r} of {dataset!r} {error}") from error
    return Labels(labels, classes, column, [])


def _may_be_labels(feature: Any) -> bool:
    import datasets

    if isinstance(feature, datasets.ClassLabel):
        return True
    kinds = ("string", "large_string", "bool", "int", "uint", "float")
    return isinstance(feature, datasets.Value) and feature.dtype.startswith(kinds)


def _numbered(values: Sequence[Any], every: Iterable[Any]) -> tuple[np.ndarray, list[str]]:
    """Convert labels (text or whole numbers) to class indices; return them with the classes of all splits, so that the
    indices agree in all splits."""
    found = {_class_name(value) for value in (*every, *values)} - {""}
    whole_numbers = all(name.removeprefix("-").isdecimal() for name in found)
    classes = sorted(found, key=int) if whole_numbers else sorted(found)
    number = {name: number for number, name in enumerate(classes)} | {"": -1}
    return np.array([number[_class_name(value)] for value in values], dtype=np.int64), classes


def _class_name(value: Any) -> str:
    """Convert a label to text; empty if the label is withheld."""
    if value is None or value != value:
        return ""
    if isinstance(value, float):
        if not value.is_integer():
            raise ValueError(f"holds {value}; expected text or whole numbers")
        value = int(value)
    return str(value)
