import numpy as np
import planted_pictures
import pytest
import torch
from torch import nn

from vaelab.hooks import capture
from vaelab.probing import dataset, diffc
from vaelab.probing.diffc import DiffC, DiffCConfig, DiffCs, train_together
from vaelab.probing.linear import measure_accuracy
from vaelab.training.checkpoint import write_tensors

BLOCK = "up.t25.maps"
SMALL = {"width": 8, "epochs": 4, "batch_size": 8, "learning_rate": 1e-2, "final_rate": 5e-3, "device": "cpu"}


def train_alone(learn, validate, layer, config=None, **options):
    return train_together({"": learn}, {"": validate}, layer, config, **options)[""]


def test_forty_million_parameters_at_1280_channels():
    with torch.device("meta"):
        count = sum(one.numel() for one in DiffC(1280, 37).parameters())
    by_hand = (1280 + 3 * 1024) * 1024 * 9 + 4 * 1024 + 1024 * 37 + 37
    assert count == by_hand and round(count / 1e6) == 40


@pytest.mark.parametrize(("height", "width"), [(16, 16), (32, 24)])
def test_the_output_shapes_are_those_of_table_10(height, width):
    with torch.device("meta"):
        model = DiffC(1280, 37)
        with capture(model, ["conv1", "conv2", "conv3", "conv4", "gap", "fc"]) as seen:
            model(torch.zeros(2, height, width, 1280))
    shapes = {layer: tuple(calls[0].shape) for layer, calls in seen.items()}
    for layer, part in (("conv1", 1), ("conv2", 2), ("conv3", 4), ("conv4", 8)):
        assert shapes[layer] == (2, 1024, height // part, width // part)
    assert shapes["gap"] == (2, 1024, 1, 1) and shapes["fc"] == (2, 37)


def test_it_is_the_plain_stack_in_float64():
    model, maps = DiffC(3, 5, width=4).double(), torch.randn(2, 9, 7, 3, dtype=torch.float64)
    layers = [layer for one in (model.conv1, model.conv2, model.conv3, model.conv4) for layer in (one, nn.ReLU())]
    expected = model.fc(nn.Sequential(*layers)(maps.permute(0, 3, 1, 2)).mean((2, 3)))
    torch.testing.assert_close(model(maps), expected, rtol=1e-12, atol=1e-12)


def test_together_they_are_each_alone_in_float64():
    models = [DiffC(3, classes, width=4).double() for classes in (5, 2, 3)]
    maps = torch.randn(2, 9, 7, 3, dtype=torch.float64)
    together = DiffCs(models)(maps)
    sum(each.square().sum() for each in together).backward()
    gradients = [[p.grad.clone() for p in model.parameters()] for model in models]
    for model, logits, found in zip(models, together, gradients, strict=True):
        alone = model(maps)
        torch.testing.assert_close(logits, alone, rtol=1e-12, atol=1e-12)
        model.zero_grad()
        alone.square().sum().backward()
        for parameter, gradient in zip(model.parameters(), found, strict=True):
            torch.testing.assert_close(gradient, parameter.grad, rtol=1e-10, atol=1e-12)


def test_it_is_trained_as_section_4_1_says(pictures, monkeypatch):
    """Thirty epochs of 60 pictures in batches of 16, the rate from 1e-4 to 5e-5, nothing clipped."""
    seen = {}

    class Stopped(Exception):
        pass

    def noted(objective, batches, config, **options):
        seen.update(
            config=config, batch=next(batches())["maps"].shape, width=objective.models.models[0].conv1.out_channels
        )
        raise Stopped

    monkeypatch.setattr(diffc, "train", noted)
    learn, validate, _ = (dataset.load_examples(one) for one in pictures)
    with pytest.raises(Stopped):
        train_alone(learn, validate, BLOCK)
    config = seen["config"]
    assert (config.steps, seen["batch"], seen["width"]) == (30 * 4, (16, 4, 4, 6), 1024)
    assert (config.rate(1), config.schedule, config.clip_norm) == (1e-4, "cosine", 0)
    assert 5e-5 < config.rate(config.steps) < 5.1e-5


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    place = tmp_path_factory.mktemp("diffc")
    truth = [planted_pictures.labels(count, seed) for seed, count in enumerate((60, 24, 60))]
    learn, validate, test = (planted_pictures.fill(place / str(seed), one, seed=seed) for seed, one in enumerate(truth))
    return learn, validate, test


def test_what_is_planted_is_read_and_what_is_not_there_is_not(pictures):
    learn, validate, test = ({f: dataset.load_examples(one, f) for f in ("shape", "colour")} for one in pictures)
    fitted = train_together(learn, validate, BLOCK, DiffCConfig(**{**SMALL, "epochs": 12}))
    predictions = diffc.classify_stored([each.model for each in fitted.values()], test["shape"], BLOCK)
    for factor, predicted, there in zip(fitted, predictions, (True, False), strict=True):
        found = measure_accuracy(predicted, test[factor].labels, learn[factor].labels)
        assert found.accuracy > 0.95 if there else found.low < 0.55, (factor, found)


def test_factors_trained_together_end_in_the_weights_of_each_alone(pictures, tmp_path):
    parts = [{factor: dataset.load_examples(one, factor) for factor in ("shape", "colour")} for one in pictures[:2]]
    together = train_together(*parts, BLOCK, DiffCConfig(**SMALL), folder=tmp_path)
    for factor, found in together.items():
        alone = train_alone(*(part[factor] for part in parts), BLOCK, DiffCConfig(**SMALL))
        assert found.epoch == alone.epoch and len(found.epochs) == 4
        torch.testing.assert_close(found.epochs.to_numpy(), alone.epochs.to_numpy(), rtol=1e-4, atol=1e-6)
        for name, weight in alone.model.state_dict().items():
            torch.testing.assert_close(found.model.state_dict()[name], weight, rtol=1e-4, atol=1e-5)
        assert [file.name for file in (tmp_path / factor).iterdir()] == [f"epoch-{found.epoch}.safetensors"]
    parts[0]["colour"] = parts[0]["colour"].take(np.arange(50))
    with pytest.raises(ValueError, match=r"^examples: the factors have different pictures"):
        train_together(*parts, BLOCK, DiffCConfig(**SMALL))


def test_the_chosen_epoch_is_the_best_on_the_validation_pictures(pictures, tmp_path):
    learn, validate, _ = (dataset.load_examples(one, "colour") for one in pictures)
    fitted = train_alone(learn, validate, BLOCK, DiffCConfig(**SMALL), folder=tmp_path)
    assert fitted.epochs["epoch"].tolist() == [1, 2, 3, 4]
    best = fitted.epochs.sort_values(["accuracy", "loss"], ascending=[False, True]).iloc[0]
    assert fitted.epoch == best["epoch"]
    accuracy = (diffc.classify_stored([fitted.model], validate, BLOCK)[0] == validate.labels).float().mean().item()
    assert accuracy == pytest.approx(best["accuracy"])
    names = [file.name for file in tmp_path.glob("epoch-*")]
    assert names == [f"epoch-{fitted.epoch}.safetensors"], "the other epochs' weights are removed"
    saved = diffc.read_weights(tmp_path / names[0], fitted.model)
    assert all(torch.equal(value, saved[name]) for name, value in fitted.model.state_dict().items())


def test_killed_between_epochs_they_end_in_the_same_weights(pictures, tmp_path, monkeypatch):
    parts = [{factor: dataset.load_examples(one, factor) for factor in ("shape", "colour")} for one in pictures[:2]]
    whole = train_together(*parts, BLOCK, DiffCConfig(**SMALL))
    after, steps = diffc.EpochSelection.after, []

    def killed(self, step, optimizer):
        after(self, step, optimizer)
        steps.append(step)
        if len(steps) == 20:
            raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(diffc.EpochSelection, "after", killed)
        train_together(*parts, BLOCK, DiffCConfig(**SMALL), folder=tmp_path)
    again = train_together(*parts, BLOCK, DiffCConfig(**SMALL), folder=tmp_path)
    for factor, expected in whole.items():
        assert again[factor].epoch == expected.epoch and again[factor].epochs.equals(expected.epochs)
        weights = again[factor].model.state_dict()
        assert all(torch.equal(value, weights[name]) for name, value in expected.model.state_dict().items())
    with pytest.raises(ValueError, match="made with other settings"):
        train_together(*parts, BLOCK, DiffCConfig(**{**SMALL, "width": 9}), folder=tmp_path)


def test_wrong_input_is_refused(pictures):
    learn = dataset.load_examples(pictures[0])
    with pytest.raises(ValueError, match=r"^layer: 'up.t25' has items with positions \(\)"):
        train_alone(learn, learn, "up.t25")
    with pytest.raises(ValueError, match=r"^epochs: must be at least 1"):
        DiffCConfig(epochs=0)
    with pytest.raises(ValueError, match=r"^final_rate: expected 0 to learning_rate"):
        DiffCConfig(**{**SMALL, "final_rate": 1.0})


@pytest.mark.parametrize("damage", ["nan", "infinite", "cut", "changed", "renamed", "shape", "missing"])
def test_damaged_best_weights_are_one_error_that_names_file_and_tensor(pictures, tmp_path, damage):
    learn, validate, _ = (dataset.load_examples(one, "colour") for one in pictures)
    fitted = train_alone(learn, validate, BLOCK, DiffCConfig(**{**SMALL, "epochs": 1}), folder=tmp_path)
    file, weights = tmp_path / "epoch-1.safetensors", dict(fitted.model.state_dict())
    if damage in ("nan", "infinite"):
        weights["fc.bias"] = weights["fc.bias"] + float(damage.replace("infinite", "inf"))
    elif damage == "renamed":
        weights["fc.offset"] = weights.pop("fc.bias")
    elif damage == "shape":
        weights["fc.bias"] = weights["fc.bias"][:1]
    write_tensors(file, weights, {})
    whole = bytearray(file.read_bytes())
    if damage == "cut":
        file.write_bytes(whole[:-9])
    elif damage == "changed":
        whole[-3] ^= 1
        file.write_bytes(whole)
    elif damage == "missing":
        file.unlink()
    what = {
        "nan": "fc.bias has NaN or inf",
        "infinite": "fc.bias has NaN or inf",
        "renamed": "fc.bias is absent",
        "shape": r"fc.bias is \(1,\), expected \(2,\)",
        "missing": "is missing",
    }.get(damage, "is damaged")
    with pytest.raises(ValueError, match=rf"epoch-1.safetensors .*{what}"):
        train_alone(learn, validate, BLOCK, DiffCConfig(**{**SMALL, "epochs": 1}), folder=tmp_path)


def test_killed_after_the_best_weights_were_written_and_before_the_checkpoint(pictures, tmp_path, monkeypatch):
    """The checkpoint's best epoch keeps its weights: a rerun epoch need not come out best again on a GPU."""
    learn, validate, _ = (dataset.load_examples(one, "shape") for one in pictures)
    config, state = DiffCConfig(**SMALL), diffc.EpochSelection.state

    def killed(self):
        if len(self.selected[0].rows) == 3:
            raise KeyboardInterrupt
        return state(self)

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(diffc.EpochSelection, "state", killed)
        train_alone(learn, validate, BLOCK, config, folder=tmp_path)
    with monkeypatch.context() as patched:  # no later epoch is better
        patched.setattr(diffc, "_logits", lambda models, examples, *_: [torch.zeros(len(examples), 3)])
        again = train_alone(learn, validate, BLOCK, config, folder=tmp_path)
    saved = diffc.read_weights(tmp_path / f"epoch-{again.epoch}.safetensors", again.model)
    assert again.epoch <= 2 and all(torch.equal(value, saved[name]) for name, value in again.model.state_dict().items())


def test_a_size_that_is_0_fits_the_pictures_and_a_given_one_is_kept(capsys):
    chosen = diffc.choose_size(0, 0, 0.0, pictures=800, batch_size=16, device="cpu")
    assert chosen == (32, 20, 1e-3) and "width 32, 20 epochs" in capsys.readouterr().out
    assert diffc.choose_size(0, 0, 0.0, pictures=30, batch_size=16, device="cpu")[1] == 120
    assert diffc.choose_size(1024, 30, 1e-4, pictures=9, batch_size=16, device="cpu") == (1024, 30, 1e-4)
    assert diffc.choose_size(1024, 30, 0.0, pictures=9, batch_size=16, device="cpu")[2] == pytest.approx(1e-4, rel=0.03)


def test_the_time_of_a_training_is_estimated_from_a_step(capsys):
    config = DiffCConfig(**SMALL)
    seconds = diffc.estimate_training([planted_pictures.LAYOUT[BLOCK]] * 2, [3, 2], 60, config)
    assert (
        0 < seconds < 60
        and "4 Diff-Cs on 60 pictures, 2 at a time" in (shown := capsys.readouterr().out)
        and "64 steps" in shown
    )


def test_logits_that_are_not_finite_are_no_prediction(pictures):
    test = dataset.load_examples(pictures[2])
    model = DiffC(planted_pictures.WIDTH, 3, width=4)
    torch.nn.init.constant_(model.fc.bias, torch.nan)
    with pytest.raises(FloatingPointError, match=r"up.t25.maps: the logits of Diff-C are not finite"):
        diffc.classify_stored([model], test, BLOCK)


def test_the_precision_of_training_is_its_own(pictures, monkeypatch):
    """``precision`` is the model's in every notebook; Diff-C trains in float32 unless asked otherwise."""

    class Stopped(Exception):
        pass

    def noted(objective, batches, config, **options):
        seen.append(config.precision)
        raise Stopped

    seen = []
    monkeypatch.setattr(diffc, "train", noted)
    learn = dataset.load_examples(pictures[0])
    for config in (DiffCConfig(**SMALL), DiffCConfig(**SMALL, training_precision="bfloat16")):
        with pytest.raises(Stopped):
            train_alone(learn, learn, BLOCK, config)
    assert seen == ["float32", "bfloat16"]
