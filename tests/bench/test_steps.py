import pytest
import torch

from vaelab import activations, data
from vaelab.activations.collect import CollectConfig
from vaelab.activations.denoiser import Sampling
from vaelab.bench import steps
from vaelab.data.labelled import LabelledPictures
from vaelab.probing.layer_features import LayerConfig
from vaelab.training.loop import TrainConfig
from vaelab.vae.finetune import StudyConfig


def test_tracking_is_timed_on_copies_that_leave_the_model_alone(tiny_vae):
    before = {name: value.clone() for name, value in tiny_vae.state_dict().items()}
    images = data.load_images("digits", resolution=16, max_images=8)
    config = StudyConfig(TrainConfig(steps=1, device="cpu"), batch_size=2)
    seconds = steps.tracking_seconds(tiny_vae, images, config, rounds=2)
    assert list(seconds.columns) == ["untracked", "repeat", "tracked"]
    assert (seconds > 0).all().all()
    assert all(torch.equal(value, before[name]) for name, value in tiny_vae.state_dict().items())


def test_collecting_is_timed_beside_drawing(small_pipeline):
    config = CollectConfig(("mid.0",), Sampling(steps=1, guidance_scale=0.0), batch_size=2)
    seconds = steps.collect_seconds(small_pipeline("sdxl"), 3, config, rounds=2)
    assert list(seconds.columns) == ["plain", "repeat", "collecting"] and len(seconds) == 2
    assert (seconds > 0).all().all()


def test_a_sweep_is_timed_beside_one_layer_and_timestep_at_a_time(small_pipeline, monkeypatch):
    calls, plain = [], activations.from_pictures
    monkeypatch.setattr(
        activations, "from_pictures", lambda *args, **kwargs: calls.append(args[2:5]) or plain(*args, **kwargs)
    )
    shown = LabelledPictures(
        "p", 32, {}, range(4), lambda i: None if i == 1 else (torch.full((3, 32, 32), 0.1 * i), {})
    )
    config = LayerConfig(("bottleneck", "up_ft0"), (25, 500))
    seconds, named = steps.sweep_seconds(small_pipeline("sd"), shown, config, 2, rounds=2)
    assert list(seconds.columns) == ["together", "one_at_a_time", "encoding", "whole_pass"] and len(seconds) == 2
    together = [call for call in calls if len(call[1]) == 2]
    assert len(together) == 3 and len(calls) == 3 + 3 * 4 and together[0] == ([0, 1], (25, 500), [*config.blocks])
    middle = seconds.median()
    assert named["sweep.times_quicker"] == pytest.approx(middle["one_at_a_time"] / middle["together"])
    assert named["sweep.whole_passes"] == pytest.approx(
        (middle["together"] - middle["encoding"]) / middle["whole_pass"]
    )
    assert named["sweep.together.seconds_per_image"] == middle["together"] > 0
    assert steps.sweep_seconds(small_pipeline("sd"), shown, config, 2, rounds=0)[1] == {}
