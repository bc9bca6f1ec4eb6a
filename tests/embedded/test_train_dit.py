"""The training of the class-conditional transformer: its classes and data, its loss, that it learns and resumes."""

import math
import re

import diffusers
import numpy as np
import pytest
import torch
from safetensors import safe_open
from torch.nn.functional import adaptive_avg_pool2d

from vaelab import activations, hooks, models, world
from vaelab.embedded import evaluate, train_dit, train_unet
from vaelab.embedded.train_dit import NULL_CLASS, ClassObjective, DiTConfig
from vaelab.training import loop
from vaelab.world import oracle

SIZES = DiTConfig(layers=2, heads=2, head_width=8)


def autoencoder():
    vae = train_unet.new_vae(train_unet.ModelConfig(vae_channels=(16, 16, 16)))
    vae.register_to_config(scaling_factor=4.0)
    return vae.requires_grad_(False)


@pytest.fixture
def pipeline():
    return train_dit.new_dit(autoencoder(), SIZES)


def awake(pipeline):
    """Without the first weights that are zero, with which nothing depends on anything."""
    torch.manual_seed(0)
    for parameter in pipeline.transformer.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return pipeline


def test_classes_are_the_pairs_that_training_shows():
    names = train_dit.class_names()
    assert list(names) == list(range(56)) and names[0] == "red circle"
    pairs = {tuple(name.split()) for name in names.values()}
    assert len(pairs) == 56
    assert not pairs & {(colour, shape) for shape, colour, _, _ in world.allowed_combinations("unseen")}


def test_a_batch_shows_its_classes_and_nothing_else():
    names = train_dit.class_names()
    batch = next(train_dit.class_batches(24)(start=2))
    assert batch["weight"].unique().tolist() == [1, train_dit.THING_PIXEL_WEIGHT]
    for scene, number, weight in zip(
        oracle.read_scenes(batch["pixels"]), batch["classes"], batch["weight"], strict=True
    ):
        (thing,) = scene.things
        assert names[int(number)] == f"{thing.colour} {thing.shape}" and thing.offset == (0, 0)
        assert torch.equal(weight[0] > 1, torch.from_numpy(thing.coverage() >= 0.5))


def test_every_block_begins_as_the_identity_and_the_whole_with_nothing(pipeline):
    blocks = [f"transformer_blocks.{i}" for i in (0, 1)]
    sample, times, told = torch.randn(2, 4, 16, 16), torch.tensor([10, 900]), torch.tensor([3, NULL_CLASS])
    with torch.no_grad(), hooks.capture(pipeline.transformer, blocks, side="update") as seen:
        assert not pipeline.transformer(sample, times, told).sample.any()
    assert len(seen) == 2 and not any(update[0].any() for update in seen.values())
    for block in pipeline.transformer.transformer_blocks:
        table = block.norm1.emb.class_embedder.embedding_table.weight
        assert table[:56].any(1).all() and table[NULL_CLASS].any() and not table[56:NULL_CLASS].any()


def test_the_loss_is_the_weighted_velocity_error(pipeline, monkeypatch):
    """v = sqrt(abar) eps - sqrt(1 - abar) z (Salimans and Ho 2022), in float64."""
    monkeypatch.setattr(train_dit, "CLASS_DROPOUT", 0.0)
    objective = ClassObjective(awake(pipeline))
    batch = next(train_dit.class_batches(3)())
    torch.manual_seed(1)
    losses = objective(batch)
    torch.manual_seed(1)
    latents = models.posterior(pipeline.vae, batch["pixels"]).mode() * 4.0
    noise, timesteps = torch.randn_like(latents), torch.randint(0, 1000, (3,))
    kept = pipeline.scheduler.alphas_cumprod[timesteps].double().reshape(-1, 1, 1, 1)
    noisy = kept.sqrt() * latents + (1 - kept).sqrt() * noise
    velocity = kept.sqrt() * noise - (1 - kept).sqrt() * latents
    with torch.no_grad():
        predicted = pipeline.transformer(noisy.float(), timesteps, batch["classes"]).sample
    error = ((predicted - velocity) ** 2).mean(1, keepdim=True)
    weight = adaptive_avg_pool2d(batch["weight"].double(), 16)
    assert losses["loss"].item() == pytest.approx(((weight * error).sum() / weight.sum()).item(), rel=1e-4)
    assert losses["velocity_mse"].item() == pytest.approx(error.mean().item(), rel=1e-4)


@pytest.mark.parametrize(("share", "expected"), [(0.0, 0), (0.5, 16), (1.0, 32)])
def test_a_class_is_dropped_in_all_blocks_at_once(pipeline, monkeypatch, share, expected):
    monkeypatch.setattr(train_dit, "CLASS_DROPOUT", share)
    objective = ClassObjective(pipeline).train()
    tables = [f"transformer_blocks.{i}.norm1.emb.class_embedder.embedding_table" for i in (0, 1)]
    told = {}
    for table in tables:
        module = pipeline.transformer.get_submodule(table)
        forward = module.forward
        monkeypatch.setattr(module, "forward", lambda x, t=table, f=forward: told.setdefault(t, x) is None or f(x))
    torch.manual_seed(0)
    objective(batch := next(train_dit.class_batches(32)()))
    assert torch.equal(*told.values())
    dropped = told[tables[0]] == NULL_CLASS
    assert abs(int(dropped.sum()) - expected) <= 6 * (0 < share < 1)
    assert torch.equal(told[tables[0]][~dropped], batch["classes"][~dropped])


def test_it_learns_a_little_and_goes_on_to_the_same_weights(tmp_path, monkeypatch):
    config, stream, cut_at = loop.TrainConfig, train_dit.class_batches, []

    def stops(batch_size):
        def batches(**where):
            for number, batch in enumerate(stream(batch_size)(**where)):
                if cut_at and number == cut_at[0]:
                    raise KeyboardInterrupt
                yield batch

        return batches

    monkeypatch.setattr(train_dit, "BATCH_SIZE", 4)
    monkeypatch.setattr(
        train_dit, "TrainConfig", lambda **given: config(**{**given, "checkpoint_every": 8, "log_every": 6})
    )
    monkeypatch.setattr(train_dit, "class_batches", stops)

    def train(folder):
        return train_dit.train_dit(tmp_path / folder, autoencoder(), steps=30, device="cpu", model=SIZES)

    whole = train("whole")
    rows = whole.trained.history
    assert rows[-1]["step"] == 30 and rows[-1]["velocity_mse"] < 0.95 * rows[0]["velocity_mse"]
    for block in whole.pipeline.transformer.transformer_blocks:
        assert not block.norm1.emb.class_embedder.embedding_table.weight[56:NULL_CLASS].any()
    cut_at.append(12)
    with pytest.raises(KeyboardInterrupt):
        train("cut")
    cut_at.clear()
    again = train("cut")
    assert again.trained.resumed_at == 8
    pairs = zip(whole.pipeline.transformer.parameters(), again.pipeline.transformer.parameters(), strict=True)
    assert all(torch.equal(one, other) for one, other in pairs)


def test_a_checkpoint_of_another_autoencoder_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(train_dit, "BATCH_SIZE", 2)
    vae = autoencoder()
    train_dit.train_dit(tmp_path, vae, steps=1, device="cpu", model=SIZES)
    vae.register_to_config(scaling_factor=3.0)
    with pytest.raises(ValueError, match=r"scaling_factor 4\.0 there, 3\.0 here"):
        train_dit.train_dit(tmp_path, vae, steps=1, device="cpu", model=SIZES)


def test_a_saved_folder_loads_as_a_plain_pipeline(pipeline, tmp_path, complaints):
    models.save_in_float16(awake(pipeline), tmp_path)
    loaded = diffusers.DiTPipeline.from_pretrained(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    assert loaded.labels == {name: number for number, name in train_dit.class_names().items()}
    numbers = loaded.get_label_ids(["red circle", "black heart"])
    picture = loaded(numbers, num_inference_steps=2, guidance_scale=3.0, output_type="np").images
    assert picture.shape == (2, 64, 64, 3) and np.isfinite(picture).all()
    told = len(complaints())
    ours = models.load_pipeline(str(tmp_path), device="cpu")
    assert len(complaints()) == told and ours.labels == loaded.labels
    assert {name: block.shape for name, block in models.blocks(ours).items()} == dict.fromkeys(
        ("block0", "block1"), (8, 8, 16)
    )
    assert activations.generate(ours, numbers, [0, 1], activations.Sampling(2)).shape == (2, 3, 64, 64)
    by_name, by_number = (activations.generate(ours, [one], [0], activations.Sampling(2)) for one in ("red circle", 0))
    assert torch.equal(by_name, by_number)
    for strange in (56, "red"):
        message = rf"^prompts: expected class numbers from 0 to 55, or names such as 'black circle', got {strange!r}"
        with pytest.raises(ValueError, match=message):
            activations.generate(ours, [strange], [0], activations.Sampling(2))


def test_the_shipped_transformer_draws_its_classes():
    shipped = models.load_pipeline("embedded-dit", device="cpu")
    assert isinstance(shipped, diffusers.DiTPipeline)
    assert shipped.labels == {name: number for number, name in train_dit.class_names().items()}
    assert list(models.blocks(shipped).values()) == [
        (f"transformer_blocks.{number}", (8, 8, 192)) for number in range(6)
    ]
    numbers, told = evaluate.sample_classes(shipped, 28)
    drawn = activations.generate_all(shipped, numbers, activations.Sampling(10, 3.0), batch_size=28)
    accuracy = oracle.accuracy_by_factor(oracle.check_prompts(told, drawn)).set_index("factor")["accuracy"]
    assert accuracy["colour"] >= 0.9 and accuracy["shape"] >= 0.6


def test_the_shipped_folders_are_small_and_plain():
    place = models.embedded_dit_path()
    files = [path for path in place.parent.rglob("*") if path.is_file()]
    assert {path.suffix for path in files} <= {".json", ".safetensors", ".txt", ".jinja"}
    assert sum(path.stat().st_size for path in files) < 40e6
    named = [path.name for path in files if path.suffix == ".json" and re.search(r': "(?:/|[A-Z]:)', path.read_text())]
    assert named == [], "no file names a path of the machine that made it"


def test_what_is_refused():
    with pytest.raises(ValueError, match="layers"):
        DiTConfig(layers=0)


def test_a_plan_is_of_the_shipped_size():
    plan = train_dit.plan_dit(steps=9, device="cpu")
    with safe_open(models.embedded_dit_path() / "transformer" / "diffusion_pytorch_model.safetensors", "pt") as file:
        stored = sum(math.prod(file.get_slice(name).get_shape()) for name in file.keys())  # noqa: SIM118
    assert plan.steps == 9 and plan.parameters == pytest.approx(stored, rel=0.01)
