"""Scores of features: Table 1 of Surkov et al. ("Unpacking SDXL Turbo", section 5), with baselines and controls.

The pictures are those of a store's items, generated again from their prompts and seeds. A feature's top pictures are a
sample of the items whose mean spatial activation (equation 9) is in the top 5 % of the items in which it is active. A
map S (h, w) has a feature's activation at each position of the block.

=============== ======================================================================================================
score           definition
=============== ======================================================================================================
specificity     mean cosine similarity of all pairs of 10 top pictures
monosemanticity mean cosine similarity of all pairs of pictures, weighted by both pictures' activations (Pach et al.)
colour          mean Manhattan distance from the mean colour of 10 top pictures, both weighted by the activation
texture         similarity of the picture drawn by the feature alone (equation 11) to textures
causality       similarity of that picture to the feature's caption, or to its top pictures
sensitivity     share of the pictures of prompts near the caption in which the feature is active on more than 0, 10 or
                30 % of the area
inside, outside Manhattan distance of top pictures from those with the feature modulated (equation 10), where the
                feature is strong and where it is not active
=============== ======================================================================================================

Similarities are cosines of a model of :mod:`vaelab.models.similarity`. With CLIP, texture is the similarity to the word
"texture" and causality that to the caption, as in the paper. A model that knows no sentences compares with pictures
instead: with pictures of textures, and with the feature's top pictures.

Controls are autoencoders too (:func:`controls_of`), so that the same code scores them, and the trained autoencoder with
its directions replaced by random ones of equal length (:func:`with_random_directions`).
"""

import copy
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor

from vaelab import activations
from vaelab.activations.denoiser import Sampling
from vaelab.core.validate import at_least
from vaelab.data import bundled, load_images
from vaelab.data.transforms import square
from vaelab.models.similarity import PictureModel, SentenceModel, embed_in_batches, embeds_sentences
from vaelab.sae.controls import untrained
from vaelab.sae.feature_statistics import FeatureStatistics, feature_maps, mean_activations
from vaelab.sae.model import SAE, SAEConfig
from vaelab.sae.steering import Directions, Steerer, activate_alone, modulate
from vaelab.store.reader import Store

BETAS = (-10.0, -5.0, 5.0, 10.0)
"""The strengths of Table 1 (b)."""
SHARES = (0.0, 0.1, 0.3)
"""The shares of the area of the paper's sensitivity."""
ALIKE = 0.95
"""Of two prompts whose sentences are more similar than this, only one is among the prompts near a caption."""
TEXTURES = ("brick.png", "grass.png", "gravel.png")
"""Photographs of textures among the embedded ones."""
FUNCTION_WORDS = frozenset(
    ["a", "an", "and", "are", "at", "by", "for", "from", "in", "is", "its", "of", "on", "the", "to", "with"]
)
"""Words that no caption has."""
TELLING = 1.25
"""A word that raises a feature's mean activation by less than this factor is in no caption."""
RESAMPLES = 2000
"""Resamples of features, or of a baseline's samples, for intervals."""
CACHED_BYTES = 2**30
"""The size of all pictures that :class:`ItemPictures` keeps."""
PAPER_TABLE_1 = {
    "down.2.1": {"specificity": (0.71, 0.11), "texture": (0.16, 0.02), "colour": (86.2, 14.9)},
    "mid.0": {"specificity": (0.62, 0.11), "texture": (0.14, 0.01), "colour": (84.7, 16.3)},
    "up.0.0": {"specificity": (0.66, 0.12), "texture": (0.18, 0.03), "colour": (86.3, 16.5)},
    "up.0.1": {"specificity": (0.65, 0.11), "texture": (0.20, 0.02), "colour": (73.8, 20.6)},
    "random pictures": {"specificity": (0.50, 0.10), "texture": (0.13, 0.02), "colour": (90.7, 54.9)},
    "same prompt": {"specificity": (0.89, 0.06)},
    "textures": {"texture": (0.18, 0.02)},
}
"""Mean and standard deviation over features, with CLIP; and of the baselines over samples."""
PAPER_LOCALITY = {
    "down.2.1": ((148.2, 116.0), (124.2, 94.4), (101.4, 78.7), (128.9, 105.6)),
    "mid.0": ((69.2, 32.2), (39.4, 18.5), (33.2, 15.2), (59.9, 29.82)),
    "up.0.0": ((105.3, 38.4), (77.7, 23.7), (63.6, 23.3), (88.6, 37.08)),
    "up.0.1": ((125.0, 26.8), (73.1, 16.4), (68.6, 21.9), (98.9, 34.74)),
}
"""Distances inside and outside the active area, at each of :data:`BETAS`."""


# The formulas


def mean_similarity(vectors: Tensor) -> float:
    """Compute the mean cosine similarity of all pairs of M vectors (M, d) of length 1; NaN for fewer than two.

    The sum over pairs is (|sum of vectors|^2 - M) / 2.
    """
    count = len(vectors)
    if count < 2:
        return float("nan")
    vectors = vectors.double()
    return ((vectors.sum(0).square().sum() - vectors.square().sum()) / (count * (count - 1))).item()


def monosemanticity(means: Tensor, vectors: Tensor) -> Tensor:
    """Compute the monosemanticity score of features (Pach et al., 2025): the mean similarity of all pairs of pictures,
    each pair weighted by the product of its two activations, which are scaled to [0, 1] for each feature.

    As in the authors' code, the weighted sum is divided by the sum of the weights. With weights a and vectors e of
    length 1 both sums are closed: (|sum a e|^2 - sum a^2) / ((sum a)^2 - sum a^2).

    Args:
        means: activations (N, F) of F features in N pictures; here mean spatial activations.
        vectors: the pictures' vectors (N, d) of length 1.

    Returns:
        (F,) float64; NaN for a feature with the same activation in all pictures, or with none in all but one.
    """
    means, vectors = means.double(), vectors.double()
    low, high = means.amin(0), means.amax(0)
    weights = (means - low) / (high - low)  # NaN if the feature never varies
    own = (weights.square() * vectors.square().sum(1, keepdim=True)).sum(0)
    pairs = weights.sum(0).square() - weights.square().sum(0)
    both = (weights.T @ vectors).square().sum(1) - own
    return torch.where(pairs > 1e-9, both / pairs, torch.nan)


def colour_distance(pictures: Tensor, maps: Tensor) -> float:
    """Compute the weighted mean Manhattan distance of pixels from their weighted mean colour, from 0 to 765.

    The weight of a pixel is the activation at its position; mean and distance are over the pixels of all pictures.

    Args:
        pictures: M pictures (M, 3, H, W) in [-1, 1].
        maps: the feature's maps (M, h, w), not negative.

    Returns:
        The distance, in units of the 0-255 scale summed over channels; NaN if the feature is not active.
    """
    weights = at_pixels(maps, pictures).double()
    if not weights.sum() > 0:
        return float("nan")
    colours = (pictures.double() + 1) * 127.5
    weights = weights / weights.sum()
    mean = (colours * weights[:, None]).sum((0, 2, 3), keepdim=True)
    return ((colours - mean).abs().sum(1) * weights).sum().item()


class Areas(NamedTuple):
    """Where a feature is strong, and where it is not active; of M maps (M, h, w)."""

    inside: Tensor
    """bool: positions whose activation is larger than that of at least half of the picture's positions."""
    outside: Tensor
    """bool: positions at which the activation is zero."""


def areas(maps: Tensor) -> Areas:
    """Find the areas of Table 1 (b).

    The paper: a pixel is inside the active area if its patch "has an activation value larger than 50 % of the image
    patches". This is read as a rank: at least half of the picture's patches have a smaller activation. If a feature is
    active in less than half of the picture, all its active patches are inside.
    """
    flat = maps.flatten(1).contiguous()
    smaller = torch.searchsorted(flat.sort(1).values, flat)  # the number of smaller activations
    inside = (2 * smaller >= flat.shape[1]) & (flat > 0)
    return Areas(inside.view_as(maps), maps == 0)


def local_change(before: Tensor, after: Tensor, maps: Tensor) -> tuple[float, float]:
    """Compute the Manhattan distance of M pairs of pictures inside and outside a feature's areas, from 0 to 765.

    The distance is the mean over the pixels of an area, and then over the pictures that have such an area.

    Args:
        before: (M, 3, H, W) in [-1, 1].
        after: the same pictures with the feature modulated.
        maps: the feature's maps (M, h, w) in the pictures ``before``.

    Returns:
        Inside and outside; NaN if no picture has the area.
    """
    distance = (before - after).double().abs().sum(1) * 127.5  # (M, H, W)
    found = []
    for area in areas(maps):
        pixels = at_pixels(area.double(), before)
        count = pixels.sum((1, 2))
        mean = (distance * pixels).sum((1, 2))[count > 0] / count[count > 0]
        found.append(mean.mean().item() if len(mean) else float("nan"))
    return found[0], found[1]


def active_shares(maps: Tensor) -> Tensor:
    """Compute the share (M,) of the positions of maps (M, h, w) at which a feature is active."""
    return (maps > 0).double().mean((1, 2))


def at_pixels(maps: Tensor, pictures: Tensor) -> Tensor:
    """Give every pixel of pictures (M, 3, H, W) the value of its position in maps (M, h, w): (M, H, W)."""
    return F.interpolate(maps[:, None], pictures.shape[-2:], mode="nearest-exact")[:, 0]


def nearest_prompts(caption: Tensor, sentences: Tensor, count: int) -> list[int]:
    """Choose the prompts whose sentences are most similar to a caption, but no two that are :data:`ALIKE`.

    Args:
        caption: the caption's vector (d,) of length 1.
        sentences: the prompts' vectors (n, d) of length 1.
        count: the largest number of prompts.
    """
    chosen: list[int] = []
    for place in torch.sort(sentences @ caption, descending=True, stable=True).indices.tolist():
        if len(chosen) == count:
            break
        if not chosen or (sentences[chosen] @ sentences[place]).max() <= ALIKE:
            chosen.append(place)
    return chosen


def caption_from_words(statistics: FeatureStatistics, feature: int, count: int = 3, least: int = 3) -> str:
    """Make a caption of the words whose prompts activate a feature most, the most telling word first.

    Only words that occur in ``least`` prompts and raise the feature's mean activation by a factor :data:`TELLING` are
    used, and none of :data:`FUNCTION_WORDS`; the caption is empty if there is none.
    """
    return captions_from_words(statistics, [feature], count, least)[0]


def captions_from_words(
    statistics: FeatureStatistics, features: Sequence[int] | None = None, count: int = 3, least: int = 3
) -> list[str]:
    """Make :func:`caption_from_words` of several features at once; None takes all."""
    items, ratios = statistics.word_ratios(features)
    allowed = (items >= least) & torch.tensor([word not in FUNCTION_WORDS for word in statistics.words], dtype=bool)
    words = [word for word, use in zip(statistics.words, allowed.tolist(), strict=True) if use]
    best = ratios[allowed].sort(dim=0, descending=True, stable=True)
    values, places = best.values[:count].T.tolist(), best.indices[:count].T.tolist()
    return [
        " ".join(words[place] for value, place in zip(*own, strict=True) if value > TELLING)
        for own in zip(values, places, strict=True)
    ]


def position_accuracy(maps: Tensor, seed: int = 0, most: int = 20_000) -> dict[str, float]:
    """Measure how well linear probes read the row and the column of a position from its vector (footnote 4).

    The probes are multinomial logistic regressions on standardised vectors, trained on half of the pictures and tested
    on the other half.

    Args:
        maps: maps (N, h, w, d) of N pictures; in the paper the input D_in of a block.
        seed: the seed of the split and of the sample.
        most: the largest number of vectors to train on, and to test on.

    Returns:
        ``row`` and ``column``: the shares of test vectors whose row or column is read exactly.

    Raises:
        ValueError: there are fewer than two pictures.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    at_least("probe_pictures", len(maps), 2)
    n, h, w, d = maps.shape
    rng = np.random.default_rng(seed)
    order = rng.permutation(n)
    halves = []
    for pictures in (order[: n // 2], order[n // 2 :]):
        rows = rng.permutation(len(pictures) * h * w)[:most]
        vectors = maps[torch.from_numpy(pictures)].reshape(-1, d).float().cpu().numpy()[rows]
        halves.append((vectors, {"row": rows // w % h, "column": rows % w}))
    (train, train_labels), (test, test_labels) = halves
    return {
        name: float(
            make_pipeline(StandardScaler(), LogisticRegression(max_iter=200))
            .fit(train, train_labels[name])
            .score(test, test_labels[name])
        )
        for name in train_labels
    }


def probe_positions(
    pipeline: Any, activation_store: Store, blocks: Sequence[str], step: int, pictures: int, *, batch_size: int = 16,
    seed: int = 0,
) -> pd.DataFrame:  # fmt: skip
    """Measure :func:`position_accuracy` on the inputs D_in of blocks, for the prompts and seeds of a store.

    Args:
        pipeline: the store's model.
        activation_store: the store.
        blocks: the blocks' short names.
        step: the denoising step.
        pictures: the largest number of pictures.
        batch_size: pictures per batch.
        seed: the seed of the probes' split.

    Returns:
        ``block``, ``row``, ``column``, and ``chance_row`` and ``chance_column``, the shares that guessing gives.
    """
    records = [activation_store.items[item] for item in items_at_step(activation_store, step, pictures)]
    sampling = Sampling(**activation_store.settings["sampling"])
    prompts, seeds = ([record[name] for record in records] for name in ("prompt", "seed"))
    maps = activations.maps_at_step(
        pipeline, prompts, seeds, blocks, sampling, step, side="input", batch_size=batch_size
    )
    rows = []
    for block, inputs in maps.items():
        chance = {"chance_row": 1 / inputs.shape[1], "chance_column": 1 / inputs.shape[2]}
        rows.append({"block": block, **position_accuracy(inputs, seed), **chance})
    return pd.DataFrame(rows)


# Controls


def controls_of(sae: SAE, mean: Tensor, seed: int = 0) -> dict[str, SAE]:
    """Make the controls that are scored like an autoencoder: ``untrained``, of the same size with its initial weights,
    and ``neurons``, whose features are the block's channels, each above its mean, k of them active.

    Args:
        sae: the trained autoencoder.
        mean: the mean (d,) of the block's vectors.
        seed: the seed of the initial weights.
    """
    d, k = sae.config.d, sae.config.k
    fresh = untrained(mean[None], SAEConfig(d, sae.config.n_features, k), seed)
    channels = untrained(mean[None], SAEConfig(d, d, min(k, d)), seed)
    with torch.no_grad():
        for weight in (channels.encoder, channels.decoder):
            weight.copy_(torch.eye(d))
    return {"untrained": fresh.to(sae.device), "neurons": channels.to(sae.device)}


def with_random_directions(sae: SAE, seed: int = 0) -> SAE:
    """Copy an autoencoder, with every feature's vector replaced by a random one of the same length. Its activations
    are unchanged."""
    made = copy.deepcopy(sae)
    generator = torch.Generator().manual_seed(20_000 + seed)  # not the numbers that an autoencoder begins with
    with torch.no_grad():
        vectors = F.normalize(torch.randn(sae.decoder.shape, generator=generator)).to(sae.decoder)
        made.decoder.copy_(vectors * sae.decoder.norm(dim=1, keepdim=True))
    return made


# Scoring


def items_at_step(activation_store: Store, step: int, count: int = 0) -> list[int]:
    """List the items of one denoising step, each of another picture; with classifier-free guidance only those of the
    half with the prompt.

    Args:
        activation_store: the store.
        step: the step, counted from 0.
        count: the largest number of items; 0 means all.

    Raises:
        ValueError: the store has no such item.
    """
    found = []
    for number in range(len(activation_store.items)):
        record = activation_store.items[number]
        if record["step"] == step and record["guided"]:
            found.append(number)
            if len(found) == count:
                break
    if not found:
        steps = activation_store.settings.get("steps") or "all steps"
        raise ValueError(f"step: {activation_store.url} has no items of step {step}; it was collected at {steps}")
    return found


class ItemPictures:
    """The pictures of a store's items, generated again from their prompts and seeds, and the pictures' vectors."""

    def __init__(
        self, pipeline: Any, activation_store: Store, model: PictureModel | None = None, *, batch_size: int = 16
    ):  # fmt: skip
        """Take the store's model, the store, and the model that embeds the pictures, which :meth:`vectors` needs."""
        self.store, self.model = activation_store, model
        self.sampling = Sampling(**activation_store.settings["sampling"])
        self._pipeline, self._batch_size = pipeline, batch_size
        self._pictures: dict[int, Tensor] = {}
        self._vectors: dict[int, Tensor] = {}

    def prompts(self, items: Sequence[int]) -> list[str]:
        """Return the items' prompts."""
        return [self.store.items[item]["prompt"] for item in items]

    def seeds(self, items: Sequence[int]) -> list[int]:
        """Return the items' seeds."""
        return [self.store.items[item]["seed"] for item in items]

    def pictures(self, items: Sequence[int]) -> Tensor:
        """Return the pictures (N, 3, H, W) in [-1, 1] of N items."""
        missing = [item for item in dict.fromkeys(items) if item not in self._pictures]
        new: dict[int, Tensor] = {}
        for begin in range(0, len(missing), self._batch_size):
            part = missing[begin : begin + self._batch_size]
            made = activations.generate(self._pipeline, self.prompts(part), self.seeds(part), self.sampling).cpu()
            new |= dict(zip(part, made, strict=True))
        all_of_them = torch.stack([new[item] if item in new else self._pictures[item] for item in items])
        self._pictures |= new
        while sum(picture.nbytes for picture in self._pictures.values()) > CACHED_BYTES:
            del self._pictures[next(iter(self._pictures))]
        return all_of_them

    def vectors(self, items: Sequence[int]) -> Tensor:
        """Return the vectors (N, d) of the pictures of N items."""
        missing = [item for item in dict.fromkeys(items) if item not in self._vectors]
        for begin in range(0, len(missing), self._batch_size):
            part = missing[begin : begin + self._batch_size]
            vectors = embed_in_batches(self.model, self.pictures(part))
            self._vectors |= dict(zip(part, vectors, strict=True))
        return torch.stack([self._vectors[item] for item in items])


@dataclass(frozen=True)
class ScoreConfig:
    """What is scored, and over how much."""

    step: int = 0
    """The denoising step whose activations count; features are steered at all steps."""
    examples: int = 10
    """The number of top pictures of a feature, and of pictures in a baseline's sample."""
    top: float = 0.05
    """The share of the items in which a feature is active that count as its top pictures."""
    steered: int = 10
    """The number of top pictures in which a feature is modulated."""
    betas: tuple[float, ...] = BETAS
    """Strengths of the modulation (equation 10)."""
    gamma: float = 1.0
    """Strength of the activation on the empty prompt (equation 11)."""
    prompts: int = 100
    """The number of prompts near a caption."""
    samples: int = 100
    """The number of samples of a baseline."""
    seed: int = 0
    """Fixes the samples, the random directions, and the noise of the empty prompt's picture."""
    batch_size: int = 16
    """Pictures per batch."""

    def __post_init__(self) -> None:
        for name in ("examples", "steered", "prompts", "samples", "batch_size"):
            at_least(name, getattr(self, name), 1)
        if not 0 < self.top <= 1:
            raise ValueError(f"top: expected a share above 0 and up to 1, got {self.top}")


class FeatureScorer:
    """Scores features of the blocks of one store."""

    def __init__(
        self, pipeline: Any, pictures: ItemPictures, pool: Sequence[int], config: ScoreConfig, *, textures: Tensor,
        sentences: SentenceModel | None = None, held_out: Store | None = None,
    ):  # fmt: skip
        """Take what features are scored on.

        Args:
            pipeline: the store's model.
            pictures: the pictures of the store.
            pool: the items over which monosemanticity is computed and from which baselines are drawn.
            config: what is scored.
            textures: pictures of textures (T, 3, H, W) in [-1, 1].
            sentences: the model that finds the prompts near a caption; None leaves out the sensitivity.
            held_out: a store of other prompts, over which the sensitivity is computed.
        """
        self._pipeline, self.pictures, self.pool, self.config = pipeline, pictures, list(pool), config
        self._textures = embed_in_batches(pictures.model, textures)
        self._sentences, self._held_out = sentences, held_out
        self._with_words = embeds_sentences(pictures.model)
        if sentences is not None and held_out is not None:
            self._other = items_at_step(held_out, config.step)
            prompts = [held_out.items[item]["prompt"] for item in self._other]
            self._other_vectors = sentences.embed_sentences(prompts)

    def score(
        self, block: str, who: str, sae: SAE, statistics: FeatureStatistics, features: Sequence[int], *,
        written_by: SAE | None = None, captions: Mapping[int, str] | None = None,
    ) -> pd.DataFrame:  # fmt: skip
        """Score features of a block.

        Args:
            block: the block's short name.
            who: the name of the autoencoder in the table.
            sae: the autoencoder.
            statistics: its statistics over the store's items of the step.
            features: the features.
            written_by: the autoencoder whose directions are written; None means ``sae``. If it is given, the scores
                that do not depend on the directions are left out.
            captions: captions of features; :func:`caption_from_words` makes those that are missing.

        Returns:
            One row per feature: ``block``, ``who``, ``feature``, ``caption``, ``pictures`` (their number) and the
            scores of the module; NaN where one is not defined.

        Raises:
            ValueError: a feature does not exist or was never active.
        """
        for feature in features:
            statistics.require_feature(feature, block)
        steerer = Steerer(self._pipeline, {block: Directions.of(written_by or sae, statistics)})
        means = mean_activations(sae, self.pictures.store, block, self.pool, features)
        scored = monosemanticity(means, self.pictures.vectors(self.pool))
        shares = None if written_by else self._held_out_shares(sae, block, features)
        rows = []
        for number, (feature, mono) in enumerate(zip(features, scored.tolist(), strict=True)):
            items, _ = statistics.sample_items(feature, 1 - self.config.top, 1, self.config.examples, self.config.seed)
            caption = (captions or {}).get(feature) or caption_from_words(statistics, feature)
            row = {"block": block, "who": who, "feature": feature, "caption": caption, "pictures": len(items)}
            maps = feature_maps(sae, self.pictures.store, block, items, [feature])[:, 0]
            if written_by is None:
                row |= {
                    "specificity": mean_similarity(self.pictures.vectors(items)), "monosemanticity": mono,
                    "colour": colour_distance(self.pictures.pictures(items), maps.clamp_min(0)),
                    **(self._sensitivity(shares[:, number], caption) if shares is not None else {}),
                }  # fmt: skip
            rows.append(row | self._effects(steerer, block, feature, caption, items, maps))
        return pd.DataFrame(rows)

    def _held_out_shares(self, sae: SAE, block: str, features: Sequence[int]) -> Tensor | None:
        """Compute the share (N, F) of each of N held-out pictures in which F features are active."""
        if self._sentences is None or self._held_out is None:
            return None
        maps = feature_maps(sae, self._held_out, block, self._other, features)
        return active_shares(maps.flatten(0, 1)).view(maps.shape[:2])

    def _sensitivity(self, shares: Tensor, caption: str) -> dict[str, float]:
        """Compute how many near, and how many of all held-out pictures a feature is active in, by its shares (N,)."""
        near = []
        if caption:
            vector = self._sentences.embed_sentences([caption])[0]
            near = nearest_prompts(vector, self._other_vectors, self.config.prompts)
        found = {}
        for share in SHARES:
            above = (shares > share).double()
            found[f"sensitivity_{share:.0%}"] = above[near].mean().item() if near else float("nan")
            found[f"any_prompt_{share:.0%}"] = above.mean().item()
        return found

    def _effects(
        self, steerer: Steerer, block: str, feature: int, caption: str, items: Sequence[int], maps: Tensor
    ) -> dict[str, float]:
        """Compute the scores of steered pictures: texture, causality, inside and outside."""
        config, betas, reference = self.config, self.config.betas, items
        items, maps = items[: config.steered], maps[: config.steered]
        requests = [[activate_alone(block, feature, config.gamma)]]
        requests += [[modulate(block, feature, beta)] for beta in betas for _ in items]
        prompts = ["", *self.pictures.prompts(items) * len(betas)]
        seeds = [config.seed, *self.pictures.seeds(items) * len(betas)]
        alone, *changed = steerer.generate(
            prompts, requests, self.pictures.sampling, seeds, batch_size=config.batch_size
        ).split([1, *[len(items)] * len(betas)])
        vector = embed_in_batches(self.pictures.model, alone)[0]
        row = {"texture": self.texture(vector[None])[0], "causality": self._causality(vector, caption, reference)}
        for beta, after in zip(betas, changed, strict=True):
            inside, outside = local_change(self.pictures.pictures(items), after, maps)
            row |= {f"inside_{beta:g}": inside, f"outside_{beta:g}": outside}
        return row

    def texture(self, vectors: Tensor, *, leave_out: bool = False) -> list[float]:
        """Compute the similarity of pictures, given by their vectors (n, d), to textures.

        Args:
            vectors: the pictures' vectors.
            leave_out: the pictures are the textures themselves, so that each is compared only with the others.
        """
        if self._with_words:
            return (vectors @ self.pictures.model.embed_sentences(["texture"]).cpu()[0]).tolist()
        similar = vectors.double() @ self._textures.double().T
        if leave_out:
            count = len(self._textures)
            return ((similar.sum(1) - similar.diagonal()) / max(count - 1, 1)).tolist()
        return similar.mean(1).tolist()

    def _causality(self, vector: Tensor, caption: str, items: Sequence[int]) -> float:
        if not self._with_words:
            return (self.pictures.vectors(items) @ vector).double().mean().item()
        if not caption:
            return float("nan")
        return float(vector @ self.pictures.model.embed_sentences([caption]).cpu()[0])

    def baselines(self, same_prompts: int = 0) -> pd.DataFrame:
        """Score the paper's baselines.

        Args:
            same_prompts: the number of samples of pictures from one prompt and different seeds; each costs
                ``examples`` pictures. 0 leaves this baseline out.

        Returns:
            One row per sample: ``who`` and scores. ``random pictures``: samples of the pool. ``same prompt``: the
            specificity of pictures of one prompt. ``textures``: the texture score of each picture of a texture.
            ``empty prompt``: the texture score of the empty prompt's picture with nothing steered.
        """
        config, rng = self.config, np.random.default_rng(self.config.seed)
        rows: list[dict[str, Any]] = []
        for _ in range(config.samples):
            size = min(config.examples, len(self.pool))
            items = [self.pool[i] for i in rng.choice(len(self.pool), size, replace=False)]
            vectors, pictures = self.pictures.vectors(items), self.pictures.pictures(items)
            rows.append({
                "who": "random pictures", "specificity": mean_similarity(vectors),
                "texture": float(np.mean(self.texture(vectors))),
                "colour": colour_distance(pictures, torch.ones(len(items), 1, 1)),
            })  # fmt: skip
        chosen = [self.pool[i] for i in rng.choice(len(self.pool), min(same_prompts, len(self.pool)), replace=False)]
        for prompt in self.pictures.prompts(chosen):
            made = activations.generate_all(
                self._pipeline, [prompt] * config.examples, self.pictures.sampling, batch_size=config.batch_size,
                seed=config.seed,
            )  # fmt: skip
            similarity = mean_similarity(embed_in_batches(self.pictures.model, made))
            rows.append({"who": "same prompt", "specificity": similarity})
        rows += [{"who": "textures", "texture": one} for one in self.texture(self._textures, leave_out=True)]
        plain = activations.generate_all(self._pipeline, [""], self.pictures.sampling, seed=config.seed)
        vector = embed_in_batches(self.pictures.model, plain)
        rows.append({"who": "empty prompt", "texture": self.texture(vector)[0]})
        return pd.DataFrame(rows)


def load_textures(dataset: str = "", *, count: int = 100, resolution: int = 64, seed: int = 0) -> Tensor:
    """Load pictures of textures (T, 3, R, R) in [-1, 1]; the paper's are those of the Describable Textures Dataset.

    Args:
        dataset: a data set of :func:`vaelab.data.load_images`; empty means crops of :data:`TEXTURES`, photographs that
            come with scikit-image.
        count: the largest number of pictures.
        resolution: their side R, in pixels.
        seed: determines which pictures of a data set are chosen.
    """
    if dataset:
        return load_images(dataset, resolution=resolution, max_images=count, seed=seed).stack()
    crops = itertools.chain.from_iterable(zip(*map(bundled.photograph_crops, TEXTURES), strict=True))
    return torch.stack([square(crop, resolution) for crop in itertools.islice(crops, count)])


def choose_features(statistics: FeatureStatistics, count: int, least: int, seed: int = 0) -> list[int]:
    """Choose features at random among those that are active in at least ``least`` items, in rising order.

    Raises:
        ValueError: there is none.
    """
    active = (statistics.summary().active_items >= least).nonzero().flatten()
    if not len(active):
        raise ValueError(f"scored_features: no feature is active in {least} or more items")
    order = torch.randperm(len(active), generator=torch.Generator().manual_seed(seed))[:count]
    return active[order].sort().values.tolist()


def summarise_scores(scores: pd.DataFrame) -> pd.DataFrame:
    """Make Table 1: for each block and autoencoder, or each baseline, the mean of every score over features or samples,
    with its 95 % bootstrap interval, and the standard deviation.

    Args:
        scores: rows of :meth:`FeatureScorer.score` and :meth:`FeatureScorer.baselines`.

    Returns:
        Columns ``block`` (empty for baselines), ``who``, ``score``, ``mean``, ``low``, ``high``, ``deviation`` and
        ``count``; a single feature or sample has no interval and no deviation (NaN).
    """
    labels = ["block", "who", "feature", "caption", "pictures"]
    names = [name for name in scores.columns if name not in labels]
    long = scores.assign(block=scores["block"].fillna("")).melt(["block", "who"], names, "score", "value")
    rows = []
    for key, values in long.dropna(subset="value").groupby(["block", "who", "score"], sort=False)["value"]:
        row = dict(zip(("block", "who", "score"), key, strict=True)) | {"mean": values.mean()}
        row["low"] = row["high"] = float("nan")
        if len(values) > 1:  # distances are skewed, so that Student's interval could begin below 0
            drawn = np.random.default_rng(0).choice(values.to_numpy(), (RESAMPLES, len(values)))
            row["low"], row["high"] = np.quantile(drawn.mean(1), [0.025, 0.975])
        rows.append(row | {"deviation": values.std(), "count": len(values)})
    return pd.DataFrame(rows)


def paper_layout(table: pd.DataFrame) -> pd.DataFrame:
    """Lay out a table of :func:`summarise_scores` as the paper prints it, baselines last: ``mean (deviation)``, for
    each sensitivity the share of the prompts near the caption / of all prompts, and for each strength the distance
    inside / outside."""
    values = {(row["block"], row["who"], row["score"]): row for row in table.to_dict("records")}
    pairs = {"inside_": ("outside_", "beta ", 1), "sensitivity_": ("any_prompt_", "active > ", 2)}
    rows: dict[tuple[str, str], dict[str, str]] = {}
    for (block, who, score), row in values.items():
        own = rows.setdefault((block, who), {})
        kind = next((prefix for prefix in pairs if score.startswith(prefix)), None)
        if kind:
            prefix, heading, digits = pairs[kind]
            other = values.get((block, who, score.replace(kind, prefix)), {"mean": float("nan")})
            own[score.replace(kind, heading)] = f"{row['mean']:.{digits}f} / {other['mean']:.{digits}f}"
        elif not score.startswith(("outside_", "any_prompt_")):
            digits = 1 if score == "colour" else 2
            spread = f" ({row['deviation']:.{digits}f})" if row["count"] > 1 else ""
            own[score] = f"{row['mean']:.{digits}f}{spread}"
    ordered = sorted(rows, key=lambda key: not key[0])
    found = pd.DataFrame([{"block": block, "who": who, **rows[block, who]} for block, who in ordered]).fillna("")
    first = ["block", "who", "specificity", "monosemanticity", "colour", "texture", "causality"]
    first = [name for name in first if name in found.columns]
    return found[[*first, *(name for name in found.columns if name not in first)]]


def compare_with_paper(table: pd.DataFrame) -> pd.DataFrame:
    """Put the paper's numbers beside those of a table of :func:`summarise_scores`: ``block``, ``who``, ``score``,
    ``here``, ``paper`` (means), for the trained autoencoders of the paper's blocks and for its baselines."""
    rows = []
    for row in table.to_dict("records"):
        if row["who"] == "sae":
            areas_of = dict(zip(BETAS, PAPER_LOCALITY.get(row["block"], ()), strict=False))
            known = {name: mean for name, (mean, _) in PAPER_TABLE_1.get(row["block"], {}).items()}
            known |= {f"inside_{beta:g}": inside for beta, (inside, _) in areas_of.items()}
            known |= {f"outside_{beta:g}": outside for beta, (_, outside) in areas_of.items()}
        else:
            baseline = {} if row["block"] else PAPER_TABLE_1.get(row["who"], {})
            known = {name: mean for name, (mean, _) in baseline.items()}
        if row["score"] in known:
            labels = {name: row[name] for name in ("block", "who", "score")}
            rows.append({**labels, "here": row["mean"], "paper": known[row["score"]]})
    return pd.DataFrame(rows, columns=["block", "who", "score", "here", "paper"])


def table_metrics(table: pd.DataFrame) -> dict[str, float]:
    """Collect the metrics ``<block>.<score>.<who>``, and ``baseline.<score>.<who>`` without a block."""
    return {
        f"{row['block'] or 'baseline'}.{row['score']}.{row['who'].replace(' ', '_')}": row["mean"]
        for row in table.to_dict("records")
    }
