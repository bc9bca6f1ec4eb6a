"""Training of sparse autoencoders: any number of them, for any blocks, in one pass over the activations.

Every batch of a block goes to all of its autoencoders. Before the first step they are initialised from the data: the
geometric median of a block's vectors becomes ``pre_bias``, and their spread the unit in which they are trained, so that
one learning rate suits all blocks. After training each autoencoder is rescaled to the data's units. Hyperparameters of
Surkov et al., appendix A: Adam with a learning rate of 1e-4, batches of 4096; of Kim et al., appendix F: ``k_sae``,
k = 32, 64 d features, 4e-4 after a warm-up of 500 steps.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from itertools import chain, count, islice, product
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
import torch
from torch import Tensor, nn

from vaelab.activations.collect import CollectConfig, capture_batches
from vaelab.core import devices
from vaelab.core.validate import at_least, one_of, unknown
from vaelab.hooks import on_gradient
from vaelab.sae.kernels import row_products
from vaelab.sae.model import SAE, SAEConfig, require_finite_vectors, require_width
from vaelab.sae.topk import select_batch_topk
from vaelab.store.reader import Store
from vaelab.store.shuffling import shuffle_stream
from vaelab.training import Batches, TrainConfig, TrainingPlan, Watcher, plan_training, train

INITIALISATION_VECTORS = 2**14
"""The largest number of vectors of a block from which median, spread and first thresholds are computed."""
CURVES = ("loss", "explained_variance", "l0", "dead_fraction")
"""Columns of a training history."""
FROZEN = ("", "decoder", "soft_decoder", "encoder")
"""What can be kept at its random start, as controls of what training adds (arXiv 2602.14111): nothing; the decoder; the
decoder's rows up to an angle whose cosine is :data:`SOFT_COSINE`; the encoder."""
SOFT_COSINE = 0.8


def store_batches(store: Store, blocks: Sequence[str], batch_size: int, seed: int) -> Batches:
    """Make endless shuffled batches (batch_size, d) of blocks of a store, for :func:`train_saes`.

    They have the stored type. If that is a half precision, half the bytes are copied to a GPU, and they are converted
    to float32 there, which is exact.

    Raises:
        ValueError: the store has no such block or holds no item, or the batch size is below 1.
    """
    at_least("vectors", batch_size, 1)
    if not len(store.items):
        raise ValueError(f"activations: {store.url} holds no item (was it dry_run?); nothing can be learned from it")
    dtype = devices.dtype(store.precision)
    each = {block: store.shuffled(block, batch_size, seed, dtype=dtype) for block in blocks}

    def batches(start: int = 0, rank: int = 0, world: int = 1) -> Iterator[dict[str, Tensor]]:
        streams = [shuffled(start=start, rank=rank, world=world) for shuffled in each.values()]
        return (dict(zip(each, parts, strict=True)) for parts in zip(*streams, strict=True))

    return batches


def streaming_batches(
    pipeline: Any, prompts: Sequence[str], config: CollectConfig, *, batch_size: int, buffer_rows: int, seed: int
) -> Batches:
    """Make endless shuffled batches (batch_size, d) of blocks, generated during training and never stored.

    The prompts are repeated with other seeds each time. The vectors depend only on the seeds; resumed training
    generates the vectors that it has already used once more, and skips them.

    Args:
        pipeline: a diffusers pipeline.
        prompts: the prompts of one pass.
        config: the sampling, and the blocks to capture, whose maps must have the same size.
        batch_size: the number of vectors of each block per batch.
        buffer_rows: the number of vectors of each block that are shuffled together.
        seed: determines the order of the vectors.

    Raises:
        ValueError: there is no prompt; or, when batches are taken, the blocks' maps differ in size.
    """
    if not prompts:
        raise ValueError("prompts: expected at least one, got none")
    widths: dict[str, int] = {}

    def generated() -> Iterator[Tensor]:
        for turn in count():
            now = replace(config, seed=config.seed + turn * len(prompts))
            for batch in capture_batches(pipeline, prompts, now):
                sizes = {name: tuple(maps.shape[1:-1]) for name, maps in batch.maps.items()}
                if len(set(sizes.values())) > 1:
                    raise ValueError(f"blocks: expected maps of one size, got {sizes}")
                widths.update({name: maps.shape[-1] for name, maps in batch.maps.items()})
                yield torch.cat([maps.flatten(0, -2) for maps in batch.maps.values()], 1)

    def batches(start: int = 0, rank: int = 0, world: int = 1) -> Iterator[dict[str, Tensor]]:
        mixed = shuffle_stream(generated(), batch_size, buffer_rows=buffer_rows, seed=seed)
        for rows in islice(mixed, start * world + rank, None, world):
            yield dict(zip(widths, rows.split(list(widths.values()), 1), strict=True))

    return batches


class SAESpec(NamedTuple):
    """An autoencoder to train."""

    block: str
    """The block whose vectors it is trained on."""
    config: SAEConfig
    """Its architecture and loss."""
    seed: int = 0
    """Seed of its initial weights."""
    frozen: str = ""
    """What is kept at its random start, one of :data:`FROZEN`."""


class TrainedSAEs(NamedTuple):
    """The result of :func:`train_saes`."""

    saes: dict[str, SAE]
    """The autoencoders by name, in evaluation mode, on the training device, in the units of the data."""
    history: pd.DataFrame
    """``step``, ``sae`` (the name) and, as means over the steps since the row before, ``loss``,
    ``explained_variance`` (1 - |x - x'|^2 / variance), ``l0`` and ``dead_fraction``."""
    seconds: float
    """Seconds of training in this process."""
    resumed_at: int
    """The step of the checkpoint that training resumed from; 0 means that it started anew."""


class SAEObjective(nn.Module):
    """The sum of the losses of several autoencoders on a batch of their blocks, for :func:`vaelab.training.loop.train`.

    An autoencoder's gradients do not depend on the others, so each is trained as if alone. The component of a decoder's
    gradient that would change the lengths of the features is removed when the gradient is computed.
    """

    scales: Tensor

    def __init__(self, specs: Mapping[str, SAESpec]):
        """Args: the autoencoders to train, by name.

        Raises:
            ValueError: an autoencoder has an ``input_norm``; such ones are read from other libraries but not trained.
                Or its ``frozen`` is unknown.
        """
        super().__init__()
        self.specs = dict(specs)
        for name, spec in self.specs.items():
            if spec.config.input_norm != "none":
                raise ValueError(f"input_norm: {name} has {spec.config.input_norm!r}; only 'none' can be trained")
            one_of("frozen", spec.frozen, FROZEN)
        self.blocks = sorted({spec.block for spec in self.specs.values()})
        self.saes = nn.ModuleList(spec.config.build(spec.seed) for spec in self.specs.values())
        self.register_buffer("scales", torch.ones(len(self.blocks)))
        for sae, spec in zip(self.saes, self.specs.values(), strict=True):
            sae.encoder.requires_grad_(spec.frozen != "encoder")
            sae.decoder.requires_grad_(spec.frozen != "decoder")
            if sae.decoder.requires_grad:
                on_gradient(sae.decoder, remove_parallel_gradient)

    @torch.no_grad()
    def initialise(self, sample: Mapping[str, Tensor]) -> None:
        """Set the parameters that depend on the data, from vectors (N, d) of each block.

        These are the unit of each block, every ``pre_bias``, and for variants with a variable number of active features
        the thresholds (for ``relu_l1`` the encoder's bias), such that this number is k on average.

        Raises:
            ValueError: a vector has NaN or infinity, the vectors have another width, or all of them are the same.
        """
        for number, block in enumerate(self.blocks):
            x = sample[block].to(self.scales)
            require_finite_vectors(x)
            median = geometric_median(x)
            scale = (x - median).square().mean().sqrt()
            if not scale:
                raise ValueError(f"{block}: all vectors are the same; there is nothing to explain")
            self.scales[number] = scale
            for sae, spec in zip(self.saes, self.specs.values(), strict=True):
                if spec.block == block:
                    require_width(x, spec.config.width)
                    sae.set_biases(median / scale)
                    if spec.config.variant in ("batchtopk", "jumprelu", "relu_l1"):
                        centred = sae.source((x - median) / scale).contiguous()
                        count = len(x) * spec.config.k
                        least = select_batch_topk(centred, sae.encoder, sae.latent_bias, count).values.min()
                        if spec.config.variant == "relu_l1":
                            sae.latent_bias.fill_(-least)
                        else:
                            sae.set_thresholds(least)

    def forward(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Compute the summed ``loss`` and, for each autoencoder, ``<name>.loss`` and so on, see :data:`CURVES`.

        Under autocast, ``screen`` of :meth:`vaelab.sae.model.SAE.losses` is on; everything else is computed in float32.

        Raises:
            ValueError: the batch lacks a block, or :meth:`vaelab.sae.model.SAE.losses` cannot use its vectors.
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
            for sae, (name, spec) in zip(self.saes, self.specs.items(), strict=True):
                losses = sae.losses(scaled[spec.block], screen=screen)
                out["loss"] = out["loss"] + losses.loss
                values = (losses.loss, 1 - losses.unexplained, losses.l0, losses.dead_fraction)
                out |= {f"{name}.{curve}": value.detach() for curve, value in zip(CURVES, values, strict=True)}
        return out

    def rescaled(self) -> dict[str, SAE]:
        """Rescale the autoencoders in place to the units of the data, and return them by name."""
        scales = dict(zip(self.blocks, self.scales, strict=True))
        for sae, spec in zip(self.saes, self.specs.values(), strict=True):
            sae.rescale(scales[spec.block])
        self.scales.fill_(1)
        return dict(zip(self.specs, self.saes, strict=True))


class NormaliseDecoders(Watcher):
    """Scales every feature back to unit length after each step."""

    def __init__(self, saes: Sequence[SAE]):
        self._saes = saes

    def after(self, step: int, optimizer: torch.optim.Optimizer) -> None:
        """Called by the training."""
        for sae in self._saes:
            sae.normalise()


class KeepDecoderNearStart(Watcher):
    """Moves features of unit length that have turned too far from their start back to a cosine of ``SOFT_COSINE``."""

    def __init__(self, sae: SAE, seed: int):
        """Args: the autoencoder, and the seed of its initial weights."""
        self._sae, self._start = sae, sae.config.build(seed).decoder.detach()

    @torch.no_grad()
    def after(self, step: int, optimizer: torch.optim.Optimizer) -> None:
        """Called by the training."""
        decoder, start = self._sae.decoder, self._start.to(self._sae.device)
        cosine = (decoder * start).sum(1, keepdim=True)
        across = torch.nn.functional.normalize(decoder - cosine * start)
        moved = SOFT_COSINE * start + (1 - SOFT_COSINE**2) ** 0.5 * across
        decoder.copy_(torch.where(cosine < SOFT_COSINE, moved, decoder))


class HistoryCallback(Watcher):
    """Calls a function with the history whenever it has grown."""

    def __init__(self, names: Iterable[str], show: Callable[[pd.DataFrame], None]):
        self._names, self._show = list(names), show

    def logged(self, history: list[dict[str, float]]) -> None:
        """Called by the training."""
        self._show(_by_name(history, self._names))


@torch.no_grad()
def remove_parallel_gradient(decoder: Tensor) -> None:
    """Remove from the gradient of a decoder (n, d) with rows of unit length the component parallel to each row."""
    rows = torch.arange(len(decoder), device=decoder.device)
    parallel = row_products(decoder.grad, decoder, rows, rows, rows)
    decoder.grad.addcmul_(decoder, parallel[:, None], value=-1)


def train_saes(
    specs: Mapping[str, SAESpec],
    batches: Batches,
    config: TrainConfig,
    *,
    folder: str | Path | None = None,
    settings: dict[str, Any] | None = None,
    live: Callable[[pd.DataFrame], None] | None = None,
    title: str = "autoencoders",
) -> TrainedSAEs:
    """Train autoencoders in one pass over the batches.

    Args:
        specs: the autoencoders by name; the names appear in the history.
        batches: the source of batches, each a dict with vectors (N, d) for each block: :func:`store_batches`,
            :func:`streaming_batches`, or any other resumable source, see :mod:`vaelab.training.batches`.
        config: the optimisation; ``clip_norm`` must be 0, because clipping would let the gradient of one autoencoder
            shrink another's step. With ``precision: bfloat16`` the selection is faster, see
            :meth:`SAEObjective.forward`.
        folder: the folder for checkpoints, from which training resumes; None means that no checkpoint is written.
        settings: further settings, as plain JSON, that must be equal for a checkpoint to be resumed.
        live: a function that is called with the history whenever it has grown; None means no function.
        title: the title of the progress bar.

    Raises:
        ValueError: there is no autoencoder, ``clip_norm`` is not 0, or a batch cannot be trained on.
    """
    if not specs:
        raise ValueError("specs: no autoencoder to train")
    if config.clip_norm:
        raise ValueError(f"clip_norm: must be 0 if several autoencoders are trained, got {config.clip_norm}")
    objective = SAEObjective(specs)
    stream = batches(start=0, rank=0, world=1)
    first: list[Mapping[str, Tensor]] = []
    if not (folder and Path(folder, "checkpoint.safetensors").exists()):
        first = _first_batches(stream, objective.blocks)
        sample = {block: torch.cat([batch[block] for batch in first]) for block in objective.blocks}
        objective.initialise({block: x[:INITIALISATION_VECTORS] for block, x in sample.items()})

    def from_the_first(start: int = 0, rank: int = 0, world: int = 1) -> Iterator[Mapping[str, Tensor]]:
        if (start, rank, world) == (0, 0, 1):
            return chain(first, stream)
        return batches(start=start, rank=rank, world=world)

    described = {name: {**spec._asdict(), "config": asdict(spec.config)} for name, spec in specs.items()}
    soft = [
        KeepDecoderNearStart(sae, spec.seed)
        for sae, spec in zip(objective.saes, specs.values(), strict=True)
        if spec.frozen == "soft_decoder"
    ]
    learned = [sae for sae in objective.saes if sae.decoder.requires_grad]
    watchers = [NormaliseDecoders(learned), *soft, *([HistoryCallback(specs, live)] if live else [])]
    trained = train(
        objective, from_the_first, config, folder=folder, watchers=watchers,
        settings={**(settings or {}), "saes": described}, title=title,
    )  # fmt: skip
    return TrainedSAEs(objective.rescaled(), _by_name(trained.history, specs), trained.seconds, trained.resumed_at)


def plan_saes(specs: Mapping[str, SAESpec], batches: Batches, config: TrainConfig) -> TrainingPlan:
    """Estimate what :func:`train_saes` with checkpoints takes, from the time of one step; the trained autoencoders are
    counted as saved.

    Raises:
        ValueError: a batch cannot be trained on.
    """
    objective = SAEObjective(specs)
    objective.initialise(next(batches(start=0, rank=0, world=1)))
    return plan_training(objective, batches, config, f"{len(specs)} autoencoders", saved=1)


def _by_name(history: Sequence[Mapping[str, float]], names: Iterable[str]) -> pd.DataFrame:
    """Make the history, with one row per step and autoencoder."""
    rows = [
        {"step": row["step"], "sae": name, **{curve: row[f"{name}.{curve}"] for curve in CURVES}}
        for row, name in product(history, names)
    ]
    return pd.DataFrame(rows)


def _first_batches(stream: Iterator[Mapping[str, Tensor]], blocks: Sequence[str]) -> list[Mapping[str, Tensor]]:
    """Take the batches from which the autoencoders are initialised."""
    held, seen = [], 0
    for batch in stream:
        for block in blocks:
            if block not in batch:
                raise unknown("block", block, batch)
        held.append(batch)
        seen += len(batch[blocks[0]])
        if seen >= INITIALISATION_VECTORS:
            break
    return held


def geometric_median(x: Tensor, *, iterations: int = 100, tolerance: float = 1e-6) -> Tensor:
    """Compute the point (d,) with the least sum of distances to the rows of x (N, d), by Weiszfeld's iteration.

    The iteration ends when a step is at most ``tolerance`` times the mean distance.

    Raises:
        ValueError: x has no row.
    """
    if not len(x):
        raise ValueError("x: a median needs at least one vector")
    guess = x.mean(0)
    for _ in range(iterations):
        distances = torch.linalg.vector_norm(x - guess, dim=1)
        weights = 1 / distances.clamp_min(1e-12 + 1e-6 * distances.mean())
        last, guess = guess, weights @ x / weights.sum()
        if torch.linalg.vector_norm(guess - last) <= tolerance * distances.mean():
            break
    return guess
