"""Configurations built from a notebook's parameters."""

from dataclasses import fields
from typing import Any


def configured(kind: type, params: dict[str, Any], **parts: type) -> Any:
    """Make a configuration from a notebook's parameters.

    Args:
        kind: the dataclass to make.
        params: the parameters by name. Each field takes the parameter of its name, with a list turned into a tuple; a
            field without a parameter keeps its default. Parameters that are not a field are ignored.
        parts: those fields of ``kind`` that are dataclasses themselves; they are made from ``params`` in the same way.
    """

    def arguments(dataclass: type) -> dict[str, Any]:
        given = {field.name: params[field.name] for field in fields(dataclass) if field.name in params}
        return {name: tuple(value) if isinstance(value, list) else value for name, value in given.items()}

    return kind(**arguments(kind), **{name: part(**arguments(part)) for name, part in parts.items()})
