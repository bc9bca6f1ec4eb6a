"""How well and how fast sparse autoencoders train: recovery of a known dictionary, step times, and memory.

Training steps of the lab and of other libraries (``make peers`` installs them) are timed in a process of their own, in
which those libraries are found; all systems take turns. The unit is one float32 matrix product of the encoder by
torch.
"""

import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor

from vaelab.activations.collect import CollectConfig, stream_rows
from vaelab.bench import peers as bench_peers
from vaelab.bench.peers import LONG_AGO, PEERS, Step, StepConfig
from vaelab.core import devices
from vaelab.core.io import read_json, write_json
from vaelab.core.paths import project_root
from vaelab.core.timing import interleaved
from vaelab.data.prompts import load_prompts
from vaelab.sae.kernels import linear
from vaelab.sae.model import SAE, SCREEN_EXTRA, VARIANTS, SAEConfig
from vaelab.sae.synthetic import SyntheticSparseData, dictionary_recovery
from vaelab.sae.topk import select_topk
from vaelab.sae.train import NormaliseDecoders, SAEObjective, SAESpec, train_saes
from vaelab.training.loop import TrainConfig

PEERS_FOLDER = ".peers"
"""The folder, inside the project's folder, in which ``make peers`` installs the other libraries."""
OURS = {"float32": False, "bf16": True}


def lab_step(setting: StepConfig, *, screen: bool = False, dead: bool = False) -> Step:
    """Make a training step of the lab's autoencoder, as :func:`vaelab.training.loop.train` takes it: forward, both
    losses, backward, the decoder's projection and normalisation, Adam.

    Args:
        setting: the autoencoder to train.
        screen: whether bfloat16 finds the candidates of the top-k.
        dead: whether ``setting.dead`` features are dead in every step.
    """
    config = SAEConfig(setting.d, setting.n_features, min(setting.k, setting.n_features))
    objective = SAEObjective({"sae": SAESpec("x", config, setting.seed)}).to(setting.device)
    device = torch.device(setting.device)
    optimizer = torch.optim.AdamW(objective.parameters(), lr=1e-4, weight_decay=0.0, fused=True)
    (sae,) = objective.saes
    unit_length = NormaliseDecoders([sae])

    def step(number: int) -> None:
        if dead:
            sae.inactive_for[setting.dead_features] = LONG_AGO
        with torch.autocast(device.type, torch.bfloat16, enabled=screen):
            loss = objective({"x": setting.batch(number)})["loss"]
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        unit_length.after(number, optimizer)

    return step


def encoder_product(setting: StepConfig, product: Any = F.linear) -> Step:
    """Make a step that is one matrix product of the encoder, (batch_size, d) times (d, n_features), in float32."""
    generator = torch.Generator().manual_seed(setting.seed)
    weight = torch.randn(setting.n_features, setting.d, generator=generator).to(setting.device)

    def step(number: int) -> None:
        product(setting.batch(number), weight)

    return step


def build_step(name: str, setting: StepConfig) -> Step:
    """Make the step of a system, by its name.

    The names are ``gemm`` (the encoder's product by torch), ``gemm_best`` (by the kernel that the lab uses),
    ``float32`` and ``bf16`` (the lab's autoencoder), and those in :data:`vaelab.bench.peers.PEERS`. With ``_dead``
    appended to the name of an autoencoder, some features are dead.
    """
    plain = name.removesuffix("_dead")
    if plain in ("gemm", "gemm_best"):
        return encoder_product(setting, F.linear if plain == "gemm" else linear)
    if plain in OURS:
        return lab_step(setting, screen=OURS[plain], dead=plain != name)
    return bench_peers.peer_step(plain, setting, dead=plain != name)


def _in_child(names: Sequence[str], setting: StepConfig, rounds: int) -> Any:
    """Time systems in a process of their own, in which the peers' libraries are found."""
    with tempfile.TemporaryDirectory() as place:
        out = Path(place, "measured.json")
        given = {
            "names": list(names), "setting": asdict(setting), "rounds": rounds,
            "peers": str(project_root() / PEERS_FOLDER), "out": str(out),
        }  # fmt: skip
        command = [sys.executable, "-m", "vaelab.bench.sae", json.dumps(given)]
        ran = subprocess.run(command, capture_output=True, text=True, cwd=project_root())
        if not out.exists():
            raise RuntimeError(f"timing {', '.join(names)} ended with {ran.returncode}: {ran.stderr[-2000:]}")
        return read_json(out)


def _child(given: Mapping[str, Any]) -> None:
    sys.path.append(given["peers"])  # last, so that the lab's own versions of libraries take precedence
    setting, missing, actions = StepConfig(**given["setting"]), {}, {}
    device = torch.device(setting.device)
    before = devices.peak_memory(device)
    for name in given["names"]:
        try:
            actions[name] = build_step(name, setting)
        except ImportError as error:
            missing[name] = str(error)
    seconds = interleaved(actions, given["rounds"], device=device, warmup=1) if actions else pd.DataFrame()
    peak = devices.peak_memory(device)
    memory = {"peak_mb": peak / 2**20, "added_mb": (peak - before) / 2**20}
    write_json(given["out"], {"seconds": seconds.to_dict("list"), "missing": missing, **memory})


class StepTimings(NamedTuple):
    """Seconds of training steps that took turns."""

    seconds: pd.DataFrame
    """One row per round, one column per system."""
    missing: dict[str, str]
    """The systems that are not installed, with the error of their import."""


def step_seconds(setting: StepConfig, rounds: int, *, peers: Sequence[str] = tuple(PEERS)) -> StepTimings:
    """Time in seconds a training step of every system, without and with dead features, and the encoder's product.

    Args:
        setting: the autoencoder to train.
        rounds: how often each step is timed.
        peers: the names, in :data:`vaelab.bench.peers.PEERS`, of the systems to compare with.
    """
    systems = [f"{name}{dead}" for dead in ("", "_dead") for name in (*OURS, *peers) if setting.dead or not dead]
    measured = _in_child(["gemm", "gemm_best", *systems], setting, rounds)
    return StepTimings(pd.DataFrame(measured["seconds"]), measured["missing"])


def step_memory(setting: StepConfig, *, systems: Sequence[str] = (*OURS, *PEERS), rounds: int = 2) -> pd.DataFrame:
    """Measure the peak memory of a process that takes training steps of one system, and the time of these steps.

    Returns:
        One row per installed system: ``system``, ``peak_mb`` (of the whole process), ``added_mb`` (since before the
        weights were made) and ``step_over_gemm`` (a step's time over that of the encoder's product).
    """
    rows = []
    for system in systems:
        measured = _in_child(["gemm", system], setting, rounds)
        if system in measured["missing"]:
            continue
        medians = pd.DataFrame(measured["seconds"]).median()
        memory = {name: measured[name] for name in ("peak_mb", "added_mb")}
        rows.append({"system": system, **memory, "step_over_gemm": medians[system] / medians["gemm"]})
    return pd.DataFrame(rows)


def step_ratios(seconds: pd.DataFrame) -> dict[str, float]:
    """Compute ratios of median times over the rounds.

    ``sae.step_over_gemm.<float32|bf16>`` is the lab's step over the encoder's product,
    ``sae.step_over_best_gemm.<float32|bf16>`` the same over the quickest kernel's product. ``sae.speedup_vs.<peer>`` is
    a peer's step over the lab's in float32, ``sae.speedup_vs.<peer>_by_bf16`` over the lab's in bfloat16. Each is also
    there with dead features (``_dead``).
    """
    medians, ratios = seconds.median(), {}
    for name in seconds.columns:
        plain = name.removesuffix("_dead")
        dead = name.removeprefix(plain)
        if plain in OURS:
            ratios[f"sae.step_over_gemm.{name}"] = medians[name] / medians["gemm"]
            ratios[f"sae.step_over_best_gemm.{name}"] = medians[name] / medians["gemm_best"]
        elif plain in PEERS:
            ratios[f"sae.speedup_vs.{name}"] = medians[name] / medians[f"float32{dead}"]
            ratios[f"sae.speedup_vs.{plain}_by_bf16{dead}"] = medians[name] / medians[f"bf16{dead}"]
    return {name: float(value) for name, value in ratios.items()}


def recovery_table(
    steps: int, *, variants: Sequence[str] = VARIANTS, batch_size: int = 1024, device: str = "cpu", seed: int = 0
) -> pd.DataFrame:
    """Measure how much of a known dictionary each variant finds.

    The vectors are sums of 8 of the dictionary's 512 features in 128 dimensions. All variants are trained on the same
    batches in one pass.

    Returns:
        One row per variant: ``variant``, ``recovery`` (the mean over true features of the largest cosine with a found
        feature), and ``explained_variance``, ``l0`` and ``dead_fraction`` of the last steps.
    """
    planted = SyntheticSparseData(seed=seed)
    settings = {"d": planted.d, "n_features": planted.n_features, "k": planted.active, "dead_after": 25 * batch_size}
    specs = {variant: SAESpec("planted", SAEConfig(variant=variant, **settings), seed) for variant in variants}
    config = TrainConfig(
        steps=steps, learning_rate=1e-2, schedule="cosine", warmup=min(50, steps // 4), clip_norm=0.0, device=device,
        seed=seed, log_every=max(1, steps // 20),
    )  # fmt: skip
    trained = train_saes(specs, planted.batches(batch_size), config, title="planted")
    recovery = [dictionary_recovery(planted.features(), trained.saes[variant].features().cpu()) for variant in variants]
    last = trained.history.groupby("sae").last().loc[list(variants), ["explained_variance", "l0", "dead_fraction"]]
    return last.rename_axis("variant").reset_index().assign(recovery=recovery)


def selection_equal_fraction(sae: SAE, x: Tensor, *, extra: int = SCREEN_EXTRA) -> float:
    """Compute the share of vectors (N, d) for which the same features are selected with candidates found in bfloat16 as
    in float32."""
    with torch.no_grad():
        given = (x.to(sae.encoder) - sae.pre_bias, sae.encoder, sae.latent_bias, sae.config.k)
        plain, screened = (select_topk(*given, extra=more).entries.indices.view(len(x), -1) for more in (0, extra))
    return float((plain.sort(1).values == screened.sort(1).values).all(1).float().mean())


def train_on_pipeline(
    pipeline: Any, config: CollectConfig, *, prompts: int, steps: int, n_features: int = 2560, k: int = 10
) -> tuple[SAE, Tensor]:
    """Train an autoencoder on the first block's vectors for prompts of the synthetic scene world.

    Args:
        pipeline: a diffusers pipeline.
        config: the activations to capture.
        prompts: the number of prompts for training.
        steps: the number of optimizer steps, with 1024 vectors each.
        n_features: the size of the dictionary.
        k: the number of active features per vector.

    Returns:
        The autoencoder, and held-out vectors (N, d) of a quarter as many other prompts.
    """
    (block, *_), other = config.blocks, max(1, prompts // 4)
    texts = load_prompts("world", count=prompts + other).texts
    x = torch.cat([part.float() for part in stream_rows(pipeline, texts, config, block)])
    training, held_out = x.split([len(x) * prompts // len(texts), len(x) - len(x) * prompts // len(texts)])

    def batches(start: int = 0, rank: int = 0, world: int = 1) -> Iterator[dict[str, Tensor]]:
        for number in count(start * world + rank, world):
            generator = torch.Generator().manual_seed(number)
            yield {block: training[torch.randint(len(training), (1024,), generator=generator)]}

    setting = TrainConfig(steps=steps, learning_rate=1e-3, clip_norm=0.0, device=str(pipeline.device), log_every=steps)
    specs = {block: SAESpec(block, SAEConfig(x.shape[1], n_features, k, dead_after=25 * 1024))}
    return train_saes(specs, batches, setting, title=block).saes[block], held_out


class SAEBenchmark(NamedTuple):
    """Metrics and timed steps of :func:`benchmark_saes`."""

    metrics: dict[str, float]
    """The metrics, with names as in :func:`step_ratios` and :func:`benchmark_saes`."""
    steps: pd.DataFrame
    """One row per timed step: ``system``, ``dead`` (``none dead``, ``512 dead``), and ``over_gemm``, its time over the
    median time of the encoder's product."""


def benchmark_saes(
    pipeline: Any, config: CollectConfig, *, steps: int, rounds: Sequence[int], batch_size: int, seed: int = 0
) -> SAEBenchmark:
    """Measure recovery (``sae.recovery.<variant>``), the agreement of the top-k with candidates found in bfloat16 on
    real vectors (``sae.selection_equal_fraction``), and the times of training steps.

    Args:
        pipeline: the pipeline that generates the real vectors.
        config: the activations to capture for them.
        steps: the number of training steps on the known dictionary; on the real vectors about a quarter of them.
        rounds: two numbers. The first says how often each step is timed at d 1280, n_features 5120, k 10; the second,
            how often at n_features 81,920, k 32, with one process per system, whose peak memory is reported
            (``sae.large.peak_mb.<system>``). If the second is 0, this is not measured.
        batch_size: the number of vectors per timed step; at 81,920 features a quarter of it.
        seed: determines the synthetic vectors and the initial weights.
    """
    recovered = recovery_table(steps, device=str(pipeline.device), seed=seed)
    sae, x = train_on_pipeline(pipeline, config, prompts=max(8, steps // 16), steps=max(10, steps // 4))
    timed = step_seconds(StepConfig(batch_size=batch_size, seed=seed, device=str(pipeline.device)), rounds[0])
    metrics = {f"sae.recovery.{row.variant}": row.recovery for row in recovered.itertuples()}
    metrics |= {"sae.selection_equal_fraction": selection_equal_fraction(sae, x.to(sae.device))}
    metrics |= step_ratios(timed.seconds)
    if rounds[1]:
        large = StepConfig(
            n_features=81_920, k=32, batch_size=max(1, batch_size // 4), seed=seed, device=str(pipeline.device)
        )
        for row in step_memory(large, rounds=rounds[1]).itertuples():
            metrics[f"sae.large.peak_mb.{row.system}"] = row.peak_mb
            metrics[f"sae.large.step_over_gemm.{row.system}"] = row.step_over_gemm
    over = (timed.seconds / timed.seconds["gemm"].median()).melt(var_name="system", value_name="over_gemm")
    over["dead"] = over["system"].str.endswith("_dead").map({False: "none dead", True: "512 dead"})
    over["system"] = over["system"].str.removesuffix("_dead")
    return SAEBenchmark({name: float(value) for name, value in metrics.items()}, over)


if __name__ == "__main__":
    _child(json.loads(sys.argv[1]))
