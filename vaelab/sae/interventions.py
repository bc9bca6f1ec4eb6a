"""Interventions on a block's update during generation, and their effect on the pictures.

A block's update is its output minus its input: what it adds to the residual stream. Blocks are switched off one at a
time (Surkov et al., "Unpacking SDXL Turbo", appendix C), or a function replaces the update's vectors at all positions,
such as an autoencoder that reconstructs each of them (appendix D, Table 2).

Pictures of scenes from the synthetic scene world (:mod:`vaelab.world`) are also checked by the scene reader
(:mod:`vaelab.world.oracle`), which recovers the scene from a picture. A factor is an attribute of a scene, such as the
colour of an object.
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
from vaelab.models.block_names import example_outputs, find_blocks, find_denoiser, paths_by_name, picture_entry
from vaelab.sae.transcoder import PAIRS
from vaelab.world import oracle
from vaelab.world.scenes import SIDE, Scene

LPIPS_NETWORKS = ("alex", "vgg", "squeeze")
"""Networks of the ``lpips`` package."""
Replacement = Callable[[Tensor], Tensor]
"""A function from vectors (N, d) in float32 to vectors (N, d); of a block's input and output together, (N, 2 d), to its
new output (N, d)."""
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
"""Mean and median Manhattan distance, LPIPS and explained variance in percent, by block, k and dictionary size n_f."""
PAPER_WIDTH = 1280
"""The width d of the vectors of the paper's blocks."""
PAPER_BLOCK = {"down.1.1": "down.2.1"}
"""For a block of the small model shipped with the package, the paper's block at the same place, if the names differ."""


class LPIPS(NamedTuple):
    """The LPIPS network (Zhang et al., 2018) or, if it cannot be loaded, the reason; made by :func:`load_lpips`.

    The network comes with the optional package ``lpips``.
    """

    model: Any
    """The network; None if it could not be loaded."""
    why: str | None
    """The reason why the network could not be loaded; None if it is loaded."""

    @torch.no_grad()
    def distance(self, before: Tensor, after: Tensor, batch_size: int = 16) -> list[float]:
        """Compute LPIPS of N pairs of pictures (N, 3, H, W) in [-1, 1]; every value is NaN if there is no network."""
        if self.model is None:
            return [float("nan")] * len(before)
        device = next(self.model.parameters()).device
        parts = zip(before.split(batch_size), after.split(batch_size), strict=True)
        return [value for x, y in parts for value in self.model(x.to(device), y.to(device)).flatten().tolist()]


def load_lpips(net: str = "alex", device: str | torch.device = "auto") -> LPIPS:
    """Load the network of the ``lpips`` package, or say why it is not available.

    Args:
        net: ``alex`` (the package's default; the paper names none), ``vgg`` or ``squeeze``.
        device: the device that the network runs on.

    Raises:
        ValueError: ``net`` is none of these.
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
    """List the blocks whose update can be switched off: in a U-Net its modules with cross-attention, in a diffusion
    transformer all its blocks."""
    return [name for name in paths_by_name(pipeline) if name != "bottleneck" and not name.startswith("up_ft")]


def resolve_blocks(pipeline: Any, names: Sequence[str]) -> list[str]:
    """Return the short names of the blocks that these names and globs match; without names, all of
    :func:`blocks_with_updates`.

    Raises:
        ValueError: a block is unknown; its output and its input differ in shape, so that it has no update; or it is a
            layer that processes text tokens.
    """
    blocks = find_blocks(pipeline, names or blocks_with_updates(pipeline))
    for path in blocks.values():
        picture_entry(pipeline, path)
    example_outputs(pipeline, list(blocks.values()), side="update")
    return list(blocks)


def manhattan_distance(before: Tensor, after: Tensor) -> Tensor:
    """Compute the Manhattan distance of pictures (B, 3, H, W) in [-1, 1] (Surkov et al., Table 2).

    Per picture (B,): the absolute difference on the 0-255 scale, summed over the three channels and averaged over
    pixels.
    """
    return (before - after).abs().sum(1).mean((1, 2)) * 127.5


def median_manhattan_distance(before: Tensor, after: Tensor) -> Tensor:
    """Compute the median Manhattan distance of pictures (B, 3, H, W) in [-1, 1] (Surkov et al., Table 2).

    Per picture (B,): the absolute difference on the 0-255 scale, summed over the three channels; of these sums the
    median over pixels.
    """
    distances = (before - after).abs().sum(1).flatten(1).cpu().numpy()
    return torch.from_numpy(np.median(distances, axis=1)) * 127.5


def ablation_table(pictures: Mapping[str, Tensor], baseline: Tensor, scenes: Sequence[Scene] | None) -> pd.DataFrame:
    """Tabulate the effects of switching off each block.

    Args:
        pictures: for each block, the N pictures (N, 3, H, W) in [-1, 1] generated without it.
        baseline: (N, 3, H, W), the pictures generated with all blocks.
        scenes: the scenes that the prompts describe; None if the prompts are not from the synthetic scene world.

    Returns:
        One row per block: ``block`` and ``manhattan`` (mean over pictures). If there are scenes, also one column per
        factor: the accuracy without the block minus the accuracy with all blocks, as a fraction of the pictures.
        Negative values mean that the pictures get worse without the block.
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
    side: str = "update",
) -> Tensor:
    """Generate pictures (N, 3, H, W) in [-1, 1] with a block's update replaced; picture i uses ``seed + i``.

    With classifier-free guidance the update is replaced in both the conditional and the unconditional pass.

    Args:
        pipeline: a diffusers pipeline.
        prompts: N prompts; for a class-conditional model, class indices.
        block: the block's short name or module path.
        replace: a function that takes the updates D_out - D_in of all positions of all pictures in a batch, (n, d) in
            float32, and returns the vectors (n, d) that replace them. If it returns its input, the pictures are
            unchanged bit for bit.
        sampling: the number of steps, the guidance and the size of the pictures.
        steps: the steps at which the update is replaced, counted from 0; None means all (see
            :func:`vaelab.activations.denoiser.count_passes`).
        batch_size: the number of prompts per batch.
        seed: the seed of the first picture.
        side: ``update``; or ``input_output``, for a function from the block's inputs and outputs (n, 2 d), such as a
            transcoder, to new outputs (n, d).

    Raises:
        ValueError: the block is unknown, a step is beyond the last one, or ``replace`` returns another shape.
    """
    path, passes = find_blocks(pipeline, block)[block], activations.count_passes(pipeline, sampling)
    replaced = set(range(passes) if steps is None else steps)
    if not replaced <= set(range(passes)):
        raise ValueError(f"replaced_steps: expected numbers from 0 to {passes - 1}, got {sorted(replaced)}")
    calls = count()

    def replace_at_steps(seen: Tensor) -> Tensor:
        unchanged = seen.chunk(2, 1 if seen.ndim == 4 else -1)[1] if side == PAIRS else seen
        return _by_vectors(replace, seen, unchanged) if next(calls) % passes in replaced else unchanged

    entry = picture_entry(pipeline, path)
    with edit(find_denoiser(pipeline), {path: replace_at_steps}, side=side, entry=entry):
        return activations.generate_all(pipeline, prompts, sampling, batch_size=batch_size, seed=seed)


def _by_vectors(replace: Replacement, seen: Tensor, unchanged: Tensor) -> Tensor:
    """Apply ``replace`` to the vectors of a map (B, d, h, w) or to tokens (B, n, d); the result is shaped like
    ``unchanged``."""
    spread = seen.movedim(1, -1) if seen.ndim == 4 else seen
    vectors, width = spread.flatten(0, -2), unchanged.shape[1 if seen.ndim == 4 else -1]
    new = replace(vectors.float())
    if new.shape != (len(vectors), width):
        raise ValueError(f"replace: gave {tuple(new.shape)} for vectors {tuple(vectors.shape)}")
    new = new.to(seen.dtype).reshape(*spread.shape[:-1], width)
    # in the memory layout of what it replaces, because the rounding of the following layers depends on it
    return torch.empty_like(unchanged).copy_(new.movedim(-1, 1) if seen.ndim == 4 else new)


class ReplacementOutcome(NamedTuple):
    """Pictures and effects of a replacement."""

    pictures: Tensor
    """(n, 3, H, W) in [-1, 1], the first few pictures."""
    effects: pd.DataFrame
    """The effects on each of the N pictures, see :meth:`ReplacementExperiment.effects`."""


class ReplacementExperiment:
    """Reference pictures of the unchanged model, and the effects of replacements relative to them."""

    pictures: Tensor
    """(N, 3, H, W) in [-1, 1], generated without a replacement."""
    steps: int
    """The number of passes of the denoiser, see :func:`vaelab.activations.denoiser.count_passes`."""

    def __init__(
        self, pipeline: Any, prompts: Prompts, sampling: Sampling, perceptual: LPIPS, *, batch_size: int = 16,
        seed: int = 0, keep: int = 8, side: str = "update",
    ):  # fmt: skip
        """Generate the reference pictures.

        Args:
            pipeline: a diffusers pipeline.
            prompts: N prompts; if they are from the synthetic scene world, the scene reader reads every picture.
            sampling: the number of steps, the guidance and the size of the pictures.
            perceptual: LPIPS, from :func:`load_lpips`.
            batch_size: the number of prompts per batch.
            seed: the seed of the first picture.
            keep: the number of pictures that the outcome of a replacement holds.
            side: what is replaced, see :func:`generate_with_replacement`.
        """
        activations.validate_size(pipeline, sampling, SIDE if prompts.of_the_world else None)
        self._drawing = {"sampling": sampling, "batch_size": batch_size, "seed": seed}
        self._pipeline, self._texts, self._keep, self.perceptual = pipeline, prompts.texts, keep, perceptual
        self._side = side
        self.pictures, self.steps = (
            activations.generate_all(pipeline, prompts.texts, **self._drawing),
            activations.count_passes(pipeline, sampling),
        )
        self._scenes = prompts.scenes if prompts.of_the_world else None
        self._readings = oracle.read_scenes(self.pictures) if self._scenes else None

    def replaced(self, block: str, replace: Replacement, steps: Collection[int] | None = None) -> ReplacementOutcome:
        """Generate pictures with a block's update replaced, see :func:`generate_with_replacement`, and measure the
        effects."""
        after = generate_with_replacement(
            self._pipeline, self._texts, block, replace, steps=steps, side=self._side, **self._drawing
        )
        return ReplacementOutcome(after[: self._keep].clone(), self.effects(after))

    def effects(self, after: Tensor) -> pd.DataFrame:
        """Measure how pictures (N, 3, H, W) in [-1, 1] of the same prompts differ from the reference pictures.

        Returns:
            One row per picture: ``manhattan`` and ``median`` (the distances of :func:`manhattan_distance` and
            :func:`median_manhattan_distance`, at most 765) and ``lpips`` (NaN without the network). For prompts from
            the synthetic scene world also ``same_reading`` (whether the scene reader finds the same scene in both
            pictures, ignoring offsets) and ``correct`` (whether it finds every factor that the prompt names, and the
            right number of objects).
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
    """Say for each picture whether every named factor of its scene, and the number of objects, is correct."""
    return oracle.check_prompts(scenes, pictures).groupby("picture")["correct"].all().tolist()


def mean_effects(effects: pd.DataFrame) -> dict[str, float]:
    """Average the table of :meth:`ReplacementExperiment.effects` over pictures.

    Returns:
        ``manhattan_mean``, ``manhattan_median`` (the mean over pictures of each picture's median over pixels) and, if
        the network is there, ``lpips``. For prompts from the synthetic scene world also ``oracle_agreement`` (the share
        of pictures with the same reading) and ``oracle_right`` (the share of correct pictures).
    """
    names = {"manhattan": "manhattan_mean", "median": "manhattan_median", "lpips": "lpips",
             "same_reading": "oracle_agreement", "correct": "oracle_right"}  # fmt: skip
    means = {name: float(effects[column].mean()) for column, name in names.items() if column in effects}
    return {name: value for name, value in means.items() if not np.isnan(value)}


def effects_table(outcomes: Mapping[tuple, ReplacementOutcome], names: Sequence[str]) -> pd.DataFrame:
    """Tabulate outcomes as in the paper's Table 2.

    Args:
        outcomes: the outcomes; each key is a tuple with one value for each of ``names``.
        names: the names of the first columns, such as ``block`` and ``method``.

    Returns:
        One row per outcome: ``names`` and the means over pictures of :func:`mean_effects`, among them ``lpips`` only
        if the network was there.
    """
    rows = [{**dict(zip(names, key, strict=True)), **mean_effects(each.effects)} for key, each in outcomes.items()]
    return pd.DataFrame(rows)


def compare_with_paper(table: pd.DataFrame, widths: Mapping[str, int]) -> pd.DataFrame:
    """Put this run's values beside those of the paper's Table 2, at the same k and the same ratio n_features / d.

    Args:
        table: columns ``block``, ``k``, ``n_features``, ``manhattan_mean``, ``manhattan_median`` and
            ``explained_variance``.
        widths: the feature dimension d of each block.

    Returns:
        One row per row of ``table`` with a counterpart in the paper; explained variances are in percent.
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
