"""The training of the text-to-image model: its data, its loss, and that it learns and resumes."""

import numpy as np
import pytest
import torch

from vaelab import activations, models
from vaelab.embedded import curriculum, text_encoder, train_unet
from vaelab.embedded.curriculum import CurriculumConfig, DenoisingObjective
from vaelab.embedded.train_unet import ModelConfig
from vaelab.training.checkpoint import CHECKPOINT
from vaelab.training.loop import TrainConfig, train

SIZES = ModelConfig(
    vae_channels=(16, 16, 16), unet_channels=(16, 32), unet_layers=1, head_width=16, text_width=32, text_layers=1
)


def untrained():
    vae = train_unet.new_vae(SIZES)
    vae.requires_grad_(False).register_to_config(scaling_factor=train_unet.latent_mean_scale(vae))
    tokenizer = text_encoder.new_tokenizer()
    return train_unet.new_pipeline(vae, text_encoder.new_text_encoder(tokenizer, 32, 1), tokenizer, SIZES)


@pytest.fixture(scope="module")
def pipeline():
    return untrained()


def test_every_stage_has_transformers(pipeline):
    names = [name for name in models.blocks(pipeline) if name[0] != "b" and "ft" not in name]
    assert names == ["down.0.0", "down.1.0", "mid.0", "up.0.0", "up.0.1", "up.1.0", "up.1.1"]
    assert models.blocks(pipeline)["down.1.0"].shape == (8, 8, 32)


def test_the_last_timestep_is_pure_noise(pipeline):
    assert float(pipeline.scheduler.alphas_cumprod[-1]) == 0


def test_all_lessons_are_gone_through_and_told(tmp_path, monkeypatch):
    monkeypatch.setattr(train_unet, "BATCH_SIZE", 2)
    monkeypatch.setattr(train_unet, "SCALE_SCENES", 8)
    steps = {"vae_steps": 1, "text_steps": 1, "lesson_steps": (2, 1, 1)}
    made = train_unet.train_pipeline(tmp_path, **steps, device="cpu", model=SIZES)
    assert [(row["step"], row["condition"]) for row in made.history] == [
        (2, "placing"),
        (3, "outlines"),
        (4, "practice"),
    ]
    assert list(made.seconds) == [f"{part}.seconds" for part in ("world_vae", "text_model", *curriculum.LESSONS)]
    plans = train_unet.plan_pipeline(**steps, device="cpu", model=SIZES)
    assert [plan.steps for plan in plans] == [1, 1, 4]
    for plan, folder in zip(plans, ("vae", "text", "practice"), strict=True):
        assert plan.checkpoint_bytes == pytest.approx((tmp_path / folder / CHECKPOINT).stat().st_size, rel=0.1)
    assert plans[-1].disk_bytes == 3 * plans[-1].checkpoint_bytes  # one of each lesson
    again = train_unet.train_pipeline(tmp_path, **steps, device="cpu", model=SIZES)
    assert [part.resumed_at for part in (again.vae, again.text, *again.lessons.values())] == [1, 1, 2, 1, 1]
    for one, other in zip(made.pipeline.unet.parameters(), again.pipeline.unet.parameters(), strict=True):
        assert torch.equal(one, other)


def test_it_learns_a_little_and_goes_on_to_the_same_weights(tmp_path):
    def trained(folder, steps_until=None):
        pipeline = untrained()
        schedule = CurriculumConfig(easy_steps=4)
        stream = curriculum.prompted_batches(4, pipeline.tokenizer, schedule)
        config = TrainConfig(steps=12, learning_rate=2e-3, device="cpu", log_every=1, checkpoint_every=4)

        def stops(**where):
            for number, batch in enumerate(stream(**where)):
                if steps_until is not None and number == steps_until:
                    raise KeyboardInterrupt
                yield batch

        objective = DenoisingObjective(pipeline, schedule)
        return pipeline, train(objective, stops, config, folder=folder)

    whole, run = trained(tmp_path / "whole")
    assert np.mean([row["velocity_mse"] for row in run.history[-3:]]) < run.history[0]["velocity_mse"]
    with pytest.raises(KeyboardInterrupt):
        trained(tmp_path / "cut", steps_until=6)
    cut, again = trained(tmp_path / "cut")
    assert again.resumed_at == 4
    for one, other in zip(whole.unet.parameters(), cut.unet.parameters(), strict=True):
        assert torch.equal(one, other)


def test_a_saved_folder_loads_as_a_plain_pipeline(pipeline, tmp_path):
    from diffusers import StableDiffusionPipeline

    models.save_in_float16(pipeline, tmp_path)
    loaded = StableDiffusionPipeline.from_pretrained(tmp_path)
    pipeline.to(torch.float32)
    loaded.set_progress_bar_config(disable=True)
    picture = loaded("a red star", num_inference_steps=2, output_type="np").images
    assert picture.shape == (1, 64, 64, 3)
    assert activations.generate(loaded, ["a red star"], [0], activations.Sampling(1)).shape == (1, 3, 64, 64)


@pytest.mark.parametrize(
    ("kind", "change", "message"),
    [
        (ModelConfig, {"text_layers": 0}, "text_layers"),
        (ModelConfig, {"unet_layers": 0}, "unet_layers"),
        (ModelConfig, {"unet_channels": (60, 128)}, "unet_channels"),
    ],
)
def test_what_is_refused(kind, change, message):
    with pytest.raises(ValueError, match=message):
        kind(**change)


def test_every_lesson_needs_its_steps_before_anything_is_trained(tmp_path):
    with pytest.raises(ValueError, match="lesson_steps: expected one for each of placing, outlines, practice"):
        train_unet.train_pipeline(tmp_path, lesson_steps=(2, 2), device="cpu")
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("instructions", "precision"),
    [({"avx2": True}, "float32"), ({"avx512_bf16": True}, "bfloat16"), ({"bf16": True}, "bfloat16")],
    ids=lambda value: str(value),
)
def test_a_cpu_trains_in_bfloat16_only_if_it_has_instructions_for_it(monkeypatch, instructions, precision):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: instructions)
    assert train_unet.training_precision("cpu") == precision
