"""A notebook's parameters: their declared types, their validation, and which of them decide the results.

A notebook declares its parameters as annotated assignments in the cell tagged ``parameters``. An
annotation is a plain type (``int``, ``list[str]``), or one of pydantic's constrained types
(``PositiveInt``, ``NonNegativeInt``, ...), which the cell imports in its first line.
"""

import ast
import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

import pydantic

from vaelab.core.paths import local, project_root
from vaelab.core.validate import unknown

EXECUTION_ONLY = frozenset(
    {"checkpoint_every", "device", "dry_run", "items_per_shard", "output_dir", "overwrite", "trackers", "verify"}
)
"""Parameters of every notebook that say how a run executes and do not decide its results."""
TYPES = {
    **{kind.__name__: kind for kind in (bool, dict, float, int, list, str)},
    "Literal": Literal,
    **{
        name: getattr(pydantic, name)
        for name in ("NonNegativeFloat", "NonNegativeInt", "PositiveFloat", "PositiveInt")
    },
}  # fmt: skip
"""What an annotation in a ``parameters`` cell may be made of."""
BOUNDS = {"gt": "above", "ge": "at least", "lt": "below", "le": "at most"}
STRICT = pydantic.ConfigDict(strict=True, allow_inf_nan=False)


def declared(notebook: Path) -> dict[str, Any]:
    """The parameters of a notebook file and their types.

    Raises:
        ValueError: a notebook without a cell tagged ``parameters``, or with an annotation that is not understood.
    """
    import nbformat

    cells = nbformat.read(notebook, as_version=4).cells
    sources = [cell.source for cell in cells if "parameters" in cell.metadata.get("tags", [])]
    if len(sources) != 1:
        raise ValueError(f"{notebook.name}: expected one cell tagged 'parameters', found {len(sources)}")
    return {
        statement.target.id: _type(statement.annotation, f"{notebook.name}: {statement.target.id}")
        for statement in ast.parse(sources[0]).body
        if isinstance(statement, ast.AnnAssign)
    }


def defaults(notebook: Path) -> dict[str, Any]:
    """The parameters of a notebook file and their default values."""
    import nbformat

    cells = nbformat.read(notebook, as_version=4).cells
    statements = [
        statement
        for cell in cells
        if "parameters" in cell.metadata.get("tags", [])
        for statement in ast.parse(cell.source).body
    ]
    return {
        statement.target.id: ast.literal_eval(statement.value)
        for statement in statements
        if isinstance(statement, ast.AnnAssign) and statement.value is not None
    }


def validate(name: str, value: Any, kind: Any) -> None:
    """Raise ValueError unless ``value`` has the type ``kind``; an int is accepted as a float.

    Args:
        name: the parameter's name; the error message begins with it.
        value: the given value.
        kind: a type, as :func:`declared` returns it.
    """
    adapter = pydantic.TypeAdapter(kind, config=STRICT)
    try:
        adapter.validate_python(value)
    except pydantic.ValidationError as error:
        raise ValueError(f"{name}: {_reason(error.errors()[0], kind)}") from None


def portable(value: Any) -> Any:
    """A parameter without this machine's folders: a path inside the project becomes relative to it, any other
    absolute path its last part."""
    if isinstance(value, list):
        return [portable(entry) for entry in value]
    if isinstance(value, str) and "+" in value:
        return "+".join(map(portable, value.split("+")))
    if not isinstance(value, str) or not Path(value).expanduser().is_absolute():
        return value
    path = Path(value).expanduser()
    return str(path.relative_to(project_root())) if path.is_relative_to(project_root()) else path.name


def fingerprints(params: Mapping[str, Any], execution_only: Iterable[str] = ()) -> dict[str, str]:
    """A short hash of each parameter that decides the results.

    Two spellings of the same path have the same hash, and a hash tells nothing about this machine's folders.

    Args:
        params: the parameters and their values.
        execution_only: names, besides :data:`EXECUTION_ONLY`, that do not decide the results.
    """
    return {
        name: hashlib.sha256(json.dumps(_resolved(value), sort_keys=True).encode()).hexdigest()[:16]
        for name, value in params.items()
        if name not in EXECUTION_ONLY and name not in set(execution_only)
    }


def changed(results: Mapping[str, Any], params: Mapping[str, Any]) -> list[str]:
    """The names in ``params`` whose values differ from those that finished ``results`` were made with.

    Parameters that do not decide the results are left out. ``params`` may hold fewer names than the results do:
    a params file names only what differs from the notebook's defaults.
    """
    stored = results.get("fingerprints")
    if not isinstance(stored, dict):  # results of an earlier version
        known = results.get("params", {})
        return [
            name
            for name, value in params.items()
            if name not in EXECUTION_ONLY and (name not in known or known[name] != portable(value))
        ]
    now = fingerprints(params, results.get("execution_only", ()))
    return [name for name, digest in now.items() if stored.get(name) != digest]


def _type(annotation: ast.expr, where: str) -> Any:
    try:
        return eval(compile(ast.Expression(annotation), where, "eval"), {"__builtins__": {}}, TYPES)
    except (NameError, TypeError, AttributeError) as error:
        raise ValueError(f"{where}: the annotation {ast.unparse(annotation)!r} is not understood ({error})") from error


def _reason(error: Mapping[str, Any], kind: Any) -> str:
    value, context = error["input"], error.get("ctx", {})
    for bound, words in BOUNDS.items():
        if error["type"].startswith("greater") and bound in ("gt", "ge") and bound in context:
            return f"must be {words} {context[bound]:g}, got {value!r}"
        if error["type"].startswith("less") and bound in ("lt", "le") and bound in context:
            return f"must be {words} {context[bound]:g}, got {value!r}"
    if error["type"] == "literal_error":
        return str(unknown("", value, [str(choice) for choice in kind.__args__])).removeprefix(": ")
    if error["type"] == "finite_number":
        return f"expected a finite number, got {value!r}"
    if error["type"] == "list_type":
        return f"expected a list, got {type(value).__name__} {value!r}"
    expected = {"int_type": "int", "float_type": "float", "bool_type": "bool", "string_type": "str"}
    if error["type"] in expected:
        hint = " (YAML reads 5e-5 as text; write 5.0e-5)" if error["type"] == "float_type" and _numeric(value) else ""
        return f"expected {expected[error['type']]}, got {type(value).__name__} {value!r}{hint}"
    return f"{error['msg']}, got {value!r}"


def _resolved(value: Any) -> Any:
    """The value with existing local paths resolved, relative to the project if they lie in it."""
    if isinstance(value, list):
        return [_resolved(entry) for entry in value]
    if isinstance(value, float) and value.is_integer():
        return int(value)  # 1 and 1.0 are the same setting
    if isinstance(value, str) and "+" in value:
        return "+".join(map(_resolved, value.split("+")))
    if not isinstance(value, str) or (path := local(value)) is None:
        return value
    path, root = path.resolve(), project_root().resolve()
    return path.relative_to(root).as_posix() if path.is_relative_to(root) else str(path)


def _numeric(value: Any) -> bool:
    try:
        float(value)
    except (TypeError, ValueError):
        return False
    return isinstance(value, str)
