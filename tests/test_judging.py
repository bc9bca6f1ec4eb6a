"""Tables of what the oracle reads."""

import pytest
import torch

from vaelab import judging, world
from vaelab.denoise import Sampling
from vaelab.prompts import load_prompts


@pytest.fixture(scope="module")
def asked():
    return load_prompts("world", split="test", count=8)


def test_rendered_pictures_are_right_and_others_are_not(asked):
    right, wrong = world.render(asked.scenes), world.render([world.sample(seed, "unseen") for seed in range(8)])
    table = judging.table(asked.spelled_out, {"right": right, "wrong": wrong})
    accuracy = table.set_index(["who", "factor"])["accuracy"]
    assert set(table["factor"]) == {*world.FACTORS, "count"}
    assert (accuracy["right"] == 1).all()
    assert accuracy["wrong", "shape"] < 0.5


def test_captions_name_what_came_out_otherwise(asked):
    scene = world.Scene((world.Thing("star", "red", "large", "left"),), "plain", "grey")
    other = world.Scene((world.Thing("star", "blue", "large", "left"),), "plain", "grey")
    right, wrong = judging.captions([scene, scene], world.render([scene, other]))
    assert right == scene.prompt
    assert wrong == f"{scene.prompt} [red → blue]"


def test_by_steps_and_through_the_vae(small_pipeline, asked):
    pipeline = small_pipeline("world")
    few = load_prompts("world", split="test", count=2)
    side = pipeline.unet.config.sample_size * pipeline.vae_scale_factor
    if side != world.SIDE:
        pytest.skip("the oracle reads pictures of 64 x 64")
    table = judging.by_steps(pipeline, few, Sampling(), [2, 1, 2], batch_size=2, seed=0)
    assert list(table["steps"]) == [1, 2] and (table["count"] <= 1).all()
    decoded = judging.through_vae(pipeline, world.render(asked.scenes), 3)
    assert decoded.shape == (8, 3, 64, 64) and torch.isfinite(decoded).all()
