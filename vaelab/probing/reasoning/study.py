"""Train and test every stream with every seed, each from the same language model."""

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pandas as pd
from tqdm import tqdm

from vaelab.core.io import read_json, write_json
from vaelab.core.paths import local
from vaelab.models.language_model import LanguageModel
from vaelab.models.registry import embedded_clip_path, embedded_language_path, files_digest
from vaelab.probing.reasoning.conversations import Asked, Lessons
from vaelab.probing.reasoning.features import FeatureTable, stream_parts
from vaelab.probing.reasoning.model import (
    StageConfig,
    VisualReasoner,
    answer_all,
    prepare_stage,
    stage_batches,
    train_stage,
)
from vaelab.training.planning import TrainingPlan, plan_training


@dataclass(frozen=True)
class StudyConfig:
    """How every stream is trained."""

    stage1: StageConfig
    """The adapters, on captions."""
    stage2: StageConfig
    """The language model too, on instructions."""
    tuning: str = "full"
    """How stage 2 trains the language model: ``full``, ``lora`` or ``frozen``."""
    standardize: bool = True
    """Whether each channel of the features is brought to mean 0 and deviation 1."""
    longest: int = 64
    """The number of tokens after which an answer is cut."""


def answer_streams(
    streams: Sequence[str], seeds: Sequence[int], load_language: Callable[[], LanguageModel], lessons: Lessons,
    training: FeatureTable, test: FeatureTable, asked: Sequence[Asked], config: StudyConfig, folder: Path, *,
    settings: dict[str, Any],
) -> tuple[dict[tuple[str, int], list[str]], pd.DataFrame]:  # fmt: skip
    """Train each stream with each seed in two stages, and let it answer the test questions.

    What is finished is not done again: every answer list is a file of the folder, and interrupted trainings are resumed
    from their checkpoints.

    Args:
        streams: the streams' names.
        seeds: determine the adapters' weights and the order of the conversations.
        load_language: loads the language model, anew for each training.
        lessons: what is learned.
        training: the features of the lessons' pictures.
        test: the features of the questions' pictures.
        asked: the questions.
        config: how everything is trained.
        folder: the folder for checkpoints and answers.
        settings: what else decides the results, such as the models' identities; plain JSON.

    Returns:
        The answers by stream and seed, and the losses: ``stream``, ``seed``, ``stage``, ``step``, ``loss``.
    """
    answers, history = {}, []
    for seed in seeds:
        for number, stream in enumerate(streams):
            place = folder / f"stream-{number}-seed-{seed}"
            done = place / "answers.json"
            if not done.is_file():
                reasoner = make_reasoner(stream, load_language(), training, config, seed)
                rows = []
                for name, stage in (("1", config.stage1), ("2", config.stage2)):
                    if name == "1" and not reasoner.parts:
                        continue  # without pictures there is nothing to train before the language model
                    trained = train_stage(
                        reasoner, training, lessons.captions if name == "1" else lessons.instructions,
                        replace(stage, seed=seed), tuning="frozen" if name == "1" else config.tuning,
                        folder=place / f"stage-{name}", settings={**settings, "stream": stream, "seed": seed},
                        title=f"{stream}, stage {name}",
                    )  # fmt: skip
                    rows += [{"stream": stream, "seed": seed, "stage": name, **row} for row in trained.history]
                questions = [(one.picture, one.question) for one in asked]
                with tqdm(
                    total=len(asked), desc=f"{stream}, answers", file=sys.stdout, mininterval=2, ncols=100
                ) as bar:
                    given = answer_all(reasoner, test, questions, longest=config.longest, report=bar.update)
                write_json(done, {"answers": given, "history": rows})
            kept = read_json(done)
            answers[stream, seed] = kept["answers"]
            history += kept["history"]
    return answers, pd.DataFrame(history)


def plan_streams(
    streams: Sequence[str], seeds: Sequence[int], load_language: Callable[[], LanguageModel], lessons: Lessons,
    training: FeatureTable, config: StudyConfig,
) -> list[TrainingPlan]:  # fmt: skip
    """Estimate what the trainings of :func:`answer_streams` take, from a few steps of the stream with the most parts;
    the arguments are its own."""
    reasoner = make_reasoner(
        max(streams, key=lambda stream: len(stream_parts(stream))), load_language(), training, config, seeds[0]
    )
    seen = sum(bool(stream_parts(stream)) for stream in streams)
    plans = []
    for name, stage, conversations, tuning, count in (
        ("stage 1, captions", config.stage1, lessons.captions, "frozen", seen),
        ("stage 2, instructions", config.stage2, lessons.instructions, config.tuning, len(streams)),
    ):
        objective = prepare_stage(reasoner, training, conversations, tuning, seeds[0])
        plans.append(
            plan_training(
                objective, stage_batches(conversations, stage), stage.training(len(conversations)), name,
                trainings=count * len(seeds), checkpoints=count * len(seeds),
            )
        )  # fmt: skip
    return plans


def identify(**models: str) -> dict[str, str]:
    """Describe what identifies models, by the parameter that names each: the SHA-256 of a folder's files, or the id on
    the hub. ``embedded`` means the embedded CLIP as ``image_encoder``, the embedded language model as
    ``language_model``."""
    embedded = {"image_encoder": embedded_clip_path(), "language_model": embedded_language_path()}
    found = {}
    for parameter, name in models.items():
        folder = embedded.get(parameter) if name == "embedded" else local(name)
        found[parameter] = files_digest(folder) if folder and folder.is_dir() else name
    return found


def make_reasoner(
    stream: str, language: LanguageModel, training: FeatureTable, config: StudyConfig, seed: int
) -> VisualReasoner:
    """Make a stream's reasoner before its training."""
    statistics = training.statistics() if config.standardize else None
    return VisualReasoner(stream, training.shapes, language, statistics=statistics, seed=seed)
