"""What sparse autoencoders are trained on: batches of the activations of several blocks, from a store
or drawn as they are used."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import count, islice
from typing import Any

import torch
from torch import Tensor

from vaelab.checks import at_least
from vaelab.collect import CollectConfig, captures
from vaelab.shuffling import shuffle_stream
from vaelab.store import Store
from vaelab.training import Batches


def from_store(kept: Store, blocks: Sequence[str], batch_size: int, seed: int) -> Batches:
    """Endless shuffled batches (batch_size, d) of blocks of a store, for :func:`vaelab.sae_training.train_saes`.

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
