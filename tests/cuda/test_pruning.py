"""Masks on latents on a GPU."""

import pytest
import torch
from small_latents import small_config

from vaelab import data
from vaelab.pruning import masks, metrics, slimming
from vaelab.pruning import train as pruning_train

pytestmark = pytest.mark.cuda


@pytest.fixture(scope="module")
def images():
    return data.load_images("digits", split="test", resolution=16, max_images=12)


@pytest.mark.parametrize("precision", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("mask", masks.MASKS)
def test_a_masked_objective_is_trained_and_evaluated_near_the_cpu(device, images, mask, precision, tmp_path):
    def run(where, precision, name):
        latent = {"mask": mask, "keep": 2, "standardise": True}
        config = small_config(2, latent, {"device": str(where), "precision": precision, "learning_rate": 1e-4})
        return pruning_train.train_pruned("embedded", mask, config, (images, images), tmp_path / name)

    found, expected = run(device, precision, "found"), run("cpu", "float32", "expected")
    for name in ("recon_mse", "masked_recon_mse", "mean_mask", "closed_form_loss"):
        assert found.measures[name] == pytest.approx(expected.measures[name], rel=0.1), name
    assert 0 < found.measures["diffusion_loss"] < 3


def test_samples_are_drawn_on_the_device_and_come_back_as_pictures(device, images):
    objective = pruning_train.build_objective("embedded", small_config(training={"device": str(device)}), 16)
    config = metrics.EvaluationConfig(fid_images=3, sampler_steps=2)
    pictures = metrics.sample_pictures(objective, config, (4, 8, 8), 16, 0)
    assert pictures.shape == (3, 3, 16, 16) and pictures.device.type == "cpu"
    assert pictures.isfinite().all()


def test_peak_memory_is_that_of_the_tensors_an_action_holds(device):
    def action(_):
        first = torch.zeros(2**20, device=device)
        second = first + 1  # two tensors of 4 MiB at once, then one
        del first
        return second * 2

    assert slimming.peak_memory_bytes(action, device) == pytest.approx(2 * 2**22, rel=0.3)
