"""Weights that are damaged, missing, unused or not finite, and models that need more than a prompt, are refused."""

import json
import shutil

import diffusers
import pytest
import torch
from safetensors.torch import load_file, save_file

from vaelab import models
from vaelab.models import load_pipeline, load_vae

WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture
def own_folder(pipeline_folder, tmp_path):
    """A copy of a small pipeline's folder, to be changed."""
    return lambda name: shutil.copytree(pipeline_folder(name), tmp_path / "own" / name)


@pytest.fixture
def saved(tiny_vae, tmp_path):
    tiny_vae.save_pretrained(tmp_path / "vae")
    return tmp_path / "vae"


def rewrite(file, change):
    state = load_file(file)
    change(state)
    save_file({key: value.contiguous() for key, value in state.items()}, file, {"format": "pt"})


def without(ending):
    return lambda state: state.pop(next(key for key in state if key.endswith(ending)))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused_by_name(saved, own_folder, value):
    def spoil(state):
        next(tensor for key, tensor in state.items() if key.endswith("conv_in.weight"))[0, 0, 0, 0] = value

    rewrite(saved / WEIGHTS, spoil)
    with pytest.raises(ValueError, match=r"^model: .* has NaN or infinite entries in \w+.conv_in.weight"):
        load_vae(str(saved), device="cpu")
    folder = own_folder("dit")
    rewrite(folder / "vae" / WEIGHTS, spoil)
    with pytest.raises(ValueError, match=r"^model: .*\(vae\) has NaN or infinite entries in \w+.conv_in.weight"):
        load_pipeline(str(folder), device="cpu")


def test_weights_that_overflow_in_float16_are_refused(saved):
    config = json.loads((saved / "config.json").read_text())
    (saved / "config.json").write_text(json.dumps({**config, "force_upcast": False}))
    rewrite(saved / WEIGHTS, lambda state: state["encoder.conv_in.weight"].fill_(1e6))
    load_vae(str(saved), device="cpu")
    with pytest.raises(ValueError, match=r"infinite entries in encoder.conv_in.weight \(torch.float16\)"):
        load_vae(str(saved), device="cpu", precision="float16")


def test_a_text_model_without_its_token_embedding_is_not_completed_at_random(own_folder):
    folder = own_folder("sd")
    file = folder / "text_encoder" / "model.safetensors"
    rewrite(file, lambda state: state.update({"text_model.embeddings.position_ids": torch.arange(16)[None]}))
    load_pipeline(str(folder), device="cpu")  # what old checkpoints hold and no model needs
    rewrite(file, without("token_embedding.weight"))
    with pytest.raises(ValueError, match=r"^model: .*\(text_encoder\) lacks the weights .*token_embedding.weight"):
        load_pipeline(str(folder), device="cpu")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without("conv_norm_out.weight"), "lacks the weights .*conv_norm_out.weight"),
        (
            lambda state: state.update({"extra.weight": torch.zeros(2)}),
            "its configuration does not use: extra.weight",
        ),
        (lambda state: state.update({"encoder.conv_in.bias": torch.zeros(3)}), "encoder.conv_in.bias expected shape"),
    ],
)
def test_weights_and_configuration_must_agree(saved, change, message):
    rewrite(saved / WEIGHTS, change)
    with pytest.raises(ValueError, match=f"^model: .*{message}"):
        load_vae(str(saved), device="cpu")


@pytest.mark.parametrize("part", ["unet/" + WEIGHTS, "text_encoder/model.safetensors", "vae/config.json"])
def test_a_damaged_file_is_named(own_folder, part):
    folder = own_folder("sd")
    contents = (folder / part).read_bytes()
    (folder / part).write_bytes(contents[: len(contents) // 2])
    with pytest.raises(ValueError, match=rf"^model: .*{part}.* of .* is damaged"):
        load_pipeline(str(folder), device="cpu")


@pytest.mark.parametrize("file", [WEIGHTS, "config.json"])
def test_a_damaged_file_of_an_autoencoder_is_named(saved, file):
    (saved / file).write_bytes(b"\xff" * 50)
    with pytest.raises(ValueError, match=rf"^model: {file} of .* is damaged"):
        load_vae(str(saved), device="cpu")


def test_a_variant_that_is_not_there_lists_those_that_are(tiny_vae, small_pipeline, tmp_path):
    tiny_vae.save_pretrained(tmp_path / "half", variant="fp16")
    with pytest.raises(ValueError, match=r"^variant: .* has no weights of variant 'none'; it has fp16"):
        load_vae(str(tmp_path / "half"), device="cpu")
    assert torch.equal(
        load_vae(str(tmp_path / "half"), device="cpu", variant="fp16").encoder.conv_in.weight,
        tiny_vae.encoder.conv_in.weight,
    )
    small_pipeline("sd").save_pretrained(tmp_path / "sd", variant="fp16")
    with pytest.raises(ValueError, match=r"^variant: .* has no weights of variant 'bf16' in \w+; it has fp16"):
        load_pipeline(str(tmp_path / "sd"), device="cpu", variant="bf16")


def test_a_single_file_with_a_local_configuration(saved, tiny_vae, tmp_path):
    file = tmp_path / "elsewhere" / "sd-vae.safetensors"
    file.parent.mkdir()
    (saved / WEIGHTS).rename(file)
    vae = load_vae(str(file), device="cpu", config=str(saved))
    assert all(torch.equal(value, vae.state_dict()[key]) for key, value in tiny_vae.state_dict().items())
    shutil.copy(saved / "config.json", file.parent)
    load_vae(str(file), device="cpu")
    assert models.identity("embedded", kind="vae")["sha256"] != models.identity(str(file), kind="vae")["sha256"]
    rewrite(file, without("conv_norm_out.weight"))
    with pytest.raises(ValueError, match=r"^model: .*conv_norm_out.weight"):
        load_vae(str(file), device="cpu")


@pytest.mark.parametrize(
    ("name", "part", "entries", "message"),
    [
        ("sd", "unet", {"in_channels": 9}, "its unet takes 9 channels where its autoencoder gives 4"),
        ("sd", "unet", {"in_channels": 8}, "its unet takes 8 channels where its autoencoder gives 4"),
        ("deepfloyd", "unet", {"in_channels": 6}, "its unet takes 6 channels where a picture has 3"),
        (
            "flux",
            "transformer",
            {"in_channels": 96},
            "its transformer takes 96 channels where its autoencoder",
        ),
        ("sd", "unet", {"class_embed_type": "projection"}, "its unet takes class labels or a noise level"),
        ("sd", "unet", {"addition_embed_type": "image"}, "its unet takes the embedding of a picture"),
    ],
)
def test_models_that_need_more_than_a_prompt_are_refused_with_the_reason(own_folder, name, part, entries, message):
    folder = own_folder(name)
    config = json.loads((folder / part / "config.json").read_text())
    (folder / part / "config.json").write_text(json.dumps({**config, **entries}))
    with pytest.raises(ValueError, match=f"^model: .* is no text-to-image or class-conditional model: {message}"):
        load_pipeline(str(folder), device="cpu")


def test_autoencoders_of_something_else_than_rgb_pictures_are_refused(tmp_path):
    diffusers.AutoencoderKL(in_channels=1, out_channels=1, block_out_channels=(8,), norm_num_groups=4).save_pretrained(
        tmp_path / "grey"
    )
    with pytest.raises(ValueError, match=r"^model: .* of pictures with 1 channel; supported are"):
        load_vae(str(tmp_path / "grey"), device="cpu")
    (tmp_path / "sound").mkdir()
    (tmp_path / "sound" / "config.json").write_text(json.dumps({"_class_name": "AutoencoderOobleck"}))
    with pytest.raises(ValueError, match=r"^model: .* is a AutoencoderOobleck of sounds"):
        load_vae(str(tmp_path / "sound"), device="cpu")
