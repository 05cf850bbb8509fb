"""Reopening a GGUF file after it was written, and reading what it says of itself."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lib.errors import ModelmillError

if TYPE_CHECKING:
    from gguf import GGUFReader


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
    try:
        reader = GGUFReader(path)
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
