from types import SimpleNamespace

import pytest
import torch

from vaelab.sae import kernels
from vaelab.sae.kernels import ActiveCount, DenseBlock, JumpReLU, SparseEntries, SquaredNorm, linear, total_variance

N, FEATURES, D = 9, 37, 6


def random(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def entries(kind):
    """Entries of a matrix, their values, and the matrix."""
    generator = torch.Generator().manual_seed(3)
    if kind == "as many a row":
        indices = torch.rand(N, FEATURES, generator=generator).topk(4).indices
        where = SparseEntries(indices.flatten(), 4, N, FEATURES)
    else:
        there = torch.rand(N, FEATURES, generator=generator) < {"few": 0.05, "many": 0.5}[kind]
        there[2] = False
        where = SparseEntries(there.nonzero()[:, 1], there.sum(1), N, FEATURES)
    values = random(len(where.indices))
    matrix = torch.zeros(N, FEATURES, dtype=torch.float64)
    for row, column, value in zip(where.rows, where.indices, values, strict=True):
        matrix[row, column] = value
    return where, values, matrix


@pytest.mark.parametrize("kind", ["as many a row", "few", "many"])
def test_sums_over_entries_are_products_with_the_matrix(kind):
    where, values, matrix = entries(kind)
    table, other = random(FEATURES, D, seed=1), random(N, D, seed=2)
    assert where.dense == (kind == "many")
    torch.testing.assert_close(where.matrix(values), matrix)
    torch.testing.assert_close(where.times(values, table), matrix @ table)
    torch.testing.assert_close(where.transposed_times(values, other), matrix.T @ other)
    torch.testing.assert_close(where.products(other, table), (other @ table.T)[where.rows, where.indices])
    torch.testing.assert_close(where.by_column(values), matrix.sum(0))


class Elsewhere(torch.Tensor):
    """A tensor that says it is on a device for which there is no kernel."""

    @property
    def device(self):
        return SimpleNamespace(type="elsewhere")


def test_products_of_rows_without_a_kernel_are_the_same(monkeypatch):
    monkeypatch.setattr(kernels, "ROWS_AT_ONCE", 5)
    where, _, _ = entries("few")
    left, right = random(N, D, seed=2), random(FEATURES, D, seed=1)
    elsewhere = left.as_subclass(Elsewhere)
    assert elsewhere.device.type == "elsewhere"
    found = kernels.row_products(elsewhere, right, where.indices, where.rows, where.offsets)
    torch.testing.assert_close(torch.Tensor(found), where.products(left, right))


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_a_block_is_a_dense_matrix(dtype):
    values, table, other = random(N, 5), random(5, D, seed=1), random(N, D, seed=2)
    where, near = DenseBlock(dtype), {"rtol": 0.05, "atol": 0.05} if dtype else {}
    torch.testing.assert_close(where.times(values, table), values @ table, **near)
    torch.testing.assert_close(where.transposed_times(values, other), values.T @ other, **near)
    torch.testing.assert_close(where.products(other, table), other @ table.T, **near)
    torch.testing.assert_close(where.by_column(values), values.sum(0))
    assert where.times(values, table).dtype == torch.float64


@pytest.mark.parametrize("transposed", [False, True])
def test_the_quickest_product_is_one_of_float32(transposed):
    x, weight, bias = random(50, 70), random(30, 70, seed=1), random(30, seed=2)
    given = (x.T.float().contiguous().T, weight.T.float().contiguous().T) if transposed else (x.float(), weight.float())
    found = linear(*given, bias.float())
    expected = x @ weight.T + bias
    assert found.dtype == torch.float32
    assert (found - expected).abs().max() < 1e-5 * expected.abs().max()
    torch.testing.assert_close(linear(x, weight), x @ weight.T)


def test_squared_norm_and_variance_with_their_gradients():
    x = random(5, 4).requires_grad_()
    torch.testing.assert_close(SquaredNorm.apply(x), x.square().sum())
    torch.testing.assert_close(total_variance(x), (x - x.mean(0)).square().sum())
    assert torch.autograd.gradcheck(SquaredNorm.apply, x)


def test_a_threshold_feels_the_values_in_its_window_only():
    values = torch.tensor([0.2, 0.96, 1.04, 2.0], dtype=torch.float64, requires_grad=True)
    threshold = torch.full((4,), 1.0, dtype=torch.float64, requires_grad=True)
    passed = JumpReLU.apply(values, threshold, 0.1)
    assert passed.tolist() == [0, 0, 1.04, 2.0]
    passed.sum().backward()
    assert values.grad.tolist() == [0, 0, 1, 1]
    assert threshold.grad.tolist() == pytest.approx([0, -10, -10, 0])  # -threshold / bandwidth in the window
    threshold.grad = None
    counted = ActiveCount.apply(values, threshold, 0.1)
    assert counted.tolist() == [0, 0, 1, 1]
    counted.sum().backward()
    assert threshold.grad.tolist() == pytest.approx([0, -10, -10, 0])
