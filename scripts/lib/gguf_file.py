"""
A GGUF file's header: its metadata and its table of tensors, checked against the file's size.

Read here and not by gguf's own reader, which makes several objects of every token: 14 s for a vocabulary of 152,064,
where this takes 0.6 s, and a damaged length keeps it busy for hours.
"""

from __future__ import annotations

import math
import mmap
import struct
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lib.errors import ModelmillError

# Numbers of the metadata by their types in the file (ggml's docs/gguf.md), as struct names them.
NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
STRING, ARRAY = 8, 9
VERSIONS = (2, 3)
ALIGNMENT = 32  # where general.alignment says nothing else
MOST_DIMENSIONS = 4


class GgufError(ModelmillError):
    """A GGUF file is damaged, incomplete or not what was asked for."""


@dataclass(frozen=True)
class GgufTensor:
    """
    One tensor of a file.

    Attributes:
        shape: as torch has it, outermost first; the file lists it the other way round.
        type: llama.cpp's name of its type, as in "Q4_K".
        offset: of its bytes in the file.
        size: in bytes.
    """

    name: str
    shape: tuple[int, ...]
    type: str
    offset: int
    size: int

    @property
    def values(self) -> int:
        """Number of weights."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class GgufFile:
    """
    What a file says of itself.

    Attributes:
        metadata: key → value in the file's order, arrays as lists.
        tensors: in the file's order.
        places: key → where it begins and where its value ends, in bytes from the file's start.
    """

    path: Path
    metadata: dict[str, Any]
    tensors: list[GgufTensor]
    places: dict[str, tuple[int, int]]

    @property
    def architecture(self) -> str:
        """llama.cpp's name for the model's architecture."""
        return str(self.metadata.get("general.architecture", "unknown"))

    def tokenizer(self, key: str, default: Any = None) -> Any:
        """The value of `tokenizer.ggml.{key}`."""
        return self.metadata.get(f"tokenizer.ggml.{key}", default)


def read_gguf(path: Path, *, vocabulary_only: bool = False) -> GgufFile:
    """
    Read a file's header and check that the file is as long as it implies.

    Args:
        vocabulary_only: the file may be one without tensors.

    Raises:
        GgufError: not a GGUF file, cut off, or with a damaged header.
    """
    if not path.is_file():
        raise GgufError(f"{path}: no such file")
    size = path.stat().st_size
    if not size:
        raise GgufError(f"{path} is cut off or damaged: it is empty")
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        if data[:4] != b"GGUF":
            raise GgufError(f"{path} is no GGUF file: it begins with {data[:4]!r}")
        try:
            found, end = _read_header(path, _Cursor(data))
        except (struct.error, ValueError, KeyError) as error:
            raise GgufError(f"{path} is cut off or damaged: {error}") from error
    alignment = found.metadata.get("general.alignment", ALIGNMENT)
    whole = end <= size < end + alignment if found.tensors else vocabulary_only
    if not whole:
        raise GgufError(f"{path} is cut off or damaged: {size} bytes, its header implies {end}")
    return found


def row_bytes(kind: str, values: int) -> int:
    """Bytes of so many values in a type."""
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    block_values, block_bytes = GGML_QUANT_SIZES[GGMLQuantizationType[kind]]
    return values // block_values * block_bytes


def count_types(file: GgufFile) -> dict[str, int]:
    """How many tensors there are of each type, by llama.cpp's names of tensor types."""
    return dict(sorted(Counter(tensor.type for tensor in file.tensors).items()))


def check_same_tensors(made: GgufFile, source: GgufFile) -> None:
    """
    Raises:
        GgufError: a file does not have the tensors, by name and shape, of the one that it was made of.
    """
    found, expected = ({tensor.name: tensor.shape for tensor in file.tensors} for file in (made, source))
    unlike = sorted(name for name in {*found, *expected} if found.get(name) != expected.get(name))
    if unlike:
        name = unlike[0]
        raise GgufError(
            f"{made.path} does not have the tensors of {source.path}: {len(unlike)} differ, first {name}, "
            f"{found.get(name, 'missing')} instead of {expected.get(name, 'none')}"
        )


def put_last(path: Path, keys: Sequence[str]) -> None:
    """
    Move metadata keys behind all others, in place: the file's size, its tensors and all values stay as they are.

    Raises:
        GgufError: no whole GGUF file, or one that has not all of the keys.
    """
    places = read_gguf(path).places
    if lacking := sorted(set(keys) - places.keys()):
        raise GgufError(f"{path} has no {', '.join(lacking)}")
    first, end = min(places[key][0] for key in keys), max(stop for _, stop in places.values())
    order = [place for key, place in places.items() if place[0] > first and key not in keys]
    with path.open("r+b") as file:
        file.seek(first)
        held = file.read(end - first)
        file.seek(first)
        file.write(
            b"".join(held[start - first : stop - first] for start, stop in order + [places[key] for key in keys])
        )


class _Cursor:
    """Takes one value after another from a file, and refuses to go behind its end."""

    def __init__(self, data: mmap.mmap) -> None:
        self.data, self.offset = data, 4

    def numbers(self, kind: str, count: int = 1) -> tuple[Any, ...]:
        """`count` numbers of a kind that struct names."""
        length = count * struct.calcsize(f"<{kind}")
        return struct.unpack(f"<{count}{kind}", self._take(length))

    def text(self) -> str:
        (length,) = self.numbers("Q")
        return self._take(length).decode()

    def value(self, kind: int) -> Any:
        """A value of the metadata."""
        if kind == STRING:
            return self.text()
        if kind == ARRAY:
            kind, length = *self.numbers("I"), *self.numbers("Q")
            if kind == STRING:
                return [self.text() for _ in range(length)]
            return list(self.numbers(self._number(kind), length))
        return self.numbers(self._number(kind))[0]

    def _number(self, kind: int) -> str:
        if kind not in NUMBERS:
            raise ValueError(f"a value of type {kind}")
        return NUMBERS[kind]

    def _take(self, length: int) -> bytes:
        end = self.offset + length
        if end > len(self.data):
            raise ValueError(f"{length} bytes at byte {self.offset} end behind the end of the file")
        taken = self.data[self.offset : end]
        self.offset = end
        return taken


def _read_header(path: Path, cursor: _Cursor) -> tuple[GgufFile, int]:
    """The header, and where the last tensor ends."""
    version, tensor_count, key_count = *cursor.numbers("I"), *cursor.numbers("Q", 2)
    if version not in VERSIONS:
        raise ValueError(f"its version is {version}")
    metadata, places = {}, {}
    for _ in range(key_count):
        start = cursor.offset
        key = cursor.text()
        if key in metadata:
            raise ValueError(f"{key} stands in it twice")
        metadata[key] = cursor.value(*cursor.numbers("I"))
        places[key] = (start, cursor.offset)
    table = [_read_tensor(cursor) for _ in range(tensor_count)]
    alignment = metadata.get("general.alignment", ALIGNMENT)
    if not isinstance(alignment, int) or alignment < 1:
        raise ValueError(f"general.alignment is {alignment!r}")
    start = cursor.offset + -cursor.offset % alignment
    tensors = [GgufTensor(name, shape, kind, start + offset, size) for name, shape, kind, offset, size in table]
    if twice := [name for name, count in Counter(tensor.name for tensor in tensors).items() if count > 1]:
        raise ValueError(f"{twice[0]} stands in it twice")
    end = max((tensor.offset + tensor.size for tensor in tensors), default=start)
    return GgufFile(path, metadata, tensors, places), end


def _read_tensor(cursor: _Cursor) -> tuple[str, tuple[int, ...], str, int, int]:
    """A row of the table of tensors: name, shape, type, offset behind the header, bytes."""
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    name, (dimensions,) = cursor.text(), cursor.numbers("I")
    if dimensions > MOST_DIMENSIONS:
        raise ValueError(f"{name} has {dimensions} dimensions")
    shape = cursor.numbers("Q", dimensions)
    kind, offset = GGMLQuantizationType(*cursor.numbers("I")), *cursor.numbers("Q")
    block_values, block_bytes = GGML_QUANT_SIZES[kind]
    if dimensions and shape[0] % block_values:
        raise ValueError(f"{name} has rows of {shape[0]} values, and {kind.name} has blocks of {block_values}")
    return name, tuple(reversed(shape)), kind.name, offset, math.prod(shape) // block_values * block_bytes
