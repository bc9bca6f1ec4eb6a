import numpy as np
import pytest
import torch

from vaelab import data, models
from vaelab.training.checkpoint import read_tensors, write_tensors
from vaelab.training.loop import TrainConfig
from vaelab.vae import logit_lens


@pytest.fixture
def planted():
    """Channel 0 is the picture's brightness at half its side, channel 1 the same a thousand times
    smaller, channel 2 noise, channel 3 constant."""
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(200, 1, 4, 4, generator=generator)
    pictures = torch.nn.functional.interpolate(coarse, scale_factor=2).expand(-1, 3, -1, -1).contiguous()
    noise = torch.randn(200, 1, 4, 4, generator=generator)
    maps = torch.cat([coarse, 1e-3 * coarse, noise, torch.full_like(coarse, 0.3)], dim=1)
    return (maps[:160], pictures[:160]), (maps[160:], pictures[160:])


CONFIG = TrainConfig(steps=250, learning_rate=1e-2, device="cpu", seed=0)


def test_shapes_and_range():
    decoder = logit_lens.MiniDecoder(6, 4, width=5)
    pictures = decoder(torch.randn(2, 6, 8, 8))
    assert pictures.shape == (2, 1, 3, 32, 32)
    assert pictures.min() >= 0 and pictures.max() <= 1
    assert logit_lens.MiniDecoder(1, 1, groups=3)(torch.randn(2, 3, 8, 8)).shape == (2, 3, 3, 8, 8)


def test_upsampling_must_be_a_power_of_two():
    with pytest.raises(ValueError, match="upsampling"):
        logit_lens.MiniDecoder(4, 3)


def test_grouped_decoders_are_as_independent_as_separate_ones():
    decoder = logit_lens.MiniDecoder(1, 2, width=4, groups=3)
    maps = torch.randn(2, 3, 4, 4)
    changed = maps.clone()
    changed[:, 1] += 1
    first, second = decoder(maps), decoder(changed)
    assert torch.equal(first[:, [0, 2]], second[:, [0, 2]])
    assert not torch.equal(first[:, 1], second[:, 1])


def test_a_full_map_that_holds_the_picture_is_read_and_shuffling_destroys_it(planted):
    trained = logit_lens.train_lens(*planted, CONFIG, width=8)
    assert trained.score.r2[0] > 0.9
    assert trained.shuffled.r2[0] < 0.1
    assert trained.score.psnr[0] > trained.shuffled.psnr[0] + 5


def test_single_channels_are_scored_each_for_what_it_holds(planted):
    trained = logit_lens.train_lens(*planted, CONFIG, channels=[0, 1, 2, 3], width=8)
    bright, small, noise, constant = trained.score.r2
    assert bright > 0.9 and small > 0.9
    assert noise < 0.1 and constant < 0.1
    assert (trained.shuffled.r2 < 0.1).all()


def test_scores_are_their_formulas(planted):
    learning, (maps, pictures) = planted
    trained = logit_lens.train_lens(learning, (maps, pictures), TrainConfig(steps=5, device="cpu"), width=4)
    read_off = (logit_lens.apply_lens(trained, maps)[:, 0] + 1) / 2
    mse = (read_off - pictures).double().square().mean()
    nothing = (learning[1].mean(dim=0) - pictures).double().square().mean()
    assert trained.score.r2[0] == pytest.approx(float(1 - mse / nothing), abs=1e-5)
    assert trained.score.psnr[0] == pytest.approx(float(10 * torch.log10(1 / mse)), abs=1e-3)


SHORT = TrainConfig(steps=5, device="cpu")


def test_the_interval_is_around_the_score_and_narrows_with_more_pictures(planted):
    learning, (maps, pictures) = planted
    trained = logit_lens.train_lens(*planted, CONFIG, width=8)
    mean = learning[1].mean(dim=0)
    score = logit_lens.r2_interval(trained, maps, pictures, mean)
    assert score.mean == pytest.approx(trained.score.r2[0], abs=1e-6)
    assert score.low < score.mean < score.high
    few = logit_lens.r2_interval(trained, maps[:4], pictures[:4], mean)
    assert few.high - few.low > score.high - score.low
    assert np.isnan(logit_lens.r2_interval(trained, maps[:1], pictures[:1], mean).low)
    single = trained._replace(channels=[3], score=trained.score, shuffled=trained.shuffled)
    text = logit_lens.describe_scores("norm", {"baseline": score}, trained, single)
    assert f"{score.mean:.3g} (baseline, {score.low:.3g} to" in text and "3 is the best" in text


@pytest.mark.parametrize("channels", [None, [0, 2]])
def test_a_saved_lens_is_loaded_instead_of_trained_and_decodes_the_same(planted, tmp_path, monkeypatch, channels):
    settings = {"channels": channels, "width": 4, "folder": tmp_path}
    trained = logit_lens.train_lens(*planted, SHORT, **settings)
    monkeypatch.delattr(logit_lens, "train")
    loaded = logit_lens.train_lens(*planted, SHORT, **settings)
    maps = planted[1][0]
    assert torch.equal(logit_lens.apply_lens(loaded, maps), logit_lens.apply_lens(trained, maps))
    assert loaded.channels == channels and not loaded.decoder.training
    for first, second in ((loaded.score, trained.score), (loaded.shuffled, trained.shuffled)):
        assert np.array_equal(first.r2, second.r2) and np.array_equal(first.psnr, second.psnr)


def test_a_lens_of_other_data_or_settings_is_refused(planted, tmp_path):
    learning, held_out = planted
    logit_lens.train_lens(*planted, SHORT, width=4, folder=tmp_path)
    changed = learning[0].clone()
    changed[-1, -1, -1, -1] += 1e-3
    with pytest.raises(ValueError, match=r"lens\.safetensors was made with other settings \(learning\.activations"):
        logit_lens.train_lens((changed, learning[1]), held_out, SHORT, width=4, folder=tmp_path)
    with pytest.raises(ValueError, match=r"other settings .channels None there, .0. here"):
        logit_lens.train_lens(*planted, SHORT, channels=[0], width=4, folder=tmp_path)
    with pytest.raises(ValueError, match="width 4 there, 5 here"):
        logit_lens.train_lens(*planted, SHORT, width=5, folder=tmp_path)


@pytest.mark.parametrize("name", ["decoder/layers.0.weight", "decoder/scale", "shuffled/r2"])
def test_a_lens_with_nan_is_neither_saved_nor_loaded(planted, tmp_path, name):
    lens = logit_lens.train_lens(*planted, SHORT, width=4, folder=tmp_path)
    path = tmp_path / logit_lens.LENS
    whole = path.read_bytes()
    tensors, documents = read_tensors(path)
    tensors[name].view(-1)[0] = float("nan")
    write_tensors(path, tensors, documents)
    with pytest.raises(ValueError, match=rf"lens\.safetensors cannot be used: {name} is NaN or infinite"):
        logit_lens.load_lens(tmp_path)
    path.write_bytes(whole)
    target = lens.shuffled.r2 if name == "shuffled/r2" else lens.decoder.state_dict()[name.removeprefix("decoder/")]
    target.reshape(-1)[0] = float("nan")
    with pytest.raises(FloatingPointError, match=f"{name} of the lens is NaN or infinite"):
        logit_lens.save_lens(lens, tmp_path)
    assert path.read_bytes() == whole


def test_a_damaged_or_foreign_lens_is_refused_by_its_path(planted, tmp_path):
    logit_lens.train_lens(*planted, SHORT, width=4, folder=tmp_path)
    path = tmp_path / logit_lens.LENS
    whole = path.read_bytes()
    for damaged in (whole[:-1], whole[:-1] + bytes([whole[-1] ^ 1]), b"", b"not a lens"):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"lens\.safetensors is damaged"):
            logit_lens.load_lens(tmp_path)
    write_tensors(path, {"x": torch.zeros(1)}, {"signature": {}})
    with pytest.raises(ValueError, match=r"lens\.safetensors is no lens"):
        logit_lens.load_lens(tmp_path)
    write_tensors(
        path, {"x": torch.zeros(1)}, {"lens": {"channels": 4, "upsampling": 2}, "channels": None, "settings": {}}
    )
    with pytest.raises(ValueError, match=r"lens\.safetensors does not hold the tensors of its lens"):
        logit_lens.load_lens(tmp_path)
    path.unlink()
    with pytest.raises(ValueError, match=r"lens\.safetensors is missing"):
        logit_lens.load_lens(tmp_path)


def test_channels_beyond_the_layer_are_refused(planted):
    with pytest.raises(ValueError, match="channels: the layer has channels 0 to 3"):
        logit_lens.train_lens(*planted, CONFIG, channels=[4])


def test_extremes_are_the_most_and_least_active():
    maps = torch.tensor([3.0, -9.0, 0.1, 1.0, 0.0]).view(1, 5, 1, 1).expand(2, 5, 2, 2)
    assert logit_lens.extreme_channels(maps, 2) == [1, 0, 2, 4]
    assert sorted(logit_lens.extreme_channels(maps, 9)) == [0, 1, 2, 3, 4]


LAYER = "encoder.down_blocks.0.resnets.0.norm2"


def test_activations_come_with_their_own_pictures(tiny_vae):
    images = data.load_images("digits", resolution=16, max_images=5)
    maps, pictures = logit_lens.layer_activations(tiny_vae, LAYER, images, batch_size=2)
    assert len(maps) == len(pictures) == 5
    assert torch.allclose(pictures * 2 - 1, images.stack())
    alone, _ = logit_lens.layer_activations(tiny_vae, LAYER, images, batch_size=1)
    assert torch.allclose(maps, alone, atol=1e-5)


def test_a_layer_that_gives_no_map_is_refused(tiny_vae):
    images = data.load_images("digits", resolution=16, max_images=2)
    with pytest.raises(ValueError, match=r"gives \(B, C, H, W\)"):
        logit_lens.layer_activations(tiny_vae, "encoder.mid_block.attentions.0.group_norm", images, 2)


def test_through_the_model(tiny_vae):
    pixels = torch.rand(2, 3, 16, 16) * 2 - 1
    whole = logit_lens.decode_single_channel(tiny_vae, LAYER, pixels, None, keep=True)
    assert torch.equal(whole, models.reconstruct(tiny_vae, pixels))
    alone = logit_lens.decode_single_channel(tiny_vae, LAYER, pixels, 1, keep=True)
    without = logit_lens.decode_single_channel(tiny_vae, LAYER, pixels, 1, keep=False)
    assert not torch.allclose(alone, whole, atol=1e-4) and not torch.allclose(without, whole, atol=1e-6)
    with pytest.raises(ValueError, match="channel"):
        logit_lens.decode_single_channel(tiny_vae, LAYER, pixels, 99, keep=True)


def test_ablating_a_channel_that_is_constant_changes_nothing(tiny_vae):
    norm = tiny_vae.get_submodule(LAYER)
    with torch.no_grad():
        norm.weight[2] = norm.bias[2] = 0
    pixels = torch.rand(2, 3, 16, 16) * 2 - 1
    without = logit_lens.decode_single_channel(tiny_vae, LAYER, pixels, 2, keep=False)
    assert np.allclose(without.numpy(), models.reconstruct(tiny_vae, pixels).detach().numpy())
