"""Check the text of an importance matrix before anything long starts, and write down which it is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lib.calibration import identify_text
from lib.input_check import run_input_check


def identify(text: Path) -> tuple[dict[str, Any], str]:
    """
    Identity and size of the text.

    Raises:
        CalibrationError: the text cannot be used.
    """
    identity = identify_text(text)
    return identity, f"{identity['size']} bytes of text"


if __name__ == "__main__":
    run_input_check(__doc__, "text", what="the text", identify=identify)
