"""The training loop, its checkpoints and batch sources, and evaluation mode."""

from vaelab.training.batches import Batches, NumberedBatches, shuffled_batches
from vaelab.training.evaluation import evaluation_mode
from vaelab.training.loop import TrainConfig, Trained, Watcher, train

__all__ = [
    "Batches",
    "NumberedBatches",
    "TrainConfig",
    "Trained",
    "Watcher",
    "evaluation_mode",
    "shuffled_batches",
    "train",
]
