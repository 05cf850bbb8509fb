"""Fetch and build the pinned llama.cpp into the cache, or check one's own, and write down which it is."""

from __future__ import annotations

import argparse
from pathlib import Path

from lib.cli import run_script, script_parser
from lib.console import say
from lib.jsonfile import write_json
from lib.llama_cpp import TOOLS, add_llama_cpp_options, llama_cpp_from


def build_llama_cpp(arguments: argparse.Namespace) -> None:
    """Make llama.cpp ready and write its identity to `--output`; where it lies stays out of the file."""
    ready = llama_cpp_from(arguments)
    identity = {"commit": ready.commit, "cmake_flags": sorted(arguments.llama_cpp_cmake_flag), "tools": sorted(TOOLS)}
    write_json(arguments.output, identity)
    say(f"llama.cpp {ready.commit} is ready")


def main() -> None:
    """The command line."""
    parser = script_parser(__doc__)
    parser.add_argument("--output", type=Path, required=True, metavar="FILE", help="where its identity is written")
    add_llama_cpp_options(parser)
    run_script(parser, build_llama_cpp)


if __name__ == "__main__":
    main()
