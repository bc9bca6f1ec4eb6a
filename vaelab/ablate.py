"""Switching blocks off one at a time, and what the picture loses (Surkov et al., appendix C)."""

from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd
import torch
from torch import Tensor

from vaelab import denoise, oracle
from vaelab.blocks import PICTURE, denoiser, example, paths, resolve
from vaelab.denoise import Sampling
from vaelab.hooks import edit
from vaelab.world import Scene


def switched_off(
    pipeline: Any, prompts: Sequence[str | int], block: str, sampling: Sampling, *, batch_size: int = 16, seed: int = 0
) -> Tensor:
    """Pictures (N, 3, H, W) in [-1, 1] made with a block's update left out at every step: the block
    gives out what it took in. Number i is drawn with ``seed + i``."""
    path = resolve(pipeline, block)[block]
    with edit(denoiser(pipeline), {path: torch.zeros_like}, side="update", entry=PICTURE):
        return denoise.generate_all(pipeline, prompts, sampling, batch_size=batch_size, seed=seed)


def transformer_blocks(pipeline: Any) -> list[str]:
    """The blocks whose update can be switched off: a U-Net's cross-attention transformers, or all
    of a transformer's."""
    return [name for name in paths(pipeline) if name != "bottleneck" and not name.startswith("up_ft")]


def chosen(pipeline: Any, names: Sequence[str]) -> list[str]:
    """The blocks of these names and globs, or all of :func:`transformer_blocks` where there is none.

    Raises:
        ValueError: an unknown block, or one that gives out another shape than it takes in, so that it has no update.
    """
    found = resolve(pipeline, names or transformer_blocks(pipeline))
    example(pipeline, list(found.values()), side="update")
    return list(found)


def change(before: Tensor, after: Tensor) -> Tensor:
    """Manhattan distance of pictures (B, 3, H, W) in [-1, 1], mean over pixels of the sum over the
    three channels in units of 0 to 255 (Surkov et al., Table 2): (B,)."""
    return (before - after).abs().sum(1).mean((1, 2)) * 127.5


def compare(pictures: Mapping[str, Tensor], baseline: Tensor, scenes: Sequence[Scene] | None) -> pd.DataFrame:
    """What switching off each block did.

    Args:
        pictures: for each block (N, 3, H, W) in [-1, 1], made without it.
        baseline: (N, 3, H, W), made with all.
        scenes: what was asked for, of the world; None for other prompts.

    Returns:
        A row a block: ``block``, ``manhattan`` (mean over pictures), and for scenes each factor's
        change of accuracy, a share of the pictures.
    """
    before = _accuracy(scenes, baseline) if scenes else pd.Series(dtype=float)
    rows = []
    for block, changed in pictures.items():
        lost = (_accuracy(scenes, changed) - before).to_dict() if scenes else {}
        rows.append({"block": block, "manhattan": change(baseline, changed).mean().item(), **lost})
    return pd.DataFrame(rows)


def _accuracy(scenes: Sequence[Scene], pictures: Tensor) -> pd.Series:
    return oracle.accuracy(oracle.judge(scenes, pictures)).set_index("factor")["accuracy"]
