"""Memory that is used again, and never while somebody still looks at it."""

import pytest
import torch

from vaelab.buffers import KEPT, Buffers


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_memory_is_used_again_once_nothing_refers_to_it(dtype):
    buffers = Buffers()
    first = buffers.empty(5, 3, dtype)
    assert first.shape == (5, 3) and first.dtype == dtype
    place = first.data_ptr()
    assert buffers.empty(5, 3, dtype).data_ptr() != place
    del first
    assert buffers.empty(4, 3, dtype).data_ptr() == place
    assert buffers.empty(4, 3, dtype).data_ptr() == place


def test_a_part_of_a_tensor_keeps_all_of_its_memory():
    buffers = Buffers()
    row = buffers.empty(5, 3, torch.float32).fill_(7)[2].view(3, 1)
    for _ in range(2 * KEPT):
        buffers.empty(5, 3, torch.float32).fill_(0)
    assert (row == 7).all()
    factor = torch.ones(3, 1, requires_grad=True)
    product = (factor * row).sum()
    del row  # from here on the graph alone needs it
    for _ in range(2 * KEPT):
        buffers.empty(5, 3, torch.float32).fill_(0)
    product.backward()
    assert (factor.grad == 7).all()


def test_those_who_collect_tensors_have_each_for_themselves():
    buffers = Buffers()
    all_of_them = [buffers.empty(2, 2, torch.float32).fill_(i) for i in range(3 * KEPT)]
    assert [int(one[0, 0]) for one in all_of_them] == list(range(3 * KEPT))
    assert len(buffers._kept) == KEPT


def test_what_is_too_small_is_not_used_and_nothing_needs_no_memory():
    buffers = Buffers()
    buffers.empty(2, 2, torch.float32)
    assert buffers.empty(3, 2, torch.float32).shape == (3, 2)
    assert buffers.empty(0, 8, torch.float32).shape == (0, 8) and len(buffers._kept) == 2
