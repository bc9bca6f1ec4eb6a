"""Diff-C, the small classifier on one block's feature maps of Kim et al. ("Revelio", section 3.3, Table 10).

Four 3 x 3 convolutions, three of them of stride 2, the mean over positions and one linear layer; 40
million parameters at 1280 input channels. It is trained as in section 4.1: AdamW, 30 epochs of
batches of 16, a cosine from 1e-4 down to 5e-5. The epoch is chosen on validation pictures, so that the
test pictures are classified once. The table names nothing between the convolutions; here it is ReLU.

The channels of a denoiser's maps differ far more from each other than one does between pictures, and until the
network has learned to look past that it learns nothing else: the narrower it is, the more steps that takes.
"""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from vaelab.core.io import atomic
from vaelab.core.validate import at_least
from vaelab.probing.dataset import Examples
from vaelab.training.loop import TrainConfig, Watcher, train

BEST = "best.safetensors"


@dataclass(frozen=True)
class DiffCConfig:
    """How a Diff-C is made and trained; the defaults are the paper's."""

    width: int = 1024
    """Channels of every convolution."""
    epochs: int = 30
    """Passes over the training pictures."""
    batch_size: int = 16
    """Pictures to a step."""
    learning_rate: float = 1e-4
    """AdamW's at the beginning."""
    final_rate: float = 5e-5
    """AdamW's at the end: the cosine's eta_min."""
    weight_decay: float = 0.01
    """AdamW's; the paper does not say, this is its library's."""
    device: str = "auto"
    """Where it is trained."""
    precision: str = "float32"
    """Of the forward pass."""
    seed: int = 0
    """Fixes its first weights, and the order of the pictures."""

    def __post_init__(self) -> None:
        for name in ("width", "epochs", "batch_size"):
            at_least(name, getattr(self, name), 1)
        at_least("learning_rate", self.learning_rate, 0, exclusive=True)


class DiffC(nn.Module):
    """Logits (B, classes) of maps (B, h, w, d), the layers of Table 10 under its names."""

    def __init__(self, channels: int, classes: int, width: int = 1024):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, width, 3, padding=1)
        self.conv2, self.conv3, self.conv4 = (nn.Conv2d(width, width, 3, stride=2, padding=1) for _ in range(3))
        self.gap = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(width, classes)

    def forward(self, maps: Tensor) -> Tensor:
        """Classify maps (B, h, w, d), as :mod:`vaelab.activations.denoiser` gives them."""
        x = maps.permute(0, 3, 1, 2)
        for convolution in (self.conv1, self.conv2, self.conv3, self.conv4):
            x = F.relu(convolution(x))
        return self.fc(self.gap(x).flatten(1))


class Fitted(NamedTuple):
    """A trained Diff-C, with the weights of its best epoch."""

    model: DiffC
    """In evaluation mode, on the training device."""
    epochs: pd.DataFrame
    """``epoch``, and on the validation pictures ``accuracy`` and ``loss`` (cross-entropy)."""
    epoch: int
    """The chosen one: of the highest accuracy, where there are several of the lowest loss."""
    seconds: float
    """Time spent training in this process."""


class Objective(nn.Module):
    """Cross-entropy of a Diff-C on batches of ``maps`` and ``labels``."""

    def __init__(self, model: DiffC):
        super().__init__()
        self.model = model

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """The ``loss``, and the share that is ``right``."""
        logits = self.model(batch["maps"])
        right = (logits.argmax(1) == batch["labels"]).float().mean()
        return {"loss": F.cross_entropy(logits, batch["labels"]), "right": right.detach()}


class Selection(Watcher):
    """Measures every epoch on the validation pictures and keeps the weights of the best."""

    def __init__(self, model: DiffC, held_out: Examples, block: str, config: DiffCConfig, every: int, folder: Any):
        self._model, self._held_out, self._block, self._config = model, held_out, block, config
        self._every, self._file = every, Path(folder, BEST) if folder else None
        self.rows: list[dict[str, float]] = []
        self.best: dict[str, Tensor] = {}

    @property
    def epoch(self) -> int:
        """The best so far, counted from 1."""
        return max(self.rows, key=_merit)["epoch"]

    def after(self, step: int, optimizer: torch.optim.Optimizer) -> None:
        """Called by the training."""
        if step % self._every:
            return
        logits = _logits(self._model, self._held_out, self._block, self._config.batch_size)
        truth = self._held_out.labels
        accuracy = (logits.argmax(1) == truth).float().mean().item()
        loss = F.cross_entropy(logits, truth).item()
        self.rows.append({"epoch": step // self._every, "accuracy": accuracy, "loss": loss})
        if self.epoch == self.rows[-1]["epoch"]:
            self.best = {name: value.detach().to("cpu", copy=True) for name, value in self._model.state_dict().items()}
            if self._file:
                with atomic(self._file) as draft:
                    save_file(self.best, draft)

    def state(self) -> dict[str, Any]:
        """The rows; the weights lie beside the checkpoint."""
        return {"rows": self.rows}

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from what ``state`` gave."""
        self.rows = state["rows"]
        self.best = load_file(self._file) if self.rows else {}


def fit(
    learn: Examples,
    validate: Examples,
    block: str,
    config: DiffCConfig | None = None,
    *,
    folder: str | Path | None = None,
    settings: dict[str, Any] | None = None,
    title: str = "Diff-C",
) -> Fitted:
    """Train a Diff-C on a block's stored maps.

    Args:
        learn: pictures to train on; of those with several views one is drawn in each epoch.
        validate: pictures to choose the epoch by.
        block: of the store, whose maps (h, w, d) are classified.
        config: how; None for the paper's settings.
        folder: where the checkpoint and the best weights go, and are gone on from; None keeps none.
        settings: what else, as plain JSON, a checkpoint must agree on.
        title: the progress bar's.

    Raises:
        ValueError: a block whose items are no maps.
    """
    config = config or DiffCConfig()
    shape = learn.kept.layout[block]
    if len(shape.positions) != 2:
        raise ValueError(f"block: {block!r} has items of {shape.positions} positions; Diff-C takes maps (h, w)")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        model = DiffC(shape.width, len(learn.classes), config.width)
    every = learn.steps(config.batch_size)
    selection = Selection(model, validate, block, config, every, folder)
    trained = train(
        Objective(model),
        learn.shuffled(block, config.batch_size, config.seed),
        TrainConfig(
            steps=every * config.epochs, learning_rate=config.learning_rate, final_rate=config.final_rate,
            weight_decay=config.weight_decay, schedule="cosine", clip_norm=0.0, precision=config.precision,
            device=config.device, seed=config.seed, log_every=every, checkpoint_every=every,
        ),
        folder=folder,
        watchers=[selection],
        settings={"diffc": asdict(config), "block": block, "pictures": len(learn), **(settings or {})},
        title=title,
    )  # fmt: skip
    model.load_state_dict(selection.best)
    return Fitted(model.eval(), pd.DataFrame(selection.rows), selection.epoch, trained.seconds)


def classify(model: DiffC, examples: Examples, block: str, batch_size: int = 16) -> Tensor:
    """The class numbers (N,) that a Diff-C gives pictures of a store, as they are."""
    return _logits(model, examples, block, batch_size).argmax(1)


@torch.no_grad()
def _logits(model: DiffC, examples: Examples, block: str, batch_size: int) -> Tensor:
    device = model.fc.weight.device
    return torch.cat([model(batch["maps"].to(device)).float().cpu() for batch in examples.batches(block, batch_size)])


def _merit(row: dict[str, float]) -> tuple[float, float]:
    return row["accuracy"], -row["loss"]
