"""What a denoiser takes in is read from configurations and schedulers, not from the names of classes."""

import json
import shutil

import diffusers
import pytest
import torch
from small_pipelines import clip_model, clip_tokenizer, unet, vae
from transformers import CLIPTextModelWithProjection

from vaelab.activations.denoiser import Sampling, from_pictures, from_prompts
from vaelab.hooks import capture
from vaelab.models import conditioning, load_pipeline
from vaelab.models.block_names import architecture, blocks, find_denoiser
from vaelab.models.conditioning import add_noise, encode_pictures, encode_prompts, is_flow, last_timestep, predict

PIXELS = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(3)) * 2 - 1


@pytest.fixture
def pair():
    return torch.randn(2, 2, 4, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    "kind",
    [
        diffusers.DPMSolverMultistepScheduler,
        diffusers.UniPCMultistepScheduler,
        diffusers.DEISMultistepScheduler,
        diffusers.DPMSolverSinglestepScheduler,
    ],
)
def test_a_solver_that_is_set_to_flow_sigmas_adds_the_noise_of_a_flow(pipeline_folder, pair, kind):
    pipeline = load_pipeline(str(pipeline_folder("sd3")), device="cpu")
    pipeline.scheduler = kind(use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=3.0)
    assert is_flow(pipeline)
    assert last_timestep(pipeline) == 1000
    latents, noise = pair
    expected = 0.7 * latents + 0.3 * noise
    torch.testing.assert_close(add_noise(pipeline, latents, noise, 300), expected)
    pipeline.scheduler.set_timesteps(4)
    timestep = int(pipeline.scheduler.timesteps[1])
    alone = pipeline.scheduler.add_noise(latents, noise, pipeline.scheduler.timesteps[1][None].expand(2))
    rounding = (noise - latents).abs().max().item() / 1000  # the solver's timesteps are whole numbers, its sigmas not
    torch.testing.assert_close(add_noise(pipeline, latents, noise, timestep), alone, atol=rounding, rtol=0)
    seen = from_pictures(pipeline, PIXELS, [0, 1], [300], "block0").maps["block0"][0]
    pipeline.scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    assert torch.equal(seen, from_pictures(pipeline, PIXELS, [0, 1], [300], "block0").maps["block0"][0])


def test_the_same_solver_for_a_diffusion_adds_the_noise_of_a_diffusion(small_pipeline, pair):
    scheduler = diffusers.DPMSolverMultistepScheduler.from_config(small_pipeline("sd").scheduler.config)
    pipeline = type("Pipeline", (), {"scheduler": scheduler})()
    assert not is_flow(pipeline)
    assert last_timestep(pipeline) == 999
    expected = diffusers.DDPMScheduler.from_config(scheduler.config).add_noise(*pair, torch.tensor([500, 500]))
    torch.testing.assert_close(add_noise(pipeline, *pair, 500), expected, atol=1e-6, rtol=1e-5)


def test_a_flow_that_runs_backwards_is_refused(pair):
    pipeline = type("Pipeline", (), {"scheduler": diffusers.FlowMatchEulerDiscreteScheduler(invert_sigmas=True)})()
    with pytest.raises(ValueError, match=r"^model: FlowMatchEulerDiscreteScheduler with invert_sigmas"):
        add_noise(pipeline, *pair, 5)


def test_a_denoiser_of_a_class_of_ones_own_is_what_it_inherits_from(small_pipeline):
    class Renamed(diffusers.DiTTransformer2DModel):
        pass

    model = Renamed.from_config(small_pipeline("dit").transformer.config)
    assert architecture(model) == "DiTTransformer2DModel"
    assert list(blocks(model)) == ["block0", "block1"]
    pipeline = type("Pipeline", (), {"transformer": model, "config": None})()
    assert conditioning.is_class_conditional(pipeline)
    assert encode_prompts(pipeline, [3, 4], 2, (32, 32))["class_labels"].tolist() == [3, 4]


def test_a_model_with_a_guidance_embedding_gets_the_embedding_of_its_pipeline(pipeline_folder, tmp_path):
    folder = shutil.copytree(pipeline_folder("sd"), tmp_path / "lcm")
    unet(time_cond_proj_dim=8).save_pretrained(folder / "unet")
    pipeline = load_pipeline(str(folder), device="cpu")
    asked = pipeline, ["a red circle", "two stars"], [0, 1], "mid.0"
    seen = from_prompts(*asked, Sampling(2, 1.0), side="output", steps=[0]).maps["mid.0"][0]
    with capture(pipeline.unet, "conv_in", side="input", calls=[0]) as noisy:
        from_prompts(*asked, Sampling(2, 1.0), side="output", steps=[0], pictures=True)
    conditions = encode_prompts(pipeline, asked[1], 2, (32, 32))
    assert conditions["timestep_cond"].shape == (2, 8)
    timestep = pipeline.scheduler.timesteps[0].item()
    for given, right in ((conditions, True), ({**conditions, "timestep_cond": None}, False)):
        with torch.no_grad(), capture(pipeline.unet, "mid_block.attentions.0") as own:
            predict(pipeline, noisy["conv_in"][0], timestep, given)
        own_maps = own["mid_block.attentions.0"][0].permute(0, 2, 3, 1)
        assert torch.allclose(own_maps, seen, atol=1e-4) == right


@pytest.mark.parametrize(("size", "takes"), [(32, True), (128, False)])
def test_a_pixart_takes_its_size_where_its_configuration_says_so(pipeline_folder, tmp_path, size, takes):
    folder = shutil.copytree(pipeline_folder("pixart"), tmp_path / "pixart")
    config = {**json.loads((folder / "transformer" / "config.json").read_text()), "sample_size": size}
    model = diffusers.PixArtTransformer2DModel.from_config({**config, "use_additional_conditions": takes})
    model.save_pretrained(folder / "transformer")
    pipeline = load_pipeline(str(folder), device="cpu")
    conditions = encode_prompts(pipeline, ["a red circle"], 1, (64, 32))
    assert (conditions["added_cond_kwargs"]["resolution"] is not None) == takes
    with torch.no_grad():
        predict(pipeline, torch.zeros(1, 4, size, size), 5, conditions)


@pytest.fixture(scope="module")
def refiner(tmp_path_factory):
    """SDXL's refiner: one text model, five time ids, of which the last is an aesthetic score."""
    folder, tokenizer = tmp_path_factory.mktemp("refiner"), clip_tokenizer()
    diffusers.StableDiffusionXLImg2ImgPipeline(
        vae=vae(),
        text_encoder=None,
        text_encoder_2=clip_model(tokenizer, CLIPTextModelWithProjection),
        tokenizer=None,
        tokenizer_2=tokenizer,
        unet=unet(
            addition_embed_type="text_time", addition_time_embed_dim=8, cross_attention_dim=16,
            projection_class_embeddings_input_dim=16 + 5 * 8,
        ),
        scheduler=diffusers.EulerDiscreteScheduler(),
        requires_aesthetics_score=True,
        force_zeros_for_empty_prompt=False,
        add_watermarker=False,
    ).save_pretrained(folder)  # fmt: skip
    return load_pipeline(str(folder), device="cpu")


def test_the_refiner_takes_a_score_as_its_pipeline_does(refiner):
    encode_pictures(refiner, PIXELS)
    ids = encode_prompts(refiner, ["a red circle"] * 2, 2, (32, 64))["added_cond_kwargs"]["time_ids"]
    expected, negative = refiner._get_add_time_ids(
        (32, 64), (0, 0), (32, 64), 6.0, 2.5, (32, 64), (0, 0), (32, 64), torch.float32, 16
    )
    assert torch.equal(ids, expected.expand(2, -1))
    assert torch.equal(encode_prompts(refiner, None, 1, (32, 64))["added_cond_kwargs"]["time_ids"], negative)
    assert from_pictures(refiner, PIXELS, [0, 1], [5], "mid.0").maps["mid.0"][0].shape == (2, 8, 8, 32)
    assert blocks(refiner)["mid.0"].shape == (8, 8, 32)


def test_a_pipeline_that_starts_from_a_picture_draws_from_no_prompt_alone(refiner):
    with pytest.raises(ValueError, match=r"^model: StableDiffusionXLImg2ImgPipeline makes pictures from a picture"):
        from_prompts(refiner, ["a red circle"], [0], "mid.0", Sampling(2))


def test_sd3_without_its_third_text_encoder(pipeline_folder, tmp_path):
    folder = shutil.copytree(pipeline_folder("sd3"), tmp_path / "sd3")
    index = json.loads((folder / "model_index.json").read_text())
    index |= {"text_encoder_3": [None, None], "tokenizer_3": [None, None]}
    (folder / "model_index.json").write_text(json.dumps(index))
    shutil.rmtree(folder / "text_encoder_3")
    pipeline = load_pipeline(str(folder), device="cpu")
    assert pipeline.text_encoder_3 is None
    seen = from_prompts(pipeline, ["a red circle"], [0], "block0", Sampling(2), side="output")
    assert seen.maps["block0"][0].isfinite().all()
    assert from_pictures(pipeline, PIXELS, [0, 1], [5], "block0").maps["block0"][0].shape == (2, 8, 8, 16)
    assert find_denoiser(pipeline) is pipeline.transformer


@pytest.mark.parametrize("name", ["flux", "sd3"])
def test_the_pictures_stream_is_taken_also_where_text_has_as_many_tokens(small_pipeline, name):
    pipeline = small_pipeline(name)
    options = {"max_sequence_length": 64} if name == "flux" else {}
    sampling, taken = Sampling(1, 1.0, 32, 32, options), {}
    inner = "transformer_blocks.0.attn"
    model = find_denoiser(pipeline)

    def note(module, args, kwargs):
        taken["block0"] = kwargs["hidden_states"]  # which the next block gets by name

    handles = [
        model.transformer_blocks[1].register_forward_pre_hook(note, with_kwargs=True),
        model.transformer_blocks[0].attn.register_forward_hook(lambda module, args, out: taken.update({inner: out[0]})),
    ]
    seen = from_prompts(pipeline, ["a red circle"], [0], ["block0", inner], sampling, side="output", pictures=True).maps
    for handle in handles:
        handle.remove()
    for layer in ("block0", inner):
        assert torch.equal(seen[layer][0].flatten(1, 2), taken[layer])
    assert from_pictures(pipeline, PIXELS, [0, 1], [5], [inner, "block0"]).maps[inner][0].shape[0] == 2


@pytest.mark.parametrize(
    ("name", "layer", "message"),
    [
        ("flux", "transformer_blocks.0.ff_context", "works on the text's tokens"),
        ("sd3", "context_embedder", "works on the text's tokens"),
        ("flux", "transformer_blocks.0.attn.add_q_proj", "works on the text's tokens"),
        ("flux", "single_transformer_blocks.0.attn", "works on the tokens of text and picture in one sequence"),
    ],
)
def test_layers_that_work_on_text_are_no_blocks_of_the_picture(small_pipeline, name, layer, message):
    with pytest.raises(ValueError, match=f"^blocks: {layer} {message}"):
        from_pictures(small_pipeline(name), PIXELS, [0, 1], [5], layer)
