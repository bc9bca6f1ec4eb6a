from contextlib import contextmanager

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from vaelab.training import loop
from vaelab.training.loop import TrainConfig, Watcher, train


def config(**changes):
    return TrainConfig(**{"steps": 10, "learning_rate": 0.05, "log_every": 4, "device": "cpu", **changes})


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
        *({"steps": 2.5}, {"steps": True}, {"steps": "10"}, {"warmup": 1.0}, {"seed": -1}, {"seed": 0.5}),
        *({"learning_rate": float("inf")}, {"clip_norm": float("nan")}, {"weight_decay": "1e-2"}),
        *({"betas": (0.9,)}, {"betas": (0.9, 1.0)}, {"undecayed": "bias"}, {"trackers": "wandb"}, {"horizon": 12.5}),
    ],
)
def test_bad_config_is_refused_by_name(changes):
    with pytest.raises(ValueError, match=f"^{next(iter(changes))}:"):
        config(**changes)


TRUTH = torch.tensor([1.0, -2.0, 0.5])


class Line(nn.Module):
    """Mean squared error of y = w x + b, with noise of size ``noise`` on x."""

    def __init__(self, noise=0.0):
        super().__init__()
        self.noise = noise
        self.weight = nn.Parameter(torch.tensor([0.3, 0.2, -0.1]))
        self.bias = nn.Parameter(torch.tensor(0.7))

    def forward(self, batch):
        x = batch["x"] + self.noise * torch.randn_like(batch["x"])
        loss = (x @ self.weight + self.bias - batch["y"]).square().mean()
        return {"loss": loss, "offset": self.bias.detach().clone()}


class Recorder(Watcher):
    def __init__(self, name="", calls=None, stop_after=0):
        self.name, self.calls, self.stop_after = name, [] if calls is None else calls, stop_after

    @contextmanager
    def around(self, step):
        self.calls.append(f"enter {self.name}{step}")
        yield
        self.calls.append(f"leave {self.name}{step}")

    def after(self, step, optimizer):
        assert isinstance(optimizer, torch.optim.AdamW)
        self.calls.append(f"after {self.name}{step}")
        if step == self.stop_after:
            raise KeyboardInterrupt

    def logs(self):
        return {"calls": self.calls}

    def state(self):
        return {"count": len(self.calls)}

    def restore(self, state):
        assert state == {"count": len(self.calls)}


def batches(start=0, rank=0, world=1, size=8, dtype=torch.float32):
    while True:
        x = torch.from_numpy(np.random.default_rng([start, rank]).normal(size=(size, 3))).to(dtype)
        yield {"x": x, "y": x @ TRUTH.to(dtype) + 3}
        start += 1


def batches64(start=0, rank=0, world=1):
    return batches(start, rank, world, dtype=torch.float64)


def half_batches64(start=0, rank=0, world=1):
    for batch in batches64(start // 2):
        for part in (slice(0, 4), slice(4, 8)):
            yield {key: value[part] for key, value in batch.items()}


def weights(module):
    return {name: value.clone() for name, value in module.state_dict().items()}


def assert_same_bits(first, second):
    assert first.keys() == second.keys()
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


def test_learns_a_regression():
    line = Line()
    trained = train(line, batches, config(steps=400, schedule="cosine"))
    torch.testing.assert_close(line.weight.detach(), TRUTH, atol=0.02, rtol=0)
    assert abs(line.bias.item() - 3) < 0.02
    assert trained.history[-1]["loss"] < 1e-3 < trained.history[0]["loss"]
    assert trained.resumed_at == 0
    assert not line.training


@pytest.mark.parametrize("clip_norm", [0.0, 0.5])
def test_steps_equal_adamw_written_out(clip_norm):
    line = Line().double()
    setting = config(steps=5, weight_decay=0.2, undecayed=("bias",), clip_norm=clip_norm, warmup=2, betas=(0.8, 0.95))
    expected = {name: value.numpy() for name, value in weights(line).items()}
    first = {name: np.zeros_like(value) for name, value in expected.items()}
    second = {name: np.zeros_like(value) for name, value in expected.items()}
    train(line, batches64, setting)

    for step, batch in zip(range(1, 6), batches64(), strict=False):
        x, y = batch["x"].numpy(), batch["y"].numpy()
        error = x @ expected["weight"] + expected["bias"] - y
        gradient = {"weight": 2 * x.T @ error / len(y), "bias": 2 * error.mean()}
        norm = np.sqrt(sum(np.sum(value**2) for value in gradient.values()))
        shrink = min(1, clip_norm / (norm + 1e-6)) if clip_norm else 1
        rate = 0.05 * min(1, step / 2)
        for name, value in gradient.items():
            first[name] = 0.8 * first[name] + 0.2 * value * shrink
            second[name] = 0.95 * second[name] + 0.05 * (value * shrink) ** 2
            move = first[name] / (1 - 0.8**step) / (np.sqrt(second[name] / (1 - 0.95**step)) + 1e-8)
            decay = 0.2 if name == "weight" else 0
            expected[name] = expected[name] - rate * (decay * expected[name] + move)
    for name, value in expected.items():
        np.testing.assert_allclose(line.state_dict()[name].numpy(), value, rtol=1e-10)


def test_frozen_parameters_stay():
    line = Line()
    line.bias.requires_grad_(False)
    train(line, batches, config(weight_decay=1.0))
    assert line.bias.item() == pytest.approx(0.7)
    assert not torch.equal(line.weight, Line().weight)


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("constant", [0.5, 1, 1, 1, 1, 1]),
        ("linear", [0.5, 1, 1, 0.75, 0.5, 0.25]),
        ("cosine", [0.5, 1, 1, (1 + 2**-0.5) / 2, 0.5, (1 - 2**-0.5) / 2]),
    ],
)
def test_schedule(schedule, expected):
    setting = config(steps=6, warmup=2, learning_rate=0.1, schedule=schedule, log_every=1)
    rates = [row["learning_rate"] for row in train(Line(), batches, setting).history]
    assert rates == pytest.approx([0.1 * share for share in expected])


def test_two_half_batches_equal_a_whole_one():
    whole, halves = Line().double(), Line().double()
    one = train(whole, batches64, config(steps=6))
    two = train(halves, half_batches64, config(steps=6, accumulation=2))
    for name, value in whole.state_dict().items():
        torch.testing.assert_close(halves.state_dict()[name], value, rtol=1e-12, atol=1e-12)
    assert [row["loss"] for row in two.history] == pytest.approx([row["loss"] for row in one.history], rel=1e-6)


def test_history_is_the_mean_over_its_steps():
    each = train(Line(), batches, config(log_every=1)).history
    grouped = train(Line(), batches, config(log_every=4)).history
    assert [row["step"] for row in grouped] == [4, 8, 10]
    for row, steps in zip(grouped, (each[:4], each[4:8], each[8:]), strict=True):
        assert row["loss"] == pytest.approx(np.mean([one["loss"] for one in steps]), rel=1e-6)
        assert row["offset"] == pytest.approx(np.mean([one["offset"] for one in steps]), rel=1e-6)


def test_bfloat16_is_for_the_forward_pass_of_the_training_only():
    class Layer(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(3, 1)
            self.seen = []

        def forward(self, batch):
            out = self.linear(batch["x"])
            self.seen.append(out.dtype)
            return {"loss": out.float().square().mean()}

    layer = Layer()
    before = weights(layer)
    train(layer, batches, config(steps=3, precision="bfloat16"))
    assert layer.seen == [torch.bfloat16] * 3
    assert layer.linear.weight.dtype == torch.float32
    assert not torch.equal(layer.linear.weight, before["linear.weight"])
    layer(next(batches()))
    train(layer, batches, config(steps=1))
    assert layer.seen[3:] == [torch.float32] * 2


def test_loss_that_is_not_finite_is_an_error_with_its_step():
    class Broken(Line):
        calls = 0

        def forward(self, batch):
            self.calls += 1
            return {"loss": super().forward(batch)["loss"] * (float("nan") if self.calls == 3 else 1)}

    with pytest.raises(FloatingPointError, match=r"loss not finite in the steps up to 4\b.*learning_rate"):
        train(Broken(), batches, config(log_every=2))


class Noise(Line):
    def forward(self, batch):
        return {"loss": torch.rand(()) + 0 * self.bias}


def test_randomness_depends_on_seed_and_step_alone():
    assert len({row["loss"] for row in train(Noise(), batches, config(log_every=1)).history}) == 10
    torch.manual_seed(1)
    first = train(Line(noise=1.0), batches, config(log_every=1)).history
    torch.manual_seed(2)
    assert train(Line(noise=1.0), batches, config(log_every=1)).history == first
    assert train(Line(noise=1.0), batches, config(log_every=1, seed=1)).history != first


def test_watchers_are_called_in_order():
    calls = []
    train(Line(), batches, config(steps=2), watchers=[Recorder("a", calls), Recorder("b", calls)])
    once = ["enter a1", "enter b1", "leave b1", "leave a1", "after a1", "after b1"]
    assert calls == once + [call.replace("1", "2") for call in once]


def test_watchers_are_told_of_every_new_row():
    class Reader(Watcher):
        seen = []

        def logged(self, history):
            self.seen.append([row["step"] for row in history])

    trained = train(Line(), batches, config(steps=5, log_every=2), watchers=[Reader()])
    assert Reader.seen == [[2], [2, 4], [2, 4, 5]] and [row["step"] for row in trained.history] == [2, 4, 5]


@pytest.mark.parametrize("stop_after", [1, 5, 7, 9])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_interrupted_and_resumed_equals_uninterrupted(tmp_path, stop_after, accumulation):
    setting = config(checkpoint_every=3, accumulation=accumulation, schedule="linear", weight_decay=0.1)
    left_alone, watcher = Line(noise=0.1), Recorder()
    expected = train(left_alone, batches, setting, folder=tmp_path / "a", watchers=[watcher])

    with pytest.raises(KeyboardInterrupt):
        train(Line(noise=0.1), batches, setting, folder=tmp_path / "b", watchers=[Recorder(stop_after=stop_after)])
    resumed, second = Line(noise=0.1), Recorder()
    trained = train(resumed, batches, setting, folder=tmp_path / "b", watchers=[second])
    assert trained.resumed_at == (stop_after - 1) // 3 * 3
    assert trained.history == expected.history
    assert second.calls == watcher.calls
    assert_same_bits(weights(resumed), weights(left_alone))
    assert_same_bits(load_file(tmp_path / "a/checkpoint.safetensors"), load_file(tmp_path / "b/checkpoint.safetensors"))


def test_finished_training_is_not_trained_again(tmp_path):
    line = Line()
    expected = train(line, batches, config(), folder=tmp_path)
    again = Line()
    trained = train(again, batches, config(), folder=tmp_path)
    assert trained.resumed_at == 10
    assert trained.history == expected.history
    assert_same_bits(weights(again), weights(line))


def test_checkpoint_is_a_safetensors_file_beside_its_log(tmp_path):
    line = Line()
    train(line, batches, config(checkpoint_every=3), folder=tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint.safetensors", "log.jsonl"]
    stored = load_file(tmp_path / "checkpoint.safetensors")
    assert torch.equal(stored["model/weight"], line.weight)
    assert stored["optimizer/exp_avg/weight"].shape == line.weight.shape
    assert stored["optimizer/step/bias"].item() == 10


def test_drafts_of_a_killed_run_are_never_read_and_are_cleared_away(tmp_path):
    (tmp_path / ".draft-dead").mkdir()
    (tmp_path / ".draft-dead" / "checkpoint.safetensors").write_bytes(b"half")
    assert train(Line(), batches, config(), folder=tmp_path).resumed_at == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint.safetensors", "log.jsonl"]


def test_no_folder_keeps_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    train(Line(), batches, config(checkpoint_every=3))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("changes", "settings", "named"),
    [
        ({"learning_rate": 0.1}, {}, "learning_rate 0.05 there, 0.1 here"),
        ({"steps": 20}, {}, "steps 10 there, 20 here"),
        ({"log_every": 5}, {}, "log_every"),
        ({"seed": 1}, {}, "seed"),
        ({}, {"data": "b"}, "data 'a' there, 'b' here"),
        ({"betas": (0.5, 0.9)}, {"data": "b"}, "betas.*data"),
    ],
)
def test_checkpoint_of_other_settings_is_refused_by_name(tmp_path, changes, settings, named):
    train(Line(), batches, config(), folder=tmp_path, settings={"data": "a"})
    with pytest.raises(ValueError, match=named):
        train(Line(), batches, config(**changes), folder=tmp_path, settings={"data": "a", **settings})


def test_how_often_to_checkpoint_may_change(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        train(Line(), batches, config(checkpoint_every=2), folder=tmp_path, watchers=[Recorder(stop_after=5)])
    trained = train(Line(), batches, config(checkpoint_every=0), folder=tmp_path, watchers=[Recorder()])
    assert trained.resumed_at == 4


@pytest.mark.parametrize("metadata", [None, {"format": "pt"}])
def test_foreign_safetensors_file_is_refused(tmp_path, metadata):
    save_file({"weight": torch.zeros(3)}, tmp_path / "checkpoint.safetensors", metadata=metadata)
    with pytest.raises(ValueError, match=r"checkpoint\.safetensors is no checkpoint"):
        train(Line(), batches, config(), folder=tmp_path)


def test_tensorboard_gets_the_history(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    trained = train(Line(), batches, config(trackers=("tensorboard",)), folder=tmp_path)
    written = EventAccumulator(str(tmp_path / "vaelab")).Reload().Scalars("loss")
    assert [event.step for event in written] == [4, 8, 10]
    assert [event.value for event in written] == pytest.approx([row["loss"] for row in trained.history])


def test_unknown_undecayed_parameter_is_refused():
    with pytest.raises(ValueError, match=r"undecayed.*'wight'.*weight"):
        train(Line(), batches, config(undecayed=("wight",)))


def test_float16_without_a_loss_scaler_is_refused_and_not_trained_in_float32():
    with pytest.raises(ValueError, match=r"^precision: float16 trains on a GPU only, not on cpu"):
        train(Line(), batches, config(steps=1, precision="float16", device="cpu"))


def test_tf32_is_on_in_the_steps_of_a_gpu_only_and_restored():
    before = torch.get_float32_matmul_precision()
    for device, tf32, inside in (("cuda", True, "high"), ("cuda", False, "highest"), ("cpu", True, before)):
        with loop._float32_products(tf32, torch.device(device)):
            assert torch.get_float32_matmul_precision() == inside
        assert torch.get_float32_matmul_precision() == before
