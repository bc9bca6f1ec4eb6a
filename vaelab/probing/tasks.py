"""Classification tasks on a store of features: training, validation and test pictures for each factor.

A factor is a set of classes, such as the colours. Two stores are needed: one of training pictures, a fraction of which
is held out for validation, and one of test pictures. Test pictures that equal a training picture are left out.
Everything that would make the test meaningless is refused: stores that overlap, stores made with different prompts, or
classes that were never learned.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from vaelab import store
from vaelab.data.labelled import LabelledPictures
from vaelab.probing.dataset import Examples, load_examples
from vaelab.probing.layer_features import MAPS, pooled_layers, require_same_setting, require_same_source
from vaelab.probing.tables import matching_layers
from vaelab.store.reader import Store

SHARED_SETTINGS = ("classes", "prompt", "clip", "side", "resolution")
"""Settings that must be equal in the stores of training and test pictures, besides those that identify the model."""
SPLIT = re.compile(r"[^\[]*(\[[^\[\],]*)?")
"""Matches the data set and its split in the name of loaded pictures, such as
``photos[train[:90%]], 50 drawn by seed 0``."""
MOST_UNKNOWN = 0.5
"""Largest share of test pictures whose class no training picture has."""
MOST_DUPLICATES = 0.05
"""Largest share of test pictures that may equal training pictures: data sets hold a few duplicates, more are an
overlap."""


class Task(NamedTuple):
    """Training, validation and test pictures with their classes of one factor."""

    training: Examples
    validation: Examples
    test: Examples


def build_tasks(
    activations: str,
    test_activations: str,
    pictures: LabelledPictures,
    model: Mapping[str, Any],
    *,
    factors: Sequence[str] = (),
    validation_share: float = 0.2,
    seed: int = 0,
    diffc_layers: Sequence[str] | None = None,
) -> dict[str, Task]:
    """Build a task for each factor; all tasks have the same pictures in each part.

    Test pictures that equal a training picture are left out, and their number is printed.

    Args:
        activations: the folder of the store of training and validation pictures.
        test_activations: the folder of the store of test pictures.
        pictures: the test pictures.
        model: the settings that identify the model, by name; both stores must have equal ones.
        factors: the names of the factors; empty means all.
        validation_share: the fraction of the pictures in ``activations`` that is held out for validation.
        seed: determines which pictures these are.
        diffc_layers: names and globs of the layers that Diff-C, the convolutional classifier, will be trained on; empty
            means that they are chosen later, None that no Diff-C will be trained.

    Raises:
        ValueError: a store does not exist, was made with another model, with other settings or from other pictures, or
            has no maps although Diff-C needs them; test and training pictures overlap; or most test pictures are of
            classes that no training picture has.
    """
    training = store.open(activations, parameter="activations")
    tested = store.open(test_activations, parameter="test_activations")
    require_same_source(tested, pictures, model, "test_activations")
    for setting, here in model.items():
        require_same_setting(training, setting, here, "activations")
    if training.layout != tested.layout:
        raise ValueError("test_activations: made of other blocks or timesteps than activations")
    for setting in SHARED_SETTINGS:
        there, here = (each.settings.get(setting) or "" for each in (training, tested))
        if there != here:
            raise ValueError(f"test_activations: made with {setting} {here!r}, activations with {there!r}")
    duplicates = find_duplicates(training, tested)
    if diffc_layers is not None:
        layers = pooled_layers(training)
        require_maps(training, matching_layers(layers, diffc_layers) or layers)
    tasks = {}
    for factor in dict.fromkeys(factors or pictures.classes):
        parts = load_examples(training, factor).split(validation_share, seed)
        test = load_examples(tested, factor)
        kept = [place for place, image in enumerate(test.images()) if image not in duplicates]
        tasks[factor] = Task(*parts, test.take(np.array(kept)))
        require_known_classes(tasks[factor], factor)
    return tasks


def split_tasks(
    features: Store,
    factors: Sequence[str] = (),
    *,
    test_share: float = 0.2,
    validation_share: float = 0.2,
    seed: int = 0,
) -> dict[str, Task]:
    """Build one classification task for each factor from one store of features.

    All tasks share one random split of the store's pictures into training, validation and test pictures. Each class of
    the first factor has the same share in all three; classes of other factors are not balanced. Identical pictures
    always go into the same part. The numbers of pictures are printed.

    Args:
        features: the store.
        factors: the names of the factors; empty means all, in the store's order.
        test_share: the fraction of the pictures that is held out for the test.
        validation_share: the fraction of the remaining pictures that is held out for validation.
        seed: the random seed of the split.

    Returns:
        The task of each factor, by the factor's name.

    Raises:
        ValueError: a share is so small or so large that a part would be empty, the store has no such factor, or most
            test pictures are of classes that no training picture has.
    """
    names = list(dict.fromkeys(factors or features.settings.get("classes", {}))) or [""]
    examples = {factor: load_examples(features, factor) for factor in names}
    first = examples[names[0]]
    digests = [features.items[views[0]].get("digest", place) for place, views in enumerate(first.items)]
    rest, test = _stratified(np.arange(len(first)), first.labels.numpy(), digests, test_share, seed, "test_share")
    training, validation = _stratified(rest, first.labels.numpy(), digests, validation_share, seed, "validation_share")
    print(
        f"split by seed {seed}, in equal shares of each class: {len(training)} pictures for training, "
        f"{len(validation)} for validation, {len(test)} for the test"
    )
    tasks = {}
    for factor, each in examples.items():
        tasks[factor] = Task(each.take(training), each.take(validation), each.take(test))
        require_known_classes(tasks[factor], factor)
    return tasks


def _stratified(
    pictures: np.ndarray, labels: np.ndarray, digests: Sequence[Any], share: float, seed: int, parameter: str
) -> tuple[np.ndarray, np.ndarray]:
    """Split pictures into a part that is kept and a part that is held out, class by class; equal pictures stay
    together."""
    rng, held_out, carried = np.random.default_rng(seed), [], 0.0
    groups: dict[Any, list[int]] = {}
    for picture in pictures:
        groups.setdefault(digests[picture], []).append(int(picture))
    by_class: dict[int, list[list[int]]] = {}
    for group in groups.values():
        by_class.setdefault(int(labels[group[0]]), []).append(group)
    for _, members in sorted(by_class.items()):
        carried += share * len(members)  # what a class rounds away is owed by the next
        count = min(int(carried + 0.5), len(members) - 1)
        carried -= count
        held_out += [picture for i in rng.permutation(len(members))[: max(count, 0)] for picture in members[i]]
    if not 0 < len(held_out) < len(pictures):
        raise ValueError(f"{parameter}: {share} of {len(pictures)} pictures leaves one of the two parts empty")
    chosen = np.sort(np.array(held_out))
    return np.setdiff1d(pictures, chosen), chosen


def require_known_classes(task: Task, factor: str) -> None:
    """Raise ValueError if most test pictures are of classes that no training picture has; print the classes if some
    are."""
    unknown = ~torch.isin(task.test.labels, task.training.labels)
    if unknown.float().mean() > MOST_UNKNOWN:
        raise ValueError(
            f"test_activations: {int(unknown.sum())} of {len(unknown)} pictures have a {factor} that no training "
            "picture has; if both are slices of pictures sorted by class, take a train and a test split instead"
        )
    if unknown.any():
        names = sorted({task.test.classes[label] for label in task.test.labels[unknown].tolist()})
        print(
            f"{factor}: {int(unknown.sum())} of {len(unknown)} test pictures are of {len(names)} classes that no "
            f"training picture has, and count as wrong: {', '.join(names)}"
        )


def find_duplicates(training: Store, tested: Store) -> set[int]:
    """Find the test pictures that equal a training picture, and print their number.

    Pictures are compared by content, and within one selection of a data set by index as well.

    Returns:
        The indices of these pictures, the ``image`` of the items of ``tested``.

    Raises:
        ValueError: the stores overlap: a picture of one selection is in both, or more than 5 % of the test pictures
            equal a training picture.
    """
    names = [each.settings.get("dataset", "") for each in (training, tested)]
    splits = [SPLIT.match(name)[0] for name in names]
    numbered = names[0] == names[1] or (splits[0] == splits[1] and splits[0].startswith("world["))
    learned = {key: {item[key] for item in training.items if key in item} for key in ("image", "digest")}
    images = {item["image"] for item in tested.items}
    duplicates = {item["image"] for item in tested.items if item.get("digest") in learned["digest"]}
    same = images & learned["image"] if numbered else set()
    if same or len(duplicates) > MOST_DUPLICATES * len(images):
        raise ValueError(
            f"test_activations: {len(same | duplicates)} of their {len(images)} pictures are also training pictures; "
            "take a split or slice that does not overlap"
        )
    if duplicates:
        print(f"{len(duplicates)} of {len(images)} test pictures equal a training picture and are left out of the test")
    return duplicates


def require_maps(features: Store, layers: Sequence[str]) -> None:
    """Raise ValueError if a store lacks the maps of one of these layers."""
    for layer in layers:
        if layer + MAPS not in features.layout:
            raise ValueError(f"activations: no maps of {layer!r}; Diff-C takes maps (maps: true in 40_layer_features)")
