"""Configurations built from a notebook's parameters."""

from dataclasses import fields
from typing import Any


def configured(kind: type, params: dict[str, Any], **parts: type) -> Any:
    """A configuration made of a notebook's parameters: each field of the dataclass ``kind``, and of those that
    are its ``parts``, takes the parameter of its name and keeps its default where there is none."""

    def take(one: type) -> dict[str, Any]:
        given = {each.name: params[each.name] for each in fields(one) if each.name in params}
        return {name: tuple(value) if isinstance(value, list) else value for name, value in given.items()}

    return kind(**take(kind), **{name: part(**take(part)) for name, part in parts.items()})
