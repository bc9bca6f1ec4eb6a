"""Which direction changes a factor: steering scored against the truth of the scene world.

Pictures are generated with a direction added to what a block adds to its input (:mod:`vaelab.sae.steering`), from
prompts that name another value of a factor or leave the factor open. They are compared with the pictures of the same
prompts and seeds without steering. The scene reader (:mod:`vaelab.world.oracle`) and two models score every picture:

- *effect*: whether the object, or the ground, now has the value;
- *selectivity*: the share of the other factors, and of the number of objects, that stay as they were;
- *damage*: the denoiser's own loss on the picture without a prompt, divided by that on the pictures without steering,
  with the same noise for all. At 1 steered pictures are as easy for the model to denoise as its own; simpler pictures,
  such as an empty ground, can have less. It is computed from ``loss`` and ``loss_before`` when they are averaged;
- *distance*: 1 - cosine in the space of a picture model to the picture that a prompt with the value gives from the
  same seed.

A direction is turned on where the factor is: at the objects in the picture without steering, at its ground, or for a
position at the place that it names. The prompt that names the value is the ceiling. Features that detect a value
well need not change it, since the sum can be a vector that the model never produces (arXiv 2606.31699).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm.auto import tqdm

from vaelab import activations, world
from vaelab.activations import Sampling
from vaelab.core.validate import at_least, one_of
from vaelab.models.block_names import find_denoiser
from vaelab.models.conditioning import add_noise, encode_pictures, encode_prompts, predict, prediction_target
from vaelab.models.similarity import PictureModel, embed_in_batches
from vaelab.sae.baselines import LinearDictionary
from vaelab.sae.controls import train_readouts
from vaelab.sae.detection import Halves, LabelledVectors, detect
from vaelab.sae.model import SAE
from vaelab.sae.steering import Directions, Steerer, Steering
from vaelab.sae.truth import ComparisonSetting
from vaelab.world import oracle
from vaelab.world.scenes import (
    CENTRES,
    FACTORS,
    POSITIONS,
    SCENE_FACTORS,
    SIDE,
    SIZES,
    THING_FACTORS,
    Scene,
    Thing,
)

WAYS = ("add", "replace", "clamp")
"""The ways of :mod:`vaelab.sae.steering` that are compared."""
DIRECTIONS = ("sae", "mean_difference", "random")
"""The directions of :func:`steering_directions`."""
PROMPT = "prompt"
"""Name, in the tables, of the prompt that names the value."""
ALL_BLOCKS = "all"
"""Name, in the tables, of all steered blocks together."""
MEASURES = ("effect", "selectivity", "damage", "distance")
KEPT_PICTURES = 6
"""Number of pictures of every condition that are kept to be shown."""


class Value(NamedTuple):
    """A value of a factor, such as ``colour`` and ``red``."""

    factor: str
    value: str

    @property
    def concept(self) -> str:
        """Its name among the concepts of :mod:`vaelab.sae.detection`."""
        return f"{self.factor}: {self.value}"

    @classmethod
    def of(cls, concept: str) -> "Value":
        """Read the name of a concept.

        Raises:
            ValueError: the scene world has no such factor or value.
        """
        factor, _, value = concept.partition(": ")
        one_of("steered_values", factor, FACTORS)
        one_of("steered_values", value, FACTORS[factor])
        return cls(factor, value)


def single_scenes(count: int, split: str, first_seed: int = 0) -> list[Scene]:
    """Sample scenes of one object, with prompts that name every factor."""
    at_least("max_images", count, 1)
    found, seed = [], first_seed
    while len(found) < count:
        scene = world.sample(seed, split)
        if len(scene.things) == 1:
            found.append(scene.spelled_out())
        seed += 1
    return found


class LearnedDirections(NamedTuple):
    """Directions learned from the first half of the scenes."""

    values: list[Value]
    """The values that are found best, by the F1 of their best feature on the other half, in decreasing order. Steering
    is scored on scenes of neither half."""
    candidates: dict[str, "ValueDirections"]
    """The directions, see :func:`steering_directions`."""
    detected: pd.DataFrame
    """The autoencoder's table of :func:`vaelab.sae.detection.detect`."""


def learn_directions(halves: Halves, setting: ComparisonSetting, count: int, seed: int = 0) -> LearnedDirections:
    """Train an autoencoder on the first half, and make directions for the values that it finds best.

    A value whose best feature is never active is left out.

    Args:
        halves: the labelled vectors.
        setting: how the autoencoder is trained; its first seed is used.
        count: the number of values.
        seed: determines the random directions.
    """
    at_least("steered_values", count, 1)
    x, seeds = halves.choosing.flat, setting.seeds[:1]
    trained = train_readouts(x, setting.sae(x.shape[1]), setting.train, setting.batch_size, seeds, frozen=False)
    (readout,) = trained["sae"]
    detected = detect(readout, halves).table.sort_values("f1", ascending=False, kind="stable")
    active = (readout.scores(x) > 0).any(0).numpy()
    detected = detected[active[detected["feature"]]].reset_index(drop=True)
    values = [Value.of(concept) for concept in detected["concept"][:count]]
    chosen = dict(zip(detected["concept"], detected["feature"], strict=True))
    return LearnedDirections(values, steering_directions(readout.sae, chosen, halves.choosing, values, seed), detected)


class ValueDirections(NamedTuple):
    """A direction for every steered value of a block."""

    directions: Directions
    """The directions."""
    features: dict[Value, int]
    """The number of each value's direction."""
    lengths: dict[Value, float]
    """The length of the change at strength 1."""


def steering_directions(
    sae: SAE, chosen: Mapping[str, int], vectors: LabelledVectors, values: Sequence[Value], seed: int = 0
) -> dict[str, ValueDirections]:
    """Make the directions that are compared, by the names :data:`DIRECTIONS`.

    ``sae`` is the feature that was chosen for a value; ``mean_difference`` the mean of the vectors that show the value
    minus the mean of those that show another value of the factor; ``random`` a random direction. The unit of strength
    is the same for all three, the length of the mean difference, so that the same strength adds vectors of the same
    length.

    Args:
        sae: the autoencoder.
        chosen: for each concept the number of the autoencoder's feature.
        vectors: the vectors of the half of the scenes in which directions are chosen.
        values: the values to steer to.
        seed: determines the random directions.
    """
    x, differences = vectors.flat, factor_differences(vectors, values)
    lengths = dict(zip(values, differences.norm(dim=1).tolist(), strict=True))
    random = torch.randn(differences.shape, generator=torch.Generator().manual_seed(30_000 + seed))
    numbers = {value: i for i, value in enumerate(values)}
    made = {
        "sae": ValueDirections(
            _directions(sae, x, sae.config.k), {value: int(chosen[value.concept]) for value in values}, lengths
        )
    }
    for name, rows in (("mean_difference", differences), ("random", random)):
        dictionary = LinearDictionary(F.normalize(rows), x.mean(0))
        made[name] = ValueDirections(_directions(dictionary, x, 1), numbers, lengths)
    return made


def factor_differences(vectors: LabelledVectors, values: Sequence[Value]) -> Tensor:
    """Compute (V, d): for each value the mean of the vectors that show it minus the mean of those that show another
    value of the same factor.

    Raises:
        ValueError: no vector shows the value, or none another one.
    """
    x, labels, rows = vectors.flat, vectors.labels, []
    for value in values:
        own = np.array([Value.of(concept).factor == value.factor for concept in vectors.concepts])
        shown = labels[:, [concept == value.concept for concept in vectors.concepts]].any(1)
        others = labels[:, own].any(1) & ~shown
        if not shown.any() or not others.any():
            raise ValueError(f"steered_values: no patch shows {value.concept}, or none shows another {value.factor}")
        rows.append(x[torch.from_numpy(shown)].mean(0) - x[torch.from_numpy(others)].mean(0))
    return torch.stack(rows)


def _directions(dictionary: Any, x: Tensor, k: int) -> Directions:
    """Measure the largest activations over vectors (N, d). The unit of the amounts is 1 for every direction that was
    ever active, so that a :class:`Steering` with the unit ``mean`` gives the amount itself."""
    n = len(dictionary.features())
    largest = torch.zeros(n)
    for batch in x.split(4096):
        largest = torch.maximum(largest, dictionary.encode(batch).dense(n).amax(0))
    return Directions(dictionary, (largest > 0).double(), largest, k)


@dataclass(frozen=True)
class Measured:
    """What was measured of N pictures."""

    pictures: Tensor
    """(N, 3, H, W) in [-1, 1]."""
    scenes: list[Scene]
    """The scene that each picture shows."""
    losses: Tensor
    """(N,): the denoiser's loss."""
    embeddings: Tensor
    """(N, e): unit vectors of the picture model."""

    def select(self, rows: Sequence[int]) -> "Measured":
        """Select pictures by their indices."""
        rows = list(rows)
        return Measured(self.pictures[rows], [self.scenes[i] for i in rows], self.losses[rows], self.embeddings[rows])


@dataclass(frozen=True)
class SteeringSettings:
    """How pictures are generated and scored."""

    sampling: Sampling
    """Steps, guidance and size."""
    timesteps: tuple[int, ...] = (200,)
    """Timesteps at which the denoiser's loss is measured."""
    where: str = "factor"
    """``factor``: the direction is turned on where the factor is; see the module. ``everywhere``: at all positions."""
    batch_size: int = 16
    """Pictures per batch."""
    seed: int = 0
    """Scene i is generated with seed + i."""

    def __post_init__(self) -> None:
        one_of("steered_where", self.where, ("factor", "everywhere"))
        at_least("batch_size", self.batch_size, 1)
        if not self.timesteps:
            raise ValueError("loss_timesteps: expected at least one")


class SteeringExperiment:
    """Pictures without steering, with it, and of the prompts that name the value."""

    def __init__(
        self, pipeline: Any, scenes: Sequence[Scene], values: Sequence[Value], model: PictureModel,
        settings: SteeringSettings,
    ):  # fmt: skip
        """Generate the pictures without steering, and those of the prompts that name the values.

        Scenes with an even number name another value of the factor to steer, the others leave it open.

        Args:
            pipeline: a diffusers pipeline that generates the scene world.
            scenes: scenes of one object, see :func:`single_scenes`; two or more.
            values: the values to steer to.
            model: the picture model of ``distance``.
            settings: how pictures are generated and scored.

        Raises:
            ValueError: there are fewer than two scenes or no value, or the pictures have another size than the
                world's.
        """
        at_least("steered_scenes", len(scenes), 2)
        at_least("steered_values", len(values), 1)
        activations.validate_size(pipeline, settings.sampling, SIDE)
        self.pipeline, self.scenes, self.values = pipeline, list(scenes), list(values)
        self.model, self.settings = model, settings
        self.pictures: dict[tuple, Tensor] = {}
        """The first pictures of each condition, by block, direction, way, strength and value."""
        factors = list(dict.fromkeys(value.factor for value in values))
        self.prompts = {
            factor: [_start(scene, i, factor).prompt for i, scene in enumerate(scenes)] for factor in factors
        }
        numbers = {pair: None for factor in factors for pair in enumerate(self.prompts[factor])}
        order = {pair: row for row, pair in enumerate(numbers)}  # the same prompt serves several factors
        seen = self._measure(self._generate([prompt for _, prompt in order], [i for i, _ in order]))
        self.unsteered = {
            factor: seen.select([order[pair] for pair in enumerate(self.prompts[factor])]) for factor in factors
        }
        asked = [_with_value(scene, value).prompt for value in values for scene in scenes]
        named = self._measure(self._generate(asked, list(range(len(scenes))) * len(values)))
        self.named = {
            value: named.select(range(i * len(scenes), (i + 1) * len(scenes))) for i, value in enumerate(values)
        }
        self.usable = {value: self._usable(value) for value in values}

    def _usable(self, value: Value) -> list[int]:
        """List the scenes whose picture without steering has an object and does not show the value."""
        seen = self.unsteered[value.factor].scenes
        return [i for i, scene in enumerate(seen) if scene.things and not _shows(scene, value)]

    def _seeds(self, scenes: Sequence[int]) -> list[int]:
        return [self.settings.seed + i for i in scenes]

    def _generate(self, prompts: Sequence[str], scenes: Sequence[int]) -> Tensor:
        size, seeds = self.settings.batch_size, self._seeds(scenes)
        parts = [slice(first, first + size) for first in range(0, len(prompts), size)]
        return torch.cat(
            [activations.generate(self.pipeline, prompts[p], seeds[p], self.settings.sampling).cpu() for p in parts]
        )

    def _measure(self, pictures: Tensor) -> Measured:
        losses = denoising_losses(
            self.pipeline, pictures, self.settings.timesteps, batch_size=self.settings.batch_size,
            seed=self.settings.seed,
        )  # fmt: skip
        return Measured(pictures, oracle.read_scenes(pictures), losses, embed_in_batches(self.model, pictures))

    def ceiling(self) -> pd.DataFrame:
        """Score the prompts that name the values: the columns of :meth:`score`, with :data:`PROMPT` as direction."""
        rows = [
            self._scored(value, self.usable[value], self.named[value].select(self.usable[value]))
            for value in self.values
        ]
        return pd.concat(rows).assign(direction=PROMPT, way=PROMPT, strength=0.0)

    def score(
        self,
        block: str,
        candidates: Mapping[str, ValueDirections],
        strengths: Sequence[float],
        ways: Sequence[str] = WAYS,
    ) -> pd.DataFrame:
        """Steer every scene to every value, with every direction, way and strength.

        Args:
            block: the block's short name.
            candidates: the directions by name, see :func:`steering_directions`.
            strengths: multiples of each value's length.
            ways: of :data:`WAYS`.

        Returns:
            One row per picture: ``block``, ``direction``, ``way``, ``strength``, ``factor``, ``value``, ``scene`` (its
            number), ``prompt`` (``other`` or ``open``), ``effect`` (bool), ``selectivity``, ``loss``,
            ``loss_before`` (of the picture without steering) and ``distance``. Scenes whose picture shows the value
            without steering are left out.

        Raises:
            ValueError: a way is unknown, there is no positive strength, a direction was never active, or the pictures
                have NaN or infinite values; the largest strength is tried first, on one picture.
        """
        for way in ways:
            one_of("steered_ways", way, WAYS)
        if not strengths or len(set(strengths)) < len(strengths) or min(strengths) <= 0:
            raise ValueError(f"strengths: expected different numbers above 0, got {list(strengths)}")
        steerers = {name: Steerer(self.pipeline, {block: own.directions}) for name, own in candidates.items()}
        for name, own in candidates.items():
            largest = [self._steering(block, own, value, "add", max(strengths), 0) for value in self.values]
            steerers[name].validate(largest, self.settings.sampling)
            hardest = max(range(len(largest)), key=lambda i: largest[i].strength)
            prompt = self.prompts[self.values[hardest].factor][0]
            steerers[name].generate([prompt], [[largest[hardest]]], self.settings.sampling, self._seeds([0]))
        tables = []
        for name, value in tqdm([(name, value) for name in candidates for value in self.values], desc=f"steer {block}"):
            scored = self._score_value(block, steerers[name], candidates[name], value, strengths, ways, name)
            tables.append(scored.assign(direction=name))
        return pd.concat(tables, ignore_index=True).assign(block=block)

    def examples(self, block: str, way: str, strength: float) -> dict[str, dict[str, Tensor]]:
        """Collect for each value one scene's picture without steering, with each direction, and of the prompt.

        Returns:
            For each value's concept the pictures (3, H, W) in [-1, 1], by ``unsteered``, the directions that were
            scored, and :data:`PROMPT`.
        """
        found = {}
        for value, (first, *_) in ((value, own) for value, own in self.usable.items() if own):
            steered = {name: self.pictures.get((block, name, way, strength, value)) for name in DIRECTIONS}
            found[value.concept] = {
                "unsteered": self.unsteered[value.factor].pictures[first],
                **{name: pictures[0] for name, pictures in steered.items() if pictures is not None},
                PROMPT: self.named[value].pictures[first],
            }
        return found

    def _score_value(
        self, block: str, steerer: Steerer, own: ValueDirections, value: Value, strengths: Sequence[float],
        ways: Sequence[str], name: str,
    ) -> pd.DataFrame:  # fmt: skip
        usable, largest = self.usable[value], float(own.directions.largest[own.features[value]])
        if not usable:
            return pd.DataFrame()
        # clamping at the largest activation is replacing by it, so that some requests give the same pictures
        same: dict[tuple[str, float], list[tuple[str, float]]] = {}
        for way in ways:
            for strength in strengths:
                amount = strength * own.lengths[value]
                key = ("replace", min(amount, largest)) if way == "clamp" else (way, amount)
                same.setdefault(key, []).append((way, strength))
        requests = [each[0] for each in same.values()]
        prompts = [self.prompts[value.factor][i] for _ in requests for i in usable]
        steerings = [[self._steering(block, own, value, *request, i)] for request in requests for i in usable]
        pictures = steerer.generate(
            prompts, steerings, self.settings.sampling, self._seeds(usable) * len(requests),
            batch_size=self.settings.batch_size,
        )  # fmt: skip
        measured, tables = self._measure(pictures), []
        for number, each in enumerate(same.values()):
            own_rows = measured.select(range(number * len(usable), (number + 1) * len(usable)))
            table = self._scored(value, usable, own_rows)
            for way, strength in each:
                tables.append(table.assign(way=way, strength=strength))
                self.pictures[block, name, way, strength, value] = own_rows.pictures[:KEPT_PICTURES]
        return pd.concat(tables)

    def _steering(
        self, block: str, own: ValueDirections, value: Value, way: str, strength: float, scene: int
    ) -> Steering:
        """Make the request for one picture; its strength is the amount itself."""
        mask = None
        if self.settings.where == "factor":
            mask = factor_region(self.unsteered[value.factor].scenes[scene], value)
        return Steering(block, own.features[value], strength * own.lengths[value], way, "mean", mask=mask)

    def _scored(self, value: Value, usable: Sequence[int], after: Measured) -> pd.DataFrame:
        """Score pictures after steering, one for each usable scene."""
        before, named = self.unsteered[value.factor].select(usable), self.named[value].embeddings[list(usable)]
        return pd.DataFrame({
            "factor": value.factor, "value": value.value, "scene": list(usable),
            "prompt": ["open" if i % 2 else "other" for i in usable],
            "effect": [has_value(*pair, value) for pair in zip(before.scenes, after.scenes, strict=True)],
            "selectivity": [kept_share(*pair, value.factor) for pair in zip(before.scenes, after.scenes, strict=True)],
            "loss": after.losses.tolist(), "loss_before": before.losses.tolist(),
            "distance": (1 - (after.embeddings * named).sum(1)).tolist(),
        })  # fmt: skip


def _start(scene: Scene, number: int, factor: str) -> Scene:
    """Return the scene as it is described before steering: with another value named, or with the factor left open."""
    if number % 2 == 0:
        return scene
    if factor in SCENE_FACTORS:
        return replace(scene, named=tuple(name for name in scene.named if name != factor))
    (thing,) = scene.things
    return replace(scene, things=(replace(thing, named=tuple(name for name in thing.named if name != factor)),))


def _with_value(scene: Scene, value: Value) -> Scene:
    """Return the scene with the value in place of its own."""
    change = {value.factor: value.value}
    if value.factor in SCENE_FACTORS:
        return replace(scene, **change)
    return replace(scene, things=(replace(scene.things[0], **change),))


def _shows(scene: Scene, value: Value) -> bool:
    where = [scene] if value.factor in SCENE_FACTORS else scene.things
    return any(getattr(part, value.factor) == value.value for part in where)


def has_value(before: Scene, after: Scene, value: Value) -> bool:
    """Say whether the ground, or one of the objects that were there before, has the value afterwards.

    Objects are matched such that as many factors as possible agree.
    """
    if value.factor in SCENE_FACTORS:
        return getattr(after, value.factor) == value.value
    pairs = oracle.match_things(before.things, after.things)
    return any(match is not None and getattr(match, value.factor) == value.value for _, match in pairs)


def kept_share(before: Scene, after: Scene, factor: str) -> float:
    """Compute the share of the factors other than this one, and of the number of objects, that are as before.

    The factors of an object that is gone have changed.
    """
    pairs: list[tuple[Thing, Thing | None]] = oracle.match_things(before.things, after.things)
    same = [
        match is not None and getattr(thing, name) == getattr(match, name)
        for thing, match in pairs for name in THING_FACTORS if name != factor
    ]  # fmt: skip
    same += [getattr(before, name) == getattr(after, name) for name in SCENE_FACTORS if name != factor]
    return float(np.mean([*same, len(before.things) == len(after.things)]))


def factor_region(scene: Scene, value: Value) -> Tensor:
    """Compute where a value is written: (64, 64) float32 of 0 and 1.

    For factors of the ground it is the ground; for a position the square that a large object there would fill; for the
    other factors all objects.
    """
    if value.factor == "position":
        column, row = POSITIONS[value.value]
        mask, half = torch.zeros(SIDE, SIDE), max(SIZES.values()) // 2
        y, x = CENTRES[row], CENTRES[column]
        mask[y - half : y + half, x - half : x + half] = 1
        return mask
    ground = torch.from_numpy(scene.masks()[-1])
    return (ground if value.factor in SCENE_FACTORS else ~ground).float()


@torch.no_grad()
def denoising_losses(
    pipeline: Any, pictures: Tensor, timesteps: Sequence[int], *, batch_size: int = 16, seed: int = 0
) -> Tensor:
    """Compute the denoiser's loss on pictures without a prompt: (N,) float64.

    The loss is the mean squared error of its prediction (see :func:`vaelab.models.conditioning.prediction_target`),
    averaged over timesteps. The noise of a timestep is the same for all pictures.

    Args:
        pipeline: a diffusers pipeline.
        pictures: (N, 3, H, W) in [-1, 1].
        timesteps: the timesteps.
        batch_size: pictures per pass.
        seed: determines the noise.
    """
    size, parts = pictures.shape[-2:], []
    device = find_denoiser(pipeline).device
    for batch in pictures.to(device).split(batch_size):
        latents, total = encode_pictures(pipeline, batch), 0.0
        conditions = encode_prompts(pipeline, None, len(batch), size)
        for timestep in timesteps:
            generator = torch.Generator().manual_seed(seed * 1_000_003 + timestep)
            noise = torch.randn(latents.shape[1:], generator=generator).to(latents).expand_as(latents)
            target = prediction_target(pipeline, latents, noise, timestep)
            found = predict(pipeline, add_noise(pipeline, latents, noise, timestep), timestep, conditions)
            total = total + (found[:, : target.shape[1]].float() - target).square().mean((1, 2, 3)).cpu().double()
        parts.append(total / len(timesteps))
    return torch.cat(parts)


def steering_curve(table: pd.DataFrame, *, resamples: int = 500, seed: int = 0) -> pd.DataFrame:
    """Average over values and scenes, for each block, direction, way and strength.

    Args:
        table: rows of :meth:`SteeringExperiment.score` and :meth:`SteeringExperiment.ceiling`.
        resamples: the number of resamples of the scenes for the 95 % intervals.
        seed: determines them.

    Returns:
        ``block``, ``direction``, ``way``, ``strength``, and each of :data:`MEASURES` with ``_low`` and ``_high``.
    """
    return _averaged(table, ["block", "direction", "way", "strength"], resamples, seed)


def steering_summary(table: pd.DataFrame, *, resamples: int = 500, seed: int = 0) -> pd.DataFrame:
    """Average over values and scenes for each block, direction and way, at the best strength of each value.

    The strength of a value is the one with the largest product of effect and selectivity in one half of the scenes,
    among equal ones the smallest; it is scored on the other half. Both halves choose and are scored in turn. If there
    are several blocks, rows over all their pictures together follow, with :data:`ALL_BLOCKS` as block.

    Args, and columns without ``strength``: as in :func:`steering_curve`.
    """
    by, middle = ["block", "direction", "way"], table["scene"].max() // 2
    first, second = table[table["scene"] <= middle], table[table["scene"] > middle]
    chosen = pd.concat([_at_best_strengths(*halves) for halves in ((first, second), (second, first))])
    parts = [chosen] if chosen["block"].nunique() == 1 else [chosen, chosen.assign(block=ALL_BLOCKS)]
    return pd.concat([_averaged(part, by, resamples, seed) for part in parts], ignore_index=True)


def _at_best_strengths(choosing: pd.DataFrame, scored: pd.DataFrame) -> pd.DataFrame:
    """Select the rows ``scored`` at the strength of each value that is best among the rows ``choosing``."""
    keys = ["block", "direction", "way", "factor", "value"]
    means = choosing.groupby([*keys, "strength"], sort=False)[["effect", "selectivity"]].mean().reset_index()
    order = means.assign(product=means["effect"] * means["selectivity"]).sort_values(
        ["product", "strength"], ascending=[False, True], kind="stable"
    )
    return scored.merge(order.drop_duplicates(keys)[[*keys, "strength"]], on=[*keys, "strength"])


def _averaged(table: pd.DataFrame, keys: list[str], resamples: int, seed: int) -> pd.DataFrame:
    scenes = np.sort(table["scene"].unique())
    rng = np.random.default_rng(seed)
    weights = rng.multinomial(len(scenes), np.full(len(scenes), 1 / len(scenes)), resamples).astype(float)
    weights = np.concatenate([np.ones((1, len(scenes))), weights])  # the first row is the data itself
    rows = []
    for key, part in table.groupby(keys, sort=False):
        columns = {name: part[name].astype(float) for name in ("effect", "selectivity", "distance")}
        columns |= {"loss": part["loss"], "loss_before": part["loss_before"], "count": pd.Series(1.0, part.index)}
        sums = pd.DataFrame(columns).groupby(part["scene"]).sum().reindex(scenes, fill_value=0.0)
        with np.errstate(invalid="ignore", divide="ignore"):
            drawn = {name: weights @ sums[name].to_numpy() for name in sums}
            values = {name: drawn[name] / drawn["count"] for name in ("effect", "selectivity", "distance")}
            values["damage"] = drawn["loss"] / drawn["loss_before"]
        row = dict(zip(keys, key, strict=True)) | {"pictures": len(part)}
        for name in MEASURES:
            low, high = np.nanquantile(values[name][1:], [0.025, 0.975])
            row |= {name: values[name][0], f"{name}_low": low, f"{name}_high": high}
        rows.append(row)
    return pd.DataFrame(rows)


def steering_metrics(summary: pd.DataFrame) -> dict[str, float]:
    """Collect the metrics ``<block>.steer.<way>.<measure>.<direction>``; of the prompts
    ``<block>.steer.prompt.<measure>``."""
    return {
        f"{row['block']}.steer.{row['way']}.{name}" + (f".{row['direction']}" if row["way"] != PROMPT else ""): row[
            name
        ]
        for row in summary.to_dict("records")
        for name in MEASURES
    }


def find_or_change(found: pd.DataFrame, summary: pd.DataFrame) -> pd.DataFrame:
    """Put beside each other how well each method of one block finds a factor, and how well it changes one.

    Args:
        found: columns ``method``, ``f1``, ``f1_low``, ``f1_high`` and ``coverage``: how well values are found.
        summary: the block's rows of :func:`steering_summary`.

    Returns:
        One row per method of either table: the columns of ``found``, then ``way`` (the one with the largest product of
        effect and selectivity), ``effect``, ``selectivity``, ``damage`` and ``changes``, that product. Cells of
        methods that were not tried are empty.
    """
    changed = summary.assign(changes=summary["effect"] * summary["selectivity"])
    best = changed.sort_values("changes", ascending=False, kind="stable").drop_duplicates("direction")
    best = best.rename(columns={"direction": "method"})
    columns = ["method", "way", "effect", "selectivity", "damage", "changes"]
    return found[["method", "f1", "f1_low", "f1_high", "coverage"]].merge(best[columns], on="method", how="outer")


def best_ways(summary: pd.DataFrame) -> pd.DataFrame:
    """Choose for each direction, and for the prompt, the way with the largest product of effect and selectivity.

    Args:
        summary: rows of :func:`steering_summary`. If they have several blocks, those of :data:`ALL_BLOCKS` count.

    Returns:
        The rows chosen, with the index ``direction``.
    """
    rows = summary[summary["block"] == ALL_BLOCKS] if summary["block"].nunique() > 1 else summary
    order = rows.assign(changes=rows["effect"] * rows["selectivity"]).sort_values(
        "changes", ascending=False, kind="stable"
    )
    return order.drop_duplicates("direction").set_index("direction")


def change_sentence(summary: pd.DataFrame) -> str:
    """State how often directions change a factor in the block in which they do most, each in its best way, how often
    the prompt does, and how often they do in other blocks.

    Args:
        summary: rows of :func:`steering_summary`.
    """
    own = {block: best_ways(rows) for block, rows in summary.groupby("block", sort=False) if block != ALL_BLOCKS}
    largest = {block: rows.drop(index=PROMPT, errors="ignore")["effect"].max() for block, rows in own.items()}
    most = max(largest, key=largest.__getitem__)
    words = {
        "sae": "feature of an autoencoder", "mean_difference": "difference of means", "random": "random direction",
        PROMPT: "the prompt that names it",
    }  # fmt: skip
    rows = own[most].to_dict("index")
    parts = [
        f"{100 * rows[name]['effect']:.0f} % of pictures ({words[name]}, damage {rows[name]['damage']:.2f})"
        for name in (*DIRECTIONS, PROMPT)
        if name in rows
    ]
    said = f"Steered in {most}, the value that was asked for appears in {', '.join(parts[:-1])} and {parts[-1]}."
    others = [block for block in own if block != most]
    if others:
        said += f" In {' and '.join(others)} no direction gives it to more than "
        said += f"{100 * max(largest[block] for block in others):.0f} %."
    return said
