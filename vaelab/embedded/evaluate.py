"""How well a text-to-image or class-conditional model draws the world, by the oracle: tables for the notebooks."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from vaelab import activations, models
from vaelab.activations.denoiser import Sampling
from vaelab.data.prompts import Prompts, load_prompts
from vaelab.models.conditioning import by_class
from vaelab.world import oracle
from vaelab.world.scenes import Scene, Thing


class Asked(NamedTuple):
    """What a class-conditional model is asked to draw."""

    numbers: list[int]
    """Class numbers."""
    scenes: list[Scene]
    """What these name: one thing's colour and shape."""


def classes_asked(pipeline: Any, count: int, seed: int = 0) -> Asked:
    """``count`` of a model's classes, each as often as any other, in an order that the seed fixes.

    Raises:
        ValueError: a model whose classes are not a colour and a shape of the world's.
    """
    if not getattr(pipeline, "labels", None):
        raise ValueError(f"class_model: the classes of {type(pipeline).__name__} have no names")
    named = sorted((number, label) for label, number in pipeline.labels.items())
    order = np.random.default_rng(seed).permutation(len(named))
    chosen = [named[order[i % len(named)]] for i in range(count)]
    return Asked([number for number, _ in chosen], [_scene(label) for _, label in chosen])


def _scene(label: str) -> Scene:
    colour, _, shape = label.partition(" ")
    try:
        thing = Thing(shape, colour, "large", "centre", named=("shape", "colour"))
    except ValueError as error:
        raise ValueError(f"class_model: its class {label!r} is no colour and shape of the world ({error})") from error
    return Scene((thing,), "plain", "grey", named=())


class Drawings(NamedTuple):
    """A few pictures of a model, for a figure."""

    pictures: Tensor
    """(N, 3, H, W) in [-1, 1]."""
    captions: list[str]
    """What was asked for."""


def drawings(pipeline: Any, sampling: Sampling, count: int, seed: int = 0) -> Drawings:
    """Pictures of prompts of combinations that were kept from training; of a class-conditional model, of classes."""
    if by_class(pipeline):
        numbers, scenes = classes_asked(pipeline, count, seed)
        return Drawings(
            activations.generate_all(pipeline, numbers, sampling, seed=seed), [one.prompt for one in scenes]
        )
    texts = load_prompts("world", split="test", count=count).texts
    return Drawings(activations.generate_all(pipeline, texts, sampling, seed=seed), texts)


def table(asked: Sequence[Scene], pictures: Mapping[str, Tensor]) -> pd.DataFrame:
    """The accuracy of every factor, for several sets of pictures of the same N scenes.

    Returns:
        Columns ``who`` and those of :func:`vaelab.world.oracle.accuracy`.
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
        made = activations.generate_all(
            pipeline, asked.texts, replace(sampling, steps=count), batch_size=batch_size, seed=seed
        )
        accuracy = oracle.accuracy(oracle.judge(asked.scenes, made)).set_index("factor")["accuracy"]
        rows.append({"steps": count, **accuracy.to_dict()})
    return pd.DataFrame(rows)
