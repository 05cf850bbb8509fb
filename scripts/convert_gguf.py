"""Convert a Hugging Face checkpoint to a 16-bit GGUF file with llama.cpp's own converter."""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path
from typing import Any

from lib import checked_converter
from lib.checkpoint import checkpoint_files
from lib.cli import run_script, script_parser
from lib.console import progress, say
from lib.gguf_file import count_types, read_gguf
from lib.jsonfile import read_json, write_json
from lib.llama_cpp import LlamaCpp, add_llama_cpp_options, llama_cpp_from
from lib.manifest import identify_folder, write_file_manifest
from lib.outputs import finished_file, scratch_beside
from lib.process import run_program
from lib.provenance import gguf_metadata
from lib.quant_types import SOURCE_TYPES


def convert_gguf(
    *,
    checkpoint: Path,
    manifest: Path | None,
    artifact: str,
    name: str,
    outtype: str,
    output: Path,
    llama_cpp: LlamaCpp,
    threads: int,
) -> dict[str, Any]:
    """
    Write `output` and its manifest.

    Args:
        checkpoint: folder with config.json, safetensors and tokenizer.
        manifest: its manifest, if not in that folder.
        artifact: what it is: "merged" or "base".
        name: the model's, for general.name.
        outtype: f16 or bf16.

    Returns:
        The manifest of the file.

    Raises:
        ProgramError: llama.cpp's converter refused the checkpoint, or a value is not finite in `outtype`.
        GgufError: what it wrote is not whole.
    """
    source = identify_folder(checkpoint, manifest, artifact=artifact, names=checkpoint_files, threads=threads)
    say(f"converting {checkpoint} to {outtype.upper()}")
    with finished_file(output) as partial, scratch_beside(output) as folder:
        metadata = folder / "metadata.json"
        write_json(metadata, gguf_metadata(source, artifact=artifact, name=name, llama_cpp_commit=llama_cpp.commit))
        digest = folder / "digest.json"
        _run_converter(llama_cpp, checkpoint, metadata=metadata, outtype=outtype, output=partial, digest=digest)
        types, facts = count_types(read_gguf(partial)), read_json(digest)
    origin = {artifact: source, "llama_cpp": llama_cpp.commit, "type": outtype}
    say(f"wrote {output}: {facts['size'] / 1e6:.0f} MB, tensors {types}")
    return write_file_manifest(output, facts=facts, origin=origin)


def _run_converter(
    llama_cpp: LlamaCpp, checkpoint: Path, *, metadata: Path, outtype: str, output: Path, digest: Path
) -> None:
    command = [sys.executable, checked_converter.__file__, digest, llama_cpp.convert_script, checkpoint]
    command += ["--outfile", output, "--outtype", outtype, "--metadata", metadata]
    with progress("converting", total=100, unit="%") as bar:
        done = 0

        def follow(line: str) -> None:
            nonlocal done
            if found := re.match(r"Writing:\s+(\d+)%", line):
                bar.advance(int(found[1]) - done)
                done = int(found[1])

        run_program(command, follow=follow, output=output)


def main() -> None:
    """The command line."""
    parser = script_parser(__doc__)
    parser.add_argument("--checkpoint", type=Path, required=True, metavar="DIR", help="checkpoint to convert")
    parser.add_argument("--manifest", type=Path, metavar="FILE", help="its manifest, if not in that folder")
    parser.add_argument("--artifact", choices=["merged", "base"], default="merged", help="what the checkpoint is")
    parser.add_argument("--name", required=True, help="name of the model, written into the file")
    parser.add_argument("--outtype", choices=SOURCE_TYPES, default="f16", help="type of the weights")
    parser.add_argument("--output", type=Path, required=True, metavar="FILE", help="the GGUF file")
    add_llama_cpp_options(parser)

    def work(arguments: argparse.Namespace) -> None:
        convert_gguf(
            checkpoint=arguments.checkpoint,
            manifest=arguments.manifest,
            artifact=arguments.artifact,
            name=arguments.name,
            outtype=arguments.outtype,
            output=arguments.output,
            llama_cpp=llama_cpp_from(arguments, tools=()),
            threads=arguments.threads,
        )

    run_script(parser, work)


if __name__ == "__main__":
    main()
