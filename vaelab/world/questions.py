"""Questions about scenes with their true answers, and a parser that marks an answer by the truth.

The categories are those of LLaVA-Bench (Liu et al. 2023): ``conversational`` asks for a single fact, ``detail`` for a
description of the picture, and ``complex`` for counting, relations, comparisons and negation. Every kind of question
has several phrasings. The last one is held out: training does not use it, so that a test can ask in words that the
model knows but in a sentence that it has not read.
"""

import re
from collections.abc import Callable, Iterable
from dataclasses import replace
from itertools import permutations
from typing import Any, NamedTuple

import numpy as np

from vaelab.core.validate import at_least, one_of
from vaelab.world.scenes import (
    COLOURS,
    GROUNDS,
    PHRASES,
    POSITIONS,
    SHAPES,
    SIZES,
    TEXTURES,
    Scene,
    Thing,
    with_article,
)

CATEGORIES = ("conversational", "detail", "complex")
NUMBERS = ("zero", "one", "two", "three")
RELATIONS: dict[str, tuple[int, int]] = {"left of": (0, -1), "right of": (0, 1), "above": (1, -1), "below": (1, 1)}
"""Axis of a position (0 is the column, 1 the row), and the sign of the difference along it."""
NEITHER = "neither"
"""The answer if two compared objects have the same size."""
VALUES: dict[str, tuple[str, ...]] = {
    "shape": SHAPES, "colour": tuple(COLOURS), "size": tuple(SIZES), "position": tuple(POSITIONS),
    "ground": tuple(GROUNDS), "texture": TEXTURES, "yes or no": ("yes", "no"), "number": NUMBERS,
    "larger": (*SHAPES, NEITHER),
}  # fmt: skip
"""What a question of one value can be answered with."""


class Kind(NamedTuple):
    """A kind of question."""

    category: str
    value: str
    """A key of :data:`VALUES`, or ``description``."""
    phrasings: tuple[str, ...]
    """Sentences with slots in braces; the last one is held out."""


KINDS = {
    "colour": Kind(
        "conversational", "colour",
        ("what colour is the {shape}?", "what is the colour of the {shape}?", "tell me the colour of the {shape}."),
    ),
    "shape": Kind(
        "conversational", "shape",
        ("what shape is the {colour} thing?", "tell me the shape of the {colour} thing.",
         "what is the shape of the {colour} thing?"),
    ),
    "size": Kind(
        "conversational", "size",
        ("is the {shape} large or small?", "tell me the size of the {shape}.", "what is the size of the {shape}?"),
    ),
    "position": Kind(
        "conversational", "position",
        ("where is the {shape}?", "tell me where the {shape} is.", "where in the picture is the {shape}?"),
    ),
    "thing at": Kind(
        "conversational", "shape",
        ("what shape is the thing {place}?", "tell me the shape of the thing {place}.", "which thing is {place}?"),
    ),
    "exists": Kind(
        "conversational", "yes or no",
        ("is there {a_thing}?", "does the picture show {a_thing}?", "tell me whether there is {a_thing}."),
    ),
    "ground": Kind(
        "conversational", "ground",
        ("what colour is the background?", "tell me the colour of the background.",
         "what is the colour of the background?"),
    ),
    "texture": Kind(
        "conversational", "texture",
        ("what pattern is the background?", "what is the pattern of the background?",
         "tell me the pattern of the background."),
    ),
    "describe": Kind(
        "detail", "description",
        ("describe the picture.", "what does the picture show?", "tell me what is in the picture.",
         "tell me what the picture does show."),
    ),
    "count": Kind(
        "complex", "number",
        ("how many things are there?", "tell me how many things there are.", "how many things are in the picture?"),
    ),
    "count size": Kind(
        "complex", "number",
        ("how many {size} things are there?", "how many {size} things are in the picture?",
         "tell me how many {size} things there are."),
    ),
    "relation": Kind(
        "complex", "yes or no",
        ("is {first} {relation} {second}?", "in the picture, is {first} {relation} {second}?",
         "tell me whether {first} is {relation} {second}."),
    ),
    "comparison": Kind(
        "complex", "larger",
        ("which is larger, {first} or {second}?", "{first} or {second}: which is larger?",
         "tell me which is larger, {first} or {second}."),
    ),
    "other": Kind(
        "complex", "shape",
        ("which thing is not a {shape}?", "what is the shape of the thing that is not a {shape}?",
         "tell me which thing is not a {shape}."),
    ),
    "absent": Kind(
        "complex", "yes or no",
        ("is there not {a_thing}?", "tell me whether there is not {a_thing}.", "does the picture not show {a_thing}?"),
    ),
}  # fmt: skip
"""The kinds of questions."""


class Instruction(NamedTuple):
    """A question about a scene with its true answer."""

    kind: str
    question: str
    answer: str
    held_out: bool
    """Whether the phrasing is held out."""

    @property
    def category(self) -> str:
        """The category of the question."""
        return KINDS[self.kind].category


class Mark(NamedTuple):
    """How good an answer is."""

    score: float
    """1 if the answer is right, 0 if it is wrong or was not understood; of a description the share of facts, see
    :func:`mark`."""
    parsed: bool
    """Whether the answer was understood."""


def instructions(
    scene: Scene, seed: int, *, held_out: bool = False, kinds: Iterable[str] = tuple(KINDS)
) -> list[Instruction]:
    """Ask about a scene: one question of each kind that the scene allows.

    A kind may need, for instance, two objects of different shapes.

    Args:
        scene: the scene.
        seed: determines what is asked and in which phrasing, 0 or more.
        held_out: whether the phrasings are the held-out ones.
        kinds: the kinds of questions.

    Raises:
        ValueError: there is no such kind.
    """
    at_least("seed", seed, 0)
    found = []
    for kind in kinds:
        one_of("kinds", kind, KINDS)
        rng = np.random.default_rng([list(KINDS).index(kind), seed])
        asked = _ASK[kind](scene, rng)
        if asked is None:
            continue
        slots, answer = asked
        sentences = KINDS[kind].phrasings
        sentence = sentences[-1] if held_out else sentences[rng.integers(len(sentences) - 1)]
        found.append(Instruction(kind, sentence.format(**slots), answer, held_out))
    return found


def describe(scene: Scene) -> str:
    """Describe a scene in words: every factor of every object, from the top left to the bottom right, and of the
    ground."""
    ordered = sorted(scene.things, key=lambda thing: POSITIONS[thing.position][::-1])
    return replace(scene, things=tuple(ordered)).spelled_out().prompt


def parse_answer(kind: str, text: str) -> Any:
    """Read an answer in free text.

    Args:
        kind: the kind of the question.
        text: the answer.

    Returns:
        The only value of the question's kind that the text names. For a description the set of its facts: a factor of
        an object is ``(position, factor, value)``, with the position None if the object has none in the text, and one
        of the ground ``(factor, value)``. None if the text names no value, or several.
    """
    one_of("kind", kind, KINDS)
    value = KINDS[kind].value
    text = " ".join(re.findall(r"[a-z0-9]+", text.lower())).replace("center", "centre").replace("gray", "grey")
    if value == "description":
        return _read_description(text) or None
    if value == "number":
        text = re.sub(r"\b[0-3]\b", lambda match: NUMBERS[int(match[0])], text)
    named = set(re.findall(rf"\b(?:{_either(VALUES[value])})\b", text))
    return named.pop() if len(named) == 1 else None


def mark(instruction: Instruction, text: str) -> Mark:
    """Mark an answer by the truth.

    A description's score is the number of its true facts, divided by the number of facts that are true or stated
    (Jaccard's index): what is missing counts like what is made up.
    """
    given, truth = parse_answer(instruction.kind, text), parse_answer(instruction.kind, instruction.answer)
    if given is None:
        return Mark(0.0, False)
    if isinstance(truth, frozenset):
        return Mark(len(given & truth) / len(given | truth), True)
    return Mark(float(given == truth), True)


def _either(words: Iterable[str]) -> str:
    """A regular expression of alternatives, longer ones first: ``top left`` before ``top``."""
    return "|".join(sorted(words, key=len, reverse=True))


_THING = re.compile(
    rf"\b(?:(?P<size>{_either(SIZES)}) )?(?:(?P<colour>{_either(COLOURS)}) )?(?P<shape>{_either(SHAPES)})\b"
    rf"(?: (?:in|at|on) the (?P<position>{_either(POSITIONS)})\b)?"
)
_GROUND = re.compile(rf"\b(?:(?P<texture>{_either(TEXTURES)}) )?(?:(?P<ground>{_either(GROUNDS)}) )?background\b")


def _read_description(text: str) -> frozenset:
    things = [match.groupdict() for match in _THING.finditer(text)]
    facts = {
        (thing["position"], factor, thing[factor])
        for thing in things
        for factor in ("shape", "colour", "size")
        if thing[factor]
    }
    ground = {item for match in _GROUND.finditer(text) for item in match.groupdict().items() if item[1]}
    return frozenset(facts | ground)


_Asked = tuple[dict[str, str], str] | None


def _alone(scene: Scene, factor: str) -> list[Thing]:
    """The objects whose value of a factor no other object of the scene has."""
    values = [getattr(thing, factor) for thing in scene.things]
    return [thing for thing in scene.things if values.count(getattr(thing, factor)) == 1]


def _pick(choices: list, rng: np.random.Generator) -> Any:
    return choices[rng.integers(len(choices))] if choices else None


def _fact(given: str, asked: str) -> Callable[[Scene, np.random.Generator], _Asked]:
    """Ask for one factor of an object that another factor identifies."""

    def ask(scene: Scene, rng: np.random.Generator) -> _Asked:
        thing = _pick(_alone(scene, given), rng)
        if thing is None:
            return None
        answer = PHRASES[thing.position] if asked == "position" else getattr(thing, asked)
        return {given: getattr(thing, given), "place": PHRASES[thing.position]}, answer

    return ask


def _existence(negated: bool) -> Callable[[Scene, np.random.Generator], _Asked]:
    """Ask whether there is an object of some colour and shape. Half of those asked for do not exist; these have the
    colour or the shape of one that does."""

    def ask(scene: Scene, rng: np.random.Generator) -> _Asked:
        real = {(thing.colour, thing.shape) for thing in scene.things}
        exists = bool(rng.integers(2))
        if exists:
            colour, shape = _pick(sorted(real), rng)
        else:
            near = {(c, s) for c, _ in real for s in SHAPES} | {(c, s) for c in COLOURS for _, s in real}
            colour, shape = _pick(sorted(near - real), rng)
        return {"a_thing": with_article(f"{colour} {shape}")}, "yes" if exists != negated else "no"

    return ask


def _ask_relation(scene: Scene, rng: np.random.Generator) -> _Asked:
    things = _alone(scene, "shape")
    pairs = [
        (one, other, relation)
        for one, other in permutations(things, 2)
        for relation, (axis, _) in RELATIONS.items()
        if POSITIONS[one.position][axis] != POSITIONS[other.position][axis]
    ]
    if not pairs:
        return None
    one, other, relation = _pick(pairs, rng)
    slots = {"first": f"the {one.shape}", "relation": relation, "second": f"the {other.shape}"}
    return slots, "yes" if _holds(one, relation, other) else "no"


def _holds(one: Thing, relation: str, other: Thing) -> bool:
    axis, sign = RELATIONS[relation]
    return sign * (POSITIONS[one.position][axis] - POSITIONS[other.position][axis]) > 0


def _references(thing: Thing, scene: Scene) -> list[str]:
    """Phrases that only this object fits."""
    found = [f"the {thing.shape}"] if thing in _alone(scene, "shape") else []
    found += [f"the {thing.colour} thing"] if thing in _alone(scene, "colour") else []
    for relation in RELATIONS:
        for other in _alone(scene, "shape"):
            if [each for each in scene.things if _holds(each, relation, other)] == [thing]:
                found.append(f"the thing {relation} the {other.shape}")
    return found


def _ask_comparison(scene: Scene, rng: np.random.Generator) -> _Asked:
    pairs = [
        (one, other)
        for one, other in permutations(scene.things, 2)
        if one.shape != other.shape and _references(one, scene) and _references(other, scene)
    ]
    differing = [(one, other) for one, other in pairs if one.size != other.size]
    if not pairs:
        return None
    one, other = _pick(differing or pairs, rng)
    slots = {"first": _pick(_references(one, scene), rng), "second": _pick(_references(other, scene), rng)}
    return slots, NEITHER if one.size == other.size else (one if one.size == "large" else other).shape


def _ask_other(scene: Scene, rng: np.random.Generator) -> _Asked:
    if len(scene.things) != 2 or len(_alone(scene, "shape")) != 2:
        return None
    first = int(rng.integers(2))
    return {"shape": scene.things[first].shape}, scene.things[1 - first].shape


def _ask_size_count(scene: Scene, rng: np.random.Generator) -> _Asked:
    size = _pick(list(SIZES), rng)
    return {"size": size}, NUMBERS[sum(thing.size == size for thing in scene.things)]


_ASK: dict[str, Callable[[Scene, np.random.Generator], _Asked]] = {
    "colour": _fact("shape", "colour"),
    "shape": _fact("colour", "shape"),
    "size": _fact("shape", "size"),
    "position": _fact("shape", "position"),
    "thing at": _fact("position", "shape"),
    "exists": _existence(negated=False),
    "ground": lambda scene, rng: ({}, scene.ground),
    "texture": lambda scene, rng: ({}, scene.texture),
    "describe": lambda scene, rng: ({}, describe(scene)),
    "count": lambda scene, rng: ({}, NUMBERS[len(scene.things)]),
    "count size": _ask_size_count,
    "relation": _ask_relation,
    "comparison": _ask_comparison,
    "other": _ask_other,
    "absent": _existence(negated=True),
}
