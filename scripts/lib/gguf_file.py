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


def count_types(reader: GGUFReader) -> dict[str, int]:
    """How many tensors there are of each type, by llama.cpp's names of tensor types."""
    return dict(sorted(Counter(tensor.tensor_type.name for tensor in reader.tensors).items()))
