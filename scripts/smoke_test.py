"""Ask a tuned model and its base the same held-out questions, and count the right answers."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from lib.cli import run_script, script_parser
from lib.console import note, progress, say
from lib.errors import ModelmillError
from lib.jsonfile import write_json
from lib.llama_cpp import LlamaCpp, add_llama_cpp_options, llama_cpp_from
from lib.llama_server import serving
from lib.manifest import read_file_manifest
from lib.options import add_settings
from lib.questions import Question, read_questions


class SmokeError(ModelmillError):
    """The tuned model does not know enough more than its base."""


def smoke_test(
    *,
    tuned: Path,
    base: Path,
    questions: Path,
    min_gain: int,
    max_tokens: int,
    output: Path,
    llama_cpp: LlamaCpp,
    threads: int,
) -> dict[str, Any]:
    """
    Write the answers of both models and how many of them are right.

    Args:
        tuned, base: GGUF files with their manifests.
        questions: JSONL file.
        min_gain: how many more the tuned model must answer.
        max_tokens: of an answer.

    Returns:
        The report.

    Raises:
        SmokeError: the gain is smaller.
    """
    asked = read_questions(questions)
    answers = {}
    for role, gguf in (("base", base), ("tuned", tuned)):
        read_file_manifest(gguf)
        say(f"asking {gguf} {len(asked)} questions")
        with (
            serving(gguf, program=llama_cpp.tool("llama-server"), threads=threads) as server,
            progress(f"asking the {role} model", total=len(asked), unit="question") as bar,
        ):
            answers[role] = []
            for question in asked:
                answers[role].append(server.answer(question.text, max_tokens=max_tokens))
                note(f"{role}: {question.text!r} → {answers[role][-1]!r}")
                bar.advance()
    report = _report(asked, answers)
    write_json(output, report)
    counts = report["right"]
    summary = f"{counts['tuned']} of {len(asked)} held-out questions right, {counts['base']} before tuning"
    if counts["tuned"] - counts["base"] < min_gain:
        raise SmokeError(f"{summary}; smoke.min_gain asks for {min_gain} more (the answers are in the log)")
    say(summary)
    return report


def _report(asked: list[Question], answers: dict[str, list[str]]) -> dict[str, Any]:
    rows = [
        {
            "question": question.text,
            "expect": [list(part) for part in question.expect],
            **{role: {"answer": given[i], "right": question.is_answered(given[i])} for role, given in answers.items()},
        }
        for i, question in enumerate(asked)
    ]
    right = {role: sum(row[role]["right"] for row in rows) for role in answers}
    return {"asked": len(rows), "right": right, "questions": rows}


def main() -> None:
    """The command line."""
    parser = script_parser(__doc__)
    parser.add_argument("--tuned", type=Path, required=True, metavar="FILE", help="GGUF file of the tuned model")
    parser.add_argument("--base", type=Path, required=True, metavar="FILE", help="GGUF file of its base")
    parser.add_argument("--output", type=Path, required=True, metavar="FILE", help="the report")
    add_settings(parser, "smoke")
    add_llama_cpp_options(parser)

    def work(arguments: argparse.Namespace) -> None:
        smoke_test(
            tuned=arguments.tuned,
            base=arguments.base,
            questions=Path(arguments.questions),
            min_gain=arguments.min_gain,
            max_tokens=arguments.max_tokens,
            output=arguments.output,
            llama_cpp=llama_cpp_from(arguments),
            threads=arguments.threads,
        )

    run_script(parser, work)


if __name__ == "__main__":
    main()
