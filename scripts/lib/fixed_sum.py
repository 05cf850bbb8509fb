"""Sums whose bits depend neither on threads nor on device: over a tree of halves, as IEEE additions one by one."""

from __future__ import annotations

from typing import TYPE_CHECKING

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
