"""Put together what was measured of a model's files: a report, its table and its picture."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lib.cli import run_script, script_parser
from lib.console import say
from lib.jsonfile import read_json, write_json
from lib.outputs import finished_file
from lib.quality_report import Matrices, compose, draw, write_table


def report_quality(
    *,
    model: str,
    types: Path,
    matrices: Matrices,
    held_out: dict[str, Path],
    base_weights: dict[str, Path],
    output: Path,
    picture: Path,
) -> dict[str, Any]:
    """
    Write the report and its picture.

    Args:
        model: its name.
        types: what measure_types.py wrote.
        matrices: which importance matrices these were made with.
        held_out: of "tuned" and "base", figures of the held-out part of the training data; or empty.
        base_weights: of "original" and "nf4", figures of a merge into these; or empty.

    Returns:
        The report.
    """
    report = compose(
        model=model,
        types=read_json(types),
        matrices=matrices,
        held_out={role: read_json(path) for role, path in held_out.items()},
        base_weights={weights: read_json(path) for weights, path in base_weights.items()},
    )
    with finished_file(picture) as partial:
        draw(report, partial)
    write_json(output, report)
    say(f"{model}: {report['tokens']} tokens judged\n{write_table(report)}")
    return report


def _pair(names: tuple[str, str], paths: Sequence[Path] | None) -> dict[str, Path]:
    return dict(zip(names, paths, strict=True)) if paths else {}


def _work(arguments: argparse.Namespace) -> None:
    report_quality(
        model=arguments.model,
        types=arguments.types,
        matrices=Matrices(arguments.matrix, arguments.general_matrix),
        held_out=_pair(("tuned", "base"), arguments.held_out),
        base_weights=_pair(("original", "nf4"), arguments.base_weights),
        output=arguments.output,
        picture=arguments.picture,
    )


def main() -> None:
    """The command line."""
    parser = script_parser(__doc__, threads=False)
    parser.add_argument("--model", required=True, metavar="NAME", help="what the report calls the model")
    parser.add_argument("--types", type=Path, required=True, metavar="FILE", help="figures, of measure_types.py")
    parser.add_argument(
        "--matrix", metavar="TEXT", help="what the model's importance matrix is computed from, in words"
    )
    parser.add_argument("--general-matrix", metavar="TEXT", help="likewise that of the variant `general`")
    parser.add_argument(
        "--held-out", type=Path, nargs=2, metavar=("TUNED", "BASE"), help="figures of the held-out training data"
    )
    parser.add_argument(
        "--base-weights", type=Path, nargs=2, metavar=("ORIGINAL", "NF4"), help="figures of merges into these weights"
    )
    parser.add_argument("--output", type=Path, required=True, metavar="FILE", help="the report, JSON")
    parser.add_argument("--picture", type=Path, required=True, metavar="FILE", help="PNG")
    run_script(parser, _work)


if __name__ == "__main__":
    main()
