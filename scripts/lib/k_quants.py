"""
ggml's k-quants by loops of our own, 16 sub-blocks of weights at a time: the same bytes, some ten times as fast.

Each lane of a vector does the operations of ggml's reference in the reference's order, so that nothing is rounded
otherwise. Whether it is so on this machine and for this build of ggml is tried on a fixed block before it is used.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from threading import Lock

from lib.console import note
from lib.toolchain import EXACT_FLAGS, CompilerError, compiled_library

# Types with such a loop, by ggml's names.
TYPES = ("Q4_K", "Q5_K", "Q6_K")
BLOCK_VALUES = 256
SOURCES = {name: Path(__file__).with_name(name).read_text(encoding="utf-8") for name in ("k_quants.cpp", "k_quants.h")}
# Neither is looked at here, and without them a square root of a vector is one instruction.
FLAGS = (*EXACT_FLAGS, "-fno-math-errno", "-fno-trapping-math")
Loop = Callable[[int, int, int, int | None, int], None]
_compiling = Lock()


def compiled_loops() -> Mapping[str, Loop]:
    """
    A function for each type, called with pointers to float32 and bytes: from, rows, columns, matrix or None, to.

    Returns:
        Nothing where they cannot be compiled, which costs time and nothing else.
    """
    with _compiling:  # the first of several threads compiles, the others wait for it
        return _load(FLAGS)


@cache
def _load(flags: tuple[str, ...]) -> Mapping[str, Loop]:
    try:
        library = compiled_library("k_quants", SOURCES, flags)
    except (CompilerError, OSError) as error:
        note(f"the loops of the k-quants could not be compiled, and llama.cpp's slower ones are taken: {error}")
        return {}
    loops = {}
    for name in TYPES:
        loop = getattr(library, f"quantize_{name.lower()}")
        loop.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_size_t, ctypes.c_void_p, ctypes.c_void_p]
        loop.restype = None
        loops[name] = loop
    return loops
