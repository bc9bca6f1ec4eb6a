"""From a store to a GPU: in the stored type, pinned, without waiting for the copy."""

import pytest
import torch
from collecting import fill
from torch import nn

from vaelab import store
from vaelab.store.format import BlockShape
from vaelab.training.loop import TrainConfig, train

pytestmark = pytest.mark.cuda
LAYOUT = {"mid": BlockShape((4, 4), 8)}
COUNT = 24


@pytest.fixture
def maps():
    return torch.randn(COUNT, 4, 4, 8, generator=torch.Generator().manual_seed(0))


@pytest.fixture(params=["float16", "bfloat16", "float32"])
def filled(request, tmp_path, maps):
    dtype = getattr(torch, request.param)
    given = {"layout": LAYOUT, "precision": request.param}
    return store.open(fill(tmp_path / "store", {"mid": maps.to(dtype)}, **given)), dtype


def test_batches_in_the_stored_type_are_copied_from_pinned_memory(device, filled, maps):
    opened, dtype = filled
    batches, numbers = [], []
    for rows, which in opened.batches("mid", 32, seed=0, dtype=dtype, with_rows=True):
        assert rows.dtype == dtype
        held = rows.pin_memory() if device.type == "cuda" else rows
        batches.append(held.to(device, non_blocking=True))
        numbers.append(which)
    found, which = torch.cat(batches), torch.cat(numbers)
    assert found.device.type == device.type
    assert torch.equal(found.cpu(), maps.to(dtype).reshape(-1, 8)[which])


def test_the_memory_of_a_batch_is_not_used_again_before_its_copy_has_been_made(device, filled, maps):
    """The reader fills a batch's memory again once nothing refers to it, while copies may still be under way."""
    opened, dtype = filled
    expected = dict(enumerate(maps.to(dtype).reshape(-1, 8)))
    copies = []
    for rows, which in opened.batches("mid", 16, seed=1, dtype=dtype, with_rows=True):
        held = rows.pin_memory() if device.type == "cuda" else rows
        copies.append((held.to(device, non_blocking=True, copy=True), which))
        del rows, held
    for copy, which in copies:
        assert all(torch.equal(row, expected[int(number)]) for row, number in zip(copy.cpu(), which, strict=True))


class Seen(nn.Module):
    """A mean to be learned that remembers what its batches were."""

    def __init__(self):
        super().__init__()
        self.mean, self.batches = nn.Parameter(torch.zeros(8)), []

    def forward(self, batch):
        self.batches.append((batch.device.type, batch.dtype))
        return {"loss": (batch.float() - self.mean).square().mean()}


def test_the_training_loop_takes_batches_of_the_stored_type_to_the_device(device, filled, maps):
    opened, dtype = filled
    objective = Seen()
    config = TrainConfig(60, learning_rate=0.02, device=str(device))
    train(objective, opened.shuffled("mid", 64, 0, dtype=dtype), config)
    assert set(objective.batches) == {(device.type, dtype)}
    assert (objective.mean.detach().cpu() - maps.reshape(-1, 8).mean(0)).abs().max() < 0.1
