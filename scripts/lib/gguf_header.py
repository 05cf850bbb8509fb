"""The header of a GGUF file that is to be imported: its metadata and its table of tensors, as plain values."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lib.errors import ModelmillError, first_line

# What gguf and transformers raise over a file that is damaged, or not of a kind they know.
BAD_FILE = (
    ValueError, KeyError, IndexError, TypeError, AttributeError, NotImplementedError, RuntimeError, OSError
)  # fmt: skip


class GgufImportError(ModelmillError):
    """A GGUF file that cannot be turned into a checkpoint without loss."""


@dataclass(frozen=True)
class GgufHeader:
    """
    A GGUF file's header.

    Attributes:
        path: the file.
        metadata: key → value, arrays as lists.
        elements: tensor name → number of weights.
    """

    path: Path
    metadata: dict[str, Any]
    elements: dict[str, int]

    @property
    def architecture(self) -> str:
        """llama.cpp's name for the model's architecture."""
        return str(self.metadata.get("general.architecture", "unknown"))

    def tokenizer(self, key: str, default: Any = None) -> Any:
        """The value of `tokenizer.ggml.{key}`."""
        return self.metadata.get(f"tokenizer.ggml.{key}", default)


def read_header(*, gguf: Path) -> GgufHeader:
    """
    Read a file's metadata and tensor table, and see that no tensor ends behind the end of the file.

    Raises:
        GgufImportError: no such file, not a whole GGUF, or only a part of a model.
    """
    from gguf import GGUFReader

    if not gguf.is_file():
        raise GgufImportError(f"{gguf}: no such file")
    with gguf.open("rb") as file:
        magic = file.read(4)
    if magic != b"GGUF":
        raise GgufImportError(f"{gguf}: not a GGUF file: it starts with {magic!r}, not b'GGUF'")
    try:
        reader = GGUFReader(gguf)
        metadata = {key: field.contents() for key, field in reader.fields.items()}
        elements = {tensor.name: int(tensor.n_elements) for tensor in reader.tensors}
    except BAD_FILE as error:
        raise GgufImportError(
            f"{gguf}: the GGUF file is cut short or damaged ({first_line(error)}); fetch it again"
        ) from error
    parts = metadata.get("split.count", 1)
    if parts > 1:
        raise GgufImportError(f"{gguf}: one of {parts} parts; join them first, with llama-gguf-split --merge")
    return GgufHeader(path=gguf, metadata=metadata, elements=elements)
