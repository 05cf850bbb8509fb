"""The scripts that check a file of the user's before anything long starts, and write down which it is."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lib.cli import run_script, script_parser
from lib.console import say
from lib.jsonfile import write_json


def run_input_check(
    doc: str | None,
    name: str,
    *,
    what: str,
    identify: Callable[[Path], tuple[dict[str, Any], str]],
    metavar: str = "FILE",
) -> None:
    """
    The command line of a check: `--{name} FILE --output FILE`.

    Args:
        doc: of the script.
        name: of the input, as in "data".
        what: the input is, for the help.
        identify: gives the file's identity, which is written to the output, and its size in words; it raises what
            the user is told of a file that cannot be used.
        metavar: what it is called in the usage.
    """
    parser = script_parser(doc)
    parser.add_argument(f"--{name}", type=Path, required=True, metavar=metavar, help=what)
    parser.add_argument("--output", type=Path, required=True, metavar="FILE", help="where its identity is written")

    def work(arguments: argparse.Namespace) -> None:
        path = getattr(arguments, name)
        identity, size = identify(path)
        write_json(arguments.output, identity)
        say(f"{path}: {size}")

    run_script(parser, work)
