"""Scores of captions: how well a feature's caption tells pictures in which it is active from others.

The pictures are those of the half of the pool that no annotator has seen. A judge says how well each caption fits each
picture. A caption's score is the AUROC of these numbers, with the pictures in which the feature is strongest as
positives and those in which it is inactive as negatives: 1 is perfect, 0.5 is chance. If it is active in nearly all
pictures, the weakest ones are the negatives.

Beside it stand three controls: the captions of other features, the words whose prompts activate the feature most
(:func:`vaelab.sae.feature_scores.caption_from_words`), and captions of an untrained autoencoder's features, each scored
on its own pictures.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.figure import Figure
from sklearn.metrics import roc_auc_score

from vaelab.core.stats import mean_interval
from vaelab.models.similarity import SentenceModel
from vaelab.sae.annotation import Caption, Pool
from vaelab.sae.feature_scores import FUNCTION_WORDS, ItemPictures, caption_from_words
from vaelab.sae.feature_statistics import FeatureStatistics, split_words
from vaelab.viz.text import plain_text
from vaelab.world.scenes import Scene

UNNAMED = frozenset(["thing", "background"])
"""Words of captions that hold for every picture of the world."""
SCORES = {"score": "caption", "other_score": "captions of other features", "words_score": "words of prompts"}
"""Columns of scores, with names for readers."""
UNTRAINED = "untrained autoencoder"
CONTROLS = {
    SCORES["other_score"]: "captions of other features reach",
    SCORES["words_score"]: "three words of prompts",
    UNTRAINED: "captions of an untrained autoencoder's features",
}
"""The controls, as parts of a sentence."""


class Judge(Protocol):
    """Says how well captions fit pictures."""

    name: str

    def fit(self, captions: Sequence[str], items: Sequence[int]) -> np.ndarray:
        """Compute how well C captions fit the pictures of N items: (N, C), larger is better."""


class SceneJudge:
    """Compares captions with the scene that a picture of the world shows: the share of a caption's words that describe
    the same thing, or the ground, whichever is largest."""

    name = "truth of the scene"

    def __init__(self, scenes: Mapping[int, Scene]):
        """Take the scene of each item, as the oracle reads it."""
        self._described = {item: _descriptions(scene) for item, scene in scenes.items()}

    def fit(self, captions: Sequence[str], items: Sequence[int]) -> np.ndarray:
        """Compute the shares (N, C)."""
        asked = [_content(caption) for caption in captions]
        return np.array([[_best_share(words, self._described[item]) for words in asked] for item in items])


class PictureJudge:
    """Compares captions with pictures, by the cosine of a model that embeds both, such as CLIP."""

    def __init__(self, pictures: ItemPictures):
        """Take the pictures; their model must embed sentences too."""
        self.name, self._pictures = pictures.model.name, pictures

    def fit(self, captions: Sequence[str], items: Sequence[int]) -> np.ndarray:
        """Compute the cosines (N, C)."""
        vectors = self._pictures.model.embed_sentences(list(captions)).cpu()
        return (self._pictures.vectors(items) @ vectors.T).numpy()


class PromptJudge:
    """Compares captions with the pictures' prompts, by the cosine of a model of sentences."""

    def __init__(self, pictures: ItemPictures, model: SentenceModel):
        """Take the pictures, of which only the prompts are used, and the model."""
        self.name, self._pictures, self._model = f"{model.name}, by prompts", pictures, model

    def fit(self, captions: Sequence[str], items: Sequence[int]) -> np.ndarray:
        """Compute the cosines (N, C)."""
        prompts, asked = (
            self._model.embed_sentences(list(texts)).cpu() for texts in (self._pictures.prompts(items), captions)
        )
        return (prompts @ asked.T).numpy()


class HeldOut(NamedTuple):
    """The items on whose pictures a feature's caption is scored; made by :func:`held_out_items`."""

    active: list[int]
    inactive: list[int]


def held_out_items(pool: Pool, feature: int, count: int, seed: int = 0) -> HeldOut:
    """Choose held-out pictures of a feature: the ``count`` strongest, and as many in which it is inactive, at random.

    If it is inactive in too few, the weakest ones are taken; at most half of the held-out pictures are in each part.
    """
    items, means = np.array(pool.items[1::2]), pool.column(feature)[1::2]
    order = np.argsort(-means, kind="stable")
    size = min(count, len(items) // 2, np.count_nonzero(means > 0))
    shuffled = np.random.default_rng(seed).permutation(len(items))
    weakest = shuffled[np.argsort(means[shuffled], kind="stable")]
    return HeldOut(items[order[:size]].tolist(), items[weakest[:size]].tolist())


def score_captions(
    pool: Pool, captions: Sequence[Caption], statistics: FeatureStatistics, judge: Judge, *, count: int = 20,
    seed: int = 0,
) -> pd.DataFrame:  # fmt: skip
    """Score the captions of a pool's features, beside two controls.

    Args:
        pool: the pool.
        captions: one per feature.
        statistics: the statistics of the block's features, whose words make the control.
        judge: says how well captions fit pictures.
        count: the number of active, and of inactive, held-out pictures of a feature.
        seed: determines the inactive pictures.

    Returns:
        One row per feature: ``block``, ``feature``, ``caption``, ``reasoning``; ``score``, the AUROC; ``other_score``,
        its mean over the captions of other features that differ from the own one; ``words`` and ``words_score``, the
        control from prompts; ``active`` and ``inactive``, the numbers of pictures; ``problem``, why there is no
        caption. Scores without a caption are NaN.
    """
    texts = [caption.text for caption in captions]
    different = sorted({*texts} - {""})
    rows = []
    for feature, caption in zip(pool.features, captions, strict=True):
        chosen = held_out_items(pool, feature, count, seed)
        words = caption_from_words(statistics, feature)
        asked = [*different, words]
        fits = judge.fit(asked, [*chosen.active, *chosen.inactive])
        labels = [True] * len(chosen.active) + [False] * len(chosen.inactive)
        by_text = {text: float(roc_auc_score(labels, column)) for text, column in zip(asked, fits.T, strict=True)}
        others = [by_text[text] for text in texts if text not in ("", caption.text)]
        rows.append({
            "block": pool.block, "feature": feature, "caption": caption.text, "reasoning": caption.reasoning,
            "score": by_text[caption.text] if caption.text else np.nan,
            "other_score": np.mean(others) if others and caption.text else np.nan,
            "words": words, "words_score": by_text[words] if words else np.nan,
            "active": len(chosen.active), "inactive": len(chosen.inactive), "problem": caption.problem,
        })  # fmt: skip
    return pd.DataFrame(rows)


def summarise_captions(captions: pd.DataFrame, untrained: pd.DataFrame) -> pd.DataFrame:
    """Average scores over the features of each block.

    Args:
        captions: rows of :func:`score_captions`.
        untrained: such rows of an untrained autoencoder; may be empty.

    Returns:
        One row per block and kind of caption: ``block``, ``who``, ``mean`` with its 95 % interval ``low`` and ``high``
        over features (cut at 0 and 1; NaN for a single one), ``features`` (scored ones) and ``captioned``, their share.
    """
    rows = []
    for block, own in captions.groupby("block", sort=False):
        parts = [(name, own[column]) for column, name in SCORES.items()]
        if len(untrained):
            parts.append((UNTRAINED, untrained[untrained["block"] == block]["score"]))
        for name, scores in parts:
            scored = scores.dropna()
            interval = mean_interval(scored) if len(scored) else (np.nan,) * 3
            low_mean_high = dict(zip(("mean", "low", "high"), np.clip(interval, 0, 1).tolist(), strict=True))
            rows.append({"block": block, "who": name, **low_mean_high, "features": len(scored),
                         "captioned": len(scored) / max(len(scores), 1)})  # fmt: skip
    return pd.DataFrame(rows)


def caption_metrics(summary: pd.DataFrame) -> dict[str, float]:
    """Collect the metrics ``<block>.<kind of caption>`` from a table of :func:`summarise_captions`, and
    ``<block>.captioned``, the share of features that have one."""
    found = {f"{row['block']}.{row['who'].replace(' ', '_')}": row["mean"] for row in summary.to_dict("records")}
    own = summary[summary["who"] == SCORES["score"]]
    found |= {f"{row['block']}.captioned": row["captioned"] for row in own.to_dict("records")}
    return {name: value for name, value in found.items() if np.isfinite(value)}


def finding(summary: pd.DataFrame) -> str:
    """State in one sentence how well captions, and their controls, tell active from inactive pictures.

    Args:
        summary: a table of :func:`summarise_captions` of one block, or of all blocks as one.
    """
    rows = {row["who"]: row for row in summary.to_dict("records") if np.isfinite(row["mean"])}
    own = rows.pop(SCORES["score"])
    ends = f" ({own['low']:.2f} to {own['high']:.2f})" if np.isfinite(own["low"]) else ""
    others = "".join(f"; {CONTROLS[name]} {row['mean']:.2f}" for name, row in rows.items())
    return (
        f"A caption tells pictures in which its feature is active from others with an AUROC of {own['mean']:.2f}{ends} "
        f"over {own['features']} features{others}."
    )


@plain_text
def draw_scores(captions: pd.DataFrame, untrained: pd.DataFrame, title: str = "") -> Figure:
    """Draw the score of every feature's caption and of the controls: a panel per block, a row per kind of caption, a
    point per feature and a bar at their mean.

    Args:
        captions: rows of :func:`score_captions`.
        untrained: such rows of an untrained autoencoder; may be empty.
        title: the figure's title.
    """
    blocks = list(dict.fromkeys(captions["block"]))
    kinds = {name: captions.set_index("block")[column] for column, name in SCORES.items()}
    if len(untrained):
        kinds[UNTRAINED] = untrained.set_index("block")["score"]
    figure, axes = plt.subplots(
        1, len(blocks), figsize=(3.0 * len(blocks) + 2.2, 0.5 * len(kinds) + 1.5), sharey=True, squeeze=False,
        layout="constrained",
    )  # fmt: skip
    colours = sns.color_palette("colorblind", len(kinds))
    rng = np.random.default_rng(0)
    for axis, block in zip(axes[0], blocks, strict=True):
        axis.axvline(0.5, color="0.75", linewidth=1, linestyle="--", zorder=0)
        for place, (scores, colour) in enumerate(zip(kinds.values(), colours, strict=True)):
            own = scores[scores.index == block].dropna()
            shift = rng.uniform(-0.16, 0.16, len(own))
            axis.scatter(own, place + shift, s=16, color=colour, alpha=0.55, linewidths=0)
            if len(own):
                axis.plot([own.mean()] * 2, [place - 0.3, place + 0.3], color=colour, linewidth=3)
        axis.grid(visible=False, axis="y")
        axis.set_title(block, fontsize=10)
        axis.set_xlim(-0.02, 1.02)
        axis.set_xlabel("AUROC on held-out pictures")
        sns.despine(ax=axis, left=True)
        axis.tick_params(axis="y", length=0)
    axes[0][0].set_yticks(range(len(kinds)), kinds)
    axes[0][0].invert_yaxis()
    figure.suptitle(title, fontsize=11, x=0.02, ha="left")
    return figure


def choose_judge(pictures: ItemPictures, model: Any, scenes: Mapping[int, Scene]) -> Judge:
    """Choose the judge of captions: the truth where scenes are known, the pictures with a model that embeds them, and
    otherwise the prompts.

    Args:
        pictures: the pictures; their model is ``model`` if it embeds pictures.
        model: a model of sentences, or CLIP; not used where scenes are known.
        scenes: the scene of each item; empty outside of the world.
    """
    if scenes:
        return SceneJudge(scenes)
    return PictureJudge(pictures) if hasattr(model, "embed_pictures") else PromptJudge(pictures, model)


def _content(caption: str) -> set[str]:
    return _stems(split_words(caption) - FUNCTION_WORDS - UNNAMED)


def _descriptions(scene: Scene) -> list[set[str]]:
    """Return the words of each thing, and of the ground, of a scene."""
    whole = scene.spelled_out()
    return [_stems(split_words(thing.phrase)) for thing in whole.things] + [_stems({whole.texture, whole.ground})]


def _stems(words: set[str]) -> set[str]:
    """Remove the plural's s."""
    return {word.removesuffix("s") for word in words}


def _best_share(words: set[str], described: Sequence[set[str]]) -> float:
    return max(len(words & own) / max(len(words), 1) for own in described)
