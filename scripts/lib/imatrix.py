"""An importance matrix as llama-imatrix writes it and llama-quantize reads it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lib.gguf_file import GgufError, GgufFile, GgufTensor, read_gguf
from lib.manifest import describe_file, file_manifest, read_file_manifest

# Under which llama-quantize is given it: its name, as typed, becomes a part of the quantized file.
NAME = "imatrix.gguf"
SUMS, COUNTS = ".in_sum2", ".counts"
MOST_LETTERS = 127  # llama-quantize keeps no more of a text


@dataclass(frozen=True)
class Imatrix:
    """
    Attributes:
        importance: by tensor, the mean square of each of its inputs, (columns,), float32.
        metadata: what llama-quantize writes of the matrix into a file, in its order.
    """

    importance: Mapping[str, np.ndarray]
    metadata: Mapping[str, str | int]


def identify_imatrix(path: Path) -> dict[str, Any]:
    """Digest and origin of a matrix; one that was not made here has no manifest and no origin."""
    if not file_manifest(path).is_file():
        return {"sha256": describe_file(path)["sha256"], "origin": None}
    manifest = read_file_manifest(path)
    return {key: manifest[key] for key in ("sha256", "origin")}


def read_imatrix(path: Path) -> Imatrix:
    """
    Raises:
        GgufError: no whole matrix, or one of another form than llama-imatrix writes now.
    """
    file = read_gguf(path)
    tensors = {tensor.name: tensor for tensor in file.tensors}
    importance = {}
    for name in sorted(tensors):
        if not name.endswith(SUMS):
            continue
        tensor = name.removesuffix(SUMS)
        counts = tensors.get(tensor + COUNTS)
        if counts is None:
            raise GgufError(f"{path} has no {tensor}{COUNTS}")
        importance[tensor] = _mean(_read(file, tensors[name]), _read(file, counts))
    datasets, chunks = (file.metadata.get(f"imatrix.{key}") for key in ("datasets", "chunk_count"))
    if not importance or datasets is None or chunks is None or "imatrix.chunk_size" not in file.metadata:
        raise GgufError(f"{path} is no importance matrix of llama-imatrix's")
    if lost := [name for name, values in importance.items() if not np.isfinite(values).all()]:
        raise GgufError(f"{path} holds values that are not finite, first those of {lost[0]}")
    metadata: dict[str, str | int] = {"quantize.imatrix.file": NAME}
    if datasets:
        metadata["quantize.imatrix.dataset"] = datasets[0].encode()[:MOST_LETTERS].decode(errors="ignore")
    metadata["quantize.imatrix.entries_count"] = len(importance)
    if chunks:
        metadata["quantize.imatrix.chunks_count"] = chunks
    return Imatrix(importance, metadata)


def _read(file: GgufFile, tensor: GgufTensor) -> np.ndarray:
    if tensor.type != "F32":
        raise GgufError(f"{file.path}: {tensor.name} is {tensor.type}, expected F32")
    return np.fromfile(file.path, dtype=np.float32, count=tensor.values, offset=tensor.offset)


def _mean(sums: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Experts have a count each, one behind another; what was never used weighs 1."""
    each = sums.reshape(len(counts), -1)
    used = counts[:, None] > 0
    return np.where(used, each / np.where(used, counts[:, None], 1), np.float32(1)).astype(np.float32).reshape(-1)
