import shutil

import pytest
import torch

from vaelab import models
from vaelab.hooks import find_layers
from vaelab.models.block_names import find_denoiser


@pytest.fixture(scope="module", params=["sdxl", "flux", "dit"])
def without_weights(request, pipeline_folder, tmp_path_factory):
    """A pipeline's name and its folder without any file of weights."""
    folder = tmp_path_factory.mktemp("configurations") / request.param
    shutil.copytree(pipeline_folder(request.param), folder, ignore=shutil.ignore_patterns("*.safetensors"))
    return request.param, str(folder)


def test_names_of_blocks_are_checked_without_weights(without_weights, small_pipeline):
    name, folder = without_weights
    with pytest.raises(ValueError, match="model: "):
        models.load_pipeline(folder, device="cpu")
    known = list(models.blocks(small_pipeline(name)))
    assert models.check_blocks(folder, "*") == known
    with pytest.raises(ValueError, match=rf"^blocks: unknown name 'blok'; the nearest of {len(known)}"):
        models.check_blocks(folder, [known[0], "blok"])
    with pytest.raises(ValueError, match=r"^layers: expected at least one, got none"):
        models.check_blocks(folder, [], parameter="layers")


def test_timesteps_are_checked_without_weights(without_weights):
    name, folder = without_weights
    last = 1000 if name == "flux" else 999
    models.check_timesteps(folder, [0, last])
    for wrong in ([25, last + 1], []):
        with pytest.raises(ValueError, match=rf"^timesteps: expected numbers from 0 to {last}, got "):
            models.check_timesteps(folder, wrong)


def test_modules_are_those_of_the_loaded_denoiser(without_weights, small_pipeline):
    name, folder = without_weights
    bare, loaded = models.denoiser_without_weights(folder), find_denoiser(small_pipeline(name))
    assert {path: value.shape for path, value in bare.named_parameters()} == {
        path: value.shape for path, value in loaded.named_parameters()
    }
    assert {value.device for value in bare.parameters()} == {torch.device("meta")}


def test_a_block_without_the_side_is_an_error(pipeline_folder):
    folder = str(pipeline_folder("sdxl"))
    with pytest.raises(ValueError, match=r"^blocks: up_blocks.0 takes .* so it has no update; use side output"):
        models.check_blocks(folder, ["up.0.1", "up_ft0"], side="update")
    assert models.check_blocks(folder, ["up.0.1", "up_ft0"]) == ["up.0.1", "up_ft0"]


def test_a_layer_of_the_prompt_is_an_error(pipeline_folder):
    with pytest.raises(ValueError, match=r"^layer: context_embedder works on the text's tokens"):
        models.check_blocks(str(pipeline_folder("flux")), "context_embedder", parameter="layer")


def test_an_unknown_model_is_named_by_its_own_parameter():
    with pytest.raises(ValueError, match=r"^pipeline: 'embeded' is neither"):
        models.check_blocks("embeded", "up.1.0", model_parameter="pipeline")


def test_layers_of_an_autoencoder_are_found_without_weights(pipeline_folder, tmp_path):
    shutil.copytree(pipeline_folder("sdxl"), tmp_path / "bare", ignore=shutil.ignore_patterns("*.safetensors"))
    vae = models.vae_without_weights(str(tmp_path / "bare"))
    assert list(find_layers(vae, "decoder.conv_*", "layer")) == [
        "decoder.conv_in", "decoder.conv_norm_out", "decoder.conv_act", "decoder.conv_out",
    ]  # fmt: skip
    with pytest.raises(ValueError, match=r"^layer: unknown name 'decoder.conv_inn'"):
        find_layers(vae, "decoder.conv_inn", "layer")


def test_a_denoiser_whose_configuration_is_missing_is_an_error(pipeline_folder, tmp_path):
    shutil.copytree(pipeline_folder("dit"), tmp_path / "bare", ignore=shutil.ignore_patterns("transformer"))
    with pytest.raises(ValueError, match=r"^model: "):
        models.denoiser_without_weights(str(tmp_path / "bare"))
