import planted_pictures
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from vaelab.hooks import capture
from vaelab.probing import dataset, diffc
from vaelab.probing.diffc import DiffC, DiffCConfig, fit
from vaelab.probing.linear import score

BLOCK = "up.t25.maps"
SMALL = {"width": 8, "epochs": 4, "batch_size": 8, "learning_rate": 1e-2, "final_rate": 5e-3, "device": "cpu"}


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


def test_it_is_trained_as_section_4_1_says(pictures, monkeypatch):
    """Thirty epochs of 60 pictures in batches of 16, the rate from 1e-4 to 5e-5, nothing clipped."""
    seen = {}

    class Stopped(Exception):
        pass

    def noted(objective, batches, config, **options):
        seen.update(config=config, batch=next(batches())["maps"].shape, width=objective.model.conv1.out_channels)
        raise Stopped

    monkeypatch.setattr(diffc, "train", noted)
    learn, validate, _ = (dataset.read(one) for one in pictures)
    with pytest.raises(Stopped):
        fit(learn, validate, BLOCK)
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
    learn, validate, test = pictures
    for factor, there in (("shape", True), ("colour", False)):
        parts = [dataset.read(one, factor) for one in (learn, validate, test)]
        fitted = fit(*parts[:2], BLOCK, DiffCConfig(**{**SMALL, "epochs": 12}))
        found = score(diffc.classify(fitted.model, parts[2], BLOCK), parts[2].labels, parts[0].labels)
        assert found.accuracy > 0.95 if there else found.low < 0.55, (factor, found)


def test_the_chosen_epoch_is_the_best_on_the_validation_pictures(pictures, tmp_path):
    learn, validate, _ = (dataset.read(one, "colour") for one in pictures)
    fitted = fit(learn, validate, BLOCK, DiffCConfig(**SMALL), folder=tmp_path)
    assert fitted.epochs["epoch"].tolist() == [1, 2, 3, 4]
    best = fitted.epochs.sort_values(["accuracy", "loss"], ascending=[False, True]).iloc[0]
    assert fitted.epoch == best["epoch"]
    accuracy = (diffc.classify(fitted.model, validate, BLOCK) == validate.labels).float().mean().item()
    assert accuracy == pytest.approx(best["accuracy"])
    kept = load_file(tmp_path / diffc.BEST)
    assert all(torch.equal(value, kept[name]) for name, value in fitted.model.state_dict().items())


def test_killed_between_epochs_it_ends_in_the_same_weights(pictures, tmp_path, monkeypatch):
    learn, validate, _ = (dataset.read(one, "colour") for one in pictures)
    whole = fit(learn, validate, BLOCK, DiffCConfig(**SMALL))
    after, steps = diffc.Selection.after, []

    def killed(self, step, optimizer):
        after(self, step, optimizer)
        steps.append(step)
        if len(steps) == 20:
            raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(diffc.Selection, "after", killed)
        fit(learn, validate, BLOCK, DiffCConfig(**SMALL), folder=tmp_path)
    again = fit(learn, validate, BLOCK, DiffCConfig(**SMALL), folder=tmp_path)
    assert again.epoch == whole.epoch and again.epochs.equals(whole.epochs)
    assert all(torch.equal(value, whole.model.state_dict()[name]) for name, value in again.model.state_dict().items())
    with pytest.raises(ValueError, match="made with other settings"):
        fit(learn, validate, BLOCK, DiffCConfig(**{**SMALL, "width": 9}), folder=tmp_path)


def test_wrong_input_is_refused(pictures):
    learn = dataset.read(pictures[0])
    with pytest.raises(ValueError, match=r"^block: 'up.t25' has items of \(\) positions"):
        fit(learn, learn, "up.t25")
    with pytest.raises(ValueError, match=r"^epochs: must be at least 1"):
        DiffCConfig(epochs=0)
    with pytest.raises(ValueError, match=r"^final_rate: must lie between"):
        fit(learn, learn, BLOCK, DiffCConfig(**{**SMALL, "final_rate": 1.0}))
