"""Markdown: tables, numbers and intervals, always formatted alike."""

from collections.abc import Iterable, Sequence
from math import floor, log10
from pathlib import Path
from typing import Any, NamedTuple

from matplotlib.figure import Figure


class Picture(NamedTuple):
    """A picture that was copied with a run."""

    path: Path
    caption: str


class Chart(NamedTuple):
    """A chart that is drawn from tables."""

    name: str
    """The file's name without its ending."""
    figure: Any
    """A function without arguments that draws it."""
    caption: str

    def draw(self) -> Figure:
        """Draw the chart."""
        return self.figure()


Block = str | Picture | Chart
"""A part of the page: Markdown text, or a figure with its caption."""


def table(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """A Markdown table; cells are escaped."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(_cell(cell) for cell in line) + " |" for line in lines)


def listed(names: Sequence[str], joined: str = "and") -> str:
    """``a, b and c``; ``none`` if there are none."""
    if not names:
        return "none"
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} {joined} {names[-1]}"


def number(value: float, digits: int = 3) -> str:
    """A number with some significant digits and without an exponent."""
    if value == 0:
        return "0"

    rounded = float(f"{value:.{digits - 1}e}")
    places = digits - 1 - floor(log10(abs(rounded)))
    return f"{rounded:,.{max(0, places)}f}"


def signed(value: float, digits: int = 2) -> str:
    """A number with its sign and some significant digits."""
    return number(value, digits) if value < 0 or number(value, digits) == "0" else "+" + number(value, digits)


def percent(share: float, digits: int = 0) -> str:
    """A share between 0 and 1 in percent."""
    return f"{round(100 * share, digits) + 0.0:.{digits}f} %"  # + 0.0 makes a negative zero positive


def between(low: float, high: float, digits: int = 2, *, sign: bool = False) -> str:
    """The two ends of an interval."""
    form = signed if sign else number
    return f"{form(low, digits)} to {form(high, digits)}"


def percent_between(low: float, high: float) -> str:
    """The two ends of an interval of a share, in percent."""
    return f"{100 * low:.0f} to {100 * high:.0f}"


def span(values: Iterable[float], form: Any = number) -> str:
    """The smallest and the largest of some values, or one value if both read alike."""
    values = list(values)
    low, high = form(min(values)), form(max(values))
    return low if low == high else f"{low} to {high}"


def excludes_zero(low: float | None, high: float | None) -> bool:
    """Whether an interval excludes 0; an interval that is missing does not."""
    return low is not None and high is not None and (low > 0 or high < 0)


def _cell(value: Any) -> str:
    return str(value).replace("|", "\\|").replace("\n", " ")
