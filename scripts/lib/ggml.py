"""ggml's quantization of rows, by the library of a llama.cpp build, and by loops that give the same bytes sooner."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from hashlib import sha256, shake_128
from typing import TYPE_CHECKING

import numpy as np
import torch

from lib.console import note
from lib.errors import ModelmillError
from lib.gguf_file import row_bytes
from lib.k_quants import BLOCK_VALUES, Way, kernels_by_type, loops_by_type

if TYPE_CHECKING:
    from torch import Tensor

    from lib.llama_cpp import LlamaCpp

LIBRARY = "libggml-base.so"
FINGERPRINT_TYPES = ("Q4_0", "Q5_0", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL", "IQ4_XS")
# Of the pinned build on x86-64.
PINNED_FINGERPRINT = "466e54b468275ae8f3b342a58e342b0780f5207c4ee2e50ea5f239295389927b"


class GgmlError(ModelmillError):
    """ggml cannot be called, or made something of a tensor that is not valid."""


class Ggml:
    """Quantizes rows to any of llama.cpp's types."""

    def __init__(self, llama_cpp: LlamaCpp, *, device: str = "cpu", own_loops: bool = True) -> None:
        """
        Args:
            device: where rows will be; "cpu" or "cuda".
            own_loops: take the loops and kernels of lib.k_quants for the types that they know.

        Raises:
            GgmlError: the build has no such library.
        """
        path = llama_cpp.programs / LIBRARY
        try:
            self._library = ctypes.CDLL(str(path))
        except OSError as error:
            raise GgmlError(
                f"{path} cannot be loaded ({error}); the direct path needs a llama.cpp built with shared libraries "
                "(-DBUILD_SHARED_LIBS=ON), or set quantize.path: staged"
            ) from error
        self._library.ggml_quantize_chunk.restype = ctypes.c_size_t
        self._library.ggml_quantize_chunk.argtypes = [
            *(ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p),
            *(ctypes.c_int64, ctypes.c_int64, ctypes.c_int64, ctypes.c_void_p),
        ]
        self._library.ggml_validate_row_data.restype = ctypes.c_bool
        self._library.ggml_validate_row_data.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_size_t]
        self._ways: dict[str, Mapping[str, Way]] = {"cpu": {}, "cuda": {}}
        if own_loops:
            self._ways["cpu"] = self._tried(loops_by_type(), "this machine's loop")
        if own_loops and device == "cuda":
            self._ways["cuda"] = self._tried(kernels_by_type(), "this GPU's kernel")

    def quantize(self, values: Tensor, kind: str, matrix: Tensor | None = None) -> Tensor:
        """
        Rows in another type.

        Args:
            values: (rows, columns), float32, finite; on a GPU, it quantizes those types that lib.k_quants knows.
            kind: ggml's name of the type, as in "Q4_K"; columns are a multiple of its block's values.
            matrix: the importance of each column, (columns,), float32.

        Returns:
            (bytes,), uint8, in RAM.
        """
        values = values.contiguous()
        if way := self._ways[values.device.type].get(kind):
            return way(values, None if matrix is None else matrix.to(values.device)).cpu()
        values = values.cpu()
        way = self._ways["cpu"].get(kind)
        return way(values, matrix) if way else self._quantize(values, kind, matrix)

    def check(self, data: Tensor, kind: str, *, name: str) -> None:
        """
        Raises:
            GgmlError: quantized bytes hold a scale that is not finite.
        """
        if not self._library.ggml_validate_row_data(_number(kind), data.data_ptr(), data.numel()):
            raise GgmlError(f"{name} cannot be held in {kind}: a scale is beyond the range of 16-bit floats")

    def fingerprint(self) -> str:
        """SHA-256 of a fixed block in several types: builds that do not have it in common make other files."""
        values, matrix = _fixed_block()
        digest = sha256()
        for kind in FINGERPRINT_TYPES:
            for importance in (None, matrix):
                digest.update(self._quantize(values, kind, importance).numpy())
        return digest.hexdigest()

    def _quantize(self, values: Tensor, kind: str, matrix: Tensor | None) -> Tensor:
        result = torch.empty(row_bytes(kind, values.numel()), dtype=torch.uint8)
        importance = None if matrix is None else matrix.data_ptr()
        written = self._library.ggml_quantize_chunk(
            _number(kind), values.data_ptr(), result.data_ptr(), 0, *values.shape, importance
        )
        if written != result.numel():
            raise GgmlError(f"ggml wrote {written} bytes of {kind}, expected {result.numel()}")
        return result

    def _tried(self, ways: Mapping[str, Way], what: str) -> Mapping[str, Way]:
        """Those ways that give ggml's bytes for a fixed block."""
        values, matrix = _fixed_block()
        good = {}
        for kind, way in ways.items():
            if all(torch.equal(way(values, each).cpu(), self._quantize(values, kind, each)) for each in (None, matrix)):
                good[kind] = way
            else:
                note(f"{what} for {kind} does not give llama.cpp's bytes; llama.cpp's own is taken")
        return good


def _number(kind: str) -> int:
    from gguf import GGMLQuantizationType

    return int(GGMLQuantizationType[kind])


def _fixed_block() -> tuple[Tensor, Tensor]:
    """Rows of every sort, (rows, columns), the same on any machine, and an importance of their columns."""
    columns = 8 * BLOCK_VALUES
    values, chance, importance = (_fixed_numbers(name, count) for name, count in (("x", 24), ("y", 24), ("z", 1)))
    values = values.reshape(24, columns)
    chance = chance.reshape(24, columns).abs()
    values[4:8] *= torch.where(chance[4:8] < 0.01, 100.0, 0.01)
    values[8:12] *= chance[8:12] < 0.05
    values[12:14] = values[12:14].abs()
    values[14:16] = -values[14:16].abs()
    values[16] = 0
    values[17] = 0.25
    values[18] = -0.25
    return values.half().float(), importance.abs() ** 2


def _fixed_numbers(name: str, rows: int) -> Tensor:
    """Numbers from -1 to 1, of any size between, (rows · 2048,), float32."""
    data = np.frombuffer(shake_128(name.encode()).digest(2 * rows * 8 * BLOCK_VALUES), dtype="<i2")
    return torch.from_numpy(data.astype(np.float32) / 32768) ** 3
