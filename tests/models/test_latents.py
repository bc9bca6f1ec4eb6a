"""Latents are scaled as diffusers' own pipelines scale them, and come back as the picture."""

import json
import shutil
from pathlib import Path

import diffusers
import pytest
import torch
from diffusers.schedulers.scheduling_utils import SchedulerOutput
from small_pipelines import PIPELINES

from vaelab.models import (
    decode_latents,
    encode_latents,
    load_pipeline,
    load_vae,
    loading,
    posterior,
    scale_latents,
    unscale_latents,
)
from vaelab.models.conditioning import encode_pictures

MEAN, STD = [0.1, -0.2, 0.3, 0.4], [1.5, 0.5, 2.0, 0.7]


def pictures(side=32, count=1):
    return torch.rand(count, 3, side, side, generator=torch.Generator().manual_seed(2)) * 2 - 1


def drawn_from(pipeline, name, latents):
    """The picture that a pipeline's own decoding and post-processing make of these latents as the last step's."""
    side = 8 * latents.shape[-1] if name == "pixart" else 2 * latents.shape[-1]
    if name == "flux":
        batch, channels, height, width = latents.shape
        latents = pipeline._pack_latents(latents, batch, channels, height, width)
    pipeline.scheduler.step = lambda *_, **__: SchedulerOutput(prev_sample=latents)
    given = {"class_labels": [3]} if name == "dit" else {"prompt": "a red circle", "height": side, "width": side}
    if name == "pixart":
        given |= {"use_resolution_binning": False, "clean_caption": False}
    made = pipeline(**given, num_inference_steps=2, guidance_scale=1.0, output_type="np").images
    return torch.from_numpy(made).permute(0, 3, 1, 2)


@pytest.mark.parametrize("name", [*(name for name in PIPELINES if name != "deepfloyd"), "playground"])
def test_encoded_pictures_come_back_through_the_pipelines_own_decoding(pipeline_folder, name):
    pipeline = load_pipeline(str(pipeline_folder("sdxl" if name == "playground" else name)), device="cpu")
    pipeline.set_progress_bar_config(disable=True)
    if name == "playground":  # SDXL's structure, with statistics of its latents
        pipeline.vae.register_to_config(latents_mean=MEAN, latents_std=STD, scaling_factor=0.5)
    pixels = pictures(64 if name in ("pixart", "world") else 32)
    with torch.no_grad():
        expected = loading.reconstruct(pipeline.vae, pixels) / 2 + 0.5
        drawn = drawn_from(pipeline, name, encode_pictures(pipeline, pixels))
    torch.testing.assert_close(drawn, expected.clamp(0, 1), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", ["sd", "dit"])
def test_statistics_that_a_pipeline_ignores_are_not_used_and_said(pipeline_folder, tmp_path, capsys, name):
    folder = Path(shutil.copytree(pipeline_folder(name), tmp_path / name))
    config = json.loads((folder / "vae" / "config.json").read_text())
    statistics = {"latents_mean": MEAN, "latents_std": STD, "scaling_factor": 0.5}
    (folder / "vae" / "config.json").write_text(json.dumps({**config, **statistics}))
    pipeline = load_pipeline(str(folder), device="cpu")
    assert "latents_mean and latents_std are not used; " in capsys.readouterr().out
    with torch.no_grad():
        expected = loading.reconstruct(pipeline.vae, pictures()) / 2 + 0.5
        torch.testing.assert_close(
            encode_pictures(pipeline, pictures()), encode_latents(pipeline.vae, pictures()) * 0.5
        )
        drawn = drawn_from(pipeline, name, encode_pictures(pipeline, pictures()))
    torch.testing.assert_close(drawn, expected.clamp(0, 1), atol=1e-5, rtol=1e-4)


def test_latents_with_statistics_by_the_formula(tiny_vae):
    tiny_vae.register_to_config(latents_mean=MEAN, latents_std=STD, scaling_factor=0.5)
    latents = torch.randn(2, 4, 3, 5, dtype=torch.float64)
    mean, std = (torch.tensor(values, dtype=torch.float64).view(1, 4, 1, 1) for values in (MEAN, STD))
    scaled = scale_latents(tiny_vae, latents)
    torch.testing.assert_close(scaled, (latents - mean) / std * 0.5, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(unscale_latents(tiny_vae, scaled), latents, atol=1e-6, rtol=1e-6)


def test_latents_of_flux_2_have_the_statistics_of_its_batch_norm(tmp_path):
    vae = diffusers.AutoencoderKLFlux2(
        block_out_channels=(8, 16), down_block_types=["DownEncoderBlock2D"] * 2, layers_per_block=1,
        up_block_types=["UpDecoderBlock2D"] * 2, latent_channels=4, norm_num_groups=4,
    )  # fmt: skip
    vae.bn.running_mean.normal_()
    vae.bn.running_var.uniform_(0.5, 2)
    vae.save_pretrained(tmp_path)
    vae, pixels = load_vae(str(tmp_path), device="cpu"), pictures(count=2)
    pipeline = diffusers.Flux2Pipeline.__new__(diffusers.Flux2Pipeline)
    diffusers.DiffusionPipeline.__init__(pipeline)
    pipeline.vae = vae
    with torch.no_grad():
        expected = pipeline._unpatchify_latents(pipeline._encode_vae_image(pixels, None))
        scaled = scale_latents(vae, encode_latents(vae, pixels))
        torch.testing.assert_close(scaled, expected)
        assert not torch.allclose(scaled, encode_latents(vae, pixels), atol=0.1)
        torch.testing.assert_close(unscale_latents(vae, scaled), encode_latents(vae, pixels), atol=1e-5, rtol=1e-5)
    with pytest.raises(ValueError, match=r"^resolution: latents of 3 x 4; this model takes patches of 2 x 2"):
        scale_latents(vae, torch.zeros(1, 4, 3, 4))


@pytest.mark.parametrize("kind", [diffusers.AutoencoderKLWan, diffusers.AutoencoderKLQwenImage])
def test_autoencoders_of_videos_take_a_picture_as_one_frame(tmp_path, kind):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        kind(
            base_dim=8, z_dim=4, dim_mult=[1, 1], num_res_blocks=1, temperal_downsample=[False],
            latents_mean=MEAN, latents_std=STD,
        ).save_pretrained(tmp_path)  # fmt: skip
    vae, pixels = load_vae(str(tmp_path), device="cpu"), pictures(16, count=2)
    with torch.no_grad():
        distribution = vae.encode(pixels[:, :, None]).latent_dist
        latents = encode_latents(vae, pixels)
        assert torch.equal(latents, distribution.mean[:, :, 0])
        assert torch.equal(posterior(vae, pixels).mean, latents)
        assert posterior(vae, pixels).kl().shape == (2,)
        expected = vae.decode(distribution.mean).sample[:, :, 0]
        assert torch.equal(decode_latents(vae, latents, pixels.shape), expected)
    mean, std = (torch.tensor(values).view(1, 4, 1, 1) for values in (MEAN, STD))
    torch.testing.assert_close(scale_latents(vae, latents), (latents - mean) / std)
