"""Classifiers on a denoiser's layers (linear probes and Diff-C), and the denoiser itself as a classifier.

Makes the tables of Kim et al. ("Revelio", Tables 3 and 5 to 9, Figures 4, 6 and 8). Diff-C is their convolutional
classifier (:mod:`vaelab.probing.diffc`). A layer is a block at a timestep, such as ``up_ft1.t25``; a factor is a set of
classes, such as the colours. The probes' regularisation and Diff-C's epoch are selected on validation pictures; each
test picture is classified once. The tasks come from :func:`vaelab.probing.tasks.build_tasks`.
"""

import sys
import time
from collections.abc import Callable, Mapping, Sequence
from itertools import islice, product
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import Tensor
from tqdm import tqdm

from vaelab.activations import denoiser as denoiser_features
from vaelab.core import devices
from vaelab.data.labelled import LabelledPicture, LabelledPictures
from vaelab.models.block_names import find_denoiser
from vaelab.models.clip import load_clip
from vaelab.probing.clip import ZeroShotClip
from vaelab.probing.dataset import join_factors
from vaelab.probing.diffc import DiffC, DiffCConfig, classify_stored, train_together
from vaelab.probing.diffusion_classifier import DiffusionClassifier, class_texts
from vaelab.probing.layer_features import (
    MAPS,
    LayerConfig,
    load_prompt_clip,
    pooled_layers,
    prompts_for,
    split_layer_name,
)
from vaelab.probing.linear import Accuracy, fit_linear_probe, measure_accuracy
from vaelab.probing.tables import best_layer, matching_layers
from vaelab.probing.tasks import Task, require_maps
from vaelab.training.planning import require_training_space

TOLERANCE = 0.05
"""Largest distance of a picture's features from the stored ones, relative to their norm; half precision causes less."""


def probe_layers(tasks: Mapping[str, Task]) -> pd.DataFrame:
    """Fit a linear probe on the pooled vectors of each layer, for each factor.

    Returns:
        One row per layer and factor: ``layer``, ``factor``, ``classifier`` ("probe"), the fields of
        :class:`vaelab.probing.linear.Accuracy`, ``validation`` (validation accuracy) and ``chosen`` (the selected C).
    """
    rows, layers = [], pooled_layers(next(iter(tasks.values())).training.store)
    pairs = list(product(layers, tasks))
    for layer, factor in tqdm(pairs, desc="linear probes", unit="probe", file=sys.stdout, mininterval=2, ncols=100):
        task = tasks[factor]
        test, truth = task.test.vectors(layer)
        training = task.training.vectors(layer)
        probe = fit_linear_probe(training, task.validation.vectors(layer), test)
        accuracy = measure_accuracy(probe.predicted, truth, training[1])
        rows.append(_row(layer, factor, "probe", accuracy, probe.validation, probe.strength))
    return pd.DataFrame(rows)


def require_disk_space(
    tasks: Mapping[str, Task], patterns: Sequence[str], config: DiffCConfig, folder: str | Path
) -> int:
    """Require the disk space that training the Diff-Cs takes, see :func:`require_training_space`.

    Args:
        tasks: the tasks by factor.
        patterns: names and globs of layers, as in :func:`vaelab.probing.tables.layers_by_factor`.
        config: the size and training of each Diff-C.
        folder: the run's folder.
    """
    sizes: dict[str, list[int]] = {}
    for task in tasks.values():
        layers, layout = pooled_layers(task.training.store), task.training.store.layout
        chosen = matching_layers(layers, patterns) or [max(layers, key=lambda layer: layout[layer].width)]
        for layer in chosen:
            with torch.device("meta"):
                model = DiffC(layout[layer].width, len(task.training.classes), config.width)
            sizes.setdefault(layer, []).append(sum(parameter.numel() for parameter in model.parameters()))
    together = [sum(each) for each in sizes.values()]
    count = sum(map(len, sizes.values()))
    return require_training_space(f"{count} Diff-Cs", max(together), sum(together), folder, together=False)


def train_diffcs(
    tasks: Mapping[str, Task], layers: Mapping[str, Sequence[str]], config: DiffCConfig, folder: Path
) -> tuple[pd.DataFrame, dict[tuple[str, str], DiffC]]:
    """Train a Diff-C on the maps of each layer, for each factor; all factors of a layer are trained together.
    Interrupted training runs are resumed.

    Args:
        tasks: the tasks by factor, with the same pictures.
        layers: for each factor the names of the layers, such as ``up_ft1.t25``.
        config: the size and training of each Diff-C.
        folder: the folder for the checkpoints.

    Returns:
        A table with the columns of :func:`probe_layers`, in which ``classifier`` is "diffc" and ``chosen`` is the
        selected epoch; and the trained classifiers by layer and factor.

    Raises:
        ValueError: the stores hold no maps.
    """
    rows, models, factors_of = {}, {}, {}
    for factor, task in tasks.items():
        require_maps(task.training.store, layers[factor])
        for layer in layers[factor]:
            factors_of.setdefault(layer, []).append(factor)
    steps = next(iter(tasks.values())).training.steps(config.batch_size) * config.epochs
    total = steps * len(factors_of)
    bar = tqdm(total=total, desc="Diff-C", unit="step", file=sys.stdout, mininterval=2, ncols=100)
    for number, (layer, factors) in enumerate(factors_of.items()):
        bar.set_description(f"Diff-C, layer {number + 1} of {len(factors_of)}", refresh=False)
        together = {factor: tasks[factor] for factor in factors}
        trained = train_together(
            {factor: task.training for factor, task in together.items()},
            {factor: task.validation for factor, task in together.items()},
            layer + MAPS, config, folder=Path(folder, layer),
            settings={"activations": tasks[factors[0]].training.store.settings},
            progress=lambda step, done=steps * number: bar.update(done + step - bar.n),
        )  # fmt: skip
        bar.update(steps * (number + 1) - bar.n)  # a finished training that is resumed makes no step
        test = join_factors([task.test for task in together.values()])
        predictions = classify_stored([each.model for each in trained.values()], test, layer + MAPS, config.batch_size)
        for (factor, each), predicted in zip(trained.items(), predictions, strict=True):
            accuracy = measure_accuracy(predicted, tasks[factor].test.labels, tasks[factor].training.labels)
            validation = each.epochs.set_index("epoch")["accuracy"][each.epoch]
            rows[layer, factor] = _row(layer, factor, "diffc", accuracy, validation, each.epoch)
            models[layer, factor] = each.model
    bar.close()
    return pd.DataFrame([rows[layer, factor] for factor in tasks for layer in layers[factor]]), models


def compare_classifiers(
    classifier: DiffusionClassifier | None,
    diffcs: pd.DataFrame,
    models: Mapping[tuple[str, str], DiffC],
    pictures: LabelledPictures,
    task: Task,
    factor: str,
    count: int,
    *,
    clip: str = "",
    clip_revision: str = "",
    template: str = "{}",
    pipeline: Any = None,
) -> pd.DataFrame:
    """Compare accuracy and seconds per picture of the diffusion classifier, of the factor's best Diff-C and, if a model
    is given, of CLIP.

    Args:
        classifier: the diffusion classifier, with a prompt for each class of the factor; None leaves it out.
        diffcs: the table from :func:`train_diffcs`.
        models: the trained classifiers from :func:`train_diffcs`.
        pictures: the pictures; all classifiers get the first ``count`` of them that are in the task's test part.
        task: the factor's task.
        factor: the factor's name.
        count: the number of test pictures.
        clip: id or folder of a CLIP model; empty means that CLIP is not compared.
        clip_revision: the revision of the CLIP model on the hub.
        template: CLIP's text for a class, with ``{}`` in place of its name.
        pipeline: the pipeline that made the features; needed only without a diffusion classifier.

    Returns:
        One row per classifier: ``classifier``, ``factor``, the fields of :class:`vaelab.probing.linear.Accuracy` (for
        Diff-C on all test pictures), ``accuracy_on_these`` (on the few pictures that all classifiers get), ``passes``
        (of the denoiser, per picture) and ``seconds_per_image``.

    Raises:
        ValueError: none of the pictures can be read, or the model does not reproduce the stored features.
    """
    tested = set(task.test.images())
    first = islice((place for place, number in enumerate(pictures.numbers) if number in tested), count)
    few = [picture for picture in map(pictures.__getitem__, first) if picture]
    if not few:
        raise ValueError(f"dataset: none of the first {count} pictures of {pictures.name!r} can be read")
    truth = [picture.labels[factor] for picture in few]
    pipeline = classifier.pipeline if classifier else pipeline
    labels, device, rows = task.training.labels, find_denoiser(pipeline).device, []
    whole = measure_accuracy(task.test.labels, task.test.labels, labels).chance  # of all test pictures, not of the few
    if classifier:
        results, seconds = time_each(lambda picture: classifier.classify(picture.pixels[None])[0], few, device)
        accuracy = measure_accuracy([result.predicted for result in results], truth, labels)._replace(chance=whole)
        passes = sum(result.passes for result in results) / len(results)
        rows.append(_timed_row("diffusion_classifier", factor, accuracy, accuracy.accuracy, passes, seconds))
    layer = best_layer(diffcs, factor)
    own = diffcs[(diffcs["layer"] == layer) & (diffcs["factor"] == factor)].iloc[0]
    predicted, seconds = classify_from_pixels(pipeline, models[layer, factor], layer, pictures, task, few)
    on_these = measure_accuracy(predicted, truth, labels).accuracy
    accuracy = Accuracy(*(own[name] for name in Accuracy._fields))
    rows.append(_timed_row("diffc", factor, accuracy, on_these, 1.0, seconds))
    if clip:
        texts = {factor: class_texts(pictures.classes[factor], template)}
        model = ZeroShotClip(load_clip(clip, device=str(device), revision=clip_revision or None), texts)
        predicted, seconds = time_each(lambda picture: model.classify(picture.pixels[None])[0][factor], few, device)
        accuracy = measure_accuracy(predicted, truth, labels)._replace(chance=whole)
        rows.append(_timed_row("clip", factor, accuracy, accuracy.accuracy, 0.0, seconds))
    return pd.DataFrame(rows)


def classify_from_pixels(
    pipeline: Any, model: DiffC, layer: str, pictures: LabelledPictures, task: Task, few: Sequence[LabelledPicture]
) -> tuple[list[int], float]:
    """Classify a few pictures by Diff-C, from their pixels: autoencoder, noise, one partial pass, Diff-C.

    Prompt and noise are the same as in the store of test pictures. If CLIP inferred the classes in the prompt there, it
    infers them here too.

    Args:
        pipeline: the pipeline that made the store's features.
        model: the Diff-C that was trained on them.
        layer: the layer's name, such as ``up_ft1.t25``.
        pictures: the data set, which knows the names of the classes.
        task: the task; its store of test pictures holds the prompt, the side and the seeds.
        few: the pictures to classify.

    Returns:
        The predicted class indices, and the mean seconds per picture.

    Raises:
        ValueError: the pipeline does not reproduce the stored features, so it is not the model that made them.
    """
    (block, timestep), store = split_layer_name(layer), task.test.store
    settings = {name: store.settings.get(name) or "" for name in ("prompt", "clip", "clip_revision")}
    clip = load_prompt_clip(pipeline, pictures, LayerConfig((block,), (timestep,), **settings))
    side = store.settings.get("side", "output")
    places = {item["image"]: place for place, item in enumerate(store.items) if item["view"] == 0}

    def maps(picture: LabelledPicture) -> Tensor:
        pixels, seeds = picture.pixels[None], [store.items[places[picture.image]]["seed"]]
        labels = clip.classify(pixels) if clip else [picture.labels]
        prompts = prompts_for(pipeline, pictures, settings["prompt"], labels)
        features = denoiser_features.from_pictures(
            pipeline, pixels, seeds, [timestep], [block], prompts=prompts, side=side
        )
        return next(iter(features.maps.values()))[0].float()

    @torch.no_grad()
    def classify(picture: LabelledPicture) -> int:
        return int(model(maps(picture).to(model.fc.weight.device)).argmax(1))

    stored, now = store.maps(layer + MAPS, [places[few[0].image]]).float(), maps(few[0]).cpu()
    if not (now - stored).norm() <= TOLERANCE * stored.norm():  # NaN is refused too
        raise ValueError(
            f"test_activations: the model does not reproduce {layer} of picture {few[0].image}: its weights have "
            "changed, or its precision is another; run 40_layer_features again"
        )
    return time_each(classify, few, find_denoiser(pipeline).device)


def time_each(
    function: Callable[[LabelledPicture], Any], pictures: Sequence[LabelledPicture], device: torch.device
) -> tuple[list[Any], float]:
    """Call a function on each picture, and return the results and the mean seconds per call.

    The function is called once more on the first picture before the timing starts.
    """
    function(pictures[0])
    devices.synchronize(device)
    began = time.perf_counter()
    results = [function(picture) for picture in pictures]
    devices.synchronize(device)
    return results, (time.perf_counter() - began) / len(pictures)


def _timed_row(
    classifier: str, factor: str, accuracy: Accuracy, on_these: float, passes: float, seconds: float
) -> dict[str, Any]:
    row = {"classifier": classifier, "factor": factor, **accuracy._asdict(), "accuracy_on_these": on_these}
    return {**row, "passes": passes, "seconds_per_image": seconds}


def _row(layer: str, factor: str, classifier: str, accuracy: Accuracy, validation: float, chosen: float) -> dict:
    row = {"layer": layer, "factor": factor, "classifier": classifier, **accuracy._asdict()}
    return {**row, "validation": validation, "chosen": chosen}
