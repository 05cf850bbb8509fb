"""Quantize a 16-bit GGUF file with llama.cpp's own quantizer."""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from typing import Any

from lib.chosen_type import read_chosen
from lib.cli import run_script, script_parser
from lib.console import progress, say
from lib.gguf_file import check_same_tensors, count_types, put_last, read_gguf
from lib.imatrix import NAME as IMATRIX_NAME
from lib.imatrix import identify_imatrix
from lib.llama_cpp import LlamaCpp, add_llama_cpp_options, llama_cpp_from
from lib.manifest import describe_file, read_file_manifest, write_file_manifest
from lib.outputs import finished_file, scratch_beside
from lib.process import run_program
from lib.quant_types import IGNORE_IMATRIX, QUANTIZED_TYPES
from lib.quantize_options import add_quantize_options, tensor_types_from
from lib.quantized_gguf import LAST_KEYS
from lib.tensor_types import TensorTypes, quantizer_options, refuse_unmatched
from lib.typed import plain


def quantize_gguf(
    *,
    source: Path,
    quant: str,
    tensor_types: TensorTypes,
    imatrix: Path | None,
    output: Path,
    llama_cpp: LlamaCpp,
    threads: int,
) -> dict[str, Any]:
    """
    Write `output` and its manifest; its bytes do not depend on the number of threads.

    Args:
        source: GGUF file of 16-bit weights with its manifest beside it.
        quant: one of llama.cpp's types, in lower case.
        tensor_types: what single tensors get instead.
        imatrix: the model's importance matrix; None does without.

    Returns:
        The manifest of the file.

    Raises:
        ManifestError: the source is not whole.
        TensorTypeError: a pattern of `tensor_types` matches no tensor.
        ProgramError: llama-quantize failed.
        GgufError: what it wrote is not whole, or does not have the tensors of the source.
    """
    origin = read_file_manifest(source)
    matrix = None if imatrix is None else identify_imatrix(imatrix)
    held = read_gguf(source)
    refuse_unmatched(tensor_types.tensor_type, names=[tensor.name for tensor in held.tensors], source=str(source))
    say(f"quantizing {source} to {quant.upper()} on {threads} threads")
    with finished_file(output) as partial, scratch_beside(output) as folder:
        options = quantizer_options(tensor_types)
        if imatrix is not None:
            (folder / IMATRIX_NAME).symlink_to(imatrix.absolute())
            options += ["--imatrix", IMATRIX_NAME]
        command = [llama_cpp.tool("llama-quantize").absolute(), *options, source.absolute(), partial.absolute()]
        _run_quantizer([*command, quant.upper(), str(threads)], folder=folder, output=partial)
        if imatrix is not None:
            # It writes the matrix's keys last, but would not when reading the file again, as Ollama's server does.
            put_last(partial, LAST_KEYS)
        made = read_gguf(partial)
        check_same_tensors(made, held)
        types = count_types(made)
        facts = describe_file(partial)
    say(f"wrote {output}: {facts['size'] / 1e6:.0f} MB, tensors {types}")
    made_from = {key: origin[key] for key in ("name", "sha256", "origin")}
    made_by = {"llama_cpp": llama_cpp.commit, "type": quant, "tensor_types": plain(tensor_types), "imatrix": matrix}
    return write_file_manifest(output, facts=facts, origin={"source": made_from, **made_by})


def _run_quantizer(command: list[str | Path], *, folder: Path, output: Path) -> None:
    with progress("quantizing", total=1000, unit="‰") as bar:
        done = 0

        def follow(line: str) -> None:
            nonlocal done
            if found := re.match(r"\[\s*(\d+)/\s*(\d+)\]", line):
                now = 1000 * int(found[1]) // int(found[2])
                bar.advance(now - done)
                done = now

        run_program(command, follow=follow, folder=folder, output=output)


def main() -> None:
    """The command line."""
    parser = script_parser(__doc__)
    parser.add_argument("--source", type=Path, required=True, metavar="FILE", help="16-bit GGUF file")
    asked = parser.add_mutually_exclusive_group()
    asked.add_argument("--quant", choices=QUANTIZED_TYPES, default="q4_k_m", help="type of the quantized weights")
    asked.add_argument("--chosen", type=Path, metavar="FILE", help="the type that choose_type.py wrote there")
    parser.add_argument("--output", type=Path, required=True, metavar="FILE", help="the quantized GGUF file")
    add_quantize_options(parser)
    add_llama_cpp_options(parser)

    def work(arguments: argparse.Namespace) -> None:
        quant = read_chosen(arguments.chosen) if arguments.chosen else arguments.quant
        types = tensor_types_from(arguments, quants=[quant])
        # Of the types that may be chosen another one may make use of the matrix.
        unused = arguments.chosen and IGNORE_IMATRIX.issuperset([quant, *types.tensor_type.values()])
        quantize_gguf(
            source=arguments.source,
            quant=quant,
            tensor_types=types,
            imatrix=None if unused else arguments.imatrix,
            output=arguments.output,
            llama_cpp=llama_cpp_from(arguments),
            threads=arguments.threads,
        )

    run_script(parser, work)


if __name__ == "__main__":
    main()
