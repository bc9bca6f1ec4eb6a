import numpy as np
import pandas as pd
import pytest

from vaelab import conclusions

SEEDS = [0, 1]


def numbers(**settings):
    base = {"recon_mse": 10.0, "channels_off": 0, "latent_scale": 1.0, "seed": 0}
    names = ("diffusion_loss", "masked_recon_mse", "mean_mask", "scale")
    rows = [
        {**base, "setting": name, "seed": seed, **dict(zip(names, values, strict=True))}
        for name, values in settings.items() for seed in SEEDS
    ]  # fmt: skip
    return pd.DataFrame(rows)


def parts_of(setting, improvement, by_scaling):
    return [{"setting": setting, "seed": seed, "improvement": improvement + 1e-3 * seed,
             "by_scaling": by_scaling, "left": improvement - by_scaling} for seed in SEEDS]  # fmt: skip


def test_the_verdict_says_what_the_numbers_say():
    measured = numbers(
        unmasked=(0.2, 10.0, 1.0, 1.0), lambda_0=(0.05, 90.0, 0.05, 0.05), lambda_1=(0.2, 11.0, 0.9, 0.9)
    )
    parts = pd.DataFrame([*parts_of("lambda_0", 0.15, 0.14), *parts_of("lambda_1", 0.0, 0.0)])
    said = conclusions.verdict(measured, parts).data
    assert "collapses below a tenth of its scale with lambda_0, without any penalty too" in said
    assert "pictures are then lost with lambda_0." in said
    assert "falls by 0.15; scaling alone, of the denoiser without a mask, brings 0.14." in said
    assert "0.15 lower, of which scaling alone brings 0.14" in said and "have 9 times the error" in said
    assert "**lambda_1**: mean mask 0.9, 0 channels off; the diffusion loss is not clearly another" in said
    held = conclusions.verdict(measured[measured["setting"] != "lambda_0"], parts).data
    assert "No lambda brought the latent below a tenth" in held and "lost" not in held


def test_the_papers_numbers_stand_beside_ours():
    measured = numbers(unmasked=(0.2, 10.0, 1.0, 1.0), lambda_0=(0.05, 90.0, 0.05, 0.05))
    found = conclusions.beside_paper(measured)
    assert found["setting"].tolist() == ["lambda_0"]
    row = found.iloc[0]
    assert (row["paper: diffusion loss"], row["paper: MSE"]) == (0.0240, 24.67)
    assert (row["here: diffusion loss"], row["here: MSE"], row["here: masked MSE"]) == (0.05, 10.0, 90.0)
    assert row["paper: scale of that closed form"] == pytest.approx(0.0597, abs=1e-4)


def test_the_papers_comparison_is_paired():
    measured = numbers(lambda_0=(0.05, 90.0, 0.05, 0.05), **{"lambda_0.01": (0.04, 90.0, 0.05, 0.05)})
    measured["diffusion_loss"] += 0.5 * measured["seed"]  # what seeds share does not widen the interval
    found = conclusions.paper_differences(measured.sample(frac=1, random_state=0)).set_index("measure")
    row = found.loc["diffusion_loss"]
    assert row["paper"] == pytest.approx(-0.0004)
    assert (row["low"], row["here"], row["high"]) == pytest.approx((-0.01, -0.01, -0.01))
    assert found.loc["recon_mse", "paper"] == pytest.approx(-2.08)
    assert conclusions.paper_differences(numbers(unmasked=(0.2, 10.0, 1.0, 1.0))).empty


def test_the_closed_forms_curve_rises_with_the_scale():
    scales, losses = conclusions.closed_form_curve(0.01, 1.0)
    assert scales[0] == pytest.approx(0.01) and scales[-1] == pytest.approx(1.0)
    assert (np.diff(losses) > 0).all() and losses[-1] == pytest.approx(0.2755, abs=1e-3)
