"""Print the table of a quality report, or put it into a Markdown file between the marks that are there for it."""

from __future__ import annotations

import argparse
import re
from pathlib import Path

from lib.cli import run_script, script_parser
from lib.console import say
from lib.jsonfile import read_json
from lib.perplexity import QualityError
from lib.quality_report import write_table


def put_table(report: Path, into: Path) -> None:
    """
    Replace what stands between `<!-- quality of MODEL -->` and `<!-- end -->`.

    Raises:
        QualityError: the marks are not there.
    """
    measured = read_json(report)
    first, last = f"<!-- quality of {measured['model']} -->", "<!-- end -->"
    old = into.read_text(encoding="utf-8")
    found = re.search(f"{re.escape(first)}\n.*?{re.escape(last)}", old, re.DOTALL)
    if not found:
        raise QualityError(f"{into} has no lines {first} and {last}, between which the table is put")
    new = f"{first}\n{write_table(measured)}\n{last}"
    into.write_text(old[: found.start()] + new + old[found.end() :], encoding="utf-8")
    say(f"the table of {measured['model']} is in {into}")


def main() -> None:
    """The command line."""
    parser = script_parser(__doc__, threads=False)
    parser.add_argument("report", type=Path, metavar="REPORT", help="reports/{model}.quality.json")
    parser.add_argument("--into", type=Path, metavar="FILE", help="Markdown file")

    def work(arguments: argparse.Namespace) -> None:
        if arguments.into:
            put_table(arguments.report, arguments.into)
        else:
            print(write_table(read_json(arguments.report)))

    run_script(parser, work)


if __name__ == "__main__":
    main()
