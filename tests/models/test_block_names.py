import math
import types

import diffusers
import pytest
import torch
from small_pipelines import PIPELINES, unet

from vaelab.hooks import capture
from vaelab.models import block_names as module
from vaelab.models.block_names import FLUX_TOKENS, blocks, example_outputs, find_blocks, find_denoiser, to_maps

SDXL_BLOCKS = [
    "down.1.0", "down.1.1", "down.2.0", "down.2.1", "mid.0", "up.0.0", "up.0.1", "up.0.2", "up.1.0", "up.1.1", "up.1.2",
]  # fmt: skip
STABLE_DIFFUSION = ["down.0.0", "down.0.1", "mid.0", "bottleneck", "up_ft0", "up.1.0", "up.1.1", "up.1.2", "up_ft1"]
NAMES = {
    "sd": STABLE_DIFFUSION,
    "sd2": STABLE_DIFFUSION,
    "sdxl": [*SDXL_BLOCKS[:5], "bottleneck", *SDXL_BLOCKS[5:8], "up_ft0", *SDXL_BLOCKS[8:], "up_ft1", "up_ft2"],
    "deepfloyd": ["bottleneck", "up_ft0", "up_ft1"],
    "dit": ["block0", "block1"],
    "pixart": ["block0", "block1"],
    "sd3": ["block0", "block1"],
    "flux": ["block0", "block1", "single0", "single1"],
    "world": ["down.0.0", "down.0.1", "down.1.0", "down.1.1", "mid.0", "bottleneck",
              "up.0.0", "up.0.1", "up.0.2", "up_ft0", "up.1.0", "up.1.1", "up.1.2", "up_ft1"],
}  # fmt: skip


@pytest.mark.parametrize("name", PIPELINES)
def test_names_in_the_order_in_which_the_blocks_run(small_pipeline, name):
    pipeline = small_pipeline(name)
    ran = []
    model = find_denoiser(pipeline)
    handles = [
        model.get_submodule(path).register_forward_hook(lambda *_, short=short: ran.append(short))
        for short, path in module.paths_by_name(pipeline).items()
    ]
    example = module.EXAMPLES[type(model).__name__](model.config)
    with torch.no_grad():
        model(**example)
    for handle in handles:
        handle.remove()
    assert list(blocks(pipeline)) == NAMES[name] == ran


@pytest.mark.parametrize("name", PIPELINES)
def test_shapes_are_those_of_what_is_captured(small_pipeline, name):
    from vaelab.activations.denoiser import Sampling, from_prompts

    pipeline = small_pipeline(name)
    found = blocks(pipeline)
    prompts = [3] if name == "dit" else ["a red circle"]
    seen = from_prompts(pipeline, prompts, [0], found, Sampling(1, 1.0), side="output", steps=[0]).maps
    assert {short: seen[short][0].shape[1:] for short in found} == {
        short: block.shape for short, block in found.items()
    }


@pytest.fixture
def nothing_known(monkeypatch):
    monkeypatch.setattr(module, "_example_outputs", {})


def test_listing_the_blocks_computes_nothing_and_leaves_the_model_alone(small_pipeline, nothing_known):
    model = find_denoiser(small_pipeline("sd"))
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    state = torch.get_rng_state()
    with pytest.raises(RuntimeError, match="conv_in never ran"), capture(model, "conv_in"):
        blocks(model)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    assert {parameter.device.type for parameter in model.parameters()} == {"cpu"}


def test_listing_the_blocks_warns_of_nothing(small_pipeline, nothing_known, complaints):
    for name in PIPELINES:
        blocks(small_pipeline(name))
    assert complaints() == []


def real(kind, **config):
    with torch.device("meta"):
        return kind(**config)


def sdxl(sample_size):
    return real(
        diffusers.UNet2DConditionModel, sample_size=sample_size, block_out_channels=(320, 640, 1280),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 2, 10), attention_head_dim=(5, 10, 20), cross_attention_dim=2048,
        use_linear_projection=True, addition_embed_type="text_time", addition_time_embed_dim=256,
        projection_class_embeddings_input_dim=2816,
    )  # fmt: skip


@pytest.mark.parametrize(("sample_size", "side"), [(64, 16), (128, 32)])
def test_sdxl_has_the_papers_eleven_cross_attention_blocks(sample_size, side):
    model = sdxl(sample_size)
    found = blocks(model)
    assert [name for name in found if "." in name] == SDXL_BLOCKS
    assert found["down.2.1"] == ("down_blocks.2.attentions.1", (side, side, 1280))
    assert found["up.0.1"] == ("up_blocks.0.attentions.1", (side, side, 1280))
    assert found["up.1.0"] == ("up_blocks.1.attentions.0", (2 * side, 2 * side, 640))
    assert found["mid.0"] == ("mid_block.attentions.0", (side, side, 1280))


def test_a_model_in_half_precision_has_the_same_blocks(monkeypatch):
    found = {}
    for precision in (torch.float32, torch.float16):
        monkeypatch.setattr(module, "_example_outputs", {})  # the precision is no part of the configuration
        found[precision] = blocks(unet().to(precision))
    assert "bottleneck" in found[torch.float32] and found[torch.float16] == found[torch.float32]


def test_blocks_found_before_are_those_of_the_same_configuration_alone():
    small = real(diffusers.DiTTransformer2DModel, **{**WIDE, "num_layers": 1}, sample_size=8)
    assert blocks(small) == blocks(small) == {"block0": ("transformer_blocks.0", (4, 4, 1152))}
    other = real(diffusers.DiTTransformer2DModel, **{**WIDE, "num_layers": 1}, sample_size=16)
    assert blocks(other)["block0"].shape == (8, 8, 1152)


def test_stable_diffusion_1_5_at_its_real_size():
    found = blocks(real(diffusers.UNet2DConditionModel, sample_size=64, cross_attention_dim=768))
    assert [(name, block.shape) for name, block in found.items() if "_" in name or name == "bottleneck"] == [
        ("bottleneck", (8, 8, 1280)), ("up_ft0", (16, 16, 1280)), ("up_ft1", (32, 32, 1280)),
        ("up_ft2", (64, 64, 640)), ("up_ft3", (64, 64, 320)),
    ]  # fmt: skip
    assert len([name for name in found if "." in name]) == 16


def test_deepfloyd_at_its_real_size():
    attention = ("SimpleCrossAttnDownBlock2D",) * 3, ("SimpleCrossAttnUpBlock2D",) * 3
    model = real(
        diffusers.UNet2DConditionModel, sample_size=64, in_channels=3, out_channels=6, layers_per_block=3,
        block_out_channels=(704, 1408, 2112, 2816), attention_head_dim=64, cross_attention_dim=2816,
        down_block_types=("ResnetDownsampleBlock2D", *attention[0]), mid_block_type="UNetMidBlock2DSimpleCrossAttn",
        up_block_types=(*attention[1], "ResnetUpsampleBlock2D"), encoder_hid_dim=4096, act_fn="gelu",
        encoder_hid_dim_type="text_proj", addition_embed_type="text", addition_embed_type_num_heads=64,
        cross_attention_norm="group_norm", resnet_time_scale_shift="scale_shift", time_embedding_act_fn="gelu",
    )  # fmt: skip
    assert [(name, block.shape) for name, block in blocks(model).items()] == [
        ("bottleneck", (8, 8, 2816)), ("up_ft0", (16, 16, 2816)), ("up_ft1", (32, 32, 2112)),
        ("up_ft2", (64, 64, 1408)), ("up_ft3", (64, 64, 704)),
    ]  # fmt: skip


WIDE = {"num_attention_heads": 16, "attention_head_dim": 72, "in_channels": 4, "out_channels": 8, "num_layers": 28}


@pytest.mark.parametrize(
    ("kind", "config", "names", "shape"),
    [
        (
            diffusers.DiTTransformer2DModel,
            {**WIDE, "sample_size": 32, "norm_type": "ada_norm_zero", "norm_elementwise_affine": False},
            [f"block{i}" for i in range(28)],
            (16, 16, 1152),
        ),
        (
            diffusers.PixArtTransformer2DModel,
            {**WIDE, "sample_size": 128, "cross_attention_dim": 1152, "caption_channels": 4096},
            [f"block{i}" for i in range(28)],
            (64, 64, 1152),
        ),
        (
            diffusers.SD3Transformer2DModel,
            {"num_layers": 24, "num_attention_heads": 24, "caption_projection_dim": 1536, "pos_embed_max_size": 192},
            [f"block{i}" for i in range(24)],
            (64, 64, 1536),
        ),
        (
            diffusers.FluxTransformer2DModel,
            {"guidance_embeds": True},
            [*(f"block{i}" for i in range(19)), *(f"single{i}" for i in range(38))],
            (64, 64, 3072),
        ),
    ],
    ids=["DiT-XL/2", "PixArt-XL/2", "SD 3", "FLUX"],
)
def test_transformers_at_their_real_size(kind, config, names, shape):
    found = blocks(real(kind, **config))
    assert list(found) == names
    assert {block.shape for block in found.values()} == {shape}


def test_layers_inside_a_block_of_two_streams_give_the_pictures_tensor(small_pipeline):
    """FLUX's whole block returns (text, picture), the attention in it (picture, text)."""
    flux = small_pipeline("flux").transformer
    layers = ["transformer_blocks.1", "transformer_blocks.1.attn", "transformer_blocks.1.ff"]
    for order in (layers, layers[::-1]):
        found = example_outputs(flux, order)
        assert {layer: found[layer].shape[1] for layer in layers} == dict.fromkeys(layers, math.prod(FLUX_TOKENS))
    with pytest.raises(ValueError, match=r"^blocks: transformer_blocks\.0\.ff_context works on the text's tokens"):
        example_outputs(flux, ["transformer_blocks.0.ff_context"])


def test_pictures_that_are_not_square():
    model = unet(sample_size=(16, 24))
    assert blocks(model)["bottleneck"].shape == (8, 12, 32)
    assert module.own_aspect(model) == pytest.approx(2 / 3)


def test_names_and_paths_resolve_in_the_order_asked(small_pipeline):
    pipeline = small_pipeline("sdxl")
    inner = "down_blocks.1.attentions.0.transformer_blocks.0.attn2"
    assert list(find_blocks(pipeline, ["up.0.1", inner, "down.2.1"]).items()) == [
        ("up.0.1", "up_blocks.0.attentions.1"), (inner, inner), ("down.2.1", "down_blocks.2.attentions.1"),
    ]  # fmt: skip
    assert find_blocks(pipeline, "bottleneck") == {"bottleneck": "mid_block"}
    assert list(find_blocks(pipeline, ["mid.0", "down.?.0", "mid.*"])) == ["mid.0", "down.1.0", "down.2.0"]
    assert find_blocks(pipeline.unet, ["mid.0"]) == {"mid.0": "mid_block.attentions.0"}


@pytest.mark.parametrize(
    ("name", "unknown", "nearest"),
    [
        ("sdxl", "down.2.2", "down.2."),
        ("sdxl", "up_ft4", "up_ft2"),
        ("sdxl", r"down\.9\.\*", "down."),
        ("sdxl", "down_blocks.2.attentions.7", "down_blocks.2.attentions.1"),
        ("dit", "block2", "block1"),
        ("flux", "single9", "single1"),
        ("deepfloyd", "down.1.0", "bottleneck"),
    ],
)
def test_unknown_block_lists_the_nearest(small_pipeline, name, unknown, nearest):
    with pytest.raises(ValueError, match=f"^blocks: unknown name '{unknown}'; the nearest of .*{nearest}"):
        asked = unknown.replace("\\", "")
        find_blocks(small_pipeline(name), ["block0" if name in ("dit", "flux") else "bottleneck", asked])


def test_no_block_is_refused(small_pipeline):
    with pytest.raises(ValueError, match=r"^blocks: expected at least one, got none"):
        find_blocks(small_pipeline("sd"), [])


@pytest.mark.parametrize(
    ("thing", "message"),
    [
        (torch.nn.Linear(1, 1), "Linear has Linear for its denoiser; supported are UNet2DConditionModel"),
        (types.SimpleNamespace(unet=torch.nn.Linear(1, 1)), "SimpleNamespace has Linear for its denoiser"),
        (types.SimpleNamespace(unet=None, vae=1), "SimpleNamespace has no denoiser"),
    ],
)
def test_unknown_denoiser_is_refused(thing, message):
    with pytest.raises(ValueError, match=f"^model: {message}"):
        blocks(thing)


@pytest.mark.parametrize(("height", "width"), [(8, 8), (8, 16), (16, 8), (5, 6), (6, 5), (1, 3), (52, 76)])
def test_tokens_and_maps_of_the_same_thing_are_the_same(height, width):
    features = torch.randn(2, 3, height, width)
    expected = features.permute(0, 2, 3, 1)
    assert torch.equal(to_maps(features), expected)
    assert torch.equal(to_maps(features.flatten(2).transpose(1, 2), height / width), expected)
    assert torch.equal(to_maps(features.flatten(2).transpose(1, 2), 1.1 * height / width), expected)
    assert to_maps(features).is_contiguous()


@pytest.mark.parametrize(("tokens", "aspect"), [(77, 1), (63, 1), (64, 0.5), (13, 0.75), (120, 1)])
def test_tokens_that_are_no_grid_are_refused(tokens, aspect):
    with pytest.raises(
        ValueError, match=f"^blocks: {tokens} tokens do not fill a grid of the picture's aspect, {aspect}"
    ):
        to_maps(torch.zeros(1, tokens, 4), aspect)


def test_what_is_neither_map_nor_tokens_is_refused():
    with pytest.raises(ValueError, match=r"^blocks: a block's output has shape \(2, 16\); expected a map"):
        to_maps(torch.zeros(2, 16))
