"""Check held-out questions before anything long starts, and write down which they are."""

from __future__ import annotations

import argparse
from pathlib import Path

from lib.cli import run_script, script_parser
from lib.console import say
from lib.jsonfile import write_json
from lib.manifest import describe_file
from lib.questions import read_questions


def check_questions(*, questions: Path, output: Path) -> None:
    """
    Write the questions' identity and number to `output`.

    Raises:
        DataError: the questions cannot be used.
    """
    asked = read_questions(questions)
    write_json(output, {"name": questions.name, "questions": len(asked), **describe_file(questions)})
    say(f"{questions}: {len(asked)} questions")


def main() -> None:
    """The command line."""
    parser = script_parser(__doc__)
    parser.add_argument("--questions", type=Path, required=True, metavar="FILE", help="JSONL file of questions")
    parser.add_argument("--output", type=Path, required=True, metavar="FILE", help="where its identity is written")

    def work(arguments: argparse.Namespace) -> None:
        check_questions(questions=arguments.questions, output=arguments.output)

    run_script(parser, work)


if __name__ == "__main__":
    main()
