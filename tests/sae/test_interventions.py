"""A block's update replaced or switched off during generation, and the effects on pictures, with LPIPS or without."""

import sys
import types

import numpy as np
import pandas as pd
import pytest
import torch

from vaelab import activations, world
from vaelab.activations import denoiser
from vaelab.activations.denoiser import Sampling
from vaelab.data import prompts as data_prompts
from vaelab.hooks import edit
from vaelab.models import block_names
from vaelab.sae import interventions
from vaelab.sae.interventions import LPIPS

PROMPTS = ["a red circle", "a large blue square", "a star"]
SAMPLING = Sampling(steps=3, guidance_scale=2.0)
ONE_STEP = Sampling(steps=1, guidance_scale=0.0)
NO_LPIPS = LPIPS(None, "not measured: no network")


class Fake(torch.nn.Module):
    """Has the package's signature: pictures in [-1, 1] to (N, 1, 1, 1)."""

    def __init__(self, net, verbose):
        super().__init__()
        self.net, self.scale = net, torch.nn.Parameter(torch.tensor(2.0))

    def forward(self, before, after):
        assert not self.training and len(before) <= 16
        return self.scale * (before - after).abs().mean((1, 2, 3), keepdim=True)


def package(kind):
    module = types.ModuleType("lpips")
    module.LPIPS = kind
    return module


def test_lpips_is_the_packages_network_on_every_pair(monkeypatch):
    monkeypatch.setitem(sys.modules, "lpips", package(Fake))
    found = interventions.load_lpips("vgg", device="cpu")
    assert found.why is None and found.model.net == "vgg"
    before = torch.zeros(20, 3, 8, 8)
    after = before + torch.arange(20).reshape(20, 1, 1, 1) / 20
    assert found.distance(before, after) == pytest.approx([i / 10 for i in range(20)])


def test_without_the_package_lpips_says_how_to_install_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "lpips", None)
    found = interventions.load_lpips(device="cpu")
    assert found.model is None and "pip install vaelab[lpips]" in found.why
    assert torch.tensor(found.distance(torch.zeros(3, 3, 8, 8), torch.zeros(3, 3, 8, 8))).isnan().all()


def test_without_its_weights_lpips_says_what_went_wrong(monkeypatch):
    from urllib.error import URLError

    def offline(net, verbose):
        raise URLError("no route to host")

    monkeypatch.setitem(sys.modules, "lpips", package(offline))
    assert "no route to host" in interventions.load_lpips(device="cpu").why


def test_an_unknown_network_is_refused():
    with pytest.raises(ValueError, match=r"lpips_net: unknown name 'alexnet'.*alex"):
        interventions.load_lpips("alexnet")


def test_a_block_switched_off_is_a_block_without_its_residual_branch(pipeline_folder):
    from vaelab.models.loading import load_pipeline

    pipeline = load_pipeline(str(pipeline_folder("sdxl")), device="cpu")
    prompts = ["a red thing", "a blue thing"]
    whole = activations.generate_all(pipeline, prompts, ONE_STEP, seed=3)
    off = interventions.generate_without_block(pipeline, prompts, "mid.0", ONE_STEP, batch_size=1, seed=3)
    again = activations.generate_all(pipeline, prompts, ONE_STEP, seed=3)
    assert torch.equal(whole, again) and not torch.equal(whole, off)
    projection = pipeline.unet.mid_block.attentions[0].proj_out
    for parameter in projection.parameters():
        parameter.data.zero_()
    removed = activations.generate_all(pipeline, prompts, ONE_STEP, seed=3)
    torch.testing.assert_close(off, removed, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("name", "some", "never"), [("sdxl", "down.2.1", "up_ft0"), ("dit", "block0", "bottleneck")])
def test_the_blocks_that_can_be_switched_off(small_pipeline, name, some, never):
    found = interventions.blocks_with_updates(small_pipeline(name))
    assert some in found and never not in found


def test_blocks_are_chosen_by_name_or_glob_and_refused_before_anything_is_drawn(small_pipeline):
    pipeline = small_pipeline("sdxl")
    assert interventions.resolve_blocks(pipeline, []) == interventions.blocks_with_updates(pipeline)
    assert interventions.resolve_blocks(pipeline, ["down.1.*", "mid.0"]) == ["down.1.0", "down.1.1", "mid.0"]
    with pytest.raises(ValueError, match=r"^blocks: unknown name 'mid.9'.*mid.0"):
        interventions.resolve_blocks(pipeline, ["mid.0", "mid.9"])
    with pytest.raises(ValueError, match=r"^blocks: .*up_blocks.0 takes .* so it has no update"):
        interventions.resolve_blocks(pipeline, ["mid.0", "up_ft0"])


def test_the_pictures_stream_is_replaced_also_in_a_layer_inside_a_block_with_a_text_stream(small_pipeline):
    """SD3's joint attention returns (picture, text), its blocks (text, picture): each has its own place."""
    pipeline, prompts = small_pipeline("sd3"), ["a star"]
    block, layer = "block0", "transformer_blocks.0.attn"
    whole = activations.generate_all(pipeline, prompts, ONE_STEP)
    widths = {}
    for name in (block, layer):
        seen = []
        same = interventions.generate_with_replacement(
            pipeline, prompts, name, lambda x, seen=seen: seen.append(x.shape) or x, ONE_STEP
        )
        zero = interventions.generate_with_replacement(pipeline, prompts, name, torch.zeros_like, ONE_STEP)
        assert torch.equal(same, whole) and not torch.equal(zero, whole)
        widths[name] = seen[0]
    assert widths[block] == widths[layer]
    with pytest.raises(ValueError, match=r"^blocks: transformer_blocks.0.ff_context works on the text's tokens"):
        interventions.resolve_blocks(pipeline, ["transformer_blocks.0.ff_context"])


def test_manhattan_distance_of_a_planted_change():
    before = torch.zeros(2, 3, 4, 4)
    after = before.clone()
    after[0, :, 0, 0] = 1.0  # half the range in three channels of one pixel in 16
    torch.testing.assert_close(interventions.manhattan_distance(before, after), torch.tensor([3 * 127.5 / 16, 0.0]))


def test_a_planted_loss_of_one_factor_is_found_and_no_other():
    scenes = [world.sample(seed).spelled_out() for seed in range(12)]
    drawn = world.render(scenes)
    grey = drawn.mean(1, keepdim=True).expand_as(drawn)
    table = interventions.ablation_table({"colour": grey, "nothing": drawn}, drawn, scenes).set_index("block")
    assert table.loc["colour", "colour"] < -0.4 and table.loc["colour", "ground"] < -0.2
    assert table.loc["colour", "manhattan"] > 5
    assert (table.loc["nothing"] == 0).all()
    assert list(interventions.ablation_table({"colour": grey}, drawn, None).columns) == ["block", "manhattan"]


def halved(x):
    return 0.5 * x.flip(1)


def nowhere(x):
    return torch.zeros_like(x)


@pytest.fixture
def drawing(small_pipeline):
    return small_pipeline("sd2"), PROMPTS, "up.1.1"


@pytest.mark.parametrize("name", ["sdxl", "pixart"])
def test_identity_is_the_same_picture_bit_for_bit_and_zero_is_the_block_switched_off(small_pipeline, name):
    pipeline, sampling = small_pipeline(name), Sampling(steps=2, guidance_scale=0.0)
    block = interventions.blocks_with_updates(pipeline)[1]
    whole = denoiser.generate_all(pipeline, PROMPTS, sampling, seed=5)
    same = interventions.generate_with_replacement(
        pipeline, PROMPTS, block, lambda x: x, sampling, batch_size=2, seed=5
    )
    zero = interventions.generate_with_replacement(pipeline, PROMPTS, block, nowhere, sampling, batch_size=2, seed=5)
    off = interventions.generate_without_block(pipeline, PROMPTS, block, sampling, batch_size=2, seed=5)
    assert torch.equal(denoiser.generate_all(pipeline, PROMPTS, sampling, batch_size=2, seed=5), same)
    assert torch.equal(zero, off) and not torch.equal(zero, whole)
    assert (interventions.manhattan_distance(same, same) == 0).all()


def test_the_function_gets_the_vectors_of_both_halves_position_by_position(drawing):
    pipeline, prompts, block = drawing
    seen = []
    interventions.generate_with_replacement(
        *drawing, lambda x: seen.append(x.clone()) or x, SAMPLING, steps=[1], batch_size=3, seed=4
    )
    expected = denoiser.from_prompts(pipeline, prompts, [4, 5, 6], [block], SAMPLING, steps=[1])
    halves = [expected.unguided[block][0], expected.maps[block][0]]
    (vectors,) = seen
    torch.testing.assert_close(vectors, torch.cat(halves).flatten(0, 2), rtol=0, atol=0)


def test_the_update_is_replaced_at_the_requested_steps_only(drawing):
    pipeline, prompts, block = drawing
    path, calls = block_names.find_blocks(pipeline, block)[block], []

    def naive(update):
        calls.append(len(calls) % SAMPLING.steps)
        new = update.clone()
        for picture, row, column in np.ndindex(len(update), *update.shape[2:]):
            new[picture, :, row, column] = halved(update[picture, :, row, column][None])[0]
        return new if calls[-1] in (0, 2) else update

    with edit(pipeline.unet, {path: naive}, side="update"):
        expected = denoiser.generate_all(pipeline, prompts, SAMPLING, batch_size=2)
    found = interventions.generate_with_replacement(*drawing, halved, SAMPLING, steps=[2, 0], batch_size=2)
    assert torch.equal(found, expected)
    assert calls == [0, 1, 2] * 2  # two batches


def test_no_first_and_all_steps(drawing):
    whole = denoiser.generate_all(*drawing[:2], SAMPLING)
    none, first, every, all_named = (
        interventions.generate_with_replacement(*drawing, halved, SAMPLING, steps=steps)
        for steps in ([], [0], None, [0, 1, 2])
    )
    assert torch.equal(none, whole) and torch.equal(every, all_named)
    assert not torch.equal(first, whole) and not torch.equal(first, every)
    with pytest.raises(ValueError, match=r"replaced_steps: expected numbers from 0 to 2, got \[1, 3\]"):
        interventions.generate_with_replacement(*drawing, halved, SAMPLING, steps=[3, 1])


def test_a_function_of_another_width_and_an_unknown_block_are_refused(drawing):
    with pytest.raises(ValueError, match=r"replace: gave \(\d+, 5\) for vectors \(\d+, 16\)"):
        interventions.generate_with_replacement(*drawing, lambda x: x[:, :5], SAMPLING)
    with pytest.raises(ValueError, match=r"blocks: unknown name 'up.7.1'.*up.1.1"):
        interventions.generate_with_replacement(*drawing[:2], "up.7.1", halved, SAMPLING)


def test_median_of_a_planted_change():
    before = torch.zeros(2, 3, 4, 4)
    after = before.clone()
    after[0, :, :3] = 0.5  # twelve of sixteen pixels, a quarter of the range in each channel
    after[1, :, 0] = 0.5  # four of them
    torch.testing.assert_close(
        interventions.median_manhattan_distance(before, after), torch.tensor([3 * 0.5 * 127.5, 0.0])
    )


def experiment(monkeypatch, pictures, prompts):
    """An experiment whose model generates these pictures."""
    monkeypatch.setattr(activations, "generate_all", lambda *_, **__: pictures)
    monkeypatch.setattr(activations, "validate_size", lambda *_: None)  # there is no pipeline
    monkeypatch.setattr(activations, "count_passes", lambda *_: 1)
    return interventions.ReplacementExperiment(None, prompts, SAMPLING, NO_LPIPS)


def test_a_planted_effect_on_pictures_of_the_world(monkeypatch):
    prompts = data_prompts.load_prompts("world", split="test", count=6)
    drawn = world.render(prompts.scenes)
    before = experiment(monkeypatch, drawn, prompts)
    changed = drawn.clone()
    changed[:2] = world.render([world.sample(seed) for seed in (100, 101)])
    changed[2] = -1.0  # nothing is there
    table = before.effects(changed)
    assert table["lpips"].isna().all()
    assert table["same_reading"].tolist() == [False, False, False, True, True, True]
    assert not table["correct"][:3].any() and table["correct"][3:].all()
    assert (table["manhattan"] > 0).tolist() == [True] * 3 + [False] * 3
    means = interventions.mean_effects(table)
    assert means["oracle_agreement"] == means["oracle_right"] == 0.5 and "lpips" not in means
    assert means["manhattan_mean"] == pytest.approx(interventions.manhattan_distance(drawn, changed).mean().item())
    same = interventions.mean_effects(before.effects(drawn))
    assert same == {"manhattan_mean": 0, "manhattan_median": 0, "oracle_agreement": 1, "oracle_right": 1}


def test_a_factor_that_no_prompt_names_counts_for_the_reading_but_not_as_incorrect(monkeypatch):
    seed = next(seed for seed in range(100) if "ground" not in world.sample(seed).named)
    scene = world.sample(seed)
    other = world.render([type(scene)(scene.things, scene.texture, "pink" if scene.ground != "pink" else "teal")])
    prompts = data_prompts.Prompts([scene.prompt], [seed], "world", "train")
    row = experiment(monkeypatch, world.render([scene]), prompts).effects(other).loc[0]
    assert not row["same_reading"] and row["correct"]


def test_pictures_of_no_world_have_no_oracle(monkeypatch):
    pictures = torch.zeros(2, 3, 8, 8)
    table = experiment(monkeypatch, pictures, data_prompts.from_list(["one", "two"])).effects(pictures + 0.5)
    assert list(table) == ["manhattan", "median", "lpips"]


def test_an_experiment_generates_replaces_and_holds_a_few_pictures(small_pipeline):
    pipeline, prompts = small_pipeline("sd2"), data_prompts.from_list(PROMPTS)
    before = interventions.ReplacementExperiment(pipeline, prompts, SAMPLING, NO_LPIPS, batch_size=2, seed=3, keep=1)
    assert before.steps == 3
    assert torch.equal(before.pictures, denoiser.generate_all(pipeline, PROMPTS, SAMPLING, batch_size=2, seed=3))
    same, first = before.replaced("up.1.1", lambda x: x), before.replaced("up.1.1", nowhere, [0])
    assert (same.effects[["manhattan", "median"]] == 0).all(axis=None) and torch.equal(
        same.pictures, before.pictures[:1]
    )
    after = interventions.generate_with_replacement(
        pipeline, PROMPTS, "up.1.1", nowhere, SAMPLING, steps=[0], batch_size=2, seed=3
    )
    assert first.effects["manhattan"].tolist() == interventions.manhattan_distance(before.pictures, after).tolist()
    assert (first.effects["manhattan"] > 0).all()


def test_pictures_that_the_oracle_does_not_read_are_refused_before_any_is_drawn(small_pipeline, monkeypatch):
    monkeypatch.setattr(activations, "generate_all", None)
    with pytest.raises(ValueError, match=r"^resolution: pictures of 32 x 32; of this dataset they must be 64 x 64"):
        interventions.ReplacementExperiment(
            small_pipeline("sd2"), data_prompts.load_prompts("world", count=1), SAMPLING, NO_LPIPS
        )


def test_the_table_has_lpips_only_where_it_was_measured():
    one = pd.DataFrame({"manhattan": [1.0, 3.0], "median": [1.0, 2.0], "lpips": [float("nan")] * 2})
    table = interventions.effects_table(
        {("mid.0", "sae"): interventions.ReplacementOutcome(None, one)}, ["block", "method"]
    )
    assert table.to_dict("records") == [
        {"block": "mid.0", "method": "sae", "manhattan_mean": 2.0, "manhattan_median": 1.5}
    ]
    measured = interventions.ReplacementOutcome(None, one.assign(lpips=[0.1, 0.3]))
    there = interventions.effects_table({("mid.0",): measured}, ["block"])
    assert there["lpips"].tolist() == [pytest.approx(0.2)]


def test_the_papers_row_of_the_same_ratio_stands_beside_the_table():
    here = {"manhattan_mean": 30.0, "manhattan_median": 20.0, "explained_variance": 0.6}
    table = pd.DataFrame([
        {"block": "down.1.1", "k": 10, "n_features": 512, **here}, {"block": "mid.0", "k": 5, "n_features": 64, **here},
        {"block": "mid.0", "k": 7, "n_features": 64, **here},
    ])  # fmt: skip
    found = interventions.compare_with_paper(table, {"down.1.1": 128, "mid.0": 128})
    assert found["paper's block"].tolist() == ["down.2.1", "mid.0"] and found["paper's n_f"].tolist() == [5120, 640]
    assert found["paper's mean"].tolist() == [64.97, 52.64] and found["paper's explained %"].tolist() == [73.7, 43.4]
    assert found["explained %"].tolist() == [60.0, 60.0]
