"""Cards of features as HTML pages that need neither a server nor a network.

A page holds its pictures and its style. Its one script sets the opacity of the heat maps; the page's content security
policy allows this script alone, and no request to any host. Captions, notes and prompts are escaped.
"""

import base64
import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from jinja2 import Environment, FileSystemLoader

from vaelab.browser.feature_figures import heat_pixels
from vaelab.viz.encoding import encode_pixels

if TYPE_CHECKING:
    from vaelab.browser.feature_data import FeatureData

SCRIPT = """
for (const slider of document.querySelectorAll("input[type=range]")) {
  slider.addEventListener("input", () => slider.closest("article").style.setProperty("--heat", slider.value));
}
"""
CHART = (240, 96)
"""Width and height of a chart."""
RELATED = 8
"""Number of related features that a page lists of each kind."""
SHARES = ("frequency", "density")
"""Columns that are shown as percentages."""


def feature_page(data: "FeatureData", feature: int) -> str:
    """Make the page of one feature.

    Raises:
        ValueError: the autoencoder has no such feature.
    """
    return _render(data, {feature: ""}, f"Feature {feature} of {data.block}")


def shelf_page(data: "FeatureData", notes: Mapping[int, str]) -> str:
    """Make one page of several features, in their order.

    Args:
        data: the features.
        notes: what was noted, by the feature's number.

    Raises:
        ValueError: the autoencoder has no such feature.
    """
    return _render(
        data, notes, f"{len(notes)} features of {data.block}" if len(notes) != 1 else f"A feature of {data.block}"
    )


def _render(data: "FeatureData", notes: Mapping[int, str], title: str) -> str:
    environment = Environment(
        autoescape=True, loader=FileSystemLoader(Path(__file__).parent), trim_blocks=True, lstrip_blocks=True
    )
    cards = [_prepare(data, feature, note) for feature, note in notes.items()]
    digest = base64.b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode()
    return environment.get_template("feature_pages.html").render(
        title=title, block=data.block, cards=cards, script=SCRIPT, digest=digest, chart=CHART
    )


def _tile(data: "FeatureData", feature: int) -> str:
    """Return a feature's thumbnail as a data URI; empty if it has none."""
    tile = data.thumbnail(feature)
    return "" if tile is None else _uri(encode_pixels(tile))


def _prepare(data: "FeatureData", feature: int, note: str) -> dict[str, Any]:
    """Add to a feature's card what the template shows of it."""
    card = data.card(feature)
    examples = [
        {
            **one,
            "src": _uri(one["picture"]),
            "heat": _uri(encode_pixels(heat_pixels(one))),
            "activation": shown(one["activation"]),
        }
        for one in card["examples"]
    ]
    top = [one for one in examples if one["group"] == "top"]
    related = {
        "Active together": [(f, f"{share:.0%}".replace("%", " %")) for f, share in card["co_active"][:RELATED]],
        "Nearest directions": [(f, f"{cosine:.2f}") for f, cosine in card["nearest"][:RELATED]],
    }
    controls = list(dict.fromkeys(name for row in card["scores"] for name in row if name not in ("score", "feature")))
    return {
        **card, "note": note, "tile": _tile(data, feature), "facts": _facts(card), "top": top,
        "deciles": [one for one in examples if one["group"] != "top"],
        "bars": _bars(card["histogram"]), "points": _points(card["timesteps"]),
        "related": {name: [(f, value, _tile(data, f)) for f, value in own] for name, own in related.items()},
        "controls": controls,
        "scores": [
            [row["score"], *(shown(row[name]) if name in row else "" for name in ("feature", *controls))]
            for row in card["scores"]
        ],
    }  # fmt: skip


def _facts(card: Mapping[str, Any]) -> list[tuple[str, str]]:
    """List a feature's numbers that are known, with their names."""
    names = {
        "frequency": "active in pictures", "density": "active at positions", "mu": "mean activation",
        "specificity": "specificity", "stability": "stability", "caption_score": "score of the caption",
    }  # fmt: skip
    facts = [
        (label, f"{shown(100 * card[name])} %" if name in SHARES else shown(card[name]))
        for name, label in names.items() if np.isfinite(card[name])
    ]  # fmt: skip
    if card["value"]:
        facts.append((f"F1 for {card['value']}", shown(card["f1"])))
        facts.append(("the best random direction", shown(card["control"])))
    if card["twin"]:
        twin = card["twin"]
        facts.append((f"twin in seed {twin['seed']}", f"{twin['feature']}, cosine {twin['cosine']:.2f}"))
    return facts


def _bars(histogram: Mapping[str, list[float]]) -> dict[str, Any] | None:
    """Lay out the bars of a histogram: x, y, width, height and text of each; heights are logarithmic."""
    edges, counts = histogram["edges"], histogram["counts"]
    if not counts:
        return None
    width, height = CHART
    heights = np.log1p(counts) / np.log1p(max(counts)) * height
    places = (np.array(edges) - edges[0]) / (edges[-1] - edges[0]) * width
    bars = [
        (round(a, 1), round(height - tall, 1), round(max(b - a - 1, 0.5), 1), round(tall, 1),
         f"{count} activations from {shown(low)} to {shown(high)}")
        for a, b, tall, count, low, high in zip(places, places[1:], heights, counts, edges, edges[1:], strict=False)
    ]  # fmt: skip
    return {"bars": bars, "first": shown(edges[0]), "last": shown(edges[-1])}


def _points(curve: Mapping[str, list[float]]) -> dict[str, Any] | None:
    """Lay out the curve over timesteps, from the most noise to the least."""
    times, means = curve["timestep"], curve["mean"]
    if len(times) < 2:
        return None
    width, height = CHART
    most = max(means) or 1.0
    across = (np.array(times) - times[0]) / (times[-1] - times[0]) * (width - 10) + 5
    down = height - 5 - np.array(means) / most * (height - 10)
    places = [
        (round(x, 1), round(y, 1), f"timestep {t:g}: {shown(m)}")
        for x, y, t, m in zip(across, down, times, means, strict=True)
    ]
    return {"points": places, "first": f"{times[0]:g}", "last": f"{times[-1]:g}", "most": shown(most)}


def _uri(data: bytes) -> str:
    kind = "webp" if data[:4] == b"RIFF" else "png"
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


def shown(value: float) -> str:
    """Format a number with three digits."""
    return f"{value:.3g}"
