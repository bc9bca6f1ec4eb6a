import pytest
import torch
from torch import nn

from vaelab.training import evaluation_mode


def test_every_submodule_gets_its_own_mode_back():
    module = nn.Sequential(nn.BatchNorm1d(3), nn.Sequential(nn.Dropout(), nn.BatchNorm1d(3)))
    module.train()
    module[1][1].eval()
    before = [part.training for part in module.modules()]
    statistics = module[0].running_mean.clone()
    with evaluation_mode(module):
        assert not any(part.training for part in module.modules())
        module(torch.randn(4, 3))
    assert [part.training for part in module.modules()] == before
    assert before.count(False) == 1
    assert torch.equal(module[0].running_mean, statistics)


def test_an_error_restores_the_mode_too():
    first, second = nn.Dropout().train(), nn.Dropout().eval()
    with pytest.raises(KeyError), evaluation_mode(first, second):
        raise KeyError
    assert first.training
    assert not second.training
