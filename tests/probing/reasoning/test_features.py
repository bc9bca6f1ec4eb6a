"""Parts of streams: tokens of image encoders, maps of a denoiser, controls; and names that make no sense."""

import pytest
import torch
import transformers
from small_pipelines import save_whole_clip

from vaelab.probing.layer_features import digest
from vaelab.probing.reasoning import features as module
from vaelab.probing.reasoning.features import (
    FeatureTable,
    PictureFeatures,
    load_image_encoder,
    stream_layers,
    stream_parts,
    untrained_denoiser,
)

LAYER = "up_ft0.t25"


@pytest.fixture(scope="module")
def encoder(clip_folder):
    return load_image_encoder(str(clip_folder), device="cpu")


@pytest.fixture(scope="module")
def pixels():
    return torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1


def dinov2(folder, patch=8, **changes):
    size = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "mlp_ratio": 2}
    config = transformers.Dinov2Config(**size, image_size=32, patch_size=patch, **changes)
    transformers.Dinov2Model(config).save_pretrained(folder)
    sides = {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}}
    transformers.BitImageProcessor(**sides).save_pretrained(folder)
    return load_image_encoder(str(folder), device="cpu", parameter="other_encoder")


def test_streams_are_split_into_parts_and_layers():
    assert stream_parts("clip + up_ft1.t25") == ("clip", "up_ft1.t25")
    assert stream_parts("none") == ()
    assert stream_layers(["clip + up_ft1.t25", "untrained:up_ft1.t25", "clip + mid.t0", "noise"]) == [
        "up_ft1.t25", "mid.t0"
    ]  # fmt: skip
    for wrong in ("clap", "clip + up_ft1", "up_ft1.tx", "clip + none", ""):
        with pytest.raises(ValueError, match=r"^streams: .* is no part; expected clip, other, noise, none, or a block"):
            stream_parts(wrong)


def test_clip_gives_its_patches_before_the_last_layer(encoder, pixels):
    model, images = encoder.model, encoder.processor
    bytes_ = [((picture + 1) * 127.5).round().to(torch.uint8).permute(1, 2, 0).numpy() for picture in pixels]
    inputs = images(bytes_, return_tensors="pt")["pixel_values"]
    states = model(pixel_values=inputs, output_hidden_states=True).hidden_states
    assert torch.equal(encoder(pixels), states[-2][:, 1:]) and encoder(pixels).shape == (3, 16, 16)


def test_dinov2_gives_as_many_tokens_and_another_number_is_refused(encoder, pixels, tmp_path):
    assert dinov2(tmp_path / "same")(pixels).shape == (3, 16, 16)
    features = PictureFeatures(("clip", "other"), encoder, dinov2(tmp_path / "other", patch=16))
    with pytest.raises(ValueError, match=r"^other_encoder: other gives 4 tokens of a picture, .* gives 16"):
        features(pixels)


def test_other_kinds_of_models_are_refused(tmp_path):
    transformers.BertConfig().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"^image_encoder: .* holds a bert model; expected CLIP, DINOv2 or"):
        load_image_encoder(str(tmp_path))
    with pytest.raises(ValueError, match=r"^image_encoder: 'nowhere' is neither a folder nor an id"):
        load_image_encoder("nowhere")


@pytest.fixture(scope="module")
def computed(encoder, pixels, small_pipeline):
    pipeline = small_pipeline("sd")
    parts = ("clip", LAYER, f"untrained:{LAYER}", "noise")
    pipelines = {"": pipeline, "untrained:": untrained_denoiser(pipeline, seed=0)}
    return PictureFeatures(parts, encoder, pipelines=pipelines)


def test_every_part_depends_on_its_picture_alone(computed, pixels):
    whole = computed(pixels)
    assert {part: tuple(values.shape) for part, values in whole.items()} == {
        "clip": (3, 16, 16), LAYER: (3, 16, 16, 32), f"untrained:{LAYER}": (3, 16, 16, 32), "noise": (3, 16, 16),
    }  # fmt: skip
    alone = computed(pixels[1:2])
    for part, values in whole.items():
        assert torch.allclose(values[1], alone[part][0], atol=1e-4), part
        assert not torch.allclose(values[0], values[1], atol=1e-2), part
    assert not torch.allclose(whole[LAYER], whole[f"untrained:{LAYER}"], atol=1e-2)


def test_noise_is_standard_normal_and_has_the_shape_of_the_tokens(encoder):
    many = torch.rand(40, 3, 32, 32) * 2 - 1
    noise = PictureFeatures(("noise",), encoder)(many)["noise"]
    assert abs(noise.mean()) < 0.05 and abs(noise.std() - 1) < 0.05
    assert len({digest(picture) for picture in many}) == 40


def test_features_are_held_and_standardized_by_their_channels(computed, pixels, monkeypatch):
    table = FeatureTable(computed, lambda rows: pixels[list(rows)], 3, batch_size=2)
    assert torch.equal(table.take([2, 0])["clip"], computed(pixels)["clip"][[2, 0]].half().float())
    statistics = table.statistics()[LAYER]
    flat = table.take(range(3))[LAYER].reshape(-1, 32)
    assert torch.allclose(statistics.mean, flat.mean(0)) and statistics.deviation.shape == (32,)
    monkeypatch.setattr(module, "HELD_BYTES", 0)
    computing = FeatureTable(computed, lambda rows: pixels[list(rows)], 3, batch_size=2)
    assert torch.allclose(computing.take([2, 0])["clip"], table.take([2, 0])["clip"], atol=1e-2)


def test_a_clip_saved_elsewhere_is_loaded(tmp_path):
    assert load_image_encoder(str(save_whole_clip(tmp_path / "own")), device="cpu").name == "own"
