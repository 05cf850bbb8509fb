"""Fetch and build the pinned llama.cpp into the cache, or check one's own, and write down which it is."""

from __future__ import annotations

import argparse
from pathlib import Path

from lib.cli import run_script, script_parser
from lib.console import say
from lib.jsonfile import write_json
from lib.llama_cpp import TOOLS, LlamaCpp, add_llama_cpp_options, llama_cpp_from


def build_llama_cpp(arguments: argparse.Namespace) -> None:
    """Make llama.cpp ready and write its identity to `--output`; where it lies stays out of the file."""
    ready = llama_cpp_from(arguments)
    identity = {"commit": ready.commit, "cmake_flags": sorted(arguments.llama_cpp_cmake_flag), "tools": sorted(TOOLS)}
    identity["fingerprint"] = _fingerprint(ready)
    write_json(arguments.output, identity)
    say(f"llama.cpp {ready.commit} is ready")


def _fingerprint(ready: LlamaCpp) -> str | None:
    """What the build makes of a fixed block; said where that is not what the pinned one makes on x86-64."""
    from lib.ggml import PINNED_FINGERPRINT, Ggml, GgmlError

    try:
        found = Ggml(ready, own_loops=False).fingerprint()
    except GgmlError as error:
        say(f"llama.cpp {ready.commit} was not tried on a fixed block: {error}")
        return None
    if found != PINNED_FINGERPRINT:
        say(f"llama.cpp {ready.commit} quantizes a fixed block to other bytes than the pinned build on x86-64")
    return found


def main() -> None:
    """The command line."""
    parser = script_parser(__doc__)
    parser.add_argument("--output", type=Path, required=True, metavar="FILE", help="where its identity is written")
    add_llama_cpp_options(parser)
    run_script(parser, build_llama_cpp)


if __name__ == "__main__":
    main()
