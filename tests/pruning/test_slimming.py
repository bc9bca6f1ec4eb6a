import pytest
import torch
from diffusers import AutoencoderKL
from small_latents import small_unet

from vaelab.pruning import slimming


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
    narrow = slimming.remove_channels(vae, whole_unet, kept)
    kept = sorted(kept)
    pixels, latents = torch.rand(2, 3, 16, 16), torch.randn(2, 4, 8, 8)
    zeroed = torch.zeros_like(latents)
    zeroed[:, kept] = latents[:, kept]
    before, after = vae.encode(pixels).latent_dist, narrow.vae.encode(pixels).latent_dist
    close = {"rtol": 1e-4, "atol": 1e-5}
    torch.testing.assert_close(after.mean, before.mean[:, kept], **close)
    torch.testing.assert_close(after.std, before.std[:, kept], **close)
    torch.testing.assert_close(narrow.vae.decode(latents[:, kept]).sample, vae.decode(zeroed).sample, **close)
    torch.testing.assert_close(
        narrow.unet(latents[:, kept], 500).sample, whole_unet(zeroed, 500).sample[:, kept], **close
    )
    assert narrow.vae.config.latent_channels == narrow.unet.config.in_channels == len(kept)
    assert vae.config.latent_channels == 4 and whole_unet.conv_in.in_channels == 4


@pytest.mark.parametrize("kept", [[], [4], [-1], [1, 1]])
def test_channels_that_are_not_there_are_refused(tiny_vae, kept):
    with pytest.raises(ValueError, match="kept: expected different channels from 0 to 3, got"):
        slimming.remove_channels(tiny_vae, small_unet(), kept)


def test_savings_count_what_is_gone_and_time_each_part(tiny_vae):
    table = slimming.savings_table(tiny_vae, small_unet(), [2, 0, 1, 3], torch.randn(2, 4, 8, 8), rounds=2)
    assert list(zip(table["part"], table["kept"], table["repeat"], strict=True)) == [
        (part, kept, repeat) for part in ("denoise", "decode")
        for kept, repeat in ((4, False), (4, True), (3, False), (2, False), (1, False))
    ]  # fmt: skip
    denoise = table[table["part"] == "denoise"].set_index("kept")["parameters"]
    gone_with_one = 9 * 8 + 9 * 8 + 1  # of conv_in, of conv_out, and a bias
    assert denoise[3] == denoise.iloc[0] - gone_with_one and denoise[1] == denoise.iloc[0] - 3 * gone_with_one
    assert (table["milliseconds"] > 0).all() and (table["peak_bytes"] > 0).all()
    assert table.loc[0, "saved"] == 0
    assert (table["saved_low"] <= table["saved"]).all() and (table["saved"] <= table["saved_high"]).all()


def test_peak_memory_is_what_is_held_at_once():
    def holds_two_of_three(_):
        first = torch.ones(1 << 18)
        second = first + 1
        del first
        return second * 2

    found = slimming.peak_memory_bytes(holds_two_of_three, torch.device("cpu"))
    assert found == pytest.approx(2 * 4 * (1 << 18), rel=0.05)
