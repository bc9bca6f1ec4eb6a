"""Collect a denoiser's features over many prompts, into a store or straight into training.

From Surkov et al. ("Unpacking SDXL Turbo", section 3), who collect the updates (output minus input) of four blocks over
1.5 million prompts, one step each. Prompt i uses the seed ``seed + i``, whatever batch it is in, so that a resumed
collection has the same rows as one that was not interrupted.
"""

import hashlib
import json
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from torch import Tensor
from tqdm import tqdm

from vaelab import store
from vaelab.activations import denoiser
from vaelab.activations.denoiser import Sampling
from vaelab.core import devices
from vaelab.core.validate import at_least, one_of
from vaelab.hooks import SIDES
from vaelab.models import block_names

HALVES = ("guided", "both")
SIZES = ("batch_size", "items_per_shard")
"""Fields of :class:`CollectConfig` that do not affect the stored values."""


@dataclass(frozen=True)
class CollectConfig:
    """What is captured, and how."""

    blocks: tuple[str, ...]
    """Short names or module paths of blocks."""
    sampling: Sampling
    """How pictures are generated."""
    side: str = "update"
    """``update`` (output minus input), ``output`` or ``input`` of the blocks; or ``input_output``, both together, for
    transcoders."""
    steps: tuple[int, ...] = ()
    """Denoising steps to capture, counted from 0; empty means all steps."""
    halves: str = "guided"
    """With classifier-free guidance the denoiser also runs without the prompt. ``guided`` captures only the half of the
    batch with the prompt; ``both`` captures both halves and stores one item for each."""
    batch_size: int = 8
    """Prompts per batch."""
    seed: int = 0
    """Prompt i uses the seed ``seed + i``."""
    precision: str = "float16"
    """Precision of the stored values."""
    items_per_shard: int = 256
    """Items per shard of a new store; a resumed store keeps its own shard size."""

    def __post_init__(self) -> None:
        one_of("side", self.side, SIDES)
        one_of("halves", self.halves, HALVES)
        one_of("stored_precision", self.precision, devices.PRECISIONS)
        for name in SIZES:
            at_least(name, getattr(self, name), 1)
        if not self.blocks or len(set(self.blocks)) < len(self.blocks):
            raise ValueError(f"blocks: expected one or more different names, got {list(self.blocks)}")
        if len(set(self.steps)) < len(self.steps):
            raise ValueError(f"capture_steps: expected different steps, got {list(self.steps)}")

    def captured_steps(self, pipeline: Any) -> list[int]:
        """Return the captured steps in order. A scheduler may make more passes than there are sampling steps."""
        return sorted(self.steps) or list(range(denoiser.count_passes(pipeline, self.sampling)))


class CapturedBatch(NamedTuple):
    """The n items of one batch of prompts."""

    items: list[dict[str, Any]]
    """``prompt``, ``row``, ``seed``, ``step``, ``timestep`` and ``guided`` of each item."""
    maps: dict[str, Tensor]
    """For each block (n, h, w, d)."""


class Trial(NamedTuple):
    """What a trial batch showed about a collection."""

    layout: store.Layout
    """The blocks and the shapes of their maps."""
    items_per_prompt: int
    """Number of captured steps, times two if both halves of the guidance are captured."""
    seconds_per_item: float
    """Seconds per item."""


def capture_batches(
    pipeline: Any, prompts: Sequence[str], config: CollectConfig, *, rows: Sequence[int] = (), start: int = 0
) -> Iterator[CapturedBatch]:
    """Capture features batch by batch. Items are ordered by prompt, then step, then half of the guidance.

    Args:
        pipeline: a diffusers pipeline.
        prompts: all prompts.
        config: what is captured.
        rows: for each prompt its row in its data set, which is recorded in its items; empty means its index in
            ``prompts``.
        start: the index of the first prompt to capture.
    """
    steps = config.captured_steps(pipeline)
    for first in range(start, len(prompts), config.batch_size):
        numbers = range(first, min(first + config.batch_size, len(prompts)))
        features = denoiser.from_prompts(
            pipeline, [prompts[i] for i in numbers], [config.seed + i for i in numbers], config.blocks,
            config.sampling, side=config.side, steps=steps,
        )  # fmt: skip
        halves = [features.maps, *([features.unguided] if config.halves == "both" and features.unguided else [])]
        maps = {  # (B, steps, halves, h, w, d), so that the items of a prompt follow each other
            name: torch.stack([torch.stack(half[name], 1) for half in halves], 2).flatten(0, 2)
            for name in features.maps
        }
        timesteps = [float(t) for t in pipeline.scheduler.timesteps]
        items = [
            {
                "prompt": prompts[i], "row": rows[i] if rows else i, "seed": config.seed + i, "step": step,
                "timestep": timesteps[step], "guided": half == 0,
            }
            for i in numbers for step in steps for half in range(len(halves))
        ]  # fmt: skip
        yield CapturedBatch(items, maps)


def run_trial_batch(pipeline: Any, prompts: Sequence[str], config: CollectConfig) -> Trial:
    """Capture the first batch twice, and time the second run."""
    first = prompts[: config.batch_size]
    for _ in range(2):
        began = time.perf_counter()
        batch = next(capture_batches(pipeline, first, config))
        maps = {name: tensor.cpu() for name, tensor in batch.maps.items()}
        seconds = time.perf_counter() - began
    layout = {name: store.BlockShape(tuple(value.shape[1:-1]), value.shape[-1]) for name, value in maps.items()}
    return Trial(layout, len(batch.items) // len(first), seconds / len(batch.items))


def collect_prompts(
    pipeline: Any,
    prompts: Sequence[str],
    config: CollectConfig,
    folder: str | Path,
    *,
    layout: store.Layout,
    items_per_prompt: int,
    rows: Sequence[int] = (),
    settings: dict[str, Any] | None = None,
    progress: bool = True,
) -> store.Store:
    """Write the features of all prompts to a store, or resume the store that is there.

    A store is resumed if everything that determines its values is the same: ``config`` without its sizes, the
    prompts and their rows, the pipeline's precision and scheduler, and ``settings``. The batch size may change, for
    instance after running out of memory. A complete store is returned unchanged.

    Args:
        pipeline: a diffusers pipeline.
        prompts: all prompts.
        config: what is captured.
        folder: the store's folder.
        layout: the blocks and the shapes of their maps, as in :class:`Trial`.
        items_per_prompt: the number of items per prompt, as in :class:`Trial`.
        rows: for each prompt its row in its data set; empty means its index in ``prompts``.
        settings: what else determines the values, as plain JSON: the model's identity.
        progress: whether to show a progress bar.

    Raises:
        ValueError: the folder holds something other than a store or a store with other settings, or a value does not
            fit the precision.
    """
    with store.create(
        folder, layout, precision=config.precision, items_per_shard=config.items_per_shard,
        settings=_signature(pipeline, prompts, config, rows, settings or {}),
    ) as writer:  # fmt: skip
        if writer.spec.items_per_shard != config.items_per_shard:
            print(f"{folder} keeps its shards of {writer.spec.items_per_shard} items")
        # resume at the start of a batch, so that with the same batch size every batch is the same as before
        first = writer.items_done // items_per_prompt // config.batch_size * config.batch_size
        stored = writer.items_done - first * items_per_prompt
        with tqdm(
            total=len(prompts), initial=first, desc="collecting", unit="prompt", file=sys.stdout, mininterval=2,
            ncols=100, disable=not progress,
        ) as bar:  # fmt: skip
            for batch in [] if writer.complete else capture_batches(pipeline, prompts, config, rows=rows, start=first):
                writer.add({name: maps[stored:].cpu() for name, maps in batch.maps.items()}, batch.items[stored:])
                stored = 0
                bar.update(len(batch.items) // items_per_prompt)
    return store.open(folder)


def stream_rows(pipeline: Any, prompts: Sequence[str], config: CollectConfig, block: str) -> Iterator[Tensor]:
    """Yield one block's rows (n, d), batch by batch, for :func:`vaelab.store.shuffle_stream`; nothing touches the
    disk."""
    for batch in capture_batches(pipeline, prompts, config):
        yield batch.maps[block].flatten(0, 2)


def summarize_blocks(activations: store.Store, *, seed: int = 0, max_rows: int = 20_000) -> pd.DataFrame:
    """Compute statistics of each block's rows, over at most ``max_rows`` of them (whole items, at least one).

    Returns:
        One row per block: ``block``, ``rows``, ``width``, ``norm`` (mean length of a row), ``between_prompts`` (the
        share of the variance that lies between the means of items) and ``mean_share`` (the squared length of the mean
        row divided by the mean squared length of a row).
    """
    table = []
    for block, shape in activations.layout.items():
        count = min(len(activations.items), max(1, max_rows // shape.count))
        if not count:
            continue
        chosen = np.sort(np.random.default_rng(seed).permutation(len(activations.items))[:count])
        maps = activations.maps(block, chosen.tolist()).double().reshape(count, shape.count, shape.width)
        mean = maps.mean((0, 1))
        variance = (maps - mean).square().sum(-1).mean()
        between = (maps.mean(1) - mean).square().sum(-1).mean()
        table.append({
            "block": block, "rows": activations.rows(block), "width": shape.width,
            "norm": maps.norm(dim=-1).mean().item(), "between_prompts": (between / variance).item(),
            "mean_share": (mean.square().sum() / maps.square().sum(-1).mean()).item(),
        })  # fmt: skip
    return pd.DataFrame(table)


def _signature(
    pipeline: Any, prompts: Sequence[str], config: CollectConfig, rows: Sequence[int], settings: dict[str, Any]
) -> dict[str, Any]:
    """Everything that determines the values of a collection, as plain JSON."""
    scheduler = {name: str(value) for name, value in pipeline.scheduler.config.items() if not name.startswith("_")}
    return {
        **{name: value for name, value in asdict(config).items() if name not in SIZES},
        "model_precision": str(block_names.find_denoiser(pipeline).dtype).removeprefix("torch."),
        "scheduler_sha256": _digest([type(pipeline.scheduler).__name__, sorted(scheduler.items())]),
        **settings,
        "prompts": len(prompts),
        "prompts_sha256": prompts_digest(prompts, rows),
    }


def prompts_digest(prompts: Sequence[str], rows: Sequence[int]) -> str:
    """Compute the setting ``prompts_sha256`` of a collection, by which the same prompts are recognised."""
    return _digest([list(prompts), list(rows)])


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:16]
