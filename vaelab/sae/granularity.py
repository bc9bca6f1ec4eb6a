"""How fine the patterns are that features respond to (Kim et al., "Revelio", section 4.3, Table 1 and Table 14).

A vision-language model sees the ten pictures in which a feature is strongest, and chooses one of four descriptions of
what they share. The authors note that the answers are noisy. So every question is asked twice, with the descriptions in
both orders, and the agreement of the two answers is reported as Cohen's kappa: 1 is full agreement, 0 is what chance
gives.

Where the scenes are known, :func:`granularity_of_scenes` answers by their factors, without a model. Sets of random
pictures stand beside the features.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from sklearn.metrics import cohen_kappa_score

from vaelab.core.validate import at_least
from vaelab.models.vision_language import Answer, Question, VisionLanguageModel, ask_all
from vaelab.sae.annotation import SYSTEM, Pool, picture_row, values_of
from vaelab.sae.feature_scores import ItemPictures
from vaelab.world.scenes import Scene

OPTIONS = {
    "fine-grained": "details of one class of things, such as animals of the same breed",
    "moderately granular": "things that look alike, wherever they are in the picture",
    "very coarse": "only the arrangement, such as things at the same place in front of a background",
    "no pattern": "nothing, or only noise",
}
"""The four answers of Table 1, and how they are described to a model."""
ROW = 5
"""Pictures in a row."""
SHARED = 0.7
"""The share of a feature's pictures that must show a value that counts as shared."""
LIFT = 2.0
"""How much more frequent than among all pictures such a value must be."""
RANDOM = "random pictures"


def top_pictures(pool: Pool, count: int, top: int = 10) -> dict[int, list[int]]:
    """Find the most active features of a pool, and the items in which each is strongest.

    Features are ranked by their largest mean activation; only those that are active in ``top`` items count.

    Args:
        pool: all features of a block.
        count: the largest number of features.
        top: the number of items of a feature.

    Returns:
        The items of each feature, the most active feature first.

    Raises:
        ValueError: no feature is active in so many items.
    """
    at_least("granularity_features", count, 1)
    at_least("granularity_pictures", top, 1)
    enough = (pool.means > 0).sum(0) >= top
    ranked = np.argsort(-np.where(enough, pool.means.max(0), -1), kind="stable")[: min(count, enough.sum())]
    if not len(ranked):
        raise ValueError(f"pool: no feature of {pool.block} is active in {top} of {len(pool.items)} pictures")
    items = np.array(pool.items)
    return {
        pool.features[place]: items[np.argsort(-pool.means[:, place], kind="stable")[:top]].tolist() for place in ranked
    }


def random_pictures(items: Sequence[int], count: int, top: int = 10, seed: int = 0) -> dict[int, list[int]]:
    """Draw ``count`` sets of ``top`` items at random, numbered from 0."""
    rng = np.random.default_rng(seed)
    return {number: rng.permutation(items)[:top].tolist() for number in range(count)}


def granularity_questions(pictures: ItemPictures, sets: Iterable[Sequence[int]]) -> Iterator[Question]:
    """Make the two questions about each set of items: with the options in the order of :data:`OPTIONS`, and
    reversed."""
    for items in sets:
        shown = pictures.pictures(items)
        rows = tuple(picture_row(part) for part in shown.split(ROW))
        for options in (list(OPTIONS.values()), list(OPTIONS.values())[::-1]):
            listed = "\n".join(f"{number}. {option}" for number, option in enumerate(options, 1))
            text = (
                f"These {len(items)} pictures activate the same feature of an image model. What do they share?\n"
                f"{listed}\nAnswer with the number of the best description, and nothing else."
            )
            yield Question(SYSTEM, (*rows, text))


def parse_number(text: str) -> int:
    """Read a model's answer, a number from 1 to 4.

    Raises:
        ValueError: it is anything else; the message is a sentence for the model.
    """
    number = text.strip().rstrip(".")
    if number not in map(str, range(1, len(OPTIONS) + 1)):
        raise ValueError(f"One number from 1 to {len(OPTIONS)} was expected, and nothing else.")
    return int(number)


def read_answers(answers: Sequence[Answer]) -> pd.DataFrame:
    """Name the answers to :func:`granularity_questions`.

    Returns:
        One row per set: ``forward`` and ``reversed``, the names of the chosen options; empty without a valid answer.
    """
    names = list(OPTIONS)
    chosen = [(names[one.value - 1] if one.value else "") for one in answers[::2]]
    turned = [(names[-one.value] if one.value else "") for one in answers[1::2]]
    return pd.DataFrame({"forward": chosen, "reversed": turned})


def classify(
    sets: Mapping[str, Mapping[int, Sequence[int]]], pictures: ItemPictures, scenes: Mapping[int, Scene],
    model: VisionLanguageModel | None, answers: str | Path, *, concurrency: int = 4, tries: int = 3,
) -> pd.DataFrame:  # fmt: skip
    """Classify sets of pictures by what they share.

    Args:
        sets: the items of each feature, by block.
        pictures: their pictures.
        scenes: the scene of each item of the pool; used without a model.
        model: the model; None answers by the scenes.
        answers: the folder of the model's answers.
        concurrency: how many questions are asked at a time.
        tries: how often the model may answer a question.

    Returns:
        One row per set: ``block``, ``feature``, ``forward``, and with a model ``reversed``; see :func:`read_answers`.
    """
    keys = [{"block": block, "feature": feature} for block, own in sets.items() for feature in own]
    every = [items for own in sets.values() for items in own.values()]
    if model is None:
        known = list(scenes.values())
        found = [granularity_of_scenes([scenes[item] for item in items], known) for items in every]
        return pd.DataFrame(keys).assign(forward=found)
    asked = granularity_questions(pictures, every)
    found = ask_all(model, asked, parse_number, answers, concurrency=concurrency, tries=tries, total=2 * len(every))
    return pd.DataFrame(keys).join(read_answers(found))


def granularity_of_scenes(scenes: Sequence[Scene], all_scenes: Sequence[Scene]) -> str:
    """Answer by the factors of scenes of the world.

    A value is shared if at least 70 % of the scenes show it, and twice as large a share as of all scenes. The answer is
    fine-grained if a thing with the same shape and colour, or a ground with the same texture and colour, is shared;
    otherwise moderately granular if a shape, a colour, a texture or a ground is; otherwise very coarse if a position or
    a size is.

    Args:
        scenes: the scenes of a feature's pictures.
        all_scenes: those of the whole pool.
    """
    for name, tell in (("fine-grained", _classes), ("moderately granular", _looks), ("very coarse", _places)):
        own, everywhere = (pd.Series([one for scene in part for one in tell(scene)], dtype=object).value_counts()
                           / len(part) for part in (scenes, all_scenes))  # fmt: skip
        if any(share >= SHARED and share >= LIFT * everywhere[value] for value, share in own.items()):
            return name
    return list(OPTIONS)[-1]


def _classes(scene: Scene) -> set[Any]:
    return {(thing.shape, thing.colour) for thing in scene.things} | {(scene.texture, scene.ground)}


def _looks(scene: Scene) -> set[Any]:
    return {pair for pair in values_of(scene) if pair[0] not in ("position", "size")}


def _places(scene: Scene) -> set[Any]:
    return values_of(scene) - _looks(scene)


def summarise_granularity(answers: pd.DataFrame) -> pd.DataFrame:
    """Make Table 1.

    Args:
        answers: ``block``, ``forward`` and, unless there is one answer per feature, ``reversed``; one row per feature.

    Returns:
        One row per block: the share of each option over all valid answers, ``features``, ``unanswered`` (the share of
        questions without a valid answer), and ``kappa``, Cohen's kappa of the two orders; NaN if there is one answer
        per feature, if all answers are the same, or if no feature has both.
    """
    rows = []
    for block, own in answers.groupby("block", sort=False):
        orders = own[[name for name in ("forward", "reversed") if name in own]]
        given = orders.melt()["value"]
        valid = given[given != ""]
        both = orders[(orders != "").all(axis=1)]
        varied = both.melt()["value"].nunique() > 1 and "reversed" in both
        rows.append({
            "block": block, **{name: (valid == name).mean() if len(valid) else np.nan for name in OPTIONS},
            "features": len(own), "unanswered": 1 - len(valid) / len(given),
            "kappa": cohen_kappa_score(both["forward"], both["reversed"]) if varied else np.nan,
        })  # fmt: skip
    return pd.DataFrame(rows)


def granularity_metrics(summary: pd.DataFrame) -> dict[str, float]:
    """Collect the metrics ``<block>.granularity.<option>`` and ``<block>.granularity.kappa``; undefined ones are left
    out."""
    return {
        f"{row['block']}.granularity.{name}".replace(" ", "_"): row[name]
        for row in summary.to_dict("records")
        for name in (*OPTIONS, "kappa")
        if np.isfinite(row[name])
    }
