"""Memory that is used again, for tensors that come and go in a loop."""

import sys

import numpy as np
import torch
from torch import Tensor

KEPT = 4
"""Blocks of memory that are remembered, for another use."""
UNUSED = 2
"""References to memory that only its list has: that one, and the question's own."""


class Buffers:
    """Empty tensors whose memory is used again once nothing refers to it any more.

    Large memory that is given back goes back to the system, and new memory costs a page fault every
    4 kB: of a pass over a store at memory's speed that is half of the time. A few blocks are kept; where
    all of them are still in use, as by someone who collects the tensors, new memory is taken and the
    oldest block forgotten: it goes when its tensors do.
    """

    def __init__(self) -> None:
        self._kept: list[np.ndarray] = []

    def empty(self, rows: int, width: int, dtype: torch.dtype) -> Tensor:
        """A tensor (rows, width) of any content on the CPU, as :func:`torch.empty`'s."""
        size = rows * width * dtype.itemsize
        if not size:
            return torch.empty(rows, width, dtype=dtype)
        memory = self._free(size)
        return torch.frombuffer(memory, dtype=dtype, count=rows * width).reshape(rows, width)

    def _free(self, size: int) -> np.ndarray:
        for i in range(len(self._kept)):
            if self._kept[i].nbytes >= size and sys.getrefcount(self._kept[i]) <= UNUSED:
                return self._kept[i]
        fresh = np.empty(size, np.uint8)
        self._kept = [*self._kept[1 - KEPT :], fresh]
        return fresh
