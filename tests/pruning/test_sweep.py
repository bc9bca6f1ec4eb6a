import numpy as np
import pandas as pd
import pytest
import torch
from scipy import stats
from small_latents import small_config

from vaelab import data
from vaelab.pruning import noise_loss, results, sweep
from vaelab.pruning.metrics import evaluate_pruning, sample_latents
from vaelab.pruning.train import PrunedRun, build_objective

SEEDS = [0, 1]


def numbers(**settings):
    base = {"recon_mse": 10.0, "inactive_channels": 0, "latent_scale": 1.0, "seed": 0}
    names = ("diffusion_loss", "masked_recon_mse", "mean_mask", "scale")
    rows = [
        {**base, "setting": name, "seed": seed, **dict(zip(names, values, strict=True))}
        for name, values in settings.items() for seed in SEEDS
    ]  # fmt: skip
    return pd.DataFrame(rows)


def parts_of(setting, improvement, by_scaling):
    return [{"setting": setting, "seed": seed, "improvement": improvement + 1e-3 * seed,
             "by_scaling": by_scaling, "left": improvement - by_scaling} for seed in SEEDS]  # fmt: skip


def test_the_findings_describe_the_numbers():
    measured = numbers(
        unmasked=(0.2, 10.0, 1.0, 1.0), lambda_0=(0.05, 90.0, 0.05, 0.05), lambda_1=(0.2, 11.0, 0.9, 0.9)
    )
    parts = pd.DataFrame([*parts_of("lambda_0", 0.15, 0.14), *parts_of("lambda_1", 0.0, 0.0)])
    text = results.describe_results(measured, parts).data
    assert "collapses below a tenth of its scale with lambda_0, without any penalty too" in text
    assert "Its pictures are then lost. The diffusion loss" in text
    ends = stats.t.interval(0.95, 1, 0.1505, stats.sem([0.15, 0.151]))
    assert f"falls by 0.15 ({ends[0]:.3g} to {ends[1]:.3g}); scaling alone" in text
    assert "of the denoiser without a mask, brings 0.14 (0.14 to 0.14)." in text
    assert "0.15 lower, of which scaling alone brings 0.14" in text and "have 9 times the error" in text
    assert "**lambda_1**: mean mask 0.9, 0 inactive channels; the diffusion loss is not clearly another" in text
    assert results.describe_collapse(measured, parts) in text
    both = measured.assign(scale=[1.0, 1.0, 0.05, 0.05, 0.05, 0.05])
    text = results.describe_collapse(both, parts)
    assert "with every lambda, without any penalty too. Its pictures are then lost with lambda_0." in text
    without = results.describe_results(measured[measured["setting"] != "lambda_0"], parts).data
    assert "No lambda brought the latent below a tenth" in without and "lost" not in without


def test_a_mask_is_described_beside_the_training_without_one():
    measured = numbers(unmasked=(0.2, 10.0, 1.0, 1.5), soft=(0.05, 90.0, 0.05, 0.05)).assign(closed_form_loss=0.04)
    text = results.describe_mask(measured, "soft")
    assert "is 0.05 instead of 0.2, but the scale of the latent is 0.05 instead of 1.5" in text
    assert "a loss of 0.04; pictures from the masked latent have 9 times" in text and "2 seeds" in text
    measured.loc[(measured["setting"] == "soft") & (measured["seed"] == 1), "masked_recon_mse"] = 110.0
    ratio = results.error_ratio(measured.sample(frac=1, random_state=0), "soft")
    assert ratio.mean == pytest.approx(99**0.5)
    half = (np.log(11) - np.log(9)) / 2 * stats.t.ppf(0.975, 1)  # the standard error of two values is half their gap
    assert (ratio.low, ratio.high) == pytest.approx((99**0.5 * np.exp(-half), 99**0.5 * np.exp(half)))


def test_the_papers_numbers_stand_beside_ours():
    measured = numbers(unmasked=(0.2, 10.0, 1.0, 1.0), lambda_0=(0.05, 90.0, 0.05, 0.05))
    found = results.paper_comparison(measured)
    assert found["setting"].tolist() == ["lambda_0"]
    row = found.iloc[0]
    assert (row["paper: diffusion loss"], row["paper: MSE"]) == (0.0240, 24.67)
    assert (row["here: diffusion loss"], row["here: MSE"], row["here: masked MSE"]) == (0.05, 10.0, 90.0)
    assert row["paper: scale of that closed form"] == pytest.approx(0.0597, abs=1e-4)


def test_the_papers_comparison_is_paired():
    measured = numbers(lambda_0=(0.05, 90.0, 0.05, 0.05), **{"lambda_0.01": (0.04, 90.0, 0.05, 0.05)})
    measured["diffusion_loss"] += 0.5 * measured["seed"]  # what seeds share does not widen the interval
    found = results.paper_differences(measured.sample(frac=1, random_state=0)).set_index("measure")
    row = found.loc["diffusion_loss"]
    assert row["paper"] == pytest.approx(-0.0004)
    assert (row["low"], row["here"], row["high"]) == pytest.approx((-0.01, -0.01, -0.01))
    assert found.loc["recon_mse", "paper"] == pytest.approx(-2.08)
    assert results.paper_differences(numbers(unmasked=(0.2, 10.0, 1.0, 1.0))).empty


def test_the_closed_forms_curve_rises_with_the_scale():
    scales, losses = results.closed_form_curve(0.01, 1.0)
    assert scales[0] == pytest.approx(0.01) and scales[-1] == pytest.approx(1.0)
    assert (np.diff(losses) > 0).all() and losses[-1] == pytest.approx(0.2755, abs=1e-3)


@pytest.fixture(scope="module")
def held_out():
    return data.load_images("digits", split="test", resolution=16, max_images=12)


@pytest.fixture(scope="module")
def swept(held_out, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    settings = sweep.sweep_settings(small_config(2), [0.0, 0.5], [2])
    learning = data.load_images("digits", resolution=16, max_images=12)
    return settings, folder, sweep.sweep("embedded", settings, SEEDS, (learning, held_out), folder)


def test_settings_differ_from_the_given_one_in_what_their_name_says():
    config = small_config(2, {"mask": "normalised", "kl_weight": 0.5})
    found = sweep.sweep_settings(config, [0.0, 0.001, 0.01], [1, 3])
    assert list(found) == ["unmasked", "lambda_0", "lambda_0.001", "lambda_0.01", "keep_1", "keep_3"]
    assert found["unmasked"].latent.mask == "none"
    assert found["lambda_0.001"] == config.with_latent(sparsity=0.001)
    kept = found["keep_3"].latent
    assert (kept.mask, kept.keep, kept.shared, kept.decoder_reads) == ("topk", 3, True, "masked")
    assert all(one.latent.kl_weight == 0.5 for one in found.values())


def test_wrong_sweeps_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"lambdas: must be at least 0, got -0\.1"):
        sweep.sweep_settings(small_config(2), [-0.1])
    with pytest.raises(ValueError, match="keep: must be at least 1, got 0"):
        sweep.sweep_settings(small_config(2), [], [0])
    with pytest.raises(ValueError, match="seeds: an interval needs two or more different seeds"):
        sweep.sweep("embedded", {}, [3], None, tmp_path)
    with pytest.raises(ValueError, match="seeds: an interval needs two or more different seeds"):
        sweep.sweep("embedded", {}, [3, 3], None, tmp_path)


def test_a_setting_that_does_not_fit_is_refused_before_anything_is_trained(held_out, tmp_path):
    settings = sweep.sweep_settings(small_config(2), [0.0], [5])
    with pytest.raises(ValueError, match="keep: must be from 1 to the latent's 4 channels, got 5"):
        sweep.sweep("embedded", settings, SEEDS, (held_out, held_out), tmp_path)
    assert not list(tmp_path.iterdir())


def test_every_setting_is_run_with_every_seed_and_summed_up_with_intervals(swept):
    _, _, runs = swept
    measured = sweep.metrics_table(runs)
    assert list(measured.groupby("setting", sort=False).size().items()) == [
        ("unmasked", 2), ("lambda_0", 2), ("lambda_0.5", 2), ("keep_2", 2),
    ]  # fmt: skip
    found = results.summarize_over_seeds(measured)
    pair = measured[measured["setting"] == "lambda_0.5"]["diffusion_loss"].to_numpy()
    half = stats.t.ppf(0.975, 1) * pair.std(ddof=1) / 2**0.5
    assert found["lambda_0.5.diffusion_loss"] == pytest.approx(pair.mean())
    assert found["lambda_0.5.diffusion_loss.low"] == pytest.approx(pair.mean() - half)
    assert found["lambda_0.5.diffusion_loss.high"] == pytest.approx(pair.mean() + half)
    for name in ("closed_form_loss", "recon_mse", "masked_recon_mse", "mean_mask", "inactive_channels"):
        assert f"lambda_0.{name}.low" in found
    assert not any("fid" in name for name in found)
    assert found["keep_2.inactive_channels"] == 2 and found["keep_2.mean_mask"] == 0.5
    assert results.topk_runs(measured)["kept"].tolist() == [2, 2]


def test_the_control_is_the_denoisers_loss_on_scaled_latents(swept, held_out):
    settings, folder, runs = swept
    found = sweep.scaling_control(
        "embedded", "unmasked", settings["unmasked"], SEEDS, held_out, folder, [1.0, 0.5, 0.0]
    )
    first = next(run for run in runs if run.setting == "unmasked")
    assert found.loc[0, "diffusion_loss"] == pytest.approx(first.measures["diffusion_loss"], rel=1e-6)
    assert found.loc[0, "matched_loss"] == pytest.approx(first.measures["diffusion_loss"], rel=1e-3)
    assert found.loc[0, "closed_form_loss"] == pytest.approx(first.measures["closed_form_loss"], rel=1e-6)
    assert found.loc[1, "latent_scale"] == pytest.approx(found.loc[0, "latent_scale"] / 2)
    nothing = found[found["scale"] == 0]
    assert (nothing["closed_form_loss"] == 0).all() and len(nothing) == 2
    metrics = results.control_metrics(found)
    assert {"control.scale_0.5.diffusion_loss", "control.scale_0.closed_form_loss"} <= metrics.keys()
    with pytest.raises(ValueError, match=r"scales: must be at least 0, got -1"):
        sweep.scaling_control("embedded", "unmasked", settings["unmasked"], SEEDS, held_out, folder, [-1.0])


def test_a_loss_that_fell_by_scaling_alone_leaves_nothing(swept, held_out):
    """Planted: a run that is the reference's denoiser and its latents, scaled, and reported so."""
    settings, folder, _ = swept
    runs = []
    for seed in SEEDS:
        own = sweep.load_sweep("embedded", settings, seed, 16, folder)["unmasked"]
        evaluation = settings["unmasked"].evaluation
        reference = evaluate_pruning(own, held_out, evaluation, seed)[0]._asdict()
        seen, timesteps = (
            sample_latents(own, held_out, seed)[1],
            noise_loss.spread_timesteps(own.scheduler, evaluation.loss_timesteps),
        )
        scaled_predictor = noise_loss.predictor_of_scaled_latents(
            noise_loss.noise_predictor(own.unet), own.scheduler, 0.2
        )
        loss = noise_loss.noise_errors(scaled_predictor, 0.2 * seen, own.scheduler, timesteps, seed=seed).mean()
        abar = noise_loss.alpha_bar(own.scheduler, timesteps)
        closed = noise_loss.closed_form_error(noise_loss.channel_variances(0.2 * seen), abar).mean()
        scaled = {**reference, "diffusion_loss": float(loss), "closed_form_loss": float(closed)}
        better = {**scaled, "diffusion_loss": float(loss) - 0.01}
        runs += [PrunedRun(name, seed, [], [], [], values)
                 for name, values in (("unmasked", reference), ("scaled", scaled), ("better", better))]  # fmt: skip
    found = sweep.decompose_improvement("embedded", runs, "unmasked", settings, held_out, folder)
    assert found["factor"].to_numpy() == pytest.approx(0.2, rel=1e-6)
    left = found.groupby("setting")["left"].mean()
    assert left["scaled"] == pytest.approx(0, abs=1e-5)
    assert left["better"] == pytest.approx(0.01, abs=1e-5)
    np.testing.assert_allclose(found["by_scaling"] + found["left"], found["improvement"])


def test_pictures_show_every_way_to_decode(swept, held_out):
    settings, folder, _ = swept
    trained = sweep.load_sweep("embedded", {"keep_2": settings["keep_2"]}, 0, 16, folder)
    rows = sweep.picture_rows(trained, held_out, settings["keep_2"], 3)
    assert list(rows) == ["held out", "keep_2, latent", "keep_2, masked", "keep_2, drawn"]
    assert all(row.shape == (3, 3, 16, 16) for row in rows.values())
    assert not torch.equal(rows["keep_2, latent"], rows["keep_2, masked"])
    plain = sweep.load_sweep("embedded", {"unmasked": settings["unmasked"]}, 0, 16, folder)
    assert list(sweep.picture_rows(plain, held_out, settings["unmasked"], 2)) == [
        "held out", "unmasked, latent", "unmasked, drawn",
    ]  # fmt: skip
    fresh = build_objective("embedded", settings["keep_2"], 16).state_dict()["vae.encoder.conv_in.weight"]
    assert not torch.equal(trained["keep_2"].vae.encoder.conv_in.weight, fresh)
