import math

import diffusers
import numpy as np
import pytest
import torch
from small_pipelines import PIPELINES, pixart

from vaelab.activations.denoiser import (
    Sampling,
    count_passes,
    from_pictures,
    from_prompts,
    generate,
    generate_all,
    maps_at_step,
    validate_size,
)
from vaelab.hooks import capture, edit
from vaelab.models import conditioning
from vaelab.models.block_names import blocks, find_denoiser, paths_by_name, to_maps
from vaelab.models.conditioning import add_noise, encode_pictures, encode_prompts, last_timestep, predict
from vaelab.models.loading import load_pipeline

TEXTS = ["a red circle", "", "two yellow stars on a dark field"]
CLASSES = [3, 77, 400]
SEEDS = [5, 6, 7]
GUIDED = [name for name in PIPELINES if name != "flux"]
MODELS_OF_PIXELS = ["deepfloyd"]
STEM = {"FluxTransformer2DModel": "x_embedder", "UNet2DConditionModel": "conv_in"}
"""The layer that takes the noisy latents in; elsewhere the patches' embedding."""


def prompts_for(name):
    return CLASSES if name == "dit" else TEXTS


def sampling_for(name, steps=2, guidance_scale=3.0, **options):
    """Small pictures also of FLUX, which takes 1024 pixels for its own size whatever its transformer."""
    size = {"height": 32, "width": 32} if name == "flux" else {}
    return Sampling(steps, guidance_scale, **size, options=options)


def keeping_their_shape(pipeline):
    return [name for name in paths_by_name(pipeline) if not name.startswith("up_ft")]


def last_block(pipeline):
    return keeping_their_shape(pipeline)[-1]


def pictures_for(pipeline, count=3, side=32):
    return torch.rand(count, 3, side, side, generator=torch.Generator().manual_seed(1)) * 2 - 1


def assert_equal(first, second):
    assert first.keys() == second.keys()
    for name in first:
        assert len(first[name]) == len(second[name])
        for one, other in zip(first[name], second[name], strict=True):
            assert torch.equal(one, other), name


def assert_close(first, second, tolerance=1e-4):
    assert first.keys() == second.keys()
    for name in first:
        for one, other in zip(first[name], second[name], strict=True):
            torch.testing.assert_close(
                one, other, atol=tolerance, rtol=tolerance, msg=lambda text, name=name: name + text
            )


def plain_call(pipeline, name, sampling):
    given = {"class_labels": CLASSES} if name == "dit" else {"prompt": TEXTS}
    size = {"height": sampling.height, "width": sampling.width} if sampling.height else {}
    pictures = pipeline(
        **given,
        **size,
        generator=[torch.Generator().manual_seed(seed) for seed in SEEDS],
        num_inference_steps=sampling.steps,
        guidance_scale=sampling.guidance_scale,
        output_type="np",
    ).images
    return torch.from_numpy(pictures).permute(0, 3, 1, 2) * 2 - 1


@pytest.mark.parametrize("name", PIPELINES)
def test_pictures_are_those_of_the_plain_pipeline(small_pipeline, name):
    pipeline, sampling = small_pipeline(name), sampling_for(name)
    expected = plain_call(pipeline, name, sampling)
    assert torch.equal(generate(pipeline, prompts_for(name), SEEDS, sampling), expected)
    seen = from_prompts(
        pipeline, prompts_for(name), SEEDS, paths_by_name(pipeline), sampling, side="output", pictures=True
    )
    assert torch.equal(seen.pictures, expected)
    assert -1 <= expected.min() < expected.max() <= 1
    assert not torch.equal(expected[0], expected[1])


def test_pictures_of_any_number_of_prompts_are_seeded_by_their_number(small_pipeline):
    pipeline, prompts = small_pipeline("sdxl"), [*TEXTS, "a large blue square", "a green triangle"]
    made = generate_all(pipeline, prompts, Sampling(2), batch_size=2, seed=10)
    whole = generate(pipeline, prompts, range(10, 15), Sampling(2))
    torch.testing.assert_close(made, whole, atol=1e-4, rtol=1e-4)
    assert torch.equal(made[2:4], generate(pipeline, prompts[2:4], [12, 13], Sampling(2)))
    for asked, message in (((prompts, 0), "batch_size: must be at least 1"), (([], 2), "prompts: must be at least 1")):
        with pytest.raises(ValueError, match=f"^{message}"):
            generate_all(pipeline, asked[0], Sampling(2), batch_size=asked[1])


@pytest.mark.parametrize("name", PIPELINES)
def test_update_is_output_minus_input_at_every_step(small_pipeline, name):
    pipeline, sampling = small_pipeline(name), sampling_for(name)
    names = keeping_their_shape(pipeline)
    update, output, given = (
        from_prompts(pipeline, prompts_for(name), SEEDS, names, sampling, side=side)
        for side in ("update", "output", "input")
    )
    shapes = {short: block.shape for short, block in blocks(pipeline).items()} if name != "flux" else {}
    for half in ("maps", "unguided"):
        for short, taken in getattr(update, half).items():
            assert len(taken) == count_passes(pipeline, sampling)
            for step, one in enumerate(taken):
                assert one.shape == (3, *shapes.get(short, (8, 8, 32)))
                assert torch.equal(one, getattr(output, half)[short][step] - getattr(given, half)[short][step])
    assert list(update.maps) == names
    assert bool(update.unguided) == (name != "flux")


@pytest.mark.parametrize("name", PIPELINES)
def test_an_early_stop_and_chosen_steps_change_nothing(small_pipeline, name):
    pipeline, sampling = small_pipeline(name), sampling_for(name, steps=3)
    asked = pipeline, prompts_for(name), SEEDS, keeping_their_shape(pipeline), sampling
    everything = from_prompts(*asked, pictures=True)
    assert_equal(from_prompts(*asked).maps, everything.maps)
    chosen = from_prompts(*asked, steps=[2, 0])
    assert chosen.pictures is None
    for half in ("maps", "unguided"):
        whole = getattr(everything, half)
        assert_equal(getattr(chosen, half), {short: [taken[0], taken[2]] for short, taken in whole.items()})
        assert all(not torch.equal(taken[0], taken[2]) for taken in whole.values())


@pytest.mark.parametrize("name", PIPELINES)
def test_features_do_not_depend_on_the_batch(small_pipeline, name):
    pipeline, sampling, prompts = small_pipeline(name), sampling_for(name), prompts_for(name)
    names = keeping_their_shape(pipeline)
    batch = from_prompts(pipeline, prompts, SEEDS, names, sampling, pictures=True)
    alone = from_prompts(pipeline, prompts[2:], SEEDS[2:], names, sampling, pictures=True)
    for half in ("maps", "unguided"):
        of_batch = {short: [one[2:] for one in taken] for short, taken in getattr(batch, half).items()}
        assert_close(getattr(alone, half), of_batch)
    torch.testing.assert_close(alone.pictures, batch.pictures[2:], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("side", ["update", "input"])
def test_maps_at_a_step_are_those_of_single_prompts(small_pipeline, side):
    pipeline, prompts, sampling = small_pipeline("sd"), ["a star", "a ring", "a red star"], Sampling(2, 2.0)
    found = maps_at_step(pipeline, prompts, range(5, 8), ["up.1.1"], sampling, 1, side=side, batch_size=2)
    alone = [
        from_prompts(pipeline, [prompt], [seed], ["up.1.1"], sampling, side=side, steps=[1]).maps["up.1.1"][0].float()
        for seed, prompt in enumerate(prompts, 5)
    ]
    torch.testing.assert_close(found["up.1.1"], torch.cat(alone))


@pytest.mark.parametrize("name", GUIDED)
def test_the_guided_half_is_what_the_prompt_gives_without_guidance(small_pipeline, name):
    pipeline, prompts = small_pipeline(name), prompts_for(name)
    asked = prompts, SEEDS, keeping_their_shape(pipeline)
    both = from_prompts(pipeline, *asked, sampling_for(name), steps=[0])
    alone = from_prompts(pipeline, *asked, sampling_for(name, guidance_scale=1.0), steps=[0])
    assert not alone.unguided
    assert_close(both.maps, alone.maps)
    short = last_block(pipeline)
    assert (both.maps[short][0] - both.unguided[short][0])[0].abs().max() > 1e-3


@pytest.mark.parametrize("name", GUIDED)
def test_the_unguided_half_knows_nothing_of_the_prompt(small_pipeline, name):
    pipeline, prompts = small_pipeline(name), prompts_for(name)
    names = keeping_their_shape(pipeline)
    first = from_prompts(pipeline, prompts, SEEDS, names, sampling_for(name), steps=[0])
    other = from_prompts(pipeline, prompts[::-1], SEEDS, names, sampling_for(name), steps=[0])
    assert_close(first.unguided, other.unguided)
    assert not torch.allclose(first.maps[names[-1]][0], other.maps[names[-1]][0], atol=1e-3)


@pytest.mark.parametrize("name", [name for name in GUIDED if name not in ("dit", "sdxl")])
def test_the_unguided_half_is_the_empty_prompt(small_pipeline, name):
    pipeline = small_pipeline(name)
    seen = from_prompts(pipeline, ["", ""], SEEDS[:2], keeping_their_shape(pipeline), sampling_for(name))
    assert_close(seen.unguided, seen.maps)


def test_the_unguided_half_of_sdxl_is_zeros_unless_it_is_the_empty_prompt(pipeline_folder):
    pipeline = load_pipeline(str(pipeline_folder("sdxl")), device="cpu")
    asked = pipeline, [""], [0], ["up.1.2"], sampling_for("sdxl")
    zeros = from_prompts(*asked)
    assert (zeros.maps["up.1.2"][0] - zeros.unguided["up.1.2"][0]).abs().max() > 1e-3
    pipeline.register_to_config(force_zeros_for_empty_prompt=False)
    empty = from_prompts(*asked)
    assert_close(empty.unguided, empty.maps)


def stem(pipeline):
    return STEM.get(type(find_denoiser(pipeline)).__name__, "pos_embed.proj")


def first_noise(pipeline, name, sampling):
    """The noisy latents that the denoiser takes in at the pipeline's first step, and that step's timestep."""
    with capture(find_denoiser(pipeline), stem(pipeline), side="input", calls=[0], stop=True) as seen:
        generate(pipeline, prompts_for(name), SEEDS, sampling)
    noisy = seen[stem(pipeline)][0]
    if name == "flux":
        noisy = pipeline._unpack_latents(noisy, sampling.height, sampling.width, pipeline.vae_scale_factor)
    return noisy, pipeline.scheduler.timesteps[0].item()


@pytest.mark.parametrize(
    ("name", "guided"), [*((name, True) for name in PIPELINES), *((name, False) for name in GUIDED)]
)
def test_a_pass_of_its_own_gives_what_the_pipeline_gives(small_pipeline, name, guided):
    pipeline, prompts = small_pipeline(name), prompts_for(name)
    sampling = sampling_for(name, guidance_scale=1.0 if guided else 3.0)
    seen = from_prompts(pipeline, prompts, SEEDS, paths_by_name(pipeline), sampling, side="output", steps=[0])
    noisy, timestep = first_noise(pipeline, name, sampling_for(name, guidance_scale=1.0))
    size = (32, 32)  # of which only SDXL is told
    with torch.no_grad(), capture(find_denoiser(pipeline), list(paths_by_name(pipeline).values()), entry=-1) as own:
        predicted = predict(pipeline, noisy, timestep, encode_prompts(pipeline, prompts if guided else None, 3, size))
    expected = seen.maps if guided else seen.unguided
    assert_close({short: [to_maps(own[path][0])] for short, path in paths_by_name(pipeline).items()}, expected)
    assert len(predicted) == 3


def test_sdxl_is_told_its_size(small_pipeline):
    pipeline, path = small_pipeline("sdxl"), "up_blocks.1.attentions.2"
    sampling = Sampling(2, 1.0, 32, 64)
    seen = from_prompts(pipeline, TEXTS, SEEDS, path, sampling, side="output", steps=[0]).maps[path][0]
    noisy, timestep = first_noise(pipeline, "sdxl", sampling)
    for size, right in (((32, 64), True), ((64, 32), False)):
        with torch.no_grad(), capture(find_denoiser(pipeline), path) as own:
            predict(pipeline, noisy, timestep, encode_prompts(pipeline, TEXTS, 3, size))
        assert torch.allclose(to_maps(own[path][0]), seen, atol=1e-4) == right


def test_the_pixart_that_is_told_its_size(tmp_path):
    pixart(sample_size=128).save_pretrained(tmp_path)
    pipeline = load_pipeline(str(tmp_path), device="cpu")
    sampling = Sampling(2, 1.0, 64, 32, {"use_resolution_binning": False})
    seen = from_prompts(pipeline, TEXTS, SEEDS, "block1", sampling, side="output", steps=[0]).maps["block1"][0]
    assert seen.shape == (3, 4, 2, 24)
    noisy = torch.stack([torch.randn(4, 8, 4, generator=torch.Generator().manual_seed(seed)) for seed in SEEDS])
    timestep = pipeline.scheduler.timesteps[0].item()
    for size, right in (((64, 32), True), ((32, 64), False)):
        with torch.no_grad(), capture(find_denoiser(pipeline), "transformer_blocks.1") as own:
            predict(pipeline, noisy, timestep, encode_prompts(pipeline, TEXTS, 3, size))
        assert torch.allclose(to_maps(own["transformer_blocks.1"][0], 2.0), seen, atol=1e-4) == right


@pytest.mark.parametrize("name", ["sd", "sdxl", "deepfloyd", "sd3", "flux"])
def test_pictures_that_are_not_square(small_pipeline, name):
    pipeline, short = small_pipeline(name), last_block(small_pipeline(name))
    sampling = Sampling(1, 1.0, height=32, width=64)
    seen = from_prompts(pipeline, TEXTS, SEEDS, short, sampling, pictures=True)
    assert seen.pictures.shape == (3, 3, 32, 64)
    _, height, width, _ = seen.maps[short][0].shape
    assert width == 2 * height
    again = from_pictures(pipeline, seen.pictures, SEEDS, [9], short)
    assert again.maps[short][0].shape[1:3] == ((height, width) if name != "deepfloyd" else (8, 8))


def test_tokens_inside_a_block_become_maps_too(small_pipeline):
    inner = "mid_block.attentions.0.transformer_blocks.0"
    seen = from_prompts(small_pipeline("sd"), TEXTS, SEEDS, ["mid.0", inner], Sampling(1, height=40, width=56))
    assert seen.maps[inner][0].shape == seen.maps["mid.0"][0].shape == (3, 10, 14, 32)


def test_tokens_and_places_are_those_of_fluxs_pipeline(small_pipeline):
    latents, kind = torch.randn(2, 4, 6, 10), diffusers.FluxPipeline
    tokens, places = conditioning._flux_tokens(latents)
    assert torch.equal(tokens, kind._pack_latents(latents, 2, 4, 6, 10))
    assert torch.equal(places, kind._prepare_latent_image_ids(2, 3, 5, "cpu", torch.float32))


def test_a_size_that_pixart_moves_to_one_that_it_knows(small_pipeline):
    sampling = Sampling(2, 1.0, height=192, width=320)
    seen = from_prompts(small_pipeline("pixart"), TEXTS, SEEDS, "block1", sampling, steps=[0], pictures=True)
    assert seen.pictures.shape == (3, 3, 192, 320)
    height, width = seen.maps["block1"][0].shape[1:3]
    assert height / width == pytest.approx(192 / 320, rel=0.1)


@pytest.mark.parametrize("name", PIPELINES)
def test_features_of_pictures(small_pipeline, name):
    pipeline, pixels = small_pipeline(name), pictures_for(name)
    names, timesteps = list(paths_by_name(pipeline)), [0, 500, last_timestep(small_pipeline(name))]
    batch = from_pictures(pipeline, pixels, SEEDS, timesteps, names)
    assert batch.unguided == {}
    assert batch.pictures is None
    for short in names:
        assert len(batch.maps[short]) == 3
        assert all(one.shape[0] == 3 and one.ndim == 4 and one.isfinite().all() for one in batch.maps[short])
    alone = from_pictures(pipeline, pixels[1:2], SEEDS[1:2], [500], names[-1])
    assert list(alone.maps) == names[-1:]
    assert_close(alone.maps, {names[-1]: [batch.maps[names[-1]][1][1:2]]})
    again = from_pictures(pipeline, pixels, SEEDS, timesteps[::-1], names[::-1])
    assert_equal(again.maps, {short: batch.maps[short][::-1] for short in names[::-1]})


@pytest.mark.parametrize("name", PIPELINES)
def test_a_pictures_noise_is_its_seeds(small_pipeline, name):
    pipeline, pixels = small_pipeline(name), pictures_for(name, count=1).repeat(3, 1, 1, 1)
    short = last_block(pipeline)
    (seen,) = from_pictures(pipeline, pixels, [1, 2, 1], [600], short).maps[short]
    torch.testing.assert_close(seen[0], seen[2], atol=1e-4, rtol=1e-4)
    assert (seen[0] - seen[1]).abs().max() > 1e-3


@pytest.mark.parametrize("name", PIPELINES)
def test_pictures_fade_as_the_timestep_rises(small_pipeline, name):
    pipeline, pixels = small_pipeline(name), pictures_for(name)
    short, last = last_block(pipeline), last_timestep(pipeline)
    seen = from_pictures(pipeline, pixels, [1, 1, 1], [0, last // 2, last], short).maps[short]
    start, middle, end = ((one[0] - one[1]).square().mean().item() for one in seen)
    assert start > middle > end
    assert name not in ("sd3", "flux", "world") or end < 1e-10


@pytest.mark.parametrize("name", PIPELINES)
def test_a_prompt_for_every_picture(small_pipeline, name):
    pipeline, pixels, prompts = small_pipeline(name), pictures_for(name), prompts_for(name)
    short = last_block(pipeline)
    told = from_pictures(pipeline, pixels, SEEDS, [300], short, prompts=prompts).maps[short][0]
    silent = from_pictures(pipeline, pixels, SEEDS, [300], short).maps[short][0]
    swapped = from_pictures(pipeline, pixels, SEEDS, [300], short, prompts=[*prompts[:2], prompts[0]]).maps[short][0]
    torch.testing.assert_close(told[:2], swapped[:2], atol=1e-4, rtol=1e-4)
    assert (told[2] - swapped[2]).abs().max() > 1e-3
    assert (told[0] - silent[0]).abs().max() > 1e-3
    no_prompt_is_the_empty_one = torch.allclose(told[1], silent[1], atol=1e-4)
    assert no_prompt_is_the_empty_one == (name not in ("dit", "sdxl"))


@pytest.mark.parametrize("name", PIPELINES)
def test_the_pass_over_pictures_is_encode_then_noise_then_predict(small_pipeline, name):
    pipeline, pixels = small_pipeline(name), pictures_for(name)
    short, path = last_block(pipeline), paths_by_name(small_pipeline(name))[last_block(small_pipeline(name))]
    seen = from_pictures(pipeline, pixels, SEEDS, [400], short, side="update").maps[short][0]
    with torch.no_grad():
        latents = encode_pictures(pipeline, pixels)
        noise = [torch.randn(latents.shape[1:], generator=torch.Generator().manual_seed(seed)) for seed in SEEDS]
        noisy = add_noise(pipeline, latents, torch.stack(noise), 400)
        with capture(find_denoiser(pipeline), path, side="update", entry=-1) as own:
            predict(pipeline, noisy, 400, encode_prompts(pipeline, None, 3, (32, 32)))
    assert torch.equal(to_maps(own[path][0]), seen)


def schedule(config):
    """Betas of the schedules that the small pipelines have, in float64."""
    if config.beta_schedule == "squaredcos_cap_v2":
        share = np.arange(1001) / 1000
        kept = np.cos((share + 0.008) / 1.008 * math.pi / 2) ** 2
        return np.minimum(1 - kept[1:] / kept[:-1], 0.999)
    if config.beta_schedule == "linear":
        return np.linspace(config.beta_start, config.beta_end, 1000)
    return np.linspace(config.beta_start**0.5, config.beta_end**0.5, 1000) ** 2


@pytest.mark.parametrize("name", [name for name in PIPELINES if name not in ("sd3", "flux")])
@pytest.mark.parametrize("timestep", [0, 1, 500, 999])
def test_noise_by_the_formula(small_pipeline, name, timestep):
    pipeline = small_pipeline(name)
    kept = np.cumprod(1 - schedule(pipeline.scheduler.config))
    if name == "world":  # a last timestep of pure noise (Lin et al. 2023, algorithm 1)
        root = np.sqrt(kept)
        kept = ((root - root[-1]) * root[0] / (root[0] - root[-1])) ** 2
    latents, noise = torch.randn(2, 2, 4, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    expected = math.sqrt(kept[timestep]) * latents + math.sqrt(1 - kept[timestep]) * noise
    torch.testing.assert_close(add_noise(pipeline, latents, noise, timestep), expected, atol=3e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["sd3", "flux"])
@pytest.mark.parametrize("timestep", [0, 1, 500, 1000])
def test_noise_of_a_flow_by_the_formula(small_pipeline, name, timestep):
    latents, noise = torch.randn(2, 2, 4, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    expected = (1 - timestep / 1000) * latents + timestep / 1000 * noise
    assert torch.equal(add_noise(small_pipeline(name), latents, noise, timestep), expected)


@pytest.mark.parametrize("name", [name for name in PIPELINES if name not in ("sdxl", "sd3", "flux")])
def test_noise_is_the_schedulers_own(small_pipeline, name):
    pipeline = small_pipeline(name)
    latents, noise = torch.randn(2, 2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    for timestep in (0, 250, 999):
        expected = diffusers.DDPMScheduler.from_config(pipeline.scheduler.config).add_noise(
            latents, noise, torch.tensor([timestep, timestep])
        )
        torch.testing.assert_close(add_noise(pipeline, latents, noise, timestep), expected, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize(
    "kind",
    [diffusers.EulerAncestralDiscreteScheduler, diffusers.EulerDiscreteScheduler, diffusers.LMSDiscreteScheduler],
)
def test_noise_is_that_of_schedulers_that_scale_their_input(small_pipeline, kind):
    config = small_pipeline("sdxl").scheduler.config
    scheduler = kind.from_config({**config, "timestep_spacing": "trailing"})
    scheduler.set_timesteps(4)
    latents, noise = torch.randn(2, 2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    pipeline = type("Pipeline", (), {"scheduler": scheduler})()
    for timestep in scheduler.timesteps:
        scheduler._step_index = None
        unscaled = scheduler.add_noise(latents, noise, timestep[None].expand(2))
        expected = scheduler.scale_model_input(unscaled, timestep)
        ours = add_noise(pipeline, latents, noise, int(timestep))
        torch.testing.assert_close(ours, expected, atol=1e-5, rtol=1e-5)


def test_noise_of_a_flow_is_the_schedulers_own(small_pipeline):
    pipeline = small_pipeline("sd3")
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler.from_config(pipeline.scheduler.config)
    scheduler.set_timesteps(4)
    latents, noise = torch.randn(2, 2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    for timestep in scheduler.timesteps:
        expected = scheduler.scale_noise(latents, timestep[None].expand(2), noise)
        torch.testing.assert_close(add_noise(pipeline, latents, noise, timestep.item()), expected)


def test_a_scheduler_without_a_schedule_of_noise_is_refused():
    pipeline = type("Pipeline", (), {"scheduler": diffusers.EDMEulerScheduler()})()
    with pytest.raises(ValueError, match=r"^model: EDMEulerScheduler has neither alphas_cumprod"):
        add_noise(pipeline, torch.zeros(1), torch.zeros(1), 0)


@pytest.mark.parametrize("name", [name for name in PIPELINES if name not in MODELS_OF_PIXELS])
def test_latents_are_the_posteriors_means_shifted_and_scaled(small_pipeline, name):
    pipeline, pixels = small_pipeline(name), pictures_for(name)
    with torch.no_grad():
        mean = pipeline.vae.encode(pixels).latent_dist.mean
        latents = encode_pictures(pipeline, pixels)
    shift = {"sd3": 0.06, "flux": 0.1}.get(name, 0.0)
    torch.testing.assert_close(latents, (mean - shift) * pipeline.vae.config.scaling_factor)


def test_pictures_are_resized_for_a_model_of_pixels(small_pipeline):
    stripes = torch.tensor([1.0, -0.5]).repeat(2, 3, 32, 16)
    latents = encode_pictures(small_pipeline("deepfloyd"), stripes)
    assert latents.shape == (2, 3, 16, 16)
    torch.testing.assert_close(latents[..., 1:-1], torch.full((2, 3, 16, 14), 0.25))
    own = pictures_for("deepfloyd", side=16)
    assert torch.equal(encode_pictures(small_pipeline("deepfloyd"), own), own)


@pytest.mark.parametrize(("precision", "dtype"), [("float16", torch.float16), ("bfloat16", torch.bfloat16)])
def test_the_sdxl_vae_encodes_in_float32_when_float16_would_overflow(pipeline_folder, precision, dtype):
    pipeline = load_pipeline(str(pipeline_folder("sdxl")), device="cpu", precision=precision)
    with torch.no_grad(), capture(pipeline.vae, "encoder.conv_in") as seen:
        latents = encode_pictures(pipeline, pictures_for("sdxl"))
    assert latents.dtype == dtype
    assert seen["encoder.conv_in"][0].dtype == (torch.float32 if precision == "float16" else dtype)
    assert {parameter.dtype for parameter in pipeline.vae.parameters()} == {dtype}


@pytest.mark.parametrize("name", ["sdxl", "dit", "sd3"])
def test_half_precision_runs(pipeline_folder, name):
    pipeline = load_pipeline(str(pipeline_folder(name)), device="cpu", precision="bfloat16")
    short = last_block(pipeline)
    seen = from_prompts(pipeline, prompts_for(name), SEEDS, short, sampling_for(name, 2), pictures=True)
    assert seen.maps[short][0].dtype == torch.bfloat16
    assert seen.pictures.dtype == torch.float32
    assert from_pictures(pipeline, pictures_for(name), SEEDS, [10], short).maps[short][0].dtype == torch.bfloat16


@pytest.mark.parametrize("name", PIPELINES)
@pytest.mark.parametrize("side", ["output", "update"])
def test_an_edit_that_changes_nothing_leaves_the_picture_bit_for_bit(small_pipeline, name, side):
    pipeline, sampling = small_pipeline(name), sampling_for(name)
    path = paths_by_name(pipeline)[last_block(pipeline)]
    expected = generate(pipeline, prompts_for(name), SEEDS, sampling)
    with edit(find_denoiser(pipeline), {path: lambda h: h.clone()}, side=side, entry=-1):
        assert torch.equal(generate(pipeline, prompts_for(name), SEEDS, sampling), expected)


RESIDUAL_BRANCHES = {
    "sd": ["up_blocks.1.attentions.1.proj_out"],
    "sd2": ["up_blocks.1.attentions.1.proj_out"],
    "sdxl": ["down_blocks.2.attentions.1.proj_out"],
    "world": ["down_blocks.1.attentions.1.proj_out"],
    "dit": ["transformer_blocks.1.attn1.to_out.0", "transformer_blocks.1.ff.net.2"],
    "pixart": [f"transformer_blocks.0.{last}" for last in ("attn1.to_out.0", "attn2.to_out.0", "ff.net.2")],
    "sd3": ["transformer_blocks.0.attn.to_out.0", "transformer_blocks.0.ff.net.2"],
    "flux": ["transformer_blocks.1.attn.to_out.0", "transformer_blocks.1.ff.net.2"],
}
"""The layers at the end of the branches that a block adds to the picture's stream."""


@pytest.mark.parametrize("name", RESIDUAL_BRANCHES)
def test_an_update_switched_off_is_the_block_without_its_residual_branches(pipeline_folder, name):
    pipeline, sampling = load_pipeline(str(pipeline_folder(name)), device="cpu"), sampling_for(name)
    model = find_denoiser(pipeline)
    path = next(path for path in paths_by_name(pipeline).values() if RESIDUAL_BRANCHES[name][0].startswith(path + "."))
    untouched = generate(pipeline, prompts_for(name), SEEDS, sampling)
    with edit(model, {path: lambda u: 0 * u}, side="update", entry=-1):
        switched_off = generate(pipeline, prompts_for(name), SEEDS, sampling)
    for layer in RESIDUAL_BRANCHES[name]:
        for parameter in model.get_submodule(layer).parameters():
            torch.nn.init.zeros_(parameter)
    assert torch.equal(generate(pipeline, prompts_for(name), SEEDS, sampling), switched_off)
    assert not torch.equal(untouched, switched_off)


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        (diffusers.PNDMScheduler, 5),
        (diffusers.DDIMScheduler, 4),
        (diffusers.HeunDiscreteScheduler, 7),
        (diffusers.EulerAncestralDiscreteScheduler, 4),
        (diffusers.DPMSolverMultistepScheduler, 4),
    ],
)
def test_passes_of_the_denoiser(pipeline_folder, kind, expected):
    pipeline = load_pipeline(str(pipeline_folder("sd")), device="cpu")
    pipeline.scheduler = kind.from_config(pipeline.scheduler.config)
    before = dict(vars(pipeline.scheduler))
    assert count_passes(pipeline, Sampling(4)) == expected
    assert vars(pipeline.scheduler).keys() == before.keys()
    with capture(pipeline.unet, "mid_block") as seen:
        generate(pipeline, TEXTS[:1], [0], Sampling(4))
    assert len(seen["mid_block"]) == expected
    taken = from_prompts(pipeline, TEXTS[:1], [0], "bottleneck", Sampling(4), side="output").maps["bottleneck"]
    assert_equal({"all": [one[1:] for one in map(to_maps, seen["mid_block"])]}, {"all": taken})


def test_nothing_is_warned_of_and_the_progress_bar_is_left_as_it_was(small_pipeline, complaints, capsys):
    pipelines = {name: small_pipeline(name) for name in PIPELINES}
    capsys.readouterr()
    for name, pipeline in pipelines.items():
        sampling = sampling_for(name)
        pipeline.set_progress_bar_config(desc="mine")
        from_prompts(pipeline, prompts_for(name), SEEDS, last_block(pipeline), sampling, pictures=True)
        from_pictures(pipeline, pictures_for(name), SEEDS, [3], last_block(pipeline))
        assert pipeline._progress_bar_config == {"desc": "mine"}
        pipeline.set_progress_bar_config(disable=True)
    assert complaints() == []
    assert capsys.readouterr().err.strip() == ""


ASKED = {"prompts": TEXTS, "seeds": SEEDS, "blocks": "mid.0", "sampling": Sampling(2)}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"blocks": ["mid.0", "mid.1"]}, r"blocks: unknown name 'mid.1'; the nearest of .*mid.0"),
        ({"seeds": [1, 2]}, r"seeds: expected one for each of 3, got \[1, 2\]"),
        ({"prompts": "a red circle"}, "prompts: expected one for each of 12, got 'a red circle'"),
        ({"prompts": [], "seeds": []}, "prompts: must be at least 1, got 0"),
        ({"steps": [3]}, r"capture_steps: expected numbers from 0 to 2, got \[3\]"),
        ({"steps": [0, -1]}, r"capture_steps: expected numbers from 0 to 2, got \[-1, 0\]"),
        ({"steps": []}, r"capture_steps: expected numbers from 0 to 2, got \[\]"),
        ({"side": "outputs"}, "side: unknown name 'outputs'"),
        ({"sampling": Sampling(2, options={"timesteps": [5]})}, "options: with timesteps a step is no longer one pass"),
    ],
)
def test_wrong_requests_from_prompts(small_pipeline, changes, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        from_prompts(small_pipeline("sd"), **{**ASKED, **changes})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"blocks": "mid.1"}, "blocks: unknown name 'mid.1'"),
        ({"seeds": [1]}, r"seeds: expected one for each of 3, got \[1\]"),
        ({"prompts": ["a"]}, r"prompts: expected one for each of 3, got \['a'\]"),
        ({"timesteps": [1000]}, r"timesteps: expected numbers from 0 to 999, got \[1000\]"),
        ({"timesteps": [5, -1]}, r"timesteps: expected numbers from 0 to 999, got \[5, -1\]"),
        ({"timesteps": []}, r"timesteps: expected numbers from 0 to 999, got \[\]"),
        ({"pixels": torch.zeros(3, 3, 33, 32)}, "resolution: pictures of 33 x 32; this model takes multiples of 2"),
    ],
)
def test_wrong_requests_from_pictures(small_pipeline, changes, message):
    asked = {"pixels": pictures_for("sd"), "seeds": SEEDS, "timesteps": [0], "blocks": "mid.0"}
    with pytest.raises(ValueError, match=f"^{message}"):
        from_pictures(small_pipeline("sd"), **{**asked, **changes})


@pytest.mark.parametrize(("name", "side", "multiple"), [("flux", 34, 4), ("dit", 34, 4), ("pixart", 40, 16)])
def test_sides_that_patches_do_not_divide_are_refused(small_pipeline, name, side, multiple):
    with pytest.raises(ValueError, match=f"^resolution: pictures of {side} x {side}; .* multiples of {multiple}"):
        from_pictures(small_pipeline(name), pictures_for(name, side=side), SEEDS, [0], "block0")


def test_pure_noise_is_the_flows_last_timestep(small_pipeline):
    assert last_timestep(small_pipeline("sd3")) == 1000
    with pytest.raises(ValueError, match="timesteps: expected numbers from 0 to 1000"):
        from_pictures(small_pipeline("sd3"), pictures_for("sd3"), SEEDS, [1001], "block0")


@pytest.mark.parametrize("number", [1000, -1, "cat", 1.5])
def test_classes_that_the_model_does_not_have_are_refused(small_pipeline, number):
    pipeline = small_pipeline("dit")
    message = rf"^prompts: expected class numbers from 0 to 999, got {number!r}"
    with pytest.raises(ValueError, match=message):
        from_prompts(pipeline, [number], [0], "block0", Sampling(2))
    with pytest.raises(ValueError, match=message):
        from_pictures(pipeline, pictures_for("dit", 1), [0], [5], "block0", prompts=[number])


def test_classes_may_be_numbers_in_a_params_file(small_pipeline):
    pipeline = small_pipeline("dit")
    numbers, texts = (generate(pipeline, classes, SEEDS, Sampling(2)) for classes in (CLASSES, [*map(str, CLASSES)]))
    assert torch.equal(numbers, texts)


def test_size_of_a_class_conditional_models_pictures_is_its_own(small_pipeline):
    with pytest.raises(ValueError, match=r"^height and width: a class-conditional model"):
        generate(small_pipeline("dit"), CLASSES, SEEDS, Sampling(2, height=32, width=32))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": 0}, "steps: must be at least 1, got 0"),
        ({"guidance_scale": -1}, "guidance_scale: must be at least 0"),
        ({"height": 32}, "height and width: expected both or neither, got 32 and None"),
        ({"height": 0, "width": 0}, r"resolution \(height\): must be at least 8, got 0"),
        ({"options": {"generator": None}}, "options: generator is set by the lab"),
        ({"options": {"num_images_per_prompt": 2}}, "options: num_images_per_prompt is set by the lab"),
    ],
)
def test_contradictory_sampling_is_refused(changes, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        Sampling(**changes)


@pytest.mark.parametrize(("name", "side", "multiple"), [("sd", 63, 8), ("sdxl", 20, 8), ("flux", 36, 8)])
def test_a_size_that_the_model_does_not_make_is_refused_before_it_runs(
    small_pipeline, monkeypatch, name, side, multiple
):
    pipeline = small_pipeline(name)
    monkeypatch.setattr(type(pipeline), "encode_prompt", None)  # so that nothing can be computed
    with pytest.raises(ValueError, match=f"^resolution: pictures of {side} x {side}; .* multiples of {multiple}"):
        generate(pipeline, TEXTS, SEEDS, Sampling(1, height=side, width=side))


def test_a_size_is_refused_where_another_alone_will_do(small_pipeline):
    pipeline = small_pipeline("sd")
    validate_size(pipeline, Sampling(), 32)
    validate_size(pipeline, Sampling(height=64, width=64), 64)
    validate_size(small_pipeline("pixart"), Sampling(height=200, width=200))  # which rounds by itself
    for own in (pipeline, small_pipeline("dit")):
        with pytest.raises(ValueError, match=r"^resolution: pictures of 32 x 32; of this dataset they must be 64 x 64"):
            validate_size(own, Sampling(), 64)


def test_options_reach_the_pipeline(small_pipeline):
    pipeline = small_pipeline("sd")
    plain, negative, eta = (
        generate(pipeline, TEXTS, SEEDS, Sampling(2, options=options))
        for options in ({}, {"negative_prompt": ["two stars"] * 3}, {"eta": 0.0})
    )
    assert not torch.equal(plain, negative)
    assert torch.equal(plain, eta)
