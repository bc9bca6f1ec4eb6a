"""Text from data in figures: file names, class names and prompts are drawn literally.

matplotlib reads the text between two dollar signs as a formula. If it is none, matplotlib raises an error when the
figure is drawn, after everything was computed. It also leaves names that begin with an underscore out of legends.
"""

import functools
import re
from collections.abc import Callable, Mapping
from typing import Any

import pandas as pd
from matplotlib.figure import Figure

UNESCAPED_DOLLAR = re.compile(r"(?<!\\)\$")
ZERO_WIDTH_SPACE = "\u200b"


def plain(value: Any) -> Any:
    """Make every string in ``value`` safe to draw.

    Dollar signs are escaped, a zero-width space is put before a leading underscore, and bytes of a file name that are
    not valid UTF-8 become question marks. Strings are found in tables (cells and labels), series, mappings, lists and
    tuples; all other values are returned unchanged. Applying the function twice has the same effect as applying it
    once.
    """
    if isinstance(value, str):
        text = UNESCAPED_DOLLAR.sub(r"\\$", value).encode(errors="replace").decode()
        return ZERO_WIDTH_SPACE + text if text.startswith("_") else text
    if isinstance(value, pd.DataFrame):
        columns = [plain(value.iloc[:, number]) for number in range(value.shape[1])]
        return pd.concat(columns, axis=1) if columns else value
    if isinstance(value, pd.Series):
        value = value.rename(plain(value.name))
        if not pd.api.types.is_numeric_dtype(value.index.dtype):
            value = value.rename(index=plain)
        if isinstance(value.dtype, pd.CategoricalDtype):
            return value.cat.rename_categories(plain)
        return value if pd.api.types.is_numeric_dtype(value) else value.map(plain)
    if isinstance(value, Mapping):
        return {plain(key): plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        entries = [plain(entry) for entry in value]
        return type(value)(*entries) if hasattr(value, "_fields") else type(value)(entries)
    return value


def plain_text(function: Callable[..., Figure]) -> Callable[..., Figure]:
    """Decorate a function that draws, so that all text in its arguments is drawn literally, see :func:`plain`."""

    @functools.wraps(function)
    def drawn(*arguments: Any, **options: Any) -> Figure:
        return function(*plain(arguments), **plain(options))

    return drawn
