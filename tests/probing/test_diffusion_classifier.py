from fractions import Fraction

import numpy as np
import pytest
import torch

from vaelab.models.block_names import find_denoiser
from vaelab.models.conditioning import add_noise, encode_pictures, encode_prompts, predict, prediction_target
from vaelab.probing import diffusion_classifier
from vaelab.probing.diffusion_classifier import (
    DiffusionClassifier,
    Stages,
    class_prompts,
    classify_by_error,
    even_timesteps,
    midpoints,
)

PROMPTS = ["a red circle", "a large blue square", "two yellow stars"]
SMALL = Stages((2, 6), (2, 1))


def pictures(count=2):
    return torch.rand(count, 3, 32, 32, generator=torch.Generator().manual_seed(1)) * 2 - 1


def test_the_stages_of_the_paper_are_evenly_spaced_and_make_no_trial_twice():
    first, second = Stages().schedule()
    assert first == list(range(5, 250, 10)) and len(first) == 25
    assert sorted(first + second) == list(range(250))
    assert Stages((3,), (1,)).schedule() == [[0, 1, 2]]


@pytest.mark.parametrize("total", [1, 7, 10, 97, 250])
def test_middles_of_equal_parts_cover_the_range_for_every_count(total):
    """Each of the parts [i T / n, (i + 1) T / n) holds exactly one of the n middles, at its centre."""
    for count in range(1, total + 1):
        middles = midpoints(total, count)
        exact = [Fraction(2 * part + 1, 2) * total / count for part in range(count)]
        assert middles == [int(one) for one in exact] and len(set(middles)) == count
        assert middles[0] <= Fraction(total, 2 * count) and total - middles[-1] <= Fraction(total, 2 * count) + 1


def test_300_and_600_timesteps_of_1000_reach_the_end(small_pipeline):
    pipeline = small_pipeline("sd")
    for count, first, last in ((300, 1, 998), (600, 0, 999), (25, 20, 980), (1000, 0, 999)):
        chosen = even_timesteps(pipeline, count)
        assert (chosen[0], chosen[-1]) == (first, last)


@pytest.mark.parametrize("trials", [(25, 250), (5, 50, 250), (7, 8, 10), (3, 4, 5, 6, 600), (300, 1000), (6, 7)])
def test_a_stage_ends_with_as_many_trials_as_it_says_and_they_cover_the_range(trials):
    done, total = [], trials[-1]
    for count, added in zip(trials, Stages(trials, range(len(trials), 0, -1)).schedule(), strict=True):
        done = sorted(done + added)
        assert len(done) == len(set(done)) == count
        gaps = np.diff([-1, *done, total])
        assert gaps.max() <= 2 * total / count + 1
    assert done == list(range(total))


def planted(classes, gap, noise, seed=0):
    """Errors of classes (C,), the truth's lower by ``gap``, with noise most of which all classes share."""

    def errors(chosen, trial):
        rng = np.random.default_rng([seed, trial])
        shared, own = rng.normal(size=()), rng.normal(size=classes)
        means = np.full(classes, 1.0)
        means[seed % classes] -= gap
        return torch.from_numpy(means + 5 * shared + noise * own)[list(chosen)]

    return errors


def test_adaptive_and_full_evaluation_agree_on_a_planted_denoiser_and_the_adaptive_one_costs_less():
    stages, full = Stages((5, 50), (3, 1)), Stages((50,), (1,))
    for seed in range(20):
        errors = planted(12, gap=0.5, noise=0.3, seed=seed)
        adaptive, whole = classify_by_error(errors, 12, stages), classify_by_error(errors, 12, full)
        assert adaptive.predicted == whole.predicted == seed % 12
        plain = torch.stack([errors(range(12), trial) for trial in range(50)]).mean(0)
        np.testing.assert_allclose(whole.errors, plain, rtol=1e-12)
        assert whole.passes == 12 * 50 and adaptive.passes == 12 * 5 + 3 * 45
        left = adaptive.trials == 50
        assert left.sum() == 3
        np.testing.assert_allclose(adaptive.errors[left], plain[left], rtol=1e-12)


def test_more_classes_than_there_are_to_drop_are_all_kept():
    result = classify_by_error(planted(2, 1.0, 0.1), 2, Stages((2, 4), (5, 1)))
    assert result.predicted == 0 and result.trials.tolist() == [4, 4]


def test_an_overflow_is_refused():
    with pytest.raises(FloatingPointError, match="the error of trial 1 is not finite"):
        classify_by_error(
            lambda classes, trial: torch.full((len(classes),), torch.nan if trial else 1.0), 3, Stages((4,), (1,))
        )


@pytest.mark.parametrize("name", ["sd", "sd2", "sdxl", "dit", "sd3", "pixart", "deepfloyd"])
def test_errors_are_those_of_a_plain_evaluation(small_pipeline, name):
    pipeline = small_pipeline(name)
    prompts = [3, 77, 400] if name == "dit" else PROMPTS
    classifier = DiffusionClassifier(pipeline, prompts, Stages((2,), (1,)), batch_size=2, seed=4)
    found = classifier.classify(pictures(1))[0]
    latents, total = encode_pictures(pipeline, pictures(1)), pipeline.scheduler.config.num_train_timesteps
    assert classifier.timesteps == [total // 4, total // 4 + total // 2]
    for number, prompt in enumerate(prompts):
        conditions, errors = encode_prompts(pipeline, [prompt], 1, (32, 32)), []
        for trial, timestep in enumerate(classifier.timesteps):
            state = np.random.SeedSequence([4, trial]).generate_state(1, np.uint64)[0]
            noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(int(state >> 1)))
            with torch.no_grad():
                predicted = predict(pipeline, add_noise(pipeline, latents, noise, timestep), timestep, conditions)
            target = prediction_target(pipeline, latents, noise, timestep)
            errors.append((predicted[:, : target.shape[1]] - target).square().mean().item())
        assert found.errors[number] == pytest.approx(np.mean(errors), rel=1e-4)
    assert found.predicted == int(np.argmin(found.errors))


@pytest.mark.parametrize("name", ["sd", "sd2", "sd3"])
def test_a_perfect_prediction_has_no_error(small_pipeline, name):
    """The target, put through the schedule's own formulas, gives the picture back."""
    pipeline = small_pipeline(name)
    latents, noise = torch.randn(2, 1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    noisy, target = add_noise(pipeline, latents, noise, 300), prediction_target(pipeline, latents, noise, 300)
    if name == "sd3":
        back = noisy - 0.3 * target
    else:
        signal = pipeline.scheduler.alphas_cumprod[300].item()
        if name == "sd":
            back = (noisy - (1 - signal) ** 0.5 * target) / signal**0.5
        else:
            back = signal**0.5 * noisy - (1 - signal) ** 0.5 * target
    torch.testing.assert_close(back, latents, atol=1e-5, rtol=1e-4)


def test_a_planted_denoiser_names_the_class_whose_mean_the_picture_is(small_pipeline, monkeypatch):
    """The best denoiser of a class that has one picture knows the noise wherever that picture is meant."""
    pipeline = small_pipeline("sd")
    shown = pictures(3)
    means = encode_pictures(pipeline, shown)
    states = encode_prompts(pipeline, PROMPTS, 3, (32, 32))["encoder_hidden_states"]

    def knows(pipeline, noisy, timestep, conditions):
        which = [(states == one).flatten(1).all(1).nonzero().item() for one in conditions["encoder_hidden_states"]]
        signal = pipeline.scheduler.alphas_cumprod[timestep].item()
        return (noisy - signal**0.5 * means[which]) / (1 - signal) ** 0.5

    monkeypatch.setattr(diffusion_classifier, "predict", knows)
    results = DiffusionClassifier(pipeline, PROMPTS, SMALL, batch_size=2).classify(shown)
    assert [result.predicted for result in results] == [0, 1, 2]
    for number, result in enumerate(results):
        assert result.errors[number] < 1e-6 < result.errors[(number + 1) % 3]
        assert sorted(result.trials.tolist()) == [2, 6, 6] and result.passes == 14


def test_a_picture_is_decided_by_itself_and_the_denoiser_runs_as_often_as_is_said(small_pipeline):
    pipeline, shown = small_pipeline("sd"), pictures(2)
    classifier = DiffusionClassifier(pipeline, PROMPTS, SMALL)
    calls = []
    handle = find_denoiser(pipeline).register_forward_pre_hook(lambda module, args: calls.append(len(args[0])))
    try:
        together = classifier.classify(shown)
    finally:
        handle.remove()
    assert sum(calls) == sum(result.passes for result in together) == 2 * (3 * 2 + 2 * 4)
    for one, result in zip(shown, together, strict=True):
        np.testing.assert_allclose(classifier.classify(one[None])[0].errors, result.errors, rtol=1e-5)


def test_prompts_of_classes(small_pipeline):
    names = ["red_circle", "square"]
    assert class_prompts(small_pipeline("sd"), names, "a photo of a {}, a type of pet") == (
        ["a photo of a red circle, a type of pet", "a photo of a square, a type of pet"], [0, 1],
    )  # fmt: skip
    assert class_prompts(small_pipeline("dit"), names, "unused") == ([0, 1], [0, 1])
    with pytest.raises(ValueError, match=r"^template: "):
        class_prompts(small_pipeline("sd"), names, "a photo")


def test_a_model_is_not_asked_words_it_never_learned(small_pipeline, capsys):
    from vaelab.models import load_pipeline

    embedded = load_pipeline("embedded", device="cpu")
    known = diffusion_classifier.known_class_prompts(embedded, ["red", "blue"], "a {} thing")
    assert known == class_prompts(embedded, ["red", "blue"], "a {} thing")
    assert diffusion_classifier.known_class_prompts(embedded, ["red", "dandelion"], "a {} thing") is None
    assert (
        "left out: the text model never learned 1 words" in (shown := capsys.readouterr().out) and "dandelion" in shown
    )
    with pytest.raises(ValueError, match=r"^template: "):
        diffusion_classifier.known_class_prompts(embedded, ["dandelion"], "a thing")


LABELS = {"red circle": 0, "red star": 1, "blue circle": 4, "cat": 7, "tabby": 7}


def test_a_class_conditional_model_is_asked_the_classes_named_after_what_is_asked(small_pipeline, monkeypatch):
    pipeline = small_pipeline("dit")
    monkeypatch.setattr(pipeline, "labels", LABELS)
    assert class_prompts(pipeline, ["blue", "red"], "unused") == ([0, 1, 4], [1, 1, 0])
    assert class_prompts(pipeline, ["tabby, cat", "circle"], "unused") == ([0, 4, 7], [1, 1, 0])
    with pytest.raises(ValueError, match=r"^model: none of its classes is named after 'large'"):
        class_prompts(pipeline, ["red", "large"], "unused")


def test_a_planted_transformer_names_the_colour_whatever_the_shape(small_pipeline, monkeypatch):
    pipeline = small_pipeline("dit")
    monkeypatch.setattr(pipeline, "labels", LABELS)
    shown = pictures(3)
    means = dict(zip((0, 1, 4), encode_pictures(pipeline, shown), strict=True))

    def knows(pipeline, noisy, timestep, conditions):
        mine = torch.stack([means[number] for number in conditions["class_labels"].tolist()])
        signal = pipeline.scheduler.alphas_cumprod[timestep].item()
        return (noisy - signal**0.5 * mine) / (1 - signal) ** 0.5

    monkeypatch.setattr(diffusion_classifier, "predict", knows)
    numbers, classes = class_prompts(pipeline, ["blue", "red"], "unused")
    results = DiffusionClassifier(pipeline, numbers, SMALL, classes=classes).classify(shown)
    assert [result.predicted for result in results] == [1, 1, 0]


@pytest.mark.parametrize(
    ("trials", "keep", "parameter"),
    [((), (), "trials"), ((5, 5), (2, 1), "trials"), ((5,), (2, 1), "trials"), ((5, 9), (2, 2), "keep"),
     ((5, 9), (3, 2), "keep")],
)  # fmt: skip
def test_stages_that_decide_nothing_are_refused(trials, keep, parameter):
    with pytest.raises(ValueError, match=f"^{parameter}: "):
        Stages(trials, keep)


def test_other_wrong_input_is_refused(small_pipeline):
    pipeline = small_pipeline("sd")
    with pytest.raises(ValueError, match=r"^prompts: "):
        DiffusionClassifier(pipeline, PROMPTS[:1])
    with pytest.raises(ValueError, match=r"^trials: at most one for each of the model's 1000 timesteps, got 1001"):
        even_timesteps(pipeline, 1001)
    with pytest.raises(ValueError, match="FLUX predicts tokens"):
        prediction_target(small_pipeline("flux"), torch.zeros(1), torch.zeros(1), 0)


def test_flux_is_recognised_in_a_class_of_another_name_that_inherits_from_it(small_pipeline, monkeypatch):
    pipeline = small_pipeline("flux")
    kind = type(pipeline.transformer)
    monkeypatch.setattr(pipeline.transformer, "__class__", type("FinetunedTransformer", (kind,), {}))
    with pytest.raises(ValueError, match="FLUX predicts tokens"):
        prediction_target(pipeline, torch.zeros(1), torch.zeros(1), 0)


class OnMPS(torch.Tensor):
    """A tensor on a device without float64."""

    def double(self):
        raise TypeError("Cannot convert a MPS Tensor to float64 dtype")

    def cpu(self):
        return self.as_subclass(torch.Tensor)


def test_errors_on_a_device_without_float64_are_moved_before_they_are_widened():
    result = classify_by_error(lambda left, trial: torch.arange(3.0)[left].as_subclass(OnMPS), 3, Stages((2,), (1,)))
    assert result.predicted == 0 and result.errors.tolist() == [0, 1, 2]
