"""Folders in the layouts of other libraries, written here and by the libraries themselves, and read back."""

import io
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from vaelab.core import hub
from vaelab.sae import formats
from vaelab.sae.model import SAE, SAEConfig

D, FEATURES, K = 12, 40, 4


def random(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def vectors():
    return random(30, D, seed=9) + 0.5


def unit(weight):
    return weight / weight.norm(dim=1, keepdim=True)


def unbox(folder, **changes):
    """As sdxl-unbox's SparseAutoencoder.save_to_disk and its feature statistics; what it computes."""
    folder.mkdir()
    state = {
        "pre_bias": random(D, seed=0), "latent_bias": random(FEATURES, seed=1),
        "stats_last_nonzero": torch.zeros(FEATURES, dtype=torch.long),
        "encoder.weight": random(FEATURES, D, seed=2), "decoder.weight": unit(random(FEATURES, D, seed=3)).T,
    }  # fmt: skip
    config = {"n_dirs_local": FEATURES, "d_model": D, "k": K, "auxk": 7, "dead_steps_threshold": 1000, "auxk_coef": 0.5}
    (folder / "config.json").write_text(json.dumps({**config, **changes}))
    torch.save({"state_dict": state}, folder / "state_dict.pth")
    torch.save(torch.arange(40.0), folder / "mean.pt")
    torch.save(torch.ones(40), folder / "std.pt")

    pre = (vectors() - state["pre_bias"]) @ state["encoder.weight"].T + state["latent_bias"]
    best = pre.topk(K)
    acts = torch.zeros_like(pre).scatter_(1, best.indices, best.values.relu())
    return acts, acts @ state["decoder.weight"].T + state["pre_bias"]


def sparsify(folder, dtype=torch.float32, **changes):
    """As sparsify's SparseCoder.save_to_disk, and with ``input_unit_norm`` as SAeUron's Sae; what it computes."""
    folder.mkdir()
    state = {
        "encoder.weight": random(FEATURES, D, seed=2), "encoder.bias": random(FEATURES, seed=1),
        "W_dec": unit(random(FEATURES, D, seed=3)), "b_dec": random(D, seed=0),
    }  # fmt: skip
    state = {name: value.to(dtype) for name, value in state.items()}
    config = {
        "activation": "topk", "expansion_factor": 32, "normalize_decoder": True, "num_latents": FEATURES, "k": K,
        "multi_topk": False, "skip_connection": False, "transcode": False, "d_in": D,
    }  # fmt: skip
    (folder / "cfg.json").write_text(json.dumps({**config, **changes}))
    save_file(state, folder / "sae.safetensors")
    state = {name: value.float() for name, value in state.items()}
    x, mean, std = vectors(), 0.0, 1.0
    if changes.get("input_unit_norm"):
        mean, std = x.mean(1, keepdim=True), x.std(1, keepdim=True)
        x = (x - mean) / (std + 1e-5)
    pre = torch.relu((x - state["b_dec"]) @ state["encoder.weight"].T + state["encoder.bias"])
    best = pre.topk(K)
    acts = torch.zeros_like(pre).scatter_(1, best.indices, best.values)
    return acts, (acts @ state["W_dec"] + state["b_dec"]) * std + mean


def saeuron(folder, **changes):
    return sparsify(folder, input_unit_norm=True, batch_topk=True, sample_topk=False, **changes)


def sae_lens(folder, architecture="topk", **changes):
    """As SAELens's SAE.save_model; what it computes."""
    folder.mkdir()
    state = {
        "W_enc": random(FEATURES, D, seed=2).T.contiguous(), "b_enc": random(FEATURES, seed=1),
        "W_dec": random(FEATURES, D, seed=3) * 1.7, "b_dec": random(D, seed=0),
    }  # fmt: skip
    config = {
        "d_in": D, "d_sae": FEATURES, "dtype": "float32", "device": "cpu", "apply_b_dec_to_input": True,
        "normalize_activations": "none", "reshape_activations": "none", "architecture": architecture,
        "metadata": {"sae_lens_version": "6.54.12", "hook_name": "blocks.0.hook_resid_pre"},
    }  # fmt: skip
    if architecture == "topk":
        config |= {"k": K, "rescale_acts_by_decoder_norm": False}
    if architecture == "jumprelu":
        state["threshold"] = random(FEATURES, seed=4).abs()
    config |= changes
    (folder / "cfg.json").write_text(json.dumps(config))
    save_file(state, folder / "sae_weights.safetensors")

    lengths, x = state["W_dec"].norm(dim=1), vectors()
    pre = (x - state["b_dec"] * config["apply_b_dec_to_input"]) @ state["W_enc"] + state["b_enc"]
    if architecture == "jumprelu":
        acts = pre * (pre > state["threshold"])
    elif architecture == "standard":
        acts = pre.relu()
    else:
        pre = pre * lengths if config["rescale_acts_by_decoder_norm"] else pre
        best = pre.topk(K)
        acts = torch.zeros_like(pre).scatter_(1, best.indices, best.values.relu())
        if config["rescale_acts_by_decoder_norm"]:
            return acts, acts / lengths @ state["W_dec"] + state["b_dec"]
        return acts, acts @ state["W_dec"] + state["b_dec"]
    return acts * lengths, acts @ state["W_dec"] + state["b_dec"]


def dictionary_learning(folder, kind="AutoEncoder", trainer=None, tensors=None):
    """As dictionary-learning's trainSAE, ``ae.pt`` alone; what it computes."""
    folder.mkdir()
    weight, bias = random(FEATURES, D, seed=2), random(FEATURES, seed=1)
    decoder, b_dec = random(FEATURES, D, seed=3), random(D, seed=0)
    linear = {"encoder.weight": weight, "encoder.bias": bias, "decoder.weight": decoder.T}
    state = {"bias": b_dec, **linear}
    if kind == "AutoEncoderNew":
        state = {**linear, "decoder.bias": b_dec}
    if kind in ("AutoEncoderTopK", "BatchTopKSAE"):
        state = {**linear, "b_dec": b_dec, "k": torch.tensor(K, dtype=torch.int), "threshold": torch.tensor(0.8)}
    if kind == "JumpReluAutoEncoder":
        state = {
            "W_enc": weight.T,
            "b_enc": bias,
            "W_dec": decoder,
            "b_dec": b_dec,
            "threshold": random(FEATURES, seed=4),
        }
    torch.save({**state, **(tensors or {})}, folder / "ae.pt")
    if trainer:
        (folder / "config.json").write_text(
            json.dumps({"trainer": {"dict_class": kind, **trainer}, "buffer": {"x": 1}})
        )
    x = vectors() - (b_dec if kind not in ("AutoEncoderNew", "JumpReluAutoEncoder") else 0)
    pre = (x @ weight.T + bias).relu()
    acts = {"BatchTopKSAE": pre * (pre > 0.8), "JumpReluAutoEncoder": pre * (pre > random(FEATURES, seed=4))}.get(
        kind, pre
    )
    if kind == "AutoEncoderTopK":
        best = pre.topk(K)
        acts = torch.zeros_like(pre).scatter_(1, best.indices, best.values)
    lengths = 1 if kind in ("AutoEncoderTopK", "BatchTopKSAE") else decoder.norm(dim=1)
    return acts * lengths, acts @ decoder + b_dec


def saev(folder, activation="TopK", legacy=False, header=None, **changes):
    """As saev's ``dump``, schema 5 and before there was a schema; what it computes."""
    folder.mkdir()
    state = {"W_enc": random(D, FEATURES, seed=2), "b_enc": random(FEATURES, seed=1),
             "W_dec": random(FEATURES, D, seed=3), "b_dec": random(D, seed=0)}  # fmt: skip
    params = {"key": "?", "sparsity": {"cls": "NoSparsity", "params": {}}, "aux": {"cls": "NoAux", "params": {}}}
    if activation != "Relu":
        params["top_k"] = K
    if activation == "BatchTopK":
        state["activation.threshold"], params["momentum"] = torch.tensor(0.7), 0.1
    config = {"d_model": D, "d_sae": FEATURES, "activation": {"cls": activation, "params": params}, "reinit_blend": 0.8,
              "reinit_enc_dec_tranpose": True, "remove_parallel_grads": True, "normalize_w_dec": True}  # fmt: skip
    written = {"schema": 5, "cfg": {**config, **changes}, "commit": "abc", "lib": "0.1", **(header or {})}
    if legacy:
        factor = FEATURES // D  # a whole number of features a channel
        state = {name: value[..., : factor * D] if "enc" in name else value for name, value in state.items()}
        state["W_dec"] = state["W_dec"][: factor * D]
        written = {"d_vit": D, "exp_factor": factor, "l1_coeff": 1e-4, "ghost_grads": False, "seed": 1, **changes}
    data = io.BytesIO()
    torch.save(state, data)
    (folder / "sae.pt").write_bytes(json.dumps(written).encode() + b"\n" + data.getvalue())
    pre = (vectors() - (state["b_dec"] if legacy else 0)) @ state["W_enc"] + state["b_enc"]
    best = pre.topk(K)
    acts = {"TopK": torch.zeros_like(pre).scatter_(1, best.indices, best.values), "BatchTopK": pre * (pre > 0.7)}
    acts = acts.get(activation, pre.relu()) if not legacy else pre.relu()
    lengths = state["W_dec"].norm(dim=1) if legacy or activation == "Relu" else 1
    return acts * lengths, acts @ state["W_dec"] + state["b_dec"]


def gemma_scope(folder, **changes):
    """As Gemma Scope's params.npz; what it computes."""
    folder.mkdir()
    arrays = {
        "W_enc": random(D, FEATURES, seed=2), "b_enc": random(FEATURES, seed=1), "W_dec": random(FEATURES, D, seed=3),
        "b_dec": random(D, seed=0), "threshold": random(FEATURES, seed=4).abs(),
    }  # fmt: skip
    np.savez(folder / "params.npz", **{name: value.numpy() for name, value in arrays.items()}, **changes)
    pre = vectors() @ arrays["W_enc"] + arrays["b_enc"]
    acts = pre.relu() * (pre > arrays["threshold"])
    return acts * arrays["W_dec"].norm(dim=1), acts @ arrays["W_dec"] + arrays["b_dec"]


TRAINER = {"k": K, "activation_dim": D, "dict_size": FEATURES, "lr": 1e-4, "steps": 10, "seed": None}
WRITERS = {
    "sdxl-unbox": unbox,
    "sparsify": sparsify,
    "sparsify in bfloat16": lambda folder: sparsify(folder, torch.bfloat16),
    "sae-lens topk": sae_lens,
    "sae-lens topk, rescaled": lambda folder: sae_lens(folder, rescale_acts_by_decoder_norm=True),
    "sae-lens topk, bias at the end only": lambda folder: sae_lens(folder, apply_b_dec_to_input=False),
    "sae-lens jumprelu": lambda folder: sae_lens(folder, "jumprelu"),
    "sae-lens standard": lambda folder: sae_lens(folder, "standard", apply_b_dec_to_input=False),
    "sparsify of SAeUron": saeuron,
    "dictionary-learning AutoEncoder": dictionary_learning,
    "dictionary-learning AutoEncoderNew": lambda folder: dictionary_learning(folder, "AutoEncoderNew"),
    "dictionary-learning jumprelu": lambda folder: dictionary_learning(folder, "JumpReluAutoEncoder"),
    "dictionary-learning topk": lambda folder: dictionary_learning(folder, "AutoEncoderTopK", TRAINER),
    "dictionary-learning batchtopk": lambda folder: dictionary_learning(folder, "BatchTopKSAE", TRAINER),
    "saev TopK": saev,
    "saev BatchTopK": lambda folder: saev(folder, "BatchTopK"),
    "saev Relu": lambda folder: saev(folder, "Relu"),
    "saev before schemas": lambda folder: saev(folder, legacy=True),
    "gemma-scope": gemma_scope,
}


@pytest.mark.parametrize("writer", WRITERS)
def test_what_was_written_computes_the_same_and_survives_a_round_trip(tmp_path, writer):
    acts, reconstruction = WRITERS[writer](tmp_path / "theirs")
    loaded = formats.load_sae(tmp_path / "theirs")
    assert loaded.format == writer.split()[0]
    loaded.sae.save_pretrained(tmp_path / "ours")
    again = formats.load_sae(tmp_path / "ours")
    assert again.format == "vaelab.sae.model" and again.sae.config == loaded.sae.config
    for sae in (loaded.sae, again.sae):
        torch.testing.assert_close(sae.encode(vectors()).dense(acts.shape[1]), acts, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(sae(vectors()), reconstruction, rtol=1e-4, atol=1e-4)


def test_where_it_changes_nothing_features_come_with_unit_length(tmp_path):
    for number, more in enumerate(
        ({"architecture": "jumprelu"}, {"architecture": "standard"}, {"rescale_acts_by_decoder_norm": True})
    ):
        sae_lens(tmp_path / str(number), **more)
        decoder = formats.load_sae(tmp_path / str(number)).sae.decoder
        torch.testing.assert_close(decoder.norm(dim=1), torch.ones(FEATURES))
    sae_lens(tmp_path / "as it was")
    assert formats.load_sae(tmp_path / "as it was").sae.decoder.norm(dim=1).min() > 1.5


def test_unbox_brings_its_features_statistics_and_its_losses_settings(tmp_path):
    unbox(tmp_path / "theirs")
    loaded = formats.load_sae(tmp_path / "theirs")
    assert torch.equal(loaded.mean, torch.arange(40.0)) and torch.equal(loaded.std, torch.ones(40))
    assert loaded.sae.config == SAEConfig(D, FEATURES, K, aux_weight=0.5, k_aux=7)
    (tmp_path / "theirs" / "mean.pt").unlink()
    assert formats.load_sae(tmp_path / "theirs").mean is None


@pytest.mark.parametrize(
    ("write", "changes", "named"),
    [
        (sparsify, {"activation": "groupmax"}, r"cfg\.json: its activation is 'groupmax'; only 'topk'"),
        (sparsify, {"skip_connection": True}, r"cfg\.json: its skip_connection is True"),
        (sparsify, {"transcode": True}, "its transcode is True"),
        (sparsify, {"sample_topk": True}, "its sample_topk is True"),
        (sparsify, {"wings": 2}, r"cfg\.json: has the key 'wings' \(2\), which this lab does not understand"),
        (sparsify, {"k": 2.5}, r"cfg\.json: its k is 2\.5; expected int"),
        (sparsify, {"k": None}, r"cfg\.json: has no 'k'"),
        (sparsify, {"input_unit_norm": "yes"}, "its input_unit_norm is 'yes'; expected bool"),
        (sparsify, {"num_latents": 99}, r"encoder\.weight is \(40, 12\); its configuration says \(99, 12\)"),
        (
            sparsify,
            {"num_latents": 0, "expansion_factor": 4},
            r"encoder\.weight is \(40, 12\); its configuration says \(48, 12\)",
        ),
        (sae_lens, {"architecture": "gated"}, r"its architecture is 'gated'; only 'standard' or 'topk' or 'jumprelu'"),
        (
            sae_lens,
            {"normalize_activations": "covariance_whitening"},
            "normalize_activations is 'covariance_whitening'",
        ),
        (sae_lens, {"normalize_activations": "expected_average_only_in"}, "needs input_scale: its factor is not in"),
        (sae_lens, {"normalize_activations": True}, "needs input_scale"),
        (sae_lens, {"finetuning_scaling_factor": True}, "its finetuning_scaling_factor is True"),
        (sae_lens, {"topk_threshold": 1}, r"cfg\.json: has the key 'topk_threshold'"),
        (sae_lens, {"d_sae": 41}, r"W_enc is \(12, 40\); its configuration says \(12, 41\)"),
        (unbox, {"k": FEATURES + 1}, "k: 41 active features of 40"),
        (unbox, {"normalize": True}, r"config\.json: has the key 'normalize'"),
        (
            dictionary_learning,
            {"kind": "AutoEncoderTopK"},
            "AutoEncoderTopK or BatchTopKSAE; a config.json with trainer",
        ),
        (dictionary_learning, {"trainer": {"norm": 1}}, r"config\.json: has the key 'norm'"),
        (dictionary_learning, {"trainer": {"dict_class": "GatedAutoEncoder"}}, "config.json says GatedAutoEncoder"),
        (dictionary_learning, {"trainer": {"dict_size": 41}}, "its dict_size is 41, that of ae.pt is 40"),
        (dictionary_learning, {"tensors": {"r_mag": torch.ones(FEATURES)}}, "which is none of the classes"),
        (dictionary_learning, {"tensors": {"threshold": torch.ones(())}}, r"ae\.pt: holds the tensor 'threshold'"),
        (
            dictionary_learning,
            {"kind": "AutoEncoderTopK", "trainer": {**TRAINER, "k": 5}},
            "its k is 5, that of ae.pt is 4",
        ),
        (saev, {"activation": "GroupMax"}, "its activation is 'GroupMax'"),
        (saev, {"header": {"schema": 6}}, "its schema is 6"),
        (saev, {"d_vit": D}, "do not say whether b_dec is subtracted"),
        (saev, {"wings": 1}, r"sae\.pt: has the key 'wings'"),
        (gemma_scope, {"scaling": np.ones(3)}, r"params\.npz: holds the tensor 'scaling'"),
    ],
)
def test_what_is_not_understood_is_refused_by_name(tmp_path, write, changes, named):
    more = {"rescale_acts_by_decoder_norm": False} if changes.get("architecture") == "gated" else {}
    write(tmp_path / "theirs", **changes, **more)
    with pytest.raises(ValueError, match=named):
        formats.load_sae(tmp_path / "theirs")


@pytest.mark.parametrize("architecture", ["standard", "topk"])
def test_a_threshold_that_the_architecture_does_not_have_is_not_dropped(tmp_path, architecture):
    """SAELens refuses such a file too."""
    sae_lens(tmp_path / "theirs", architecture)
    path = tmp_path / "theirs" / "sae_weights.safetensors"
    save_file({**load_file(path), "threshold": torch.ones(FEATURES)}, path)
    with pytest.raises(
        ValueError, match=rf"holds the tensor 'threshold', which SAELens' architecture '{architecture}'"
    ):
        formats.load_sae(tmp_path / "theirs")


def test_the_factor_of_expected_average_only_in_goes_into_the_weights(tmp_path):
    sae_lens(tmp_path / "plain", "jumprelu")
    sae_lens(tmp_path / "scaled", "jumprelu", normalize_activations="expected_average_only_in")
    plain, scaled = formats.load_sae(tmp_path / "plain").sae, formats.load_sae(tmp_path / "scaled", input_scale=0.5).sae
    x = vectors()
    torch.testing.assert_close(scaled.encode(2 * x).dense(FEATURES), 2 * plain.encode(x).dense(FEATURES))
    torch.testing.assert_close(scaled(2 * x), 2 * plain(x), rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="'none', which takes no input_scale"):
        formats.load_sae(tmp_path / "plain", input_scale=0.5)
    sparsify(tmp_path / "other")
    with pytest.raises(ValueError, match="input_scale: belongs to sae-lens"):
        formats.load_sae(tmp_path / "other", input_scale=0.5)


def test_a_folder_of_hookpoints_lists_its_parts(tmp_path):
    for name in ("unet.up_blocks.1.attentions.1", "unet.up_blocks.1.attentions.2"):
        saeuron(tmp_path / name)
    (tmp_path / "readme").mkdir()
    with pytest.raises(ValueError, match=r"holds 2 autoencoders; choose one as subfolder: .*attentions\.1, .*\.2$"):
        formats.load_sae(tmp_path)
    found = formats.load_sae(tmp_path, subfolder="unet.up_blocks.1.attentions.2").sae
    assert found.config.input_norm == "layer_norm"


def hub_repository(monkeypatch, folder):
    """A repository on the hub with the files of a folder; returns the list of downloaded files."""
    import huggingface_hub

    downloaded = []

    def download(name, revision, allow_patterns):
        snapshot = folder.parent / "snapshot"
        for path in allow_patterns:
            if (folder / path).is_file():
                (snapshot / path).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(folder / path, snapshot / path)
                downloaded.append(path)
        return str(snapshot)

    paths = [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]
    monkeypatch.setattr(hub, "_describe", lambda *given: None)
    monkeypatch.setattr(huggingface_hub, "list_repo_files", lambda name, revision: paths)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    return downloaded


def test_a_repository_of_hookpoints_lists_its_parts_and_only_the_chosen_part_is_downloaded(tmp_path, monkeypatch):
    repository = tmp_path / "repository"
    for name in ("layers.1/x32", "layers.2/x32"):
        (repository / name).parent.mkdir(parents=True)
        saeuron(repository / name)
        (repository / name / "optimizer.pt").write_bytes(b"large")
    (repository / "README.md").write_text("two hookpoints")
    downloaded = hub_repository(monkeypatch, repository)
    message = r"^some/saes: holds 2 autoencoders; choose one as subfolder: layers.1/x32, layers.2/x32$"
    with pytest.raises(ValueError, match=message):
        formats.load_sae("some/saes")
    with pytest.raises(ValueError, match=r"^some/saes/layers.1: holds 1 autoencoders; choose one as subfolder: x32$"):
        formats.load_sae("some/saes", subfolder="layers.1")
    with pytest.raises(ValueError, match=r"^some/saes/layers.3: no autoencoder of a known format; it has nothing"):
        formats.load_sae("some/saes", subfolder="layers.3")
    assert not downloaded
    theirs = formats.load_sae("some/saes", subfolder="layers.2/x32").sae
    assert torch.equal(theirs.encoder, formats.load_sae(repository / "layers.2" / "x32").sae.encoder)
    assert sorted(downloaded) == ["layers.2/x32/cfg.json", "layers.2/x32/sae.safetensors"]


def test_a_hub_that_cannot_be_listed_leaves_what_the_cache_holds(tmp_path, monkeypatch):
    import huggingface_hub
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    sparsify(tmp_path / "repository")
    hub_repository(monkeypatch, tmp_path / "repository")
    for error in (OfflineModeIsEnabled, HfHubHTTPError.__bases__[0]):  # no network: an error of the transport alone

        def unreachable(name, revision, dataset=False, error=error):
            raise error("no route to the hub")

        monkeypatch.setattr(hub, "_describe", unreachable)
        monkeypatch.setattr(hub, "_in_cache", lambda name: True)
        monkeypatch.setattr(huggingface_hub, "list_repo_files", unreachable)
        assert formats.load_sae("some/sae").format == "sparsify"


@pytest.mark.parametrize("name", ["encoder.weight", "W_dec", "b_dec"])
def test_weights_that_are_not_finite_are_refused_by_name(tmp_path, name):
    sparsify(tmp_path / "theirs")
    path = tmp_path / "theirs" / "sae.safetensors"
    tensors = load_file(path)
    tensors[name].view(-1)[5] = float("nan")
    save_file(tensors, path)
    with pytest.raises(ValueError, match=rf"sae\.safetensors: {name} holds NaN or infinity"):
        formats.load_sae(tmp_path / "theirs")


DAMAGED = {"sae.safetensors": sparsify, "cfg.json": sparsify, "state_dict.pth": unbox, "mean.pt": unbox,
           "sae_weights.safetensors": sae_lens, "ae.pt": dictionary_learning, "sae.pt": saev,
           "params.npz": gemma_scope}  # fmt: skip


@pytest.mark.parametrize("file", DAMAGED)
@pytest.mark.parametrize(
    "damage", [lambda data: data[: len(data) // 2], lambda data: b"", lambda data: b"\x80\xff" * 50]
)
def test_a_damaged_file_is_one_sentence_with_its_name(tmp_path, file, damage):
    DAMAGED[file](tmp_path / "theirs")
    path = tmp_path / "theirs" / file
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ValueError, match=file.replace(".", r"\.")) as caught:
        formats.load_sae(tmp_path / "theirs")
    assert "\n" not in str(caught.value)


PEERS = Path(__file__).parents[2] / ".peers"
PEER_CHECKPOINTS = [
    "sae-lens-Standard", "sae-lens-Standard-layer_norm-False", "sae-lens-Standard-constant_norm_rescale",
    "sae-lens-JumpReLU", "sae-lens-Standard-expected_average_only_in", "sae-lens-JumpReLU-expected_average_only_in",
    "sae-lens-TopK-4", "sae-lens-TopK-4-True-layer_norm", "sparsify", "dictionary-learning-AutoEncoder",
    "dictionary-learning-AutoEncoderNew", "dictionary-learning-JumpReluAutoEncoder",
    "dictionary-learning-AutoEncoderTopK", "dictionary-learning-BatchTopKSAE",
    "dictionary-learning-MatryoshkaBatchTopKSAE",
]  # fmt: skip


@pytest.fixture(scope="module")
def peer_checkpoints(tmp_path_factory):
    """Folders that the other libraries wrote, in a process of their own."""
    folder = tmp_path_factory.mktemp("peers")
    script = Path(__file__).with_name("write_peer_checkpoints.py")
    ran = subprocess.run([sys.executable, str(script), str(PEERS), str(folder)], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr[-2000:]
    return folder


@pytest.mark.skipif(
    not (PEERS / "ready").exists(), reason="the other libraries are not there; make peers installs them"
)
@pytest.mark.parametrize("name", PEER_CHECKPOINTS)
def test_codes_are_those_that_the_library_itself_computes(peer_checkpoints, name):
    expected = torch.load(peer_checkpoints / f"{name}.expected.pt", weights_only=True)
    options = {"input_scale": 0.7} if "expected_average" in name else {}
    sae = formats.load_sae(peer_checkpoints / name, **options).sae
    codes = sae.encode(expected["x"])
    assert (codes.values != 0).any()
    torch.testing.assert_close(codes.dense(FEATURES), expected["codes"], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(sae.decode(codes), expected["reconstruction"], rtol=1e-4, atol=1e-4)


def test_a_folder_of_another_kind_is_refused_by_name(tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(
        ValueError, match=r"model: no autoencoder of a known format; it has pytorch_model\.bin.*sparsify"
    ):
        formats.load_sae(tmp_path / "model")
    with pytest.raises(ValueError, match="neither a folder nor an id"):
        formats.load_sae(tmp_path / "nowhere")


def test_a_missing_tensor_is_named(tmp_path):
    sparsify(tmp_path / "a")
    save_file({"encoder.weight": torch.zeros(FEATURES, D)}, tmp_path / "a" / "sae.safetensors")
    with pytest.raises(ValueError, match=r"sae\.safetensors: has no tensor 'W_dec'"):
        formats.load_sae(tmp_path / "a")


class Harmful:
    def __reduce__(self):
        return (print, ("run",))


def test_a_pickle_with_code_is_refused_and_not_run(tmp_path, capsys):
    unbox(tmp_path / "theirs")
    torch.save({"state_dict": Harmful()}, tmp_path / "theirs" / "state_dict.pth")
    with pytest.raises(ValueError, match=r"state_dict\.pth: damaged, or not a file of that kind"):
        formats.load_sae(tmp_path / "theirs")
    assert "run" not in capsys.readouterr().out


def test_ours_is_config_from_theirs(tmp_path):
    SAE(SAEConfig(D, FEATURES, K)).save_pretrained(tmp_path / "ours")
    assert formats.detect_format(tmp_path / "ours") == "vaelab.sae.model"
