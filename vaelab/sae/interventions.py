"""Interventions on a block's update during generation, and their effect on the pictures.

Blocks are switched off one at a time (Surkov et al., "Unpacking SDXL Turbo", appendix C), or their update is replaced
by a function of its vectors, such as an autoencoder's reconstruction (appendix D, Table 2).
"""

import importlib
from collections.abc import Callable, Collection, Mapping, Sequence
from itertools import count
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from vaelab import activations
from vaelab.activations.denoiser import Sampling
from vaelab.core import devices
from vaelab.core.validate import one_of
from vaelab.data.prompts import Prompts
from vaelab.hooks import edit
from vaelab.models.block_names import find_denoiser, example_outputs, paths_by_name, picture_entry, find_blocks
from vaelab.world import oracle
from vaelab.world.scenes import SIDE, Scene

LPIPS_NETWORKS = ("alex", "vgg", "squeeze")
"""Networks of the ``lpips`` package."""
Replacement = Callable[[Tensor], Tensor]
"""Vectors (N, d) in float32 to vectors (N, d)."""
PAPER_TABLE_2 = {
    ("down.2.1", 5, 640): (83.29, 50.04, 0.3383, 56.0), ("mid.0", 5, 640): (52.64, 26.82, 0.2032, 43.4),
    ("up.0.0", 5, 640): (55.89, 30.69, 0.2276, 44.8), ("up.0.1", 5, 640): (52.67, 34.53, 0.2073, 50.3),
    ("down.2.1", 5, 5120): (74.68, 41.49, 0.3036, 67.8), ("mid.0", 5, 5120): (48.82, 24.60, 0.1845, 50.8),
    ("up.0.0", 5, 5120): (49.19, 25.86, 0.1969, 57.2), ("up.0.1", 5, 5120): (47.50, 31.11, 0.1775, 59.5),
    ("down.2.1", 10, 640): (73.65, 41.79, 0.2893, 62.8), ("mid.0", 10, 640): (46.80, 23.10, 0.1772, 51.5),
    ("up.0.0", 10, 640): (48.43, 25.80, 0.1908, 52.5), ("up.0.1", 10, 640): (43.06, 26.85, 0.1638, 58.7),
    ("down.2.1", 10, 5120): (64.97, 34.77, 0.2582, 73.7), ("mid.0", 10, 5120): (44.02, 21.72, 0.1627, 58.8),
    ("up.0.0", 10, 5120): (42.08, 21.54, 0.1624, 64.2), ("up.0.1", 10, 5120): (39.77, 24.84, 0.1453, 67.1),
    ("down.2.1", 20, 640): (59.29, 31.47, 0.2291, 69.9), ("mid.0", 20, 640): (39.95, 19.44, 0.1459, 60.0),
    ("up.0.0", 20, 640): (40.15, 21.06, 0.1499, 60.9), ("up.0.1", 20, 640): (31.97, 18.15, 0.1196, 66.7),
    ("down.2.1", 20, 5120): (56.37, 29.04, 0.2190, 78.8), ("mid.0", 20, 5120): (37.28, 17.82, 0.1328, 66.5),
    ("up.0.0", 20, 5120): (35.73, 18.03, 0.1302, 70.6), ("up.0.1", 20, 5120): (30.31, 17.22, 0.1104, 74.2),
}  # fmt: skip
"""Mean and median Manhattan distance, LPIPS and explained variance in percent, by block, k and n_f."""
PAPER_WIDTH = 1280
"""The width d of the paper's blocks."""
PAPER_BLOCK = {"down.1.1": "down.2.1"}
"""The paper's counterpart of a block of the embedded model, where the names differ."""


class LPIPS(NamedTuple):
    """The LPIPS network (Zhang et al., 2018), an optional extra, or the reason why it is missing; made by
    :func:`load_lpips`."""

    model: Any
    """The network; None where it is missing."""
    why: str | None
    """Why the network is missing; None where it is there."""

    @torch.no_grad()
    def distance(self, before: Tensor, after: Tensor, batch_size: int = 16) -> list[float]:
        """LPIPS of N pairs of pictures (N, 3, H, W) in [-1, 1]; NaN where there is no network."""
        if self.model is None:
            return [float("nan")] * len(before)
        device = next(self.model.parameters()).device
        parts = zip(before.split(batch_size), after.split(batch_size), strict=True)
        return [one for x, y in parts for one in self.model(x.to(device), y.to(device)).flatten().tolist()]


def load_lpips(net: str = "alex", device: str | torch.device = "auto") -> LPIPS:
    """The network of the ``lpips`` package, if the package and its weights are available.

    Args:
        net: ``alex`` (the package's default; the paper names none), ``vgg`` or ``squeeze``.
        device: where it runs.
    """
    one_of("lpips_net", net, LPIPS_NETWORKS)
    try:
        package = importlib.import_module("lpips")
        model = package.LPIPS(net=net, verbose=False)
    except ModuleNotFoundError as error:
        return LPIPS(None, f"not measured: {error.name} is not installed (pip install vaelab[lpips])")
    except (ImportError, OSError, RuntimeError) as error:  # a torchvision of another torch; no network
        return LPIPS(None, f"not measured: {error}")
    return LPIPS(model.eval().requires_grad_(False).to(devices.pick(device)), None)


def generate_without_block(
    pipeline: Any, prompts: Sequence[str | int], block: str, sampling: Sampling, *, batch_size: int = 16, seed: int = 0
) -> Tensor:
    """Generate pictures (N, 3, H, W) in [-1, 1] with a block's update switched off at every step: the block
    returns its input. Picture i uses ``seed + i``."""
    path = find_blocks(pipeline, block)[block]
    entry = picture_entry(pipeline, path)
    with edit(find_denoiser(pipeline), {path: torch.zeros_like}, side="update", entry=entry):
        return activations.generate_all(pipeline, prompts, sampling, batch_size=batch_size, seed=seed)


def blocks_with_updates(pipeline: Any) -> list[str]:
    """The blocks whose update can be switched off: a U-Net's cross-attention transformers, or all blocks of a
    transformer."""
    return [name for name in paths_by_name(pipeline) if name != "bottleneck" and not name.startswith("up_ft")]


def resolve_blocks(pipeline: Any, names: Sequence[str]) -> list[str]:
    """The short names of the blocks that these names and globs match; without names, all of
    :func:`blocks_with_updates`.

    Raises:
        ValueError: an unknown block; one whose output has another shape than its input, so that it has no update; or a
            layer that works on the prompt.
    """
    found = find_blocks(pipeline, names or blocks_with_updates(pipeline))
    for path in found.values():
        picture_entry(pipeline, path)
    example_outputs(pipeline, list(found.values()), side="update")
    return list(found)


def manhattan_distance(before: Tensor, after: Tensor) -> Tensor:
    """Manhattan distance of pictures (B, 3, H, W) in [-1, 1], mean over pixels of the sum over the
    three channels in units of 0 to 255 (Surkov et al., Table 2): (B,)."""
    return (before - after).abs().sum(1).mean((1, 2)) * 127.5


def median_manhattan_distance(before: Tensor, after: Tensor) -> Tensor:
    """Manhattan distance of pictures (B, 3, H, W) in [-1, 1], the median over pixels of the sum over
    the three channels in units of 0 to 255 (Surkov et al., Table 2): (B,)."""
    distances = (before - after).abs().sum(1).flatten(1).cpu().numpy()
    return torch.from_numpy(np.median(distances, axis=1)) * 127.5


def ablation_table(pictures: Mapping[str, Tensor], baseline: Tensor, scenes: Sequence[Scene] | None) -> pd.DataFrame:
    """Effects of switching off each block.

    Args:
        pictures: for each block (N, 3, H, W) in [-1, 1], made without it.
        baseline: (N, 3, H, W), made with all blocks.
        scenes: the scenes that the prompts describe; None for prompts that are not of the world.

    Returns:
        One row per block: ``block``, ``manhattan`` (mean over pictures), and for scenes each factor's
        change of accuracy, as a fraction of the pictures.
    """
    before = _accuracy(scenes, baseline) if scenes else pd.Series(dtype=float)
    rows = []
    for block, changed in pictures.items():
        lost = (_accuracy(scenes, changed) - before).to_dict() if scenes else {}
        rows.append({"block": block, "manhattan": manhattan_distance(baseline, changed).mean().item(), **lost})
    return pd.DataFrame(rows)


def _accuracy(scenes: Sequence[Scene], pictures: Tensor) -> pd.Series:
    return oracle.accuracy_by_factor(oracle.check_prompts(scenes, pictures)).set_index("factor")["accuracy"]


def generate_with_replacement(
    pipeline: Any,
    prompts: Sequence[str | int],
    block: str,
    replace: Replacement,
    sampling: Sampling,
    *,
    steps: Collection[int] | None = None,
    batch_size: int = 16,
    seed: int = 0,
) -> Tensor:
    """Generate pictures (N, 3, H, W) in [-1, 1] with a block's update replaced; picture i uses ``seed + i``. Both
    halves of classifier-free guidance are replaced.

    Args:
        pipeline: a diffusers pipeline.
        prompts: N prompts; class numbers for a class-conditional model.
        block: a short name or a module path.
        replace: a function of the updates D_out - D_in of all positions, (n, d) in float32, that returns what
            replaces them. If it returns its input, the pictures are unchanged bit for bit.
        sampling: steps, guidance and size.
        steps: the steps at which the update is replaced, counted from 0; None for all (see
            :func:`vaelab.activations.denoiser.count_passes`).
        batch_size: prompts of a batch.
        seed: seed of the first picture.

    Raises:
        ValueError: an unknown block, a step beyond the sampling's, or a replacement of another shape.
    """
    path, passes = find_blocks(pipeline, block)[block], activations.count_passes(pipeline, sampling)
    replaced = set(range(passes) if steps is None else steps)
    if not replaced <= set(range(passes)):
        raise ValueError(f"replaced_steps: expected numbers from 0 to {passes - 1}, got {sorted(replaced)}")
    calls = count()

    def replace_at_steps(update: Tensor) -> Tensor:
        return _by_vectors(replace, update) if next(calls) % passes in replaced else update

    entry = picture_entry(pipeline, path)
    with edit(find_denoiser(pipeline), {path: replace_at_steps}, side="update", entry=entry):
        return activations.generate_all(pipeline, prompts, sampling, batch_size=batch_size, seed=seed)


def _by_vectors(replace: Replacement, update: Tensor) -> Tensor:
    """``replace`` applied to a map (B, d, h, w) or to tokens (B, n, d)."""
    spread = update.movedim(1, -1) if update.ndim == 4 else update
    vectors = spread.flatten(0, -2)
    new = replace(vectors.float())
    if new.shape != vectors.shape:
        raise ValueError(f"replace: gave {tuple(new.shape)} for vectors {tuple(vectors.shape)}")
    new = new.to(update.dtype).reshape(spread.shape)
    # in the update's memory layout, because the rounding of the following layers depends on it
    return torch.empty_like(update).copy_(new.movedim(-1, 1) if update.ndim == 4 else new)


class ReplacementOutcome(NamedTuple):
    """Pictures and effects of a replacement."""

    pictures: Tensor
    """The first few, (n, 3, H, W) in [-1, 1]."""
    effects: pd.DataFrame
    """Effects on every picture, see :meth:`ReplacementExperiment.effects`."""


class ReplacementExperiment:
    """Reference pictures of the unchanged model, and the effects of replacements relative to them."""

    pictures: Tensor
    """(N, 3, H, W) in [-1, 1]."""
    steps: int
    """Passes of the denoiser, see :func:`vaelab.activations.denoiser.count_passes`."""

    def __init__(
        self, pipeline: Any, prompts: Prompts, sampling: Sampling, perceptual: LPIPS, *, batch_size: int = 16,
        seed: int = 0, keep: int = 8,
    ):  # fmt: skip
        """Generate the reference pictures.

        Args:
            pipeline: a diffusers pipeline.
            prompts: N prompts; if they are of the world, the oracle reads every picture.
            sampling: steps, guidance and size.
            perceptual: LPIPS, or the reason why it is missing.
            batch_size: prompts of a batch.
            seed: seed of the first picture.
            keep: number of pictures that the outcome of a replacement holds.
        """
        activations.validate_size(pipeline, sampling, SIDE if prompts.of_the_world else None)
        self._drawing = {"sampling": sampling, "batch_size": batch_size, "seed": seed}
        self._pipeline, self._texts, self._keep, self.perceptual = pipeline, prompts.texts, keep, perceptual
        self.pictures, self.steps = (
            activations.generate_all(pipeline, prompts.texts, **self._drawing),
            activations.count_passes(pipeline, sampling),
        )
        self._scenes = prompts.scenes if prompts.of_the_world else None
        self._readings = oracle.read_scenes(self.pictures) if self._scenes else None

    def replaced(self, block: str, replace: Replacement, steps: Collection[int] | None = None) -> ReplacementOutcome:
        """Pictures with a block's update replaced, see :func:`generate_with_replacement`, and their effects."""
        after = generate_with_replacement(self._pipeline, self._texts, block, replace, steps=steps, **self._drawing)
        return ReplacementOutcome(after[: self._keep].clone(), self.effects(after))

    def effects(self, after: Tensor) -> pd.DataFrame:
        """How pictures (N, 3, H, W) in [-1, 1] of the same prompts differ from the reference pictures.

        Returns:
            One row per picture: ``manhattan`` and ``median`` (mean and median over its pixels, at most 765), ``lpips``
            (NaN without the network), and for prompts of the world ``same_reading`` (whether the oracle reads the same
            scene, except for offsets) and ``correct`` (whether every factor that the prompt names is correct).
        """
        columns: dict[str, Any] = {
            "manhattan": manhattan_distance(self.pictures, after).tolist(),
            "median": median_manhattan_distance(self.pictures, after).tolist(),
            "lpips": self.perceptual.distance(self.pictures, after),
        }
        if self._scenes:
            columns |= {
                "same_reading": _all_correct(self._readings, after),
                "correct": _all_correct(self._scenes, after),
            }
        return pd.DataFrame(columns)


def _all_correct(scenes: Sequence[Scene], pictures: Tensor) -> list[bool]:
    """Of each picture, whether every factor of its scene is correct."""
    return oracle.check_prompts(scenes, pictures).groupby("picture")["correct"].all().tolist()


def mean_effects(effects: pd.DataFrame) -> dict[str, float]:
    """Means over pictures: ``manhattan_mean``, ``manhattan_median``, with LPIPS ``lpips``, and for prompts of the world
    ``oracle_agreement`` (the share whose reading is the same) and ``oracle_right`` (the share that is correct)."""
    names = {"manhattan": "manhattan_mean", "median": "manhattan_median", "lpips": "lpips",
             "same_reading": "oracle_agreement", "correct": "oracle_right"}  # fmt: skip
    means = {name: float(effects[column].mean()) for column, name in names.items() if column in effects}
    return {name: value for name, value in means.items() if not np.isnan(value)}


def effects_table(
    outcomes: Mapping[tuple, ReplacementOutcome], names: Sequence[str], perceptual: LPIPS
) -> pd.DataFrame:
    """The paper's Table 2.

    Args:
        outcomes: the outcomes; a key holds a value for each of ``names``.
        names: names of the first columns, such as ``block`` and ``method``.
        perceptual: LPIPS; if it is missing, the column ``lpips`` holds the reason.

    Returns:
        One row per outcome: ``names`` and the metrics of :func:`mean_effects`.
    """
    rows = [{**dict(zip(names, key, strict=True)), **mean_effects(one.effects)} for key, one in outcomes.items()]
    whole = pd.DataFrame(rows)
    return whole if perceptual.why is None else whole.assign(lpips=perceptual.why)


def compare_with_paper(table: pd.DataFrame, widths: Mapping[str, int]) -> pd.DataFrame:
    """Table 2 of this run beside the paper's, at the same k and the same ratio n_features / d.

    Args:
        table: columns ``block``, ``k``, ``n_features``, ``manhattan_mean``, ``manhattan_median`` and
            ``explained_variance``.
        widths: d of each block.

    Returns:
        One row per row that the paper has too; explained variances are in percent.
    """
    rows = []
    for row in table.to_dict("records"):
        counterpart = PAPER_BLOCK.get(row["block"], row["block"])
        size = round(row["n_features"] * PAPER_WIDTH / widths[row["block"]])
        if (counterpart, row["k"], size) not in PAPER_TABLE_2:
            continue
        mean, median, _, explained = PAPER_TABLE_2[counterpart, row["k"], size]
        rows.append({
            "block": row["block"], "k": row["k"], "n_features": row["n_features"], "paper's block": counterpart,
            "paper's n_f": size, "mean": row["manhattan_mean"], "paper's mean": mean, "median": row["manhattan_median"],
            "paper's median": median, "explained %": 100 * row["explained_variance"], "paper's explained %": explained,
        })  # fmt: skip
    return pd.DataFrame(rows)
