from types import SimpleNamespace

import pytest
import torch

from vaelab.core import devices


def pretend(monkeypatch, *, cuda=0, mps=False):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: cuda)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)


class TestPick:
    @pytest.mark.parametrize(
        ("machine", "expected"),
        [({"cuda": 1, "mps": True}, "cuda"), ({"mps": True}, "mps"), ({}, "cpu")],
        ids=["both", "mps", "neither"],
    )
    def test_auto_takes_the_best_there_is(self, monkeypatch, machine, expected):
        pretend(monkeypatch, **machine)
        assert devices.pick() == devices.pick("auto") == torch.device(expected)

    @pytest.mark.parametrize("name", ["cpu", "cuda", "cuda:1", "mps"])
    def test_a_device_that_is_there(self, monkeypatch, name):
        pretend(monkeypatch, cuda=2, mps=True)
        assert devices.pick(name) == torch.device(name)

    @pytest.mark.parametrize("name", ["cuda", "cuda:0", "mps", "meta"])
    def test_a_device_that_is_not_there_is_refused(self, monkeypatch, name):
        pretend(monkeypatch)
        with pytest.raises(ValueError, match=f"device: '{name}' is not on this machine"):
            devices.pick(name)

    def test_a_number_beyond_the_last_is_refused(self, monkeypatch):
        pretend(monkeypatch, cuda=2)
        with pytest.raises(ValueError, match="device: 'cuda:2' is not on this machine"):
            devices.pick("cuda:2")

    @pytest.mark.parametrize("name", ["gpu", "", "cuda:x"])
    def test_what_is_no_device_is_refused(self, name):
        with pytest.raises(ValueError, match=f"device: '{name}' is none; expected auto"):
            devices.pick(name)


class TestDtype:
    @pytest.mark.parametrize("precision", ["float32", "bfloat16", "float16"])
    def test_a_precision_is_torchs_of_that_name(self, precision):
        assert devices.dtype(precision) is getattr(torch, precision)

    @pytest.mark.parametrize("precision", ["fp16", "float64"])
    def test_another_lists_the_known(self, precision):
        with pytest.raises(ValueError, match=f"precision: unknown name '{precision}'.*float16"):
            devices.dtype(precision)


class TestFloat64:
    def test_it_is_on_the_same_device_but_on_the_cpu_for_mps_which_has_none(self):
        assert devices.float64_device(torch.device("mps")) == torch.device("cpu")
        assert devices.float64_device(torch.device("cuda", 1)) == torch.device("cuda", 1)

    def test_values_are_converted_exactly(self):
        x = torch.tensor([0.1])
        assert devices.to_float64(x).dtype == torch.float64 and devices.to_float64(x).item() == x.item()


class TestSynchronize:
    def test_it_waits_for_the_device_named(self, monkeypatch):
        waited = []
        monkeypatch.setattr(torch.cuda, "synchronize", waited.append)
        monkeypatch.setattr(torch.mps, "synchronize", lambda: waited.append("mps"))
        for name in ("cpu", "cuda:1", "mps"):
            devices.synchronize(torch.device(name))
        assert waited == [torch.device("cuda:1"), "mps"]


@pytest.mark.parametrize(("platform", "bytes_per_unit"), [("linux", 1024), ("darwin", 1)])
def test_peak_memory_is_in_bytes_on_every_system(monkeypatch, platform, bytes_per_unit):
    assert 50e6 < devices.peak_memory(torch.device("cpu")) < 1e12
    monkeypatch.setattr(devices.sys, "platform", platform)
    monkeypatch.setattr(devices.resource, "getrusage", lambda _: SimpleNamespace(ru_maxrss=3000))
    assert devices.peak_memory(torch.device("cpu")) == 3000 * bytes_per_unit


class TestName:
    def test_the_cpu_is_called_so(self):
        assert devices.name(torch.device("cpu")) == "cpu"

    def test_a_gpu_goes_by_its_products_name(self, monkeypatch):
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: f"Product {device.index}")
        assert devices.name(torch.device("cuda:1")) == "Product 1"
