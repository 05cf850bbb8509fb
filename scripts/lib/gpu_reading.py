"""Rows of a checkpoint on a GPU: each thread reads into page-locked memory of its own, and has a stream of its own."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from threading import local
from typing import TYPE_CHECKING, Any

from lib.safetensors_file import StoredTensor, read_rows, read_rows_into, torch_dtype

if TYPE_CHECKING:
    from torch import Tensor

_kept = local()


def rows_on(device: str, tensor: StoredTensor, start: int, stop: int) -> Tensor:
    """Rows [start, stop) of a tensor, (stop - start, row_values), in its own dtype, on "cpu" or "cuda"."""
    if device == "cpu":
        return read_rows(tensor, start, stop)

    dtype = torch_dtype(tensor)
    size = (stop - start) * tensor.row_values * dtype.itemsize
    place = _locked_memory(size)[:size].view(dtype).view(stop - start, tensor.row_values)
    read_rows_into(place, tensor, start)
    rows = place.to(device, non_blocking=True)
    _kept.copied.record()
    return rows


@contextmanager
def own_stream(device: str) -> Iterator[None]:
    """Let what a thread does on the GPU wait for nothing but what it did before; it is done when the block ends."""
    if device == "cpu":
        yield
        return
    import torch

    if not hasattr(_kept, "stream"):
        _kept.stream = torch.cuda.Stream()
    with torch.cuda.stream(_kept.stream):
        yield
        _kept.stream.synchronize()


def _locked_memory(size: int) -> Any:
    """At least so many bytes that nothing is copied from any more."""
    import torch

    if hasattr(_kept, "copied"):
        _kept.copied.synchronize()
    else:
        _kept.copied = torch.cuda.Event()
    if not hasattr(_kept, "memory") or _kept.memory.numel() < size:
        _kept.memory = torch.empty(size, dtype=torch.uint8, pin_memory=True)
    return _kept.memory
