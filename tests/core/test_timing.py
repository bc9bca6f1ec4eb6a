import time

import pandas as pd
import pytest
import torch

from vaelab.core import timing


def test_every_action_is_timed_once_a_round_in_an_order_that_changes():
    order = []
    actions = {"slow": lambda n: (order.append("slow"), time.sleep(0.01)), "fast": lambda n: order.append("fast")}
    seconds = timing.interleaved(actions, 8, device=torch.device("cpu"), warmup=2)
    assert list(seconds.columns) == ["slow", "fast"] and len(seconds) == 8
    assert len(order) == 20
    assert {tuple(order[i : i + 2]) for i in range(0, 20, 2)} == {("slow", "fast"), ("fast", "slow")}
    assert (seconds["slow"] >= 0.01).all() and seconds["fast"].median() < 0.005


def test_percent_is_of_the_paired_differences():
    seconds = pd.DataFrame({"a": [1.0, 2.0, 3.0], "b": [1.1, 2.2, 3.2]})
    middle, low, high = timing.paired_percent(seconds, "b", "a")
    assert middle == pytest.approx(10) and low == pytest.approx(7.5) and high == pytest.approx(10)
