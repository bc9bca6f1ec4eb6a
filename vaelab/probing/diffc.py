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
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vaelab.core import devices
from vaelab.core.validate import at_least
from vaelab.probing.dataset import Examples
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


def estimate_training(shape: BlockShape, classes: int, pictures: int, config: DiffCConfig, trainings: int) -> float:
    """Estimate the seconds that training some Diff-Cs takes, from a measured step, and print them with their size.

    Args:
        shape: the shape of the largest layer's maps.
        classes: the number of classes.
        pictures: the number of training pictures.
        config: the size and training of each Diff-C.
        trainings: the number of Diff-Cs.
    """
    device = devices.pick(config.device)
    model = DiffC(shape.width, classes, config.width).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.learning_rate)
    maps = torch.randn(config.batch_size, *shape.positions, shape.width, device=device)
    labels = torch.zeros(config.batch_size, dtype=torch.long, device=device)
    for _ in range(3):  # the last step is timed
        devices.synchronize(device)
        began = time.perf_counter()
        F.cross_entropy(model(maps), labels).backward()
        optimizer.step()
        optimizer.zero_grad()
        devices.synchronize(device)
    steps = math.ceil(pictures / config.batch_size) * config.epochs * trainings
    seconds = (time.perf_counter() - began) * steps
    parameters = sum(parameter.numel() for parameter in model.parameters())
    print(
        f"training: {trainings} Diff-Cs of up to {parameters:,} parameters on {pictures} pictures, {steps:,} steps, "
        f"at most about {seconds / 60:.1f} minutes, {parameters * 16 / 1e9:.2g} GB of memory for weights and optimizer"
    )
    return seconds


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


class TrainedDiffC(NamedTuple):
    """A trained Diff-C with the weights of its best epoch."""

    model: DiffC
    """In evaluation mode, on the training device."""
    epochs: pd.DataFrame
    """``epoch``, and on the validation pictures ``accuracy`` and ``loss`` (cross-entropy)."""
    epoch: int
    """The selected epoch: highest validation accuracy, among equals the lowest loss."""
    seconds: float
    """Training time in this process."""


class DiffCObjective(nn.Module):
    """Cross-entropy of a Diff-C on batches of ``maps`` (B, h, w, d) and ``labels`` (B,)."""

    def __init__(self, model: DiffC):
        super().__init__()
        self.model = model

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Compute the ``loss`` and the training ``accuracy`` of the batch."""
        logits = self.model(batch["maps"])
        accuracy = (logits.argmax(1) == batch["labels"]).float().mean()
        return {"loss": F.cross_entropy(logits, batch["labels"]), "accuracy": accuracy.detach()}


class EpochSelection(Watcher):
    """A training callback that validates every epoch and keeps the weights of the best one."""

    def __init__(
        self,
        model: DiffC,
        validation: Examples,
        layer: str,
        batch_size: int,
        steps_per_epoch: int,
        folder: str | Path | None,
    ):
        """Watch a model in training.

        Args:
            model: the model in training.
            validation: the pictures by which the epoch is selected.
            layer: the name in the store of the maps to classify.
            batch_size: the number of pictures per pass.
            steps_per_epoch: the number of optimizer steps per epoch.
            folder: the folder for the best weights, beside the checkpoint; None keeps them in memory only.
        """
        self._model, self._validation, self._layer, self._batch_size = model, validation, layer, batch_size
        self._steps_per_epoch, self._folder = steps_per_epoch, Path(folder) if folder else None
        self.rows: list[dict[str, float]] = []
        self.best: dict[str, Tensor] = {}

    @property
    def epoch(self) -> int:
        """The best epoch so far, counted from 1."""
        return max(self.rows, key=lambda row: (row["accuracy"], -row["loss"]))["epoch"]

    def after(self, step: int, optimizer: torch.optim.Optimizer) -> None:
        """Validate at the end of an epoch."""
        if step % self._steps_per_epoch:
            return
        logits = _logits(self._model, self._validation, self._layer, self._batch_size)
        truth = self._validation.labels
        accuracy = (logits.argmax(1) == truth).float().mean().item()
        loss = F.cross_entropy(logits, truth).item()
        before = self.epoch if self.rows else 0
        self.rows.append({"epoch": step // self._steps_per_epoch, "accuracy": accuracy, "loss": loss})
        if self.epoch == self.rows[-1]["epoch"]:
            self.best = {name: value.detach().to("cpu", copy=True) for name, value in self._model.state_dict().items()}
            if self._folder:
                write_tensors(self._file(self.epoch), self.best, {})
                # the last checkpoint may still refer to the best epoch before this one
                self._remove_but(before, self.epoch)

    def state(self) -> dict[str, Any]:
        """Return the measurements so far; the weights are in a file beside the checkpoint."""
        return {"rows": self.rows}

    def restore(self, state: dict[str, Any]) -> None:
        """Resume from :meth:`state`.

        Raises:
            ValueError: the file of the best weights is missing or damaged, or a weight is not finite.
        """
        self.rows = state["rows"]
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


class StepReport(Watcher):
    """A training callback that passes on the number of steps."""

    def __init__(self, report: Callable[[int], Any]):
        self._report = report

    def after(self, step: int, optimizer: torch.optim.Optimizer) -> None:
        """Report the step."""
        self._report(step)


def train_diffc(
    training: Examples,
    validation: Examples,
    layer: str,
    config: DiffCConfig | None = None,
    *,
    folder: str | Path | None = None,
    settings: dict[str, Any] | None = None,
    progress: Callable[[int], Any] | None = None,
) -> TrainedDiffC:
    """Train a Diff-C on a layer's stored maps.

    Args:
        training: the pictures to train on; each epoch has one random view (uncropped, or a crop) of every picture.
        validation: the pictures by which the epoch is selected.
        layer: the name in the store of the layer's maps (h, w, d).
        config: the size and training of the classifier; None means the paper's.
        folder: the folder for the checkpoint and the best weights, from which interrupted training resumes; None means
            that no file is written.
        settings: further settings, as plain JSON, that must be equal for a checkpoint to be resumed.
        progress: is called after each step with the number of steps so far; None shows a progress bar instead.

    Raises:
        ValueError: the layer does not hold maps, the checkpoint has other settings, or its weights are damaged.
    """
    config = config or DiffCConfig()
    shape = training.store.layout[layer]
    if len(shape.positions) != 2:
        raise ValueError(f"layer: {layer!r} has items with positions {shape.positions}; Diff-C takes maps (h, w, d)")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        model = DiffC(shape.width, len(training.classes), config.width)
    steps = training.steps(config.batch_size)
    selection = EpochSelection(model, validation, layer, config.batch_size, steps, folder)
    trained = train(
        DiffCObjective(model),
        training.shuffled(layer, config.batch_size, config.seed),
        TrainConfig(
            steps=steps * config.epochs, learning_rate=config.learning_rate, final_rate=config.final_rate,
            weight_decay=config.weight_decay, schedule="cosine", clip_norm=0.0, precision=config.training_precision,
            device=config.device, seed=config.seed, log_every=steps, checkpoint_every=steps,
        ),
        folder=folder,
        watchers=[selection, StepReport(progress)] if progress else [selection],
        settings={"diffc": asdict(config), "block": layer, "pictures": len(training), **(settings or {})},
        title="Diff-C",
        progress=progress is None,
    )  # fmt: skip
    selection.finish()
    return TrainedDiffC(model.eval(), pd.DataFrame(selection.rows), selection.epoch, trained.seconds)


def classify_stored(model: DiffC, examples: Examples, layer: str, batch_size: int = 16) -> Tensor:
    """Predict the class indices (N,) of the uncropped pictures of a store.

    Raises:
        FloatingPointError: a logit is not finite.
    """
    return _logits(model, examples, layer, batch_size).argmax(1)


def read_weights(file: Path, model: nn.Module) -> dict[str, Tensor]:
    """Read the weights in a file that :class:`EpochSelection` wrote, and check them against a model.

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


@torch.no_grad()
def _logits(model: DiffC, examples: Examples, layer: str, batch_size: int) -> Tensor:
    device = model.fc.weight.device
    with evaluation_mode(model):
        logits = [model(batch["maps"].to(device)).float().cpu() for batch in examples.batches(layer, batch_size)]
    if not (logits := torch.cat(logits)).isfinite().all():
        raise FloatingPointError(f"{layer}: the logits of Diff-C are not finite")
    return logits
