"""LPIPS where the package is there, where it is not, and where it cannot be loaded."""

import sys
import types

import pytest
import torch

from vaelab import perceptual


class Fake(torch.nn.Module):
    """Has the package's signature: pictures in [-1, 1] to (N, 1, 1, 1)."""

    def __init__(self, net, verbose):
        super().__init__()
        self.net, self.scale = net, torch.nn.Parameter(torch.tensor(2.0))

    def forward(self, before, after):
        assert not self.training and len(before) <= 16
        return self.scale * (before - after).abs().mean((1, 2, 3), keepdim=True)


def package(kind):
    module = types.ModuleType("lpips")
    module.LPIPS = kind
    return module


def test_it_is_the_packages_network_on_every_pair(monkeypatch):
    monkeypatch.setitem(sys.modules, "lpips", package(Fake))
    found = perceptual.load("vgg", device="cpu")
    assert found.why is None and found.model.net == "vgg"
    before = torch.zeros(20, 3, 8, 8)
    after = before + torch.arange(20).reshape(20, 1, 1, 1) / 20
    assert found.distance(before, after) == pytest.approx([i / 10 for i in range(20)])


def test_without_the_package_it_says_how_to_have_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "lpips", None)
    found = perceptual.load(device="cpu")
    assert found.model is None and "pip install vaelab[lpips]" in found.why
    assert torch.tensor(found.distance(torch.zeros(3, 3, 8, 8), torch.zeros(3, 3, 8, 8))).isnan().all()


def test_without_its_weights_it_says_what_went_wrong(monkeypatch):
    from urllib.error import URLError

    def offline(net, verbose):
        raise URLError("no route to host")

    monkeypatch.setitem(sys.modules, "lpips", package(offline))
    assert "no route to host" in perceptual.load(device="cpu").why


def test_an_unknown_network_is_refused():
    with pytest.raises(ValueError, match=r"lpips_net: unknown name 'alexnet'.*alex"):
        perceptual.load("alexnet")
