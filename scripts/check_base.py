"""Check, before anything long starts, that llama.cpp's converter takes a base, and write down what it found."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from lib.checkpoint import is_embedding
from lib.cli import run_script, script_parser
from lib.console import say
from lib.errors import ModelmillError
from lib.gguf_file import read_gguf
from lib.jsonfile import digest_json, write_json
from lib.llama_cpp import LlamaCpp, add_llama_cpp_options, llama_cpp_from
from lib.loading import explain_loading
from lib.outputs import scratch_beside
from lib.process import ProgramError, run_program
from lib.safetensors_file import read_tensors


class ConversionError(ModelmillError):
    """A base that could be trained and merged, but not converted to a GGUF that works."""


def check_base(*, base: Path, output: Path, llama_cpp: LlamaCpp) -> None:
    """
    Run the converter over a base's names, shapes and tokenizer, and write to `output` what it made of them.

    The weights are not read: of a 32B as of a 135M, only the headers of its files.

    Args:
        base: folder of the base checkpoint.
        output: JSON file.

    Raises:
        ConversionError: llama.cpp does not know the architecture, a tensor or the pre-tokenizer, the vocabulary has
            another number of tokens than the embedding has rows, or there are two unlike chat templates.
    """
    with scratch_beside(output) as folder:
        vocabulary = folder / "vocabulary.gguf"
        _run_converter(base, "--vocab-only", outfile=vocabulary, llama_cpp=llama_cpp)
        metadata = read_gguf(vocabulary, vocabulary_only=True).metadata
        _run_converter(base, "--dry-run", outfile=folder / "model.gguf", llama_cpp=llama_cpp)
    tokens = len(metadata["tokenizer.ggml.tokens"])
    template = metadata.get("tokenizer.chat_template")
    _check_vocabulary(base, tokens)
    _check_chat_template(base, template)
    found: dict[str, Any] = {
        "architecture": metadata["general.architecture"],
        "pre_tokenizer": metadata.get("tokenizer.ggml.pre"),
        "tokens": tokens,
        "chat_template": digest_json(template),
    }
    write_json(output, found)
    say(f"{base}: llama.cpp takes it, as {found['architecture']} with {tokens} tokens")


def _run_converter(base: Path, mode: str, *, outfile: Path, llama_cpp: LlamaCpp) -> None:
    command = [sys.executable, llama_cpp.convert_script, base, "--outfile", outfile, "--outtype", "f16", mode]
    try:
        run_program(command, output=outfile)
    except ProgramError as error:
        raise ConversionError(
            f"{base}: llama.cpp ({llama_cpp.commit[:10]}) cannot convert this base to GGUF; nothing was trained or "
            f"merged. Take another base, or set llama_cpp.path to a llama.cpp that knows it.\n{error}"
        ) from error


def _check_vocabulary(base: Path, tokens: int) -> None:
    """llama.cpp refuses to load a model whose embedding has more or fewer rows than there are tokens."""
    for name, tensor in read_tensors(base).items():
        if is_embedding(name) and tensor.shape[0] != tokens:
            raise ConversionError(
                f"{base}: {name} has {tensor.shape[0]} rows, but the tokenizer and vocab_size in config.json make "
                f"{tokens} tokens; llama.cpp would not load such a model: set vocab_size to {tensor.shape[0]}, or "
                "resize the embedding"
            )


def _check_chat_template(base: Path, served: str | None) -> None:
    """transformers prefers chat_template.jinja, llama.cpp tokenizer_config.json."""
    from transformers import AutoTokenizer

    with explain_loading("tokenizer", base):
        trained = AutoTokenizer.from_pretrained(base, local_files_only=True, trust_remote_code=False).chat_template
    if isinstance(trained, dict):
        trained = trained.get("default")
    if trained != served:
        raise ConversionError(
            f"{base}: the chat template that training would use (chat_template.jinja) is not the one that llama.cpp "
            "takes (tokenizer_config.json); keep only the one that is meant, or make them the same"
        )


def main() -> None:
    """The command line."""
    parser = script_parser(__doc__)
    parser.add_argument("--base", type=Path, required=True, metavar="DIR", help="base checkpoint")
    parser.add_argument("--output", type=Path, required=True, metavar="FILE", help="where the findings are written")
    add_llama_cpp_options(parser)

    def work(arguments: argparse.Namespace) -> None:
        llama_cpp = llama_cpp_from(arguments, tools=())
        check_base(base=arguments.base, output=arguments.output, llama_cpp=llama_cpp)

    run_script(parser, work)


if __name__ == "__main__":
    main()
