"""Tokenizers of published models, kept here compressed: only their vocabularies have llama.cpp's known hashes."""

from __future__ import annotations

import lzma
import shutil
from pathlib import Path

# DeepSeek-R1-Distill-Qwen's (MIT licence): `deepseek-r1-qwen` to llama.cpp, 151,665 tokens.
R1_DISTILL_QWEN = Path(__file__).parent / "tokenizers/deepseek-r1-distill-qwen"


def write_tokenizer(source: Path, folder: Path) -> Path:
    """Put a tokenizer's files into `folder`, as they were published."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.json").write_bytes(lzma.decompress((source / "tokenizer.json.xz").read_bytes()))
    shutil.copy(source / "tokenizer_config.json", folder)
    return folder
