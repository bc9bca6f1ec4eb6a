"""Training with planted ends: nothing holds the paper's mask open, so a large lambda must close it."""

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file
from small_latents import small_config

from vaelab import data
from vaelab.pruning import train
from vaelab.pruning.train import PruningConfig, build_objective, load_pruned, train_pruned
from vaelab.training.checkpoint import write_tensors
from vaelab.training.loop import TrainConfig


@pytest.fixture(scope="module")
def pictures():
    return data.load_pair("digits", "train", "test", resolution=16, max_images=64, eval_images=20)


@pytest.fixture(scope="module")
def collapse(tmp_path_factory):
    """One run of each mask under a large lambda, and one without a mask, all from the same weights."""
    place, runs = tmp_path_factory.mktemp("runs"), {}
    pictures = data.load_pair("digits", "train", "test", resolution=8, max_images=64, eval_images=20)
    for mask in ("none", "soft", "normalised"):
        config = small_config(
            80, {"mask": mask, "sparsity": 0.0 if mask == "none" else 2.0}, {"learning_rate": 2e-2},
            batch_size=8, track_every=50, unet_channels=(16, 16),
        )  # fmt: skip
        runs[mask] = train_pruned("embedded", mask, config, pictures, place / mask).measures
    return runs


def test_a_large_lambda_closes_the_soft_mask_and_the_loss_falls_with_it(collapse):
    none, soft = collapse["none"], collapse["soft"]
    assert soft["mean_mask"] < 0.05
    assert soft["scale"] < 0.1 * none["scale"]
    assert soft["closed_form_loss"] < 0.25 * none["closed_form_loss"]
    assert soft["diffusion_loss"] < 0.9 * none["diffusion_loss"]
    assert soft["recon_mse"] < 1.5 * none["recon_mse"]
    assert soft["masked_recon_mse"] > 2 * none["recon_mse"]


def test_the_normalised_mask_cannot_be_scaled_away(collapse):
    none, normalised = collapse["none"], collapse["normalised"]
    assert normalised["mean_mask"] > 0.25  # that of one channel left, which is the least there can be
    assert normalised["scale"] == pytest.approx(normalised["latent_scale"], rel=0.2)
    assert normalised["scale"] > 0.6 * none["scale"]
    assert normalised["masked_recon_mse"] < 0.5 * collapse["soft"]["masked_recon_mse"]


def test_a_finished_run_is_read_and_one_of_other_settings_refused(pictures, tmp_path):
    config = small_config(2)
    run = train_pruned("embedded", "soft", config, pictures, tmp_path)
    again = train_pruned("embedded", "soft", config, pictures, tmp_path)
    assert again == train.PrunedRun(**json.loads(json.dumps(run._asdict())))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run.json", "weights.safetensors"]
    with pytest.raises(ValueError, match=r"sparsity 0\.0 there, 0\.5 here"):
        train_pruned("embedded", "soft", config.with_latent(sparsity=0.5), pictures, tmp_path)


def test_an_interrupted_run_ends_in_the_same_bits(pictures, tmp_path, monkeypatch):
    config = small_config(5, {"mask": "normalised", "standardise": True}, {"checkpoint_every": 2}, track_every=1)
    alone = train_pruned("embedded", "a", config, pictures, tmp_path / "alone")
    measure = train.MaskWatcher.measure

    def stops_at_4(self, step):
        if step == 4:
            raise KeyboardInterrupt
        measure(self, step)

    monkeypatch.setattr(train.MaskWatcher, "measure", stops_at_4)
    with pytest.raises(KeyboardInterrupt):
        train_pruned("embedded", "a", config, pictures, tmp_path / "cut")
    monkeypatch.undo()
    assert train_pruned("embedded", "a", config, pictures, tmp_path / "cut") == alone
    weights = [load_file(tmp_path / place / "weights.safetensors") for place in ("alone", "cut")]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_weights_that_are_missing_damaged_or_of_another_setting_are_refused(pictures, tmp_path):
    config, file = small_config(1), tmp_path / "weights.safetensors"
    train_pruned("embedded", "soft", config, pictures, tmp_path)
    whole = file.read_bytes()
    with pytest.raises(ValueError, match=r"weights\.safetensors was trained in another setting"):
        load_pruned("embedded", small_config(1, unet_channels=(16, 16)), 16, tmp_path)
    file.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(ValueError, match=r"weights\.safetensors is damaged"):
        load_pruned("embedded", config, 16, tmp_path)
    objective = build_objective("embedded", config, 16)
    torch.nn.init.constant_(objective.unet.conv_in.weight, torch.nan)
    write_tensors(file, objective.state_dict(), {})
    with pytest.raises(ValueError, match=r"weights\.safetensors is damaged: unet\.conv_in\.weight has NaN"):
        load_pruned("embedded", config, 16, tmp_path)
    file.unlink()
    with pytest.raises(ValueError, match=r"weights\.safetensors is missing"):
        load_pruned("embedded", config, 16, tmp_path)


def test_masks_are_tracked_for_every_class_and_stay_open_until_they_are_used(pictures, tmp_path):
    config = small_config(4, {"mask_from": 2, "sparsity": 5.0}, {"learning_rate": 0.1}, track_every=1)
    run = train_pruned("embedded", "late", config, pictures, tmp_path)
    every = {row["step"]: row["mask"] for row in run.masks if row["class"] == "all" and row["channel"] == 0}
    assert list(every) == [0, 1, 2, 3, 4]
    assert every[1] == every[2] == 1 and every[4] < 0.9
    held_out = next(pictures[1].batches(20))["label"]
    classes = {row["class"] for row in run.masks} - {"all"}
    assert classes == {pictures[1].classes[label] for label in held_out.tolist()}
    last = [row for row in run.masks if row["step"] == 4 and row["channel"] == 1]
    weighted = sum(
        row["mask"] * int((held_out == pictures[1].classes.index(row["class"])).sum())
        for row in last if row["class"] != "all"
    )  # fmt: skip
    assert weighted / 20 == pytest.approx(next(row["mask"] for row in last if row["class"] == "all"), rel=1e-5)


def test_a_frozen_vae_is_left_as_it_was_and_the_rest_is_trained(tiny_vae, pictures, tmp_path):
    tiny_vae.save_pretrained(tmp_path / "vae")
    config = small_config(2, {"mask": "topk", "keep": 2}, autoencoder="frozen", vae_channels=())
    name, place = str(tmp_path / "vae"), tmp_path / "run"
    train_pruned(name, "frozen", config, pictures, place)
    before, after = build_objective(name, config, 16).state_dict(), load_pruned(name, config, 16, place).state_dict()
    for key, value in tiny_vae.state_dict().items():
        assert torch.equal(after[f"vae.{key}"], value), key
    assert any(not torch.equal(after[key], before[key]) for key in before if key.startswith("unet."))


def test_more_latent_channels(pictures, tmp_path):
    config = small_config(1, {"mask": "topk", "keep": 6}, latent_channels=16)
    run = train_pruned("embedded", "wide", config, pictures, tmp_path)
    assert {row["channel"] for row in run.masks} == set(range(16))
    assert run.measures["mean_mask"] == 6 / 16


def test_runs_of_one_seed_begin_alike_whatever_their_mask():
    first, second = (
        build_objective("embedded", small_config(1, {"mask": mask}), 16).state_dict() for mask in ("none", "topk")
    )
    assert all(torch.equal(first[key], second[key]) for key in first)
    other = build_objective("embedded", small_config(1, training={"seed": 1}), 16).state_dict()
    assert not torch.equal(other["unet.conv_in.weight"], first["unet.conv_in.weight"])


@pytest.mark.parametrize(
    ("changes", "resolution", "message"),
    [
        ({"unet_channels": (8, 8, 8, 8)}, 20, "resolution: the VAE's latent of 10 x 10 does not fit a denoiser of 4"),
        ({}, 17, "resolution: pictures of 17 x 17 come back as 16 x 16"),
        ({"latent": {"mask": "topk", "keep": 5}}, 16, "keep: must be from 1 to the latent's 4 channels, got 5"),
        (
            {"autoencoder": "frozen", "vae_channels": (), "latent_channels": 8}, 16,
            "latent_channels: 'embedded' has 4, got 8; only an autoencoder from scratch",
        ),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused(changes, resolution, message):
    with pytest.raises(ValueError, match=message):
        build_objective("embedded", small_config(**changes), resolution)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"latent": {"mask_from": 2}}, "mask_from: must be below the 2 steps, got 2"),
        ({"autoencoder": "forzen"}, "autoencoder: unknown name 'forzen'.*frozen"),
        ({"autoencoder": "frozen"}, "vae_channels: a frozen autoencoder keeps its own"),
        ({"timesteps": 2}, "loss_timesteps: the schedule has 2, got 3"),
    ],
)
def test_a_wrong_configuration_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        small_config(**changes)


def test_configuration_of_a_notebooks_parameters():
    params = {"steps": 5, "sparsity": 0.25, "unet_channels": [8, 8], "fid_images": 7, "dataset": "digits", "seed": 4}
    config = PruningConfig.of(params, batch_size=3)
    assert config.train == TrainConfig(steps=5, seed=4)
    assert (config.latent.sparsity, config.unet_channels, config.evaluation.fid_images) == (0.25, (8, 8), 7)
    assert config.batch_size == 3
    assert config.with_seed(9) == replace(config, train=TrainConfig(steps=5, seed=9))
