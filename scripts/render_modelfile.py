"""Write the Ollama Modelfile of a GGUF file."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lib.cli import run_script, script_parser
from lib.config import definition
from lib.console import say
from lib.gguf_file import read_gguf
from lib.modelfile import ModelfileError, render_modelfile
from lib.options import add_json_setting
from lib.outputs import finished_file


def write_modelfile(*, gguf: Path, system: str | None, parameters: Mapping[str, Any], output: Path) -> None:
    """
    Write a Modelfile beside its weights.

    Args:
        gguf: the weights, in the folder of `output`.
        system, parameters: see lib.modelfile.render_modelfile.

    Raises:
        ModelfileError: no chat template in the file, or a text that a Modelfile cannot hold.
    """
    if gguf.resolve().parent != output.resolve().parent:
        raise ModelfileError(f"{output} has to lie beside {gguf}, so that both can be moved together")
    weights = read_gguf(gguf)
    if "tokenizer.chat_template" not in weights.metadata:
        raise ModelfileError(f"{gguf} has no chat template: nobody could talk to it as it was trained")
    end_of_turn = weights.tokenizer("eos_token_id")
    stops = [] if end_of_turn is None else [weights.tokenizer("tokens")[end_of_turn]]
    text = render_modelfile(gguf_name=gguf.name, system=system, parameters=parameters, stops=stops)
    with finished_file(output) as partial:
        partial.write_text(text, encoding="utf-8")
    say(f"wrote {output}; the chat template is the one inside {gguf.name}")


def main() -> None:
    """The command line."""
    parser = script_parser(__doc__)
    parser.add_argument("--gguf", type=Path, required=True, metavar="FILE", help="the weights")
    parser.add_argument("--output", type=Path, required=True, metavar="FILE", help="the Modelfile, beside the weights")
    parser.add_argument("--system", metavar="TEXT", help="system prompt")
    add_json_setting(parser, "parameters", definition("ollama")["properties"]["parameters"])

    def work(arguments: argparse.Namespace) -> None:
        write_modelfile(
            gguf=arguments.gguf, system=arguments.system, parameters=arguments.parameters, output=arguments.output
        )

    run_script(parser, work)


if __name__ == "__main__":
    main()
