"""A denoiser as a zero-shot classifier: the class under which it predicts the noise best.

Li, Prabhudesai, Duggal, Brown and Pathak, "Your Diffusion Model is Secretly a Zero-Shot Classifier"
(2023): of classes c with equal priors the one of the smallest E_t,eps ||eps - eps_theta(x_t, t, c)||^2
(equation 5) is named. All classes are compared on the same pairs of timestep and noise (section 3.2),
the timesteps evenly spaced (section 4.3), and classes far behind are dropped after few of them
(Algorithm 2).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from vaelab.models.block_names import denoiser
from vaelab.models.conditioning import FLUX, add_noise, by_class, condition, encode, is_flow, last_timestep, predict

NOT_BY_PICTURE = ("txt_ids",)
"""What of the conditions has no entry for each picture."""

Errors = Callable[[Sequence[int], int], Tensor]
"""From classes (C,) and the number of a trial to the error (C,) of each."""


@dataclass(frozen=True)
class Stages:
    """How many trials, each a timestep with its noise, are made, and how many classes outlive them."""

    trials: tuple[int, ...] = (25, 250)
    """Made of each class that is left, at the end of each stage; the default is the paper's for
    Oxford-IIIT Pet."""
    keep: tuple[int, ...] = (5, 1)
    """Classes left after each stage; the last is 1."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "trials", tuple(self.trials))
        object.__setattr__(self, "keep", tuple(self.keep))
        rising = all(a < b for a, b in zip((0, *self.trials), self.trials, strict=False))
        falling = all(a > b for a, b in zip(self.keep, self.keep[1:], strict=False))
        if not self.trials or len(self.trials) != len(self.keep) or not rising:
            raise ValueError(f"trials: expected rising numbers, one a stage of keep, got {list(self.trials)}")
        if not falling or self.keep[-1] != 1:
            raise ValueError(f"keep: expected falling numbers that end with 1, got {list(self.keep)}")

    def schedule(self) -> list[list[int]]:
        """The numbers of the trials, of all of the last stage, that each stage adds; evenly spaced in each."""
        total, seen, added = self.trials[-1], set(), []
        for count in self.trials:
            step = total // count
            chosen = list(range(total))[step // 2 :: step][:count]
            added.append([trial for trial in chosen if trial not in seen])
            seen.update(chosen)
        return added


class Verdict(NamedTuple):
    """What a picture was found to be."""

    chosen: int
    """The class."""
    errors: np.ndarray
    """(C,) mean error of each prompt over the trials it had."""
    trials: np.ndarray
    """(C,) how many these were."""

    @property
    def passes(self) -> int:
        """Passes of the denoiser over this picture."""
        return int(self.trials.sum())


class ClassPrompts(NamedTuple):
    """What is asked to tell classes apart."""

    prompts: list[str | int]
    """Texts, or class numbers."""
    answers: list[int]
    """The class that each stands for."""


def decide(errors: Errors, classes: int, stages: Stages) -> Verdict:
    """Algorithm 2: drop, stage by stage, the classes of the largest mean error.

    Args:
        errors: the error of some classes in one trial.
        classes: C; stages that would keep more keep them all.
        stages: how many trials and classes.

    Raises:
        FloatingPointError: an error that is not finite, with its trial.
    """
    sums, counts = np.zeros(classes), np.zeros(classes, dtype=int)
    left = list(range(classes))
    for trials, keep in zip(stages.schedule(), stages.keep, strict=True):
        if len(left) == 1:
            break
        for trial in trials:
            found = errors(left, trial).double().cpu().numpy()
            if not np.isfinite(found).all():
                raise FloatingPointError(f"trial {trial}: an error is not finite; take precision float32 or bfloat16")
            sums[left] += found
            counts[left] += 1
        order = np.argsort(sums[left] / counts[left], kind="stable")
        left = sorted(left[i] for i in order[:keep])
    return Verdict(left[0], np.divide(sums, counts, out=np.full(classes, np.nan), where=counts > 0), counts)


class DiffusionClassifier:
    """Classifies pictures by a pipeline's denoising error.

    Each class is a prompt; of a class-conditional model a class number. Nothing is learned.
    """

    def __init__(
        self,
        pipeline: Any,
        prompts: Sequence[str | int],
        stages: Stages | None = None,
        *,
        answers: Sequence[int] | None = None,
        batch_size: int = 32,
        seed: int = 0,
    ):
        """Prepare the classes.

        Args:
            pipeline: a diffusers pipeline.
            prompts: one a class.
            stages: how many trials and classes; None for the paper's.
            answers: of each prompt the class that it stands for, where several stand for one.
            batch_size: classes at once.
            seed: fixes the noise of every trial, which is the same for every class and picture.

        Raises:
            ValueError: fewer than two classes, or more trials than the model has timesteps.
        """
        if len(prompts) < 2:
            raise ValueError(f"prompts: expected one for each of two or more classes, got {len(prompts)}")
        self.pipeline, self.prompts, self.stages = pipeline, list(prompts), stages or Stages()
        self.answers = list(range(len(prompts)) if answers is None else answers)
        self.batch_size, self.seed = batch_size, seed
        self.timesteps = timesteps(pipeline, self.stages.trials[-1])
        self._conditions: dict[tuple[int, ...], dict[str, Any]] = {}

    @torch.no_grad()
    def classify(self, pixels: Tensor) -> list[Verdict]:
        """What each of B pictures (B, 3, H, W) in [-1, 1] is; each is decided by itself."""
        told = self._told(tuple(pixels.shape[-2:]))
        verdicts = []
        for latents in encode(self.pipeline, pixels).split(1):
            made: dict[int, tuple[Tensor, Tensor]] = {}

            def errors(classes: Sequence[int], trial: int, latents: Tensor = latents, made: dict = made) -> Tensor:
                if trial not in made:
                    made[trial] = self._noised(latents, trial)
                noisy, target = made[trial]
                parts = []
                for begin in range(0, len(classes), self.batch_size):
                    part = list(classes[begin : begin + self.batch_size])
                    predicted = predict(
                        self.pipeline, noisy.expand(len(part), -1, -1, -1), self.timesteps[trial], _rows(told, part)
                    )[:, : target.shape[1]]
                    parts.append((predicted.float() - target).square().mean((1, 2, 3)))
                return torch.cat(parts)

            verdict = decide(errors, len(self.prompts), self.stages)
            verdicts.append(verdict._replace(chosen=self.answers[verdict.chosen]))
        return verdicts

    def _told(self, size: tuple[int, int]) -> dict[str, Any]:
        if size not in self._conditions:
            self._conditions[size] = condition(self.pipeline, self.prompts, len(self.prompts), size)
        return self._conditions[size]

    def _noised(self, latents: Tensor, trial: int) -> tuple[Tensor, Tensor]:
        """Noisy latents of a trial, and what a denoiser without error says of them."""
        state = np.random.SeedSequence([self.seed, trial]).generate_state(1, np.uint64)[0]
        generator = torch.Generator().manual_seed(int(state >> 1))
        noise = torch.randn(latents.shape, generator=generator).to(latents)
        timestep = self.timesteps[trial]
        return add_noise(self.pipeline, latents, noise, timestep), target(self.pipeline, latents, noise, timestep)


def timesteps(pipeline: Any, count: int) -> list[int]:
    """``count`` evenly spaced timesteps of a model, the middles of equal parts of its schedule.

    Raises:
        ValueError: more than it has.
    """
    total = pipeline.scheduler.config.num_train_timesteps
    if not 1 <= count <= total:
        raise ValueError(f"trials: at most one for each of the model's {total} timesteps, got {count}")
    step = total // count
    return [min(step // 2 + i * step, last_timestep(pipeline)) for i in range(count)]


def target(pipeline: Any, latents: Tensor, noise: Tensor, timestep: int) -> Tensor:
    """What a denoiser of this kind should predict, float32: the noise, the velocity
    sqrt(abar) eps - sqrt(1 - abar) x_0, the picture, or of a rectified flow eps - x_0.

    Raises:
        ValueError: a prediction of another kind.
    """
    latents, noise = latents.float(), noise.float()
    if is_flow(pipeline):
        if type(denoiser(pipeline)).__name__ == FLUX:
            raise ValueError("model: FLUX predicts tokens; the diffusion classifier compares latents")
        return noise - latents
    kind = pipeline.scheduler.config.prediction_type
    kept = pipeline.scheduler.alphas_cumprod[timestep].item()
    kinds = {
        "epsilon": noise,
        "v_prediction": kept**0.5 * noise - (1 - kept) ** 0.5 * latents,
        "sample": latents,
    }
    if kind not in kinds:
        raise ValueError(f"model: predicts {kind!r}; known are {', '.join(kinds)}")
    return kinds[kind]


def class_prompts(pipeline: Any, names: Sequence[str], template: str) -> ClassPrompts:
    """What a pipeline is asked: for each class the template with its name for ``{}``.

    A class-conditional model is asked its own classes that are named after one of these (``red circle``
    and ``red star`` after ``red``); where they have no names they must be these, in this order.

    Raises:
        ValueError: a template without ``{}``, or a class after which none of the model's is named.
    """
    labels = getattr(pipeline, "labels", None)
    if by_class(pipeline) and labels:
        stand = [(number, i) for label, number in labels.items() for i, name in enumerate(names) if _of(name, label)]
        missing = sorted(set(range(len(names))) - {i for _, i in stand})
        if missing:
            raise ValueError(f"model: none of its classes is named after {names[missing[0]]!r}")
        numbers, answers = zip(*sorted(set(stand)), strict=True)
        return ClassPrompts(list(numbers), list(answers))
    prompts = list(range(len(names))) if by_class(pipeline) else class_texts(names, template)
    return ClassPrompts(prompts, list(range(len(names))))


def _of(name: str, label: str) -> bool:
    """Whether a label is one of a name's synonyms, which commas divide, or has one among its words."""
    return bool({part.strip() for part in name.split(",")} & {label, *label.split()})


def class_texts(names: Sequence[str], template: str) -> list[str]:
    """A text a class: the template with the class's name for ``{}``, an underscore as a space.

    Raises:
        ValueError: a template without ``{}``.
    """
    if "{}" not in template:
        raise ValueError(f"template: expected a place {{}} for the class's name, got {template!r}")
    return [template.replace("{}", name.replace("_", " ")) for name in names]


def _rows(told: Any, chosen: Sequence[int], name: str = "") -> Any:
    """The conditions of some classes."""
    if isinstance(told, dict):
        return {key: _rows(value, chosen, key) for key, value in told.items()}
    return told[list(chosen)] if isinstance(told, Tensor) and name not in NOT_BY_PICTURE else told
