"""Tables of what the oracle reads."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from vaelab import world
from vaelab.activations.denoiser import Sampling
from vaelab.data.prompts import load_prompts
from vaelab.embedded import evaluate


@pytest.fixture(scope="module")
def asked():
    return load_prompts("world", split="test", count=8)


def test_rendered_pictures_are_right_and_others_are_not(asked):
    right, wrong = world.render(asked.scenes), world.render([world.sample(seed, "unseen") for seed in range(8)])
    table = evaluate.accuracy_table(asked.spelled_out, {"right": right, "wrong": wrong})
    accuracy = table.set_index(["source", "factor"])["accuracy"]
    assert set(table["factor"]) == {*world.FACTORS, "count"}
    assert (accuracy["right"] == 1).all()
    assert accuracy["wrong", "shape"] < 0.5


def test_captions_name_what_came_out_otherwise(asked):
    scene = world.Scene((world.Thing("star", "red", "large", "left"),), "plain", "grey")
    other = world.Scene((world.Thing("star", "blue", "large", "left"),), "plain", "grey")
    right, wrong = evaluate.captions_with_errors([scene, scene], world.render([scene, other]))
    assert right == scene.prompt
    assert wrong == f"{scene.prompt} [red → blue]"


def test_by_steps_and_through_the_vae(small_pipeline, asked):
    pipeline = small_pipeline("world")
    few = load_prompts("world", split="test", count=2)
    side = pipeline.unet.config.sample_size * pipeline.vae_scale_factor
    if side != world.SIDE:
        pytest.skip("the oracle reads pictures of 64 x 64")
    table = evaluate.accuracy_by_steps(pipeline, few, Sampling(), [2, 1, 2], batch_size=2, seed=0)
    assert list(table["steps"]) == [1, 2] and (table["count"] <= 1).all()
    decoded = evaluate.reconstruct_in_batches(pipeline, world.render(asked.scenes), 3)
    assert decoded.shape == (8, 3, 64, 64) and torch.isfinite(decoded).all()


def labelled(labels):
    return SimpleNamespace(labels={label: number for number, label in enumerate(labels)})


def test_classes_are_asked_for_alike_and_judged_by_colour_and_shape():
    labels = ["red star", "blue ring", "black heart"]
    chosen = evaluate.sample_classes(labelled(labels), 7, seed=3)
    assert sorted(np.bincount(chosen.numbers)) == [2, 2, 3] and chosen.numbers[:3] == chosen.numbers[3:6]
    assert [scene.prompt for scene in chosen.scenes] == [f"a {labels[number]}" for number in chosen.numbers]
    assert chosen.numbers != evaluate.sample_classes(labelled(labels), 7, seed=0).numbers
    shown = [
        world.Scene((replace(thing, size="small", position="top"),), "dotted", "pink")
        for thing in (scene.things[0] for scene in chosen.scenes)
    ]
    shown[0] = replace(shown[0], things=(replace(shown[0].things[0], colour="green"),))
    table = evaluate.accuracy_table(chosen.scenes, {"dit": world.render(shown)}).set_index("factor")["accuracy"]
    assert table.to_dict() == pytest.approx({"shape": 1.0, "colour": 6 / 7, "count": 1.0})


@pytest.mark.parametrize(("labels", "message"), [([], "have no names"), (["tench"], "'tench' is no colour and shape")])
def test_classes_that_are_not_of_the_world_are_refused(labels, message):
    with pytest.raises(ValueError, match=message):
        evaluate.sample_classes(labelled(labels), 1)


def test_a_few_drawings_with_what_was_asked_for(small_pipeline, monkeypatch):
    prompted = evaluate.draw_examples(small_pipeline("world"), Sampling(1), 2)
    assert prompted.pictures.shape[0] == 2
    assert prompted.captions == [world.sample(seed, "test").prompt for seed in (0, 1)]
    dit = small_pipeline("dit")
    monkeypatch.setattr(dit, "labels", {"red star": 0, "blue ring": 1})
    drawn = evaluate.draw_examples(dit, Sampling(1), 3, seed=1)
    assert drawn.pictures.shape[0] == 3
    assert drawn.captions == [scene.prompt for scene in evaluate.sample_classes(dit, 3, 1).scenes]


@pytest.mark.parametrize(
    ("splits", "message"),
    [
        (("train", "unseen"), "split: the embedded models were trained on 'train'"),
        (("test", "train"), "unseen_split: the embedded models were trained on 'train'"),
        (("test", "test"), "unseen_split: is 'test' like split"),
    ],
)
def test_splits_that_the_models_were_trained_on_are_refused(splits, message):
    evaluate.require_held_out("test", "unseen")
    with pytest.raises(ValueError, match=message):
        evaluate.require_held_out(*splits)


def test_more_steps_than_timesteps_are_refused(small_pipeline):
    evaluate.require_sampler_steps(small_pipeline("world"), [1, 1000])
    with pytest.raises(ValueError, match="steps: got 1001; the model's noise schedule has 1000 timesteps"):
        evaluate.require_sampler_steps(small_pipeline("world"), [4, 1001])
