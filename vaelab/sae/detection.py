"""How well single features find known concepts: F1, AUROC and overlap with masks, with intervals.

A concept is a factor value of the scene world, such as a red colour, or a planted direction. For every concept the best
single feature and its threshold are chosen on one half of the scenes and reported on the other. A patch shows a concept
if at least half of it is covered.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd
import scipy.sparse
import torch
from torch import Tensor

from vaelab.core.validate import at_least
from vaelab.sae.controls import Readout
from vaelab.world.scenes import FACTORS, SCENE_FACTORS, THING_FACTORS, Scene

COVERED = 0.8
"""A concept is covered if the F1 of its best feature is above this."""
SHARING = 0.9
"""A feature shares a concept if its F1 is at least this fraction of the best feature's, and above that of marking every
patch."""
SCORES = ("f1", "coverage", "iou", "auroc", "picture_f1", "picture_auroc", "sharing")


class LabelledVectors(NamedTuple):
    """The vectors of a block in S scenes of P patches, and what is true of them."""

    vectors: Tensor
    """(S, P, d)."""
    covered: np.ndarray
    """(S, P, V) float32 in [0, 1]: the share of each patch that each of the V concepts covers."""
    concepts: tuple[str, ...]
    """The names of the V concepts."""

    @property
    def labels(self) -> np.ndarray:
        """(S P, V) bool: whether a patch shows a concept."""
        return (self.covered >= 0.5).reshape(-1, len(self.concepts))

    @property
    def flat(self) -> Tensor:
        """The vectors as (S P, d)."""
        return self.vectors.flatten(0, 1)


class Halves(NamedTuple):
    """The scenes in two halves."""

    choosing: LabelledVectors
    """Dictionaries are fitted, and features and thresholds chosen, on these."""
    reporting: LabelledVectors
    """Scores are computed on these."""


def factor_values() -> list[tuple[str, str]]:
    """List the pairs of factor and value of the scene world."""
    return [(factor, value) for factor, values in FACTORS.items() for value in values]


def factor_coverage(scenes: Sequence[Scene], height: int, width: int) -> np.ndarray:
    """Compute the share of each patch that shows each factor value: (S, height width, V) float32.

    A value of an object covers the object's mask, a value of the ground the ground's mask; V and the order of the
    values are those of :func:`factor_values`.

    Raises:
        ValueError: the picture's side is not a multiple of height and width.
    """
    number = {pair: i for i, pair in enumerate(factor_values())}
    covered = np.zeros((len(scenes), height * width, len(number)), np.float32)
    for row, scene in zip(covered, scenes, strict=True):
        masks = scene.masks()
        side = masks.shape[-1]
        if side % height or side % width:
            raise ValueError(f"blocks: maps of {height} x {width} patches do not divide pictures of {side} pixels")
        shares = masks.reshape(len(masks), height, side // height, width, side // width).mean((2, 4), np.float32)
        for mask, thing in zip(shares.reshape(len(masks), -1), [*scene.things, scene], strict=True):
            for factor in SCENE_FACTORS if thing is scene else THING_FACTORS:
                row[:, number[factor, getattr(thing, factor)]] += mask
    return covered


def split_halves(vectors: Tensor, covered: np.ndarray, concepts: Sequence[str]) -> Halves:
    """Split S scenes in two halves, and leave out concepts that no patch of one half shows or that all show.

    Raises:
        ValueError: there are fewer than two scenes, or no concept is left.
    """
    at_least("max_images", len(vectors), 2)
    middle = len(vectors) // 2
    shown = [(part >= 0.5).mean((0, 1)) for part in (covered[:middle], covered[middle:])]
    kept = np.flatnonzero(np.all([(share > 0) & (share < 1) for share in shown], 0))
    if not len(kept):
        raise ValueError(f"max_images: of {len(vectors)} scenes both halves show no concept; take more")
    names = tuple(concepts[i] for i in kept)
    parts = ((vectors[:middle], covered[:middle]), (vectors[middle:], covered[middle:]))
    return Halves(*(LabelledVectors(x, np.ascontiguousarray(share[..., kept]), names) for x, share in parts))


class _Ranked(NamedTuple):
    """The scores of one feature, sorted, at the examples that show a concept; E entries, grouped by concept."""

    at_least: np.ndarray
    """(E,) the number of examples whose score is at least the entry's; falling scores within a concept."""
    at_most: np.ndarray
    """(E,) the number of examples whose score is at most the entry's."""
    true: np.ndarray
    """(E,) the number of the concept's entries up to this one."""
    ends: np.ndarray
    """(V + 1,) where the entries of each concept begin and end."""
    scores: np.ndarray
    """(E,)."""


def _ranked(scores: np.ndarray, labels: scipy.sparse.csr_array, *, skip_least: bool) -> _Ranked:
    """Rank scores (N,). With ``skip_least`` entries with the least score, most of an autoencoder's, are left out."""
    rows = np.flatnonzero(scores > scores.min()) if skip_least else np.arange(len(scores))
    order = rows[np.argsort(-scores[rows])]
    ordered = scores[order]
    new = np.append(True, ordered[1:] != ordered[:-1]) if len(order) else np.zeros(0, bool)
    starts = np.flatnonzero(new)
    group = np.cumsum(new) - 1
    last = np.append(starts[1:], len(order))
    shown = labels[order].tocsc()
    shown.sort_indices()
    place, ends = shown.indices, shown.indptr
    true = np.arange(len(place)) - np.repeat(ends[:-1], np.diff(ends)) + 1
    return _Ranked(last[group[place]], len(scores) - starts[group[place]], true, ends, ordered[place])


def _largest(values: np.ndarray, ends: np.ndarray) -> np.ndarray:
    """Compute the maximum of each group of values: (V,); 0 for an empty group."""
    out, filled = np.zeros(len(ends) - 1), np.flatnonzero(np.diff(ends))
    if len(filled):
        out[filled] = np.maximum.reduceat(values, ends[:-1][filled])
    return out


def best_f1(scores: np.ndarray, labels: np.ndarray, *, signed: bool) -> tuple[np.ndarray, np.ndarray]:
    """Compute every feature's F1 at its best threshold, and its AUROC, for every concept.

    F1 = 2 TP / (2 TP + FP + FN) of the examples whose score is at or above the threshold. The threshold may be so low
    that all examples are found. With ``signed``, the features with the opposite sign follow as further columns.

    Args:
        scores: (N, m).
        labels: (N, V) bool; every concept has examples that show it and others.
        signed: whether the opposite sign counts too.

    Returns:
        F1 and AUROC, (V, m) each, or (V, 2 m) if signed.
    """
    count, shown = len(scores), labels.sum(0)
    sparse = scipy.sparse.csr_array(labels)
    everything = f1_of_marking_all(shown, count)
    f1, auroc = [], []
    down = []
    for column in scores.T:
        ranked = _ranked(column, sparse, skip_least=not signed)
        positive = np.repeat(shown, np.diff(ranked.ends))
        f1.append(np.maximum(everything, _largest(2 * ranked.true / (ranked.at_least + positive), ranked.ends)))
        if signed:
            true = np.repeat(np.diff(ranked.ends), np.diff(ranked.ends)) - ranked.true + 1
            found = 2 * true / (ranked.at_most + positive)
            down.append(np.maximum(everything, _largest(found, ranked.ends)))
        rank = (ranked.at_most + count - ranked.at_least + 1) / 2  # rising, of ties the mean
        sums = np.append(0, np.cumsum(rank))
        left = count - int((column > column.min()).sum()) if not signed else 0  # they share the lowest ranks
        total = np.diff(sums[ranked.ends]) + (shown - np.diff(ranked.ends)) * (left + 1) / 2
        auroc.append((total - shown * (shown + 1) / 2) / (shown * (count - shown)))
    area = np.array(auroc).T
    return np.array(f1 + down).T, np.concatenate([area, 1 - area], 1) if signed else area


def f1_of_marking_all(shown: np.ndarray, count: int) -> np.ndarray:
    """Compute the F1 of marking all of ``count`` examples, of which ``shown`` (V,) show a concept."""
    return 2 * shown / (count + shown)


def best_threshold(scores: np.ndarray, shown: np.ndarray) -> float:
    """Find the threshold of scores (N,) with the largest F1 for one concept, shown (N,) bool."""
    ranked = _ranked(scores, scipy.sparse.csr_array(shown[:, None]), skip_least=False)
    f1 = 2 * ranked.true / (ranked.at_least + shown.sum())
    best = int(f1.argmax())
    everything = f1_of_marking_all(shown.sum(), len(scores))
    return float(ranked.scores[best]) if f1[best] > everything else float(scores.min())


class Detection(NamedTuple):
    """What one readout finds; made by :func:`detect`."""

    table: pd.DataFrame
    """One row per concept: ``concept``; ``feature``, ``sign`` and ``threshold``, chosen by F1 per patch; ``chosen_f1``
    in the half they were chosen in; ``sharing``, the number of features with at least :data:`SHARING` of that F1
    there; and in the other half ``f1``, ``auroc``, ``iou``, ``picture_f1`` and ``picture_auroc``."""
    patches: np.ndarray
    """(S, V, 3) true positives, false positives and false negatives per scene."""
    pictures: np.ndarray
    """(S, V, 3) the same for whole pictures."""
    overlap: np.ndarray
    """(S, V) overlap with the concept's mask; NaN where the scene does not show it."""
    feature_gain: np.ndarray
    """(m,) in the half in which features are chosen: for each feature its largest gain in F1 over marking every patch,
    over the concepts."""


def detect(readout: Readout, halves: Halves) -> Detection:
    """Choose the best feature of a readout for every concept on one half of the scenes; score it on the other.

    Per picture, a feature's score is its maximum or its mean over the patches (Surkov et al., equation 9), whichever is
    better in the first half. The overlap (IoU) is that of the marked patches, scaled up to pixels, with the concept's
    mask, in every scene that shows the concept. The AUROC is that of the feature with the best AUROC in the first half,
    since it needs no threshold.
    """
    first, second = halves
    scores = _scores(readout, first)
    found, areas = best_f1(scores, first.labels, signed=readout.signed)
    m, choice, by_area = scores.shape[1], found.argmax(1), areas.argmax(1)
    signs = np.where(choice < m, 1, -1)
    thresholds = [
        best_threshold(sign * scores[:, column], shown)
        for column, sign, shown in zip(choice % m, signs, first.labels.T, strict=True)
    ]
    later = _scores(readout, second)
    at = later[:, choice % m] * signs >= np.array(thresholds, np.float32)
    ranked = later[:, by_area % m] * np.where(by_area < m, 1, -1)
    pictures, picture_auroc = _detect_pictures(readout, scores, later, halves)
    size = second.covered.shape
    patches, overlap = count_errors(at.reshape(size), second.labels.reshape(size)), _overlap(at.reshape(size), second)
    with np.errstate(invalid="ignore"):
        iou = np.nanmean(overlap, 0)
    shown = first.labels.sum(0)
    everything = f1_of_marking_all(shown, len(scores))
    sharing = (found >= SHARING * found.max(1, keepdims=True)) & (found > everything[:, None])
    table = pd.DataFrame({
        "concept": second.concepts, "feature": choice % m, "sign": signs, "threshold": thresholds,
        "chosen_f1": found.max(1), "sharing": sharing.sum(1),
        "f1": pooled_f1(patches.sum(0)), "auroc": _auroc(ranked, second.labels), "iou": iou,
        "picture_f1": pooled_f1(pictures.sum(0)), "picture_auroc": picture_auroc,
    })  # fmt: skip
    features = (found - everything[:, None]).reshape(len(found), -1, m).max((0, 1))
    return Detection(table, patches, pictures, overlap, features)


def _scores(readout: Readout, part: LabelledVectors) -> np.ndarray:
    with torch.no_grad():
        return readout.scores(part.flat).numpy()


def _detect_pictures(
    readout: Readout, first: np.ndarray, second: np.ndarray, halves: Halves
) -> tuple[np.ndarray, np.ndarray]:
    """Choose and score by whole pictures; return the counts (S, V, 3) and the AUROC (V,)."""
    pooled, shown = [], []
    for scores, part in ((first, halves.choosing), (second, halves.reporting)):
        maps = scores.reshape(*part.covered.shape[:2], -1)
        each = (
            [maps.max(1), maps.mean(1), -maps.min(1), -maps.mean(1)] if readout.signed else [maps.max(1), maps.mean(1)]
        )
        pooled.append(np.concatenate(each, 1))
        shown.append((part.covered > 0).any(1))
    usable = shown[0].any(0) & ~shown[0].all(0)
    found, areas = best_f1(pooled[0], shown[0][:, usable], signed=False)
    counts = np.zeros((*shown[1].shape, 3), int)
    area = np.full(shown[1].shape[1], np.nan)
    for number, f1, by_area in zip(np.flatnonzero(usable), found, areas, strict=True):
        best = pooled[0][:, f1.argmax()]
        at = pooled[1][:, [f1.argmax()]] >= best_threshold(best, shown[0][:, number])
        counts[:, number] = count_errors(at[:, None], shown[1][:, None, [number]])[:, 0]
        area[number] = _auroc(pooled[1][:, [by_area.argmax()]], shown[1][:, [number]])[0]
    return counts, area


def count_errors(found: np.ndarray, shown: np.ndarray) -> np.ndarray:
    """Count true positives, false positives and false negatives per scene and concept: (S, V, 3).

    Args:
        found: (S, P, V) bool.
        shown: (S, P, V) bool.
    """
    both = (found & shown).sum(1)
    return np.stack([both, found.sum(1) - both, shown.sum(1) - both], -1)


def pooled_f1(counts: np.ndarray) -> np.ndarray:
    """Compute 2 TP / (2 TP + FP + FN) from counts (..., 3); NaN where all of them are 0."""
    true, false, missed = np.moveaxis(np.asarray(counts, float), -1, 0)
    with np.errstate(invalid="ignore"):
        return 2 * true / (2 * true + false + missed)


def _overlap(found: np.ndarray, part: LabelledVectors) -> np.ndarray:
    """Compute the intersection over the union of found patches (S, P, V) and masks, in pixels: (S, V)."""
    both = (found * part.covered).sum(1)
    union = found.sum(1) + part.covered.sum(1) - both
    shown = (part.covered > 0).any(1)
    return np.where(shown, both / np.where(union > 0, union, 1), np.nan)


def _auroc(scores: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Compute the AUROC of scores (N, V), each for its own concept: (V,); NaN where a concept always or never shows."""
    from scipy.stats import rankdata

    shown = labels.sum(0)
    total = np.where(labels, rankdata(scores, axis=0), 0).sum(0)
    with np.errstate(invalid="ignore", divide="ignore"):
        return (total - shown * (shown + 1) / 2) / (shown * (len(scores) - shown))


class Summary(NamedTuple):
    """All readouts compared; made by :func:`summarise`."""

    table: pd.DataFrame
    """One row per method: ``method``, ``seeds``, each of :data:`SCORES` as mean over concepts and seeds;
    ``<score>_low`` and ``<score>_high``, the 95 % interval over scenes and seeds, for ``f1``, ``iou`` and
    ``picture_f1``; ``f1_least_seed`` and ``f1_best_seed``; and ``ahead``, ``ahead_low``, ``ahead_high``: the F1 of the
    trained autoencoder minus the method's, on the same scenes. Scores per picture are NaN if every picture shows every
    concept."""
    resamples: dict[str, np.ndarray]
    """(B,) the mean F1 of each method in every resample of scenes and seeds."""


def summarise(found: Mapping[str, Sequence[Detection]], *, resamples: int = 500, seed: int = 0) -> Summary:
    """Compare readouts by their mean over concepts, with bootstrap intervals over scenes and seeds.

    A resample draws as many scenes as there are, with replacement, the same ones for every method, and as many seeds
    of each method.

    Args:
        found: the detections of each method, one per seed; ``sae`` is what the others are compared with.
        resamples: the number of resamples.
        seed: determines them.
    """
    rng = np.random.default_rng(seed)
    scenes = len(next(iter(found.values()))[0].patches)
    weights = rng.multinomial(scenes, np.full(scenes, 1 / scenes), resamples).astype(float)
    drawn = {name: _resampled(own, weights, rng) for name, own in found.items()}
    rows = []
    for name, own in found.items():
        tables = [each.table for each in own]
        covered = [(table["f1"] > COVERED).mean() for table in tables]
        seeds = [table["f1"].mean() for table in tables]
        row = {"method": name, "seeds": len(own)}
        row |= {score: np.mean([table[score].mean() for table in tables]) for score in SCORES if score != "coverage"}
        row |= {"coverage": np.mean(covered), "f1_least_seed": min(seeds), "f1_best_seed": max(seeds)}
        for score, values in drawn[name].items():
            row[f"{score}_low"], row[f"{score}_high"] = np.nanquantile(values, [0.025, 0.975])
        if "sae" in drawn:
            ahead = drawn["sae"]["f1"] - drawn[name]["f1"]
            row["ahead"] = np.mean([each.table["f1"].mean() for each in found["sae"]]) - row["f1"]
            row["ahead_low"], row["ahead_high"] = np.quantile(ahead, [0.025, 0.975])
        rows.append(row)
    return Summary(pd.DataFrame(rows), {name: each["f1"] for name, each in drawn.items()})


def _resampled(own: Sequence[Detection], weights: np.ndarray, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Compute the scores of one method in every resample: (B,) each."""
    seeds = rng.multinomial(len(own), np.full(len(own), 1 / len(own)), len(weights)) / len(own)
    parts: dict[str, list[np.ndarray]] = {"f1": [], "iou": [], "picture_f1": []}
    for each in own:
        for score, counts in (("f1", each.patches), ("picture_f1", each.pictures)):
            summed = (weights @ counts.reshape(len(counts), -1)).reshape(len(weights), -1, 3)
            parts[score].append(_mean_over_concepts(pooled_f1(summed)))
        seen = ~np.isnan(each.overlap)
        with np.errstate(invalid="ignore"):
            parts["iou"].append(_mean_over_concepts(weights @ np.nan_to_num(each.overlap) / (weights @ seen)))
    return {score: (np.array(values).T * seeds).sum(1) for score, values in parts.items()}


def _mean_over_concepts(values: np.ndarray) -> np.ndarray:
    """Average (B, V) over the concepts that are defined; 0 where none is."""
    defined = ~np.isnan(values)
    return np.nan_to_num(values).sum(1) / np.maximum(defined.sum(1), 1)
