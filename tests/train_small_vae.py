"""Train the VAE of one folder with nudges, in another folder: what tests/vae/test_finetune.py runs, kills and runs as
two processes."""

import os
import threading
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tqdm import tqdm

from vaelab import data, models
from vaelab.core.io import write_json
from vaelab.training.loop import TrainConfig
from vaelab.vae import finetune
from vaelab.vae.nudge import NudgeConfig


def main(model: str, folder: str, steps: int) -> None:
    torch.set_num_threads(1)  # with another number of threads, sums end in other bits
    tqdm.set_lock(threading.RLock())  # its own is shared by processes, and a kill would leave it behind
    pictures = (
        data.load_images("digits", resolution=16, max_images=24),
        data.load_images("digits", split="test", resolution=16, max_images=8),
    )
    config = finetune.StudyConfig(
        TrainConfig(steps=steps, learning_rate=1e-3, log_every=4, checkpoint_every=4, device="cpu"),
        NudgeConfig(interval=10),
        batch_size=4,
        threshold=1e-2,
        track_every=5,
        evaluate_every=25,
    )
    loaded = []
    load = models.load_vae
    models.load_vae = lambda *names, **options: loaded.append(load(*names, **options)) or loaded[-1]
    run = finetune.train_vae(model, "nudge", config, pictures, folder, save_weights=True)
    if "RANK" in os.environ:
        rank = os.environ["RANK"]
        save_file(loaded[0].state_dict(), Path(folder, f"rank{rank}.safetensors"))
        write_json(Path(folder, f"rank{rank}.json"), run._asdict())


def as_rank(rank: int, port: int, *arguments: Any) -> None:
    """Train as one of two processes, with the environment that torchrun gives them."""
    places = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2, "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in places.items()}, MASTER_ADDR="localhost")
    main(*arguments)
