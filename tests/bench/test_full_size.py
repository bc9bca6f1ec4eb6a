import torch

from vaelab.bench import full_size

SMALL = {
    **full_size.SDXL, "block_out_channels": (16, 32, 48), "attention_head_dim": (2, 4, 6), "norm_num_groups": 8,
    "transformer_layers_per_block": (1, 1, 2), "cross_attention_dim": 32, "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": 64, "sample_size": 8,
}  # fmt: skip


def test_every_stage_runs_and_is_measured():
    lines = []
    table = full_size.measure_full_size(SMALL, side=64, n_features=64, k=4, steps=2, progress=lines.append)
    assert len(table) == len(lines) == 6 and (table["seconds"] > 0).all()
    assert table["peak_gb"].is_monotonic_increasing and 0.05 < table["peak_gb"].iloc[-1] < 20


def test_weights_are_random_in_half_precision_and_layers_compute_in_float32():
    unet = full_size.random_unet(SMALL)
    assert {weight.dtype for weight in unet.parameters()} == {torch.bfloat16}
    linear = unet.time_embedding.linear_1
    assert abs(float(linear.weight.float().std()) * linear.in_features**0.5 - 1) < 0.1
    x = torch.randn(3, linear.in_features, generator=torch.Generator().manual_seed(0)).bfloat16()
    expected = x.double() @ linear.weight.double().T + linear.bias.double()
    torch.testing.assert_close(linear(x).double(), expected, rtol=0.005, atol=0.005)
    x = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(1)).bfloat16()
    own = torch.nn.functional.conv2d(x.double(), unet.conv_in.weight.double(), unet.conv_in.bias.double(), padding=1)
    torch.testing.assert_close(unet.conv_in(x).double(), own, rtol=0.005, atol=0.005)
