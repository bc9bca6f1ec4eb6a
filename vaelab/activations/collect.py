"""Collecting a denoiser's features over many prompts: into a store, or straight into what uses them.

Prompt number i is drawn with the seed ``seed + i`` in whatever batch it comes, so a collection that
was killed goes on to the same rows. From Surkov et al. ("Unpacking SDXL Turbo", section 3): there
the updates of four blocks over 1.5 million prompts, one step each.
"""

import hashlib
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

HALVES = ("guided", "both")


@dataclass(frozen=True)
class CollectConfig:
    """What is captured of which blocks."""

    blocks: tuple[str, ...]
    """Short names or module paths."""
    sampling: Sampling
    """How pictures are made."""
    side: str = "update"
    """``update`` (output minus input), ``output`` or ``input`` of the blocks."""
    steps: tuple[int, ...] = ()
    """Steps to capture, counted from 0; none for all."""
    halves: str = "guided"
    """Of classifier-free guidance: the half with the prompt, or ``both``, one item each."""
    batch_size: int = 8
    """Prompts at once."""
    seed: int = 0
    """Prompt number i is drawn with ``seed + i``."""
    precision: str = "float16"
    """Of what is stored."""
    items_per_shard: int = 256
    """About how many items a shard holds: as many as make whole batches."""

    def __post_init__(self) -> None:
        one_of("side", self.side, SIDES)
        one_of("halves", self.halves, HALVES)
        one_of("stored_precision", self.precision, devices.PRECISIONS)
        for name in ("batch_size", "items_per_shard"):
            at_least(name, getattr(self, name), 1)
        if not self.blocks or len(set(self.blocks)) < len(self.blocks):
            raise ValueError(f"blocks: expected one or more different names, got {list(self.blocks)}")
        if len(set(self.steps)) < len(self.steps):
            raise ValueError(f"capture_steps: each once, got {list(self.steps)}")

    def captured(self, pipeline: Any) -> list[int]:
        """The steps that are captured, in order; there may be more of them than were asked of the sampler."""
        return sorted(self.steps) or list(range(denoiser.passes(pipeline, self.sampling)))


class Captures(NamedTuple):
    """What one batch of prompts gave: n items."""

    items: list[dict[str, Any]]
    """``prompt``, ``row``, ``seed``, ``step``, ``timestep`` and ``guided`` of each."""
    maps: dict[str, Tensor]
    """For each block (n, h, w, d)."""


def captures(
    pipeline: Any, prompts: Sequence[str], config: CollectConfig, *, rows: Sequence[int] = (), start: int = 0
) -> Iterator[Captures]:
    """Batches of features, prompt by prompt and within a prompt step by step.

    Args:
        pipeline: a diffusers pipeline.
        prompts: all of them.
        config: what is captured.
        rows: of each prompt its number in its data set, for the items.
        start: prompts to pass over.
    """
    captured = config.captured(pipeline)
    for first in range(start, len(prompts), config.batch_size):
        numbers = range(first, min(first + config.batch_size, len(prompts)))
        features = denoiser.from_prompts(
            pipeline, [prompts[i] for i in numbers], [config.seed + i for i in numbers], config.blocks,
            config.sampling, side=config.side, steps=captured,
        )  # fmt: skip
        halves = [features.maps, *([features.unguided] if config.halves == "both" and features.unguided else [])]
        # (B, steps, halves, h, w, d), so that a prompt's items follow each other
        maps = {
            name: torch.stack([torch.stack(half[name], 1) for half in halves], 2).flatten(0, 2)
            for name in features.maps
        }
        times = [float(t) for t in pipeline.scheduler.timesteps]
        items = [
            {
                "prompt": prompts[i], "row": rows[i] if rows else i, "seed": config.seed + i, "step": step,
                "timestep": times[step], "guided": half == 0,
            }
            for i in numbers for step in captured for half in range(len(halves))
        ]  # fmt: skip
        yield Captures(items, maps)


def probe(pipeline: Any, prompts: Sequence[str], config: CollectConfig) -> tuple[store.Layout, int, float]:
    """The layout, the items a prompt, and the seconds an item: one batch, made twice, the second timed."""
    first = prompts[: config.batch_size]
    for _ in range(2):
        began = time.perf_counter()
        batch = next(captures(pipeline, first, config))
        maps = {name: tensor.cpu() for name, tensor in batch.maps.items()}
        seconds = time.perf_counter() - began
    layout = {name: store.BlockShape(tuple(one.shape[1:-1]), one.shape[-1]) for name, one in maps.items()}
    return layout, len(batch.items) // len(first), seconds / len(batch.items)


def collect(
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
    """Write the features of all prompts to a store, going on where a killed call left it.

    Args:
        pipeline: a diffusers pipeline.
        prompts: all of them.
        config: what is captured.
        folder: of the store.
        layout: as :func:`probe` found it.
        items_per_prompt: as :func:`probe` found it.
        rows: of each prompt its number in its data set.
        settings: what else decides the numbers, plain JSON, such as the model's name.
        progress: whether to show a bar.

    Raises:
        ValueError: a store of other settings, or values that the precision cannot hold.
    """
    a_batch = config.batch_size * items_per_prompt
    per_shard = -(-config.items_per_shard // a_batch) * a_batch
    decides = {key: value for key, value in asdict(config).items() if key not in ("items_per_shard", "batch_size")}
    digest = hashlib.sha256("\n".join(prompts).encode()).hexdigest()[:16]
    named = {**decides, **(settings or {}), "prompts": len(prompts), "prompts_sha256": digest}
    with store.create(
        folder, layout, precision=config.precision, items_per_shard=per_shard, settings=_plain(named)
    ) as writer:
        done = writer.items_done // items_per_prompt
        bar = tqdm(
            total=len(prompts),
            initial=done,
            desc="collecting",
            unit="prompt",
            file=sys.stdout,
            mininterval=2,
            ncols=100,
            disable=not progress,
        )
        if not writer.complete:
            for batch in captures(pipeline, prompts, config, rows=rows, start=done):
                writer.add({name: maps.cpu() for name, maps in batch.maps.items()}, batch.items)
                bar.update(len(batch.items) // items_per_prompt)
        bar.close()
    return store.open(folder)


def vectors(pipeline: Any, prompts: Sequence[str], config: CollectConfig, block: str) -> Iterator[Tensor]:
    """One block's rows (n, d), batch by batch, for :func:`vaelab.store.shuffling.shuffle_stream`: made and
    used without touching the disk."""
    for batch in captures(pipeline, prompts, config):
        yield batch.maps[block].flatten(0, 2)


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(entry) for key, entry in value.items()}
    return [_plain(entry) for entry in value] if isinstance(value, tuple | list) else value


def summary(kept: store.Store, *, seed: int = 0, most: int = 20_000) -> pd.DataFrame:
    """What the rows of each block are like, from at most ``most`` of them.

    Returns:
        ``block``, ``rows``, ``width``, ``norm`` (mean length of a row), ``between_prompts`` (the
        share of the variance that is between the items' means) and ``mean_share`` (the squared
        length of the mean row over the mean squared length).
    """
    rows = []
    for block, shape in kept.layout.items():
        count = min(len(kept.items), max(1, most // shape.count))
        if not count:
            continue
        chosen = np.sort(np.random.default_rng(seed).permutation(len(kept.items))[:count])
        maps = kept.maps(block, chosen.tolist()).double().reshape(count, shape.count, shape.width)
        mean = maps.mean((0, 1))
        whole, between = (maps - mean).square().sum(-1).mean(), (maps.mean(1) - mean).square().sum(-1).mean()
        rows.append({
            "block": block, "rows": kept.rows(block), "width": shape.width, "norm": maps.norm(dim=-1).mean().item(),
            "between_prompts": (between / whole).item(),
            "mean_share": (mean.square().sum() / maps.square().sum(-1).mean()).item(),
        })  # fmt: skip
    return pd.DataFrame(rows)
