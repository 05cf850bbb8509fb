"""Reopening a GGUF file after it was written, and reading what it says of itself."""

from __future__ import annotations

from collections import Counter
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


def count_types(reader: GGUFReader) -> dict[str, int]:
    """How many tensors there are of each type, by llama.cpp's names of tensor types."""
    return dict(sorted(Counter(tensor.tensor_type.name for tensor in reader.tensors).items()))
