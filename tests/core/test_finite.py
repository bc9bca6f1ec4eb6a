import math

import pytest
import torch

from vaelab.core.finite import all_finite, any_nan

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64]


@pytest.mark.parametrize("dtype", DTYPES)
def test_one_value_anywhere_is_found(dtype):
    for place in (0, 1, 7, 31, 100):
        for bad in (math.nan, math.inf, -math.inf):
            values = torch.zeros(101, dtype=dtype)
            assert all_finite(values) and not any_nan(values)
            values[place] = bad
            assert not all_finite(values)
            assert any_nan(values) == math.isnan(bad)


def test_layouts_whole_numbers_and_nothing_at_all():
    values = torch.zeros(4, 6).t()[1:]
    values[2, 3] = math.nan
    assert not all_finite(values) and any_nan(values)
    for values in (torch.arange(3), torch.ones(2, dtype=torch.bool), torch.zeros(0, 4), torch.tensor(1.0)):
        assert all_finite(values) and not any_nan(values)
