import pytest
import torch
from diffusers import AutoencoderKL
from small_latents import small_unet

from vaelab import removal


@pytest.fixture(params=["with its own 1x1 convolutions", "without"])
def vae(request):
    torch.manual_seed(0)
    there = request.param != "without"
    return AutoencoderKL(
        block_out_channels=(8, 16), down_block_types=["DownEncoderBlock2D"] * 2,
        up_block_types=["UpDecoderBlock2D"] * 2, norm_num_groups=4, latent_channels=4, use_quant_conv=there,
        use_post_quant_conv=there,
    ).eval()  # fmt: skip


@torch.no_grad()
@pytest.mark.parametrize("kept", [[0, 2], [3], [0, 1, 2, 3], [2, 0]])
def test_without_the_channels_the_models_do_what_they_did_with_zeros_there(vae, kept):
    whole_unet = small_unet()
    narrow = removal.remove(vae, whole_unet, kept)
    kept = sorted(kept)
    pixels, latents = torch.rand(2, 3, 16, 16), torch.randn(2, 4, 8, 8)
    silent = torch.zeros_like(latents)
    silent[:, kept] = latents[:, kept]
    before, after = vae.encode(pixels).latent_dist, narrow.vae.encode(pixels).latent_dist
    close = {"rtol": 1e-4, "atol": 1e-5}
    torch.testing.assert_close(after.mean, before.mean[:, kept], **close)
    torch.testing.assert_close(after.std, before.std[:, kept], **close)
    torch.testing.assert_close(narrow.vae.decode(latents[:, kept]).sample, vae.decode(silent).sample, **close)
    torch.testing.assert_close(
        narrow.unet(latents[:, kept], 500).sample, whole_unet(silent, 500).sample[:, kept], **close
    )
    assert narrow.vae.config.latent_channels == narrow.unet.config.in_channels == len(kept)
    assert vae.config.latent_channels == 4 and whole_unet.conv_in.in_channels == 4


@pytest.mark.parametrize("kept", [[], [4], [-1], [1, 1]])
def test_channels_that_are_not_there_are_refused(tiny_vae, kept):
    with pytest.raises(ValueError, match="kept: expected different channels from 0 to 3, got"):
        removal.remove(tiny_vae, small_unet(), kept)
