"""Time that tracking, collecting and sweeping take, and the noise of the measurement on a shared machine.

Tracking measures a VAE's channels during training, collecting stores a denoiser's activations, and sweeping reads many
layers at many timesteps. All systems of a comparison run in one process and take turns, in a random order in each
round. Where a reference runs twice per round, the difference between its two runs (the second is called ``repeat``) is
the noise of the measurement.
"""

import copy
import functools
import tempfile
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from itertools import islice, product
from typing import Any

import pandas as pd
import torch
from torch import Tensor, nn

from vaelab import activations
from vaelab.activations.collect import CollectConfig, collect_prompts, run_trial_batch
from vaelab.core import devices
from vaelab.core.timing import interleaved
from vaelab.data.images import Images
from vaelab.data.labelled import LabelledPictures
from vaelab.data.prompts import load_prompts
from vaelab.models.conditioning import encode_pictures, encode_prompts, predict
from vaelab.probing.layer_features import LayerConfig
from vaelab.vae.finetune import ChannelWatcher, StudyConfig
from vaelab.vae.objective import VAEObjective


def tracking_seconds(vae: nn.Module, images: Images, config: StudyConfig, rounds: int) -> pd.DataFrame:
    """Time a training step in seconds: ``untracked``, the same again as ``repeat``, and ``tracked``.

    The three train copies of ``vae`` on the same batches. A tracked step measures every GroupNorm output, classifies
    the channels, and counts near-zero weights: all that the study does on such a step. On its other steps the study
    has no hook and measures nothing.

    Args:
        vae: the model, on the device to measure on.
        images: the pictures to train on.
        config: the batch size, the learning rate and what is tracked; here every step is tracked.
        rounds: how often each kind of step is timed.

    Returns:
        One row per round, one column per kind of step.
    """
    device = next(vae.parameters()).device
    batches = images.shuffled(config.batch_size, config.train.seed)()
    pixels = [next(batches)["pixels"].to(device) for _ in range(4)]
    every_step = replace(config, track_every=1)
    dtype = devices.dtype(config.train.precision)
    precision = functools.partial(torch.autocast, device.type, dtype, enabled=dtype != torch.float32)

    def step_of(tracked: bool) -> Callable[[int], None]:
        trained = copy.deepcopy(vae).train().requires_grad_(True)
        objective = VAEObjective(trained, config.kl_weight)
        optimizer = torch.optim.AdamW(
            trained.parameters(), lr=config.train.learning_rate, weight_decay=config.train.weight_decay, fused=True
        )
        watcher = ChannelWatcher(trained, "baseline", every_step)

        def step(number: int) -> None:
            torch.manual_seed(number)
            with watcher.around(number + 1) if tracked else nullcontext(), precision():
                objective({"pixels": pixels[number % len(pixels)]})["loss"].backward()
            optimizer.step()
            optimizer.zero_grad()
            if tracked:
                watcher.after(number + 1, optimizer)

        return step

    actions = {"untracked": step_of(False), "repeat": step_of(False), "tracked": step_of(True)}
    return interleaved(actions, rounds, device=device, seed=config.train.seed)


def collect_seconds(pipeline: Any, prompts: int, config: CollectConfig, rounds: int) -> pd.DataFrame:
    """Time in seconds the generation of pictures for the same prompts of the synthetic scene world: ``plain``, the same
    again as ``repeat``, and ``collecting``.

    ``plain`` ends with the pictures. ``collecting`` captures activations, stops each pass after the last requested
    block, and ends when the activations are on the disk.

    Args:
        pipeline: the pipeline, on the device to measure on.
        prompts: the number of prompts; each round uses other seeds for them.
        config: what is collected, and with which sampling and batch size.
        rounds: how often each system is timed.

    Returns:
        One row per round, one column per system.
    """
    texts = load_prompts("world", count=prompts).texts
    layout, per_prompt, _ = run_trial_batch(pipeline, texts, config)

    def plain(number: int) -> None:
        activations.generate_all(pipeline, texts, config.sampling, batch_size=config.batch_size, seed=number)

    def collecting(number: int) -> None:
        with tempfile.TemporaryDirectory() as folder:
            now = replace(config, seed=number)
            collect_prompts(pipeline, texts, now, folder, layout=layout, items_per_prompt=per_prompt, progress=False)

    actions = {"plain": plain, "repeat": plain, "collecting": collecting}
    return interleaved(actions, rounds, device=pipeline.device, warmup=1, seed=config.seed)


def sweep_seconds(
    pipeline: Any, pictures: LabelledPictures, config: LayerConfig, count: int, rounds: int
) -> tuple[pd.DataFrame, dict[str, float]]:
    """Time in seconds per picture how long features of all blocks and timesteps take.

    ``together`` computes them as they are collected, with one pass per timestep; ``one_at_a_time`` uses one pass per
    block and timestep. For comparison, ``encoding`` is the autoencoder alone, and ``whole_pass`` is one pass through
    the whole denoiser.

    Args:
        pipeline: the pipeline, on the device to measure on.
        pictures: the pictures; the first ``count`` that can be read make one batch.
        config: the blocks and timesteps.
        count: the number of pictures in the batch.
        rounds: how often each system is timed.

    Returns:
        A table with one row per round and one column per system; and the metrics: the median of each system, the cost
        of ``together`` without the encoding as a number of whole passes (``sweep.whole_passes``), and how many times as
        long ``one_at_a_time`` takes (``sweep.times_quicker``). Both are empty if ``rounds`` is 0.
    """
    if not rounds:
        return pd.DataFrame(), {}
    readable = (picture for picture in map(pictures.__getitem__, range(len(pictures))) if picture)
    pixels = torch.stack([picture.pixels for picture in islice(readable, count)])
    seeds, blocks = list(range(len(pixels))), list(config.blocks)

    def sweep(timesteps: Sequence[int], some_blocks: list[str]) -> None:
        activations.from_pictures(pipeline, pixels, seeds, timesteps, some_blocks, side=config.side)

    @torch.no_grad()
    def encoding() -> Tensor:
        return encode_pictures(pipeline, pixels)

    @torch.no_grad()
    def whole_pass(number: int) -> None:
        predict(pipeline, latents, config.timesteps[number % len(config.timesteps)], conditioning)

    latents, conditioning = encoding(), encode_prompts(pipeline, None, len(pixels), pixels.shape[-2:])

    def one_at_a_time(number: int) -> None:
        for timestep, block in product(config.timesteps, blocks):
            sweep([timestep], [block])

    actions = {
        "together": lambda number: sweep(config.timesteps, blocks), "one_at_a_time": one_at_a_time,
        "encoding": lambda number: encoding(), "whole_pass": whole_pass,
    }  # fmt: skip
    seconds = interleaved(actions, rounds, device=pipeline.device, warmup=1, seed=config.seed) / len(pixels)
    middle = seconds.median()
    named = {f"sweep.{name}.seconds_per_image": middle[name] for name in actions}
    named["sweep.whole_passes"] = (middle["together"] - middle["encoding"]) / middle["whole_pass"]
    return seconds, {**named, "sweep.times_quicker": middle["one_at_a_time"] / middle["together"]}
