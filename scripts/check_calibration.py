"""Check the text of an importance matrix before anything long starts, and write down which it is."""

from __future__ import annotations

import argparse
from pathlib import Path

from lib.calibration import identify_text
from lib.cli import run_script, script_parser
from lib.console import say
from lib.jsonfile import write_json


def check_calibration(*, text: Path, rendered: Path | None, output: Path) -> None:
    """
    Write the identity of a text to `output`.

    Args:
        text, rendered: see lib.calibration.identify_text.

    Raises:
        CalibrationError: the text cannot be used.
    """
    identity = identify_text(text, rendered=rendered)
    write_json(output, identity)
    say(f"{text}: {identity['size']} bytes of text")


def main() -> None:
    """The command line."""
    parser = script_parser(__doc__)
    parser.add_argument("--text", type=Path, required=True, metavar="FILE", help="the text")
    parser.add_argument("--rendered", type=Path, metavar="FILE", help="what render_data.py wrote down of it")
    parser.add_argument("--output", type=Path, required=True, metavar="FILE", help="where its identity is written")

    def work(arguments: argparse.Namespace) -> None:
        check_calibration(text=arguments.text, rendered=arguments.rendered, output=arguments.output)

    run_script(parser, work)


if __name__ == "__main__":
    main()
