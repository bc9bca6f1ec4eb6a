import time

import pandas as pd
import pytest
import torch

from vaelab import bench, data
from vaelab.collect import CollectConfig
from vaelab.denoise import Sampling
from vaelab.study import StudyConfig
from vaelab.training import TrainConfig


def test_every_action_is_timed_once_a_round_in_an_order_that_changes():
    order = []
    actions = {"slow": lambda n: (order.append("slow"), time.sleep(0.01)), "fast": lambda n: order.append("fast")}
    seconds = bench.interleaved(actions, 8, device=torch.device("cpu"), warmup=2)
    assert list(seconds.columns) == ["slow", "fast"] and len(seconds) == 8
    assert len(order) == 20
    assert {tuple(order[i : i + 2]) for i in range(0, 20, 2)} == {("slow", "fast"), ("fast", "slow")}
    assert (seconds["slow"] >= 0.01).all() and seconds["fast"].median() < 0.005


def test_percent_is_of_the_paired_differences():
    seconds = pd.DataFrame({"a": [1.0, 2.0, 3.0], "b": [1.1, 2.2, 3.2]})
    middle, low, high = bench.paired_percent(seconds, "b", "a")
    assert middle == pytest.approx(10) and low == pytest.approx(7.5) and high == pytest.approx(10)


def test_tracking_is_timed_on_copies_that_leave_the_model_alone(tiny_vae):
    before = {name: value.clone() for name, value in tiny_vae.state_dict().items()}
    images = data.load_images("digits", resolution=16, max_images=8)
    config = StudyConfig(TrainConfig(steps=1, device="cpu"), batch_size=2)
    seconds = bench.tracking_seconds(tiny_vae, images, config, rounds=2)
    assert list(seconds.columns) == ["untracked", "twin", "tracked"]
    assert (seconds > 0).all().all()
    assert all(torch.equal(value, before[name]) for name, value in tiny_vae.state_dict().items())


def test_collecting_is_timed_beside_drawing(small_pipeline):
    config = CollectConfig(("mid.0",), Sampling(steps=1, guidance_scale=0.0), batch_size=2)
    seconds = bench.collect_seconds(small_pipeline("sdxl"), 3, config, rounds=2)
    assert list(seconds.columns) == ["plain", "twin", "collecting"] and len(seconds) == 2
    assert (seconds > 0).all().all()
