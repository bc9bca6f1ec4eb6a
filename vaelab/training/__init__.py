"""The training loop and its checkpoints."""

from vaelab.training.loop import TrainConfig, Trained, Watcher, train

__all__ = ["TrainConfig", "Trained", "Watcher", "train"]
