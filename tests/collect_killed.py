"""Collections in processes of their own, to be killed."""

import os
import random
import signal
import time
from pathlib import Path

import torch

from vaelab import activations, models, store
from vaelab.activations import collect

KILLS = 10


def collect_and_kill(model, folder):
    """Collect once undisturbed, and in child processes that are killed at random moments, ten at most, until one ends.

    The children are forked, so that the model is loaded once. The number of kills is written to a file.
    """
    torch.set_num_threads(1)
    pipeline = models.load_pipeline(model, device="cpu")
    config = collect.CollectConfig(
        ("down.1.0", "mid.0"),
        activations.Sampling(steps=2, guidance_scale=2.0),
        batch_size=2,
        items_per_shard=8,
        seed=7,
    )
    prompts = [f"a red thing number {i}" for i in range(42)]

    def in_a_child(place):
        child = os.fork()
        if child == 0:
            layout, per_prompt, _ = collect.run_trial_batch(pipeline, prompts, config)
            collect.collect_prompts(
                pipeline, prompts, config, place, layout=layout, items_per_prompt=per_prompt, progress=False
            )
            os._exit(0)
        return child

    began = time.perf_counter()
    assert os.waitpid(in_a_child(f"{folder}/undisturbed"), 0)[1] == 0
    seconds = time.perf_counter() - began
    rng, kills = random.Random(0), 0
    while kills < KILLS:
        child = in_a_child(f"{folder}/killed")
        time.sleep(rng.uniform(0.15, 0.35) * seconds)
        if os.waitpid(child, os.WNOHANG)[0]:
            break
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        kills += 1
    assert os.waitpid(in_a_child(f"{folder}/killed"), 0)[1] == 0
    Path(folder, "kills").write_text(str(kills))


def overwrite(root, name, cells, settings):
    """Run a notebook's cells over its finished run, and stop for long in the first write to its store."""
    from notebook_cells import execute_cells

    add = store.Writer.add

    def slow(self, *args):
        add(self, *args)
        Path(root, "added").touch()
        time.sleep(60)

    store.Writer.add = slow
    torch.set_num_threads(1)
    os.chdir(root)
    execute_cells(name, *cells, output_dir=f"outputs/{name}/test", overwrite=True, **settings)
