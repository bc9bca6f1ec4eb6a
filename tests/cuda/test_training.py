"""The training loop on a GPU: precisions, the loss scaler, resuming; and what is trained with it."""

import numpy as np
import pytest
import torch
from helpers import SILENT, save_silenced
from torch import nn

from vaelab import data, models
from vaelab.training.loop import TrainConfig, Watcher, train
from vaelab.vae import channels
from vaelab.vae.finetune import StudyConfig, train_vae
from vaelab.vae.nudge import NudgeConfig
from vaelab.vae.objective import VAEObjective

pytestmark = pytest.mark.cuda
PRECISIONS = ["float32", "bfloat16", "float16"]
NEAR = {"float32": 0.02, "bfloat16": 0.05, "float16": 0.02}


@pytest.fixture(scope="module")
def images():
    return data.load_images("digits", resolution=16, max_images=24)


@pytest.fixture
def folder(tiny_vae, tmp_path):
    tiny_vae.register_to_config(force_upcast=False)  # else float16 is refused, as for the SDXL-VAE
    return str(save_silenced(tiny_vae, tmp_path / "model"))


def config_for(device, precision, steps=6, **changes):
    given = {"learning_rate": 1e-3, "log_every": 1, "horizon": 6, "schedule": "cosine", "checkpoint_every": 3}
    return TrainConfig(steps, device=str(device), precision=precision, **{**given, **changes})


def objective_of(folder):
    return VAEObjective(models.load_vae(folder, device="cpu").requires_grad_(True), 1e-6)


def losses(trained):
    return np.array([row["loss"] for row in trained.history])


@pytest.mark.parametrize("precision", PRECISIONS)
def test_losses_are_near_the_cpus_in_float32(device, folder, images, precision):
    reference = train(objective_of(folder), images.shuffled(8, 0), config_for("cpu", "float32"))
    objective = objective_of(folder)
    found = train(objective, images.shuffled(8, 0), config_for(device, precision))
    # with float16 the loss scaler skips first steps, so that later losses are those of earlier steps
    alike = slice(1) if precision == "float16" else slice(None)
    np.testing.assert_allclose(losses(found)[alike], losses(reference)[alike], rtol=NEAR[precision])
    assert losses(found)[-1] < losses(found)[0]
    for parameter in objective.parameters():
        assert parameter.device.type == device.type and parameter.dtype == torch.float32


@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_resumed_run_ends_where_an_uninterrupted_one_does(device, folder, images, precision, tmp_path):
    whole, parts = objective_of(folder), objective_of(folder)
    train(whole, images.shuffled(8, 0), config_for(device, precision))
    with pytest.raises(KeyboardInterrupt):
        train(parts, images.shuffled(8, 0), config_for(device, precision), folder=tmp_path, watchers=[StopAfter(4)])
    parts = objective_of(folder)
    resumed = train(
        parts, images.shuffled(8, 0), config_for(device, precision), folder=tmp_path, watchers=[StopAfter(99)]
    )
    assert resumed.resumed_at == 3
    for (name, first), second in zip(whole.state_dict().items(), parts.state_dict().values(), strict=True):
        torch.testing.assert_close(first, second, rtol=1e-3, atol=1e-5, msg=lambda text, name=name: name + text)


class StopAfter(Watcher):
    """Ends the run after a step, as a kill does."""

    def __init__(self, step):
        self._step = step

    def after(self, step, optimizer):
        if step == self._step:
            raise KeyboardInterrupt


class Overflowing(nn.Module):
    """A loss whose scaled gradient is more than float16 holds, until the scaler has been lowered."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4))

    def forward(self, batch):
        return {"loss": (self.weight * batch.to(self.weight)).half().float().sum()}


def test_the_loss_scaler_skips_a_step_that_overflows_and_its_state_is_resumed(device, tmp_path):
    def batches(start=0, rank=0, world=1):
        while True:
            yield torch.full((4,), 30.0)

    def config(steps):
        return TrainConfig(
            steps, learning_rate=0.1, clip_norm=0.0, checkpoint_every=1, horizon=6, device=str(device),
            precision="float16",
        )  # fmt: skip

    first, whole, resumed = Overflowing(), Overflowing(), Overflowing()
    train(first, batches, config(1))
    assert torch.equal(first.weight.detach().cpu(), torch.ones(4))  # 65,536 x 30 is no number in float16
    train(whole, batches, config(6))
    assert (whole.weight < 1).all()
    with pytest.raises(KeyboardInterrupt):
        train(Overflowing(), batches, config(6), folder=tmp_path, watchers=[StopAfter(5)])
    assert train(resumed, batches, config(6), folder=tmp_path, watchers=[StopAfter(99)]).resumed_at == 4
    torch.testing.assert_close(resumed.weight, whole.weight)  # from the first scale on, all steps would be skipped


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("strategy", ["multiply", "reset"])
def test_channels_are_found_and_nudged_during_mixed_precision(device, folder, images, precision, strategy, tmp_path):
    nudge = NudgeConfig(strategy, interval=2)

    def run(where, precision, name):
        # a scale is nudged before any step could have moved it: the learning rate is next to nothing
        config = TrainConfig(3, learning_rate=1e-9, log_every=1, device=str(where), precision=precision)
        study = StudyConfig(config, nudge, batch_size=8, threshold=1e-2)
        return train_vae(folder, "nudge", study, (images, images), tmp_path / name)

    found, expected = run(device, precision, "found"), run("cpu", "float32", "expected")
    touched = [(row["layer"], tuple(row["channels"])) for row in found.interventions]
    assert touched == [(row["layer"], tuple(row["channels"])) for row in expected.interventions]
    assert set(touched) == set(SILENT.items())
    for row, other in zip(found.interventions, expected.interventions, strict=True):
        assert row["after"] == pytest.approx(other["after"], rel=1e-4)  # not rounded to half precision


@pytest.mark.parametrize("precision", PRECISIONS)
def test_activity_measured_under_autocast_is_float32s(device, folder, images, precision):
    vae = models.load_vae(folder, device=str(device))
    tracker = channels.ActivityTracker(vae)
    pixels = images.stack().to(device)
    dtype = getattr(torch, precision)
    with tracker.track(), torch.no_grad(), torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
        vae(pixels)
    half = tracker.read()
    reference = channels.ActivityTracker(plain := models.load_vae(folder, device="cpu"))
    with reference.track(), torch.no_grad():
        plain(pixels.cpu())
    for layer, moments in reference.read().items():
        torch.testing.assert_close(half[layer].mean_abs.cpu().float(), moments.mean_abs.float(), rtol=0.1, atol=5e-3)
