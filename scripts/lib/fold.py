"""
The sum of a low-rank update over its rank: acc = acc + left[:, k]·right[k, :] for one k after another.

Each product and each sum is a float32 operation rounded by itself, so that torch's elementwise operations and the
loop below give the same bits on any CPU and GPU. The loop is compiled on first use: it takes all ranks while a few
values stay in the registers, and holds no lock that other threads wait for. 32 threads of torch's operations folded
a 32B no faster than one would, since each has to hold Python's lock at its start.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from functools import cache
from threading import Lock
from typing import TYPE_CHECKING

from lib.console import note
from lib.nvrtc import THREADS, Kernel, NvrtcError, compiled_kernels
from lib.toolchain import EXACT_FLAGS, CompilerError, compiled_library

if TYPE_CHECKING:
    from torch import Tensor

# Values for which torch sums the whole rank before the next ones: small enough to stay in a core's cache.
TILE_VALUES = 1 << 17
_compiling = Lock()
SOURCE = """
#include <cstddef>

// As many columns as keep the factors' rows in the first cache at a rank of 16.
static const size_t WIDTH = 256;

static void add_four(float *__restrict sums, const float *factors, const float *__restrict right,
                     size_t columns, size_t count)
{
    const float a = factors[0], b = factors[1], c = factors[2], d = factors[3];
    for (size_t i = 0; i < count; i++)
        sums[i] = (((sums[i] + a * right[i]) + b * right[columns + i]) + c * right[2 * columns + i])
                  + d * right[3 * columns + i];
}

static void add_one(float *__restrict sums, float factor, const float *__restrict right, size_t count)
{
    for (size_t i = 0; i < count; i++)
        sums[i] = sums[i] + factor * right[i];
}

// total (rows, columns), left (rows, ranks) and right (ranks, columns), all in rows.
extern "C" void add_products(float *total, const float *left, const float *right,
                             size_t rows, size_t columns, size_t ranks)
{
    for (size_t start = 0; start < columns; start += WIDTH) {
        const size_t count = columns - start < WIDTH ? columns - start : WIDTH;
        for (size_t row = 0; row < rows; row++) {
            float *sums = total + row * columns + start;
            const float *factors = left + row * ranks;
            size_t k = 0;
            for (; k + 4 <= ranks; k += 4)
                add_four(sums, factors + k, right + k * columns + start, columns, count);
            for (; k < ranks; k++)
                add_one(sums, factors[k], right + k * columns + start, count);
        }
    }
}
"""

GPU_SOURCE = """
// A thread for each value of total (rows, columns).
extern "C" __global__ void add_products(float *total, const float *left, const float *right, long long rows,
                                        long long columns, long long ranks)
{
    const long long place = blockIdx.x * (long long)blockDim.x + threadIdx.x;
    if (place >= rows * columns)
        return;
    const long long row = place / columns, column = place - row * columns;
    float sum = total[place];
    for (int k = 0; k < ranks; k++)
        sum = sum + left[row * ranks + k] * right[k * columns + column];
    total[place] = sum;
}
"""


def add_products(total: Tensor, left: Tensor, right: Tensor) -> None:
    """
    total += left[:, k]·right[k, :] for one k after another, product and sum each rounded to float32.

    Args:
        total: (rows, columns), changed in place.
        left, right: (rows, ranks) and (ranks, columns), on the same device.
    """
    left, right = left.contiguous(), right.contiguous()
    if total.is_cuda and (kernel := compiled_kernel()) is not None:
        kernel(-(-total.numel() // THREADS), total, left, right, *total.shape, left.shape[1])
        return
    loop = compiled_loop() if total.device.type == "cpu" else None
    if loop is None:
        add_by_torch(total, left, right)
        return
    loop(total.data_ptr(), left.data_ptr(), right.data_ptr(), *total.shape, left.shape[1])


def add_by_torch(total: Tensor, left: Tensor, right: Tensor) -> None:
    """The same by torch's own operations."""
    import torch

    # A GPU is given all rows at once: it has no such cache, and starting an operation takes longer there.
    rows = max(1, TILE_VALUES // total.shape[1]) if total.device.type == "cpu" else total.shape[0]
    product = torch.empty_like(total[:rows])
    columns = left.t().contiguous().unsqueeze(2)  # (ranks, rows, 1)
    for top in range(0, total.shape[0], rows):
        tile = total[top : top + rows]
        held = product[: tile.shape[0]]
        for k in range(right.shape[0]):
            torch.mul(columns[k, top : top + rows], right[k], out=held)
            tile.add_(held)


def compiled_loop(flags: Sequence[str] = EXACT_FLAGS) -> Callable[..., None] | None:
    """The compiled loop, kept in the cache; None where it cannot be compiled, which costs time and nothing else."""
    with _compiling:  # the first of several threads compiles, the others wait for it
        return load_loop(flags)


@cache
def load_loop(flags: Sequence[str]) -> Callable[..., None] | None:
    """Compile the loop if the cache does not hold it, and load it."""
    try:
        loop = compiled_library("fold", {"fold.cpp": SOURCE}, flags).add_products
    except (CompilerError, OSError) as error:
        note(f"the merge's loop could not be compiled and is slower: {error}")
        return None
    loop.argtypes, loop.restype = [ctypes.c_void_p] * 3 + [ctypes.c_size_t] * 3, None
    return loop


def compiled_kernel() -> Kernel | None:
    """The same for torch's current GPU; None where it cannot be compiled."""
    with _compiling:
        return _load_kernel()


@cache
def _load_kernel() -> Kernel | None:
    try:
        return compiled_kernels({"fold.cu": GPU_SOURCE}, ("add_products",))["add_products"]
    except (NvrtcError, OSError) as error:
        note(f"the merge's kernel could not be compiled and is slower: {error}")
        return None
