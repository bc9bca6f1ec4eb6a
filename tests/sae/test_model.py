import copy
import json

import dense_sae
import pytest
import torch
from safetensors.torch import load_file, save_file
from small_sae import FEATURES, D, K, relative, shaken, vectors

from vaelab.core import hub
from vaelab.sae import model as module
from vaelab.sae import topk
from vaelab.sae.model import SAE, VARIANTS, Codes, SAEConfig


def config(**changes):
    return SAEConfig(**{"d": D, "n_features": FEATURES, "k": K, "k_aux": 5, "dead_after": 100, **changes})


@pytest.mark.parametrize("dead", [0, 12, 150], ids=["none dead", "a block of dead", "many dead"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_losses_and_all_gradients_are_those_of_the_dense_formula(variant, dead, monkeypatch):
    monkeypatch.setattr(topk, "TILE", 64 * 7)  # several tiles, of which the last is smaller
    monkeypatch.setattr(topk, "WIDEST", 64)
    sae, x = shaken(variant=variant), vectors()
    sae.inactive_for[torch.randperm(FEATURES, generator=torch.Generator().manual_seed(1))[:dead]] = 100
    expected, auxiliary, s, weights = dense_sae.losses(sae, x)
    expected.backward()
    found = sae.losses(x)
    found.loss.backward()
    if variant == "jumprelu":
        assert sae.log_threshold.grad.abs().sum() > 0
    assert found.loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert found.auxiliary.item() == pytest.approx(auxiliary.item(), rel=1e-4)
    assert found.l0.item() == pytest.approx((s != 0).sum(1).double().mean().item())
    assert found.dead_fraction.item() == pytest.approx(dead / FEATURES)
    for name, weight in sae.named_parameters():
        assert weight.grad.norm() > 0
        assert relative(weight.grad, weights[name].grad) < 2e-5, name


@pytest.mark.parametrize("variant", VARIANTS)
def test_unexplained_is_what_the_whole_dictionary_leaves(variant):
    sae, x = shaken(variant=variant), vectors()
    _, _, s, weights = dense_sae.losses(sae, x)
    left = x.double() - s @ weights["decoder"] - weights["pre_bias"]
    expected = left.square().sum() / (x.double() - x.double().mean(0)).square().sum()
    assert sae.losses(x).unexplained.item() == pytest.approx(expected.item(), rel=1e-5)


def test_the_auxiliary_loss_alone_reaches_encoder_and_decoder_of_dead_features_only():
    sae, x = shaken(), vectors()
    dead = torch.arange(0, FEATURES, 20)
    sae.losses(x).loss.backward()
    without = {name: weight.grad.clone() for name, weight in sae.named_parameters()}
    sae.zero_grad()
    sae.inactive_for[dead] = 100
    sae.losses(x).loss.backward()
    for name in ("encoder", "decoder", "latent_bias"):
        moved = (getattr(sae, name).grad - without[name]).reshape(FEATURES, -1).abs().sum(1) > 0
        assert set(moved.nonzero().flatten().tolist()) <= set(dead.tolist())
        assert moved.sum() > len(dead) / 2


@pytest.mark.parametrize("dead", [0, 12])
def test_with_the_bfloat16_screen_gradients_are_those_of_float32(dead):
    sae, x = shaken(), vectors(200)
    sae.inactive_for[:dead] = 100
    plain = SAE(sae.config)
    plain.load_state_dict(sae.state_dict())
    exact, screened = plain.losses(x), sae.losses(x, screen=True)
    exact.loss.backward(), screened.loss.backward()
    assert screened.loss.item() == pytest.approx(exact.loss.item(), rel=1e-6 if not dead else 1e-3)
    for name, weight in sae.named_parameters():
        assert relative(weight.grad, dict(plain.named_parameters())[name].grad.double()) < (5e-3 if dead else 1e-6)


@pytest.mark.parametrize("variant", VARIANTS)
def test_encode_then_decode_is_the_formula(variant):
    sae, x = shaken(variant=variant), vectors().reshape(4, 10, D)
    codes = sae.encode(x)
    dense = codes.dense(FEATURES)
    pre = (x - sae.pre_bias) @ sae.encoder.T + sae.latent_bias
    if variant == "batchtopk":
        expected = pre * (pre > sae.thresholds())
    else:
        expected = dense_sae.losses(sae, x.reshape(-1, D))[2].float().view(4, 10, -1)
    torch.testing.assert_close(dense, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(codes.l0(), (expected != 0).sum(-1))
    torch.testing.assert_close(sae.decode(codes), expected @ sae.decoder + sae.pre_bias, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(sae(x), sae.decode(codes))
    assert not codes.values.requires_grad


def test_topk_keeps_k_and_drops_what_is_negative_but_the_k_sae_keeps_it():
    few, x = {"n_features": K + 1}, vectors()
    assert (shaken(**few).encode(x).l0() < K).any()
    codes = shaken(variant="k_sae", **few).encode(x)
    assert (codes.l0() == K).all() and (codes.values < 0).any()


def test_a_feature_is_dead_when_it_was_silent_for_so_many_vectors():
    sae, x = shaken(dead_after=100), vectors()
    active = set(sae.encode(x).indices.flatten().tolist())
    fractions = [sae.losses(x).dead_fraction.item() for _ in range(4)]
    assert fractions == pytest.approx([0, 0, 0, 1 - len(active) / FEATURES])
    assert {int(f) for f in (sae.inactive_for == 0).nonzero()} == active


def test_rescaled_it_does_the_same_to_longer_vectors():
    for variant in VARIANTS:
        sae, x = shaken(variant=variant), vectors()
        before, codes = sae(x), sae.encode(x).dense(FEATURES)
        sae.rescale(7.0)
        torch.testing.assert_close(sae(7 * x), 7 * before, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(sae.encode(7 * x).dense(FEATURES), 7 * codes, rtol=1e-4, atol=1e-4)


def test_untrained_it_is_tied_and_fixed_by_its_seed():
    first, again, other = SAE(config(), 3), SAE(config(), 3), SAE(config(), 4)
    assert torch.equal(first.encoder, first.decoder) and torch.equal(first.encoder, again.encoder)
    assert not torch.equal(first.encoder, other.encoder)
    torch.testing.assert_close(first.features().norm(dim=1), torch.ones(FEATURES))
    shaken_one = shaken()
    shaken_one.normalise()
    torch.testing.assert_close(shaken_one.features(), shaken_one.decoder.detach())


@pytest.mark.parametrize("variant", VARIANTS)
def test_saved_and_loaded_it_is_the_same(tmp_path, variant):
    sae, x = shaken(variant=variant, nested=(0.5, 1.0)), vectors()
    sae.save_pretrained(tmp_path / "one")
    again = SAE.from_pretrained(tmp_path / "one")
    assert sorted(path.name for path in (tmp_path / "one").iterdir()) == ["config.json", "sae.safetensors"]
    assert again.config == sae.config and not again.training
    assert torch.equal(again(x), sae(x))


def test_from_the_hub_as_a_folder_of_a_repository(tmp_path, monkeypatch):
    import huggingface_hub

    shaken().save_pretrained(tmp_path / "up.0.1")
    downloads = []
    monkeypatch.setattr(hub, "_describe", lambda *given: None)
    monkeypatch.setattr(
        huggingface_hub, "snapshot_download", lambda name, **more: downloads.append((name, more)) or str(tmp_path)
    )
    SAE.from_pretrained("somebody/saes", subfolder="up.0.1", revision="v2")
    assert downloads == [
        ("somebody/saes", {"revision": "v2", "allow_patterns": ["up.0.1/config.json", "up.0.1/sae.safetensors"]})
    ]


MISSING = object()


def rewritten(folder, **changes):
    shaken().save_pretrained(folder)
    stored = {**json.loads((folder / "config.json").read_text()), **changes}
    stored = {name: value for name, value in stored.items() if value is not MISSING}
    (folder / "config.json").write_text(json.dumps(stored))
    return folder


def test_what_is_not_of_this_lab_is_refused_by_name(tmp_path):
    with pytest.raises(ValueError, match=r"newer.*newer version"):
        SAE.from_pretrained(rewritten(tmp_path / "newer", version=99))
    with pytest.raises(ValueError, match=r"older.*older version"):
        SAE.from_pretrained(rewritten(tmp_path / "older", version=1))
    with pytest.raises(ValueError, match=r"foreign.*formats\.load_sae"):
        SAE.from_pretrained(rewritten(tmp_path / "foreign", format="other"))
    with pytest.raises(ValueError, match="'wings'"):
        SAE.from_pretrained(rewritten(tmp_path / "more", wings=2))
    with pytest.raises(ValueError, match=r"sae\.safetensors: does not hold"):
        SAE.from_pretrained(rewritten(tmp_path / "other", variant="jumprelu"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"empty.*no config\.json"):
        SAE.from_pretrained(tmp_path / "empty")
    folder = rewritten(tmp_path / "half")
    tensors = load_file(folder / "sae.safetensors")
    save_file({name: value for name, value in tensors.items() if name != "decoder"}, folder / "sae.safetensors")
    with pytest.raises(ValueError, match=r"half.*sae\.safetensors"):
        SAE.from_pretrained(folder)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"k": 5}, r"config\.json: edited, or of other weights than sae\.safetensors"),
        ({"k": 2.5}, r"config\.json: k: expected a whole number, got 2\.5"),
        ({"k": True}, r"config\.json: k: expected a whole number, got True"),
        ({"k": "3"}, r"config\.json: k: expected a whole number, got '3'"),
        ({"k": MISSING}, r"config\.json: has no 'k'"),
        ({"variant": "k_sae"}, r"config\.json: edited, or of other weights"),
        ({"variant": "matryoshka"}, r"config\.json: edited, or of other weights"),
        ({"nested": ["a", 1.0]}, r"config\.json: "),
        ({"aux_weight": 0.5}, r"config\.json: edited"),
        ({"weights_sha256": MISSING}, r"sae\.safetensors: changed, or of another config\.json"),
    ],
)
def test_an_edited_config_is_refused(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        SAE.from_pretrained(rewritten(tmp_path / "one", **changes))


def test_weights_of_another_autoencoder_of_the_same_size_are_refused(tmp_path):
    for seed in (0, 1):
        shaken(seed).save_pretrained(tmp_path / str(seed))
    (tmp_path / "0" / "sae.safetensors").write_bytes((tmp_path / "1" / "sae.safetensors").read_bytes())
    with pytest.raises(ValueError, match=r"0.sae\.safetensors: changed, or of another config\.json"):
        SAE.from_pretrained(tmp_path / "0")


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["encoder", "decoder", "latent_bias", "pre_bias", "log_threshold"])
def test_weights_that_are_not_finite_are_refused_by_name(tmp_path, name, bad):
    sae = shaken(variant="jumprelu")
    with torch.no_grad():
        getattr(sae, name).view(-1)[3] = bad
    sae.save_pretrained(tmp_path / "one")
    with pytest.raises(ValueError, match=rf"sae\.safetensors: {name} holds NaN or infinity"):
        SAE.from_pretrained(tmp_path / "one")


@pytest.mark.parametrize("file", ["config.json", "sae.safetensors"])
@pytest.mark.parametrize("damage", ["cut", "empty", "byte", "missing", "bytes that are no text"])
def test_a_damaged_file_is_one_sentence_with_its_name(tmp_path, file, damage):
    shaken().save_pretrained(tmp_path / "one")
    path = tmp_path / "one" / file
    data = path.read_bytes()
    if damage == "missing":
        path.unlink()
    else:
        changed = {"cut": data[: len(data) // 2], "empty": b"", "byte": data[:-9] + b"\x07" + data[-8:],
                   "bytes that are no text": b"\xff" * 80}  # fmt: skip
        path.write_bytes(changed[damage])
    with pytest.raises(ValueError, match=file.replace(".", r"\.")) as caught:
        SAE.from_pretrained(tmp_path / "one")
    assert "\n" not in str(caught.value)


def test_jumprelu_thresholds_stay_positive_whatever_the_optimizer_does():
    sae, x = shaken(variant="jumprelu", sparsity_weight=50.0, k=FEATURES), vectors()
    sae.set_thresholds(0.02)
    optimizer = torch.optim.Adam([sae.log_threshold], lr=0.5)
    for _ in range(12):
        sae.losses(x).loss.backward()
        optimizer.step(), optimizer.zero_grad()
    assert (sae.thresholds() > 0).all() and sae.thresholds().min() < 0.02
    assert (sae.encode(x).values >= 0).all()
    with pytest.raises(ValueError, match=r"threshold: must not be negative, got -0\.5"):
        sae.set_thresholds(torch.full((FEATURES,), -0.5))
    sae.set_thresholds(0.0)
    assert (sae.thresholds() > 0).all() and sae.log_threshold.isfinite().all()


@pytest.mark.parametrize("weight", [0.0, 1 / 32])
def test_the_auxiliary_loss_is_not_computed_at_weight_0(monkeypatch, weight):
    sae, x, called = shaken(aux_weight=weight), vectors(), []
    own = SAE._auxiliary_loss
    monkeypatch.setattr(SAE, "_auxiliary_loss", lambda self, *given: called.append(1) or own(self, *given))
    sae.inactive_for[:12] = 100
    losses = sae.losses(x)
    assert losses.dead_fraction.item() == pytest.approx(12 / FEATURES)
    assert len(called) == bool(weight) and (losses.auxiliary > 0) == bool(weight)


def test_the_dead_are_looked_for_only_when_there_can_be_any(monkeypatch):
    sae, x, read = shaken(dead_after=1000), vectors(), []
    own = torch.Tensor.max
    monkeypatch.setattr(torch.Tensor, "max", lambda self, *given: read.append(1) or own(self, *given))
    expected = torch.zeros(FEATURES, dtype=torch.int64)
    for step in range(40):
        before = (expected >= 1000).float().mean().item()
        active = sae.encode(x).indices.flatten()
        read_before = len(read)
        losses = sae.losses(x)
        assert losses.dead_fraction.item() == pytest.approx(before), step
        assert len(read) - read_before <= (step in (0, 24) or step > 24)
        expected += 40
        expected[active] = 0
    assert before > 0
    sae.load_state_dict({**sae.state_dict(), "inactive_for": torch.full((FEATURES,), 1000)})
    assert sae.losses(x).dead_fraction == 1
    other = copy.deepcopy(sae)
    other.inactive_for.zero_()
    assert other.losses(x).dead_fraction == 0


def test_the_dead_are_read_once_a_step_before_the_backward_pass_and_are_those_of_this_step(monkeypatch):
    """So a GPU is never idle: what the next step waits for is done before the backward pass begins."""

    class ReadsInEachStep(SAE):
        def _dead_features(self):
            return (self.inactive_for >= self.config.dead_after).nonzero().flatten()

    class Recorded(module._HostCopy):
        def __init__(self, *tensors):
            events.append("copy")
            super().__init__(*tensors)

        def wait(self):
            events.append("wait")
            return super().wait()

    monkeypatch.setattr(module, "_HostCopy", Recorded)
    expected, found, dead = ReadsInEachStep(config(dead_after=200)), SAE(config(dead_after=200)), []
    optimizers = [torch.optim.AdamW(sae.parameters(), lr=0.05) for sae in (expected, found)]
    for step in range(40):
        x, losses = torch.randn(40, D, generator=torch.Generator().manual_seed(step)), []
        for sae, optimizer in zip((expected, found), optimizers, strict=True):
            events = []
            losses.append(sae.losses(x))
            losses[-1].loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        assert all(torch.equal(*pair) for pair in zip(*losses, strict=True)), step
        assert events in ([], ["copy"], ["wait", "copy"], ["wait"]) or not step
        dead.append(losses[0].dead_fraction.item())
    assert len(set(dead)) > 5 and min(dead[10:]) < max(dead)  # features die and come back
    assert all(torch.equal(*pair) for pair in zip(expected.parameters(), found.parameters(), strict=True))


@pytest.mark.parametrize("norm", ["layer_norm", "constant_norm"])
@pytest.mark.parametrize("variant", ["topk", "jumprelu"])
def test_a_norm_of_the_input_is_applied_and_undone(norm, variant):
    sae, plain, x = shaken(variant=variant, input_norm=norm), shaken(variant=variant), 3 * vectors().view(4, 10, D) + 1
    mean = x.mean(-1, keepdim=True) if norm == "layer_norm" else torch.zeros(4, 10, 1)
    scale = x.std(-1, keepdim=True) if norm == "layer_norm" else x.norm(dim=-1, keepdim=True) / D**0.5
    inner = (x - mean) / (scale + (1e-5 if norm == "layer_norm" else 0))
    torch.testing.assert_close(sae.encode(x).dense(FEATURES), plain.encode(inner).dense(FEATURES))
    torch.testing.assert_close(sae(x), plain(inner) * scale + mean)
    assert sae(x[:0]).shape == (0, 10, D)
    with pytest.raises(ValueError, match="codes: with input_norm"):
        sae.decode(Codes(*sae.encode(x)[:2]))
    with pytest.raises(ValueError, match="input_norm: "):
        sae.rescale(2.0)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("variant", ["topk", "jumprelu"])
def test_a_vector_that_is_not_finite_is_named(variant, bad):
    sae, x = shaken(variant=variant), vectors()
    x[17, 5] = bad
    for use in (sae.encode, sae.losses, sae):
        with pytest.raises(ValueError, match="row 17 of 40 is not finite"):
            use(x)


def test_another_width_is_refused():
    for use in (shaken().encode, shaken().losses):
        with pytest.raises(ValueError, match="vectors of 23 numbers; this autoencoder is for 24"):
            use(vectors()[:, :23])


def test_no_vectors_have_no_code():
    for variant in VARIANTS:
        sae = shaken(variant=variant)
        assert sae.encode(vectors()[:0]).values.shape[0] == 0
        assert sae(vectors()[:0]).shape == (0, D)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"k": FEATURES + 1}, "k: 257 active features of 256"),
        ({"k": 0}, "k: must be at least 1"),
        ({"variant": "topp"}, "variant: unknown name 'topp'.*topk"),
        ({"d": 0}, "d: "),
        ({"k": 2.5}, r"k: expected a whole number, got 2\.5"),
        ({"aux_weight": "0.1"}, "aux_weight: expected a number, got '0.1'"),
        ({"input_norm": "batch"}, "input_norm: unknown name 'batch'"),
        ({"dead_after": 0}, "dead_after: "),
        ({"aux_weight": -1.0}, "aux_weight: "),
        ({"bandwidth": 0.0}, "bandwidth: "),
        ({"nested": (0.5, 0.25, 1.0)}, "nested: "),
        ({"nested": (0.5,)}, "nested: "),
        ({"nested": (0.0, 1.0)}, "nested: "),
    ],
)
def test_a_bad_config_is_refused_by_name(changes, named):
    with pytest.raises(ValueError, match=named):
        config(**changes)


@pytest.mark.parametrize("variant", ["batchtopk", "jumprelu", "relu_l1"])
def test_where_no_feature_is_active_the_bias_before_the_encoder_is_left(variant):
    sae, x = shaken(variant=variant), vectors()
    with torch.no_grad():
        sae.latent_bias.fill_(-100)
    assert sae.encode(x).values.shape == (40, 0)
    assert torch.equal(sae(x), sae.pre_bias.expand(40, -1))
    losses = sae.losses(x)
    losses.loss.backward()
    assert losses.l0 == 0 and losses.loss.isfinite()
    assert not sae.encoder.grad.any() and sae.pre_bias.grad.any()


@pytest.mark.parametrize("variant", VARIANTS)
def test_how_vectors_lie_in_memory_and_in_what_precision_does_not_matter(variant):
    sae, x = shaken(variant=variant), vectors(60)
    maps = x.view(3, 4, 5, D).permute(0, 3, 1, 2).contiguous()  # channels first, as models make them
    torch.testing.assert_close(sae(maps.permute(0, 2, 3, 1)), sae(x).view(3, 4, 5, D))
    first, second = sae.losses(x).loss, sae.losses(x.T.contiguous().T).loss
    first.backward()
    expected = sae.encoder.grad.clone()
    sae.zero_grad()
    second.backward()
    torch.testing.assert_close(sae.encoder.grad, expected)
    torch.testing.assert_close(sae(x.half()), sae(x.half().float()))


def test_codes_of_one_feature_twice_add_up():
    codes = Codes(torch.tensor([[1.0, 2.0, 0.0]]), torch.tensor([[4, 4, 0]]))
    assert codes.dense(6).tolist() == [[0, 0, 0, 0, 3, 0]]
    assert codes.l0().tolist() == [2]
