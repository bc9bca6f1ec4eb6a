"""The training of the text-to-image model: its data, its loss, and that it learns and resumes."""

import numpy as np
import pytest
import torch

from vaelab import denoise, models, text_model, text_to_image, world
from vaelab.text_to_image import DenoisingObjective, ModelConfig, ScheduleConfig
from vaelab.training import TrainConfig, train

SIZES = ModelConfig(
    vae_channels=(16, 16, 16), unet_channels=(16, 32), unet_layers=1, head_width=16, text_width=32, text_layers=1
)


def untrained():
    vae = text_to_image.new_vae(SIZES)
    vae.requires_grad_(False).register_to_config(scaling_factor=text_to_image.latent_scale(vae))
    tokenizer = text_model.new_tokenizer()
    return text_to_image.new_pipeline(vae, text_model.new_text_model(tokenizer, 32, 1), tokenizer, SIZES)


@pytest.fixture(scope="module")
def pipeline():
    return untrained()


def test_every_stage_has_transformers(pipeline):
    names = [name for name in models.blocks(pipeline) if name[0] != "b" and "ft" not in name]
    assert names == ["down.0.0", "down.1.0", "mid.0", "up.0.0", "up.0.1", "up.1.0", "up.1.1"]
    assert models.blocks(pipeline)["down.1.0"].shape == (8, 8, 32)


def test_the_last_timestep_is_pure_noise(pipeline):
    assert float(pipeline.scheduler.alphas_cumprod[-1]) == 0


def test_the_loss_is_the_weighted_velocity_error(pipeline):
    """v = sqrt(abar) eps - sqrt(1 - abar) z (Salimans and Ho 2022), in float64."""
    config = ScheduleConfig(prompt_dropout=0.0, place_weight=0.0)
    objective = DenoisingObjective(pipeline, config).eval()
    batch = next(text_to_image.prompted(3, pipeline.tokenizer, ScheduleConfig(curriculum=10))(start=5))
    torch.manual_seed(0)
    losses = objective(batch)
    torch.manual_seed(0)
    latents = models.posterior(pipeline.vae, batch["pixels"]).mode() * pipeline.vae.config.scaling_factor
    noise = torch.randn_like(latents)
    timesteps = torch.where(batch["blank"], 999, objective._timesteps(3))
    kept = pipeline.scheduler.alphas_cumprod[timesteps].double().reshape(-1, 1, 1, 1)
    noisy = kept.sqrt() * latents + (1 - kept).sqrt() * noise
    velocity = kept.sqrt() * noise - (1 - kept).sqrt() * latents
    with torch.no_grad():
        states = pipeline.text_encoder(batch["tokens"])[0]
        predicted = pipeline.unet(noisy.float(), timesteps, states).sample
    error = ((predicted - velocity) ** 2).mean(1, keepdim=True)
    weight = torch.nn.functional.avg_pool2d(batch["weight"], 4).double()
    assert losses["loss"].item() == pytest.approx(((weight * error).sum() / weight.sum()).item(), rel=1e-4)
    assert losses["error"].item() == pytest.approx(error.mean().item(), rel=1e-4)


def test_what_blocks_know_of_places_is_the_cross_entropy_of_rows_and_columns(pipeline):
    objective = DenoisingObjective(pipeline, ScheduleConfig())
    assert list(objective._knowing.values()) == [(8, 8, 32)] * 4 + [(16, 16, 16)] * 2
    maps = [torch.randn(2, shape[2], *shape[:2]) for shape in objective._knowing.values()]
    terms = []
    for head, each in zip(objective.places, maps, strict=True):
        side = each.shape[-1]
        for y in range(side):
            for x in range(side):
                scores = head(each[:, :, y, x]).double()
                terms.append(-scores[:, :side].log_softmax(1)[:, y].mean().item() / side**2)
                terms.append(-scores[:, side:].log_softmax(1)[:, x].mean().item() / side**2)
    assert objective._place(maps).item() == pytest.approx(sum(terms) / (2 * len(maps)), rel=1e-5)
    batch = next(text_to_image.prompted(2, pipeline.tokenizer, ScheduleConfig())())
    losses = objective(batch)
    losses["place"].backward()
    assert pipeline.unet.conv_in.weight.grad.abs().max() > 0
    pipeline.unet.zero_grad()


def test_dropped_prompts_are_the_empty_one(pipeline, monkeypatch):
    objective = DenoisingObjective(pipeline, ScheduleConfig(prompt_dropout=1.0))
    seen = []
    forward = pipeline.text_encoder.forward
    monkeypatch.setattr(pipeline.text_encoder, "forward", lambda tokens: seen.append(tokens) or forward(tokens))
    objective(next(text_to_image.prompted(2, pipeline.tokenizer, ScheduleConfig())()))
    empty = text_model.tokenize(pipeline.tokenizer, [""])[0]
    assert torch.equal(seen[0], empty.expand(2, -1))


def test_most_of_the_timesteps_are_the_samplers(pipeline):
    objective = DenoisingObjective(pipeline, ScheduleConfig(sampler_steps=4, sampler_share=0.5))
    torch.manual_seed(0)
    drawn = objective._timesteps(4000)
    shares = [(drawn == timestep).float().mean() for timestep in (999, 749, 499, 249)]
    assert shares == pytest.approx([0.2, 0.15, 0.1, 0.05], abs=0.02)
    assert drawn.min() < 20 and drawn.max() == 999


def test_the_curriculum_goes_from_one_named_thing_to_any_scene(pipeline):
    config = ScheduleConfig(curriculum=100, thing_weight=(10, 2))
    stream = text_to_image.prompted(32, pipeline.tokenizer, config)
    first, half, late = (next(stream(start=step)) for step in (0, 50, 100))
    scene = world.sample(0)
    assert [batch["weight"].unique().tolist() for batch in (first, half, late)] == [[1, 10], [1, 6], [1, 2]]
    assert [int(batch["blank"].sum()) for batch in (first, half, late)] == [32, 16, 0]
    easy = text_to_image._easy(scene)
    assert len(easy.things) == 1 and easy.things[0].named == world.THING_FACTORS
    torch.testing.assert_close(first["pixels"][0], world.render([easy])[0])
    torch.testing.assert_close(late["pixels"][5], world.render([world.sample(100 * 32 + 5)])[0])
    words = [len(pipeline.tokenizer(world.sample(100 * 32 + i).prompt).input_ids) for i in range(32)]
    assert (late["tokens"] != pipeline.tokenizer.pad_token_id).sum(1).tolist() == [count - 1 for count in words]


def test_easy_examples_are_made_of_pure_noise_in_the_first_lesson_alone(pipeline, monkeypatch):
    add_noise, seen = pipeline.scheduler.add_noise, []
    monkeypatch.setattr(pipeline.scheduler, "add_noise", lambda *args: seen.append(args[2]) or add_noise(*args))
    for pure_noise in (True, False):
        config = ScheduleConfig(sampler_share=0.0, curriculum=2, pure_noise=pure_noise)
        batch = next(text_to_image.prompted(8, pipeline.tokenizer, config)(start=1))
        torch.manual_seed(0)
        DenoisingObjective(pipeline, config)(batch)
    assert (seen[0][:4] == 999).all() and (seen[0][4:] < 999).all() and (seen[1] < 999).all()


def test_things_stand_exactly_where_it_is_asked_for(pipeline):
    loose, exact = (
        next(text_to_image.prompted(16, pipeline.tokenizer, ScheduleConfig(curriculum=0, exact=asked))())
        for asked in (False, True)
    )
    assert torch.equal(loose["tokens"], exact["tokens"]) and not torch.equal(loose["pixels"], exact["pixels"])
    scene = world.sample(3)
    placed = tuple(world.Thing(t.shape, t.colour, t.size, t.position) for t in scene.things)
    torch.testing.assert_close(exact["pixels"][3], world.render([world.Scene(placed, scene.texture, scene.ground)])[0])


def test_both_lessons_are_gone_through_and_told(tmp_path, monkeypatch):
    monkeypatch.setattr(text_to_image, "BATCH", 2)
    monkeypatch.setattr(text_to_image, "SCENES_FOR_THE_SCALE", 8)
    steps = {"vae_steps": 1, "text_steps": 1, "denoiser_steps": 2, "outline_steps": 1}
    made = text_to_image.train_pipeline(tmp_path, **steps, device="cpu", model=SIZES)
    assert [(row["step"], row["condition"]) for row in made.history] == [(2, "first lesson"), (3, "outlines")]
    assert list(made.seconds) == ["world_vae.seconds", "text_model.seconds", "denoiser.seconds", "outlines.seconds"]
    again = text_to_image.train_pipeline(tmp_path, **steps, device="cpu", model=SIZES)
    assert [part.resumed_at for part in (again.vae, again.text, again.denoiser, again.outlines)] == [1, 1, 2, 1]
    for one, other in zip(made.pipeline.unet.parameters(), again.pipeline.unet.parameters(), strict=True):
        assert torch.equal(one, other)


def test_ranks_and_later_starts_share_one_stream(pipeline):
    alone = text_to_image.pictures(2)()
    four = [next(alone)["pixels"] for _ in range(4)]
    second = text_to_image.pictures(2)(start=1, rank=1, world=2)
    assert torch.equal(next(second)["pixels"], four[3])


def test_it_learns_a_little_and_goes_on_to_the_same_weights(tmp_path):
    def trained(folder, steps_until=None):
        pipeline = untrained()
        schedule = ScheduleConfig(curriculum=4)
        stream = text_to_image.prompted(4, pipeline.tokenizer, schedule)
        config = TrainConfig(steps=12, learning_rate=2e-3, device="cpu", log_every=1, checkpoint_every=4)

        def stops(**where):
            for number, batch in enumerate(stream(**where)):
                if steps_until is not None and number == steps_until:
                    raise KeyboardInterrupt
                yield batch

        objective = DenoisingObjective(pipeline, schedule)
        return pipeline, train(objective, stops, config, folder=folder)

    whole, run = trained(tmp_path / "whole")
    assert np.mean([row["error"] for row in run.history[-3:]]) < run.history[0]["error"]
    with pytest.raises(KeyboardInterrupt):
        trained(tmp_path / "cut", steps_until=6)
    cut, again = trained(tmp_path / "cut")
    assert again.resumed_at == 4
    for one, other in zip(whole.unet.parameters(), cut.unet.parameters(), strict=True):
        assert torch.equal(one, other)


def test_a_saved_folder_loads_as_a_plain_pipeline(pipeline, tmp_path):
    from diffusers import StableDiffusionPipeline

    models.ship(pipeline, tmp_path)
    loaded = StableDiffusionPipeline.from_pretrained(tmp_path)
    pipeline.to(torch.float32)
    loaded.set_progress_bar_config(disable=True)
    picture = loaded("a red star", num_inference_steps=2, output_type="np").images
    assert picture.shape == (1, 64, 64, 3)
    assert denoise.generate(loaded, ["a red star"], [0], denoise.Sampling(1)).shape == (1, 3, 64, 64)


@pytest.mark.parametrize(
    ("kind", "change", "message"),
    [
        (ModelConfig, {"text_layers": 0}, "text_layers"),
        (ModelConfig, {"unet_layers": 0}, "unet_layers"),
        (ModelConfig, {"unet_channels": (60, 128)}, "unet_channels"),
        (ScheduleConfig, {"prompt_dropout": 1.5}, "prompt_dropout"),
        (ScheduleConfig, {"sampler_share": -0.1}, "sampler_share"),
        (ScheduleConfig, {"thing_weight": (10, 0.5)}, "thing_weight"),
        (ScheduleConfig, {"curriculum": -1}, "curriculum"),
        (ScheduleConfig, {"place_weight": -1}, "place_weight"),
    ],
)
def test_what_is_refused(kind, change, message):
    with pytest.raises(ValueError, match=message):
        kind(**change)
