"""A block's update replaced in generations, and what is measured of the pictures."""

import numpy as np
import pandas as pd
import pytest
import torch

from vaelab import ablate, blocks, denoise, prompts, substitute, world
from vaelab.denoise import Sampling
from vaelab.hooks import edit
from vaelab.perceptual import Perceptual

PROMPTS = ["a red circle", "a large blue square", "a star"]
SAMPLING = Sampling(steps=3, guidance_scale=2.0)
NO_LPIPS = Perceptual(None, "not measured: no network")


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
    block = ablate.transformer_blocks(pipeline)[1]
    whole = denoise.generate_all(pipeline, PROMPTS, sampling, seed=5)
    same = substitute.drawn(pipeline, PROMPTS, block, lambda x: x, sampling, batch_size=2, seed=5)
    zero = substitute.drawn(pipeline, PROMPTS, block, nowhere, sampling, batch_size=2, seed=5)
    off = ablate.switched_off(pipeline, PROMPTS, block, sampling, batch_size=2, seed=5)
    assert torch.equal(denoise.generate_all(pipeline, PROMPTS, sampling, batch_size=2, seed=5), same)
    assert torch.equal(zero, off) and not torch.equal(zero, whole)
    assert (ablate.change(same, same) == 0).all()


def test_the_function_gets_the_vectors_of_both_halves_position_by_position(drawing):
    pipeline, prompts, block = drawing
    seen = []
    substitute.drawn(*drawing, lambda x: seen.append(x.clone()) or x, SAMPLING, steps=[1], batch_size=3, seed=4)
    told = denoise.from_prompts(pipeline, prompts, [4, 5, 6], [block], SAMPLING, steps=[1])
    halves = [told.unguided[block][0], told.maps[block][0]]
    (vectors,) = seen
    torch.testing.assert_close(vectors, torch.cat(halves).flatten(0, 2), rtol=0, atol=0)


def test_what_it_gives_back_takes_its_place_at_the_steps_asked_for_alone(drawing):
    pipeline, prompts, block = drawing
    path, calls = blocks.resolve(pipeline, block)[block], []

    def naive(update):
        calls.append(len(calls) % SAMPLING.steps)
        new = update.clone()
        for picture, row, column in np.ndindex(len(update), *update.shape[2:]):
            new[picture, :, row, column] = halved(update[picture, :, row, column][None])[0]
        return new if calls[-1] in (0, 2) else update

    with edit(pipeline.unet, {path: naive}, side="update"):
        expected = denoise.generate_all(pipeline, prompts, SAMPLING, batch_size=2)
    found = substitute.drawn(*drawing, halved, SAMPLING, steps=[2, 0], batch_size=2)
    assert torch.equal(found, expected)
    assert calls == [0, 1, 2] * 2  # two batches


def test_steps(drawing):
    whole = denoise.generate_all(*drawing[:2], SAMPLING)
    none, first, every, all_named = (
        substitute.drawn(*drawing, halved, SAMPLING, steps=steps) for steps in ([], [0], None, [0, 1, 2])
    )
    assert torch.equal(none, whole) and torch.equal(every, all_named)
    assert not torch.equal(first, whole) and not torch.equal(first, every)
    with pytest.raises(ValueError, match=r"replaced_steps: expected numbers from 0 to 2, got \[1, 3\]"):
        substitute.drawn(*drawing, halved, SAMPLING, steps=[3, 1])


def test_a_function_of_another_width_and_an_unknown_block_are_refused(drawing):
    with pytest.raises(ValueError, match=r"replace: gave \(\d+, 5\) for vectors \(\d+, 16\)"):
        substitute.drawn(*drawing, lambda x: x[:, :5], SAMPLING)
    with pytest.raises(ValueError, match=r"blocks: unknown name 'up.7.1'.*up.1.1"):
        substitute.drawn(*drawing[:2], "up.7.1", halved, SAMPLING)


def test_median_of_a_planted_change():
    before = torch.zeros(2, 3, 4, 4)
    after = before.clone()
    after[0, :, :3] = 0.5  # twelve of sixteen pixels, a quarter of the range in each channel
    after[1, :, 0] = 0.5  # four of them
    torch.testing.assert_close(substitute.median_change(before, after), torch.tensor([3 * 0.5 * 127.5, 0.0]))


def trial(monkeypatch, drawn, asked, perceptual=NO_LPIPS):
    """A trial whose model draws these pictures."""
    monkeypatch.setattr(denoise, "generate_all", lambda *_, **__: drawn)
    monkeypatch.setattr(denoise, "refuse_size", lambda *_: None)  # there is no pipeline
    monkeypatch.setattr(denoise, "passes", lambda *_: 1)
    return substitute.Trial(None, asked, SAMPLING, perceptual)


def test_a_planted_effect_on_pictures_of_the_world(monkeypatch):
    asked = prompts.load_prompts("world", split="test", count=6)
    drawn = world.render(asked.scenes)
    before = trial(monkeypatch, drawn, asked)
    changed = drawn.clone()
    changed[:2] = world.render([world.sample(seed) for seed in (100, 101)])
    changed[2] = -1.0  # nothing is there
    table = before.effects(changed)
    assert table["lpips"].isna().all()
    assert table["read_alike"].tolist() == [False, False, False, True, True, True]
    assert not table["right"][:3].any() and table["right"][3:].all()
    assert (table["manhattan"] > 0).tolist() == [True] * 3 + [False] * 3
    means = substitute.means(table)
    assert means["oracle_agreement"] == means["oracle_right"] == 0.5 and "lpips" not in means
    assert means["manhattan_mean"] == pytest.approx(ablate.change(drawn, changed).mean().item())
    same = substitute.means(before.effects(drawn))
    assert same == {"manhattan_mean": 0, "manhattan_median": 0, "oracle_agreement": 1, "oracle_right": 1}


def test_what_no_prompt_names_counts_for_the_reading_and_not_for_being_right(monkeypatch):
    seed = next(seed for seed in range(100) if "ground" not in world.sample(seed).named)
    scene = world.sample(seed)
    other = world.render([type(scene)(scene.things, scene.texture, "pink" if scene.ground != "pink" else "teal")])
    asked = prompts.Prompts([scene.prompt], [seed], "world", "train")
    row = trial(monkeypatch, world.render([scene]), asked).effects(other).loc[0]
    assert not row["read_alike"] and row["right"]


def test_pictures_of_no_world_have_no_oracle(monkeypatch):
    pictures = torch.zeros(2, 3, 8, 8)
    table = trial(monkeypatch, pictures, prompts.given(["one", "two"])).effects(pictures + 0.5)
    assert list(table) == ["manhattan", "median", "lpips"]


def test_a_trial_draws_replaces_and_keeps_a_few(small_pipeline):
    pipeline, asked = small_pipeline("sd2"), prompts.given(PROMPTS)
    before = substitute.Trial(pipeline, asked, SAMPLING, NO_LPIPS, batch_size=2, seed=3, keep=1)
    assert before.steps == 3
    assert torch.equal(before.pictures, denoise.generate_all(pipeline, PROMPTS, SAMPLING, batch_size=2, seed=3))
    same, first = before.replaced("up.1.1", lambda x: x), before.replaced("up.1.1", nowhere, [0])
    assert (same.effects[["manhattan", "median"]] == 0).all(None) and torch.equal(same.pictures, before.pictures[:1])
    after = substitute.drawn(pipeline, PROMPTS, "up.1.1", nowhere, SAMPLING, steps=[0], batch_size=2, seed=3)
    assert first.effects["manhattan"].tolist() == ablate.change(before.pictures, after).tolist()
    assert (first.effects["manhattan"] > 0).all()


def test_pictures_that_the_oracle_does_not_read_are_refused_before_any_is_drawn(small_pipeline, monkeypatch):
    monkeypatch.setattr(denoise, "generate_all", None)
    with pytest.raises(ValueError, match=r"^resolution: pictures of 32 x 32; of this dataset they must be 64 x 64"):
        substitute.Trial(small_pipeline("sd2"), prompts.load_prompts("world", count=1), SAMPLING, NO_LPIPS)


def test_the_table_says_why_there_is_no_lpips():
    one = pd.DataFrame({"manhattan": [1.0, 3.0], "median": [1.0, 2.0], "lpips": [float("nan")] * 2})
    table = substitute.table({("mid.0", "sae"): substitute.Outcome(None, one)}, ["block", "who"], NO_LPIPS)
    assert table.to_dict("records") == [
        {"block": "mid.0", "who": "sae", "manhattan_mean": 2.0, "manhattan_median": 1.5, "lpips": NO_LPIPS.why}
    ]
    measured = substitute.Outcome(None, one.assign(lpips=[0.1, 0.3]))
    there = substitute.table({("mid.0",): measured}, ["block"], Perceptual(object(), None))
    assert there["lpips"].tolist() == [pytest.approx(0.2)]


def test_beside_the_paper_stands_its_row_of_the_same_share():
    here = {"manhattan_mean": 30.0, "manhattan_median": 20.0, "explained_variance": 0.6}
    table = pd.DataFrame([
        {"block": "down.1.1", "k": 10, "n_features": 512, **here}, {"block": "mid.0", "k": 5, "n_features": 64, **here},
        {"block": "mid.0", "k": 7, "n_features": 64, **here},
    ])  # fmt: skip
    found = substitute.beside_paper(table, {"down.1.1": 128, "mid.0": 128})
    assert found["paper's block"].tolist() == ["down.2.1", "mid.0"] and found["paper's n_f"].tolist() == [5120, 640]
    assert found["paper's mean"].tolist() == [64.97, 52.64] and found["paper's explained %"].tolist() == [73.7, 43.4]
    assert found["explained %"].tolist() == [60.0, 60.0]
