"""
Reading and writing sharded safetensors without holding them.

Tensors are read in blocks of rows with `pread`: a memory map would count as resident memory. Shards are
written in one pass, header first, hashed on the way.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from lib.checkpoint import INDEX, WEIGHTS, CheckpointError, weight_files, weight_map

if TYPE_CHECKING:
    import torch
    from torch import Tensor

BYTES_PER_VALUE = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}
# The names of merge.dtype's types.
STORED = {"float16": "F16", "bfloat16": "BF16", "float32": "F32"}
# The format's header is a length of 8 bytes and JSON; its library refuses more than 100 MB of it.
MAX_HEADER_BYTES = 100_000_000


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a safetensors file: where its bytes lie, not the bytes."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: Path
    offset: int

    @property
    def rows(self) -> int:
        """Length of the first dimension; 1 for a scalar."""
        return self.shape[0] if self.shape else 1

    @property
    def row_values(self) -> int:
        """Values in one row."""
        return math.prod(self.shape[1:])

    @property
    def values(self) -> int:
        """Values of the whole tensor."""
        return math.prod(self.shape)


class Shaped(Protocol):
    """What is written of a tensor beside its values."""

    @property
    def name(self) -> str: ...

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def values(self) -> int: ...


def read_tensors(folder: Path) -> dict[str, StoredTensor]:
    """
    Every tensor of a checkpoint by name, in the order in which the files hold them.

    Raises:
        CheckpointError: a truncated file, or an index that does not agree with its shards.
    """
    tensors: dict[str, StoredTensor] = {}
    for name in weight_files(folder):
        tensors.update((tensor.name, tensor) for tensor in read_header(folder / name))
    if (folder / INDEX).is_file():
        listed = weight_map(folder)
        problems = [f"  {name}: in {INDEX} but in no shard" for name in sorted(listed.keys() - tensors.keys())]
        problems += [f"  {name}: in a shard but not in {INDEX}" for name in sorted(tensors.keys() - listed.keys())]
        problems += [
            f"  {name}: in {tensor.file.name}, but {INDEX} says {listed[name]}"
            for name, tensor in sorted(tensors.items())
            if name in listed and listed[name] != tensor.file.name
        ]
        if problems:
            raise CheckpointError("\n".join([f"{folder}: index and shards disagree:", *problems]))
    return tensors


def read_header(path: Path) -> list[StoredTensor]:
    """The tensors of one safetensors file, in the order of their bytes."""
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(size - 8, MAX_HEADER_BYTES):
            raise CheckpointError(f"{path} is no safetensors file, or cut off ({size} bytes)")
        try:
            header = json.loads(file.read(length))
        except ValueError as error:
            raise CheckpointError(f"{path} has a damaged header: {error}") from error
    try:
        header.pop("__metadata__", None)
        tensors = _stored_tensors(header, path, data_start=8 + length)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path} has a damaged header: {error!r}") from error
    end = 8 + length + sum(tensor.values * BYTES_PER_VALUE[tensor.dtype] for tensor in tensors)
    if end != size:
        raise CheckpointError(f"{path} is cut off or damaged: {size} bytes, its header implies {end}")
    return tensors


def _stored_tensors(header: dict[str, Any], path: Path, *, data_start: int) -> list[StoredTensor]:
    """The tensors of a header; their bytes have to follow one another without a gap, as the format demands."""
    tensors, end = [], 0
    for name, facts in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        if facts["dtype"] not in BYTES_PER_VALUE:
            raise CheckpointError(
                f"{path}: {name} is {facts['dtype']}; only {', '.join(BYTES_PER_VALUE)} can be merged"
            )
        start, stop = facts["data_offsets"]
        tensor = StoredTensor(name, facts["dtype"], tuple(facts["shape"]), path, data_start + start)
        if start != end or stop - start != tensor.values * BYTES_PER_VALUE[tensor.dtype]:
            raise CheckpointError(f"{path} is damaged: {name} {tensor.shape} cannot be bytes {start} to {stop}")
        tensors.append(tensor)
        end = stop
    return tensors


def read_rows(tensor: StoredTensor, start: int, stop: int) -> Tensor:
    """Rows [start, stop) of a tensor, (stop - start, row_values), in its own dtype."""
    values = read_values(tensor, start * tensor.row_values, (stop - start) * tensor.row_values)
    return values.reshape(stop - start, tensor.row_values)


def read_rows_into(rows: Tensor, tensor: StoredTensor, start: int) -> None:
    """Fill `rows`, (any number, row_values) in the tensor's own dtype and in RAM, with those from `start` on."""
    _read_into(rows.view(-1), tensor, [(start * tensor.row_values, rows.numel())])


def torch_dtype(tensor: StoredTensor) -> torch.dtype:
    """The dtype that torch has for a tensor's values."""
    import torch

    return {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}[tensor.dtype]


def read_values(tensor: StoredTensor, first: int, count: int) -> Tensor:
    """Consecutive values of a tensor, whatever its shape, (count,), in its own dtype."""
    return _read_pieces(tensor, [(first, count)])


def read_columns(tensor: StoredTensor, start: int, stop: int, left: int, right: int) -> Tensor:
    """Columns [left, right) of rows [start, stop) of a matrix, (stop - start, right - left), in its own dtype."""
    if (left, right) == (0, tensor.row_values):
        return read_rows(tensor, start, stop)
    pieces = [(row * tensor.row_values + left, right - left) for row in range(start, stop)]
    return _read_pieces(tensor, pieces).reshape(stop - start, right - left)


def _read_pieces(tensor: StoredTensor, pieces: Sequence[tuple[int, int]]) -> Tensor:
    """Some values of a tensor in one row, each piece given by its first value and their number."""
    import torch

    values = torch.empty(sum(count for _, count in pieces), dtype=torch_dtype(tensor))
    _read_into(values, tensor, pieces)
    return values


def _read_into(values: Tensor, tensor: StoredTensor, pieces: Sequence[tuple[int, int]]) -> None:
    import torch

    size = BYTES_PER_VALUE[tensor.dtype]
    view, done = memoryview(values.view(torch.uint8).numpy()), 0
    descriptor = os.open(tensor.file, os.O_RDONLY)
    try:
        for first, count in pieces:
            place = view[done : done + count * size]
            if os.preadv(descriptor, [place], tensor.offset + first * size) != len(place):
                raise CheckpointError(f"{tensor.file} is cut off: {tensor.name} cannot be read")
            done += len(place)
    finally:
        os.close(descriptor)


def plan_shards(tensors: Iterable[Shaped], *, dtype: str, max_shard_bytes: int) -> list[list[Shaped]]:
    """Split tensors, in their order, into shards of at most `max_shard_bytes` unless one tensor alone is larger."""
    shards: list[list[Shaped]] = [[]]
    size = 0
    for tensor in tensors:
        tensor_bytes = tensor.values * BYTES_PER_VALUE[dtype]
        if shards[-1] and size + tensor_bytes > max_shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(tensor)
        size += tensor_bytes
    return shards


def shard_names(count: int) -> list[str]:
    """The names that transformers gives to `count` shards."""
    return [WEIGHTS] if count == 1 else [f"model-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]


def index_of(shards: Sequence[Sequence[Shaped]], *, dtype: str) -> dict[str, Any]:
    """The index of a sharded checkpoint: which shard holds which tensor."""
    names = shard_names(len(shards))
    total = sum(tensor.values for shard in shards for tensor in shard) * BYTES_PER_VALUE[dtype]
    weight_map = {tensor.name: name for name, shard in zip(names, shards, strict=True) for tensor in shard}
    return {"metadata": {"total_size": total}, "weight_map": weight_map}


def shard_header(shard: Sequence[Shaped], *, dtype: str) -> bytes:
    """What stands before the values of a safetensors file whose tensors follow one another."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for tensor in shard:
        start, end = end, end + tensor.values * BYTES_PER_VALUE[dtype]
        header[tensor.name] = {"dtype": dtype, "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def write_shard(path: Path, shard: Sequence[Shaped], *, dtype: str, blocks: Iterator[Tensor]) -> dict[str, Any]:
    """
    Write one safetensors file from blocks of rows that come in the order of `shard`.

    Returns:
        Size in bytes and SHA-256 of the file, for the manifest.
    """
    import torch

    header = shard_header(shard, dtype=dtype)
    digest = hashlib.sha256(header)
    with path.open("wb", buffering=0) as file:
        _write_all(file, memoryview(header))
        for block in blocks:
            data = memoryview(block.contiguous().view(torch.uint8).numpy()).cast("B")
            _write_all(file, data)
            digest.update(data)
        os.fsync(file.fileno())
        size = file.tell()
    expected = len(header) + sum(tensor.values for tensor in shard) * BYTES_PER_VALUE[dtype]
    if size != expected:
        raise CheckpointError(f"{path}: wrote {size} bytes, the header implies {expected}")
    return {"size": size, "sha256": digest.hexdigest()}


def _write_all(file: Any, data: memoryview) -> None:
    """One write moves at most 2 GiB, and an unbuffered one may move less than asked."""
    while data:
        data = data[file.write(data) :]
