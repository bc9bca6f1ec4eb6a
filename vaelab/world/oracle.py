"""The scene reader (oracle): recovers the scene from a picture by the rules of the renderer alone.

A scene of the synthetic scene world consists of objects ("things" in the code) on a ground; a factor is one of their
attributes, such as a colour. The reader is the maximum-likelihood estimate under the renderer and white noise. First it
chooses the ground that is nearest to the picture. Then it chooses, at each of the nine positions, the object (or none)
that leaves the smallest squared error there. No part of it is trained, so it cannot share the biases of the model that
it evaluates.
"""

import functools
import itertools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from vaelab.world.scenes import (
    CENTRES,
    COLOURS,
    FACTORS,
    JITTER,
    POSITIONS,
    SCENE_FACTORS,
    SHAPES,
    SIDE,
    SIZES,
    Scene,
    Thing,
    background,
)

REACH = JITTER + 1
"""Largest offset that is searched, in pixels."""
WINDOW = max(SIZES.values()) + 2 * REACH
CHUNK = 64
GROUND_SHARE = 0.65


class _Templates(NamedTuple):
    coverage: Tensor
    """(K, W * W): the coverage of each of the K objects in a position's window."""
    things: list[tuple[str, str, tuple[int, int]]]
    """Shape, size and offset of each of the K objects."""
    colours: Tensor
    """(C, 3) in [0, 1]: the colours that an object can have."""


def read_scenes(pictures: Tensor) -> list[Scene]:
    """Recognise the scenes that pictures show.

    Args:
        pictures: (N, 3, 64, 64) in [-1, 1].

    Returns:
        One scene per picture, with its objects in the order of the positions; a scene may have no object.

    Raises:
        ValueError: the pictures have another shape or are not floating point, or a value is not finite.
    """
    if not pictures.is_floating_point():
        raise ValueError(f"pictures: expected floating point values in [-1, 1], got {pictures.dtype}")
    if pictures.ndim != 4 or tuple(pictures.shape[1:]) != (3, SIDE, SIDE):
        raise ValueError(f"pictures: expected (N, 3, {SIDE}, {SIDE}), got {tuple(pictures.shape)}")
    if not torch.isfinite(pictures).all():
        raise ValueError("pictures: not all values are finite")
    pictures = ((pictures.detach().float().cpu() + 1) / 2).clamp(0, 1)
    return [scene for chunk in pictures.split(CHUNK) for scene in _read(chunk)]


def _read(pictures: Tensor) -> list[Scene]:
    names, grounds = _grounds()
    # objects cover less than a third of a picture, so the two thirds of the pixels nearest to the ground show ground
    kept = int(GROUND_SHARE * SIDE**2)
    apart = [
        ((pictures - ground) ** 2).sum(1).flatten(1).topk(kept, largest=False, sorted=False).values.sum(1)
        for ground in grounds
    ]
    nearest = torch.stack(apart).argmin(0)
    found = [[] for _ in pictures]
    for position in POSITIONS:
        best = _best_at(position, pictures, nearest)
        for scene, thing in zip(found, best, strict=True):
            scene += [thing] if thing else []
    return [Scene(tuple(things), *names[ground]) for things, ground in zip(found, nearest.tolist(), strict=True)]


def _best_at(position: str, pictures: Tensor, ground: Tensor) -> list[Thing | None]:
    """Find the object with the smallest ||P - B - a (C - B)||^2 in each picture's window; the part of this sum that all
    objects share is left out. P is the picture, B the ground, C the object's colour, a its coverage."""
    templates, (rows, columns) = _templates(), _window(position)
    coverage, colours = templates.coverage, templates.colours
    behind = _grounds()[1][ground][:, :, rows, columns].flatten(2)  # (N, 3, W * W)
    rest = pictures[:, :, rows, columns].flatten(2) - behind
    inner = torch.einsum("kw,ncw->nkc", coverage, rest) @ colours.T  # <P - B, a C>: (N, K, colours)
    inner -= torch.einsum("kw,nw->nk", coverage, (rest * behind).sum(1))[..., None]
    squared = coverage**2
    norm = squared.sum(1)[:, None] * (colours**2).sum(1) - 2 * torch.einsum("kw,ncw->nkc", squared, behind) @ colours.T
    norm = norm + torch.einsum("kw,nw->nk", squared, (behind**2).sum(1))[..., None]
    error = (norm - 2 * inner).flatten(1)  # an empty position has 0
    least, index = error.min(1)
    return [
        _thing(position, *divmod(i, len(colours))) if value < 0 else None
        for value, i in zip(least.tolist(), index.tolist(), strict=True)
    ]


def _thing(position: str, template: int, colour: int) -> Thing:
    shape, size, offset = _templates().things[template]
    rows, columns = _window(position)
    offset = tuple(
        shift + window.start + WINDOW // 2 - CENTRES[cell]  # at the border a window stands further in
        for shift, window, cell in zip(offset, (columns, rows), POSITIONS[position], strict=True)
    )
    return Thing(shape, tuple(COLOURS)[colour], size, position, offset)


def _window(position: str) -> tuple[slice, slice]:
    column, row = POSITIONS[position]
    starts = (int(np.clip(CENTRES[cell] - WINDOW // 2, 0, SIDE - WINDOW)) for cell in (row, column))
    return tuple(slice(start, start + WINDOW) for start in starts)


@functools.cache
def _grounds() -> tuple[list[tuple[str, str]], Tensor]:
    names = list(itertools.product(*(FACTORS[factor] for factor in SCENE_FACTORS)))
    pictures = np.stack([background(*name) for name in names])
    return names, torch.from_numpy(pictures).permute(0, 3, 1, 2).contiguous()


@functools.cache
def _templates() -> _Templates:
    things, coverage = [], []
    rows, columns = _window("centre")
    shifts = range(-REACH, REACH + 1)
    for shape, size, offset in itertools.product(SHAPES, SIZES, itertools.product(shifts, shifts)):
        things.append((shape, size, offset))
        coverage.append(Thing(shape, "red", size, "centre", offset).coverage()[rows, columns].ravel())
    colours = torch.tensor(list(COLOURS.values()), dtype=torch.float32) / 255
    return _Templates(torch.from_numpy(np.stack(coverage)), things, colours)


def check_prompts(scenes: Sequence[Scene], pictures: Tensor) -> pd.DataFrame:
    """Check whether pictures show what their prompts name.

    The objects that the reader finds are assigned to the scene's objects such that as many named factors as possible
    agree. If an object is missing, all its factors are wrong.

    Args:
        scenes: N scenes; only factors that their prompts name are checked.
        pictures: (N, 3, 64, 64) in [-1, 1], one picture per scene.

    Returns:
        One row per named factor: ``picture`` (index), ``thing`` (index of the object; -1 for the ground), ``factor``,
        ``expected``, ``recognised`` (None if the object is missing) and ``correct``. In addition one row per picture
        whose factor is ``count``, the number of objects.

    Raises:
        ValueError: the numbers of pictures and scenes differ, or :func:`read_scenes` cannot read the pictures.
    """
    if len(scenes) != len(pictures):
        raise ValueError(f"pictures: expected one for each of the {len(scenes)} scenes, got {len(pictures)}")
    rows = []
    for picture, (scene, seen) in enumerate(zip(scenes, read_scenes(pictures), strict=True)):
        pairs = [(i, thing, match) for i, (thing, match) in enumerate(match_things(scene.things, seen.things))]
        for i, thing, match in [*pairs, (-1, scene, seen)]:
            for factor in thing.named:
                shown = getattr(match, factor) if match else None
                rows.append((picture, i, factor, getattr(thing, factor), shown, getattr(thing, factor) == shown))
        counts = len(scene.things), len(seen.things)
        rows.append((picture, -1, "count", *counts, counts[0] == counts[1]))
    return pd.DataFrame(rows, columns=["picture", "thing", "factor", "expected", "recognised", "correct"])


def match_things(asked: Sequence[Thing], seen: Sequence[Thing]) -> list[tuple[Thing, Thing | None]]:
    """Pair each object of a scene with one that is seen, or with None, such that as many named factors as possible
    agree."""
    agree = np.array([[sum(getattr(a, f) == getattr(s, f) for f in a.named) for s in seen] for a in asked])
    if not asked or not seen:
        return [(thing, None) for thing in asked]
    matched = dict(zip(*linear_sum_assignment(-agree), strict=True))
    return [(thing, seen[matched[i]] if i in matched else None) for i, thing in enumerate(asked)]


def accuracy_by_factor(checked: pd.DataFrame) -> pd.DataFrame:
    """Compute the accuracy of each factor, from the rows of :func:`check_prompts`.

    Returns:
        Columns ``factor``; ``pictures``, the number of pictures whose prompt names the factor; ``accuracy``, the share
        of these pictures in which it is correct for every object; ``thing_accuracy``, the share of objects for which it
        is correct.
    """
    whole = checked.groupby(["factor", "picture"])["correct"].all().groupby("factor").agg(["size", "mean"])
    single = checked.groupby("factor")["correct"].mean()
    order = [factor for factor in (*FACTORS, "count") if factor in single.index]
    table = pd.DataFrame({"pictures": whole["size"], "accuracy": whole["mean"], "thing_accuracy": single})
    return table.loc[order].reset_index()
