"""
The 16-bit GGUF file that a merged checkpoint would become, with holes for its matrices.

It is written by llama.cpp's own converter from a checkpoint that has holes as well: names, shapes, types and metadata
are the converter's, and so are the values of everything that is no matrix. Both files take a few MB of disk.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lib import skeleton_converter
from lib.checkpoint import WEIGHTS, copy_side_files
from lib.errors import ModelmillError
from lib.gguf_file import GgufFile, read_gguf
from lib.jsonfile import read_json, write_json
from lib.llama_cpp import LlamaCpp
from lib.merge import Overflows, merged_blocks
from lib.process import Program, ProgramError
from lib.safetensors_file import BYTES_PER_VALUE, STORED, shard_header

if TYPE_CHECKING:
    from lib.merge_plan import MergedTensor


class SkeletonError(ModelmillError):
    """llama.cpp's converter refuses a checkpoint."""


class UnstreamedError(SkeletonError):
    """It makes of a matrix what cannot be made of it row by row."""


@dataclass(frozen=True)
class Matrix:
    """Where the rows of a matrix come from: a tensor of the checkpoint, and for each row the row of that."""

    source: MergedTensor
    order: tuple[int, ...] | None


@dataclass(frozen=True)
class Skeleton:
    """
    Attributes:
        file: the GGUF file; it is as long as the whole one.
        matrices: by name, those tensors that are holes in it.
    """

    file: GgufFile
    matrices: Mapping[str, Matrix]


@contextmanager
def started_converter(llama_cpp: LlamaCpp) -> Iterator[Program]:
    """llama.cpp's converter, for `make_skeleton`: it gets ready meanwhile, and is ended with the block."""
    program = Program([sys.executable, skeleton_converter.__file__, llama_cpp.convert_script], listens=True)
    try:
        yield program
    finally:
        program.end()


def make_skeleton(
    folder: Path,
    tensors: Sequence[MergedTensor],
    *,
    base: Path,
    config: dict[str, Any],
    dtype: str,
    outtype: str,
    metadata: dict[str, Any],
    converter: Program,
    overflows: Overflows,
) -> Skeleton:
    """
    Write both files into an empty folder.

    Args:
        tensors: of the merged checkpoint.
        base: where its tokenizer and the like are.
        config: its config.json.
        dtype: of the merged checkpoint.
        outtype: f16 or bf16.
        metadata: the content of the converter's `--metadata` file.
        converter: of `started_converter`.
        overflows: takes note of what does not fit `dtype`.

    Raises:
        UnstreamedError: an architecture that changes more of a matrix than its name and the order of its rows.
        SkeletonError: the converter refuses the checkpoint.
    """
    checkpoint, told, rows = folder / "checkpoint", folder / "metadata.json", folder / "rows.json"
    file = folder / "model.gguf"
    checkpoint.mkdir()
    copy_side_files(base, checkpoint, config=config, dtype=dtype)
    _write_checkpoint(checkpoint / WEIGHTS, tensors, dtype=dtype, overflows=overflows)
    write_json(told, metadata)
    words = [rows, checkpoint, "--outfile", file, "--outtype", outtype, "--metadata", told]
    converter.tell(json.dumps([str(word) for word in words]))
    try:
        converter.finish(output=file)
    except ProgramError as error:
        if error.status == skeleton_converter.UNSTREAMED:
            said = [line.strip() for line in str(error).splitlines() if skeleton_converter.REFUSAL in line]
            raise UnstreamedError(f"{base}: {said[-1]}") from error
        raise SkeletonError(f"{base} cannot be converted\n{error}") from error
    return _understand(read_gguf(file), read_json(rows), {tensor.name: tensor for tensor in tensors}, base=base)


def _understand(
    file: GgufFile, rows: Mapping[str, Mapping[str, Any]], tensors: Mapping[str, MergedTensor], *, base: Path
) -> Skeleton:
    matrices = {}
    for tensor in file.tensors:
        if (found := rows.get(tensor.name)) is None:
            continue
        source = tensors.get(found["source"])
        if source is None or source.shape != tensor.shape:
            raise UnstreamedError(f"{base}: {tensor.name} {skeleton_converter.REFUSAL}: made of {found['source']}")
        matrices[tensor.name] = Matrix(source, None if found["order"] is None else tuple(found["order"]))
    return Skeleton(file, matrices)


def _write_checkpoint(path: Path, tensors: Sequence[MergedTensor], *, dtype: str, overflows: Overflows) -> None:
    """One safetensors file with holes for all tensors of more than one dimension."""
    import torch

    stored = STORED[dtype]
    header = shard_header(tensors, dtype=stored)
    few = [tensor for tensor in tensors if len(tensor.shape) < 2]
    blocks = merged_blocks(few, dtype=getattr(torch, dtype), overflows=overflows, threads=1)
    with path.open("wb") as file:
        file.write(header)
        for tensor in tensors:
            if len(tensor.shape) < 2:
                left = tensor.values
                while left:
                    block = next(blocks)
                    file.write(block.contiguous().view(torch.uint8).numpy())
                    left -= block.numel()
            else:
                file.seek(tensor.values * BYTES_PER_VALUE[stored], os.SEEK_CUR)
        file.truncate(file.tell())
