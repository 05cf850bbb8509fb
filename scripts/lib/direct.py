"""
From base and adapter to quantized files in one pass over the base, without a 16-bit file between.

Blocks of rows are read, merged, rounded to the 16 bits that the staged path would write, and quantized, by several
threads; one thread for each file writes and hashes them in their order. Memory is that of the blocks.
"""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import numpy as np
import torch

from lib.console import progress
from lib.gguf_file import GgufError, GgufFile, GgufTensor, row_bytes
from lib.merge import BlockTask, Overflows, all_finite, worked_blocks
from lib.quantized_gguf import padded

if TYPE_CHECKING:
    from torch import Tensor

    from lib.ggml import Ggml
    from lib.quantized_gguf import QuantizedGguf
    from lib.skeleton import Matrix, Skeleton

# Values in a block of rows, of which a thread has several: 8 MiB of float32, and 32 where a GPU is to be kept busy.
BLOCK_VALUES = {"cpu": 1 << 21, "cuda": 1 << 23}
# Threads that a GPU is fed by; each takes memory there.
MOST_GPU_THREADS = 12
# Pieces that a file may be behind, so that neither writing nor hashing waits for the other, or for a new piece.
WAITING_PIECES = 4
DTYPES = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32}


@dataclass(frozen=True)
class Target:
    """One file to write: its plan, where it is written, and the importance of each tensor's columns."""

    plan: QuantizedGguf
    path: Path
    importance: Mapping[str, Tensor]


class Output:
    """A file that grows at its end, written by one thread and hashed by another, some pieces behind."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self._digest = hashlib.sha256()
        self._size = 0
        self._pools = [ThreadPoolExecutor(max_workers=1) for _ in range(2)]
        self._waiting: deque[Future[Any]] = deque()

    def add(self, data: bytes | memoryview) -> None:
        """
        Write some bytes behind those before.

        Raises:
            OSError: an earlier piece could not be written.
        """
        self._wait(but=WAITING_PIECES)
        self._size += len(data)
        tasks = (self._file.write, self._digest.update)
        self._waiting.extend(pool.submit(task, data) for pool, task in zip(self._pools, tasks, strict=True))

    def finish(self) -> dict[str, Any]:
        """Wait for the last piece; size and SHA-256 of the file, for the manifest."""
        self._wait()
        for pool in self._pools:
            pool.shutdown()
        return {"size": self._size, "sha256": self._digest.hexdigest()}

    def _wait(self, *, but: int = 0) -> None:
        """Until no more pieces than `but` are still to be written or hashed."""
        while len(self._waiting) > but * len(self._pools):
            self._waiting.popleft().result()


@dataclass(frozen=True)
class Piece:
    """So many values of a tensor, in the type that each file has it in."""

    values: int
    data: Sequence[Tensor]


def write_quantized(
    skeleton: Skeleton,
    targets: Sequence[Target],
    *,
    ggml: Ggml,
    dtype: str,
    overflows: Overflows,
    threads: int,
    device: str,
) -> list[dict[str, Any]]:
    """
    Write all targets; each matrix of the base is read once.

    Args:
        skeleton: of what is quantized.
        dtype: of the merged checkpoint that the staged path would write.
        overflows: takes note of what does not fit it; the files are not to be kept then.
        device: where it is merged and quantized; "cpu" or "cuda".

    Returns:
        Size and SHA-256 of each file.

    Raises:
        GgmlError: quantized bytes are not valid.
        OSError: a file could not be written.
    """
    torch.set_num_threads(1)  # the threads are over blocks of rows
    held = {tensor.name: tensor for tensor in skeleton.file.tensors}
    order = [tensor.name for tensor in targets[0].plan.tensors]
    tables = zip(*(target.plan.tensors for target in targets), strict=True)
    kinds = {each[0].name: [tensor.type for tensor in each] for each in tables}

    def task(name: str) -> BlockTask[Piece]:
        matrix, wanted = skeleton.matrices[name], list(zip(kinds[name], targets, strict=True))

        def quantize(start: int, rows: Tensor) -> Piece:
            ordered, kind = in_order_of(matrix, start, rows), held[name].type
            rows = ordered.to(DTYPES[kind])
            if rows.dtype != ordered.dtype and not all_finite(rows):
                overflows.note(matrix.source.name, ordered)
            return Piece(rows.numel(), _quantize(rows, wanted, name, held[name].type, ggml=ggml))

        return BlockTask(matrix.source, closed_blocks(matrix, BLOCK_VALUES[device]), quantize)

    stream = worked_blocks(
        (task(name) for name in order if name in skeleton.matrices),
        dtype=getattr(torch, dtype),
        overflows=overflows,
        threads=min(threads, MOST_GPU_THREADS) if device == "cuda" else threads,
        device=device,
    )
    total = sum(held[name].values for name in skeleton.matrices)
    with ExitStack() as stack:
        bar = stack.enter_context(progress("quantizing", total=total, unit="weight"))
        outputs = [Output(stack.enter_context(target.path.open("wb"))) for target in targets]
        stack.callback(stream.close)
        _give(outputs, [target.plan.header for target in targets])
        for name in order:
            left = held[name].values
            while left:
                piece = next(stream) if name in skeleton.matrices else _stored(skeleton.file, held[name], kinds[name])
                _give(outputs, [memoryview(data.numpy()) for data in piece.data])
                left -= piece.values
                bar.advance(piece.values if name in skeleton.matrices else 0)
            sizes = [row_bytes(kind, held[name].values) for kind in kinds[name]]
            _give(outputs, [bytes(padded(size) - size) for size in sizes])
        return [output.finish() for output in outputs]


def closed_blocks(matrix: Matrix, block_values: int) -> Iterator[tuple[int, int]]:
    """Blocks of rows, first and behind the last, that hold the same rows before and after they change their order."""
    rows, step = matrix.source.rows, max(1, block_values // max(1, matrix.source.row_values))
    if matrix.order is None:
        ends: Iterable[int] = range(1, rows + 1)
    else:
        highest = accumulate(matrix.order, max)
        ends = (place + 1 for place, row in enumerate(highest) if row == place)
    start, last = 0, 0
    for end in ends:
        if end - start > step and last > start:
            yield start, last
            start = last
        last = end
    yield start, last


def in_order_of(matrix: Matrix, start: int, rows: Tensor) -> Tensor:
    """The rows of a closed block in the order that the file has them in."""
    if matrix.order is None:
        return rows
    return rows[torch.tensor(matrix.order[start : start + len(rows)], device=rows.device) - start]


def _quantize(rows: Tensor, wanted: Sequence[tuple[str, Target]], name: str, held: str, *, ggml: Ggml) -> list[Tensor]:
    """Rows in the 16-bit file's type, as each target has them."""
    made: dict[str, Tensor] = {}
    values, finite = None, all_finite(rows)
    for kind, target in wanted:
        if kind in made:
            continue
        if kind == held:
            made[kind] = rows.contiguous().view(torch.uint8).reshape(-1).cpu()
            continue
        values = rows.float() if values is None else values
        if not finite:  # told of at the end; what is written is thrown away
            made[kind] = torch.zeros(row_bytes(kind, values.numel()), dtype=torch.uint8)
            continue
        made[kind] = ggml.quantize(values, kind, target.importance.get(name))
        ggml.check(made[kind], kind, name=name)
    return [made[kind] for kind, _ in wanted]


def _stored(file: GgufFile, tensor: GgufTensor, kinds: Sequence[str]) -> Piece:
    """A tensor that the skeleton holds; llama-quantize leaves the type of what is no matrix."""
    if set(kinds) != {tensor.type}:
        raise GgufError(f"{tensor.name} is no matrix, and yet not left in {tensor.type}")
    data = torch.from_numpy(np.fromfile(file.path, dtype=np.uint8, count=tensor.size, offset=tensor.offset))
    return Piece(tensor.values, [data] * len(kinds))


def _give(outputs: Sequence[Output], pieces: Sequence[bytes | memoryview]) -> None:
    for output, piece in zip(outputs, pieces, strict=True):
        output.add(piece)
