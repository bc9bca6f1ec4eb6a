"""Checkpoints written by the other libraries themselves, with the codes that they compute.

Run as ``python write_peer_checkpoints.py PEERS OUT`` in a process of its own: PEERS is the folder that
``make peers`` fills, OUT gets a folder and an expectation for each checkpoint.
"""

import sys
from pathlib import Path

import torch

D, FEATURES, K = 12, 40, 4


def fill(module, seed):
    """Weights without any symmetry; thresholds are positive."""
    generator = torch.Generator().manual_seed(seed)
    for name, value in module.state_dict().items():
        if value.is_floating_point():
            noise = torch.randn(value.shape, generator=generator)
            value.copy_(noise.abs() / 2 if "threshold" in name else noise)


def expect(out, name, x, codes, reconstruction):
    torch.save({"x": x, "codes": codes, "reconstruction": reconstruction}, out / f"{name}.expected.pt")


@torch.no_grad()
def write_sae_lens(out, x):
    import sae_lens

    for architecture, options in (
        ("Standard", {}), ("Standard", {"normalize_activations": "layer_norm", "apply_b_dec_to_input": False}),
        ("Standard", {"normalize_activations": "constant_norm_rescale"}), ("JumpReLU", {}),
        ("Standard", {"normalize_activations": "expected_average_only_in"}),
        ("JumpReLU", {"normalize_activations": "expected_average_only_in"}), ("TopK", {"k": K}),
        ("TopK", {"k": K, "rescale_acts_by_decoder_norm": True, "normalize_activations": "layer_norm"}),
    ):  # fmt: skip
        config = getattr(sae_lens, f"{architecture}SAEConfig")(d_in=D, d_sae=FEATURES, **options)
        sae = getattr(sae_lens, f"{architecture}SAE")(config)
        fill(sae, 1)
        name = "-".join(["sae-lens", architecture, *map(str, options.values())])
        sae.save_model(out / name)
        if options.get("normalize_activations") == "expected_average_only_in":
            sae.fold_activation_norm_scaling_factor(0.7)
        codes = sae.encode(x)
        scaled = architecture != "TopK"  # our features have unit length, and theirs any
        lengths = sae.W_dec.norm(dim=1) if scaled else 1.0
        expect(out, name, x, codes * lengths, sae(x))


@torch.no_grad()
def write_sparsify(out, x):
    from sparsify import SparseCoder, SparseCoderConfig

    sae = SparseCoder(D, SparseCoderConfig(num_latents=FEATURES, k=K))
    fill(sae, 2)
    sae.save_to_disk(out / "sparsify")
    found = sae.encode(x)
    codes = torch.zeros(len(x), FEATURES).scatter(1, found.top_indices, found.top_acts)
    expect(out, "sparsify", x, codes, sae.decode(found.top_acts, found.top_indices))


@torch.no_grad()
def write_dictionary_learning(out, x):
    import json

    from dictionary_learning.dictionary import AutoEncoder, AutoEncoderNew, JumpReluAutoEncoder
    from dictionary_learning.trainers.batch_top_k import BatchTopKSAE
    from dictionary_learning.trainers.matryoshka_batch_top_k import MatryoshkaBatchTopKSAE
    from dictionary_learning.trainers.top_k import AutoEncoderTopK

    for kind, options in (
        (AutoEncoder, ()), (AutoEncoderNew, ()), (JumpReluAutoEncoder, ()), (AutoEncoderTopK, (K,)),
        (BatchTopKSAE, (K,)), (MatryoshkaBatchTopKSAE, (K, [10, 30])),
    ):  # fmt: skip
        sae = kind(D, FEATURES, *options)
        fill(sae, 3)
        name = f"dictionary-learning-{kind.__name__}"
        (out / name).mkdir()
        torch.save(sae.state_dict(), out / name / "ae.pt")
        if kind in (AutoEncoderTopK, BatchTopKSAE):
            trainer = {"dict_class": kind.__name__, "activation_dim": D, "dict_size": FEATURES, "k": K, "lr": 1e-4}
            (out / name / "config.json").write_text(json.dumps({"trainer": trainer}))
        scaled = kind in (AutoEncoder, AutoEncoderNew, JumpReluAutoEncoder)
        weight = sae.W_dec.T if hasattr(sae, "W_dec") else sae.decoder.weight
        codes = sae.encode(x)
        expect(out, name, x, codes * weight.norm(dim=0) if scaled else codes, sae.decode(codes))


if __name__ == "__main__":
    sys.path.append(sys.argv[1])  # after ours: none of the lab's own versions is replaced
    folder, vectors = Path(sys.argv[2]), torch.randn(30, D, generator=torch.Generator().manual_seed(9)) + 0.5
    for write in (write_sae_lens, write_sparsify, write_dictionary_learning):
        write(folder, vectors)
