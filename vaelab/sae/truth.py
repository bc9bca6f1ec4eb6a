"""Trained autoencoders and their controls compared where the truth is known: factors of the scene world, and planted
directions.

A benchmark on which an autoencoder cannot win says nothing when it loses. So the same comparison is made with a known
sparse dictionary planted into a block's update, and with the update projected to fewer dimensions than there are
concepts.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment
from scipy.stats import spearmanr
from torch import Tensor
from tqdm.auto import tqdm

from vaelab import world
from vaelab.activations import from_pictures
from vaelab.core.validate import at_least, one_of
from vaelab.sae.controls import LinearReadout, Readout, SAEReadout, explained_variance, linear_readouts, train_readouts
from vaelab.sae.detection import (
    Detection,
    Halves,
    Summary,
    best_f1,
    best_threshold,
    count_errors,
    detect,
    f1_of_marking_all,
    factor_coverage,
    factor_values,
    pooled_f1,
    split_halves,
    summarise,
)
from vaelab.sae.model import SAE, VARIANTS, SAEConfig
from vaelab.training import TrainConfig

METRIC_SCORES = ("f1", "coverage", "iou", "auroc", "picture_f1")
"""Scores that become metrics ``<block>.truth.<score>.<method>``."""
RIVALS = {"neurons": "neurons", "pca": "PCA", "ica": "ICA", "frozen_decoder": "a frozen decoder"}
"""What an autoencoder must beat to be worth its training, with names for sentences."""
COMPARED = {**RIVALS, "soft_frozen": "a soft-frozen decoder", "random": "random directions"}
"""What :func:`verdict` compares it with."""


@dataclass(frozen=True)
class ComparisonSetting:
    """How autoencoders are trained and compared with their controls."""

    k: int
    """Active features per vector."""
    n_features: int
    """Features of an autoencoder, and random directions."""
    train: TrainConfig
    """The optimisation."""
    batch_size: int
    """Vectors per step."""
    seeds: tuple[int, ...] = (0,)
    """Seeds of the autoencoders and of the controls that have one."""
    kind: str = "topk"
    """The ``variant`` of :class:`vaelab.sae.model.SAEConfig`."""
    variants: tuple[str, ...] = ()
    """Further variants."""
    resamples: int = 500
    """Bootstrap resamples of the intervals."""
    options: dict[str, Any] = field(default_factory=dict)
    """Further fields of :class:`vaelab.sae.model.SAEConfig`."""

    def __post_init__(self) -> None:
        if not self.seeds or len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"seeds: expected one or more different numbers, got {list(self.seeds)}")
        one_of("kind", self.kind, VARIANTS)
        for name in self.variants:
            one_of("other_kinds", name, VARIANTS)
        self.sae(1)

    def sae(self, d: int) -> SAEConfig:
        """Specify the autoencoder for vectors of width d."""
        return SAEConfig(d, self.n_features, self.k, self.kind, **self.options)


class Compared(NamedTuple):
    """Result of :func:`compare`."""

    summary: Summary
    """The scores of every method."""
    found: dict[str, list[Detection]]
    """What every method finds, one detection per seed."""
    readouts: dict[str, list[Readout]]
    """The methods' readouts, one per seed."""
    explained: dict[str, float]
    """The explained variance of every autoencoder, on the half of the scenes that it was not trained on."""


def capture_scenes(
    pipeline: Any, scenes: Sequence[world.Scene], blocks: Sequence[str], timestep: int, *, batch_size: int, seed: int
) -> dict[str, Tensor]:
    """Capture the updates of blocks in one pass over noised pictures of scenes, each with its own prompt.

    Returns:
        For each block (S, h, w, d), on the CPU.
    """
    parts: dict[str, list[Tensor]] = {block: [] for block in blocks}
    for first in tqdm(range(0, len(scenes), batch_size), desc="updates"):
        batch = scenes[first : first + batch_size]
        seeds = range(seed + first, seed + first + len(batch))
        prompts = [scene.prompt for scene in batch]
        maps = from_pictures(
            pipeline, world.render(batch).to(pipeline.device), list(seeds), [timestep], blocks, prompts=prompts,
            side="update",
        ).maps  # fmt: skip
        for block in blocks:
            parts[block].append(maps[block][0].float().cpu())
    return {block: torch.cat(each) for block, each in parts.items()}


def label_factors(maps: Tensor, scenes: Sequence[world.Scene]) -> Halves:
    """Label the maps (S, h, w, d) of scenes with their factor values, and split them in two halves."""
    covered = factor_coverage(scenes, *maps.shape[1:3])
    return split_halves(maps.flatten(1, 2), covered, [f"{factor}: {value}" for factor, value in factor_values()])


def validate_controls(width: int, planted: Sequence[int], active: int, dimensions: Sequence[int]) -> None:
    """Raise ValueError unless ``active`` of each number of ``planted`` features can be active, and vectors of this
    width can be projected to each number of ``dimensions``."""
    for count in planted:
        at_least("planted", count, active)
    for d in dimensions:
        if not 1 <= d <= width:
            raise ValueError(f"dimensions: expected numbers from 1 to the vectors' width {width}, got {d}")


def plant(maps: Tensor, count: int, *, active: int, strength: float, scored: int, seed: int) -> Halves:
    """Add a known sparse dictionary to maps (S, h, w, d), and label which of its features are active where.

    Every vector gets ``active`` different features at random, with amounts uniform in [0.5, 1.5]. The random directions
    of unit length are scaled so that the variance of what is added is ``strength`` times that of the maps.

    Args:
        maps: a block's update.
        count: the number of planted features.
        active: active features per vector.
        strength: ratio of the variances.
        scored: the number of features that become concepts, the first ones; more cost time only.
        seed: determines directions and amounts.
    """
    generator = torch.Generator().manual_seed(20_000 + seed)
    x = maps.flatten(0, -2)
    directions = F.normalize(torch.randn(count, x.shape[1], generator=generator))
    which = torch.rand(len(x), count, generator=generator).topk(active).indices
    amounts = 0.5 + torch.rand(len(x), active, generator=generator)
    added = F.embedding_bag(which, directions, mode="sum", per_sample_weights=amounts)
    scale = (strength * x.var(0).sum() / added.var(0).sum()).sqrt()
    shown = torch.zeros(len(x), count).scatter_(1, which, 1.0)[:, : min(scored, count)].numpy()
    vectors = (x + scale * added).view(len(maps), -1, x.shape[1])
    return split_halves(vectors, shown.reshape(*vectors.shape[:2], -1), [f"planted {i}" for i in range(shown.shape[1])])


def features_against_truth(sae: SAE, halves: Halves, seed: int = 0) -> pd.DataFrame:
    """Measure how well each feature detects a known factor value, such as red or star, in the world's scenes.

    On one half of the scenes, the value and the threshold are chosen whose F1 most exceeds the F1 of calling every
    patch positive. The reported F1 is that of the other half. The control is the F1 of the best of n random directions
    for the same value, n being the number of features, chosen and scored on the same halves
    (:func:`vaelab.sae.detection.detect`).

    Args:
        sae: the autoencoder.
        halves: the vectors of the scenes' patches with their factor values, split by scene into two halves, see
            :func:`label_factors`.
        seed: the seed of the random directions.

    Returns:
        One row per feature with ``feature``, ``value``, ``f1`` and ``control``; features that on the first half are no
        better than calling every patch positive are left out.
    """
    readout, (first, second) = SAEReadout(sae), halves
    scores, later = (readout.scores(half.flat).cpu().numpy() for half in halves)
    found, _ = best_f1(scores, first.labels, signed=False)  # (V, n)
    shown = first.labels.sum(0)
    gain = found - f1_of_marking_all(shown, len(scores))[:, None]
    best = gain.argmax(0)
    generator = torch.Generator().manual_seed(20_000 + seed)
    random = F.normalize(torch.randn(len(best), sae.config.d, generator=generator))
    control = detect(LinearReadout(random, first.flat.mean(0)), halves).table["f1"].to_numpy()
    rows = []
    for feature in np.flatnonzero(gain.max(0) > 0).tolist():
        value = best[feature]
        at = later[:, feature] >= np.float32(best_threshold(scores[:, feature], first.labels[:, value]))
        errors = count_errors(at[None, :, None], second.labels[None, :, [value]])[0, 0]
        rows.append({"feature": feature, "value": second.concepts[value], "f1": float(pooled_f1(errors)),
                     "control": float(control[value])})  # fmt: skip
    return pd.DataFrame(rows, columns=["feature", "value", "f1", "control"])


def project(halves: Halves, d: int, seed: int) -> Halves:
    """Project vectors at random to d dimensions, at most their width, by orthonormal directions; the labels stay."""
    width = halves.choosing.vectors.shape[-1]
    generator = torch.Generator().manual_seed(30_000 + seed)
    directions = torch.linalg.qr(torch.randn(width, d, generator=generator)).Q
    return Halves(*(half._replace(vectors=half.vectors @ directions) for half in halves))


def compare(halves: Halves, setting: ComparisonSetting) -> Compared:
    """Train autoencoders and their controls on one half of the scenes, and score everything on the other.

    All of them choose their best feature and threshold for every concept on the half that they were trained on. The
    method ``everything`` has one feature that is always 0, so that it marks every patch.
    """
    x = halves.choosing.flat
    trained = train_readouts(
        x, setting.sae(x.shape[1]), setting.train, setting.batch_size, setting.seeds, setting.variants
    )
    readouts = {**trained, **linear_readouts(x, halves.choosing.labels, setting.n_features, setting.seeds[0])}
    readouts["everything"] = [LinearReadout(torch.zeros(1, x.shape[1]), x.mean(0), signed=False)]
    found = {name: [detect(each, halves) for each in own] for name, own in readouts.items()}
    summary = summarise(found, resamples=setting.resamples)
    return Compared(summary, found, readouts, explained_variance(trained, halves.reporting.flat))


def compare_settings(halves: Halves, settings: Mapping[str, ComparisonSetting]) -> pd.DataFrame:
    """Train the autoencoder alone in several settings, to see whether more steps, another k or another size help.

    Returns:
        One row per setting: ``setting``, ``k``, ``n_features``, ``steps``, ``f1``, ``f1_low``, ``f1_high`` and
        ``explained_variance``.
    """
    rows = []
    for name, setting in settings.items():
        x = halves.choosing.flat
        own = train_readouts(x, setting.sae(x.shape[1]), setting.train, setting.batch_size, setting.seeds, frozen=False)
        found = {"sae": [detect(each, halves) for each in own["sae"]]}
        row = summarise(found, resamples=setting.resamples).table.iloc[0]
        rows.append({
            "setting": name, "k": setting.k, "n_features": setting.n_features, "steps": setting.train.steps,
            **row[["f1", "f1_low", "f1_high"]],
            "explained_variance": explained_variance(own, halves.reporting.flat)["sae"],
        })  # fmt: skip
    return pd.DataFrame(rows)


def train_without_truth(
    maps: Tensor, setting: ComparisonSetting
) -> tuple[dict[str, list[SAEReadout]], dict[str, float]]:
    """Train autoencoders and their frozen controls on the first half of maps (S, h, w, d) of which no truth is known.

    Returns:
        The readouts by name, one per seed; and their explained variance on the second half.
    """
    first, second = (half.flatten(0, -2) for half in (maps[: len(maps) // 2], maps[len(maps) // 2 :]))
    trained = train_readouts(
        first, setting.sae(maps.shape[-1]), setting.train, setting.batch_size, setting.seeds, setting.variants
    )
    return trained, explained_variance(trained, second)


class Stability(NamedTuple):
    """Whether features are found again from other seeds; made by :func:`stability`."""

    matched: float
    """Mean cosine of matched features, over pairs of seeds."""
    untrained: float
    """The same of the initial weights."""
    features: pd.DataFrame
    """One row per feature of the first seed that is ever active: ``feature``, ``cosine`` (the mean of its matches) and,
    where the truth is known, ``gain`` (:attr:`vaelab.sae.detection.Detection.feature_gain`)."""
    correlation: float
    """Spearman's rank correlation of ``cosine`` and ``gain``; 0 if one of them is constant or the truth is unknown."""


def stability(
    readouts: Mapping[str, Sequence[SAEReadout]], vectors: Tensor, feature_gain: np.ndarray | None = None
) -> Stability:
    """Match the features of autoencoders of different seeds one to one, such that the sum of cosines is largest.

    Args:
        readouts: ``sae`` and ``untrained``, one readout per seed.
        vectors: (N, d), on which features count as active.
        feature_gain: (m,) the gains in F1 of the first seed's features; None if the truth is unknown.

    Raises:
        ValueError: there are fewer than two seeds.
    """
    own = readouts["sae"]
    if len(own) < 2:
        raise ValueError(f"seeds: stability needs at least two, got {len(own)}")
    cosines = {name: _matched(readouts[name]) for name in ("sae", "untrained")}
    first = np.mean([cosines["sae"][0, other] for other in range(1, len(own))], 0)
    table = pd.DataFrame({"feature": range(len(first)), "cosine": first})
    if feature_gain is not None:
        table["gain"] = feature_gain
    table = table[(own[0].scores(vectors) > 0).any(0).numpy()].reset_index(drop=True)
    varied = "gain" in table and len(table) > 1 and table[["cosine", "gain"]].nunique().min() > 1
    correlation = float(spearmanr(table["cosine"], table["gain"]).statistic) if varied else 0.0
    means = [float(np.mean(list(each.values()))) for each in cosines.values()]
    return Stability(*means, table, correlation)


def _matched(own: Sequence[Readout]) -> dict[tuple[int, int], np.ndarray]:
    """Compute, for each pair of seeds, the cosine of every feature of the first with its match in the second."""
    found = {}
    for a in range(len(own)):
        for b in range(a + 1, len(own)):
            cosines = (own[a].directions @ own[b].directions.T).numpy()
            rows, columns = linear_sum_assignment(-cosines)
            found[a, b] = cosines[rows, columns]
    return found


def scores_metrics(place: str, table: pd.DataFrame) -> dict[str, float]:
    """Collect the metrics ``<place>.<score>.<method>`` from a table of :func:`vaelab.sae.detection.summarise`, with the
    ends of F1's interval as ``f1_low`` and ``f1_high``; undefined scores are left out."""
    return {
        f"{place}.{score}.{row['method']}": row[score]
        for row in table.to_dict("records")
        for score in (*METRIC_SCORES, "f1_low", "f1_high")
        if np.isfinite(row[score])
    }


def stack_tables(compared: Mapping[Any, Compared], column: str) -> pd.DataFrame:
    """Stack the tables of several comparisons, with their keys in a first column."""
    tables = [each.summary.table.assign(**{column: key}) for key, each in compared.items()]
    stacked = pd.concat(tables, ignore_index=True)
    return stacked[[column, *(name for name in stacked if name != column)]]


def f1_interval(compared: Mapping[Any, Compared], method: str) -> tuple[float, float]:
    """Compute the 95 % interval of a method's F1 averaged over blocks, whose resamples hold the same scenes."""
    values = np.mean([each.summary.resamples[method] for each in compared.values()], 0)
    low, high = np.quantile(values, [0.025, 0.975])
    return float(low), float(high)


def f1_by_factor(compared: Compared) -> pd.DataFrame:
    """Average F1 over seeds and the values of each factor: one row per method, one column per factor."""
    rows = {}
    for name, own in compared.found.items():
        table = pd.concat([each.table for each in own])
        rows[name] = table.groupby(table["concept"].str.split(":").str[0], sort=False)["f1"].mean()
    return pd.DataFrame(rows).T


def standing(row: Mapping[str, float]) -> str:
    """Say whether the trained autoencoder is ``ahead of`` a method, ``behind`` it or ``level with`` it: the interval of
    the difference in F1 lies above 0, below 0, or holds 0."""
    return "ahead of" if row["ahead_low"] > 0 else "behind" if row["ahead_high"] < 0 else "level with"


def verdict(table: pd.DataFrame, key: str) -> str:
    """Say in two sentences how the trained autoencoder compares with :data:`COMPARED`: in how many blocks its F1 is
    ahead, and in how many behind, see :func:`standing`.

    Args:
        table: the columns of :func:`vaelab.sae.detection.summarise`, and ``key``, which names the comparisons.
        key: the column of the comparisons, such as ``block``.
    """
    rivals = table[table["method"].isin(COMPARED)]
    standings, count = rivals.apply(standing, axis=1), table[key].nunique()
    ahead, behind = (
        _grouped((standings == word).groupby(rivals["method"], sort=False).sum()) for word in ("ahead of", "behind")
    )
    parts = [f"of {names} in {number or 'none'}" for number, names in ahead.items()]
    parts[0] += f" of {count} {key}s"
    losses = _listed([f"{names} in {number}" for number, names in behind.items() if number])
    means = table.groupby("method")["f1"].mean()
    best = means[list(RIVALS)].idxmax()
    return (
        f"The best single features of a trained autoencoder have a mean F1 of {means['sae']:.2f}, those of "
        f"{RIVALS[best]} {means[best]:.2f}. The autoencoder is ahead {', '.join(parts)}"
        + (f"; it is behind {losses}." if losses else "; it is behind none of them.")
    )


def _grouped(numbers: pd.Series) -> dict[int, str]:
    """List methods that have the same number, largest number first."""
    names = {number: [COMPARED[name] for name in own.index] for number, own in numbers.groupby(numbers)}
    return {int(number): _listed(names[number]) for number in sorted(names, reverse=True)}


def _listed(names: list[str]) -> str:
    return " and ".join([", ".join(names[:-1])] * (len(names) > 1) + names[-1:])


def worth_from(table: pd.DataFrame) -> float | None:
    """Find the number of concepts per dimension from which on the trained autoencoder is ahead of all of
    :data:`RIVALS`; None if it is not ahead at the largest.

    Args:
        table: the columns of :func:`vaelab.sae.detection.summarise`, and ``concepts_per_dimension``.
    """
    rivals = table[table["method"].isin(RIVALS)]
    wins = (rivals["ahead_low"] > 0).groupby(rivals["concepts_per_dimension"]).all().sort_index(ascending=False)
    won = wins.index[wins.cummin()]
    return float(won.min()) if len(won) else None


def worth_sentence(table: pd.DataFrame) -> str:
    """State :func:`worth_from` in one sentence, with the smallest difference to a rival at the largest density."""
    rivals = table[table["method"].isin(RIVALS)]
    most = rivals["concepts_per_dimension"].max()
    closest = rivals[rivals["concepts_per_dimension"] == most].sort_values("ahead").iloc[0]
    start, names = worth_from(table), _listed(list(RIVALS.values()))
    begin = (
        f"the trained autoencoder is ahead of {names} from {start:.2g} concepts per dimension on"
        if start is not None
        else f"at no number of concepts per dimension, up to {most:.2g}, is the trained autoencoder ahead of all of "
        f"{names}"
    )
    return (
        f"{begin}; at {most:.2g} its F1 minus that of {RIVALS[closest['method']]}, the best of them, is "
        f"{closest['ahead']:.2f} ({closest['ahead_low']:.2f} to {closest['ahead_high']:.2f})."
    )
