"""The text that an importance matrix is computed from, as far as it can be judged without the model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lib.errors import ModelmillError
from lib.manifest import describe_file

CHUNK_TOKENS = 512  # llama-imatrix's default; written down here, since the matrix depends on it
LEAST_TOKENS = 2 * CHUNK_TOKENS  # llama-imatrix refuses fewer
ADDED_TOKENS = 2  # a tokenizer's start token and its space before the text; every other token is at least a byte


class CalibrationError(ModelmillError):
    """A text that no importance matrix can be computed from."""


def size_problem(text: Path) -> str | None:
    """Why a text is too small whatever the tokenizer, judged by its size alone; None if it may do."""
    size = text.stat().st_size
    if size == 0:
        return f"{text} is empty"
    if size + ADDED_TOKENS < LEAST_TOKENS:
        return f"{text} is too short: {size} bytes, and {LEAST_TOKENS} tokens (two chunks) are the least"
    return None


def identify_text(text: Path) -> dict[str, Any]:
    """
    Size in bytes and SHA-256 of a text; not its name, on which the matrix does not depend.

    Raises:
        CalibrationError: empty, too short, or no UTF-8.
    """
    if problem := size_problem(text):
        raise CalibrationError(problem)
    try:
        with text.open(encoding="utf-8") as file:
            blank = not any(line.strip() for line in file)
    except UnicodeDecodeError as error:
        raise CalibrationError(f"{text} is no UTF-8 text: {error.reason}") from error
    if blank:
        raise CalibrationError(f"{text} is empty but for spaces and line ends")
    return describe_file(text)
