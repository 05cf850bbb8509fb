"""
Training with less GPU memory than the model takes: frozen weights are streamed in, block by block.

accelerate's own offloading cannot be used here: a layer that it places on disk fails in the backward pass, and
4-bit weights are refused.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lib.console import say

if TYPE_CHECKING:
    from torch import Tensor, nn


def decoder_blocks(model: nn.Module) -> list[nn.Module]:
    """The repeated blocks of a decoder, in order: the members of its longest list of modules."""
    from torch import nn

    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
    return list(max(lists, key=len))


class BlockStreamer:
    """
    Keeps the frozen weights of some blocks outside the device and brings in one block at a time.

    A block's weights are put in place before its forward pass and stay until another block needs the room.
    With gradient checkpointing the backward pass runs each block forward again just before it needs its
    weights, so this serves both passes.
    """

    def __init__(self, *, device: Any, folder: Path | None) -> None:
        """
        Args:
            device: where the computation runs.
            folder: where the weights are kept in files; None keeps them in the CPU's memory.
        """
        self._device, self._folder = device, folder
        self._present: _StoredBlock | None = None
        self.blocks = 0
        self.stored_bytes = 0

    def take(self, block: nn.Module) -> None:
        """Store a block's frozen weights elsewhere, and fetch them before each of its forward passes."""
        _move(block, self._device)
        stored = _store(block, self._folder, number=self.blocks)
        self.blocks += 1
        self.stored_bytes += sum(weight.bytes for weight in stored.weights)
        # On the layers: transformers' gradient checkpointing runs a block's `forward` again without the block's hooks.
        for weight in stored.weights:
            weight.module.register_forward_pre_hook(lambda *_: self._bring(stored))

    def _bring(self, stored: _StoredBlock) -> None:
        if self._present is stored:
            return
        if self._present is not None:
            self._present.remove()
        stored.place(self._device)
        self._present = stored


def _move(module: nn.Module, device: Any) -> None:
    """Move a module with all that bitsandbytes keeps beside its int8 weights, which `to` leaves behind."""
    module.to(device)
    for part in module.modules():
        weight = getattr(part, "weight", None)
        for holder in (weight, getattr(part, "state", None)):
            if getattr(holder, "CB", None) is not None:
                holder.CB, holder.SCB = weight.data, holder.SCB.to(device)


@dataclass
class _StoredWeight:
    """One frozen weight: the module it belongs to, and where its values are kept."""

    module: nn.Module
    kept: Tensor  # on the CPU, or without storage where the values are in a file
    bytes: int
    offset: int = 0

    def set(self, values: Tensor) -> None:
        import torch

        weight = self.module.weight
        weight.data = values
        # bitsandbytes refers to int8 weights from two more places, before and after the first forward pass; from those
        # that are 16 bits wide it makes them in each pass.
        for holder in (weight, getattr(self.module, "state", None)):
            if getattr(holder, "CB", None) is not None:
                holder.CB = values if values.dtype == torch.int8 else None


class _StoredBlock:
    """The stored weights of one block."""

    def __init__(self, weights: list[_StoredWeight], file: Path | None) -> None:
        self.weights, self._file = weights, file

    def place(self, device: Any) -> None:
        """Bring the weights to the device."""
        content = None
        if self._file is not None:
            content = _read_bytes(self._file, sum(weight.bytes for weight in self.weights))
        for weight in self.weights:
            source = weight.kept if content is None else _view(content, weight)
            weight.set(source.to(device, non_blocking=True))

    def remove(self) -> None:
        """Let go of the weights on the device."""
        for weight in self.weights:
            weight.set(weight.kept)


def _store(block: nn.Module, folder: Path | None, *, number: int) -> _StoredBlock:
    """Copy a block's frozen weights to the CPU or into a file, and release those on the device."""
    import torch

    modules = list(_frozen_linears(block))
    if folder is None:
        pinned = torch.cuda.is_available()
        kept = [module.weight.data.cpu() for module in modules]
        weights = [
            _StoredWeight(module, values.pin_memory() if pinned else values, values.nbytes)
            for module, values in zip(modules, kept, strict=True)
        ]
        stored = _StoredBlock(weights, None)
    else:
        file = folder / f"block-{number:04d}.bin"
        stored = _StoredBlock(_write_weights(modules, file), file)
    stored.remove()
    return stored


def _frozen_linears(block: nn.Module) -> Iterator[nn.Module]:
    """Modules of a block whose weight is a matrix that is not trained, in a fixed order."""
    for module in block.modules():
        weight = getattr(module, "weight", None)
        if weight is not None and not weight.requires_grad and weight.dim() == 2 and "weight" in module._parameters:
            yield module


def _write_weights(modules: Sequence[nn.Module], file: Path) -> list[_StoredWeight]:
    import torch

    weights, offset = [], 0
    with file.open("wb", buffering=0) as out:
        for module in modules:
            values = module.weight.data.cpu().contiguous()
            _write_all(out, values.view(torch.uint8).numpy().data.cast("B"), file)
            # Shape and type without memory: every element is the same one.
            hollow = torch.zeros(1, dtype=values.dtype).expand(values.shape)
            weights.append(_StoredWeight(module, hollow, values.nbytes, offset))
            offset += values.nbytes
    return weights


def _write_all(out: Any, content: memoryview, file: Path) -> None:
    try:
        while content:
            content = content[out.write(content) :]
    except OSError as error:
        error.filename = str(file)  # which a failed write does not say, and the disk is not that of the output
        raise


def _read_bytes(file: Path, size: int) -> Tensor:
    """The file's content; by `pread`, since a memory map counts as memory in use."""
    import torch

    content = torch.empty(size, dtype=torch.uint8, pin_memory=torch.cuda.is_available())
    view, done = memoryview(content.numpy()), 0
    descriptor = os.open(file, os.O_RDONLY)
    try:
        while done < size:
            got = os.preadv(descriptor, [view[done:]], done)
            if not got:
                raise OSError(f"{file} was cut short while it was in use")
            done += got
    finally:
        os.close(descriptor)
    return content


def _view(content: Tensor, weight: _StoredWeight) -> Tensor:
    part = content[weight.offset : weight.offset + weight.bytes]
    return part.view(weight.kept.dtype).view(weight.kept.shape)


def stream_beyond(model: nn.Module, *, device: Any, limit: int, folder: Path | None) -> BlockStreamer:
    """
    Put a model on a device; blocks beyond the limit are streamed in when they are needed.

    Args:
        model: on the CPU, adapters attached.
        limit: most bytes of frozen weights of blocks that stay on the device.
        folder: see BlockStreamer.
    """
    blocks = decoder_blocks(model)
    inside = {id(module) for block in blocks for module in block.modules()}
    streamer, resident = BlockStreamer(device=device, folder=folder), 0
    for module in model.modules():
        if id(module) not in inside and not any(True for _ in module.children()):
            _move(module, device)
            resident += sum(weight.nbytes for weight in module.parameters())
    for block in blocks:
        size = sum(module.weight.nbytes for module in _frozen_linears(block))
        if resident + size <= limit:
            _move(block, device)
            resident += size
        else:
            streamer.take(block)
    where = "the CPU's memory" if folder is None else "files"
    say(f"{streamer.blocks} of {len(blocks)} blocks, {streamer.stored_bytes / 1e9:.2f} GB, are streamed from {where}")
    return streamer
