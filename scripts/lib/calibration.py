"""The text that an importance matrix is computed from, as far as it can be judged without the model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lib.errors import ModelmillError
from lib.jsonfile import read_json
from lib.manifest import describe_file

CHUNK_TOKENS = 512  # llama-imatrix's default; written down here, since the matrix depends on it
LEAST_TOKENS = 2 * CHUNK_TOKENS  # llama-imatrix refuses fewer
ADDED_TOKENS = 2  # a tokenizer's start token and its space before the text; every other token is at least a byte
TRAINING = "training"  # in the place of a file's name: the training data, rendered by the chat template
MADE_OF = "training data"  # the text that scripts/render_data.py writes


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


def too_few_tokens(text: Path, tokens: int, *, rendered: bool) -> CalibrationError:
    """What is said of a text with too few tokens, with the remedy."""
    remedy = "give more training data, or set imatrix.text to a text file" if rendered else "give a longer one"
    least = f"{LEAST_TOKENS} (two chunks of {CHUNK_TOKENS}) are the least"
    return CalibrationError(f"{text} is too short: {tokens} tokens, and {least}; {remedy}")


def identify_text(text: Path, *, rendered: Path | None = None) -> dict[str, Any]:
    """
    Size in bytes and SHA-256 of a text; not its name, on which the matrix does not depend.

    Args:
        text: UTF-8 text.
        rendered: what scripts/render_data.py wrote down of it, if that made it; its `made_of` is then known as well.

    Raises:
        CalibrationError: empty, too short, no UTF-8, or not the text that was written down.
    """
    made = _made_of(text, rendered) if rendered else {}
    if problem := size_problem(text):
        raise CalibrationError(problem)
    try:
        with text.open(encoding="utf-8") as file:
            blank = not any(line.strip() for line in file)
    except UnicodeDecodeError as error:
        raise CalibrationError(f"{text} is no UTF-8 text: {error.reason}") from error
    if blank:
        raise CalibrationError(f"{text} is empty but for spaces and line ends")
    return {**describe_file(text), **made}


def _made_of(text: Path, rendered: Path) -> dict[str, str]:
    facts = describe_file(text)
    try:
        listed = read_json(rendered)["training"]
        found, tokens = listed["sha256"] == facts["sha256"], int(listed["tokens"])
    except (ValueError, KeyError, TypeError) as error:
        raise CalibrationError(f"{rendered} is not what render_data.py writes; run that again") from error
    if not found:
        raise CalibrationError(f"{text} is not the text that {rendered} is of; run render_data.py again")
    # Known before the model is: a matrix that cannot be computed is not to be found out after hours of training.
    if tokens + ADDED_TOKENS < LEAST_TOKENS:
        raise too_few_tokens(text, tokens, rendered=True)
    return {"made_of": MADE_OF}
