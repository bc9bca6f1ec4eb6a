"""Every kind of pipeline on a GPU in half precision, near its features in float32 on the CPU."""

import pytest
import torch
from small_pipelines import PIPELINES

from vaelab.activations.collect import CollectConfig, collect_prompts, run_trial_batch
from vaelab.activations.denoiser import Sampling, from_pictures, from_prompts, generate
from vaelab.models.block_names import paths_by_name
from vaelab.models.conditioning import last_timestep
from vaelab.models.loading import load_pipeline

pytestmark = pytest.mark.cuda
HALF = {"float16": 0.05, "bfloat16": 0.15}
SEEDS = [5, 6]


def prompts_for(name):
    return [3, 77] if name == "dit" else ["a red circle", "two yellow stars on a dark field"]


def sampling_for(name, steps=2):
    return Sampling(steps, 3.0, **({"height": 32, "width": 32} if name == "flux" else {}))


def last_block(pipeline):
    return [name for name in paths_by_name(pipeline) if not name.startswith("up_ft")][-1]


def distance(found, expected):
    return float((found.cpu().double() - expected.double()).norm() / expected.double().norm())


@pytest.fixture
def on_device(pipeline_folder, device):
    return lambda name, precision: load_pipeline(str(pipeline_folder(name)), device=str(device), precision=precision)


@pytest.mark.parametrize("precision", HALF)
@pytest.mark.parametrize("name", PIPELINES)
def test_features_of_prompts(on_device, small_pipeline, device, name, precision):
    pipeline = on_device(name, precision)
    block, given = last_block(pipeline), (prompts_for(name), SEEDS)
    found = from_prompts(pipeline, *given, block, sampling_for(name), side="output", pictures=True)
    expected = from_prompts(small_pipeline(name), *given, block, sampling_for(name), side="output")
    maps, reference = found.maps[block][0], expected.maps[block][0]
    assert maps.device.type == device.type and maps.dtype == getattr(torch, precision)
    assert found.unguided.keys() == expected.unguided.keys()
    assert distance(maps, reference) < HALF[precision]
    assert found.pictures.isfinite().all() and found.pictures.abs().max() <= 1


@pytest.mark.parametrize("precision", HALF)
@pytest.mark.parametrize("name", PIPELINES)
def test_features_of_pictures(on_device, small_pipeline, device, name, precision):
    pipeline = on_device(name, precision)
    block = last_block(pipeline)
    pixels = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(1)) * 2 - 1
    timesteps = [10, last_timestep(pipeline) // 2]
    found = from_pictures(pipeline, pixels, SEEDS, timesteps, block)
    expected = from_pictures(small_pipeline(name), pixels, SEEDS, timesteps, block)
    for maps, reference in zip(found.maps[block], expected.maps[block], strict=True):
        assert maps.device.type == device.type and maps.dtype == getattr(torch, precision)
        assert distance(maps, reference) < HALF[precision]


@pytest.mark.parametrize("name", ["sd", "dit"])
def test_in_float32_features_and_pictures_are_the_cpus(on_device, small_pipeline, name):
    pipeline = on_device(name, "float32")
    block, given, sampling = last_block(pipeline), (prompts_for(name), SEEDS), sampling_for(name, 3)
    found = from_prompts(pipeline, *given, block, sampling)
    expected = from_prompts(small_pipeline(name), *given, block, sampling)
    for maps, reference in zip(found.maps[block], expected.maps[block], strict=True):
        assert distance(maps, reference) < 1e-3
    first, second = generate(pipeline, *given, sampling), generate(small_pipeline(name), *given, sampling)
    assert (first - second).abs().max() < 0.02


def test_a_collection_from_the_gpu_is_the_cpus(on_device, small_pipeline, tmp_path):
    prompts = ["a red circle", "a star", "two blue squares"]

    def collected(pipeline, folder):
        config = CollectConfig((last_block(pipeline),), sampling_for("sd"), batch_size=2)
        layout, per_prompt, _ = run_trial_batch(pipeline, prompts, config)
        options = {"layout": layout, "items_per_prompt": per_prompt, "progress": False}
        collection = collect_prompts(pipeline, prompts, config, folder, **options)
        assert len(collection.items) == len(prompts) * per_prompt
        return collection, config.blocks[0]

    found, block = collected(on_device("sd", "float16"), tmp_path / "gpu")
    expected, _ = collected(small_pipeline("sd"), tmp_path / "cpu")
    assert found.precision == "float16" and [*found.items] == [*expected.items]
    every = range(len(expected.items))
    assert distance(found.maps(block, every), expected.maps(block, every)) < HALF["float16"]
