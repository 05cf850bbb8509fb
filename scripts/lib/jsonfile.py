"""JSON that is the same bytes for the same content, written so that a reader never sees half of it."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any


def dump_json(value: Any) -> str:
    """Render with sorted keys, two spaces and a final newline; non-ASCII text stays readable."""
    return json.dumps(value, ensure_ascii=False, indent=2, sort_keys=True, allow_nan=False) + "\n"


def write_json(path: Path, value: Any) -> None:
    """Write through a temporary name beside `path`, then rename."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(dump_json(value), encoding="utf-8")
    os.replace(partial, path)


def read_json(path: Path) -> Any:
    """Parse the file; a decoding error carries the path."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is no valid JSON: {error}") from error


def digest_json(value: Any) -> str:
    """SHA-256 of the value's canonical rendering, in hex."""
    return hashlib.sha256(dump_json(value).encode()).hexdigest()
