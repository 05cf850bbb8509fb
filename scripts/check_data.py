"""Check training data and write down which they are, before anything long starts."""

from __future__ import annotations

import argparse
from pathlib import Path

from lib.cli import run_script, script_parser
from lib.console import say
from lib.dataset import read_examples
from lib.jsonfile import write_json
from lib.manifest import describe_file


def check_data(*, data: Path, output: Path) -> None:
    """
    Write the data's identity and size to `output`.

    Raises:
        DataError: the data cannot be used.
    """
    examples = read_examples(data)
    write_json(output, {"name": data.name, "examples": len(examples), **describe_file(data)})
    say(f"{data}: {len(examples)} examples")


def main() -> None:
    """The command line."""
    parser = script_parser(__doc__)
    parser.add_argument("--data", type=Path, required=True, metavar="FILE", help="JSONL file of training data")
    parser.add_argument("--output", type=Path, required=True, metavar="FILE", help="where its identity is written")

    def work(arguments: argparse.Namespace) -> None:
        check_data(data=arguments.data, output=arguments.output)

    run_script(parser, work)


if __name__ == "__main__":
    main()
