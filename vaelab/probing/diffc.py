"""Diff-C, a small classifier on one layer's feature maps: Kim et al. ("Revelio", section 3.3, Table 10).

Four 3 x 3 convolutions, three of them with stride 2, the mean over positions and one linear layer; 40 million
parameters at 1280 input channels. Training follows section 4.1: AdamW, 30 epochs, batches of 16, a cosine schedule from
1e-4 to 5e-5. The epoch is selected on validation pictures, so that test pictures are classified only once. Table 10
names no activation function; here it is ReLU.

The channels of a denoiser's maps differ far more from each other than one channel does between pictures. A narrow
Diff-C needs more training steps than a wide one until it is sensitive to the small differences between pictures.
"""

import math
import re
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vaelab.core import devices
from vaelab.core.validate import at_least
from vaelab.probing.dataset import Examples, join_factors
from vaelab.store.format import BlockShape
from vaelab.training import evaluation_mode
from vaelab.training.checkpoint import not_finite, read_tensors, write_tensors
from vaelab.training.loop import TrainConfig, Watcher, train

SAVED = re.compile(r"epoch-(\d+)\.safetensors")
"""Name of the file with an epoch's weights."""


@dataclass(frozen=True)
class DiffCConfig:
    """Size and training of a Diff-C; the defaults are the paper's."""

    width: int = 1024
    """Output channels of every convolution."""
    epochs: int = 30
    """Passes over the training pictures."""
    batch_size: int = 16
    """Pictures per step."""
    learning_rate: float = 1e-4
    """AdamW's learning rate at the start."""
    final_rate: float = 5e-5
    """AdamW's learning rate at the end: eta_min of the cosine schedule."""
    weight_decay: float = 0.01
    """AdamW's weight decay; the paper does not give it, this is PyTorch's default."""
    device: str = "auto"
    """The device that it is trained on."""
    training_precision: str = "float32"
    """Floating point format of the forward pass in training; the weights are float32."""
    seed: int = 0
    """Determines the initial weights and the order of the pictures."""

    def __post_init__(self) -> None:
        for name in ("width", "epochs", "batch_size"):
            at_least(name, getattr(self, name), 1)
        at_least("learning_rate", self.learning_rate, 0, exclusive=True)
        at_least("weight_decay", self.weight_decay, 0)
        if not 0 <= self.final_rate <= self.learning_rate:
            raise ValueError(f"final_rate: expected 0 to learning_rate ({self.learning_rate}), got {self.final_rate!r}")


TRAINING_STEPS = 1000
"""Optimizer steps after which a Diff-C of 32 channels fits 1,000 pictures; its validation
accuracy has peaked before."""
NARROW = 32
"""Width on a CPU, where it trains in a minute or two."""


def choose_size(
    width: int, epochs: int, learning_rate: float, *, pictures: int, batch_size: int, device: str
) -> tuple[int, int, float]:
    """Choose the width, epochs and learning rate that are 0, by the number of pictures and the device, and print them.

    The choice does not depend on measured time, so that an interrupted training can be resumed.

    Args:
        width: output channels of every convolution; 0 means 32 on a CPU, and on a GPU a quarter of the number of
            pictures, rounded down to a power of two from 32 to 1,024.
        epochs: passes over the pictures; 0 means as many as 1,000 steps take, between 15 and 120.
        learning_rate: 0 means the paper's 1e-4 at its width of 1,024, inversely to the width, at most 1e-3.
        pictures: the number of training pictures.
        batch_size: pictures per step.
        device: the ``device`` parameter.
    """
    given = (width, epochs, learning_rate)
    kind = devices.pick(device).type
    if not width:
        width = NARROW if kind == "cpu" else min(1024, max(NARROW, 2 ** int(math.log2(max(pictures // 4, 1)))))
    if not epochs:
        epochs = min(120, max(15, math.ceil(TRAINING_STEPS / math.ceil(pictures / batch_size))))
    learning_rate = learning_rate or min(1e-3, 0.1 / width)
    if 0 in given:
        print(
            f"Diff-C: width {width}, {epochs} epochs, learning rate {learning_rate:g}, for {pictures} training "
            f"pictures on a {kind} device (the paper: 1024, 30, 0.0001)"
        )
    return width, epochs, learning_rate


def estimate_training(
    shapes: Sequence[BlockShape], classes: Sequence[int], pictures: int, config: DiffCConfig
) -> float:
    """Estimate the seconds that training Diff-Cs takes, from a measured step, and print them with their size.

    Args:
        shapes: the shape of the maps of each layer; the layers are trained on one after another.
        classes: the number of classes of each factor; these Diff-Cs are trained together on a layer.
        pictures: the number of training pictures.
        config: the size and training of each Diff-C.
    """
    steps = math.ceil(pictures / config.batch_size) * config.epochs
    seconds, parameters = 0.0, 0
    for shape, layers in Counter(shapes).items():
        models = DiffCs(DiffC(shape.width, count, config.width) for count in classes)
        seconds += layers * steps * _measure_step(models, shape, config)
        parameters = max(parameters, sum(parameter.numel() for parameter in models.parameters()))
    print(
        f"training: {len(classes) * len(shapes)} Diff-Cs on {pictures} pictures, {len(classes)} at a time with up to "
        f"{parameters:,} parameters, {steps * len(shapes):,} steps, at most about {seconds / 60:.1f} minutes, "
        f"{parameters * 16 / 1e9:.2g} GB of memory for weights and optimizer"
    )
    return seconds


def _measure_step(models: "DiffCs", shape: BlockShape, config: DiffCConfig) -> float:
    device = devices.pick(config.device)
    objective = DiffCObjective(models).to(device)
    optimizer = torch.optim.AdamW(objective.parameters(), lr=config.learning_rate)
    maps = torch.randn(config.batch_size, *shape.positions, shape.width, device=device)
    labels = torch.zeros(config.batch_size, len(models.models), dtype=torch.long, device=device)
    for _ in range(3):  # the last step is timed
        devices.synchronize(device)
        began = time.perf_counter()
        objective({"maps": maps, "labels": labels})["loss"].backward()
        optimizer.step()
        optimizer.zero_grad()
        devices.synchronize(device)
    return time.perf_counter() - began


class DiffC(nn.Module):
    """The classifier: from maps (B, h, w, d) to logits (B, classes). Its layers have the names of Table 10."""

    def __init__(self, channels: int, classes: int, width: int = 1024):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, width, 3, padding=1)
        self.conv2, self.conv3, self.conv4 = (nn.Conv2d(width, width, 3, stride=2, padding=1) for _ in range(3))
        self.gap = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(width, classes)

    def forward(self, maps: Tensor) -> Tensor:
        """Classify maps (B, h, w, d), channels last as the store holds them."""
        x = maps.permute(0, 3, 1, 2)
        for convolution in (self.conv1, self.conv2, self.conv3, self.conv4):
            x = F.relu(convolution(x))
        return self.fc(self.gap(x).flatten(1))


class DiffCs(nn.Module):
    """Several Diff-Cs of one size on the same maps, computed together: one convolution with the first layers of all,
    and then convolutions with one group for each.

    On one core of a CPU, six Diff-Cs of width 32 take about three quarters of the time that they take one after
    another.
    """

    def __init__(self, models: Iterable[DiffC]):
        super().__init__()
        self.models = nn.ModuleList(models)

    def forward(self, maps: Tensor) -> list[Tensor]:
        """Classify maps (B, h, w, d), and return the logits (B, classes) of each Diff-C."""
        x = maps.permute(0, 3, 1, 2)
        if x.device.type == "cpu":
            x = x.contiguous()  # wide convolutions of maps with channels last take up to twice the time
        for name in ("conv1", "conv2", "conv3", "conv4"):
            layers = [getattr(model, name) for model in self.models]
            weight, bias = (torch.cat([getattr(layer, part) for layer in layers]) for part in ("weight", "bias"))
            groups = 1 if name == "conv1" else len(layers)
            x = F.relu(F.conv2d(x, weight, bias, layers[0].stride, layers[0].padding, groups=groups))
        pooled = x.mean((2, 3)).chunk(len(self.models), 1)
        return [model.fc(means) for model, means in zip(self.models, pooled, strict=True)]


class TrainedDiffC(NamedTuple):
    """A trained Diff-C with the weights of its best epoch."""

    model: DiffC
    """In evaluation mode, on the training device."""
    epochs: pd.DataFrame
    """``epoch``, and on the validation pictures ``accuracy`` and ``loss`` (cross-entropy)."""
    epoch: int
    """The selected epoch: highest validation accuracy, among equals the lowest loss."""
    seconds: float
    """Training time in this process, of all that were trained together."""


class DiffCObjective(nn.Module):
    """Cross-entropy of Diff-Cs on batches of ``maps`` (B, h, w, d) and ``labels`` (B, number of Diff-Cs).

    The loss is the sum over the Diff-Cs. They share no weight, and AdamW treats each weight by itself, so each is
    trained as if it were alone.
    """

    def __init__(self, models: DiffCs):
        super().__init__()
        self.models = models

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Compute the ``loss`` and the mean training ``accuracy`` of the batch."""
        pairs = list(zip(self.models(batch["maps"]), batch["labels"].unbind(1), strict=True))
        correct = torch.stack([(logits.argmax(1) == labels).float().mean() for logits, labels in pairs])
        loss = torch.stack([F.cross_entropy(logits, labels) for logits, labels in pairs]).sum()
        return {"loss": loss, "accuracy": correct.mean().detach()}


class BestEpoch:
    """The validation results of one Diff-C, and the weights of its best epoch."""

    def __init__(self, model: DiffC, folder: Path | None):
        """Start without an epoch.

        Args:
            model: the Diff-C in training.
            folder: the folder for the best weights; None keeps them in memory only.
        """
        self._model, self._folder = model, folder
        self.rows: list[dict[str, float]] = []
        self.best: dict[str, Tensor] = {}

    @property
    def epoch(self) -> int:
        """The best epoch so far, counted from 1."""
        return max(self.rows, key=lambda row: (row["accuracy"], -row["loss"]))["epoch"]

    def add(self, logits: Tensor, truth: Tensor) -> None:
        """Add an epoch, from the logits (N, classes) and the classes (N,) of the validation pictures."""
        before = self.epoch if self.rows else 0
        accuracy = (logits.argmax(1) == truth).float().mean().item()
        loss = F.cross_entropy(logits, truth).item()
        self.rows.append({"epoch": len(self.rows) + 1, "accuracy": accuracy, "loss": loss})
        if self.epoch == self.rows[-1]["epoch"]:
            self.best = {name: value.detach().to("cpu", copy=True) for name, value in self._model.state_dict().items()}
            if self._folder:
                self._folder.mkdir(parents=True, exist_ok=True)
                write_tensors(self._file(self.epoch), self.best, {})
                # the last checkpoint may still refer to the best epoch before this one
                self._remove_but(before, self.epoch)

    def restore(self, rows: list[dict[str, float]]) -> None:
        """Resume from the rows of a checkpoint.

        Raises:
            ValueError: the file of the best weights is missing or damaged, or a weight is not finite.
        """
        self.rows = rows
        self.best = read_weights(self._file(self.epoch), self._model) if self.rows else {}

    def finish(self) -> None:
        """Load the best weights into the model, and leave only their file."""
        self._model.load_state_dict(self.best)
        if self._folder:
            self._remove_but(self.epoch)

    def _file(self, epoch: int) -> Path:
        return self._folder / f"epoch-{epoch}.safetensors"

    def _remove_but(self, *epochs: int) -> None:
        for file in self._folder.iterdir():
            if (match := SAVED.fullmatch(file.name)) and int(match[1]) not in epochs:
                file.unlink()


class EpochSelection(Watcher):
    """A training callback that validates every epoch and keeps the weights of each Diff-C's best one."""

    def __init__(
        self,
        models: DiffCs,
        validation: Examples,
        layer: str,
        batch_size: int,
        steps_per_epoch: int,
        folders: Sequence[Path | None],
    ):
        """Watch Diff-Cs in training.

        Args:
            models: the Diff-Cs in training.
            validation: the pictures by which the epochs are selected, with labels (N, number of Diff-Cs).
            layer: the name in the store of the maps to classify.
            batch_size: the number of pictures per pass.
            steps_per_epoch: the number of optimizer steps per epoch.
            folders: for each Diff-C the folder for the best weights; None keeps them in memory only.
        """
        self._models, self._validation, self._layer, self._batch_size = models, validation, layer, batch_size
        self._steps_per_epoch = steps_per_epoch
        self.selected = [BestEpoch(model, folder) for model, folder in zip(models.models, folders, strict=True)]

    def after(self, step: int, optimizer: torch.optim.Optimizer) -> None:
        """Validate at the end of an epoch."""
        if step % self._steps_per_epoch:
            return
        logits = _logits(self._models, self._validation, self._layer, self._batch_size)
        for selected, each, truth in zip(self.selected, logits, self._validation.labels.unbind(1), strict=True):
            selected.add(each, truth)

    def state(self) -> dict[str, Any]:
        """Return the measurements so far; the weights are in files beside the checkpoint."""
        return {"rows": [selected.rows for selected in self.selected]}

    def restore(self, state: dict[str, Any]) -> None:
        """Resume from :meth:`state`; see :meth:`BestEpoch.restore`."""
        for selected, rows in zip(self.selected, state["rows"], strict=True):
            selected.restore(rows)


class StepReport(Watcher):
    """A training callback that passes on the number of steps."""

    def __init__(self, report: Callable[[int], Any]):
        self._report = report

    def after(self, step: int, optimizer: torch.optim.Optimizer) -> None:
        """Report the step."""
        self._report(step)


def train_together(
    training: Mapping[str, Examples],
    validation: Mapping[str, Examples],
    layer: str,
    config: DiffCConfig | None = None,
    *,
    folder: str | Path | None = None,
    settings: dict[str, Any] | None = None,
    progress: Callable[[int], Any] | None = None,
) -> dict[str, TrainedDiffC]:
    """Train a Diff-C, a small classifier of a layer's stored maps, for each factor (such as shape or colour).

    All see the same batches, in one pass. Each starts from the same weights as if it were trained alone, and ends with
    the same ones up to rounding.

    Args:
        training: the labelled training pictures by factor; the pictures are the same, only their labels differ. An
            epoch has one view of each picture, drawn at random among those stored: the whole picture or a crop.
        validation: likewise the pictures on which each factor's best epoch is chosen.
        layer: the layer's name in the store; its maps are (h, w, d).
        config: the size and training of each classifier; None means the settings of the paper (Revelio).
        folder: where the checkpoint is written, from which interrupted training resumes, and in a subfolder for each
            factor its best weights; None writes nothing.
        settings: further settings, as plain JSON; a checkpoint with other ones is not resumed.
        progress: is called after each step with the number of steps so far; None shows a progress bar instead.

    Returns:
        The trained classifier of each factor.

    Raises:
        ValueError: the layer does not hold maps, the factors have different pictures, the checkpoint has other
            settings, or its weights are damaged.
    """
    config = config or DiffCConfig()
    joined, held_out = (join_factors(list(each.values())) for each in (training, validation))
    shape = joined.store.layout[layer]
    if len(shape.positions) != 2:
        raise ValueError(f"layer: {layer!r} has items with positions {shape.positions}; Diff-C takes maps (h, w, d)")
    models = DiffCs(_initialised(shape.width, len(each.classes), config) for each in training.values())
    steps = joined.steps(config.batch_size)
    folders = [Path(folder, factor) if folder else None for factor in training]
    selection = EpochSelection(models, held_out.hold(layer), layer, config.batch_size, steps, folders)
    trained = train(
        DiffCObjective(models),
        joined.hold(layer).shuffled(layer, config.batch_size, config.seed),
        TrainConfig(
            steps=steps * config.epochs, learning_rate=config.learning_rate, final_rate=config.final_rate,
            weight_decay=config.weight_decay, schedule="cosine", clip_norm=0.0, precision=config.training_precision,
            device=config.device, seed=config.seed, log_every=steps, checkpoint_every=steps,
        ),
        folder=folder,
        watchers=[selection, StepReport(progress)] if progress else [selection],
        settings={
            "diffc": asdict(config), "block": layer, "pictures": len(joined), "factors": list(training),
            **(settings or {}),
        },
        title="Diff-C",
        progress=progress is None,
    )  # fmt: skip
    found = {}
    for factor, model, selected in zip(training, models.models, selection.selected, strict=True):
        selected.finish()
        found[factor] = TrainedDiffC(model.eval(), pd.DataFrame(selected.rows), selected.epoch, trained.seconds)
    return found


def classify_stored(models: Sequence[DiffC], examples: Examples, layer: str, batch_size: int = 16) -> list[Tensor]:
    """Predict the class indices (N,) of the uncropped pictures of a store, by each of several Diff-Cs of one size.

    Raises:
        FloatingPointError: a logit is not finite.
    """
    return [logits.argmax(1) for logits in _logits(DiffCs(models), examples, layer, batch_size)]


def read_weights(file: Path, model: nn.Module) -> dict[str, Tensor]:
    """Read the weights in a file that :class:`BestEpoch` wrote, and check them against a model.

    Args:
        file: the file of weights.
        model: the model that the weights must fit by name and shape; it is not changed.

    Raises:
        ValueError: the file is missing or damaged, or a tensor has another name or shape or is not finite. The error
            names the file and the tensor.
    """
    weights, _ = read_tensors(file)
    expected: Mapping[str, Tensor] = model.state_dict()
    for name in sorted({*weights, *expected}):
        here, there = expected.get(name), weights.get(name)
        if here is None or there is None or here.shape != there.shape:
            shapes = [tuple(value.shape) if value is not None else "absent" for value in (there, here)]
            raise ValueError(f"{file} is of another model: {name} is {shapes[0]}, expected {shapes[1]}")
    if name := not_finite(weights):
        raise ValueError(f"{file} is damaged: {name} has NaN or infinite values")
    return weights


def _initialised(channels: int, classes: int, config: DiffCConfig) -> DiffC:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        return DiffC(channels, classes, config.width)


@torch.no_grad()
def _logits(models: DiffCs, examples: Examples, layer: str, batch_size: int) -> list[Tensor]:
    device = next(models.parameters()).device
    with evaluation_mode(models):
        batches = [models(batch["maps"].to(device)) for batch in examples.batches(layer, batch_size)]
    logits = [torch.cat(parts).float().cpu() for parts in zip(*batches, strict=True)]
    if not all(each.isfinite().all() for each in logits):
        raise FloatingPointError(f"{layer}: the logits of Diff-C are not finite")
    return logits
