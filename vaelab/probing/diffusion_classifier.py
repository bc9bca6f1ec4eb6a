"""A denoiser as a zero-shot classifier: it predicts the class with whose prompt it predicts the noise best.

Li, Prabhudesai, Duggal, Brown and Pathak, "Your Diffusion Model is Secretly a Zero-Shot Classifier" (2023). Of
classes with equal priors, the predicted one has the smallest E_t,eps ||eps - eps_theta(x_t, t, c)||^2 (equation 5).
A trial is one timestep with one sample of noise. All classes are compared on the same trials (section 3.2), the
timesteps are evenly spaced (section 4.3), and classes with a large error are dropped after a few trials (Algorithm 2).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from vaelab.models.conditioning import (
    add_noise,
    encode_pictures,
    encode_prompts,
    is_class_conditional,
    last_timestep,
    predict,
    prediction_target,
)
from vaelab.models.vocabulary import TOKENIZERS, unknown_words

SHARED_CONDITIONS = ("txt_ids",)
"""Conditions of the denoiser that have no batch dimension."""

TrialErrors = Callable[[Sequence[int], int], Tensor]
"""A function of some class indices (C,) and a trial's index; it returns the error (C,) of each class."""


@dataclass(frozen=True)
class Stages:
    """The stages of Algorithm 2: how many trials a class gets, and how many classes are kept."""

    trials: tuple[int, ...] = (25, 250)
    """Number of trials that a remaining class has had by the end of each stage. The default is the paper's for
    Oxford-IIIT Pet."""
    keep: tuple[int, ...] = (5, 1)
    """Number of classes kept after each stage; the last entry is 1."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "trials", tuple(self.trials))
        object.__setattr__(self, "keep", tuple(self.keep))
        rising = all(a < b for a, b in zip((0, *self.trials), self.trials, strict=False))
        falling = all(a > b for a, b in zip(self.keep, self.keep[1:], strict=False))
        if not self.trials or len(self.trials) != len(self.keep) or not rising:
            raise ValueError(f"trials: expected increasing numbers, one per entry of keep, got {list(self.trials)}")
        if not falling or self.keep[-1] != 1:
            raise ValueError(f"keep: expected decreasing numbers that end with 1, got {list(self.keep)}")

    def schedule(self) -> list[list[int]]:
        """Compute the trials that each stage adds, as indices from 0 to ``trials[-1]`` - 1.

        After a stage with n trials, every remaining class has had exactly n trials. They cover the range evenly: the
        range is divided into n equal parts, and each part without a trial from an earlier stage gets one in its middle.
        (Rounding can put two earlier trials into one part; then as many empty parts get none, evenly spread.)
        """
        total, done, added = self.trials[-1], set(), []
        for count in self.trials:
            sampled = {trial * count // total for trial in done}
            empty = [part for part in range(count) if part not in sampled]
            chosen = [empty[place] for place in midpoints(len(empty), count - len(done))]
            middles = midpoints(total, count)
            added.append([middles[part] for part in chosen])
            done.update(added[-1])
        return added


class Classification(NamedTuple):
    """The predicted class of one picture, and how it was found."""

    predicted: int
    """The class index."""
    errors: np.ndarray
    """(P,) mean error of each prompt over its trials; NaN for a prompt without a trial."""
    trials: np.ndarray
    """(P,) number of trials of each prompt."""

    @property
    def passes(self) -> int:
        """Number of passes of the denoiser over this picture."""
        return int(self.trials.sum())


class ClassPrompts(NamedTuple):
    """The prompts that stand for the classes."""

    prompts: list[str | int]
    """Texts, or class indices of a class-conditional model."""
    classes: list[int]
    """The index of the class that each prompt stands for; several prompts may stand for one class."""


def midpoints(total: int, count: int) -> list[int]:
    """Compute the middles of ``count`` equal parts of the integers 0 to ``total`` - 1, rounded down; all different.

    Part i covers [i total / count, (i + 1) total / count), so its middle is (i + 1/2) total / count.

    Raises:
        ValueError: ``count`` is negative or above ``total``.
    """
    if not 0 <= count <= total:
        raise ValueError(f"count: expected 0 to {total} parts of 0..{total}, got {count}")
    return [(2 * part + 1) * total // (2 * count) for part in range(count)]


def classify_by_error(errors: TrialErrors, classes: int, stages: Stages) -> Classification:
    """Drop, stage by stage, the classes with the largest mean error (Algorithm 2).

    Args:
        errors: the function that computes the error of some classes in one trial.
        classes: the number of classes; a stage that would keep more of them keeps all.
        stages: the numbers of trials and of classes of each stage.

    Raises:
        FloatingPointError: an error is not finite; the message names its trial.
    """
    sums, counts = np.zeros(classes), np.zeros(classes, dtype=int)
    left = list(range(classes))
    for trials, keep in zip(stages.schedule(), stages.keep, strict=True):
        if len(left) == 1:
            break
        for trial in trials:
            values = errors(left, trial).cpu().double().numpy()  # MPS has no float64
            if not np.isfinite(values).all():
                raise FloatingPointError(
                    f"precision: the error of trial {trial} is not finite; use float32 or bfloat16 for the model"
                )
            sums[left] += values
            counts[left] += 1
        order = np.argsort(sums[left] / counts[left], kind="stable")
        left = sorted(left[i] for i in order[:keep])
    means = np.divide(sums, counts, out=np.full(classes, np.nan), where=counts > 0)
    return Classification(left[0], means, counts)


class DiffusionClassifier:
    """Classifies pictures by the denoising error of a pipeline under each class's prompt. Nothing is trained."""

    def __init__(
        self,
        pipeline: Any,
        prompts: Sequence[str | int],
        stages: Stages | None = None,
        *,
        classes: Sequence[int] | None = None,
        batch_size: int = 32,
        seed: int = 0,
    ):
        """Prepare the prompts.

        Args:
            pipeline: a diffusers pipeline.
            prompts: one text per class, or class indices of a class-conditional model.
            stages: the numbers of trials and of classes of each stage; None means the paper's.
            classes: the class index of each prompt, if several prompts stand for one class; None means one prompt per
                class.
            batch_size: the number of prompts per pass of the denoiser.
            seed: determines the noise of every trial, which all classes and pictures share.

        Raises:
            ValueError: there are fewer than two prompts, or more trials than the model has timesteps.
        """
        if len(prompts) < 2:
            raise ValueError(f"prompts: expected two or more, one per class, got {len(prompts)}")
        self.pipeline, self.prompts, self.stages = pipeline, list(prompts), stages or Stages()
        self.classes = list(range(len(prompts)) if classes is None else classes)
        self.batch_size, self.seed = batch_size, seed
        self.timesteps = even_timesteps(pipeline, self.stages.trials[-1])
        self._conditions: dict[tuple[int, ...], dict[str, Any]] = {}

    @torch.no_grad()
    def classify(self, pixels: Tensor) -> list[Classification]:
        """Classify B pictures (B, 3, H, W) in [-1, 1], each independently of the others."""
        conditions = self._conditions_for(tuple(pixels.shape[-2:]))
        results = []
        for latents in encode_pictures(self.pipeline, pixels).split(1):
            noised: dict[int, tuple[Tensor, Tensor]] = {}

            def errors(prompts: Sequence[int], trial: int, latents: Tensor = latents, noised: dict = noised) -> Tensor:
                if trial not in noised:
                    noised[trial] = self._noised(latents, trial)
                noisy, target = noised[trial]
                parts = []
                for begin in range(0, len(prompts), self.batch_size):
                    part = list(prompts[begin : begin + self.batch_size])
                    predicted = predict(
                        self.pipeline, noisy.expand(len(part), -1, -1, -1), self.timesteps[trial],
                        _select(conditions, part),
                    )[:, : target.shape[1]]  # fmt: skip
                    parts.append((predicted.float() - target).square().mean((1, 2, 3)))
                return torch.cat(parts)

            result = classify_by_error(errors, len(self.prompts), self.stages)
            results.append(result._replace(predicted=self.classes[result.predicted]))
        return results

    def _conditions_for(self, size: tuple[int, int]) -> dict[str, Any]:
        if size not in self._conditions:
            self._conditions[size] = encode_prompts(self.pipeline, self.prompts, len(self.prompts), size)
        return self._conditions[size]

    def _noised(self, latents: Tensor, trial: int) -> tuple[Tensor, Tensor]:
        """Compute the noisy latents of a trial, and the prediction of a perfect denoiser."""
        state = np.random.SeedSequence([self.seed, trial]).generate_state(1, np.uint64)[0]
        generator = torch.Generator().manual_seed(int(state >> 1))
        noise = torch.randn(latents.shape, generator=generator).to(latents)
        timestep = self.timesteps[trial]
        noisy = add_noise(self.pipeline, latents, noise, timestep)
        return noisy, prediction_target(self.pipeline, latents, noise, timestep)


def even_timesteps(pipeline: Any, count: int) -> list[int]:
    """Choose ``count`` timesteps of a model: the middles of equal parts of its T training timesteps.

    Raises:
        ValueError: ``count`` is below 1 or above T.
    """
    total = pipeline.scheduler.config.num_train_timesteps
    if not 1 <= count <= total:
        raise ValueError(f"trials: at most one for each of the model's {total} timesteps, got {count}")
    return [min(timestep, last_timestep(pipeline)) for timestep in midpoints(total, count)]


def class_prompts(pipeline: Any, names: Sequence[str], template: str) -> ClassPrompts:
    """Make the prompts for some classes: the template with each class's name in place of ``{}``.

    A class-conditional model has classes of its own. A class gets all of the model's classes that contain its name as a
    word (``red`` gets ``red circle`` and ``red star``). If the model's classes have no names, they must have the same
    indices as these classes.

    Args:
        pipeline: a diffusers pipeline.
        names: the names of the classes, in the order of their indices.
        template: the text with ``{}`` for the name, such as ``a photo of a {}``.

    Raises:
        ValueError: the template has no ``{}``, or no class of the model contains the name of one of these classes.
    """
    labels = getattr(pipeline, "labels", None)
    if is_class_conditional(pipeline) and labels:
        pairs = [(number, i) for label, number in labels.items() for i, name in enumerate(names) if _names(name, label)]
        missing = sorted(set(range(len(names))) - {i for _, i in pairs})
        if missing:
            raise ValueError(f"model: none of its classes is named after {names[missing[0]]!r}")
        numbers, classes = zip(*sorted(set(pairs)), strict=True)
        return ClassPrompts(list(numbers), list(classes))
    prompts = list(range(len(names))) if is_class_conditional(pipeline) else class_texts(names, template)
    return ClassPrompts(prompts, list(range(len(names))))


def known_class_prompts(pipeline: Any, names: Sequence[str], template: str) -> ClassPrompts | None:
    """Make the prompts as :func:`class_prompts` does, unless the model cannot know the classes by their names.

    Returns:
        The prompts; None, with a printed reason, if a class's name has words that no text model of the pipeline knows,
        or if a class-conditional model has no class of that name.

    Raises:
        ValueError: the template has no ``{}``.
    """
    texts = class_texts(names, template)
    if is_class_conditional(pipeline):
        try:
            return class_prompts(pipeline, names, template)
        except ValueError as error:
            print(f"The diffusion classifier is left out: {str(error).removeprefix('model: ')}")
            return None
    tokenizers = [part for name in TOKENIZERS if (part := getattr(pipeline, name, None)) is not None]
    plain = [name.replace("_", " ") for name in names]
    missing = set.intersection(*(set(unknown_words(each, plain)) for each in tokenizers)) if tokenizers else set()
    if missing:
        some = ", ".join(map(repr, sorted(missing)[:5])) + (", ..." if len(missing) > 5 else "")
        print(
            f"The diffusion classifier is left out: the text model never learned {len(missing)} words of the classes' "
            f"names ({some})"
        )
        return None
    return ClassPrompts(list(texts), list(range(len(texts))))


def _names(name: str, label: str) -> bool:
    """Say whether a label is one of the comma-separated synonyms in a name, or has one among its words."""
    return bool({part.strip() for part in name.split(",")} & {label, *label.split()})


def class_texts(names: Sequence[str], template: str) -> list[str]:
    """Make one text per class: the template with the class's name in place of ``{}``, underscores read as spaces.

    Raises:
        ValueError: the template has no ``{}``.
    """
    if "{}" not in template:
        raise ValueError(f"template: expected {{}} where the class's name goes, got {template!r}")
    return [template.replace("{}", name.replace("_", " ")) for name in names]


def _select(conditions: Any, prompts: Sequence[int], name: str = "") -> Any:
    """Select the conditions of some prompts, by index."""
    if isinstance(conditions, dict):
        return {key: _select(value, prompts, key) for key, value in conditions.items()}
    batched = isinstance(conditions, Tensor) and name not in SHARED_CONDITIONS
    return conditions[list(prompts)] if batched else conditions
