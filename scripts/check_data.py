"""Check training data and write down which they are, before anything long starts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lib.dataset import read_examples
from lib.input_check import run_input_check
from lib.manifest import describe_file


def identify(data: Path) -> tuple[dict[str, Any], str]:
    """
    Identity and number of the examples.

    Raises:
        DataError: the data cannot be used.
    """
    count = len(read_examples(data))
    return {"name": data.name, "examples": count, **describe_file(data)}, f"{count} examples"


if __name__ == "__main__":
    run_input_check(__doc__, "data", what="JSONL file of training data", identify=identify)
