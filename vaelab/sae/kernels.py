"""Forward and backward passes of a sparse autoencoder over its active features alone.

Only the selected entries of the (N, n) matrix of N examples' activations of n features are stored. Every result is a
sum over these, and nothing of that matrix's size is written:

- decoding is an ``embedding_bag`` of the decoder's rows;
- the gradient of a value is a dot product of two rows, the kernel of ``embedding_bag``'s own backward;
- a weight's gradient is an ``embedding_bag`` with the roles exchanged: the features are the bags, the
  batch is the table. The entries are sorted by feature for it, once for both weights;
- the gradient of the bias before the encoder is one matrix-vector product.
"""

from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

DENSE_FROM = 8
"""If more than one entry in this many is selected, dense products are faster than sums over the selected entries."""
ROWS_AT_ONCE = 2**14
"""Number of pairs of rows that are copied at a time on devices that have no kernel for their dot products."""


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Compute x (N, d) times weight (n, d) transposed, plus bias (n,), with the fastest available kernel.

    On a CPU in float32 this is the kernel of oneDNN, which torch itself uses only for narrower formats.
    """
    if x.device.type == "cpu" and x.dtype == torch.float32 and torch.backends.mkldnn.is_available():
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return F.linear(x, weight, bias)


def row_products(left: Tensor, right: Tensor, indices: Tensor, rows: Tensor, offsets: Tensor) -> Tensor:
    """Compute dot products (E,) of rows of left (N, d) and right (n, d): entry e is left[rows[e]] . right[indices[e]].

    The entries of left's row i begin at offsets[i].
    """
    if left.device.type in ("cpu", "cuda"):
        return torch.ops.aten._embedding_bag_per_sample_weights_backward(left, right, indices, offsets, rows, 0, -1)
    parts = zip(rows.split(ROWS_AT_ONCE), indices.split(ROWS_AT_ONCE), strict=True)
    return torch.cat([left.new_empty(0), *((left[row] * right[index]).sum(1) for row, index in parts)])


class SparseEntries:
    """The positions of the entries of a sparse (N, n) matrix, in the order of their rows."""

    def __init__(self, indices: Tensor, counts: Tensor | int, examples: int, features: int):
        """Args: the columns (E,) int64 of the entries, the number of entries of each row, N, and n."""
        self.indices, self.counts, self.examples, self.features = indices, counts, examples, features

    @property
    def dense(self) -> bool:
        """Whether there are so many entries that dense products are faster."""
        return len(self.indices) * DENSE_FROM > self.examples * self.features

    @cached_property
    def offsets(self) -> Tensor:
        """The index (N,) of each row's first entry, in the list of all entries."""
        if isinstance(self.counts, int):
            return torch.arange(0, self.examples * self.counts, self.counts, device=self.indices.device)
        return self.counts.cumsum(0) - self.counts

    @cached_property
    def rows(self) -> Tensor:
        """The row of each entry: (E,)."""
        numbers = torch.arange(self.examples, device=self.indices.device)
        if isinstance(self.counts, int):
            return numbers.repeat_interleave(self.counts)
        return numbers.repeat_interleave(self.counts, output_size=len(self.indices))

    @cached_property
    def by_feature(self) -> tuple[Tensor, Tensor, Tensor]:
        """The indices of the entries sorted by column (E,), their rows (E,), and the index (n,) of each column's first
        entry in that order."""
        order = self.indices.sort().indices
        # not bincount, which makes a GPU synchronise to find the maximum
        counts = torch.zeros(self.features, dtype=torch.int64, device=self.indices.device)
        counts.scatter_add_(0, self.indices, torch.ones_like(self.indices))
        return order, self.rows[order], counts.cumsum(0) - counts

    def matrix(self, values: Tensor) -> Tensor:
        """Make the dense matrix (N, n) of the values (E,); values at the same position are added."""
        out = values.new_zeros(self.examples * self.features)
        return out.index_add_(0, self.rows * self.features + self.indices, values).view(self.examples, -1)

    def times(self, values: Tensor, table: Tensor) -> Tensor:
        """Compute the product (N, d) of the matrix of the values (E,) and a table (n, d)."""
        if self.dense:
            return linear(self.matrix(values), table.T)
        return F.embedding_bag(self.indices, table, self.offsets, mode="sum", per_sample_weights=values)

    def transposed_times(self, values: Tensor, table: Tensor) -> Tensor:
        """Compute the product (n, d) of the transposed matrix of the values (E,) and a table (N, d)."""
        if self.dense:
            return linear(self.matrix(values).T, table.T)
        order, rows, starts = self.by_feature
        return F.embedding_bag(rows, table, starts, mode="sum", per_sample_weights=values[order])

    def products(self, left: Tensor, right: Tensor) -> Tensor:
        """Compute the selected entries (E,) of left (N, d) times right (n, d) transposed."""
        if self.dense:
            return linear(left, right)[self.rows, self.indices]
        return row_products(left, right, self.indices, self.rows, self.offsets)

    def by_column(self, values: Tensor) -> Tensor:
        """Sum the values (E,) in each column: (n,)."""
        return values.new_zeros(self.features).index_add_(0, self.indices, values)


class DenseBlock:
    """The operations of :class:`SparseEntries` for an (N, m) matrix of which every entry is selected."""

    def __init__(self, dtype: torch.dtype | None = None):
        """Args: the type to which the factors are rounded; None does not round them."""
        self.dtype = dtype

    def times(self, values: Tensor, table: Tensor) -> Tensor:
        """Compute the product (N, d) of the values (N, m) and a table (m, d)."""
        return self._linear(values, table.T)

    def transposed_times(self, values: Tensor, table: Tensor) -> Tensor:
        """Compute the product (m, d) of the transposed values (N, m) and a table (N, d)."""
        return self._linear(values.T, table.T)

    def products(self, left: Tensor, right: Tensor) -> Tensor:
        """Compute the product (N, m) of left (N, d) and right (m, d) transposed."""
        return self._linear(left, right)

    def by_column(self, values: Tensor) -> Tensor:
        """Sum the values (N, m) in each column: (m,)."""
        return values.sum(0)

    def _linear(self, x: Tensor, weight: Tensor) -> Tensor:
        if self.dtype is None:
            return linear(x, weight)
        return F.linear(x.to(self.dtype), weight.to(self.dtype)).to(x.dtype)


class Encode(torch.autograd.Function):
    """Attaches gradients to pre-activations that were computed without a graph.

    The pre-activations are entries of W (x - pre_bias) + bias. The gradients are those of weight W (n, d), bias (n,)
    and pre_bias (d,); the examples x get none.
    """

    @staticmethod
    def forward(
        ctx: Any,
        pre_bias: Tensor,
        weight: Tensor,
        bias: Tensor,
        centred: Tensor,
        values: Tensor,
        where: SparseEntries | DenseBlock,
    ) -> Tensor:
        """Return the values, unchanged."""
        ctx.where = where
        ctx.save_for_backward(weight, centred)
        return values.view_as(values)

    @staticmethod
    def backward(ctx: Any, of_values: Tensor) -> tuple[Tensor | None, ...]:
        """Compute the gradients of ``pre_bias``, ``weight`` and ``bias``."""
        weight, centred = ctx.saved_tensors
        of_bias = ctx.where.by_column(of_values)
        of_weight = ctx.where.transposed_times(of_values, centred)
        return -(of_bias @ weight), of_weight, of_bias, None, None, None


class Decode(torch.autograd.Function):
    """The error of a reconstruction: S W - target, (N, d), where S is the sparse matrix of the values.

    The gradients are those of the values, of weight W (n, d), and of the reconstruction's bias, which is already
    subtracted from ``target``: the first argument, or None for a reconstruction without bias.
    """

    @staticmethod
    def forward(
        ctx: Any, bias: Tensor | None, values: Tensor, weight: Tensor, target: Tensor, where: SparseEntries | DenseBlock
    ) -> Tensor:
        """Compute the error (N, d)."""
        ctx.where = where
        ctx.save_for_backward(values, weight)
        return where.times(values, weight).sub_(target)

    @staticmethod
    def backward(ctx: Any, of_error: Tensor) -> tuple[Tensor | None, ...]:
        """Compute the gradients of ``bias``, ``values`` and ``weight``."""
        values, weight = ctx.saved_tensors
        of_bias = of_error.sum(0) if ctx.needs_input_grad[0] else None
        of_values = ctx.where.products(of_error, weight) if ctx.needs_input_grad[1] else None
        return of_bias, of_values, ctx.where.transposed_times(values, of_error), None, None


class SquaredNorm(torch.autograd.Function):
    """The sum of the squares of a tensor's entries, with one pass over memory in each direction."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        """Compute the sum."""
        ctx.save_for_backward(x)
        return torch.dot(x.flatten(), x.flatten())

    @staticmethod
    def backward(ctx: Any, of_sum: Tensor) -> Tensor:
        """Compute the gradient of ``x``."""
        (x,) = ctx.saved_tensors
        return x * (2 * of_sum)


def total_variance(x: Tensor) -> Tensor:
    """Compute the sum of the squared distances of rows (N, d) from their mean."""
    return (SquaredNorm.apply(x) - len(x) * x.mean(0).square().sum()).clamp_min(0)


class JumpReLU(torch.autograd.Function):
    """Values (E,) above their thresholds (E,), zeros elsewhere (Rajamanoharan et al., 2024, equations 3 and 11).

    A threshold's gradient is estimated from the values in a window of width ``bandwidth`` around it.
    """

    @staticmethod
    def forward(ctx: Any, values: Tensor, threshold: Tensor, bandwidth: float) -> Tensor:
        """Return the values (E,), with 0 in place of those that are not above their threshold."""
        ctx.bandwidth = bandwidth
        ctx.save_for_backward(values, threshold)
        return values * (values > threshold)

    @staticmethod
    def backward(ctx: Any, of_out: Tensor) -> tuple[Tensor | None, ...]:
        """Compute the gradients of ``values`` and ``threshold``."""
        values, threshold = ctx.saved_tensors
        window = (values - threshold).abs() < ctx.bandwidth / 2
        return of_out * (values > threshold), of_out * window * (-threshold / ctx.bandwidth), None


class ActiveCount(torch.autograd.Function):
    """1 for each value (E,) above its threshold (E,), otherwise 0 (Rajamanoharan et al., 2024, equation 12).

    A threshold's gradient is estimated in the same window as in :class:`JumpReLU`.
    """

    @staticmethod
    def forward(ctx: Any, values: Tensor, threshold: Tensor, bandwidth: float) -> Tensor:
        """Return 0 or 1 for each value: (E,)."""
        ctx.bandwidth = bandwidth
        ctx.save_for_backward(values, threshold)
        return (values > threshold).to(values.dtype)

    @staticmethod
    def backward(ctx: Any, of_out: Tensor) -> tuple[Tensor | None, ...]:
        """Compute the gradient of ``threshold``."""
        values, threshold = ctx.saved_tensors
        window = (values - threshold).abs() < ctx.bandwidth / 2
        return None, -of_out * window / ctx.bandwidth, None
