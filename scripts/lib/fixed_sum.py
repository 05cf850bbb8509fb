"""Sums whose bits depend neither on threads nor on device: over a tree of halves, as IEEE additions one by one."""

from __future__ import annotations

from typing import TYPE_CHECKING

# Rows whose sum is one tree.
GROUP = 64

if TYPE_CHECKING:
    from torch import Tensor


def sum_rows(values: Tensor) -> Tensor:
    """
    Sum of each row of (rows, columns), (rows,) in the same dtype.

    Rows are padded with zeros to a power of two, and the upper half is added to the lower until one is left.
    """
    import torch

    width = 1 << max(0, values.shape[1] - 1).bit_length()
    values = torch.nn.functional.pad(values, (0, width - values.shape[1]))
    while width > 1:
        width //= 2
        values = values[:, :width] + values[:, width:]
    return values[:, 0]


def add_rows(total: Tensor, values: Tensor) -> None:
    """
    total += the sum of rows of `values`, over a tree of halves for each GROUP of them, one group after another.

    The same however a matrix is cut into blocks, as long as each but the last has a multiple of GROUP rows.

    Args:
        total: (columns,), changed in place.
        values: (rows, columns) in the same dtype.
    """
    for start in range(0, len(values), GROUP):
        total.add_(sum_rows(values[start : start + GROUP].t()))
