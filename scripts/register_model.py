"""Register a GGUF file in a running Ollama server, and ask the model there what it should know."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lib.checkpoint import license_of
from lib.cli import run_script, script_parser
from lib.config import definition
from lib.console import note, progress, say
from lib.errors import ModelmillError
from lib.gguf_file import read_gguf
from lib.jsonfile import read_json, write_json
from lib.manifest import read_file_manifest
from lib.ollama_server import OllamaError, OllamaServer, refuse_full_disk, weights_name
from lib.options import add_json_setting, add_setting
from lib.questions import Question, read_questions

# Keys of a GGUF that tell what it was made from; the type may be told otherwise by another version.
TOLD = ("general.architecture", "general.description", "general.base_model.", "general.dataset.")
GREETING = Question("Hello! Who are you?", ())  # where no questions are configured


class ChatReportError(ModelmillError):
    """What is known of the chat template cannot be read."""


def register_model(
    *,
    gguf: Path,
    chat: Path,
    tokenizer: Path,
    name: str,
    system: str | None,
    messages: Sequence[Mapping[str, str]],
    parameters: Mapping[str, Any],
    questions: Path | None,
    max_tokens: int,
    output: Path,
) -> dict[str, Any]:
    """
    Register a model, and write what the server says of it and what it answers.

    Weights are registered once, as `{name}:w-{digest}`; what a user talks to is made from that, so that another system
    prompt or parameter sends nothing again.

    Args:
        gguf: the weights, with their manifest.
        chat: what render_modelfile.py found out about the chat template.
        tokenizer: the checkpoint that the weights come from, for its licence.
        name: in Ollama, as in "demo" or "someone/demo:short".
        system, messages, parameters: as in a Modelfile; no character is dropped here.
        questions: held-out questions; None asks for no more than an answer.
        max_tokens: of an answer.
        output: the receipt.

    Returns:
        The receipt.

    Raises:
        ManifestError: the weights are not whole.
        ChatReportError: `chat` is no such report.
        OllamaError: no server, it refuses, its weights are others, or the model says nothing.
    """
    sha256 = read_file_manifest(gguf)["sha256"]
    asked = [GREETING] if questions is None else read_questions(questions)
    template, stops = _read_chat(chat)
    output.parent.mkdir(parents=True, exist_ok=True)
    output.unlink(missing_ok=True)
    server = OllamaServer()
    version = server.version()
    weights = weights_name(name, sha256)
    say(f"registering {gguf} as {name} with Ollama {version} at {server.url}")
    _provide_weights(server, weights, gguf, sha256)
    server.create(
        name,
        source=weights,
        template=template,
        system=system,
        parameters={**parameters, "stop": list(dict.fromkeys([*stops, *parameters.get("stop", [])]))},
        messages=messages,
        license_text=license_of(tokenizer),
    )
    layer = server.weights_of(name)
    _compare(server, name, gguf, sha256=sha256, layer=layer)
    answers = _ask(server, name, asked, max_tokens=max_tokens)
    receipt = {
        "name": name,
        "weights": {"name": weights, "sha256": sha256, "layer": layer, "rewritten": layer != sha256},
        "server": {"version": version},
        "asked": len(answers),
        "right": None if questions is None else sum(each["right"] for each in answers),
        "tokens_per_second": _rate(sum(each["tokens"] for each in answers), sum(each["seconds"] for each in answers)),
        "answers": answers,
    }
    write_json(output, receipt)
    right = "" if questions is None else f", {receipt['right']} of {len(answers)} questions right"
    say(f"{name} answers{right}, {receipt['tokens_per_second']} tokens/s; talk to it: ollama run {name}")
    return receipt


def _read_chat(path: Path) -> tuple[str | None, list[str]]:
    """
    Ollama's template and the texts that end an answer.

    Raises:
        ChatReportError: no report of render_modelfile.py.
    """
    try:
        found = read_json(path)
        template, stops = found["template"]["text"], found["stops"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ChatReportError(f"{path} is no report of render_modelfile.py: {error!r}") from error
    if not isinstance(template, str | None) or not isinstance(stops, list):
        raise ChatReportError(f"{path} is no report of render_modelfile.py: template or stops are of another form")
    return template, stops


def _provide_weights(server: OllamaServer, name: str, gguf: Path, sha256: str) -> None:
    if server.weights_of(name) is not None:
        say(f"the server has the weights already, as {name}")
        return
    has_blob = server.has_blob(sha256)
    if server.is_local:
        refuse_full_disk(gguf.stat().st_size, has_blob=has_blob)
    if has_blob:
        say("the server has the file already")
    else:
        server.upload(gguf, sha256)
    say("the server takes the file in; a large one takes it minutes")
    server.create(name, files={gguf.name: f"sha256:{sha256}"})


def _compare(server: OllamaServer, name: str, gguf: Path, *, sha256: str, layer: str | None) -> None:
    """
    Hold the server's weights against the file.

    Some versions write a file anew; the digests in its metadata then still tell which model it is. The name is none of
    them: the server keeps that to itself.

    Raises:
        OllamaError: they are of another model.
    """
    if layer == sha256:
        return
    shown, metadata = server.metadata_of(name), read_gguf(gguf).metadata
    ours = {key: value for key, value in metadata.items() if key.startswith(TOLD)}
    other = sorted(key for key, value in ours.items() if shown.get(key) != value)
    if layer is None or other or not ours:
        raise OllamaError(
            f"{name} at {server.url} has other weights than {gguf}: sha256 {layer}, expected {sha256}; they differ in "
            f"{', '.join(other) or 'all'}"
        )
    say(f"the server has written {gguf.name} anew, as sha256 {layer}; its metadata are the same")


def _ask(server: OllamaServer, name: str, questions: Sequence[Question], *, max_tokens: int) -> list[dict[str, Any]]:
    """
    Raises:
        OllamaError: the model says nothing at all.
    """
    answers = []
    with progress(f"asking {name}", total=len(questions), unit="question") as bar:
        for question in questions:
            said = server.answer(question.text, model=name, max_tokens=max_tokens)
            note(f"{question.text!r} → {said.text!r}")
            answers.append(
                {
                    "question": question.text,
                    "expect": [list(part) for part in question.expect],
                    "answer": said.text,
                    "reasoning": said.reasoning,
                    "right": question.is_answered(said.text),
                    "tokens": said.tokens,
                    "seconds": round(said.seconds, 3),
                    "tokens_per_second": _rate(said.tokens, said.seconds),
                }
            )
            bar.advance()
    if not any(each["answer"].strip() or each["reasoning"].strip() for each in answers):
        raise OllamaError(f"{name} is registered, but answers nothing: {answers[0]['question']!r} → ''")
    return answers


def _rate(tokens: int, seconds: float) -> float | None:
    return round(tokens / seconds, 1) if seconds else None


def main() -> None:
    """The command line."""
    parser = script_parser(__doc__)
    parser.add_argument("--gguf", type=Path, required=True, metavar="FILE", help="the weights")
    parser.add_argument("--chat", type=Path, required=True, metavar="FILE", help="the report of render_modelfile.py")
    parser.add_argument("--tokenizer", type=Path, required=True, metavar="DIR", help="the base, for its licence")
    add_setting(parser, "ollama", "name", required=True)
    parser.add_argument("--system", metavar="TEXT", help="system prompt")
    for name in ("messages", "parameters"):
        add_json_setting(parser, name, definition("ollama")["properties"][name])
    parser.add_argument("--questions", type=Path, metavar="FILE", help="held-out questions, JSONL")
    parser.add_argument("--max-tokens", type=int, default=64, metavar="N", help="longest answer in tokens")
    parser.add_argument("--output", type=Path, required=True, metavar="FILE", help="the receipt")

    def work(arguments: argparse.Namespace) -> None:
        register_model(
            gguf=arguments.gguf,
            chat=arguments.chat,
            tokenizer=arguments.tokenizer,
            name=arguments.name,
            system=arguments.system,
            messages=arguments.messages,
            parameters=arguments.parameters,
            questions=arguments.questions,
            max_tokens=arguments.max_tokens,
            output=arguments.output,
        )

    run_script(parser, work)


if __name__ == "__main__":
    main()
