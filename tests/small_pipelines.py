"""Small pipelines with random weights, of the classes of the real ones, saved as local diffusers folders.

Each keeps its model's structure, and so the names of its blocks; widths, depths and pictures are small.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import diffusers
import torch
import transformers

SENTENCES = ["a red circle", "a large blue square left of a green triangle", "two yellow stars on a dark field"] * 4
TOKENS = 16
NUMBERS = range(1000)
"""The classes of the class-conditional model, as many as its pipeline takes for granted."""


def clip_tokenizer() -> Any:
    empty = transformers.CLIPTokenizer(model_max_length=TOKENS)
    return empty.train_new_from_iterator(SENTENCES, 300, show_progress=False)


def t5_tokenizer() -> Any:
    empty = transformers.T5Tokenizer(model_max_length=512, extra_ids=0)
    return empty.train_new_from_iterator(SENTENCES, 100, show_progress=False)


def clip_model(tokenizer: Any, kind: type = transformers.CLIPTextModel, width: int = 16) -> Any:
    return kind(
        transformers.CLIPTextConfig(
            vocab_size=len(tokenizer), hidden_size=width, intermediate_size=32, projection_dim=width,
            num_hidden_layers=2, num_attention_heads=2, max_position_embeddings=TOKENS,
            bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )  # fmt: skip


def save_whole_clip(folder: Path) -> Path:
    """A CLIP of texts and pictures with its processor, as transformers saves it; says where."""
    tokenizer = clip_tokenizer()
    size = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = {
        **size, "vocab_size": len(tokenizer), "max_position_embeddings": TOKENS, "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id,
    }  # fmt: skip
    vision = {**size, "image_size": 32, "patch_size": 8}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        transformers.CLIPModel(
            transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=8)
        ).save_pretrained(folder)
    sides = transformers.CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    transformers.CLIPProcessor(sides, tokenizer).save_pretrained(folder)
    return folder


def t5_model(tokenizer: Any, width: int = 32) -> Any:
    config = transformers.T5Config(vocab_size=len(tokenizer), d_model=width, d_kv=8, d_ff=32, num_layers=1, num_heads=2)
    return transformers.T5EncoderModel(config)


def vae(widths: tuple[int, ...] = (8, 16), **changes: Any) -> Any:
    return diffusers.AutoencoderKL(
        block_out_channels=widths, down_block_types=["DownEncoderBlock2D"] * len(widths),
        up_block_types=["UpDecoderBlock2D"] * len(widths), latent_channels=4, layers_per_block=1, norm_num_groups=4,
        sample_size=32, **changes,
    )  # fmt: skip


def unet(**changes: Any) -> Any:
    return diffusers.UNet2DConditionModel(
        **{
            "sample_size": 16, "in_channels": 4, "out_channels": 4, "block_out_channels": (16, 32),
            "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"), "layers_per_block": 2,
            "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"), "cross_attention_dim": 16,
            "attention_head_dim": 8, "norm_num_groups": 8, **changes,
        }
    )  # fmt: skip


BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


def stable_diffusion() -> Any:
    """Stable Diffusion 1.5."""
    tokenizer = clip_tokenizer()
    scheduler = diffusers.PNDMScheduler(**BETAS, skip_prk_steps=True, set_alpha_to_one=False, steps_offset=1)
    parts = (vae(), clip_model(tokenizer), tokenizer, unet(), scheduler, None, None)
    return diffusers.StableDiffusionPipeline(*parts, requires_safety_checker=False)


def stable_diffusion_2() -> Any:
    """Stable Diffusion 2.1: v-prediction, linear projections around its transformers."""
    tokenizer = clip_tokenizer()
    scheduler = diffusers.DDIMScheduler(**BETAS, prediction_type="v_prediction", clip_sample=False, steps_offset=1)
    parts = (vae(), clip_model(tokenizer), tokenizer, unet(use_linear_projection=True), scheduler, None, None)
    return diffusers.StableDiffusionPipeline(*parts, requires_safety_checker=False)


def sdxl_turbo() -> Any:
    """SDXL Turbo: one attention-free stage, two with two transformers down and three up, two text models."""
    tokenizers = clip_tokenizer(), clip_tokenizer()
    return diffusers.StableDiffusionXLPipeline(
        vae=vae(force_upcast=True),
        text_encoder=clip_model(tokenizers[0]),
        text_encoder_2=clip_model(tokenizers[1], transformers.CLIPTextModelWithProjection),
        tokenizer=tokenizers[0],
        tokenizer_2=tokenizers[1],
        unet=unet(
            block_out_channels=(16, 32, 48), down_block_types=("DownBlock2D", *("CrossAttnDownBlock2D",) * 2),
            up_block_types=(*("CrossAttnUpBlock2D",) * 2, "UpBlock2D"), attention_head_dim=(2, 4, 6),
            transformer_layers_per_block=(1, 1, 2), cross_attention_dim=32, use_linear_projection=True,
            addition_embed_type="text_time", addition_time_embed_dim=8, projection_class_embeddings_input_dim=64,
        ),
        scheduler=diffusers.EulerAncestralDiscreteScheduler(**BETAS, timestep_spacing="trailing", steps_offset=1),
        add_watermarker=False,
    )  # fmt: skip


def deepfloyd() -> Any:
    """DeepFloyd IF, stage I: a U-Net of pixels, its attention without transformers around it."""
    tokenizer = t5_tokenizer()
    attention = ("SimpleCrossAttnDownBlock2D",), ("SimpleCrossAttnUpBlock2D",)
    return diffusers.IFPipeline(
        tokenizer, t5_model(tokenizer),
        unet(
            in_channels=3, out_channels=6, down_block_types=("ResnetDownsampleBlock2D", *attention[0]),
            up_block_types=(*attention[1], "ResnetUpsampleBlock2D"), mid_block_type="UNetMidBlock2DSimpleCrossAttn",
            encoder_hid_dim=32, encoder_hid_dim_type="text_proj", cross_attention_dim=32,
            cross_attention_norm="group_norm", addition_embed_type="text", addition_embed_type_num_heads=2,
            act_fn="gelu", resnet_time_scale_shift="scale_shift", time_embedding_act_fn="gelu",
        ),
        diffusers.DDPMScheduler(
            beta_schedule="squaredcos_cap_v2", variance_type="learned_range", thresholding=True, clip_sample=True,
        ),
        None, None, None, requires_safety_checker=False,
    )  # fmt: skip


def dit() -> Any:
    """DiT-XL/2."""
    transformer = diffusers.DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=8, num_layers=2, sample_size=16,
        num_embeds_ada_norm=len(NUMBERS), norm_num_groups=8, norm_elementwise_affine=False, norm_type="ada_norm_zero",
    )  # fmt: skip
    scheduler = diffusers.DDIMScheduler(clip_sample=False)
    names = {str(number): f"thing {number}, object {number}" for number in NUMBERS}
    return diffusers.DiTPipeline(transformer, vae(), scheduler, names)


def pixart(sample_size: int = 32) -> Any:
    """PixArt-XL/2, for 256 pixels the smallest of those for which its pipeline knows the aspects."""
    tokenizer = t5_tokenizer()
    transformer = diffusers.PixArtTransformer2DModel(
        num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=8, num_layers=2,
        sample_size=sample_size, cross_attention_dim=24, caption_channels=32,
    )  # fmt: skip
    scheduler = diffusers.DPMSolverMultistepScheduler()
    autoencoder = vae((8, 8, 8, 8))
    return diffusers.PixArtAlphaPipeline(tokenizer, t5_model(tokenizer), autoencoder, transformer, scheduler)


def stable_diffusion_3() -> Any:
    """Stable Diffusion 3: three text models, a rectified flow, blocks of a text and a picture stream."""
    tokenizers = clip_tokenizer(), clip_tokenizer(), t5_tokenizer()
    projected = transformers.CLIPTextModelWithProjection
    transformer = diffusers.SD3Transformer2DModel(
        sample_size=16, in_channels=4, out_channels=4, num_layers=2, num_attention_heads=2, attention_head_dim=8,
        joint_attention_dim=32, caption_projection_dim=16, pooled_projection_dim=32, pos_embed_max_size=24,
    )  # fmt: skip
    return diffusers.StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=vae(shift_factor=0.06),
        text_encoder=clip_model(tokenizers[0], projected),
        tokenizer=tokenizers[0],
        text_encoder_2=clip_model(tokenizers[1], projected),
        tokenizer_2=tokenizers[1],
        text_encoder_3=t5_model(tokenizers[2]),
        tokenizer_3=tokenizers[2],
    )


def flux() -> Any:
    """FLUX.1 dev: a rectified flow, guidance by an embedding, blocks with one and with two streams."""
    tokenizers = clip_tokenizer(), t5_tokenizer()
    transformer = diffusers.FluxTransformer2DModel(
        in_channels=16, num_layers=2, num_single_layers=2, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=32, pooled_projection_dim=16, guidance_embeds=True, axes_dims_rope=(4, 6, 6),
    )  # fmt: skip
    return diffusers.FluxPipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
        vae=vae(shift_factor=0.1),
        text_encoder=clip_model(tokenizers[0]),
        tokenizer=tokenizers[0],
        text_encoder_2=t5_model(tokenizers[1]),
        tokenizer_2=tokenizers[1],
        transformer=transformer,
    )


def world() -> Any:
    """The embedded text-to-image model before its training."""
    from vaelab.embedded import text_encoder as embedded_text_encoder
    from vaelab.embedded import train_unet

    sizes = train_unet.ModelConfig(
        vae_channels=(16, 16, 16), unet_channels=(16, 32), head_width=8, text_width=16, text_layers=1
    )
    with mock.patch.object(embedded_text_encoder, "TOKENIZER_PROMPTS", 50):
        tokenizer = embedded_text_encoder.new_tokenizer()
    text_encoder = embedded_text_encoder.new_text_encoder(tokenizer, sizes.text_width, sizes.text_layers)
    return train_unet.new_pipeline(train_unet.new_vae(sizes), text_encoder, tokenizer, sizes)


PIPELINES: dict[str, Callable[[], Any]] = {
    "sd": stable_diffusion,
    "sd2": stable_diffusion_2,
    "sdxl": sdxl_turbo,
    "deepfloyd": deepfloyd,
    "dit": dit,
    "pixart": pixart,
    "sd3": stable_diffusion_3,
    "flux": flux,
    "world": world,
}


def save(name: str, folder: Path) -> Path:
    """Save the pipeline of that name and say where."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        PIPELINES[name]().save_pretrained(folder / name)
    return folder / name
