"""
What llama-quantize would make of a 16-bit GGUF file: its types, tensor by tensor, and all that stands before them.

Which type each tensor gets is llama-quantize's own decision, asked for by a dry run, which reads the header alone.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from lib.gguf_file import ALIGNMENT, STRING, GgufError, GgufFile, GgufTensor, row_bytes
from lib.imatrix import NAME as IMATRIX_NAME
from lib.llama_cpp import LlamaCpp
from lib.outputs import scratch_beside
from lib.process import run_program

# Where llama-quantize puts these when it reads a file and writes it again.
LAST_KEYS = ("general.quantization_version", "general.file_type")
UINT32 = 4
# "[  3/ 26] blk.0.attn_k.weight - [ 64, 32, 1, 1], type =  f16, size = 0.00 MiB -> 0.00 MiB (q4_K)"
DECISION = re.compile(r"\[ *\d+/ *\d+\] (\S+) +- \[.*\], type = +(\w+), size = .*? MiB(?: -> .* MiB \((\w+)\))?$")


@dataclass(frozen=True)
class QuantizedGguf:
    """
    Attributes:
        header: all that stands before the tensors.
        tensors: in the file's order, with their places in it.
    """

    header: bytes
    tensors: Sequence[GgufTensor]


def plan_quantized(
    source: GgufFile,
    quant: str,
    *,
    options: Sequence[str],
    imatrix: Path | None,
    added: Mapping[str, str | int],
    llama_cpp: LlamaCpp,
) -> QuantizedGguf:
    """
    Plan a quantized file as llama-quantize would write it, and COPY leave it.

    Args:
        source: the 16-bit file; of its tensors only names, shapes and types count.
        quant: one of llama.cpp's types, in lower case.
        options: of llama-quantize.
        imatrix: the importance matrix, which has a say in the types.
        added: metadata of that matrix.

    Raises:
        ProgramError: llama-quantize refuses.
    """
    types = _decide(source, quant, options=options, imatrix=imatrix, llama_cpp=llama_cpp)
    shapes = {tensor.name: tensor.shape for tensor in source.tensors}
    if types.keys() != shapes.keys():
        lost = sorted(types.keys() ^ shapes.keys())
        raise GgufError(f"llama-quantize told no type of {lost[0]}, or of a tensor that is not there")
    table, place = [], 0
    for name, kind in types.items():
        rows = 1
        for length in shapes[name][:-1]:
            rows *= length
        size = rows * row_bytes(kind, shapes[name][-1])
        table.append(GgufTensor(name, shapes[name], kind, place, size))
        place += padded(size)
    header = _header(source, quant, table, added)
    tensors = [GgufTensor(each.name, each.shape, each.type, len(header) + each.offset, each.size) for each in table]
    return QuantizedGguf(header, tensors)


def padded(size: int) -> int:
    """Bytes up to where the next tensor begins."""
    return size + -size % ALIGNMENT


def _decide(
    source: GgufFile, quant: str, *, options: Sequence[str], imatrix: Path | None, llama_cpp: LlamaCpp
) -> dict[str, str]:
    """Each tensor's type, by ggml's names in the order of the quantized file."""
    types: dict[str, str] = {}

    def follow(line: str) -> None:
        if found := DECISION.match(line):
            types[found[1]] = (found[3] or found[2]).upper()

    with scratch_beside(source.path) as folder:
        words = [llama_cpp.tool("llama-quantize").absolute(), "--dry-run", *options]
        if imatrix is not None:
            (folder / IMATRIX_NAME).symlink_to(imatrix.absolute())
            words += ["--imatrix", IMATRIX_NAME]
        run_program([*words, source.path.absolute(), quant.upper()], follow=follow, folder=folder)
    return types


def _header(source: GgufFile, quant: str, table: Sequence[GgufTensor], added: Mapping[str, str | int]) -> bytes:
    """Metadata as in the source, what is added, and the keys that come last; then the table of tensors."""
    from gguf import GGML_QUANT_VERSION, GGMLQuantizationType, LlamaFileType

    if source.metadata.get("general.alignment", ALIGNMENT) != ALIGNMENT:
        raise GgufError(f"{source.path} has an alignment of its own, which llama-quantize does not keep")
    with source.path.open("rb") as file:
        kept = []
        for key, (start, stop) in source.places.items():
            if key not in LAST_KEYS:
                file.seek(start)
                kept.append(file.read(stop - start))
    last = {LAST_KEYS[0]: GGML_QUANT_VERSION, LAST_KEYS[1]: int(LlamaFileType[f"MOSTLY_{quant.upper()}"])}
    pairs = [*kept, *(_pair(key, value) for key, value in {**added, **last}.items())]
    rows = []
    for tensor in table:
        lengths = list(reversed(tensor.shape))
        while len(lengths) > 1 and lengths[-1] == 1:
            lengths.pop()
        rows.append(
            _text(tensor.name)
            + struct.pack("<I", len(lengths))
            + struct.pack(f"<{len(lengths)}Q", *lengths)
            + struct.pack("<IQ", GGMLQuantizationType[tensor.type], tensor.offset)
        )
    header = b"".join([b"GGUF", struct.pack("<IQQ", 3, len(table), len(pairs)), *pairs, *rows])
    return header + bytes(-len(header) % ALIGNMENT)


def _pair(key: str, value: str | int) -> bytes:
    if isinstance(value, str):
        return _text(key) + struct.pack("<I", STRING) + _text(value)
    return _text(key) + struct.pack("<II", UINT32, value)


def _text(text: str) -> bytes:
    data = text.encode()
    return struct.pack("<Q", len(data)) + data
