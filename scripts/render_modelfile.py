"""Write the Ollama Modelfile of a GGUF file, and check that a conversation is served as the model was trained on it."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lib.chat import understand_chat
from lib.chat_jinja import chat_template_of
from lib.checkpoint import license_of
from lib.cli import run_script, script_parser
from lib.config import definition
from lib.console import say
from lib.gguf_file import read_gguf
from lib.jsonfile import write_json
from lib.llama_cpp import LlamaCpp, add_llama_cpp_options, llama_cpp_from
from lib.llama_server import serving
from lib.modelfile import ModelfileError, dropped, kept, render_modelfile, unheld
from lib.options import add_json_setting
from lib.outputs import finished_file

CONTEXT = 512  # tokens; nothing is answered


def write_modelfile(
    *,
    gguf: Path,
    adapter: Path | None = None,
    tokenizer: Path,
    system: str | None,
    messages: Sequence[Mapping[str, str]],
    parameters: Mapping[str, Any],
    output: Path,
    report: Path,
    llama_cpp: LlamaCpp,
    threads: int,
) -> None:
    """
    Write a Modelfile beside its weights, and what became of each probe conversation.

    Args:
        gguf: the weights, in the folder of `output`.
        adapter: a GGUF adapter for them, in the same folder.
        tokenizer: folder of the checkpoint whose tokenizer the model was trained with.
        system, messages, parameters: see lib.modelfile.render_modelfile.
        report: JSON file.

    Raises:
        ModelfileError: no chat template in the file, or a text that a Modelfile cannot hold.
        ParityError: a conversation becomes other tokens than in training.
    """
    for file in (gguf, *([adapter] if adapter else [])):
        if file.resolve().parent != output.resolve().parent:
            raise ModelfileError(f"{output} has to lie beside {file}, so that both can be moved together")
        if dropped(file.name) or file.name != file.name.strip(' "'):
            raise ModelfileError(f"{file}: Ollama would look for a file of another name; rename it")
    weights = read_gguf(gguf)
    if chat_template_of(weights) is None:
        raise ModelfileError(f"{gguf} has no chat template: nobody could talk to it as it was trained")
    program = llama_cpp.tool("llama-server")
    with serving(gguf, program=program, threads=threads, context=CONTEXT, answering=False) as server:
        chat = understand_chat(weights, server, tokenizer=tokenizer, system=None if system is None else kept(system))
    if chat.refuses_system and system is not None:
        raise ModelfileError("ollama.system: the model's chat template refuses a system message; leave it out")
    told = [("ollama.system", system or ""), *(("ollama.messages", each["content"]) for each in messages)]
    for name, said in told:
        if lost := dropped(said):
            say(f"{name}: Ollama drops {lost} from a Modelfile; spaces among them are plain ones there: {said[:60]!r}")
    text = render_modelfile(
        gguf_name=gguf.name,
        adapter_name=adapter.name if adapter else None,
        template=chat.template,
        system=system,
        messages=messages,
        parameters=parameters,
        stops=chat.stops,
        license_text=_license_of(tokenizer),
    )
    with finished_file(output) as partial:
        partial.write_text(text, encoding="utf-8")
    write_json(report, chat.report)
    served = "so they are by its TEMPLATE" if chat.template else f"there is no TEMPLATE, since {chat.reason}"
    tried = sum("tokens" in each for each in chat.report["conversations"].values())
    say(f"wrote {output}: {tried} kinds of conversations are served as trained; {served}")


def _license_of(checkpoint: Path) -> str | None:
    """The text of a checkpoint's licence; None if there is none, or one that a Modelfile cannot hold."""
    text = kept(license_of(checkpoint) or "").strip()
    if problem := unheld(text):
        say(f"the licence is left out: {problem}")
        return None
    return text or None


def main() -> None:
    """The command line."""
    parser = script_parser(__doc__)
    parser.add_argument("--gguf", type=Path, required=True, metavar="FILE", help="the weights")
    parser.add_argument("--adapter", type=Path, metavar="FILE", help="GGUF adapter for the weights, beside them")
    parser.add_argument(
        "--tokenizer", type=Path, required=True, metavar="DIR", help="checkpoint with the tokenizer trained with"
    )
    parser.add_argument("--output", type=Path, required=True, metavar="FILE", help="the Modelfile, beside the weights")
    parser.add_argument("--report", type=Path, required=True, metavar="FILE", help="JSON on how conversations are read")
    parser.add_argument("--system", metavar="TEXT", help="system prompt")
    for name in ("messages", "parameters"):
        add_json_setting(parser, name, definition("ollama")["properties"][name])
    add_llama_cpp_options(parser)

    def work(arguments: argparse.Namespace) -> None:
        write_modelfile(
            gguf=arguments.gguf,
            adapter=arguments.adapter,
            tokenizer=arguments.tokenizer,
            system=arguments.system,
            messages=arguments.messages,
            parameters=arguments.parameters,
            output=arguments.output,
            report=arguments.report,
            llama_cpp=llama_cpp_from(arguments),
            threads=arguments.threads,
        )

    run_script(parser, work)


if __name__ == "__main__":
    main()
