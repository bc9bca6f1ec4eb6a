"""What classifiers read off the layers and timesteps of a store: linear probes, Diff-C, and beside them the
denoiser itself as a zero-shot classifier.

The tables of Kim et al. ("Revelio", Tables 3 and 5 to 9, Figures 4, 6 and 8). Strengths and epochs are
chosen on validation pictures, drawn from the training ones; each test picture is classified once.
"""

import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
import torch
from torch import Tensor
from tqdm import tqdm

from vaelab import store
from vaelab.activations import denoiser as activations_denoiser
from vaelab.data.labelled import Picture, Pictures
from vaelab.models.block_names import denoiser
from vaelab.probing import clip as probing_clip
from vaelab.probing import dataset, diffc
from vaelab.probing.dataset import Examples
from vaelab.probing.diffc import DiffC, DiffCConfig
from vaelab.probing.diffusion_classifier import DiffusionClassifier, class_texts
from vaelab.probing.layer_features import MAPS, LayerConfig, namer, parts, pooled, prompts, refuse_other_pictures
from vaelab.probing.linear import Accuracy, linear_probe, score
from vaelab.probing.tables import best, fitting
from vaelab.store.reader import Store

ALIKE = ("classes", "prompt", "clip", "side", "resolution")
"""Settings in which what is tested must be like what is learned from."""


ALIKE_WITHIN = 0.05
"""How far, as a share of their length, a picture's features may be from those in a store: what half precision does."""


UNLEARNED = 0.5
"""The share of the test pictures that may be of classes nothing is learned from."""


class Task(NamedTuple):
    """Pictures with the classes of one factor, to learn from, to choose by and to test on."""

    learn: Examples
    validate: Examples
    test: Examples


def tasks(
    activations: str,
    test_activations: str,
    pictures: Pictures,
    model: str,
    *,
    factors: Sequence[str] = (),
    share: float = 0.2,
    seed: int = 0,
    diffc_layers: Sequence[str] | None = None,
) -> dict[str, Task]:
    """A task for each factor, all with the same pictures in each part.

    Args:
        activations: folder of the store to learn from, of which a share is to validate on.
        test_activations: folder of the store of other pictures.
        pictures: those of the latter.
        model: that both were made with.
        factors: none for all.
        share: of the validation pictures.
        seed: fixes which they are.
        diffc_layers: names and globs of the layers that Diff-C is to read, none for any of them; None for no Diff-C.

    Raises:
        ValueError: no store, or one without what Diff-C is to read; stores of another model, or other pictures
            than these; stores that were not made alike; pictures that are in both; or classes that are tested and
            never learned.
    """
    kept = store.open(activations, parameter="activations")
    tested = store.open(test_activations, parameter="test_activations")
    refuse_other_pictures(tested, pictures, model, "test_activations")
    if kept.settings.get("model") != model:
        raise ValueError(f"activations: made with model {kept.settings.get('model')!r}, here it is {model!r}")
    alike = [
        kept.layout == tested.layout,
        *((kept.settings.get(one) or "") == (tested.settings.get(one) or "") for one in ALIKE),
    ]
    if not all(alike):
        raise ValueError(f"test_activations: not of the layers, or of another {', '.join(ALIKE)} than activations")
    refuse_shared(kept, tested)
    if diffc_layers is not None:
        refuse_without_maps(kept, fitting(pooled(kept), diffc_layers) or pooled(kept))
    made = {}
    for factor in dict.fromkeys(factors or pictures.classes):
        made[factor] = Task(*dataset.read(kept, factor).split(share, seed), dataset.read(tested, factor))
        refuse_unlearned(made[factor], factor)
    return made


def refuse_unlearned(task: Task, factor: str) -> None:
    """Raise ValueError where most test pictures are of classes that are never learned."""
    unknown = ~torch.isin(task.test.labels, task.learn.labels)
    if unknown.float().mean() > UNLEARNED:
        raise ValueError(
            f"test_activations: {int(unknown.sum())} of {len(unknown)} pictures have a {factor} that none to learn "
            "from has; slices of pictures that are sorted by class? Take a train and a test split"
        )


def refuse_shared(learned: Store, tested: Store) -> None:
    """Raise ValueError where two stores are of the same pictures, or of overlapping slices of the world."""
    names = [one.settings.get("dataset", "") for one in (learned, tested)]
    same_split = [name.rsplit("[", 1)[0] if name.startswith("world[") else name for name in names]
    images = [{item["image"] for item in one.items} for one in (learned, tested)]
    if same_split[0] == same_split[1] and (shared := len(images[0] & images[1])):
        raise ValueError(f"test_activations: {shared} of their pictures are learned from; take other slices")


def refuse_without_maps(kept: Store, layers: Sequence[str]) -> None:
    """Raise ValueError where a store has no maps of one of these layers."""
    for layer in layers:
        if layer + MAPS not in kept.layout:
            raise ValueError(f"activations: no maps of {layer!r}; Diff-C takes maps (maps: true in 40_layer_features)")


def probes(by_factor: Mapping[str, Task]) -> pd.DataFrame:
    """A linear probe on each layer's means over positions, for each factor.

    Returns:
        A row each: ``layer``, ``factor``, ``classifier``, the fields of
        :class:`vaelab.probing.linear.Accuracy`, ``validation`` (the accuracy it was chosen by) and ``chosen``
        (the strength C).
    """
    rows, layers = [], pooled(next(iter(by_factor.values())).learn.kept)
    for layer in tqdm(layers, desc="probes", file=sys.stdout, mininterval=2, ncols=100):
        for factor, task in by_factor.items():
            test, truth = task.test.vectors(layer)
            learn = task.learn.vectors(layer)
            found = linear_probe(learn, task.validate.vectors(layer), test)
            measured = score(found.predicted, truth, learn[1])
            rows.append(_row(layer, factor, "probe", measured, found.validation, found.strength))
    return pd.DataFrame(rows)


def diffcs(
    by_factor: Mapping[str, Task], layers: Mapping[str, Sequence[str]], config: DiffCConfig, folder: Path
) -> tuple[pd.DataFrame, dict[tuple[str, str], DiffC]]:
    """A Diff-C on maps of layers, for each factor, going on where a killed call left it.

    Args:
        by_factor: the tasks.
        layers: of each factor names such as ``up_ft1.t25``, whose maps the stores must have.
        config: how each is trained.
        folder: of the checkpoints.

    Returns:
        The rows of :func:`probes`, ``chosen`` being the epoch; and the classifiers by layer and factor.

    Raises:
        ValueError: stores without maps.
    """
    rows, made = [], {}
    for factor, task in by_factor.items():
        refuse_without_maps(task.learn.kept, layers[factor])
        for layer in layers[factor]:
            block = layer + MAPS
            place, title = Path(folder, f"{layer}.{factor}"), f"Diff-C, {layer}, {factor}"
            settings = {"activations": task.learn.kept.settings, "factor": factor}
            fitted = diffc.fit(task.learn, task.validate, block, config, folder=place, settings=settings, title=title)
            predicted = diffc.classify(fitted.model, task.test, block, config.batch_size)
            measured = score(predicted, task.test.labels, task.learn.labels)
            validation = fitted.epochs.set_index("epoch")["accuracy"][fitted.epoch]
            rows.append(_row(layer, factor, "diffc", measured, validation, fitted.epoch))
            made[layer, factor] = fitted.model
    return pd.DataFrame(rows), made


def zero_shot(
    classifier: DiffusionClassifier, pictures: Sequence[Picture], factor: str, learned: Examples
) -> tuple[Accuracy, float, float]:
    """The accuracy of the denoiser itself, its seconds and its passes a picture.

    Args:
        classifier: with a prompt for each class of the factor.
        pictures: to classify.
        factor: whose classes.
        learned: which say what chance is.
    """
    verdicts, seconds = timed(lambda picture: classifier.classify(picture.pixels[None])[0], pictures)
    truth = [picture.labels[factor] for picture in pictures]
    measured = score([one.chosen for one in verdicts], truth, learned.labels)
    return measured, seconds, sum(one.passes for one in verdicts) / len(verdicts)


def side_by_side(
    classifier: DiffusionClassifier,
    diffcs: pd.DataFrame,
    trained: Mapping[tuple[str, str], DiffC],
    pictures: Pictures,
    task: Task,
    factor: str,
    count: int,
    *,
    clip: str = "",
    clip_revision: str = "",
    template: str = "{}",
) -> pd.DataFrame:
    """The diffusion classifier, the factor's best Diff-C and, where asked, CLIP: accuracy, and seconds a picture,
    each by itself.

    Args:
        classifier: with a prompt for each class of the factor.
        diffcs: as :func:`diffcs` gave them, with what follows.
        trained: the classifiers.
        pictures: those of the test, of which the first ``count`` are classified by all of them.
        task: of the factor.
        factor: whose classes.
        count: how many.
        clip: id or folder of a CLIP model; empty for none.
        clip_revision: of it, on the hub.
        template: CLIP's text of a class, with ``{}`` for its name.

    Returns:
        A row each: ``classifier``, ``factor``, the fields of :class:`vaelab.probing.linear.Accuracy` (Diff-C's are of all
        test pictures), ``accuracy_on_these`` (the same pictures for all), ``passes`` of the denoiser and
        ``seconds_per_image``.
    """
    few = [picture for picture in map(pictures.__getitem__, range(min(count, len(pictures)))) if picture]
    truth = [picture.labels[factor] for picture in few]
    measured, seconds, passes = zero_shot(classifier, few, factor, task.learn)
    rows = [_timed_row("diffusion_classifier", factor, measured, measured.accuracy, passes, seconds)]
    layer = best(diffcs, factor)
    own = diffcs[(diffcs["layer"] == layer) & (diffcs["factor"] == factor)].iloc[0]
    chosen, seconds = as_it_comes(classifier.pipeline, trained[layer, factor], layer, pictures, task, few)
    whole = Accuracy(*(own[name] for name in Accuracy._fields))
    rows.append(_timed_row("diffc", factor, whole, score(chosen, truth, task.learn.labels).accuracy, 1.0, seconds))
    if clip:
        device = str(denoiser(classifier.pipeline).device)
        texts = {factor: class_texts(pictures.classes[factor], template)}
        names = probing_clip.load(clip, texts, device=device, revision=clip_revision or None)
        found, seconds = timed(lambda picture: names(picture.pixels[None])[0][factor], few)
        measured = score(found, truth, task.learn.labels)
        rows.append(_timed_row("clip", factor, measured, measured.accuracy, 0.0, seconds))
    return pd.DataFrame(rows)


def as_it_comes(
    pipeline: Any, model: DiffC, layer: str, pictures: Pictures, task: Task, few: Sequence[Picture]
) -> tuple[list[int], float]:
    """Diff-C from a picture's pixels to its class: autoencoder, prompt and noise as in the store (with CLIP where that
    infers the prompt), one partial pass, Diff-C. The classes of a few pictures, and the seconds a picture.

    Args:
        pipeline: that the features are of.
        model: trained on them.
        layer: name such as ``up_ft1.t25``.
        pictures: with the classes' names.
        task: whose test store says what the denoiser is told.
        few: the pictures.

    Raises:
        ValueError: the pipeline does not give what is in the store, so its weights are others.
    """
    (block, timestep), kept = parts(layer), task.test.kept
    settings = {name: kept.settings.get(name) or "" for name in ("prompt", "clip", "clip_revision")}
    names = namer(pipeline, pictures, LayerConfig((block,), (timestep,), **settings))
    side = kept.settings.get("side", "output")
    places = {item["image"]: place for place, item in enumerate(kept.items) if item["view"] == 0}

    def maps(picture: Picture) -> Tensor:
        pixels, seeds = picture.pixels[None], [kept.items[places[picture.image]]["seed"]]
        told = prompts(pipeline, pictures, settings["prompt"], names(pixels) if names else [picture.labels])
        seen = activations_denoiser.from_pictures(pipeline, pixels, seeds, [timestep], [block], prompts=told, side=side)
        return next(iter(seen.maps.values()))[0].float()

    @torch.no_grad()
    def classify(picture: Picture) -> int:
        return int(model(maps(picture).to(model.fc.weight.device)).argmax(1))

    stored, now = kept.maps(layer + MAPS, [places[few[0].image]]).float(), maps(few[0]).cpu()
    if (now - stored).norm() > ALIKE_WITHIN * stored.norm():
        raise ValueError(
            f"test_activations: {layer} of picture {few[0].image} is not what the model gives now; its weights have "
            "changed, or they were read in another precision: run 40_layer_features again"
        )
    return timed(classify, few)


def timed(classify: Callable[[Picture], Any], pictures: Sequence[Picture]) -> tuple[list[Any], float]:
    """What pictures are found to be, each by itself, and the mean seconds; the first is done once before."""
    answers, began = [], 0.0
    for number, picture in enumerate([pictures[0], *pictures]):
        if number == 1:
            _wait()
            began = time.perf_counter()
        answers.append(classify(picture))
    _wait()
    return answers[1:], (time.perf_counter() - began) / len(pictures)


def _timed_row(
    classifier: str, factor: str, measured: Accuracy, on_these: float, passes: float, seconds: float
) -> dict[str, Any]:
    told = {"classifier": classifier, "factor": factor, **measured._asdict(), "accuracy_on_these": on_these}
    return {**told, "passes": passes, "seconds_per_image": seconds}


def _row(layer: str, factor: str, classifier: str, measured: Accuracy, validation: float, chosen: float) -> dict:
    told = {"layer": layer, "factor": factor, "classifier": classifier, **measured._asdict()}
    return {**told, "validation": validation, "chosen": chosen}


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
