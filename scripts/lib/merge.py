"""
Folding a low-rank update into weights, defined to the bit.

The sum over the rank runs in a fixed order of float32 operations, each rounded by itself:
acc = 0; for k < r: acc = acc + B[:, k]·A[k, :]; then W + scale·acc, rounded once to the output dtype.
No BLAS: its results change with the instruction set, the device and the shape of a block. Elementwise
float32 multiplication and addition, as separate operations, are IEEE everywhere, so any thread count, any
block of rows and any device give the same bytes.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from lib.errors import ModelmillError
from lib.safetensors_file import StoredTensor, read_rows

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from lib.lora import LoraPair

# Values in a block of rows: 64 MiB of float32, so that a few blocks stay far below a model's size.
BLOCK_VALUES = 1 << 24


class MergeError(ModelmillError):
    """A merge would not give the right weights."""


def fold_delta(weight: Tensor, a: Tensor, b: Tensor, *, scale: float) -> Tensor:
    """
    Add a low-rank update to rows of a weight.

    Args:
        weight: (rows, in), any floating dtype; not changed.
        a: (rank, in), float32.
        b: (rows, rank), float32: the same rows of B.
        scale: of the update.

    Returns:
        (rows, in), float32, not yet rounded to the output dtype.
    """
    import torch

    total = torch.zeros(weight.shape, dtype=torch.float32)
    product = torch.empty_like(total)
    for k in range(a.shape[0]):
        torch.mul(b[:, k : k + 1], a[k], out=product)
        total.add_(product)
    # A multiplication and an addition, not `add(alpha=…)`, which may fuse the two.
    return total.mul_(scale).add_(weight.float())


def merged_rows(
    tensor: StoredTensor, pair: LoraPair | None, *, dtype: torch.dtype, block_values: int = BLOCK_VALUES
) -> Iterator[Tensor]:
    """
    The rows of a weight after the merge, block by block, in the output dtype.

    Raises:
        MergeError: a value that is not finite, or beyond the output dtype's range.
    """
    import torch

    factor_a = read_rows(pair.a, 0, pair.a.rows).float() if pair else None
    step = max(1, block_values // max(1, tensor.row_values))
    for start in range(0, tensor.rows, step):
        stop = min(start + step, tensor.rows)
        rows = read_rows(tensor, start, stop)
        if pair is not None and factor_a is not None:
            rows = fold_delta(rows, factor_a, read_rows(pair.b, start, stop).float(), scale=pair.scale)
        result = rows.to(dtype)
        if not torch.isfinite(result).all():
            raise MergeError(_describe_overflow(tensor.name, rows, dtype))
        yield result


def _describe_overflow(name: str, rows: Tensor, dtype: torch.dtype) -> str:
    import torch

    if not torch.isfinite(rows).all():
        return f"{name}: base or adapter holds values that are not finite"
    largest = rows.abs().max().item()
    return f"{name}: {largest:g} is beyond {str(dtype).removeprefix('torch.')}; set merge.dtype: bfloat16"
