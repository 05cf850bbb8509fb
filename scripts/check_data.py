"""Check training data and write down which they are, before anything long starts."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from lib.cli import run_script, script_parser
from lib.console import say
from lib.dataset import read_examples
from lib.jsonfile import write_json
from lib.manifest import describe_file


def check_data(*, data: Path, eval_data: Path | None, output: Path) -> dict[str, Any]:
    """
    Write the identity of the examples to `output`.

    Args:
        data: JSONL file.
        eval_data: JSONL file of held-out data.

    Returns:
        What is written: name, number of examples, size and digest, and under "eval_data" the same of that.

    Raises:
        DataError: the data cannot be used.
    """
    identity, learned = _identify(data)
    if eval_data:
        identity["eval_data"], held_out = _identify(eval_data)
        seen = set(learned)
        if known := sum(example in seen for example in held_out):
            of_all = f"{known} of {len(held_out)} examples"
            say(f"{eval_data}: {of_all} stand in {data} as well; take them out, since they show memory alone")
    write_json(output, identity)
    return identity


def _identify(path: Path) -> tuple[dict[str, Any], list[int]]:
    """What is written of a file, and a hash of what each of its examples says."""
    examples = read_examples(path)
    say(f"{path}: {len(examples)} examples")
    said = [hash(json.dumps([example.messages, example.text])) for example in examples]
    return {"name": path.name, "examples": len(examples), **describe_file(path)}, said


def main() -> None:
    """The command line."""
    parser = script_parser(__doc__, threads=False)
    parser.add_argument("--data", type=Path, required=True, metavar="FILE", help="JSONL file of training data")
    parser.add_argument("--eval-data", type=Path, metavar="FILE", help="JSONL file of held-out data")
    parser.add_argument("--output", type=Path, required=True, metavar="FILE", help="where their identity is written")

    def work(arguments: argparse.Namespace) -> None:
        check_data(data=arguments.data, eval_data=arguments.eval_data, output=arguments.output)

    run_script(parser, work)


if __name__ == "__main__":
    main()
