"""Report what each step of a model took against what it asks for, and how large its artifacts are; nothing is run."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from lib.cli import UsageError, run_script, script_parser
from lib.config import suggest
from lib.config_file import read_project
from lib.console import say
from lib.jsonfile import write_json
from lib.options import json_mapping
from lib.outputs import finished_file
from lib.resource_picture import describe_steps, write_picture
from lib.resource_report import report_resources


def _work(arguments: argparse.Namespace) -> None:
    project = read_project(arguments.config, arguments.changes)
    if arguments.model not in project.names:
        raise UsageError(f"--model: unknown model {arguments.model!r}{suggest(arguments.model, project.names)}")
    report: dict[str, Any] = report_resources(arguments.model, project)
    say(describe_steps(report))
    if arguments.picture:
        with finished_file(arguments.picture) as partial:
            write_picture(report, partial)
    if arguments.output:
        write_json(arguments.output, report)


def main() -> None:
    """The command line."""
    parser = script_parser(__doc__, threads=False)
    parser.add_argument(
        "--config", type=Path, nargs="*", default=[Path("config.yaml")], metavar="FILE", help="what was built"
    )
    parser.add_argument("--changes", type=json_mapping, default={}, metavar="JSON", help="put over what the files say")
    parser.add_argument("--model", required=True, metavar="NAME", help="of config.yaml")
    parser.add_argument("--output", type=Path, metavar="FILE", help="the report, JSON")
    parser.add_argument("--picture", type=Path, metavar="FILE", help="the same as a picture, PNG")
    run_script(parser, _work)


if __name__ == "__main__":
    main()
