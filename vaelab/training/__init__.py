"""The training loop, its checkpoints and batch sources, and evaluation mode."""

from vaelab.training.batches import Batches, NumberedBatches, shuffled_batches
from vaelab.training.evaluation import evaluation_mode
from vaelab.training.loop import TrainConfig, Trained, Watcher, train
from vaelab.training.planning import TrainingPlan, announce, plan_training

__all__ = [
    "Batches",
    "NumberedBatches",
    "TrainConfig",
    "Trained",
    "TrainingPlan",
    "Watcher",
    "announce",
    "evaluation_mode",
    "plan_training",
    "shuffled_batches",
    "train",
]
