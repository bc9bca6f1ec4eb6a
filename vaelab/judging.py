"""How well a text-to-image model draws the world, by the oracle: tables for the notebooks."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import pandas as pd
import torch
from torch import Tensor

from vaelab import denoise, models, oracle
from vaelab.denoise import Sampling
from vaelab.prompts import Prompts
from vaelab.world import Scene


def table(asked: Sequence[Scene], pictures: Mapping[str, Tensor]) -> pd.DataFrame:
    """The accuracy of every factor, for several sets of pictures of the same N scenes.

    Returns:
        Columns ``who`` and those of :func:`vaelab.oracle.accuracy`.
    """
    parts = [oracle.accuracy(oracle.judge(asked, made)).assign(who=who) for who, made in pictures.items()]
    whole = pd.concat(parts, ignore_index=True)
    return whole[["who", *whole.columns.drop("who")]]


def through_vae(pipeline: Any, pictures: Tensor, batch_size: int) -> Tensor:
    """Pictures (N, 3, H, W) encoded and decoded by a pipeline's autoencoder, on the CPU."""
    vae = pipeline.vae
    parts = [models.reconstruct(vae, part.to(vae.device, vae.dtype)).cpu() for part in pictures.split(batch_size)]
    return torch.cat(parts).float()


def captions(asked: Sequence[Scene], pictures: Tensor) -> list[str]:
    """Each prompt, with what the oracle reads otherwise than it names."""
    judged = oracle.judge(asked, pictures)
    wrong = judged[~judged["right"]].groupby("picture")
    said = {picture: ", ".join(f"{row.asked} → {row.read}" for row in part.itertuples()) for picture, part in wrong}
    return [scene.prompt + (f" [{said[i]}]" if i in said else "") for i, scene in enumerate(asked)]


def by_steps(
    pipeline: Any, asked: Prompts, sampling: Sampling, steps: Sequence[int], *, batch_size: int, seed: int
) -> pd.DataFrame:
    """The accuracy of every factor with other numbers of denoising steps: ``steps`` and a column a factor."""
    rows = []
    for count in sorted(set(steps)):
        made = denoise.generate_all(
            pipeline, asked.texts, replace(sampling, steps=count), batch_size=batch_size, seed=seed
        )
        accuracy = oracle.accuracy(oracle.judge(asked.scenes, made)).set_index("factor")["accuracy"]
        rows.append({"steps": count, **accuracy.to_dict()})
    return pd.DataFrame(rows)
