"""Folders written as the other libraries write them, byte layout and keys, and read back."""

import json

import pytest
import torch
from safetensors.torch import save_file

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
    told = {"n_dirs_local": FEATURES, "d_model": D, "k": K, "auxk": 7, "dead_steps_threshold": 1000, "auxk_coef": 0.5}
    (folder / "config.json").write_text(json.dumps({**told, **changes}))
    torch.save({"state_dict": state}, folder / "state_dict.pth")
    torch.save(torch.arange(40.0), folder / "mean.pt")
    torch.save(torch.ones(40), folder / "std.pt")

    pre = (vectors() - state["pre_bias"]) @ state["encoder.weight"].T + state["latent_bias"]
    best = pre.topk(K)
    acts = torch.zeros_like(pre).scatter_(1, best.indices, best.values.relu())
    return acts, acts @ state["decoder.weight"].T + state["pre_bias"]


def sparsify(folder, dtype=torch.float32, **changes):
    """As sparsify's SparseCoder.save_to_disk; what it computes."""
    folder.mkdir()
    state = {
        "encoder.weight": random(FEATURES, D, seed=2), "encoder.bias": random(FEATURES, seed=1),
        "W_dec": unit(random(FEATURES, D, seed=3)), "b_dec": random(D, seed=0),
    }  # fmt: skip
    state = {name: value.to(dtype) for name, value in state.items()}
    told = {
        "activation": "topk", "expansion_factor": 32, "normalize_decoder": True, "num_latents": FEATURES, "k": K,
        "multi_topk": False, "skip_connection": False, "transcode": False, "d_in": D,
    }  # fmt: skip
    (folder / "cfg.json").write_text(json.dumps({**told, **changes}))
    save_file(state, folder / "sae.safetensors")
    state = {name: value.float() for name, value in state.items()}
    pre = torch.relu((vectors() - state["b_dec"]) @ state["encoder.weight"].T + state["encoder.bias"])
    best = pre.topk(K)
    acts = torch.zeros_like(pre).scatter_(1, best.indices, best.values)
    return acts, acts @ state["W_dec"] + state["b_dec"]


def sae_lens(folder, architecture="topk", **changes):
    """As SAELens's SAE.save_model; what it computes."""
    folder.mkdir()
    state = {
        "W_enc": random(FEATURES, D, seed=2).T.contiguous(), "b_enc": random(FEATURES, seed=1),
        "W_dec": random(FEATURES, D, seed=3) * 1.7, "b_dec": random(D, seed=0),
    }  # fmt: skip
    told = {
        "d_in": D, "d_sae": FEATURES, "dtype": "float32", "device": "cpu", "apply_b_dec_to_input": True,
        "normalize_activations": "none", "reshape_activations": "none", "architecture": architecture,
        "metadata": {"sae_lens_version": "6.54.12", "hook_name": "blocks.0.hook_resid_pre"},
    }  # fmt: skip
    if architecture == "topk":
        told |= {"k": K, "rescale_acts_by_decoder_norm": False}
    if architecture == "jumprelu":
        state["threshold"] = random(FEATURES, seed=4).abs()
    told |= changes
    (folder / "cfg.json").write_text(json.dumps(told))
    save_file(state, folder / "sae_weights.safetensors")

    lengths, x = state["W_dec"].norm(dim=1), vectors()
    pre = (x - state["b_dec"] * told["apply_b_dec_to_input"]) @ state["W_enc"] + state["b_enc"]
    if architecture == "jumprelu":
        acts = pre * (pre > state["threshold"])
    elif architecture == "standard":
        acts = pre.relu()
    else:
        pre = pre * lengths if told["rescale_acts_by_decoder_norm"] else pre
        best = pre.topk(K)
        acts = torch.zeros_like(pre).scatter_(1, best.indices, best.values.relu())
        if told["rescale_acts_by_decoder_norm"]:
            return acts, acts / lengths @ state["W_dec"] + state["b_dec"]
        return acts, acts @ state["W_dec"] + state["b_dec"]
    return acts * lengths, acts @ state["W_dec"] + state["b_dec"]


WRITERS = {
    "sdxl-unbox": unbox,
    "sparsify": sparsify,
    "sparsify in bfloat16": lambda folder: sparsify(folder, torch.bfloat16),
    "sae-lens topk": sae_lens,
    "sae-lens topk, rescaled": lambda folder: sae_lens(folder, rescale_acts_by_decoder_norm=True),
    "sae-lens topk, bias at the end only": lambda folder: sae_lens(folder, apply_b_dec_to_input=False),
    "sae-lens jumprelu": lambda folder: sae_lens(folder, "jumprelu"),
    "sae-lens standard": lambda folder: sae_lens(folder, "standard", apply_b_dec_to_input=False),
}


@pytest.mark.parametrize("writer", WRITERS)
def test_what_was_written_computes_the_same_and_survives_a_round_trip(tmp_path, writer):
    acts, reconstruction = WRITERS[writer](tmp_path / "theirs")
    loaded = formats.load(tmp_path / "theirs")
    assert loaded.format == writer.split()[0]
    loaded.sae.save_pretrained(tmp_path / "ours")
    again = formats.load(tmp_path / "ours")
    assert again.format == "vaelab.sae.model" and again.sae.config == loaded.sae.config
    for sae in (loaded.sae, again.sae):
        torch.testing.assert_close(sae.encode(vectors()).dense(FEATURES), acts, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(sae(vectors()), reconstruction, rtol=1e-4, atol=1e-4)


def test_where_it_changes_nothing_features_come_with_unit_length(tmp_path):
    for number, more in enumerate(
        ({"architecture": "jumprelu"}, {"architecture": "standard"}, {"rescale_acts_by_decoder_norm": True})
    ):
        sae_lens(tmp_path / str(number), **more)
        decoder = formats.load(tmp_path / str(number)).sae.decoder
        torch.testing.assert_close(decoder.norm(dim=1), torch.ones(FEATURES))
    sae_lens(tmp_path / "as it was")
    assert formats.load(tmp_path / "as it was").sae.decoder.norm(dim=1).min() > 1.5


def test_unbox_brings_its_features_statistics_and_its_losses_settings(tmp_path):
    unbox(tmp_path / "theirs")
    loaded = formats.load(tmp_path / "theirs")
    assert torch.equal(loaded.mean, torch.arange(40.0)) and torch.equal(loaded.std, torch.ones(40))
    assert loaded.sae.config == SAEConfig(D, FEATURES, K, aux_weight=0.5, k_aux=7)
    (tmp_path / "theirs" / "mean.pt").unlink()
    assert formats.load(tmp_path / "theirs").mean is None


@pytest.mark.parametrize(
    ("write", "changes", "named"),
    [
        (sparsify, {"activation": "groupmax"}, r"its activation is 'groupmax'; only 'topk'"),
        (sparsify, {"skip_connection": True}, "its skip_connection is True"),
        (sparsify, {"transcode": True}, "its transcode is True"),
        (sparsify, {"num_latents": 99}, r"encoder is \(40, 12\); by its configuration \(99, 12\)"),
        (
            sparsify,
            {"num_latents": 0, "expansion_factor": 4},
            r"encoder is \(40, 12\); by its configuration \(48, 12\)",
        ),
        (sae_lens, {"architecture": "gated"}, r"its architecture is 'gated'; only 'standard' or 'topk' or 'jumprelu'"),
        (sae_lens, {"normalize_activations": "layer_norm"}, "its normalize_activations is 'layer_norm'"),
        (unbox, {"k": FEATURES + 1}, "k: 41 active features of 40"),
    ],
)
def test_what_cannot_be_read_is_refused_by_name(tmp_path, write, changes, named):
    more = {"rescale_acts_by_decoder_norm": False} if changes.get("architecture") == "gated" else {}
    write(tmp_path / "theirs", **changes, **more)
    with pytest.raises(ValueError, match=named):
        formats.load(tmp_path / "theirs")


def test_a_folder_of_another_kind_is_refused_by_name(tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(
        ValueError, match=r"model: no autoencoder of a known format; it has pytorch_model\.bin.*sparsify"
    ):
        formats.load(tmp_path / "model")
    with pytest.raises(ValueError, match="neither a folder nor an id"):
        formats.load(tmp_path / "nowhere")


def test_missing_keys_and_broken_files_are_one_error_that_names_the_format(tmp_path):
    sparsify(tmp_path / "a")
    save_file({"encoder.weight": torch.zeros(FEATURES, D)}, tmp_path / "a" / "sae.safetensors")
    with pytest.raises(ValueError, match=r"not what sparsify writes .*W_dec"):
        formats.load(tmp_path / "a")
    sae_lens(tmp_path / "b")
    (tmp_path / "b" / "sae_weights.safetensors").write_bytes(b"broken")
    with pytest.raises(ValueError, match="not what sae-lens writes"):
        formats.load(tmp_path / "b")
    unbox(tmp_path / "c")
    (tmp_path / "c" / "config.json").write_text("{")
    with pytest.raises(ValueError, match="not what sdxl-unbox writes"):
        formats.load(tmp_path / "c")


class Harmful:
    def __reduce__(self):
        return (print, ("run",))


def test_a_pickle_with_code_is_refused_and_not_run(tmp_path, capsys):
    unbox(tmp_path / "theirs")
    torch.save({"state_dict": Harmful()}, tmp_path / "theirs" / "state_dict.pth")
    with pytest.raises(ValueError, match="not what sdxl-unbox writes"):
        formats.load(tmp_path / "theirs")
    assert "run" not in capsys.readouterr().out


def test_ours_is_told_from_theirs(tmp_path):
    SAE(SAEConfig(D, FEATURES, K)).save_pretrained(tmp_path / "ours")
    assert formats.format_of(tmp_path / "ours") == "vaelab.sae.model"
