"""Captions of features: what a feature's pictures have in common, in a short phrase (Surkov et al., "Unpacking SDXL
Turbo", section 5.1 and appendix G).

A vision-language model sees 5 pictures in which the feature is inactive, 9 in which its activation rises from 10 % to
90 % of the largest, and the 5 in which it is strongest; the last 14 with coldmaps, copies that are white where the
feature is not active and pale where it is weak. It gives its reasoning and a phrase of at most 15 words.

On the scene world no such model is needed: a feature is named by the factor value that it finds best
(:func:`name_by_factors`).

The pool is a list of items of a store, each of another picture. Only its first, third, fifth, ... items are shown, and
factor values chosen on them; captions are scored on the others (:mod:`vaelab.sae.caption_scores`).
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import Tensor

from vaelab import viz
from vaelab.core.validate import at_least
from vaelab.models.vision_language import Question, VisionLanguageModel, ask_all, load_model
from vaelab.sae.detection import best_f1, f1_of_marking_all, factor_values
from vaelab.sae.feature_scores import ItemPictures, at_pixels
from vaelab.sae.feature_statistics import feature_maps, mean_activations
from vaelab.sae.model import SAE
from vaelab.store.reader import Store
from vaelab.viz.encoding import encode_pixels, pixels_of
from vaelab.world import oracle
from vaelab.world.scenes import PHRASES, SCENE_FACTORS, THING_FACTORS, Scene, with_article

FACTORS = "factors"
"""The annotator that names features by factor values."""
UNRELATED, PROGRESSION, STRONGEST = 5, 9, 5
"""The numbers of pictures that a model is shown."""
LONGEST_CAPTION = 15
"""Words of a caption, at most."""
SIDE, GAP = 224, 4
"""Side of a picture in a row, and the gap after it, in pixels: nine of them have 2,048 pixels, to which endpoints
reduce wider pictures."""
GREY = 0.4
"""The colour of gaps and frames."""
SYSTEM = "You study the inside of an image generation model, and name the features of its hidden layers."
INTRODUCTION = f"""\
You will see rows of pictures that an image generation model made. A feature of a sparse autoencoder, which was trained
on the model's hidden activations, responds to something in some of them: an object, a pattern, a style, a concept, or
a place in the picture. First come reference pictures, in which the feature is not active. Then come pictures in which
it is active, from weakly to strongly, and last those in which it is strongest. Each of the active pictures is repeated
with a mask: regions in which the feature is not active are white, and regions in which it is weak are pale.

Compare the pictures, and find out what the feature responds to. Answer in this form:

<thinking>Your reasoning, in at most 400 words: which objects, patterns or concepts are in the active pictures, and not
in the reference pictures?</thinking>
<answer>A phrase of at most {LONGEST_CAPTION} words that names what most of the active pictures share.</answer>

Not every active picture has to fit. The pictures with strong activations tell most, and the masks show where to look.
"""

ROWS = {
    "unrelated": "Reference pictures, in which the feature is not active:",
    "rising": "Pictures in which its activation rises, from about 10 % of the largest (left) to about 90 % (right):",
    "rising, masked": "The same pictures, masked:",
    "strongest": "The pictures in which it is strongest:",
    "strongest, masked": "The same pictures, masked:",
}
"""The rows of pictures, and what a model is told about each."""


class Caption(NamedTuple):
    """A feature in words."""

    text: str
    """The caption; empty if there is none."""
    reasoning: str
    """Why."""
    problem: str = ""
    """Why there is no caption."""


class Pool(NamedTuple):
    """The mean activations of some features of a block in the items of a pool (equation 9); made by
    :func:`measure_pool`."""

    block: str
    sae: SAE
    features: list[int]
    """F features."""
    items: list[int]
    """N items of a store, each of another picture."""
    means: np.ndarray
    """(N, F)."""

    def column(self, feature: int) -> np.ndarray:
        """Return the mean activations (N,) of a feature."""
        return self.means[:, self.features.index(feature)]

    def select(self, features: Sequence[int]) -> "Pool":
        """Keep some of the features."""
        places = [self.features.index(feature) for feature in features]
        return self._replace(features=list(features), means=self.means[:, places])

    def active(self) -> np.ndarray:
        """Count the pictures in which each feature is active: (F,), the smaller number of the two halves."""
        shown, held_out = ((self.means[part::2] > 0).sum(0) for part in (0, 1))
        return np.minimum(shown, held_out)


class ShownPictures(NamedTuple):
    """The items whose pictures a model is shown of one feature; made by :func:`choose_pictures`."""

    unrelated: list[int]
    progression: list[int]
    """In rising order of activation."""
    strongest: list[int]


def measure_pool(sae: SAE, activations: Store, block: str, items: Sequence[int]) -> Pool:
    """Measure the mean activations of all features of an autoencoder in the items of a pool.

    Raises:
        ValueError: there are fewer than four items, or the store has no such block.
    """
    at_least("pool", len(items), 4)
    features = list(range(sae.config.n_features))
    return Pool(block, sae, features, list(items), mean_activations(sae, activations, block, items, features).numpy())


def choose_features(pool: Pool, count: int, least: int, given: Sequence[int] = (), seed: int = 0) -> Pool:
    """Choose features that are active in at least ``least`` pictures of each half of the pool.

    Args:
        pool: all features.
        count: the number of features, chosen at random; 0 takes all.
        least: the number of pictures.
        given: features to take instead.
        seed: determines which are chosen.

    Raises:
        ValueError: a given feature, or every feature, is active in fewer pictures.
    """
    active = dict(zip(pool.features, pool.active().tolist(), strict=True))
    for feature in given:
        if active[feature] < least:
            raise ValueError(
                f"features: {feature} of {pool.block} is active in {active[feature]} pictures of a half of the pool, "
                f"and a caption needs {least}"
            )
    usable = [feature for feature, pictures in active.items() if pictures >= least]
    if not usable:
        raise ValueError(
            f"pool: no feature of {pool.block} is active in {least} of the {len(pool.items) // 2} pictures of a half"
        )
    drawn = np.random.default_rng(seed).permutation(usable)[: count or None]
    return pool.select(list(given) or sorted(drawn.tolist()))


def choose_pictures(pool: Pool, feature: int, seed: int = 0) -> ShownPictures:
    """Choose the pictures that a model is shown, from the half of the pool that is not held out.

    The i-th picture of the progression is the one whose mean activation is nearest to 10 i % of the largest. A feature
    that is active in few pictures has a shorter progression. For a feature that is active in nearly all pictures, those
    with the smallest activations count as unrelated.

    Args:
        pool: the pool.
        feature: one of its features.
        seed: determines the unrelated pictures.
    """
    items, means = np.array(pool.items[::2]), pool.column(feature)[::2]
    active = np.argsort(-means, kind="stable")[: np.count_nonzero(means > 0)]
    strongest, rest = active[:STRONGEST], active[STRONGEST:]
    shuffled = np.random.default_rng(seed).permutation(len(items))
    weakest = shuffled[np.argsort(means[shuffled], kind="stable")]
    unrelated = weakest[~np.isin(weakest, strongest)][:UNRELATED]
    rest = rest[~np.isin(rest, unrelated)]
    progression: list[int] = []
    for share in range(PROGRESSION, 0, -1):
        if len(rest):
            nearest = np.abs(means[rest] - share / 10 * means[active[0]]).argmin()
            progression.append(rest[nearest])
            rest = np.delete(rest, nearest)
    progression.sort(key=lambda place: means[place])
    return ShownPictures(*(items[np.array(places, int)].tolist() for places in (unrelated, progression, strongest)))


def coldmaps(pictures: Tensor, maps: Tensor) -> Tensor:
    """Conceal pictures where a feature is not active, and fade them where it is weak.

    Args:
        pictures: (N, 3, H, W) in [-1, 1].
        maps: the feature's activations (N, h, w); 0 is white, and each picture's largest activation leaves it as it is.

    Returns:
        (N, 3, H, W) in [-1, 1].
    """
    maps = maps.clamp_min(0)
    shares = maps / maps.amax((1, 2), keepdim=True).clamp_min(1e-12)
    weight = at_pixels(shares.float(), pictures)[:, None]
    return weight * pictures + (1 - weight)


def shown_rows(pool: Pool, pictures: ItemPictures, feature: int, seed: int = 0) -> dict[str, Tensor]:
    """Collect the rows of pictures (N, 3, H, W) in [-1, 1] that a model is shown of a feature, by their names in
    :data:`ROWS`; a feature that is active in few pictures, or in all, may lack a row."""
    chosen = choose_pictures(pool, feature, seed)
    rows = {"unrelated": pictures.pictures(chosen.unrelated)} if chosen.unrelated else {}
    for name, items in (("rising", chosen.progression), ("strongest", chosen.strongest)):
        if items:
            maps = feature_maps(pool.sae, pictures.store, pool.block, items, [feature])[:, 0]
            rows[name] = pictures.pictures(items)
            rows[f"{name}, masked"] = coldmaps(rows[name], maps)
    return rows


def caption_questions(pool: Pool, pictures: ItemPictures, seed: int = 0) -> Iterator[Question]:
    """Make the question about each feature of a pool, in their order."""
    for feature in pool.features:
        parts: list[str | bytes] = [INTRODUCTION]
        for name, shown in shown_rows(pool, pictures, feature, seed).items():
            parts += [ROWS[name], picture_row(shown)]
        yield Question(SYSTEM, tuple(parts))


def parse_caption(text: str) -> Caption:
    """Read a model's answer.

    Raises:
        ValueError: reasoning or phrase is missing or given twice, or the phrase has more than 15 words; the message is
            a sentence for the model.
    """
    found = {}
    for tag in ("thinking", "answer"):
        parts = [" ".join(part.split()) for part in re.findall(f"<{tag}>(.*?)</{tag}>", text, re.DOTALL)]
        if len(parts) != 1 or not parts[0]:
            raise ValueError(
                f"Between <{tag}> and </{tag}> one text was expected, but there are {len([*filter(None, parts)])}."
            )
        found[tag] = parts[0]
    words = len(found["answer"].split())
    if words > LONGEST_CAPTION:
        raise ValueError(f"The phrase between <answer> and </answer> has {words} words; at most {LONGEST_CAPTION} are "
                         "allowed.")  # fmt: skip
    return Caption(found["answer"], found["thinking"])


def load_annotator(name: str, **options: Any) -> VisionLanguageModel | None:
    """Load the model that captions features; None for :data:`FACTORS`, which needs none.

    Args:
        name: ``factors``, or a model of :func:`vaelab.models.vision_language.load_model`.
        options: its further arguments.
    """
    return None if name == FACTORS else load_model(name, parameter="annotator", **options)


def require_annotator(name: str, activations: Store) -> bool:
    """Say whether a store's prompts are of the scene world.

    Raises:
        ValueError: they are not, and the annotator is :data:`FACTORS`.
    """
    dataset = activations.settings.get("dataset")
    if name == FACTORS and dataset != "world":
        raise ValueError(
            f"annotator: {FACTORS!r} names features of the world's pictures, but these are of {dataset!r}; give a "
            "vision-language model"
        )
    return dataset == "world"


def read_scenes(pictures: ItemPictures, items: Sequence[int]) -> dict[int, Scene]:
    """Read the scenes of the world that the pictures of items show."""
    return dict(zip(items, oracle.read_scenes(pictures.pictures(items)), strict=True))


def caption_pools(
    pools: Mapping[Any, Pool], pictures: ItemPictures, scenes: Mapping[int, Scene], model: VisionLanguageModel | None,
    answers: str | Path, *, concurrency: int = 4, tries: int = 3, seed: int = 0, progress: bool = True,
) -> dict[Any, list[Caption]]:  # fmt: skip
    """Caption the features of several pools.

    Args:
        pools: the pools.
        pictures: their pictures.
        scenes: the scene of each item; used without a model.
        model: the model; None names features by factor values.
        answers: the folder of the model's answers, see :func:`vaelab.models.vision_language.ask_all`.
        concurrency: how many questions are asked at a time.
        tries: how often the model may answer a question.
        seed: determines the unrelated pictures.
        progress: whether to show a progress bar.

    Returns:
        One caption per feature of each pool.

    Raises:
        ValueError: the model cannot be asked, or gives no valid caption at all.
    """
    if model is None:
        return {key: name_by_factors(pool, [scenes[item] for item in pool.items]) for key, pool in pools.items()}
    questions = (question for pool in pools.values() for question in caption_questions(pool, pictures, seed))
    count = sum(len(pool.features) for pool in pools.values())
    found = ask_all(
        model, questions, parse_caption, answers, concurrency=concurrency, tries=tries, total=count, progress=progress
    )
    captions = [answer.value or Caption("", "", answer.problem) for answer in found]
    if not any(caption.text for caption in captions):
        raise ValueError(f"annotator: {model.name} captions none of {count} features; {captions[0].problem}")
    given = iter(captions)
    return {key: [next(given) for _ in pool.features] for key, pool in pools.items()}


def name_by_factors(pool: Pool, scenes: Sequence[Scene]) -> list[Caption]:
    """Name each feature by the factor value of the scene world that it finds best.

    A feature's F1 for a value is that of its mean activation, at the best threshold, in finding the pictures that show
    the value. The caption names the value with the largest gain in F1 over marking every picture. Only the half of the
    pool that is not held out is used.

    Args:
        pool: the pool.
        scenes: the scene of each picture of the pool, as the oracle reads it.

    Returns:
        One caption per feature.
    """
    shown = shown_values(scenes[::2])
    count = shown.sum(0)
    usable = np.flatnonzero((count > 0) & (count < len(shown)))
    found, _ = best_f1(pool.means[::2], shown[:, usable], signed=False)
    everything = f1_of_marking_all(count[usable], len(shown))
    captions = []
    for f1 in found.T:
        gain = f1 - everything
        best, second = np.argsort(-gain)[:2]
        if gain[best] <= 0:
            captions.append(Caption("", "", "it finds no factor value better than marking every picture does"))
            continue
        factor, value = factor_values()[usable[best]]
        other = " ".join(reversed(factor_values()[usable[second]]))
        captions.append(Caption(
            describe_value(factor, value),
            f"It finds pictures with {value} {factor} with F1 {f1[best]:.2f}; marking every picture has "
            f"{everything[best]:.2f}. The second best is {other} with {f1[second]:.2f} and {everything[second]:.2f} "
            f"({len(shown)} pictures).",
        ))  # fmt: skip
    return captions


def shown_values(scenes: Sequence[Scene]) -> np.ndarray:
    """Say which factor values scenes show: (S, V) bool, in the order of
    :func:`vaelab.sae.detection.factor_values`."""
    return np.array([[pair in values for pair in factor_values()] for values in map(values_of, scenes)])


def values_of(scene: Scene) -> set[tuple[str, str]]:
    """Return the pairs of factor and value that a scene shows."""
    things = {(factor, getattr(thing, factor)) for thing in scene.things for factor in THING_FACTORS}
    return things | {(factor, getattr(scene, factor)) for factor in SCENE_FACTORS}


def describe_value(factor: str, value: str) -> str:
    """Describe a factor value as a phrase, such as ``a red thing``."""
    phrases = {
        "shape": f"a {value}", "position": f"a thing {PHRASES.get(value, '')}", "texture": f"a {value} background",
        "ground": f"a {value} background",
    }  # fmt: skip
    return phrases.get(factor, with_article(f"{value} thing"))


def picture_row(pictures: Tensor) -> bytes:
    """Put pictures (N, 3, H, W) in [-1, 1] beside each other, as a PNG file."""
    if pictures.shape[-1] < SIDE:
        sized = F.interpolate(pictures, (SIDE, SIDE), mode="nearest-exact")
    else:
        sized = F.interpolate(pictures, (SIDE, SIDE), mode="bilinear", align_corners=False, antialias=True)
    row = torch.cat([F.pad(one, (0, GAP), value=GREY) for one in sized], -1)[..., :-GAP]
    return encode_pixels(pixels_of(row))


def draw_rows(rows: Mapping[str, Tensor], title: str = "") -> Figure:
    """Draw the rows of :func:`shown_rows`, with a frame around each picture: masked ones may be white."""
    return viz.picture_grid({name: F.pad(shown, (1, 1, 1, 1), value=GREY) for name, shown in rows.items()}, title)
