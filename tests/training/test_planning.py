"""What a training is said to take is what it takes."""

import shutil
import time
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from vaelab.core import disk
from vaelab.training import TrainConfig, announce, plan_training, train
from vaelab.training.checkpoint import CHECKPOINT
from vaelab.training.planning import require_training_space


class Slow(nn.Module):
    """Its first step takes a second and every other one 0.03 seconds."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(100, 100))
        self.register_buffer("fixed", torch.zeros(1000))
        self.calls = 0

    def forward(self, batch):
        self.calls += 1
        time.sleep(1 if self.calls == 1 else 0.03)
        return {"loss": (self.weight @ batch).square().mean()}


def batches(start=0, rank=0, world=1):
    while True:
        yield torch.ones(100)


def config(steps, **changes):
    return TrainConfig(steps, 0.01, device="cpu", **changes)


def test_time_is_that_of_a_step_after_the_first(capsys):
    objective = Slow()
    plan = plan_training(objective, batches, config(200, warmup=50), "slow", trainings=3, other_seconds=2.0)
    assert 3 * (200 * 0.03 + 2) <= plan.seconds < 3 * (200 * 0.5 + 2)  # on a busy machine
    assert (objective.calls, plan.steps, plan.parameters) == (2, 600, 10_000)
    assert capsys.readouterr().out == ""  # no progress bar


def test_space_is_that_of_the_checkpoint_and_the_saved_weights(tmp_path):
    class Quick(Slow):
        def forward(self, batch):
            return {"loss": (self.weight @ batch).square().mean()}

    plan = plan_training(Quick(), batches, config(10), "quick", checkpoints=2, saved=3)
    train(Quick(), batches, config(2), folder=tmp_path, progress=False)
    assert plan.checkpoint_bytes == pytest.approx((tmp_path / CHECKPOINT).stat().st_size, rel=0.05)
    assert plan.disk_bytes == 2 * plan.checkpoint_bytes + 3 * 4 * 11_000


def test_what_is_short_or_finished_is_not_measured(tmp_path, capsys):
    objective = Slow()
    short = plan_training(objective, batches, config(9), "short")
    finished = plan_training(objective, batches, config(100), "finished", trainings=0)
    assert objective.calls == 0 and short.seconds is None
    assert announce([short, finished], [tmp_path], "cpu") == 0.0
    assert "finished" not in (said := capsys.readouterr().out) and "9 steps" in said and "not measured" in said
    assert announce([finished], [tmp_path], "cpu") == 0.0
    assert capsys.readouterr().out == "every training is finished already\n"


def test_what_the_disk_cannot_hold_is_refused_and_what_is_there_counts(tmp_path, monkeypatch, capsys):
    plans = [plan_training(Slow(), batches, config(9), "any", checkpoints=count) for count in (1, 2)]
    needed = 4 * plans[0].checkpoint_bytes  # the last one stands beside its predecessor
    monkeypatch.setattr(disk.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 0, needed - 1))
    with pytest.raises(ValueError, match=r"^output_dir: training needs 496 kB of disk space, and 496 kB are free"):
        announce(plans, [tmp_path / "not" / "yet", tmp_path / "other"], "cpu")
    assert "at most 496 kB on disk (496 kB are free)" in capsys.readouterr().out
    (tmp_path / "other" / "part").mkdir(parents=True)
    (tmp_path / "other" / "part" / CHECKPOINT).write_bytes(b"x")
    announce(plans, [tmp_path / "not" / "yet", tmp_path / "other"], "cpu")


def test_measuring_leaves_the_random_numbers_as_they_are():
    class Quick(Slow):
        def forward(self, batch):
            return {"loss": (self.weight @ batch).square().mean() + torch.rand(())}

    torch.manual_seed(3)
    expected = torch.rand(3)
    torch.manual_seed(3)
    plan_training(Quick(), batches, config(10), "quick")
    assert torch.equal(torch.rand(3), expected)


def test_a_training_that_the_disk_cannot_hold_is_refused_before_it_starts(tmp_path, monkeypatch, capsys):
    """Two models of 100 and 50 parameters: weights, checkpoints, and the largest checkpoint a second time."""
    expected = 150 * 4 + 150 * 12 + 100 * 12
    assert require_training_space("2 models", 100, 150, tmp_path / "not" / "yet", together=False) == expected
    assert require_training_space("2 models", 100, 150, tmp_path, together=True) == 150 * 28
    assert "2 models: 150 parameters; 3.6 kB on disk" in capsys.readouterr().out
    monkeypatch.setattr(disk.shutil, "disk_usage", lambda path: SimpleNamespace(free=expected - 1))
    with pytest.raises(ValueError, match=r"^output_dir: the training of 2 models needs 3.6 kB of disk space"):
        require_training_space("2 models", 100, 150, tmp_path, together=False)
