"""Disk space that a training run will need, printed and checked before it starts."""

from pathlib import Path

from vaelab.core.disk import free_bytes

CHECKPOINT = 3 * 4
"""Bytes per parameter in a checkpoint: the weight and AdamW's two moments, in float32."""
WEIGHT = 4
"""Bytes per parameter in a file of weights."""


def require_training_space(what: str, largest: int, total: int, folder: str | Path, *, together: bool) -> int:
    """Print how much disk space and memory the training of some models takes, and require the space.

    A checkpoint is written beside its predecessor before it replaces it, so the largest one needs its space twice.

    Args:
        what: the name of the models in the message.
        largest: the number of parameters of the largest model.
        total: the number of parameters of all models.
        folder: the folder for the checkpoints and weights.
        together: whether all models are trained at once, with one checkpoint.

    Returns:
        The number of bytes needed on disk.

    Raises:
        ValueError: the disk does not have that much free space.
    """
    at_once = total if together else largest
    needed = total * (CHECKPOINT + WEIGHT) + at_once * CHECKPOINT
    memory = at_once * (CHECKPOINT + WEIGHT)  # weights, gradients and two moments
    free = free_bytes(folder)
    print(f"{what}: {total:,} parameters; {needed / 1e9:.3g} GB on disk ({free / 1e9:.3g} GB are free), "
          f"{memory / 1e9:.3g} GB of memory for training")  # fmt: skip
    if needed > free:
        raise ValueError(
            f"output_dir: the training of {what} takes {needed / 1e9:.3g} GB, and {free / 1e9:.3g} GB are free; train "
            "fewer or smaller ones, or take another disk"
        )
    return needed
