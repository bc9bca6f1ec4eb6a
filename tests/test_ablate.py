"""Blocks switched off, and what is measured of it."""

import pytest
import torch

from vaelab import ablate, denoise, world
from vaelab.denoise import Sampling

SAMPLING = Sampling(steps=1, guidance_scale=0.0)


def test_it_is_the_picture_without_the_blocks_residual_branch(pipeline_folder):
    from vaelab.models import load_pipeline

    pipeline = load_pipeline(str(pipeline_folder("sdxl")), device="cpu")
    prompts = ["a red thing", "a blue thing"]
    whole = denoise.generate_all(pipeline, prompts, SAMPLING, seed=3)
    off = ablate.switched_off(pipeline, prompts, "mid.0", SAMPLING, batch_size=1, seed=3)
    again = denoise.generate_all(pipeline, prompts, SAMPLING, seed=3)
    assert torch.equal(whole, again) and not torch.equal(whole, off)
    projection = pipeline.unet.mid_block.attentions[0].proj_out
    for parameter in projection.parameters():
        parameter.data.zero_()
    removed = denoise.generate_all(pipeline, prompts, SAMPLING, seed=3)
    torch.testing.assert_close(off, removed, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("name", "some", "never"), [("sdxl", "down.2.1", "up_ft0"), ("dit", "block0", "bottleneck")])
def test_the_blocks_that_can_be_switched_off(small_pipeline, name, some, never):
    found = ablate.transformer_blocks(small_pipeline(name))
    assert some in found and never not in found


def test_blocks_are_chosen_by_name_or_glob_and_refused_before_anything_is_drawn(small_pipeline):
    pipeline = small_pipeline("sdxl")
    assert ablate.chosen(pipeline, []) == ablate.transformer_blocks(pipeline)
    assert ablate.chosen(pipeline, ["down.1.*", "mid.0"]) == ["down.1.0", "down.1.1", "mid.0"]
    with pytest.raises(ValueError, match=r"^blocks: unknown name 'mid.9'.*mid.0"):
        ablate.chosen(pipeline, ["mid.0", "mid.9"])
    with pytest.raises(ValueError, match=r"^blocks: .*up_blocks.0 takes .* so it is no update of its input"):
        ablate.chosen(pipeline, ["mid.0", "up_ft0"])


def test_manhattan_distance_of_a_planted_change():
    before = torch.zeros(2, 3, 4, 4)
    after = before.clone()
    after[0, :, 0, 0] = 1.0  # half the range in three channels of one pixel in 16
    torch.testing.assert_close(ablate.change(before, after), torch.tensor([3 * 127.5 / 16, 0.0]))


def test_a_planted_loss_of_one_factor_is_found_and_no_other():
    scenes = [world.sample(seed).spelled_out() for seed in range(12)]
    drawn = world.render(scenes)
    grey = drawn.mean(1, keepdim=True).expand_as(drawn)
    table = ablate.compare({"colour": grey, "nothing": drawn}, drawn, scenes).set_index("block")
    assert table.loc["colour", "colour"] < -0.4 and table.loc["colour", "ground"] < -0.2
    assert table.loc["colour", "manhattan"] > 5
    assert (table.loc["nothing"] == 0).all()
    assert list(ablate.compare({"colour": grey}, drawn, None).columns) == ["block", "manhattan"]
