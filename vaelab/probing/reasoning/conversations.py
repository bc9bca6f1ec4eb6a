"""What the language model learns from and is asked: the world's scenes, or files in LLaVA's formats."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from vaelab.core.paths import local
from vaelab.core.validate import at_least, one_of
from vaelab.data.transforms import decode, square, to_rgb
from vaelab.models.language_model import Turn
from vaelab.probing.reasoning.model import Conversation
from vaelab.world.questions import Instruction, instructions
from vaelab.world.scenes import SIDE, SPLITS, Scene, render, sample


class Asked(NamedTuple):
    """A test question about a picture."""

    picture: int
    """The picture's index."""
    question: str
    category: str
    instruction: Instruction | None = None
    """The question with its true answer, on the world."""
    split: str = ""
    """The world's split that the scene is of."""
    context: str = ""
    """A description of the picture for a judge that does not see it."""
    reference: str = ""
    """The answer that a judge compares with."""


@dataclass(frozen=True)
class ScenePictures:
    """Pictures of scenes."""

    scenes: tuple[Scene, ...]
    resolution: int = SIDE
    """Side of the pictures, in pixels."""

    def __len__(self) -> int:
        return len(self.scenes)

    def __call__(self, rows: Sequence[int]) -> Tensor:
        """Draw the scenes with these indices: (B, 3, R, R) in [-1, 1]."""
        drawn = render([self.scenes[row] for row in rows])
        if self.resolution == SIDE:
            return drawn
        return F.interpolate(drawn, (self.resolution,) * 2, mode="bilinear", antialias=True, align_corners=False)


@dataclass(frozen=True)
class FilePictures:
    """Pictures in files."""

    files: tuple[Path, ...]
    resolution: int
    """Side of the pictures, in pixels."""

    def __len__(self) -> int:
        return len(self.files)

    def __call__(self, rows: Sequence[int]) -> Tensor:
        """Read the pictures with these indices: (B, 3, R, R) in [-1, 1]; the shorter side is fitted, the centre cut."""
        found = [decode({"path": self.files[row].name}, [self.files[row].parent]) for row in rows]
        return torch.stack([square(to_rgb(image).image, self.resolution) for image in found])


class Lessons(NamedTuple):
    """The material of both stages."""

    pictures: Any
    """:class:`ScenePictures` or :class:`FilePictures`."""
    captions: list[Conversation]
    """Stage 1: descriptions of pictures."""
    instructions: list[Conversation]
    """Stage 2: questions about pictures."""


def scene_lessons(count: int, seed: int = 0, resolution: int = SIDE, split: str = "train") -> Lessons:
    """Make lessons from scenes: one description of each, and all questions that a scene allows.

    Args:
        count: the number of scenes.
        seed: determines the questions.
        resolution: the side of the pictures.
        split: the scenes' split.
    """
    at_least("max_images", count, 1)
    scenes = tuple(sample(i, split) for i in range(count))
    captions, questions = [], []
    for i, scene in enumerate(scenes):
        for one in instructions(scene, 1_000_003 * seed + i):
            chosen = captions if one.category == "detail" else questions
            chosen.append(Conversation(i, (Turn(one.question, one.answer),)))
    return Lessons(ScenePictures(scenes, resolution), captions, [*captions, *questions])


def scene_questions(
    count: int, splits: Sequence[str], seed: int = 0, resolution: int = SIDE
) -> tuple[ScenePictures, list[Asked]]:
    """Ask about held-out scenes in held-out phrasings, and about as many in the phrasings of training.

    Args:
        count: the number of scenes of each split; every second one is asked about in held-out phrasings.
        splits: splits of the world, such as ``test`` and ``unseen``.
        seed: determines the questions.
        resolution: the side of the pictures.
    """
    at_least("test_images", count, 1)
    at_least("test_splits", len(splits), 1)
    for split in splits:
        one_of("test_splits", split, SPLITS)
    scenes = [(split, sample(i, split)) for split in splits for i in range(count)]
    asked = [
        Asked(i, one.question, one.category, one, split)
        for i, (split, scene) in enumerate(scenes)
        for one in instructions(scene, 1_000_003 * seed + i, held_out=bool(i % 2))
    ]
    return ScenePictures(tuple(scene for _, scene in scenes), resolution), asked


def read_lessons(
    captions: str, caption_images: str, questions: str, question_images: str, resolution: int, limit: int = 0
) -> Lessons:
    """Read lessons in LLaVA's format: a JSON list of ``{"image": ..., "conversations": [{"from": "human" or "gpt",
    "value": ...}, ...]}``. Conversations without a picture are left out, and their number is printed.

    Args:
        captions: the file of stage 1, such as LLaVA-CC3M-Pretrain-595K's ``chat.json``.
        caption_images: the folder of its pictures.
        questions: the file of stage 2, such as ``llava_instruct_80k.json``.
        question_images: the folder of its pictures.
        resolution: the side of the pictures, in pixels.
        limit: the number of conversations of each file, from the first; 0 means all.

    Raises:
        ValueError: a file or picture does not exist, or an entry is not of this form.
    """
    files: dict[Path, int] = {}
    parts = [
        _read_conversations(file, folder, parameter, files, limit)
        for file, folder, parameter in (
            (captions, caption_images, "captions"), (questions, question_images, "instructions"),
        )
    ]  # fmt: skip
    return Lessons(FilePictures(tuple(files), resolution), *parts)


def read_questions(
    questions: str, images: str, contexts: str, references: str, resolution: int
) -> tuple[FilePictures, list[Asked]]:
    """Read questions in LLaVA-Bench's format: files of JSON lines with ``question_id``.

    Args:
        questions: lines with ``image``, ``text`` and ``category``.
        images: the folder of the pictures.
        contexts: lines with ``image`` and ``caption``, a description for a judge that does not see the picture.
        references: lines with ``question_id`` and ``text``, the answers that a judge compares with.
        resolution: the side of the pictures, in pixels.

    Raises:
        ValueError: a file or picture does not exist, a line is not of this form, or a question has no reference.
    """
    files: dict[Path, int] = {}
    descriptions = {row["image"]: row["caption"] for row in _lines(contexts, "contexts", ("image", "caption"))}
    answers = {row["question_id"]: row["text"] for row in _lines(references, "references", ("question_id", "text"))}
    asked = []
    for row in _lines(questions, "questions", ("question_id", "image", "text", "category")):
        number = row["question_id"]
        if number not in answers or row["image"] not in descriptions:
            raise ValueError(f"questions: question {number} has no reference answer or its picture no context")
        picture = files.setdefault(_picture(images, row["image"], "question_images"), len(files))
        asked.append(
            Asked(picture, row["text"], row["category"], context=descriptions[row["image"]], reference=answers[number])
        )
    return FilePictures(tuple(files), resolution), asked


def _read_conversations(
    file: str, folder: str, parameter: str, files: dict[Path, int], limit: int
) -> list[Conversation]:
    rows = _json(file, parameter)
    if not isinstance(rows, list):
        raise ValueError(f"{parameter}: {file!r} holds no list of conversations")
    found, without = [], 0
    for number, row in enumerate(rows[: limit or None]):
        said = row.get("conversations") if isinstance(row, dict) else None
        roles = [turn.get("from") for turn in said] if isinstance(said, list) else []
        if not roles or roles != ["human", "gpt"] * (len(roles) // 2):
            raise ValueError(f"{parameter}: entry {number} of {file!r} is no conversation of human and gpt in turn")
        if not row.get("image"):
            without += 1
            continue
        picture = files.setdefault(_picture(folder, row["image"], parameter), len(files))
        pairs = zip(said[::2], said[1::2], strict=True)
        found.append(Conversation(picture, tuple(Turn(one["value"], other["value"]) for one, other in pairs)))
    if without:
        print(f"{parameter}: {without:,} of {len(rows):,} conversations have no picture and are left out")
    if not found:
        raise ValueError(f"{parameter}: {file!r} has no conversation about a picture")
    return found


def _picture(folder: str, name: str, parameter: str) -> Path:
    place = local(folder)
    if place is None or not (place / name).is_file():
        raise ValueError(f"{parameter}: the picture {name!r} is not in the folder {folder!r}")
    return place / name


def _file(path: str, parameter: str) -> str:
    place = local(path)
    if place is None or not place.is_file():
        raise ValueError(f"{parameter}: {path!r} is no file")
    return place.read_text()


def _json(path: str, parameter: str) -> Any:
    try:
        return json.loads(_file(path, parameter))
    except json.JSONDecodeError as error:
        raise ValueError(f"{parameter}: {path!r} is no JSON ({error})") from error


def _lines(path: str, parameter: str, keys: Sequence[str]) -> list[dict[str, Any]]:
    try:
        rows = [json.loads(line) for line in _file(path, parameter).splitlines() if line.strip()]
    except json.JSONDecodeError as error:
        raise ValueError(f"{parameter}: {path!r} has a line that is no JSON ({error})") from error
    for number, row in enumerate(rows):
        missing = [key for key in keys if not isinstance(row, dict) or key not in row]
        if missing:
            raise ValueError(f"{parameter}: line {number + 1} of {path!r} lacks {', '.join(missing)}")
    return rows
