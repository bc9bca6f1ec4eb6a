"""Training sparse autoencoders: any number of them, of any blocks, in one pass over the activations.

Every batch of a block goes to all of its autoencoders. Before the first step each is told what the
data are like: their geometric median becomes ``pre_bias``, and their spread the unit in which it is
trained, so that one learning rate serves all blocks; afterwards it is rescaled to the data's units.
Hyperparameters of Surkov et al., appendix A: Adam with a learning rate of 1e-4, batches of 4096; of
Kim et al., appendix F: ``k_sae``, k = 32, 64 d features, 4e-4 after a warm-up of 500 steps.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from itertools import chain, count, islice, product
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
import torch
from torch import Tensor, nn

from vaelab.activations.collect import CollectConfig, captures
from vaelab.core.validate import at_least, unknown
from vaelab.hooks import on_gradient
from vaelab.sae.kernels import row_products
from vaelab.sae.model import SAE, SAEConfig, refuse_not_finite, refuse_other_width
from vaelab.sae.topk import choose_of_batch
from vaelab.store.reader import Store
from vaelab.store.shuffling import shuffle_stream
from vaelab.training.loop import Batches, TrainConfig, Watcher, train

# sae_batches: What sparse autoencoders are trained on: batches of the activations of several blocks, from a store
# or drawn as they are used.


def from_store(kept: Store, blocks: Sequence[str], batch_size: int, seed: int) -> Batches:
    """Endless shuffled batches (batch_size, d) of blocks of a store, for :func:`vaelab.sae.train.train_saes`.

    Raises:
        ValueError: no such block, a store that holds no item, or batches of none.
    """
    at_least("vectors", batch_size, 1)
    if not len(kept.items):
        raise ValueError(f"activations: {kept.url} holds no item (was it dry_run?); nothing can be learned from it")
    each = {block: kept.shuffled(block, batch_size, seed) for block in blocks}

    def batches(start: int = 0, rank: int = 0, world: int = 1) -> Iterator[dict[str, Tensor]]:
        streams = [shuffled(start=start, rank=rank, world=world) for shuffled in each.values()]
        return (dict(zip(each, parts, strict=True)) for parts in zip(*streams, strict=True))

    return batches


def streaming(
    pipeline: Any, prompts: Sequence[str], config: CollectConfig, *, batch_size: int, buffer_rows: int, seed: int
) -> Batches:
    """Endless shuffled batches (batch_size, d) of blocks, drawn as they are used and never stored.

    Prompts are drawn again and again, with other seeds each time. What is drawn depends on the seeds
    alone: a training that is gone on with draws anew what it has used before, and passes over it.

    Args:
        pipeline: a diffusers pipeline.
        prompts: all of them.
        config: what is captured; its blocks must have maps of one size.
        batch_size: vectors of each block.
        buffer_rows: vectors of each block that are mixed.
        seed: fixes the mixing.

    Raises:
        ValueError: no prompt; when batches are taken, blocks with maps of different sizes.
    """
    if not prompts:
        raise ValueError("prompts: none to draw")
    widths: dict[str, int] = {}

    def drawn() -> Iterator[Tensor]:
        for turn in count():
            now = replace(config, seed=config.seed + turn * len(prompts))
            for batch in captures(pipeline, prompts, now):
                sizes = {name: tuple(maps.shape[1:-1]) for name, maps in batch.maps.items()}
                if len(set(sizes.values())) > 1:
                    raise ValueError(f"blocks: expected maps of one size, got {sizes}")
                widths.update({name: maps.shape[-1] for name, maps in batch.maps.items()})
                yield torch.cat([maps.flatten(0, -2) for maps in batch.maps.values()], 1)

    def batches(start: int = 0, rank: int = 0, world: int = 1) -> Iterator[dict[str, Tensor]]:
        mixed = shuffle_stream(drawn(), batch_size, buffer_rows=buffer_rows, seed=seed)
        for rows in islice(mixed, start * world + rank, None, world):
            yield dict(zip(widths, rows.split(list(widths.values()), 1), strict=True))

    return batches


SAMPLE = 2**14
"""Vectors of a block, at most, from which medians, spreads and first thresholds are taken."""
CURVES = ("loss", "explained_variance", "l0", "dead_fraction")


class Wanted(NamedTuple):
    """An autoencoder to be trained."""

    block: str
    """Of whose vectors."""
    config: SAEConfig
    seed: int = 0
    """Of its first weights."""


class TrainedSAEs(NamedTuple):
    """What :func:`train_saes` gives back."""

    saes: dict[str, SAE]
    """By name, in evaluation mode, on the training device, in the units of the data."""
    history: pd.DataFrame
    """``step``, ``sae`` and, as means over the steps since the row before, ``loss``,
    ``explained_variance`` (1 - |x - x'|^2 / variance), ``l0`` and ``dead_fraction``."""
    seconds: float
    """Time spent in this process."""
    resumed_at: int
    """The step of the checkpoint that was gone on from, 0 for none."""


class SAEObjective(nn.Module):
    """The sum of the losses of several autoencoders on a batch of their blocks, for :func:`vaelab.training.loop.train`.

    Each one's gradients are its own, so they are trained as if alone. What a decoder's gradient
    would do to the lengths of the features is taken out of it as it is made.
    """

    scales: Tensor

    def __init__(self, wanted: Mapping[str, Wanted]):
        super().__init__()
        self.wanted = dict(wanted)
        self.blocks = sorted({one.block for one in self.wanted.values()})
        self.saes = nn.ModuleList(SAE(one.config, one.seed) for one in self.wanted.values())
        self.register_buffer("scales", torch.ones(len(self.blocks)))
        for sae in self.saes:
            on_gradient(sae.decoder, make_tangent)

    @torch.no_grad()
    def begin(self, sample: Mapping[str, Tensor]) -> None:
        """Set what depends on the data, from vectors (N, d) of each block: the unit of each block, every
        ``pre_bias``, and, where the number of active features is free, thresholds (for ``relu_l1`` the
        encoder's bias) such that it is k in the mean.

        Raises:
            ValueError: a vector with NaN or infinity, vectors of another width, or that are all the same.
        """
        for number, block in enumerate(self.blocks):
            x = sample[block].to(self.scales)
            refuse_not_finite(x)
            median = geometric_median(x)
            scale = (x - median).square().mean().sqrt()
            if not scale:
                raise ValueError(f"{block}: all vectors are the same; there is nothing to explain")
            self.scales[number] = scale
            for sae, one in zip(self.saes, self.wanted.values(), strict=True):
                if one.block == block:
                    refuse_other_width(x, one.config.d)
                    sae.pre_bias.copy_(median / scale)
                    if one.config.variant in ("batchtopk", "jumprelu", "relu_l1"):
                        centred = (x - median) / scale
                        count = len(x) * one.config.k
                        least = choose_of_batch(centred, sae.encoder, sae.latent_bias, count).values.min()
                        if one.config.variant == "relu_l1":
                            sae.latent_bias.fill_(-least)
                        else:
                            sae.threshold.fill_(least)

    def forward(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The summed ``loss`` and, for each autoencoder, ``<name>.loss`` and so on, see :data:`CURVES`.

        Under autocast, bfloat16 finds the candidates of each top-k; all else is done in float32.

        Raises:
            ValueError: a block that is not in the batch, or as :meth:`vaelab.sae.model.SAE.encode`.
        """
        device = self.scales.device.type
        screen = torch.is_autocast_enabled(device)
        out = {"loss": torch.zeros((), device=self.scales.device)}
        with torch.autocast(device, enabled=False):
            scaled = {}
            for block, scale in zip(self.blocks, self.scales, strict=True):
                if block not in batch:
                    raise unknown("block", block, batch)
                scaled[block] = batch[block].float() / scale
            for sae, (name, one) in zip(self.saes, self.wanted.items(), strict=True):
                losses = sae.losses(scaled[one.block], screen=screen)
                out["loss"] = out["loss"] + losses.loss
                shown = (losses.loss, 1 - losses.unexplained, losses.l0, losses.dead_fraction)
                out |= {f"{name}.{curve}": value.detach() for curve, value in zip(CURVES, shown, strict=True)}
        return out

    def finished(self) -> dict[str, SAE]:
        """The autoencoders by name, rescaled to the units of the data."""
        scales = dict(zip(self.blocks, self.scales, strict=True))
        for sae, one in zip(self.saes, self.wanted.values(), strict=True):
            sae.rescale(scales[one.block])
        self.scales.fill_(1)
        return dict(zip(self.wanted, self.saes, strict=True))


class UnitLength(Watcher):
    """Scales every feature back to unit length after each step."""

    def __init__(self, saes: Sequence[SAE]):
        self._saes = saes

    def after(self, step: int, optimizer: torch.optim.Optimizer) -> None:
        """Called by the training."""
        for sae in self._saes:
            sae.normalise()


class Live(Watcher):
    """Passes the history on as it grows."""

    def __init__(self, names: Iterable[str], show: Callable[[pd.DataFrame], None]):
        self._names, self._show = list(names), show

    def logged(self, history: list[dict[str, float]]) -> None:
        """Called by the training."""
        self._show(_by_name(history, self._names))


@torch.no_grad()
def make_tangent(decoder: Tensor) -> None:
    """Take out of the gradient of a decoder (n, d), whose rows are of unit length, what is parallel to them."""
    rows = torch.arange(len(decoder), device=decoder.device)
    parallel = row_products(decoder.grad, decoder, rows, rows, rows)
    decoder.grad.addcmul_(decoder, parallel[:, None], value=-1)


def train_saes(
    wanted: Mapping[str, Wanted],
    batches: Batches,
    config: TrainConfig,
    *,
    folder: str | Path | None = None,
    settings: dict[str, Any] | None = None,
    live: Callable[[pd.DataFrame], None] | None = None,
    title: str = "autoencoders",
) -> TrainedSAEs:
    """Train autoencoders in one pass.

    Args:
        wanted: by name; a name goes into the history.
        batches: gives dicts of a batch (N, d) for each block: those of :mod:`vaelab.sae.train`,
            or any such function of :func:`vaelab.training.loop.train`.
        config: how to train; ``clip_norm`` must be 0, for clipping would let one autoencoder's
            gradient shrink another's step. ``precision: bfloat16`` makes choices quicker, see
            :class:`SAEObjective`.
        folder: where the checkpoint goes, and is gone on from.
        settings: what else, as plain JSON, a checkpoint must agree on.
        live: called with the history so far whenever it has grown.
        title: the progress bar's.

    Raises:
        ValueError: nothing wanted, a gradient that is to be clipped, or what is wrong with a batch.
    """
    if not wanted:
        raise ValueError("wanted: no autoencoder to train")
    if config.clip_norm:
        raise ValueError(f"clip_norm: must be 0 where several autoencoders are trained, got {config.clip_norm}")
    objective = SAEObjective(wanted)
    stream = batches(start=0, rank=0, world=1)
    held: list[Mapping[str, Tensor]] = []
    if not (folder and Path(folder, "checkpoint.safetensors").exists()):
        held = _first(stream, objective.blocks)
        objective.begin({block: torch.cat([batch[block] for batch in held])[:SAMPLE] for block in objective.blocks})

    def from_the_first(start: int = 0, rank: int = 0, world: int = 1) -> Iterator[Mapping[str, Tensor]]:
        if (start, rank, world) == (0, 0, 1):
            return chain(held, stream)
        return batches(start=start, rank=rank, world=world)

    told = {name: {**one._asdict(), "config": asdict(one.config)} for name, one in wanted.items()}
    watchers = [UnitLength(objective.saes), *([Live(wanted, live)] if live else [])]
    trained = train(
        objective, from_the_first, config, folder=folder, watchers=watchers,
        settings={**(settings or {}), "saes": told}, title=title,
    )  # fmt: skip
    return TrainedSAEs(objective.finished(), _by_name(trained.history, wanted), trained.seconds, trained.resumed_at)


def _by_name(history: Sequence[Mapping[str, float]], names: Iterable[str]) -> pd.DataFrame:
    """A row for each step and autoencoder."""
    rows = [
        {"step": row["step"], "sae": name, **{curve: row[f"{name}.{curve}"] for curve in CURVES}}
        for row, name in product(history, names)
    ]
    return pd.DataFrame(rows)


def _first(stream: Iterator[Mapping[str, Tensor]], blocks: Sequence[str]) -> list[Mapping[str, Tensor]]:
    """The batches that the sample is taken from."""
    held, seen = [], 0
    for batch in stream:
        for block in blocks:
            if block not in batch:
                raise unknown("block", block, batch)
        held.append(batch)
        seen += len(batch[blocks[0]])
        if seen >= SAMPLE:
            break
    return held


def geometric_median(x: Tensor, *, iterations: int = 100, tolerance: float = 1e-6) -> Tensor:
    """The point with the least sum of distances to the rows of x (N, d), by Weiszfeld's iteration: (d,).

    It stops where a step is below ``tolerance`` times the mean distance.

    Raises:
        ValueError: no row.
    """
    if not len(x):
        raise ValueError("x: no vector to take the median of")
    guess = x.mean(0)
    for _ in range(iterations):
        distances = torch.linalg.vector_norm(x - guess, dim=1)
        weights = 1 / distances.clamp_min(1e-12 + 1e-6 * distances.mean())
        last, guess = guess, weights @ x / weights.sum()
        if torch.linalg.vector_norm(guess - last) <= tolerance * distances.mean():
            break
    return guess
