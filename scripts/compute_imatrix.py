"""Compute a model's importance matrix with llama.cpp: how much each input of each layer weighs, on a text."""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from typing import Any

from lib.calibration import CHUNK_TOKENS, identify_text, too_few_tokens
from lib.cli import run_script, script_parser
from lib.console import progress, say
from lib.gguf_file import read_gguf
from lib.llama_cpp import LlamaCpp, add_llama_cpp_options, llama_cpp_from
from lib.manifest import describe_file, read_file_manifest, write_file_manifest
from lib.options import add_settings
from lib.outputs import finished_file, scratch_beside
from lib.process import ProgramError, run_program


def compute_imatrix(
    *,
    source: Path,
    text: Path,
    chunks: int,
    output: Path,
    llama_cpp: LlamaCpp,
    threads: int,
    rendered: Path | None = None,
) -> dict[str, Any]:
    """
    Write `output` and its manifest; its bytes depend neither on the number of threads nor on any file's name.

    Args:
        source: GGUF file of 16-bit weights with its manifest beside it.
        text: UTF-8 text.
        chunks: how many chunks of CHUNK_TOKENS tokens of it are used, if it has as many.
        rendered: what scripts/render_data.py wrote down of the text, if that made it: special tokens in it are then
            read as such, and the manifest says what it is made of.

    Returns:
        The manifest of the file.

    Raises:
        ManifestError: the source is not whole.
        CalibrationError: the text is too short, or no text, or not the one that was written down.
        ProgramError: llama-imatrix failed.
        GgufError: what it wrote is not whole.
    """
    origin, read = read_file_manifest(source), identify_text(text, rendered=rendered)
    say(f"computing the importance matrix of {source} on {text}, {threads} threads")
    with finished_file(output) as partial, scratch_beside(output) as folder:
        sizes = {"chunks": chunks, "threads": threads}
        _run_imatrix(llama_cpp, source, text, rendered=bool(rendered), folder=folder, output=partial, **sizes)
        matrix = read_gguf(partial)
        used, entries = matrix.metadata["imatrix.chunk_count"], len(matrix.tensors) // 2
        facts = describe_file(partial)
    if used < chunks:
        say(f"{text} has no more than {used} of the {chunks} chunks of {CHUNK_TOKENS} tokens")
    say(f"wrote {output}: {entries} tensors, {used} chunks")
    made_from = {key: origin[key] for key in ("name", "sha256", "origin")}
    made_by = {"llama_cpp": llama_cpp.commit, "chunks": used, "text": read}
    return write_file_manifest(output, facts=facts, origin={"source": made_from, **made_by})


def _run_imatrix(
    llama_cpp: LlamaCpp,
    source: Path,
    text: Path,
    *,
    rendered: bool,
    chunks: int,
    threads: int,
    folder: Path,
    output: Path,
) -> None:
    # llama-imatrix writes the text's name as typed into the matrix, and llama-quantize into each file made with it.
    (folder / "model.gguf").symlink_to(source.absolute())
    (folder / "calibration.txt").symlink_to(text.absolute())
    command = [llama_cpp.tool("llama-imatrix").absolute(), "--model", "model.gguf", "--file", "calibration.txt"]
    command += ["--output-file", output.absolute(), "--output-format", "gguf", "--chunks", str(chunks)]
    # One chunk at a time: of several it splits the tokens unevenly, and leaves out a rest of fewer than 16.
    command += ["--ctx-size", str(CHUNK_TOKENS), "--batch-size", str(CHUNK_TOKENS), "--threads", str(threads)]
    # Without it "<|im_start|>" is plain text to llama-imatrix. It adds a BOS before a text that begins with one, where
    # the tokenizer adds any: one token too many, and that in the first chunk alone.
    command += ["--parse-special"] if rendered else []
    tokens = None
    with progress("computing the matrix", total=chunks, unit="chunk") as bar:
        done = 0

        def follow(line: str) -> None:
            nonlocal done, tokens
            if found := re.match(r"\[(\d+)\]\d", line):
                bar.advance(int(found[1]) - done)
                done = int(found[1])
            elif found := re.search(r"tokenizes to only (\d+) tokens", line):
                tokens = int(found[1])

        try:
            # "[1]7.25,[2]6.93,": a chunk is done at each comma.
            run_program(command, follow=follow, folder=folder, line_ends="\r,", output=output)
        except ProgramError:
            if tokens is None:
                raise
            raise too_few_tokens(text, tokens, rendered=rendered) from None


def main() -> None:
    """The command line."""
    parser = script_parser(__doc__)
    parser.add_argument("--source", type=Path, required=True, metavar="FILE", help="16-bit GGUF file")
    parser.add_argument("--output", type=Path, required=True, metavar="FILE", help="the matrix, a GGUF file")
    parser.add_argument("--text", type=Path, required=True, metavar="FILE", help="UTF-8 text file")
    parser.add_argument(
        "--rendered", type=Path, metavar="FILE", help="what render_data.py wrote down of the text, if that made it"
    )
    add_settings(parser, "imatrix", without=("from", "text"))
    add_llama_cpp_options(parser)

    def work(arguments: argparse.Namespace) -> None:
        compute_imatrix(
            source=arguments.source,
            text=arguments.text,
            rendered=arguments.rendered,
            chunks=arguments.chunks,
            output=arguments.output,
            llama_cpp=llama_cpp_from(arguments, tools=("llama-imatrix",)),
            threads=arguments.threads,
        )

    run_script(parser, work)


if __name__ == "__main__":
    main()
