"""What the embedded denoiser learns from: easy examples first, the timesteps drawn, the loss."""

import pytest
import torch
from small_pipelines import world as small_world

from vaelab import models, world
from vaelab.embedded import curriculum, text_encoder
from vaelab.embedded.curriculum import CurriculumConfig, DenoisingObjective


@pytest.fixture(scope="module")
def pipeline():
    return small_world()


def test_the_loss_is_the_weighted_velocity_error(pipeline):
    """v = sqrt(abar) eps - sqrt(1 - abar) z (Salimans and Ho 2022), in float64."""
    config = CurriculumConfig(prompt_dropout=0.0, position_loss_weight=0.0)
    objective = DenoisingObjective(pipeline, config).eval()
    batch = next(curriculum.prompted_batches(3, pipeline.tokenizer, CurriculumConfig(easy_steps=10))(start=5))
    torch.manual_seed(0)
    losses = objective(batch)
    torch.manual_seed(0)
    latents = models.posterior(pipeline.vae, batch["pixels"]).mode() * pipeline.vae.config.scaling_factor
    noise = torch.randn_like(latents)
    timesteps = torch.where(batch["pure_noise"], 999, objective._timesteps(3))
    kept = pipeline.scheduler.alphas_cumprod[timesteps].double().reshape(-1, 1, 1, 1)
    noisy = kept.sqrt() * latents + (1 - kept).sqrt() * noise
    velocity = kept.sqrt() * noise - (1 - kept).sqrt() * latents
    with torch.no_grad():
        states = pipeline.text_encoder(batch["tokens"])[0]
        predicted = pipeline.unet(noisy.float(), timesteps, states).sample
    error = ((predicted - velocity) ** 2).mean(1, keepdim=True)
    weight = torch.nn.functional.avg_pool2d(batch["weight"], 4).double()
    assert losses["loss"].item() == pytest.approx(((weight * error).sum() / weight.sum()).item(), rel=1e-4)
    assert losses["velocity_mse"].item() == pytest.approx(error.mean().item(), rel=1e-4)


def test_what_blocks_know_of_places_is_the_cross_entropy_of_rows_and_columns(pipeline):
    objective = DenoisingObjective(pipeline, CurriculumConfig())
    assert list(objective._positioned.values()) == [(8, 8, 32)] * 6 + [(16, 16, 16)] * 3
    maps = [torch.randn(2, shape[2], *shape[:2]) for shape in objective._positioned.values()]
    terms = []
    for head, each in zip(objective.position_heads, maps, strict=True):
        side = each.shape[-1]
        for y in range(side):
            for x in range(side):
                scores = head(each[:, :, y, x]).double()
                terms.append(-scores[:, :side].log_softmax(1)[:, y].mean().item() / side**2)
                terms.append(-scores[:, side:].log_softmax(1)[:, x].mean().item() / side**2)
    assert objective._position_loss(maps).item() == pytest.approx(sum(terms) / (2 * len(maps)), rel=1e-5)
    batch = next(curriculum.prompted_batches(2, pipeline.tokenizer, CurriculumConfig())())
    losses = objective(batch)
    losses["position_loss"].backward()
    assert pipeline.unet.conv_in.weight.grad.abs().max() > 0
    pipeline.unet.zero_grad()


def test_dropped_prompts_are_the_empty_one(pipeline, monkeypatch):
    objective = DenoisingObjective(pipeline, CurriculumConfig(prompt_dropout=1.0))
    seen = []
    forward = pipeline.text_encoder.forward
    monkeypatch.setattr(pipeline.text_encoder, "forward", lambda tokens: seen.append(tokens) or forward(tokens))
    objective(next(curriculum.prompted_batches(2, pipeline.tokenizer, CurriculumConfig())()))
    empty = text_encoder.tokenize(pipeline.tokenizer, [""])[0]
    assert torch.equal(seen[0], empty.expand(2, -1))


def test_most_of_the_timesteps_are_the_samplers(pipeline):
    objective = DenoisingObjective(pipeline, CurriculumConfig(sampler_steps=4, sampler_timestep_share=0.5))
    torch.manual_seed(0)
    drawn = objective._timesteps(4000)
    shares = [(drawn == timestep).float().mean() for timestep in (999, 749, 499, 249)]
    assert shares == pytest.approx([0.2, 0.15, 0.1, 0.05], abs=0.02)
    assert drawn.min() < 20 and drawn.max() == 999


def test_the_curriculum_goes_from_one_named_thing_to_any_scene(pipeline):
    config = CurriculumConfig(easy_steps=100, thing_pixel_weight=(10, 2))
    stream = curriculum.prompted_batches(32, pipeline.tokenizer, config)
    first, half, late = (next(stream(start=step)) for step in (0, 50, 100))
    scene = world.sample(0)
    assert [batch["weight"].unique().tolist() for batch in (first, half, late)] == [[1, 10], [1, 6], [1, 2]]
    assert [int(batch["pure_noise"].sum()) for batch in (first, half, late)] == [32, 16, 0]
    every = curriculum._easy(scene, single_thing=False)
    assert every.things == scene.spelled_out().things and every.named == world.SCENE_FACTORS
    easy = curriculum._easy(scene, single_thing=True)
    assert len(easy.things) == 1 and easy.things[0].named == world.THING_FACTORS
    torch.testing.assert_close(first["pixels"][0], world.render([easy])[0])
    torch.testing.assert_close(late["pixels"][5], world.render([world.sample(100 * 32 + 5)])[0])
    words = [len(pipeline.tokenizer(world.sample(100 * 32 + i).prompt).input_ids) for i in range(32)]
    assert (late["tokens"] != pipeline.tokenizer.pad_token_id).sum(1).tolist() == [count - 1 for count in words]


def test_easy_examples_are_made_of_pure_noise_in_the_first_lesson_alone(pipeline, monkeypatch):
    add_noise, seen = pipeline.scheduler.add_noise, []
    monkeypatch.setattr(pipeline.scheduler, "add_noise", lambda *args: seen.append(args[2]) or add_noise(*args))
    for pure_noise in (True, False):
        config = CurriculumConfig(sampler_timestep_share=0.0, easy_steps=2, pure_noise=pure_noise)
        batch = next(curriculum.prompted_batches(8, pipeline.tokenizer, config)(start=1))
        torch.manual_seed(0)
        DenoisingObjective(pipeline, config)(batch)
    assert (seen[0][:4] == 999).all() and (seen[0][4:] < 999).all() and (seen[1] < 999).all()


def test_things_stand_exactly_where_it_is_asked_for(pipeline):
    loose, exact = (
        next(
            curriculum.prompted_batches(16, pipeline.tokenizer, CurriculumConfig(easy_steps=0, exact_positions=asked))()
        )
        for asked in (False, True)
    )
    assert torch.equal(loose["tokens"], exact["tokens"]) and not torch.equal(loose["pixels"], exact["pixels"])
    scene = world.sample(3)
    placed = tuple(world.Thing(t.shape, t.colour, t.size, t.position) for t in scene.things)
    torch.testing.assert_close(exact["pixels"][3], world.render([world.Scene(placed, scene.texture, scene.ground)])[0])


def test_what_a_prompt_leaves_open_of_the_places():
    thing = world.Thing("star", "red", "large", "top")
    some = {"named": ("shape", "colour")}
    things = (
        world.Thing("ring", "blue", "small", "bottom right", **some),
        thing,
        world.Thing("cross", "green", "small", "left", **some),
    )
    scenes = [world.Scene(things, "plain", "grey"), world.Scene((thing,), "plain", "grey")]
    assert curriculum.unnamed_positions(scenes).tolist() == [[0, -1, 0, 2, 0, 0, 0, 0, 1], [0, -1, 0, 0, 0, 0, 0, 0, 0]]


@pytest.mark.parametrize("side", [8, 16, 24])
def test_the_noise_is_highest_where_what_is_not_placed_stands(side):
    torch.manual_seed(0)
    noise = torch.randn(3, 4, side, side)
    unsaid = torch.tensor([[0, -1, 0, 2, 0, 0, 0, 0, 1], [0, 0, 0, 0, 1, 0, 0, 0, 0], [-1, 0, 0, 0, 0, 0, 0, 0, -1]])
    chosen = curriculum.couple_noise_to_positions(noise, unsaid)
    middles = curriculum._central_patches((side, side))
    seen = torch.zeros(side, side)
    for rows, columns in middles:
        seen[rows, columns] += 1
    assert seen.max() == 1 and seen.sum() == 9 * (side // 8) ** 2
    assert torch.equal(chosen * (seen == 0), noise * (seen == 0))
    before, after = (
        torch.stack([z[:, :, rows, columns].mean((1, 2, 3)) for rows, columns in middles], 1) for z in (noise, chosen)
    )
    torch.testing.assert_close(before.sort(1).values, after.sort(1).values)
    assert after[0, 1] == before[0, 1]
    left = after[0, [0, 2, 3, 4, 5, 6, 7, 8]].sort(descending=True).values
    assert after[0, 8] == left[0] and after[0, 3] == left[1]
    assert after[1].argmax() == 4 and torch.equal(chosen[2], noise[2])


def test_noise_that_chooses_is_white_noise_over_all_that_a_prompt_may_mean():
    """The places that an unnamed one may have are equally likely, and so the noise keeps its distribution."""
    torch.manual_seed(0)
    count = 9000
    places = torch.nn.functional.one_hot(torch.arange(count) % 9, 9)
    noise = curriculum.couple_noise_to_positions(torch.randn(count, 1, 8, 8), places).flatten(1)
    assert noise.mean(0).abs().max() < 5 / count**0.5
    assert (torch.cov(noise.T) - torch.eye(64)).abs().max() < 6 * (2 / count) ** 0.5
    standing = noise[
        torch.arange(count), [8 * r.start + c.start for r, c in curriculum._central_patches((8, 8))] * (count // 9)
    ]
    assert standing.mean() == pytest.approx(1.485, abs=0.05)  # of the largest of nine normal numbers


def test_noise_chooses_for_prompts_that_are_kept_alone(pipeline, monkeypatch):
    seen = []
    add_noise = pipeline.scheduler.add_noise
    monkeypatch.setattr(pipeline.scheduler, "add_noise", lambda z, e, t: seen.append(e) or add_noise(z, e, t))
    batch = next(curriculum.prompted_batches(16, pipeline.tokenizer, CurriculumConfig(easy_steps=0))())
    for dropout, chooses in ((1.0, False), (1.0, True), (0.0, True)):
        torch.manual_seed(0)
        DenoisingObjective(pipeline, CurriculumConfig(prompt_dropout=dropout, coupled_noise=chooses))(batch)
    assert torch.equal(seen[0], seen[1])
    assert torch.equal(seen[2], curriculum.couple_noise_to_positions(seen[0], batch["unnamed"])) and not torch.equal(
        *seen[1:]
    )


def test_ranks_and_later_starts_share_one_stream(pipeline):
    alone = curriculum.picture_batches(2)()
    four = [next(alone)["pixels"] for _ in range(4)]
    second = curriculum.picture_batches(2)(start=1, rank=1, world=2)
    assert torch.equal(next(second)["pixels"], four[3])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prompt_dropout": 1.5}, "prompt_dropout"),
        ({"sampler_timestep_share": -0.1}, "sampler_timestep_share"),
        ({"thing_pixel_weight": (10, 0.5)}, "thing_pixel_weight"),
        ({"easy_steps": -1}, "easy_steps"),
        ({"position_loss_weight": -1}, "position_loss_weight"),
    ],
)
def test_what_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        CurriculumConfig(**change)


def test_processes_share_the_scenes_and_are_at_the_same_step_of_the_curriculum(pipeline):
    config = CurriculumConfig(easy_steps=4)
    first, second = (
        next(curriculum.prompted_batches(4, pipeline.tokenizer, config)(start=2, rank=rank, world=2)) for rank in (0, 1)
    )
    assert int(first["pure_noise"].sum()) == int(second["pure_noise"].sum()) == 2
    assert not torch.equal(first["pixels"], second["pixels"])


def test_latents_are_scaled_as_the_autoencoders_configuration_says(pipeline):
    """(z - shift_factor) x scaling_factor; scaling by ``scaling_factor`` alone would train on the wrong latents."""
    pixels = world.render([world.sample(0)])
    vae = type(pipeline.vae).from_config(pipeline.vae.config)
    vae.register_to_config(shift_factor=0.25, scaling_factor=3.0)
    expected = (models.posterior(vae, pixels).mode() - 0.25) * 3
    torch.testing.assert_close(curriculum.scaled_latents(vae, pixels), expected.detach())
