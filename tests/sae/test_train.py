"""Training several autoencoders in one pass: batches, planted dictionaries, resume, and refused settings."""

from dataclasses import replace
from itertools import islice

import pytest
import torch
from safetensors.torch import load_file

from vaelab import store
from vaelab.activations.collect import CollectConfig, stream_rows
from vaelab.activations.denoiser import Sampling
from vaelab.sae import train
from vaelab.sae.model import SAE, VARIANTS, SAEConfig
from vaelab.sae.synthetic import SyntheticSparseData, dictionary_recovery
from vaelab.sae.train import (
    FROZEN,
    SAEObjective,
    SAESpec,
    geometric_median,
    remove_parallel_gradient,
    store_batches,
    streaming_batches,
    train_saes,
)
from vaelab.training.loop import TrainConfig, Watcher


@pytest.fixture(autouse=True)
def few_vectors_to_initialise_from(monkeypatch):
    """Most of a short training would be its initialisation."""
    monkeypatch.setattr(train, "INITIALISATION_VECTORS", 2**11)


STORED = SyntheticSparseData(d=32, n_features=48, active=2, length=30.0)


def written(folder, items=60):
    layout = {name: store.BlockShape((4, 4), 32) for name in ("mid.0", "up.0.1")}
    with store.create(folder, layout, items_per_shard=20) as writer:
        for number in range(items):
            maps = {
                name: STORED.vectors(16, number + at).view(1, 4, 4, 32) for at, name in ((0, "mid.0"), (999, "up.0.1"))
            }
            writer.add(maps, [{"prompt": str(number), "seed": number, "timestep": 1}])
    return store.open(folder)


def test_several_blocks_of_a_store_in_one_pass(tmp_path):
    stored = written(tmp_path)
    saes = {f"{block}-k{k}": SAESpec(block, SAEConfig(32, 64, k)) for block in stored.layout for k in (2, 4)}
    config = TrainConfig(steps=20, learning_rate=0.01, clip_norm=0.0, log_every=20, device="cpu")
    trained = train_saes(saes, store_batches(stored, ["mid.0", "up.0.1"], 96, seed=0), config)
    last = trained.history[trained.history["step"] == 20].set_index("sae")
    assert list(last.index) == list(saes)
    assert (last["l0"] == [2, 4, 2, 4]).all() and (last["explained_variance"] > 0.3).all()
    first = next(store_batches(stored, ["mid.0"], 96, seed=0)(start=3))
    again = next(islice(store_batches(stored, ["mid.0"], 96, seed=0)(), 3, None))
    assert list(first) == ["mid.0"] and torch.equal(first["mid.0"], again["mid.0"])


def test_a_plan_is_of_all_autoencoders_and_counts_them_as_saved(tmp_path):
    saes = {f"k{k}": SAESpec("mid.0", SAEConfig(32, 64, k)) for k in (2, 4)}
    batches = store_batches(written(tmp_path), ["mid.0"], 96, seed=0)
    plan = train.plan_saes(saes, batches, TrainConfig(steps=50, learning_rate=0.01, clip_norm=0.0, device="cpu"))
    weights = 2 * (2 * 64 * 32 + 64 + 32)
    assert (plan.title, plan.steps, plan.parameters) == ("2 autoencoders", 50, weights)
    assert plan.seconds > 0
    assert plan.disk_bytes == pytest.approx((3 + 1) * 4 * weights, rel=0.2)  # with moments; and the weights again


def test_an_empty_store_and_an_unknown_block_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"^activations: .*empty holds no item"):
        store_batches(written(tmp_path / "empty", items=0), ["mid.0"], 8, seed=0)
    stored = written(tmp_path / "few", items=4)
    with pytest.raises(ValueError, match=r"^vectors: must be at least 1, got 0"):
        store_batches(stored, ["mid.0"], 0, seed=0)
    with pytest.raises(ValueError, match=r"block: unknown name 'mid\.1'.*mid\.0"):
        store_batches(stored, ["mid.1"], 8, seed=0)


STREAMED = CollectConfig(("mid.0", "down.2.1"), Sampling(steps=2, guidance_scale=0.0), batch_size=2)


def test_streamed_batches_hold_the_generated_vectors_and_resume_at_any_step(small_pipeline):
    pipeline, prompts = small_pipeline("sdxl"), ["a dog", "two cats", "a tree"]
    batches = streaming_batches(pipeline, prompts, STREAMED, batch_size=6, buffer_rows=10, seed=0)
    found = list(islice(batches(), 7))
    drawn = {
        block: torch.cat(list(stream_rows(pipeline, prompts, STREAMED, block))).float() for block in STREAMED.blocks
    }
    places = []
    for batch in found:
        assert list(batch) == list(STREAMED.blocks)
        same = [(batch[block][:, None] - drawn[block]).abs().sum(2) < 1e-6 for block in batch]
        assert torch.equal(same[0], same[1])  # the two blocks' vectors of one place come together
        places += same[0].nonzero()[:, 1].tolist()
    assert len(places) > 20 and len(set(places)) == len(places)
    again = next(batches(start=3))
    assert all(torch.equal(again[block], found[3][block]) for block in again)
    second = next(batches(start=1, rank=1, world=2))
    assert torch.equal(second["mid.0"], found[3]["mid.0"])


def test_what_cannot_be_streamed_is_refused(small_pipeline):
    with pytest.raises(ValueError, match="prompts: expected at least one"):
        streaming_batches(small_pipeline("sdxl"), [], STREAMED, batch_size=6, buffer_rows=10, seed=0)
    uneven = replace(STREAMED, blocks=("mid.0", "up.1.0"))
    with pytest.raises(ValueError, match="blocks: expected maps of one size"):
        next(streaming_batches(small_pipeline("sdxl"), ["a"], uneven, batch_size=6, buffer_rows=10, seed=0)())


PLANTED = SyntheticSparseData(d=32, n_features=48, active=2, length=30.0)


def config(**changes):
    return TrainConfig(
        **{"steps": 60, "learning_rate": 0.01, "clip_norm": 0.0, "log_every": 20, "device": "cpu", **changes}
    )


def specs(*variants, block="planted", **changes):
    settings = {"d": 32, "n_features": 64, "k": 2, "dead_after": 2048, **changes}
    return {variant: SAESpec(block, SAEConfig(variant=variant, **settings)) for variant in variants}


def test_a_planted_dictionary_is_found_in_the_units_of_the_data():
    setting = config(steps=300, schedule="cosine")
    trained = train_saes(specs("topk", n_features=48), PLANTED.batches(512), setting)
    sae, x = trained.saes["topk"], PLANTED.vectors(2000, number=10**6)
    assert dictionary_recovery(PLANTED.features(), sae.features()) > 0.95
    explained = 1 - (x - sae(x)).square().sum() / (x - x.mean(0)).square().sum()
    last = trained.history.iloc[-1]
    assert explained > 0.9
    assert last["explained_variance"] == pytest.approx(explained.item(), abs=0.02)
    assert last["l0"] == 2 and last["dead_fraction"] < 0.03 and last["step"] == 300
    torch.testing.assert_close(sae.decoder.norm(dim=1), torch.ones(48))
    assert trained.seconds > 0 and trained.resumed_at == 0


def test_a_planted_dictionary_is_found_by_training_and_not_by_the_frozen_controls():
    """There are more features than dimensions. Otherwise a soft-frozen decoder finds many of them too."""
    planted = SyntheticSparseData(d=16, n_features=32, active=2)
    sae = SAEConfig(16, 48, 2, dead_after=4096)
    saes = {kind: SAESpec("planted", sae, 1, kind) for kind in FROZEN}
    trained = train_saes(saes, planted.batches(256), config(steps=250, schedule="cosine")).saes
    start = SAE(sae, 1)
    found = {kind: dictionary_recovery(planted.features(), each.features()) for kind, each in trained.items()}
    assert found[""] > 0.95 and found[""] > max(found[kind] for kind in FROZEN if kind) + 0.05, found
    assert torch.equal(trained["decoder"].decoder, start.decoder)
    assert torch.equal(trained["encoder"].encoder, start.encoder)
    assert not torch.equal(trained["decoder"].encoder, start.encoder)
    assert not torch.equal(trained["encoder"].decoder, start.decoder)
    turned = (trained["soft_decoder"].decoder * start.decoder).sum(1)
    assert turned.min().item() == pytest.approx(0.8, abs=1e-5)
    torch.testing.assert_close(trained["soft_decoder"].decoder.norm(dim=1), torch.ones(48))


def test_every_variant_learns_and_together_they_learn_as_if_alone():
    together = train_saes(specs(*VARIANTS), PLANTED.batches(256), config())
    assert list(together.saes) == list(VARIANTS)
    assert list(together.history.columns) == ["step", "sae", "loss", "explained_variance", "l0", "dead_fraction"]
    curves = together.history.pivot(index="step", columns="sae", values="explained_variance")
    assert (curves.iloc[-1] > curves.iloc[0]).all() and (curves.iloc[-1] > 0.5).all()
    alone = train_saes(specs("matryoshka"), PLANTED.batches(256), config())
    for name, weight in alone.saes["matryoshka"].state_dict().items():
        assert torch.equal(weight, together.saes["matryoshka"].state_dict()[name]), name


def test_the_history_is_shown_as_it_grows():
    shown = []
    trained = train_saes(specs("topk", "k_sae"), PLANTED.batches(64), config(steps=5, log_every=2), live=shown.append)
    assert [len(history) for history in shown] == [2, 4, 6]
    assert shown[-1].equals(trained.history) and shown[0].equals(trained.history[:2])


def test_dead_features_are_revived_by_the_auxiliary_loss_alone():
    left = {}
    for weight in (0.0, 1 / 32):
        objective = SAEObjective(specs("topk", n_features=48, aux_weight=weight, dead_after=512))
        objective.initialise({"planted": PLANTED.vectors(4096, 10**6)})
        (sae,) = objective.saes
        with torch.no_grad():
            sae.encoder[:40] *= 0.02  # these are never among the largest
        optimizer = torch.optim.Adam(objective.parameters(), lr=0.01)
        for number in range(200):
            objective({"planted": PLANTED.vectors(256, number)})["loss"].backward()
            optimizer.step(), optimizer.zero_grad(), sae.normalise()
        left[weight] = int((sae.inactive_for >= 512).sum())
    assert left[0.0] >= 30
    assert left[1 / 32] <= 6


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_interrupted_and_resumed_equals_uninterrupted(tmp_path, monkeypatch, precision):
    from vaelab.training import loop

    saes, setting = specs("topk", "batchtopk", "jumprelu", k=4), config(checkpoint_every=13, precision=precision)
    expected = train_saes(saes, PLANTED.batches(128), setting, folder=tmp_path / "a")
    own = loop.train
    with monkeypatch.context() as patch:
        patch.setattr(
            train, "train",
            lambda *given, watchers, **more: own(*given, watchers=[*watchers[:0], Both(watchers[0], 30)], **more),
        )  # fmt: skip
        with pytest.raises(KeyboardInterrupt):
            train_saes(saes, PLANTED.batches(128), setting, folder=tmp_path / "b")
    resumed = train_saes(saes, PLANTED.batches(128), setting, folder=tmp_path / "b")
    assert resumed.resumed_at == 26
    assert resumed.history.equals(expected.history)
    for name, sae in expected.saes.items():
        for key, value in sae.state_dict().items():
            assert torch.equal(value, resumed.saes[name].state_dict()[key]), (name, key)
    first, second = (load_file(tmp_path / side / "checkpoint.safetensors") for side in "ab")
    assert first.keys() == second.keys() and all(torch.equal(value, second[key]) for key, value in first.items())


class Both(Watcher):
    """The training's own watcher, and then a stop."""

    def __init__(self, watcher, step):
        self.watcher, self.step = watcher, step

    def after(self, step, optimizer):
        self.watcher.after(step, optimizer)
        if step == self.step:
            raise KeyboardInterrupt


def test_a_checkpoint_of_other_autoencoders_is_refused(tmp_path):
    train_saes(specs("topk"), PLANTED.batches(64), config(steps=2), folder=tmp_path)
    with pytest.raises(ValueError, match="other settings"):
        train_saes(specs("topk", k=3), PLANTED.batches(64), config(steps=2), folder=tmp_path)


def test_bfloat16_chooses_quicker_and_learns_the_same():
    plain, screened = (
        train_saes(specs("topk"), PLANTED.batches(256), config(precision=precision))
        for precision in ("float32", "bfloat16")
    )
    assert screened.saes["topk"].encoder.dtype == torch.float32
    last = [trained.history["explained_variance"].iloc[-1] for trained in (plain, screened)]
    assert last[0] == pytest.approx(last[1], abs=1e-3)


def test_the_gradient_of_a_feature_has_nothing_along_it():
    generator = torch.Generator().manual_seed(0)
    decoder = torch.nn.Parameter(torch.nn.functional.normalize(torch.randn(7, 5, generator=generator)))
    decoder.grad = torch.randn(7, 5, generator=generator)
    along = (decoder.grad * decoder).sum(1, keepdim=True)
    expected = (decoder.grad - along * decoder).detach()
    remove_parallel_gradient(decoder)
    torch.testing.assert_close(decoder.grad, expected)
    objective = SAEObjective(specs("topk"))
    objective.initialise({"planted": PLANTED.vectors(512)})
    objective({"planted": PLANTED.vectors(64)})["loss"].backward()
    (sae,) = objective.saes
    assert sae.decoder.grad.norm() > 0
    assert (sae.decoder.grad * sae.decoder).sum(1).abs().max() < 1e-6 * sae.decoder.grad.norm()


def test_it_begins_with_the_datas_median_its_spread_and_k_features_a_vector():
    objective, x = SAEObjective(specs(*VARIANTS)), PLANTED.vectors(3000)
    objective.initialise({"planted": x})
    scale = objective.scales.item()
    median = geometric_median(x)
    assert scale == pytest.approx((x - median).square().mean().sqrt().item(), rel=1e-5)
    for sae in objective.saes:
        torch.testing.assert_close(sae.pre_bias * scale, median)
        if sae.config.variant in ("batchtopk", "jumprelu"):
            assert sae.encode(x / scale).l0().float().mean() == pytest.approx(2, abs=0.01)


def test_the_geometric_median_is_where_the_sum_of_distances_is_least():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(500, 3, generator=generator, dtype=torch.float64)
    x[:100] += 50  # which moves the mean by 10
    median = geometric_median(x)
    at = torch.linalg.vector_norm(x - median, dim=1).sum()
    for step in torch.randn(30, 3, generator=generator, dtype=torch.float64):
        assert torch.linalg.vector_norm(x - median - 0.02 * step, dim=1).sum() > at - 1e-6 * at
    assert median.norm() < 0.6 < x.mean(0).norm()
    with pytest.raises(ValueError, match="at least one vector"):
        geometric_median(x[:0])


def broken(value, at):
    def batches(start=0, rank=0, world=1):
        for number in range(start, 10**6):
            x = PLANTED.vectors(64, number)
            if number >= at:
                x[7, 3] = value
            yield {"planted": x}

    return batches


@pytest.mark.parametrize("at", [0, 40])
def test_a_vector_that_is_not_finite_is_named(at):
    with pytest.raises(ValueError, match=r"row 7 of \d+ is not finite"):
        train_saes(specs("topk"), broken(float("nan"), at), config(steps=44))


def test_what_cannot_be_trained_is_refused():
    with pytest.raises(ValueError, match="specs: no autoencoder"):
        train_saes({}, PLANTED.batches(8), config())
    with pytest.raises(ValueError, match=r"block: unknown name 'mid\.0'.*planted"):
        train_saes(specs("topk", block="mid.0"), PLANTED.batches(8), config())
    with pytest.raises(ValueError, match=r"clip_norm: must be 0 .*got 1\.0"):
        train_saes(specs("topk"), PLANTED.batches(8), config(clip_norm=1.0))
    with pytest.raises(ValueError, match="planted: all vectors are the same"):
        train_saes(specs("topk"), lambda **_: iter([{"planted": torch.ones(9, 32)}]), config())
    with pytest.raises(ValueError, match=r"frozen: .*'decodr'.*decoder"):
        train_saes({"a": SAESpec("planted", SAEConfig(32, 64, 2), 0, "decodr")}, PLANTED.batches(8), config())
    with pytest.raises(ValueError, match="vectors of 32 numbers; this autoencoder is for 16"):
        train_saes(specs("topk", d=16), PLANTED.batches(8), config())
