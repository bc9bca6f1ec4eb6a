"""Evaluation of models that generate scenes of the synthetic scene world (:mod:`vaelab.world`).

The scene reader (:mod:`vaelab.world.oracle`) recovers the scene from each picture that a text-to-image or
class-conditional model generated, and the result is compared with the prompt. A factor is an attribute of a scene, such
as the colour of an object. The embedded models are the small models shipped with the package.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from vaelab import activations, models
from vaelab.activations.denoiser import Sampling
from vaelab.core.validate import at_least
from vaelab.data.prompts import Prompts, load_prompts
from vaelab.models.conditioning import is_class_conditional
from vaelab.world import oracle
from vaelab.world.scenes import Scene, Thing

TRAINING_SPLIT = "train"


def require_held_out(split: str, unseen_split: str) -> None:
    """Raise ValueError unless the two splits of the scene world differ and neither is the training split."""
    for name, value in (("split", split), ("unseen_split", unseen_split)):
        if value == TRAINING_SPLIT:
            raise ValueError(f"{name}: the embedded models were trained on {value!r}; expected a held-out split")
    if split == unseen_split:
        raise ValueError(f"unseen_split: is {unseen_split!r} like split; expected two different splits")


def require_sampler_steps(pipeline: Any, steps: Sequence[int]) -> None:
    """Raise ValueError for a number of denoising steps that the pipeline's noise schedule does not have."""
    most = pipeline.scheduler.config.num_train_timesteps
    for count in steps:
        at_least("steps", count, 1)
        if count > most:
            raise ValueError(f"steps: got {count}; the model's noise schedule has {most} timesteps")


class ClassSample(NamedTuple):
    """Classes that a class-conditional model is asked to generate."""

    numbers: list[int]
    """Class indices, as the pipeline takes them."""
    scenes: list[Scene]
    """One scene per class, with a single object whose colour and shape are named."""


def sample_classes(pipeline: Any, count: int, seed: int = 0) -> ClassSample:
    """Choose ``count`` of a model's classes, all about equally often, in an order that depends on the seed.

    Raises:
        ValueError: the model's classes have no names, or are not pairs of a colour and a shape of the scene world.
    """
    if not getattr(pipeline, "labels", None):
        raise ValueError(f"class_model: the classes of {type(pipeline).__name__} have no names")
    named = sorted((number, label) for label, number in pipeline.labels.items())
    order = np.random.default_rng(seed).permutation(len(named))
    chosen = [named[order[i % len(named)]] for i in range(count)]
    return ClassSample([number for number, _ in chosen], [_class_scene(label) for _, label in chosen])


def _class_scene(label: str) -> Scene:
    colour, _, shape = label.partition(" ")
    try:
        thing = Thing(shape, colour, "large", "centre", named=("shape", "colour"))
    except ValueError as error:
        raise ValueError(f"class_model: its class {label!r} is no colour and shape of scenes ({error})") from error
    return Scene((thing,), "plain", "grey", named=())


class CaptionedPictures(NamedTuple):
    """A few pictures that a model generated, for a figure."""

    pictures: Tensor
    """(N, 3, H, W) in [-1, 1]."""
    captions: list[str]
    """The prompt or class name of each picture."""


def draw_examples(pipeline: Any, sampling: Sampling, count: int, seed: int = 0) -> CaptionedPictures:
    """Generate pictures for prompts of the ``test`` split; with a class-conditional model, for some of its classes."""
    if is_class_conditional(pipeline):
        numbers, scenes = sample_classes(pipeline, count, seed)
        pictures = activations.generate_all(pipeline, numbers, sampling, seed=seed)
        return CaptionedPictures(pictures, [scene.prompt for scene in scenes])
    texts = load_prompts("world", split="test", count=count).texts
    return CaptionedPictures(activations.generate_all(pipeline, texts, sampling, seed=seed), texts)


def accuracy_table(scenes: Sequence[Scene], pictures: Mapping[str, Tensor]) -> pd.DataFrame:
    """Tabulate the accuracy of every factor, for several sets of pictures of the same N scenes.

    Args:
        scenes: N scenes; only factors that their prompts name count.
        pictures: for each source, by its name, N pictures (N, 3, 64, 64) in [-1, 1].

    Returns:
        One row per source and factor: ``source`` and the columns of
        :func:`vaelab.world.oracle.accuracy_by_factor`.
    """
    parts = []
    for source, drawn in pictures.items():
        accuracy = oracle.accuracy_by_factor(oracle.check_prompts(scenes, drawn))
        accuracy.insert(0, "source", source)
        parts.append(accuracy)
    return pd.concat(parts, ignore_index=True)


def reconstruct_in_batches(pipeline: Any, pictures: Tensor, batch_size: int) -> Tensor:
    """Encode and decode pictures by a pipeline's autoencoder.

    Args:
        pipeline: a diffusers pipeline with a ``vae``.
        pictures: (N, 3, H, W) in [-1, 1].
        batch_size: the number of pictures per pass.

    Returns:
        The reconstructions, (N, 3, H, W) float32 on the CPU.
    """
    vae = pipeline.vae
    parts = [models.reconstruct(vae, part.to(vae.device, vae.dtype)).cpu() for part in pictures.split(batch_size)]
    return torch.cat(parts).float()


def captions_with_errors(scenes: Sequence[Scene], pictures: Tensor) -> list[str]:
    """Caption each picture (N, 3, 64, 64) with its scene's prompt, followed in brackets by the factors that the scene
    reader finds to be different (``red → blue``)."""
    checked = oracle.check_prompts(scenes, pictures)
    wrong = checked[~checked["correct"]].groupby("picture")
    errors = {
        picture: ", ".join(f"{row.expected} → {row.recognised}" for row in part.itertuples()) for picture, part in wrong
    }
    return [scene.prompt + (f" [{errors[i]}]" if i in errors else "") for i, scene in enumerate(scenes)]


def accuracy_by_steps(
    pipeline: Any, prompts: Prompts, sampling: Sampling, steps: Sequence[int], *, batch_size: int, seed: int
) -> pd.DataFrame:
    """Measure the accuracy of every factor with different numbers of denoising steps.

    Args:
        pipeline: a text-to-image pipeline.
        prompts: prompts of the scene world.
        sampling: the guidance and the size of the pictures; its number of steps is not used.
        steps: the numbers of steps; repeated ones count once.
        batch_size: the number of pictures per pass.
        seed: the seed of the first picture's noise.

    Returns:
        One row per number of ``steps``, with one column per factor.
    """
    rows = []
    for count in sorted(set(steps)):
        drawn = activations.generate_all(
            pipeline, prompts.texts, replace(sampling, steps=count), batch_size=batch_size, seed=seed
        )
        accuracy = oracle.accuracy_by_factor(oracle.check_prompts(prompts.scenes, drawn))
        rows.append({"steps": count, **accuracy.set_index("factor")["accuracy"].to_dict()})
    return pd.DataFrame(rows)
