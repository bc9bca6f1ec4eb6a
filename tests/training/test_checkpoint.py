"""What a training leaves on disk: whole, checked, of any size, and the same after an interruption."""

import json
import math
import shutil
import threading
from itertools import islice

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from vaelab.training import checkpoint
from vaelab.training.checkpoint import CHECKPOINT, LOG, read_log, read_tensors, write_tensors
from vaelab.training.loop import TrainConfig, Watcher, train


class Small(nn.Module):
    """Convolutions, a tied weight, a transposed one, one in bfloat16, one in float64, a frozen and an unused one."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Sequential(nn.Conv2d(4, 8, 3), nn.GroupNorm(2, 8), nn.Conv2d(8, 4, 3))
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4, bias=False)
        self.second.weight = self.first.weight
        self.transposed = nn.Parameter(torch.randn(3, 4).t())
        self.coarse = nn.Parameter(torch.randn(4, 4).bfloat16())
        self.fine = nn.Parameter(torch.randn(5, dtype=torch.float64))
        self.frozen = nn.Parameter(torch.ones(2), requires_grad=False)
        self.unused = nn.Parameter(torch.ones(2))
        self.register_buffer("mask", torch.tensor([0.0, -math.inf]))

    def forward(self, batch):
        x = self.conv(batch).mean((2, 3)) + 0.01 * torch.randn(len(batch), 4)
        x = self.second(self.first(x)) @ self.transposed @ self.transposed.t() @ self.coarse.float()
        return {"loss": x.square().mean() + self.fine.square().sum().float()}


class Stop(Watcher):
    """Records the step and the model's first weight; interrupts after a step."""

    def __init__(self, model, after=0, width=1):
        self.model, self.at, self.width, self.rows = model, after, width, []

    def after(self, step, optimizer):
        self.rows.append({"step": step, "weight": [self.model.fine[0].item()] * self.width})
        if step == self.at:
            raise KeyboardInterrupt

    def logs(self):
        return {"rows": self.rows}


def batches(start=0, rank=0, world=1):
    while True:
        yield torch.randn(2, 4, 6, 6, generator=torch.Generator().manual_seed(start))
        start += 1


def config(**changes):
    return TrainConfig(**{"steps": 8, "learning_rate": 0.01, "weight_decay": 0.1, "log_every": 2, "device": "cpu",
                          "checkpoint_every": 3, **changes})  # fmt: skip


@pytest.fixture(scope="module")
def trained_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained")
    train(Small(), batches, config(steps=2), folder=folder)
    return folder


@pytest.fixture
def finished(trained_folder, tmp_path):
    """The folder of a finished training, to be damaged."""
    return shutil.copytree(trained_folder, tmp_path / "finished")


def again(folder):
    return train(Small(), batches, config(steps=2), folder=folder)


def as_it_is(model):
    return model


def channels_last(model):
    return model.to(memory_format=torch.channels_last)


@pytest.mark.parametrize(("made", "stop"), [(as_it_is, 4), (channels_last, 2), (channels_last, 7)])
def test_resumed_is_uninterrupted_bit_for_bit_in_any_layout_and_dtype(tmp_path, made, stop):
    whole, killed, resumed = made(Small()), made(Small()), made(Small())
    expected = train(whole, batches, config(), folder=tmp_path / "a", watchers=[Stop(whole)])
    with pytest.raises(KeyboardInterrupt):
        train(killed, batches, config(), folder=tmp_path / "b", watchers=[Stop(killed, stop)])
    watcher = Stop(resumed)
    trained = train(resumed, batches, config(), folder=tmp_path / "b", watchers=[watcher])
    assert trained.history == expected.history
    assert [row["step"] for row in watcher.rows] == list(range(1, 9))
    for name, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name
        assert value.stride() == resumed.state_dict()[name].stride()
    assert resumed.second.weight is resumed.first.weight
    for name in (CHECKPOINT, LOG):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_the_moments_of_a_channels_last_model_come_back_in_its_layout(tmp_path):
    model, again = channels_last(Small()), channels_last(Small())
    optimizers = [torch.optim.AdamW([p for p in m.parameters() if p.requires_grad], fused=True) for m in (model, again)]
    model(next(batches()))["loss"].backward()
    optimizers[0].step()
    checkpoint.save(tmp_path / CHECKPOINT, model, optimizers[0], {"signature": {}, "log": {}}, checkpoint.Progress(1))
    checkpoint.restore(tmp_path / CHECKPOINT, again, optimizers[1], {})
    assert (
        optimizers[1].state[again.conv[0].weight]["exp_avg"].stride() == model.conv[0].weight.stride() != (36, 9, 3, 1)
    )
    for first, second in zip(*(o.param_groups[0]["params"] for o in optimizers), strict=True):
        states = optimizers[0].state.get(first, {}), optimizers[1].state.get(second, {})
        assert states[0].keys() == states[1].keys()
        for key, value in states[0].items():
            assert torch.equal(value, states[1][key])
            assert (value.dtype, value.stride()) == (states[1][key].dtype, states[1][key].stride())


def test_a_checkpoint_before_the_first_gradient_has_no_moments(tmp_path):
    model = Small()
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    checkpoint.save(tmp_path / CHECKPOINT, model, optimizer, {"signature": {}, "log": {}}, checkpoint.Progress())
    assert not optimizer.state
    checkpoint.restore(tmp_path / CHECKPOINT, model, optimizer, {})
    assert not optimizer.state


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("name", ["model/first.weight", "optimizer/exp_avg/fine"])
def test_weights_that_are_not_finite_are_refused_with_file_and_tensor(finished, name, value):
    tensors, documents = read_tensors(finished / CHECKPOINT)
    tensors[name].view(-1)[1] = value
    write_tensors(finished / CHECKPOINT, tensors, documents)
    with pytest.raises(ValueError, match=rf"checkpoint\.safetensors .*{name} is NaN or infinite"):
        again(finished)


def test_a_weight_that_became_nan_does_not_replace_the_last_good_checkpoint(tmp_path):
    class Breaks(Stop):
        def after(self, step, optimizer):
            if step == 5:
                with torch.no_grad():
                    self.model.unused[0] = math.nan

    model = Small()
    with pytest.raises(FloatingPointError, match=r"model/unused is NaN or infinite after step 6; .*not replaced"):
        train(model, batches, config(), folder=tmp_path, watchers=[Breaks(model)])
    assert read_tensors(tmp_path / CHECKPOINT)[1]["progress"]["step"] == 3


@pytest.mark.parametrize("place", [0.0, 0.02, 0.3, 0.6, 0.99])
def test_one_damaged_byte_of_a_checkpoint_is_found_as_it_is_read(finished, place):
    file = finished / CHECKPOINT
    content = bytearray(file.read_bytes())
    content[int(place * len(content))] ^= 1
    file.write_bytes(content)
    with pytest.raises(ValueError, match=r"checkpoint\.safetensors is (damaged|no checkpoint)"):
        again(finished)


def test_the_checksum_is_computed_while_the_values_are_checked(finished, monkeypatch):
    checking, checksum, not_finite = threading.Event(), checkpoint._checksum, checkpoint.not_finite

    def waits(tensors):
        assert checking.wait(30), "the checksum was not computed in a thread"
        return checksum(tensors)

    monkeypatch.setattr(checkpoint, "_checksum", waits)
    monkeypatch.setattr(checkpoint, "not_finite", lambda *given: checking.set() or not_finite(*given))
    assert again(finished).resumed_at == 2


@pytest.mark.parametrize("content", [b"", b"{}", b"not a safetensors file at all"])
def test_a_file_that_is_cut_off_or_another_kind_is_named(tmp_path, content):
    (tmp_path / CHECKPOINT).write_bytes(content)
    with pytest.raises(ValueError, match=r"checkpoint\.safetensors is damaged or no safetensors file"):
        train(Small(), batches, config(), folder=tmp_path)


@pytest.mark.parametrize("damage", ["missing", "cut", "changed"])
def test_a_damaged_log_is_named(finished, damage):
    log = finished / LOG
    content = log.read_bytes()
    log.unlink()
    if damage != "missing":
        log.write_bytes(content[:-5] if damage == "cut" else content.replace(b"1", b"2", 1))
    with pytest.raises(ValueError, match=r"log\.jsonl is missing or damaged"):
        again(finished)


def test_rows_written_after_the_checkpoint_are_cut_off(tmp_path, monkeypatch):
    """As when a run is killed after its log was synced and before its checkpoint was renamed."""
    save = checkpoint.save

    def killed(*arguments):
        if arguments[-1].step == 6:
            raise KeyboardInterrupt
        save(*arguments)

    with monkeypatch.context() as patched:
        patched.setattr(checkpoint, "save", killed)
        model = Small()
        with pytest.raises(KeyboardInterrupt):
            train(model, batches, config(), folder=tmp_path, watchers=[Stop(model)])
    assert [row["step"] for row in read_log(tmp_path / LOG)["Stop 0: rows"]] == [1, 2, 3, 4, 5, 6]
    model = Small()
    assert train(model, batches, config(), folder=tmp_path, watchers=[Stop(model)]).resumed_at == 3
    logs = read_log(tmp_path / LOG)
    assert [row["step"] for row in logs["Stop 0: rows"]] == list(range(1, 9))
    assert [row["step"] for row in logs["history"]] == [2, 4, 6, 8]


class Intervenes(Watcher):
    """Records an intervention in all 19,840 GroupNorm channels of the SDXL-VAE at every step, one row per layer;
    interrupts after a step."""

    LAYERS = {f"layer {number}": 512 for number in range(38)} | {"layer 38": 384}
    SCALES = torch.rand(512, generator=torch.Generator().manual_seed(0)).tolist()

    def __init__(self, stop=0):
        self.stop, self.rows = stop, []

    def after(self, step, optimizer):
        self.rows += [self.row(step, layer, width) for layer, width in self.LAYERS.items()]
        if step == self.stop:
            raise KeyboardInterrupt

    def row(self, step, layer, width):
        before = self.SCALES[:width]
        return {"step": step, "layer": layer, "channels": list(range(width)), "before": before, "after": before[::-1]}

    def logs(self):
        return {"interventions": self.rows}


def test_interventions_in_all_channels_of_the_sdxl_vae_are_logged_once_and_outside_the_checkpoint(tmp_path):
    """A run of 177 interventions logs more than the 100 MB that fit into a safetensors header; 16 show that none of it
    goes there."""
    assert sum(Intervenes.LAYERS.values()) == 19_840
    with pytest.raises(KeyboardInterrupt):
        train(Small(), batches, config(steps=16, checkpoint_every=7), folder=tmp_path, watchers=[Intervenes(stop=12)])
    resumed = Intervenes()
    trained = train(Small(), batches, config(steps=16, checkpoint_every=7), folder=tmp_path, watchers=[resumed])
    assert trained.resumed_at == 7
    expected = [resumed.row(step, layer, width) for step in range(1, 17) for layer, width in resumed.LAYERS.items()]
    assert resumed.rows == read_log(tmp_path / LOG)["Intervenes 0: interventions"] == expected
    assert (tmp_path / LOG).stat().st_size * 177 / 16 > 100_000_000
    assert (tmp_path / CHECKPOINT).stat().st_size < 50_000
    with safe_open(tmp_path / CHECKPOINT, framework="pt") as file:
        assert len(json.dumps(file.metadata())) < 200


def test_documents_have_no_limit_either(tmp_path):
    write_tensors(tmp_path / CHECKPOINT, {"weight": torch.ones(2)}, {"settings": "x" * 101_000_000})
    with safe_open(tmp_path / CHECKPOINT, framework="pt") as file:
        assert len(json.dumps(file.metadata())) < 200
    tensors, documents = read_tensors(tmp_path / CHECKPOINT)
    assert len(documents["settings"]) == 101_000_000
    assert tensors.keys() == {"weight"}


def test_a_finished_log_names_the_damaged_line(tmp_path):
    (tmp_path / LOG).write_text('{"log": "a", "row": {"step": 1}}\n{"log": "a", "ro')
    with pytest.raises(ValueError, match=r"log\.jsonl is damaged: line 2"):
        read_log(tmp_path / LOG)
    with pytest.raises(ValueError, match=r"other\.jsonl is missing"):
        read_log(tmp_path / "other.jsonl")


def test_other_watchers_are_refused(tmp_path):
    model = Small()
    train(model, batches, config(), folder=tmp_path, watchers=[Stop(model)])
    with pytest.raises(ValueError, match=r"1 watchers; this run has 0"):
        train(Small(), batches, config(), folder=tmp_path)


def test_the_file_is_plain_safetensors(tmp_path):
    write_tensors(tmp_path / "a.safetensors", {"x": torch.arange(3), "y": torch.ones(2, 2).t()}, {"note": [1]})
    assert torch.equal(load_file(tmp_path / "a.safetensors")["x"], torch.arange(3))
    save_file({"x": torch.arange(3)}, tmp_path / "b.safetensors")
    with pytest.raises(ValueError, match=r"b\.safetensors is no checkpoint"):
        read_tensors(tmp_path / "b.safetensors")
    assert list(islice(read_tensors(tmp_path / "a.safetensors")[1].items(), 2)) == [("note", [1])]
