"""Ask a model questions with and without passages of documents, and count the right answers."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lib.cli import run_script, script_parser
from lib.config import definition
from lib.console import note, progress, say
from lib.errors import ModelmillError
from lib.jsonfile import write_json
from lib.llama_cpp import LlamaCpp, add_llama_cpp_options, llama_cpp_from
from lib.llama_server import serving
from lib.manifest import read_file_manifest
from lib.ollama_server import OllamaError, OllamaServer, weights_name
from lib.options import add_json_setting, add_setting, add_settings
from lib.passages import HEADING, Passage, PassageIndex, read_passages
from lib.questions import Question, read_questions

QUESTION_TOKENS = 512  # of a question, the prompt around it and what is said before it
LEAST_CONTEXT = 2048

Ask = Callable[[str], str]


class RagError(ModelmillError):
    """The passages help less than they have to."""


def answer_from_documents(
    *,
    gguf: Path,
    name: str | None,
    system: str | None,
    messages: Sequence[Mapping[str, str]],
    documents: Path,
    questions: Path,
    passages: int,
    passage_characters: int,
    prompt: str,
    max_tokens: int,
    min_gain: int,
    output: Path,
    llama_cpp: LlamaCpp,
    threads: int,
) -> dict[str, Any]:
    """
    Write the answers with their sources, and how many are right with and without the passages.

    Args:
        gguf: the model, with its manifest.
        name: in Ollama; where a server has these weights under that name it answers, else llama.cpp.
        system, messages: what is said before each question, for llama.cpp; a registered model brings its own.
        documents: folder of texts.
        questions: JSONL file.
        passages: how many go with a question.
        passage_characters: of the longest passage.
        prompt: with {passages} and {question} in it.
        max_tokens: of an answer.
        min_gain: how many more questions have to be answered with passages.

    Returns:
        The report.

    Raises:
        RagError: the gain is smaller.
    """
    asked = read_questions(questions)
    index = PassageIndex(read_passages(documents, longest=passage_characters))
    sha256 = read_file_manifest(gguf)["sha256"]
    rows = []
    before = [{"role": "system", "content": system}] if system else []
    # A character of a writing without spaces can be more than one token.
    held = 2 * (passages * (passage_characters + HEADING) + sum(len(each["content"]) for each in (*before, *messages)))
    context = max(LEAST_CONTEXT, held + QUESTION_TOKENS + max_tokens)
    if (server := _server_with(name, sha256)) is not None:
        answering = _asking_ollama(server, name or "", max_tokens=max_tokens, context=context)
    else:
        program = llama_cpp.tool("llama-server")
        answering = _asking_llama_cpp(
            gguf, [*before, *messages], program=program, max_tokens=max_tokens, context=context, threads=threads
        )
    by = "llama.cpp" if server is None else "Ollama"
    with answering as ask, progress("answering from documents", total=len(asked), unit="question") as bar:
        say(f"asking {len(asked)} questions, with and without passages of {documents}, of {gguf} in {by}")
        for question in asked:
            found = index.find(question.text, count=passages)
            answers = {"without": ask(question.text), "with": ask(_fill(prompt, question.text, found))}
            note(f"{question.text!r} → {answers}")
            rows.append(_row(question, found, answers))
            bar.advance()
    right = {way: sum(row[way]["right"] for row in rows) for way in ("with", "without")}
    found_in = sum(row["found"] for row in rows)
    report = {"answered_by": by, "asked": len(rows), "found": found_in, "right": right, "questions": rows}
    write_json(output, report)
    summary = (
        f"{right['with']} of {len(rows)} questions right with passages, {right['without']} without; "
        f"the passages hold the answer to {found_in}"
    )
    if right["with"] - right["without"] < min_gain:
        raise RagError(f"{summary}; rag.min_gain asks for {min_gain} more (the answers are in the log)")
    say(summary)
    return report


@contextmanager
def _asking_ollama(server: OllamaServer, name: str, *, max_tokens: int, context: int) -> Iterator[Ask]:
    yield lambda text: server.answer(text, model=name, max_tokens=max_tokens, context=context).text


@contextmanager
def _asking_llama_cpp(
    gguf: Path, before: Sequence[Mapping[str, str]], *, program: Path, max_tokens: int, context: int, threads: int
) -> Iterator[Ask]:
    with serving(gguf, program=program, threads=threads, context=context) as server:
        yield lambda text: server.answer(text, max_tokens=max_tokens, before=before)


def _server_with(name: str | None, sha256: str) -> OllamaServer | None:
    """A server that has these weights under that name, perhaps written anew when they were registered."""
    if name is None:
        return None
    try:
        server = OllamaServer()
        server.version()
        held = server.weights_of(name)
        if held is not None and held in (sha256, server.weights_of(weights_name(name, sha256))):
            return server
    except OllamaError as error:
        note(str(error))
        return None
    say(f"the server at {server.url} does not have these weights as {name}; llama.cpp answers instead")
    return None


def _fill(prompt: str, question: str, found: list[Passage]) -> str:
    # Not by format(), which would stumble over the braces of a passage.
    texts = "\n\n".join(f"{each.heading}\n{each.text}" if each.heading else each.text for each in found)
    before, _, after = prompt.partition("{passages}")
    return f"{before.replace('{question}', question)}{texts}{after.replace('{question}', question)}"


def _row(question: Question, found: list[Passage], answers: dict[str, str]) -> dict[str, Any]:
    return {
        "question": question.text,
        "expect": [list(part) for part in question.expect],
        "passages": [{"source": each.source, "heading": each.heading, "text": each.text} for each in found],
        "found": question.is_answered("\n".join(f"{each.heading}\n{each.text}" for each in found)),
        **{way: {"answer": text, "right": question.is_answered(text)} for way, text in answers.items()},
    }


def main() -> None:
    """The command line."""
    parser = script_parser(__doc__)
    parser.add_argument("--gguf", type=Path, required=True, metavar="FILE", help="the model")
    add_setting(parser, "ollama", "name")
    parser.add_argument("--system", metavar="TEXT", help="system prompt, where llama.cpp answers")
    add_json_setting(parser, "messages", definition("ollama")["properties"]["messages"])
    parser.add_argument("--output", type=Path, required=True, metavar="FILE", help="the report")
    add_settings(parser, "rag")
    add_llama_cpp_options(parser)

    def work(arguments: argparse.Namespace) -> None:
        answer_from_documents(
            gguf=arguments.gguf,
            name=arguments.name,
            system=arguments.system,
            messages=arguments.messages,
            documents=Path(arguments.documents),
            questions=Path(arguments.questions),
            passages=arguments.passages,
            passage_characters=arguments.passage_characters,
            prompt=arguments.prompt,
            max_tokens=arguments.max_tokens,
            min_gain=arguments.min_gain,
            output=arguments.output,
            llama_cpp=llama_cpp_from(arguments),
            threads=arguments.threads,
        )

    run_script(parser, work)


if __name__ == "__main__":
    main()
