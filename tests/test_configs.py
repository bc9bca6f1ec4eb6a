import pytest
import torch
from torch import nn

from vaelab.configs import TrainConfig


def config(**changes):
    return TrainConfig(**{"steps": 10, "learning_rate": 0.05, **changes})


def test_a_cosine_that_ends_above_0_is_that_of_torch():
    setting = config(steps=50, learning_rate=1e-4, final_rate=5e-5, schedule="cosine")
    optimizer = torch.optim.AdamW([nn.Parameter(torch.zeros(1))], lr=1e-4)
    reference = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=50, eta_min=5e-5)
    for step in range(1, 51):
        assert setting.rate(step) == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-9)
        optimizer.step()
        reference.step()
    linear = config(steps=4, learning_rate=0.4, final_rate=0.2, schedule="linear")
    assert [linear.rate(step) for step in range(1, 5)] == pytest.approx([0.4, 0.35, 0.3, 0.25])
    assert config(final_rate=0.01).rate(9) == config().rate(9)


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_a_run_that_ends_before_its_schedule(schedule):
    whole = config(steps=12, warmup=2, schedule=schedule)
    part = config(steps=6, warmup=2, schedule=schedule, horizon=12)
    assert [part.rate(step) for step in range(1, 7)] == [whole.rate(step) for step in range(1, 7)]
    with pytest.raises(ValueError, match="horizon"):
        config(steps=6, horizon=5)


@pytest.mark.parametrize(
    "changes",
    [
        *({"steps": 0}, {"accumulation": 0}, {"log_every": 0}, {"learning_rate": 0}, {"learning_rate": float("nan")}),
        *({"weight_decay": -1}, {"warmup": -1}, {"clip_norm": -1}, {"checkpoint_every": -1}),
        *({"schedule": "cosin"}, {"precision": "float8"}, {"final_rate": 1.0}, {"final_rate": -1e-9}),
    ],
)
def test_bad_config_is_refused_by_name(changes):
    with pytest.raises(ValueError, match=f"^{next(iter(changes))}:"):
        config(**changes)
