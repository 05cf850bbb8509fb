"""
ggml's k-quants by loops of our own, 16 sub-blocks of weights at a time: the same bytes, some ten times as fast.

Each lane of a vector, or thread of a GPU, does the operations of ggml's reference in the reference's order, so that
nothing is rounded otherwise. Whether it is so on this machine and for this build of ggml is tried on a fixed block
before it is used (lib.ggml).
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Mapping
from functools import cache, partial
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING

from lib.console import note
from lib.nvrtc import Kernel, NvrtcError, compiled_kernels
from lib.toolchain import EXACT_FLAGS, CompilerError, compiled_library

if TYPE_CHECKING:
    from torch import Tensor

BLOCK_VALUES = 256
# Types with such a loop, by ggml's names, and the bytes of a block.
TYPES = {"Q4_K": 144, "Q5_K": 176, "Q6_K": 210}
# Types with a kernel for a GPU; values and bytes of their blocks, and how many blocks each takes at once.
GPU_TYPES = {"Q4_K": (256, 144, 16), "Q5_K": (256, 176, 16), "Q6_K": (256, 210, 8), "Q8_0": (32, 34, 128)}
SOURCES, GPU_SOURCES = (
    {name: Path(__file__).with_name(name).read_text(encoding="utf-8") for name in (main, "k_quants.h")}
    for main in ("k_quants.cpp", "k_quants.cu")
)
# Neither is looked at here, and without them a square root of a vector is one instruction.
FLAGS = (*EXACT_FLAGS, "-fno-math-errno", "-fno-trapping-math")
# Quantizes float32 (rows, columns) by the importance of its columns, or by none, to uint8 (bytes,).
Way = Callable[["Tensor", "Tensor | None"], "Tensor"]
_compiling = Lock()


def loops_by_type(flags: tuple[str, ...] = FLAGS) -> Mapping[str, Way]:
    """
    For each of TYPES what quantizes rows in RAM.

    Returns:
        Nothing where the loops cannot be compiled, which costs time and nothing else.
    """
    with _compiling:  # the first of several threads compiles, the others wait for it
        return _load_loops(flags)


def kernels_by_type() -> Mapping[str, Way]:
    """For each of GPU_TYPES what quantizes rows on torch's current GPU, or what it moves there; nothing as above."""
    with _compiling:
        return _load_kernels()


@cache
def _load_loops(flags: tuple[str, ...]) -> Mapping[str, Way]:
    try:
        library = compiled_library("k_quants", SOURCES, flags)
    except (CompilerError, OSError) as error:
        note(f"the loops of the k-quants could not be compiled, and llama.cpp's slower ones are taken: {error}")
        return {}
    ways = {}
    for kind, block_bytes in TYPES.items():
        loop = getattr(library, f"quantize_{kind.lower()}")
        loop.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_size_t, ctypes.c_void_p, ctypes.c_void_p]
        loop.restype = None
        ways[kind] = partial(_by_loop, loop, block_bytes)
    return ways


def _by_loop(loop: Callable[..., None], block_bytes: int, values: Tensor, matrix: Tensor | None) -> Tensor:
    import torch

    result = torch.empty(values.numel() // BLOCK_VALUES * block_bytes, dtype=torch.uint8)
    importance = None if matrix is None else matrix.data_ptr()
    loop(values.data_ptr(), *values.shape, importance, result.data_ptr())
    return result


@cache
def _load_kernels() -> Mapping[str, Way]:
    names = {kind: f"quantize_{kind.lower()}" for kind in GPU_TYPES}
    try:
        kernels = compiled_kernels(GPU_SOURCES, tuple(names.values()))
    except (NvrtcError, OSError) as error:
        note(f"the GPU's kernels could not be compiled, and the CPU quantizes: {error}")
        return {}
    return {kind: partial(_by_kernel, kernels[name], GPU_TYPES[kind]) for kind, name in names.items()}


def _by_kernel(kernel: Kernel, form: tuple[int, int, int], values: Tensor, matrix: Tensor | None) -> Tensor:
    import torch

    block_values, block_bytes, at_once = form
    blocks = values.numel() // block_values
    values, matrix = values.cuda(), None if matrix is None else matrix.cuda()
    result = torch.empty(blocks * block_bytes, dtype=torch.uint8, device=values.device)
    kernel(-(-blocks // at_once), values, matrix, result, blocks, values.shape[1] // block_values)
    return result
