"""Reopening a GGUF file after it was written, and reading what it says of itself."""

from __future__ import annotations

import mmap
import struct
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lib.errors import ModelmillError

if TYPE_CHECKING:
    from gguf import GGUFReader


# Numbers of the metadata by their types in the file (ggml's docs/gguf.md), as struct names them.
NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
STRING, ARRAY = 8, 9


class GgufError(ModelmillError):
    """A GGUF file is damaged, incomplete or not what was asked for."""


def open_gguf(path: Path) -> GGUFReader:
    """
    Open a GGUF file and check that it is as long as its header implies.

    Raises:
        GgufError: not a GGUF file, cut off, or with a damaged header.
    """
    from gguf import GGUFReader

    with path.open("rb") as file:
        magic = file.read(4)
    if magic != b"GGUF":
        raise GgufError(f"{path} is no GGUF file: it begins with {magic!r}")

    class WithinFile(GGUFReader):
        """Refuses to read behind the end, where a damaged length would keep the plain reader busy for hours."""

        def _get(self, offset: int, dtype: Any, count: int = 1, override_order: Any = None) -> Any:
            values = super()._get(offset, dtype, count, override_order)
            if len(values) != count:
                raise ValueError(f"it ends before byte {offset + int(count) * values.itemsize}")
            return values

    try:
        reader = WithinFile(path)
    except (ValueError, IndexError, KeyError, OverflowError) as error:
        raise GgufError(f"{path} is cut off or damaged: {error}") from error
    end = max((tensor.data_offset + tensor.n_bytes for tensor in reader.tensors), default=0)
    size = path.stat().st_size
    if not reader.tensors or not end <= size < end + reader.alignment:
        raise GgufError(f"{path} is cut off or damaged: {size} bytes, its header implies {end}")
    return reader


def gguf_value(reader: GGUFReader, key: str) -> Any:
    """The value of a metadata key, or None."""
    field = reader.get_field(key)
    return None if field is None else field.contents()


def general_metadata(reader: GGUFReader, path: Path) -> dict[str, Any]:
    """
    Every `general.*` key of a file with its value.

    Raises:
        GgufError: a text that is no UTF-8, or an empty value.
    """
    keys = [key for key in reader.fields if key.startswith("general.")]
    try:
        return {key: gguf_value(reader, key) for key in keys}
    except (ValueError, IndexError) as error:
        raise GgufError(f"{path} has damaged metadata: {error}") from error


def token_text(reader: GGUFReader, token: int) -> str:
    """The text of one token, without reading all of them."""
    field = reader.get_field("tokenizer.ggml.tokens")
    if field is None:
        raise GgufError("the file has no tokenizer")
    return field.contents(token)


def put_last(path: Path, keys: Sequence[str]) -> None:
    """
    Move metadata keys behind all others, in place: the file's size, its tensors and all values stay as they are.

    Raises:
        GgufError: no whole GGUF file, or one that has not all of the keys.
    """
    reader = open_gguf(path)
    fields = [field for field in reader.fields.values() if not field.name.startswith("GGUF.")]
    if lacking := sorted(set(keys) - {field.name for field in fields}):
        raise GgufError(f"{path} has no {', '.join(lacking)}")
    starts = [int(field.offset) for field in fields]
    ends = [*starts[1:], int(reader.tensors[0].field.offset)]
    spans = {field.name: span for field, span in zip(fields, zip(starts, ends, strict=True), strict=True)}
    first = min(spans[key][0] for key in keys)
    order = [name for name in spans if spans[name][0] > first and name not in keys] + list(keys)
    with path.open("r+b") as file:
        file.seek(first)
        found = file.read(ends[-1] - first)
        file.seek(first)
        file.write(b"".join(found[start - first : end - first] for start, end in map(spans.__getitem__, order)))


def count_types(reader: GGUFReader) -> dict[str, int]:
    """How many tensors there are of each type, by llama.cpp's names of tensor types."""
    return dict(sorted(Counter(tensor.tensor_type.name for tensor in reader.tensors).items()))


def scan_metadata(path: Path) -> dict[str, Any]:
    """
    A file's metadata: numbers and strings as they are, of an array only its length.

    gguf's own reader makes several objects of every token, which takes minutes for 152,064 tokens on a busy machine.

    Raises:
        GgufError: no GGUF file, or cut off within its metadata.
    """
    if not path.stat().st_size:
        raise GgufError(f"{path} is cut off or damaged: it is empty")
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        try:
            magic, _, _, count = struct.unpack_from("<4sIQQ", data)
            if magic != b"GGUF":
                raise GgufError(f"{path} is no GGUF file: it begins with {magic!r}")
            found, offset = {}, 24
            for _ in range(count):
                key, offset = _string(data, offset)
                (kind,) = struct.unpack_from("<I", data, offset)
                found[key.decode()], offset = _value(data, offset + 4, kind)
        except (struct.error, KeyError, UnicodeDecodeError) as error:
            raise GgufError(f"{path} is cut off or damaged: {error}") from error
    return found


def _value(data: mmap.mmap, offset: int, kind: int) -> tuple[Any, int]:
    """A value, and where the next one begins."""
    if kind == STRING:
        text, offset = _string(data, offset)
        return text.decode(), offset
    if kind == ARRAY:
        kind, length = struct.unpack_from("<IQ", data, offset)
        offset += 12
        if kind == STRING:
            for _ in range(length):
                offset += 8 + struct.unpack_from("<Q", data, offset)[0]
            return length, offset
        return length, offset + length * struct.calcsize(f"<{NUMBERS[kind]}")
    (number,) = struct.unpack_from(f"<{NUMBERS[kind]}", data, offset)
    return number, offset + struct.calcsize(f"<{NUMBERS[kind]}")


def _string(data: mmap.mmap, offset: int) -> tuple[bytes, int]:
    (length,) = struct.unpack_from("<Q", data, offset)
    end = offset + 8 + length
    if end > len(data):
        raise struct.error(f"a string of {length} bytes ends behind the end of the file")
    return data[offset + 8 : end], end
