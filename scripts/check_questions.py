"""Check held-out questions before anything long starts, and write down which they are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lib.input_check import run_input_check
from lib.manifest import describe_file
from lib.questions import read_questions


def identify(questions: Path) -> tuple[dict[str, Any], str]:
    """
    Identity and number of the questions.

    Raises:
        DataError: the questions cannot be used.
    """
    count = len(read_questions(questions))
    return {"name": questions.name, "questions": count, **describe_file(questions)}, f"{count} questions"


if __name__ == "__main__":
    run_input_check(__doc__, "questions", what="JSONL file of questions", identify=identify)
