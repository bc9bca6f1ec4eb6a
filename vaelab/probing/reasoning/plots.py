"""Figures of visual reasoning: accuracies of streams by category, and examples with every stream's answer."""

import textwrap
from collections.abc import Mapping, Sequence

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.figure import Figure
from torch import Tensor

from vaelab.probing.reasoning.conversations import Asked
from vaelab.viz.grids import displayable
from vaelab.viz.text import plain_text
from vaelab.world.questions import mark

OWN, BASE, RIGHT, WRONG = "#14506e", "#8a8a8a", "#1b7a3d", "#b3261e"


@plain_text
def accuracies(table: pd.DataFrame, baseline: str, title: str = "", value: str = "accuracy") -> Figure:
    """Draw each stream's accuracy in each category with its 95 % interval; a line goes through the baseline's.

    Args:
        table: columns ``stream``, ``category``, ``low``, ``high`` and ``value``.
        baseline: the stream that the others are compared with.
        title: the figure's title.
        value: the column to draw; shares are drawn in percent.
    """
    streams, categories = list(dict.fromkeys(table["stream"])), list(dict.fromkeys(table["category"]))
    figure, axes = plt.subplots(
        1, len(categories), figsize=(2.5 * len(categories) + 2.2, 0.42 * len(streams) + 1.6), sharey=True,
        squeeze=False, layout="constrained",
    )  # fmt: skip
    scale = 100 if value == "accuracy" else 1
    for axis, category in zip(axes[0], categories, strict=True):
        part = table[table["category"] == category].set_index("stream").loc[streams]
        middle = scale * part[value]
        ends = [(middle - scale * part["low"]).clip(lower=0), (scale * part["high"] - middle).clip(lower=0)]
        for place, stream in enumerate(streams):
            colour = BASE if stream == baseline else OWN
            end = [[side.iloc[place]] for side in ends]
            axis.errorbar(middle.iloc[place], place, xerr=end, fmt="o", color=colour, capsize=3, markersize=6)
        if baseline in streams:
            axis.axvline(middle[baseline], color=BASE, linewidth=1, linestyle="--", zorder=0)
        reach = max(10.0, 1.08 * scale * part["high"].max())
        axis.set_xlim(-0.03 * reach, reach)
        axis.set_title(category, fontsize=10)
        axis.set_ylim(len(streams) - 0.5, -0.5)
        axis.tick_params(labelsize=9)
        axis.grid(axis="y", visible=False)
    axes[0][0].set_yticks(range(len(streams)), streams)
    unit = "correct answers (%)" if value == "accuracy" else "relative score (%)"
    figure.supxlabel(f"{unit}, with 95 % interval; dashed: {baseline}", fontsize=9)
    figure.suptitle(title, fontsize=11)
    return figure


@plain_text
def examples(pictures: Tensor, asked: Sequence[Asked], answers: Mapping[str, Sequence[str]], title: str = "") -> Figure:
    """Show pictures with a question, the true answer and each stream's answer: green if it is right, red if it is
    wrong, grey for a description that is partly right.

    Args:
        pictures: (N, 3, H, W) in [-1, 1].
        asked: the N questions.
        answers: N answers by stream.
        title: the figure's title.
    """
    columns = min(3, len(asked))
    lines = -(-len(asked) // columns)
    figure, axes = plt.subplots(
        lines, 2 * columns, figsize=(5.0 * columns, (0.3 * len(answers) + 1.5) * lines), squeeze=False,
        layout="constrained", gridspec_kw={"width_ratios": [1, 1.9] * columns},
    )  # fmt: skip
    for axis in axes.flat:
        axis.axis("off")
    places = [(line, 2 * column) for line in range(lines) for column in range(columns)]
    for number, (one, picture) in enumerate(zip(asked, displayable(pictures), strict=True)):
        line, column = places[number]
        axes[line][column].imshow(picture, interpolation="nearest")
        axes[line][column].set_anchor("N")
        truth = one.instruction.answer if one.instruction else one.reference
        rows = [(one.question, "#222222", "bold"), (f"truth: {truth}", "#222222", "normal")]
        for stream, given in answers.items():
            score = mark(one.instruction, given[number]).score if one.instruction else 0.5
            colour = RIGHT if score == 1 else WRONG if score == 0 else "#6b6b6b"
            sign = "right" if score == 1 else "wrong" if score == 0 else f"{score:.0%}"
            rows.append((f"{stream}: {given[number] or '(nothing)'} ({sign})", colour, "normal"))
        height, text_axis = 0.98, axes[line][column + 1]
        for text, colour, weight in rows:
            wrapped = textwrap.wrap(text, 46)[:3]
            text_axis.text(
                0, height, "\n".join(wrapped), color=colour, fontsize=8, weight=weight, va="top",
                transform=text_axis.transAxes,
            )  # fmt: skip
            height -= (0.085 + 0.085 * len(wrapped)) * 1.6 / (0.3 * len(answers) + 1.5)
    figure.suptitle(title, fontsize=11)
    return figure
