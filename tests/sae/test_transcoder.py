"""Transcoders: the loss and its gradients are the formulas, and files, training and evaluation are those of SAEs."""

import dense_sae
import pytest
import torch
from small_features import collect_small
from small_sae import relative

from vaelab import activations
from vaelab.activations.denoiser import Sampling
from vaelab.core.io import write_json
from vaelab.hooks import capture
from vaelab.models.block_names import find_blocks
from vaelab.sae import interventions, sweep, train
from vaelab.sae.metrics import evaluate_dictionaries
from vaelab.sae.model import SAE, SAEConfig
from vaelab.sae.steering import Directions, Steerer
from vaelab.sae.transcoder import PAIRS, OfOutput, Transcoder, TranscoderConfig, load_trained
from vaelab.store.format import BlockShape
from vaelab.training import TrainConfig

D, FEATURES, K = 12, 64, 3
BLOCK = "up.1.1"
IDENTITY = {"kind": "pipeline", "name": "local", "variant": "", "precision": "float32", "sha256": "a1" * 32}
SOURCE = {"identity": IDENTITY, "dataset": "world", "split": "train"}


def shaken(skip, seed=0, **changes):
    config = TranscoderConfig(
        **{"d": D, "n_features": FEATURES, "k": K, "k_aux": 5, "dead_after": 100, **changes}, skip=skip
    )
    made, generator = config.build(seed), torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for weight in made.parameters():
            weight.add_(0.1 * torch.randn(weight.shape, generator=generator))
    return made


def pairs(count=40, seed=0):
    return torch.randn(count, 2 * D, generator=torch.Generator().manual_seed(seed)) + 0.3


def plain(made, xy):
    """Loss, code, reconstruction and weights by the module's formulas, dense and in float64."""
    config = made.config
    w = {name: value.detach().double().requires_grad_() for name, value in made.named_parameters()}
    x, y = xy.double().split(D, 1)
    pre = (x - w["pre_bias"]) @ w["encoder"].T + w["latent_bias"]
    s = pre.relu() * dense_sae.largest(pre, config.k)
    found = s @ w["decoder"] + w["out_bias"]
    if config.skip:
        found = found + (x - w["pre_bias"]) @ w["skip"].T
    loss = (y - found).square().sum() / (y - y.mean(0)).square().sum()
    dead = made.inactive_for >= config.dead_after
    if dead.any():
        left, of_dead = (y - found).detach(), pre[:, dead]
        of_dead = (of_dead * dense_sae.largest(of_dead.detach(), min(config.k_aux, of_dead.shape[1]))).relu()
        error = (left - of_dead @ w["decoder"][dead]).square().sum()
        loss = loss + config.aux_weight * error / (left - left.mean(0)).square().sum()
    return loss, s.detach(), found.detach(), w


@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize("dead", [0, 9])
def test_loss_and_all_gradients_are_those_of_the_formulas(skip, dead):
    made, xy = shaken(skip), pairs()
    made.inactive_for[:dead] = 1000
    expected, s, _, weights = plain(made, xy)
    losses = made.losses(xy)
    assert losses.loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert losses.l0.item() == pytest.approx((s != 0).sum(1).double().mean().item())
    losses.loss.backward()
    expected.backward()
    assert len(weights) == 5 + 1 * skip
    for name, weight in made.named_parameters():
        assert relative(weight.grad, weights[name].grad) < 2e-5, name


@pytest.mark.parametrize("skip", [False, True])
def test_inputs_alone_and_pairs_have_the_same_codes_and_reconstruct_the_output(skip):
    made, xy = shaken(skip), pairs().view(4, 10, 2 * D)
    _, s, found, _ = plain(made, xy.flatten(0, 1))
    codes = made.encode(xy)
    assert relative(codes.dense(FEATURES).flatten(0, 1), s) < 1e-5
    for each in (codes, made.encode(xy[..., :D])):
        assert relative(made.decode(each).flatten(0, 1), found) < 1e-5
    with pytest.raises(ValueError, match=r"^x: vectors of 13 numbers; this autoencoder is for 12"):
        made.encode(torch.zeros(3, 13))


@pytest.mark.parametrize("skip", [False, True])
def test_saved_and_loaded_it_is_the_same_and_no_autoencoder(tmp_path, skip):
    made = shaken(skip)
    made.save_pretrained(tmp_path)
    again = load_trained(tmp_path)
    assert type(again) is Transcoder and again.config == made.config
    assert torch.equal(again(pairs()), made(pairs()))
    with pytest.raises(ValueError, match="not of an autoencoder of this lab"):
        SAE.from_pretrained(tmp_path)
    SAEConfig(D, FEATURES, K).build().save_pretrained(tmp_path / "sae")
    assert type(load_trained(tmp_path / "sae")) is SAE


def planted(count, seed, skip):
    """Outputs that are sums of features of the input, and a linear function of it."""
    generator = torch.Generator().manual_seed(7)
    reads, writes = (torch.nn.functional.normalize(torch.randn(8, D, generator=generator)) for _ in range(2))
    linear = torch.randn(D, D, generator=generator)
    x = torch.randn(count, D, generator=torch.Generator().manual_seed(seed))
    y = ((x @ reads.T) - 0.5).relu() @ writes
    return torch.cat([x, y + skip * x @ linear.T], 1)


def test_trained_it_computes_the_output_and_with_a_skip_term_its_linear_part_too():
    specs = {
        name: train.SAESpec("layer", TranscoderConfig(D, 24, 8, skip=skip, dead_after=4096), 1)
        for name, skip in (("plain", False), ("skip", True))
    }
    held_out, found = planted(2000, 99, True), {}
    config = TrainConfig(steps=120, learning_rate=2e-2, schedule="linear", clip_norm=0.0, device="cpu", log_every=120)

    def batches(start=0, rank=0, world=1):
        return ({"layer": planted(256, number, True)} for number in range(start, 10_000))

    trained = train.train_saes(specs, batches, config).saes
    found = evaluate_dictionaries(trained, [held_out], target=trained["skip"].target)
    assert found["skip"].explained_variance > 0.97 > found["plain"].explained_variance + 0.05
    plain_error = (trained["plain"](held_out) - held_out[:, D:]).square().sum()
    variance = (held_out[:, D:] - held_out[:, D:].mean(0)).square().sum()
    assert found["plain"].explained_variance == pytest.approx(1 - float(plain_error / variance), abs=1e-4)


def test_longer_pairs_give_the_same_after_rescaling():
    made, xy = shaken(True), pairs()
    before = made(xy)
    made.rescale(3.0)
    torch.testing.assert_close(made(3 * xy), 3 * before, rtol=1e-4, atol=1e-4)


def test_a_baseline_of_the_output_sees_the_output():
    sae = SAEConfig(D, FEATURES, K).build()
    torch.testing.assert_close(OfOutput(sae).decode(OfOutput(sae).encode(pairs())), sae(pairs()[:, D:]))


def test_wrong_settings_are_refused_by_name():
    with pytest.raises(ValueError, match=r"^skip: expected true or false, got 1"):
        TranscoderConfig(D, FEATURES, K, skip=1)
    with pytest.raises(ValueError, match=r"^input_norm: a transcoder has none"):
        TranscoderConfig(D, FEATURES, K, input_norm="layer_norm")


@pytest.fixture(scope="module")
def finished(tmp_path_factory, small_pipeline):
    """The folder of a run of notebook 31 that trained transcoders on one block."""
    folder, pipeline = tmp_path_factory.mktemp("transcoders"), small_pipeline("sd2")
    stored = collect_small(pipeline, folder / "activations", (BLOCK,), 2, side=PAIRS, settings=SOURCE)
    others = sweep.held_out_prompts(stored.settings, "world", "train", 1)
    held_out = sweep.collect_held_out(
        stored, pipeline, IDENTITY, others, folder / "held_out", blocks=[BLOCK], batch_size=1
    )
    specs = sweep.build_grid(stored.layout, [BLOCK], [3], [32], [0], side=PAIRS, skip=True)
    config = TrainConfig(steps=20, learning_rate=1e-2, clip_norm=0.0, device="cpu")
    trained = train.train_saes(specs, train.store_batches(stored, [BLOCK], 64, 0), config)
    sweep.save_sweep(trained.saes, specs, stored, folder / "saes")
    (name,) = specs
    row = {"block": BLOCK, "k": 3, "n_features": 32, "seed": 0, "name": name}
    write_json(folder / "results.json", {"notebook": "31_train_sae", "tables": {"saes": [row]}})
    return folder, sweep.evaluate_saes(trained.saes, specs, held_out)


def test_collected_trained_saved_and_evaluated_like_autoencoders(finished, small_pipeline):
    folder, evaluated = finished
    pipeline = small_pipeline("sd2")
    found = sweep.load_sweep(str(folder), IDENTITY, pipeline)
    assert found.side == PAIRS and found.widths == {BLOCK: 32}
    dictionaries = found.dictionaries([BLOCK], (3, 32), others=False, seed=0)
    table = sweep.evaluate_methods(dictionaries, found.held_out).set_index("method")
    assert table.loc["sae", "explained_variance"] == pytest.approx(evaluated["explained_variance"][0], abs=1e-6)
    x = torch.cat(list(sweep.iterate_vectors(found.held_out, BLOCK)))
    y = x[:, 16:].double()
    made, mean = dictionaries[BLOCK, "sae", 3, 32], dictionaries[BLOCK, "mean", 3, 32].decode
    error = (made(x).double() - y).square().sum() / (y - y.mean(0)).square().sum()
    assert table.loc["sae", "fvu"] == pytest.approx(error.item(), rel=1e-4)
    assert mean(dictionaries[BLOCK, "mean", 3, 32].encode(x[:2])).shape == (2, 16)


def test_in_the_model_it_gives_the_block_its_output(finished, small_pipeline):
    pipeline, sampling = small_pipeline("sd2"), Sampling(1, 2.0)
    found = sweep.load_sweep(str(finished[0]), IDENTITY, pipeline)
    transcoder = found.dictionaries([BLOCK], (3, 32), others=False, seed=0)[BLOCK, "sae", 3, 32]
    path = find_blocks(pipeline, BLOCK)[BLOCK]
    own = {"prompts": ["a star"], "block": BLOCK, "sampling": sampling, "side": PAIRS}
    plain = activations.generate(pipeline, ["a star"], [0], sampling)
    same = interventions.generate_with_replacement(pipeline, replace=lambda pair: pair[:, 16:], **own)
    assert torch.equal(same, plain)
    seen = {}
    with capture(pipeline.unet, path, side="input") as inputs:
        interventions.generate_with_replacement(
            pipeline, replace=lambda pair: seen.setdefault("new", transcoder(pair)), **own
        )
    (before,) = inputs[path]
    expected = transcoder(before.movedim(1, -1).flatten(0, -2))
    torch.testing.assert_close(seen["new"], expected)
    nowhere = interventions.generate_with_replacement(pipeline, replace=lambda pair: 0 * pair[:, :16], steps=[], **own)
    assert torch.equal(nowhere, plain)


def test_what_is_for_updates_refuses_transcoders(small_pipeline):
    with pytest.raises(ValueError, match=r"^skip: only transcoders have a linear term; .* side 'update'"):
        sweep.build_grid({BLOCK: BlockShape((8, 8), 16)}, [BLOCK], [3], [32], [0], skip=True)
    own = Directions(TranscoderConfig(16, 32, 3).build(), torch.ones(32), torch.ones(32), 3)
    with pytest.raises(ValueError, match=r"^saes: that of up.1.1 is a transcoder"):
        Steerer(small_pipeline("sd2"), {BLOCK: own})
