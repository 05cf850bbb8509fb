"""Which files are documents that questions are answered from."""

from __future__ import annotations

import os
from pathlib import Path

ENDINGS = (".md", ".txt")


def document_files(folder: Path) -> list[Path]:
    """The documents of a folder and of those in it, in the order of their names."""
    files = folder.rglob("*") if os.path.isdir(folder) else []
    return sorted(file for file in files if file.suffix.lower() in ENDINGS and file.is_file())
