"""Input validation: errors that name the parameter, its value, and what is expected."""

import difflib
from collections.abc import Iterable
from typing import Any


def nearest(name: str, choices: Iterable[str], count: int = 5) -> list[str]:
    """Return up to ``count`` choices that look most like ``name``, best first."""
    choices = sorted(set(choices))
    close = difflib.get_close_matches(name, choices, n=count, cutoff=0.4)
    return close or choices[:count]


def unknown(parameter: str, name: Any, choices: Iterable[str]) -> ValueError:
    """Make the error for a name that does not exist; it lists the most similar names that exist."""
    choices = list(choices)
    listed = ", ".join(nearest(str(name), choices)) or "none at all"
    return ValueError(f"{parameter}: unknown name {name!r}; the nearest of {len(choices)}: {listed}")


def at_least(parameter: str, value: float, minimum: float, *, exclusive: bool = False) -> None:
    """Raise ValueError unless ``value >= minimum`` (``>`` if ``exclusive``); NaN never passes."""
    if not (value > minimum if exclusive else value >= minimum):
        bound = "above" if exclusive else "at least"
        raise ValueError(f"{parameter}: must be {bound} {minimum}, got {value!r}")


def one_of(parameter: str, value: str, choices: Iterable[str]) -> None:
    """Raise ValueError, listing the most similar choices, unless ``value`` is one of ``choices``."""
    choices = list(choices)
    if value not in choices:
        raise unknown(parameter, value, choices)
