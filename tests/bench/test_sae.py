import pandas as pd
import pytest
import torch

from vaelab.activations.collect import CollectConfig
from vaelab.activations.denoiser import Sampling
from vaelab.bench import sae as bench_sae
from vaelab.bench.peers import StepConfig
from vaelab.sae.model import SAE, SAEConfig

SMALL = StepConfig(d=16, n_features=64, k=3, batch_size=32, dead=10)


def test_ratios_are_of_medians():
    seconds = pd.DataFrame(
        {
            "gemm": [1.0, 2.0, 90.0], "gemm_best": [1.0, 1.0, 1.0], "float32": [3.0, 9.0, 2.0], "bf16": [1.5, 1.5, 9.0],
            "float32_dead": [4.0, 4.0, 4.0], "bf16_dead": [2.0, 2.0, 2.0], "sparsify": [6.0, 6.0, 1.0],
            "sparsify_dead": [10.0, 12.0, 14.0],
        }
    )  # fmt: skip
    assert bench_sae.step_ratios(seconds) == {
        "sae.step_over_gemm.float32": 1.5, "sae.step_over_best_gemm.float32": 3.0,
        "sae.step_over_gemm.bf16": 0.75, "sae.step_over_best_gemm.bf16": 1.5,
        "sae.step_over_gemm.float32_dead": 2.0, "sae.step_over_best_gemm.float32_dead": 4.0,
        "sae.step_over_gemm.bf16_dead": 1.0, "sae.step_over_best_gemm.bf16_dead": 2.0,
        "sae.speedup_vs.sparsify": 2.0, "sae.speedup_vs.sparsify_by_bf16": 4.0,
        "sae.speedup_vs.sparsify_dead": 3.0, "sae.speedup_vs.sparsify_by_bf16_dead": 6.0,
    }  # fmt: skip


def test_steps_are_timed_in_their_own_process_and_missing_libraries_are_reported(monkeypatch, tmp_path):
    monkeypatch.setattr(bench_sae, "PEERS_FOLDER", str(tmp_path))
    timed = bench_sae.step_seconds(SMALL, 2, peers=("dense", "sae_lens"))
    there = ["gemm", "gemm_best", "float32", "bf16", "dense", "float32_dead", "bf16_dead", "dense_dead"]
    assert [name for name in timed.seconds if "lens" not in name] == there
    assert timed.seconds.shape[0] == 2 and (timed.seconds > 0).all(axis=None)
    assert set(timed.missing) | set(timed.seconds) == {*there, "sae_lens", "sae_lens_dead"}


def test_memory_is_measured_in_a_process_for_each_system():
    table = bench_sae.step_memory(SMALL, systems=("dense",), rounds=1)
    assert list(table.columns) == ["system", "peak_mb", "added_mb", "step_over_gemm"]
    assert table["system"].tolist() == ["dense"]
    assert 50 < table["peak_mb"][0] < 4000 and table["added_mb"][0] < table["peak_mb"][0]


def test_a_failure_of_that_process_is_reported():
    with pytest.raises(RuntimeError, match=r"(?s)timing gemm, nothing ended with 1.*unknown name 'nothing'"):
        bench_sae.step_memory(SMALL, systems=("nothing",))


@pytest.mark.parametrize("screen", [False, True])
@pytest.mark.parametrize("dead", [False, True])
def test_our_step_is_that_of_the_training(screen, dead, monkeypatch):
    from vaelab.sae.train import SAEObjective, SAESpec, train_saes
    from vaelab.training.loop import TrainConfig

    made = []
    monkeypatch.setattr(bench_sae, "SAEObjective", lambda wanted: made.append(SAEObjective(wanted)) or made[0])
    step = bench_sae.lab_step(SMALL, screen=screen, dead=dead)
    (sae,) = made[0].saes
    if dead:
        step(0)
        assert (sae.inactive_for[SMALL.dead_features] > 10**8 - 1).sum() + (
            sae.inactive_for[SMALL.dead_features] == 0
        ).sum() == 10
        return
    # initialised without the data's median and spread, as it is here
    monkeypatch.setattr(SAEObjective, "initialise", lambda self, sample: None)
    config = TrainConfig(
        steps=3, learning_rate=1e-4, clip_norm=0.0, device="cpu", precision="bfloat16" if screen else "float32"
    )
    trained = train_saes(
        {"sae": SAESpec("x", sae.config, SMALL.seed)},
        lambda start=0, **_: ({"x": SMALL.batch(number)} for number in range(start, 99)), config,
    )  # fmt: skip
    for number in range(3):
        step(number)
    for name, weight in trained.saes["sae"].named_parameters():
        torch.testing.assert_close(weight, dict(sae.named_parameters())[name], rtol=1e-6, atol=1e-7)


def test_recovery_is_reported_for_each_variant():
    table = bench_sae.recovery_table(40, variants=("topk", "relu_l1"), batch_size=128)
    assert list(table.columns) == ["variant", "explained_variance", "l0", "dead_fraction", "recovery"]
    assert table["variant"].tolist() == ["topk", "relu_l1"]
    assert table["l0"][0] == 8 and table["recovery"].between(0.3, 1).all()


def test_the_screens_choice_is_compared_vector_by_vector():
    sae, x = SAE(SAEConfig(64, 2048, 10)), torch.randn(500, 64, generator=torch.Generator().manual_seed(0))
    one, many = (bench_sae.selection_equal_fraction(sae, x, extra=extra) for extra in (1, 12))
    assert 0.5 < one < 1 and many == 1


def test_an_autoencoder_of_real_vectors(small_pipeline):
    config = CollectConfig(("mid.0",), Sampling(steps=2, guidance_scale=0.0), seed=3)
    sae, unseen = bench_sae.train_on_pipeline(small_pipeline("sdxl"), config, prompts=4, steps=3, n_features=64, k=4)
    assert sae.config.d == unseen.shape[1] and sae.config.n_features == 64
    assert 0 <= bench_sae.selection_equal_fraction(sae, unseen) <= 1
