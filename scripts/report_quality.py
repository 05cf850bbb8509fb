"""Put together what was measured of a model's files: a report, its table and its picture."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from lib.cli import run_script, script_parser
from lib.console import say
from lib.jsonfile import read_json, write_json
from lib.outputs import finished_file
from lib.quality_picture import draw
from lib.quality_report import Matrices, add_matrices, compose, matrices_from, write_table


def report_quality(
    *,
    model: str,
    types: Path,
    matrices: Matrices,
    merges: Path | None,
    tuning: Path | None,
    chosen: Path | None,
    output: Path,
    picture: Path,
) -> dict[str, Any]:
    """
    Write the report and its picture.

    Args:
        model: its name.
        types: what measure_types.py wrote.
        matrices: which importance matrices these were made with.
        merges: what compare_merges.py wrote.
        tuning: what measure_tuning.py wrote.
        chosen: what choose_type.py wrote.

    Returns:
        The report.
    """
    report = compose(
        model=model,
        types=read_json(types),
        matrices=matrices,
        merges=read_json(merges) if merges else None,
        tuning=read_json(tuning) if tuning else None,
        chosen=read_json(chosen) if chosen else None,
    )
    with finished_file(picture) as partial:
        draw(report, partial)
    write_json(output, report)
    say(f"{model}: {report['tokens']} tokens judged\n{write_table(report)}")
    return report


def _work(arguments: argparse.Namespace) -> None:
    report_quality(
        model=arguments.model,
        types=arguments.types,
        matrices=matrices_from(arguments),
        merges=arguments.merges,
        tuning=arguments.tuning,
        chosen=arguments.chosen,
        output=arguments.output,
        picture=arguments.picture,
    )


def main() -> None:
    """The command line."""
    parser = script_parser(__doc__, threads=False)
    parser.add_argument("--model", required=True, metavar="NAME", help="what the report calls the model")
    parser.add_argument("--types", type=Path, required=True, metavar="FILE", help="figures, of measure_types.py")
    add_matrices(parser)
    parser.add_argument("--merges", type=Path, metavar="FILE", help="figures, of compare_merges.py")
    parser.add_argument("--chosen", type=Path, metavar="FILE", help="the type that is built, of choose_type.py")
    parser.add_argument("--tuning", type=Path, metavar="FILE", help="figures, of measure_tuning.py")
    parser.add_argument("--output", type=Path, required=True, metavar="FILE", help="the report, JSON")
    parser.add_argument("--picture", type=Path, required=True, metavar="FILE", help="PNG")
    run_script(parser, _work)


if __name__ == "__main__":
    main()
