"""Check documents and the questions about them before anything long starts, and write down which they are."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from lib.cli import run_script, script_parser
from lib.config import definition
from lib.console import say
from lib.documents import document_files
from lib.jsonfile import write_json
from lib.manifest import describe_file, describe_files
from lib.passages import PassageIndex, read_passages
from lib.questions import read_questions


def check_documents(*, documents: Path, questions: Path, passage_characters: int, output: Path) -> dict[str, Any]:
    """
    Write the identity of the questions and of every document.

    Raises:
        DocumentError, DataError: they cannot be used.
    """
    passages = read_passages(documents, longest=passage_characters)
    PassageIndex(passages)
    asked = read_questions(questions)
    names = [file.relative_to(documents).as_posix() for file in document_files(documents)]
    identity = {
        "questions": {"name": questions.name, **describe_file(questions)},
        "documents": describe_files(documents, names, threads=1),
    }
    write_json(output, identity)
    say(f"{documents}: {len(names)} documents, {len(passages)} passages; {questions}: {len(asked)} questions")
    return identity


def main() -> None:
    """The command line."""
    rules = definition("rag")["properties"]
    parser = script_parser(__doc__)
    for name in ("documents", "questions"):
        parser.add_argument(f"--{name}", type=Path, required=True, help=rules[name]["description"])
    parser.add_argument(
        "--passage-characters",
        type=int,
        default=rules["passage_characters"]["default"],
        metavar="N",
        help=rules["passage_characters"]["description"],
    )
    parser.add_argument("--output", type=Path, required=True, metavar="FILE", help="where their identity is written")

    def work(arguments: argparse.Namespace) -> None:
        check_documents(
            documents=arguments.documents,
            questions=arguments.questions,
            passage_characters=arguments.passage_characters,
            output=arguments.output,
        )

    run_script(parser, work)


if __name__ == "__main__":
    main()
