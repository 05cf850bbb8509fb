"""Write the Ollama Modelfile of a GGUF file, and check that a conversation is served as the model was trained on it."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lib.chat import understand_chat
from lib.chat_jinja import chat_template_of
from lib.chat_parity import PROBES
from lib.cli import run_script, script_parser
from lib.config import definition
from lib.console import say
from lib.gguf_file import read_gguf
from lib.jsonfile import write_json
from lib.llama_cpp import LlamaCpp, add_llama_cpp_options, llama_cpp_from
from lib.llama_server import serving
from lib.modelfile import ModelfileError, render_modelfile
from lib.options import add_json_setting
from lib.outputs import finished_file

CONTEXT = 512  # tokens; nothing is answered


def write_modelfile(
    *,
    gguf: Path,
    tokenizer: Path,
    system: str | None,
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
        tokenizer: folder of the checkpoint whose tokenizer the model was trained with.
        system, parameters: see lib.modelfile.render_modelfile.
        report: JSON file.

    Raises:
        ModelfileError: no chat template in the file, or a text that a Modelfile cannot hold.
        ParityError: a conversation becomes other tokens than in training.
    """
    if gguf.resolve().parent != output.resolve().parent:
        raise ModelfileError(f"{output} has to lie beside {gguf}, so that both can be moved together")
    weights = read_gguf(gguf)
    if chat_template_of(weights) is None:
        raise ModelfileError(f"{gguf} has no chat template: nobody could talk to it as it was trained")
    program = llama_cpp.tool("llama-server")
    with serving(gguf, program=program, threads=threads, context=CONTEXT, answering=False) as server:
        chat = understand_chat(weights, server, tokenizer=tokenizer)
    if chat.refuses_system and system is not None:
        raise ModelfileError("ollama.system: the model's chat template refuses a system message; leave it out")
    text = render_modelfile(
        gguf_name=gguf.name, template=chat.template, system=system, parameters=parameters, stops=chat.stops
    )
    with finished_file(output) as partial:
        partial.write_text(text, encoding="utf-8")
    write_json(report, chat.report)
    served = "so they are by its TEMPLATE" if chat.template else f"there is no TEMPLATE, since {chat.reason}"
    say(f"wrote {output}: {len(PROBES)} kinds of conversations are served as trained; {served}")


def main() -> None:
    """The command line."""
    parser = script_parser(__doc__)
    parser.add_argument("--gguf", type=Path, required=True, metavar="FILE", help="the weights")
    parser.add_argument(
        "--tokenizer", type=Path, required=True, metavar="DIR", help="checkpoint with the tokenizer trained with"
    )
    parser.add_argument("--output", type=Path, required=True, metavar="FILE", help="the Modelfile, beside the weights")
    parser.add_argument("--report", type=Path, required=True, metavar="FILE", help="JSON on how conversations are read")
    parser.add_argument("--system", metavar="TEXT", help="system prompt")
    add_json_setting(parser, "parameters", definition("ollama")["properties"]["parameters"])
    add_llama_cpp_options(parser)

    def work(arguments: argparse.Namespace) -> None:
        write_modelfile(
            gguf=arguments.gguf,
            tokenizer=arguments.tokenizer,
            system=arguments.system,
            parameters=arguments.parameters,
            output=arguments.output,
            report=arguments.report,
            llama_cpp=llama_cpp_from(arguments),
            threads=arguments.threads,
        )

    run_script(parser, work)


if __name__ == "__main__":
    main()
