"""The feature browser: a widget that finds, shows, turns and keeps the features of one autoencoder.

The front end is plain JavaScript and CSS in the folder ``static``, shown by anywidget in JupyterLab, VS Code and Colab.
The table, the map and the thumbnails travel once, as bytes. Sorting, filtering and drawing happen in the browser.
Python answers requests for cards, pictures and searches, one message each.
"""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import anywidget
import numpy as np
import pandas as pd
import traitlets

if TYPE_CHECKING:
    from vaelab.browser.feature_data import FeatureData

STATIC = Path(__file__).with_name("static")
SCRIPTS = ("helpers.js", "table.js", "map.js", "card.js", "turn.js", "shelf.js", "main.js")
"""The files that are joined into one module, in this order."""
MASK_SIDE = 64
"""Side of the masks that the front end paints."""


class FeatureBrowser(anywidget.AnyWidget):
    """A widget over a :class:`~vaelab.browser.feature_data.FeatureData`.

    For example::

        browser = FeatureBrowser(data)
        browser              # the last line of a cell shows it
        browser.feature = 7  # opens a card
        browser.selected     # the features of the last lasso or search
    """

    _esm = "\n".join((STATIC / name).read_text() for name in SCRIPTS)
    _css = STATIC / "feature_browser.css"
    feature = traitlets.Int(-1).tag(sync=True)
    """The feature whose card is open; -1 for none."""
    selected = traitlets.List(traitlets.Int()).tag(sync=True)
    """The features of the last lasso or search."""

    def __init__(self, data: "FeatureData", *, prompt: str = "", seed: int = 0, feature: int = -1):
        """Show the features of ``data``.

        Args:
            data: the features, and what is known of them.
            prompt: the prompt that is turned first.
            seed: its seed.
            feature: the feature whose card is opened first; -1 for none.
        """
        super().__init__()
        self._data, self._start = data, {"prompt": prompt, "seed": seed}
        self._answers: dict[str, Callable[[Mapping[str, Any], Sequence[Any]], dict[str, Any]]] = {
            "open": self._open, "card": self._card, "turn": self._turn, "active": self._active,
            "meaning": self._meaning, "shelf": self._shelf, "export": self._export,
        }  # fmt: skip
        self.on_msg(self._answer)
        self.feature = feature

    def __repr__(self) -> str:
        return f"FeatureBrowser: {len(self._data.table)} features of {self._data.block}"

    @traitlets.validate("feature")
    def _validate_feature(self, proposal: Mapping[str, Any]) -> int:
        count = len(self._data.table)
        if not -1 <= proposal["value"] < count:
            raise traitlets.TraitError(f"feature: expected 0 to {count - 1}, or -1 for none, got {proposal['value']}")
        return proposal["value"]

    def _answer(self, _: Any, request: Mapping[str, Any], buffers: Sequence[Any]) -> None:
        """Answer one message of the front end; input that cannot be used is answered by its reason."""
        about = {name: request[name] for name in ("ask", "view", "request")}
        answer: dict[str, Any] = {"error": "The kernel raised an error: its log has the traceback."}
        try:
            answer = self._answers[request["ask"]](request, buffers)
        except ValueError as error:
            answer = {"error": str(error)}
        finally:  # the front end is answered whatever happens
            own: list[bytes] = []
            self.send({**packed(answer, own), **about}, own)

    def _open(self, request: Mapping[str, Any], buffers: Sequence[Any]) -> dict[str, Any]:
        data = self._data
        return {
            **self._start, "block": data.block, "count": len(data.table), "passes": data.passes,
            "columns": [packed_column(name, data.table[name]) for name in data.table],
            "positions": np.ascontiguousarray(data.positions, np.float32).tobytes(),
            "sprites": list(data.sprites), "sprite_grid": list(data.sprite_grid),
            "shelf": [{"feature": feature, "note": note} for feature, note in data.load_shelf().items()],
        }  # fmt: skip

    def _card(self, request: Mapping[str, Any], buffers: Sequence[Any]) -> dict[str, Any]:
        return {"card": self._data.card(request["feature"])}

    def _turn(self, request: Mapping[str, Any], buffers: Sequence[Any]) -> dict[str, Any]:
        prompt, seed, generate = request["prompt"], whole(request["seed"]), self._data.generate
        steering = {name: request[name] for name in ("feature", "strength", "way")}
        steering["mask"] = painted(buffers[0]) if buffers else None
        steps = None if request["steps"] is None else tuple(request["steps"])
        found = {"after": generate(prompt, seed, [steering], steps)["picture"]}
        if request["before"]:
            found["before"] = generate(prompt, seed)["picture"]
        if request["control"]:
            found["control"] = generate(prompt, seed, [{**steering, "control": True}], steps)["picture"]
        return found

    def _active(self, request: Mapping[str, Any], buffers: Sequence[Any]) -> dict[str, Any]:
        return {"features": self._data.active_at(request["prompt"], whole(request["seed"]), painted(buffers[0]))}

    def _meaning(self, request: Mapping[str, Any], buffers: Sequence[Any]) -> dict[str, Any]:
        return {"features": self._data.search_meaning(request["text"])}

    def _shelf(self, request: Mapping[str, Any], buffers: Sequence[Any]) -> dict[str, Any]:
        self._data.save_shelf({one["feature"]: one["note"] for one in request["shelf"]})
        return {}

    def _export(self, request: Mapping[str, Any], buffers: Sequence[Any]) -> dict[str, Any]:
        if not request["shelf"]:
            return {"page": self._data.feature_page(request["features"][0])}
        return {"page": self._data.shelf_page()}


def packed(value: Any, buffers: list[bytes]) -> Any:
    """Make a value ready for a message: bytes are moved to ``buffers``, each leaving ``{"buffer": n}``; numbers that
    are not finite become None."""
    if isinstance(value, bytes):
        buffers.append(value)
        return {"buffer": len(buffers) - 1}
    if isinstance(value, Mapping):
        return {str(name): packed(one, buffers) for name, one in value.items()}
    if isinstance(value, list | tuple):
        return [packed(one, buffers) for one in value]
    if isinstance(value, np.generic):
        return packed(value.item(), buffers)
    return None if isinstance(value, float) and not math.isfinite(value) else value


def packed_column(name: str, column: pd.Series) -> dict[str, Any]:
    """Pack a column: numbers as float32, texts as a JSON list."""
    if pd.api.types.is_numeric_dtype(column):
        return {"name": name, "numbers": column.to_numpy(np.float32).tobytes()}
    return {"name": name, "texts": json.dumps(column.fillna("").astype(str).tolist()).encode()}


def whole(seed: Any) -> int:
    """Return a seed, or raise ValueError if it is none."""
    if not isinstance(seed, int) or seed < 0:
        raise ValueError(f"seed: expected a whole number, at least 0, got {seed}")
    return seed


def painted(buffer: Any) -> np.ndarray:
    """Read a painted mask: (64, 64) float32 of 0 and 1."""
    return np.frombuffer(buffer, np.uint8).reshape(MASK_SIDE, MASK_SIDE).astype(np.float32)
