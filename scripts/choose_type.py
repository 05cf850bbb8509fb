"""Choose the quantized type that a model is built in: of those that fit a budget the nearest to the 16-bit file."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from lib.budget import Budget, choose
from lib.cli import UsageError, run_script, script_parser
from lib.console import say
from lib.jsonfile import read_json, write_json
from lib.quality_report import FIGURES


def choose_type(*, measured: Path, budget: Budget, cache: int, output: Path) -> dict[str, Any]:
    """
    Write the chosen type with its figures to `output`.

    Args:
        measured: figures, of measure_types.py.
        budget: how large the file may be.
        cache: keys and values of the context that it runs with, in bytes.

    Returns:
        What is written: the type, size, digest and figures of its file, and the budget in words.

    Raises:
        BudgetError: none of the measured types fits.
    """
    words = budget.describe(cache)
    row = choose(read_json(measured)["types"], budget, cache)
    chosen = {**{key: row[key] for key in ("type", "size", "sha256", *FIGURES)}, "budget": words}
    write_json(output, chosen)
    say(
        f"{chosen['type']}: {chosen['mean_kld']:.5f} nats from the 16-bit file, the nearest of what fits {words}, "
        f"with {chosen['size'] / 1e9:.3f} GB"
    )
    return chosen


def main() -> None:
    """The command line."""
    parser = script_parser(__doc__, threads=False)
    parser.add_argument("--measured", type=Path, required=True, metavar="FILE", help="figures, of measure_types.py")
    parser.add_argument("--file", type=float, metavar="GIB", help="how large the file may be")
    parser.add_argument("--gpu-memory", type=float, metavar="GIB", help="what it may take of a card with its cache")
    parser.add_argument("--cache", type=int, default=0, metavar="BYTES", help="keys and values of its context")
    parser.add_argument("--output", type=Path, required=True, metavar="FILE", help="the chosen type, JSON")

    def work(arguments: argparse.Namespace) -> None:
        if (arguments.file is None) == (arguments.gpu_memory is None):
            raise UsageError("give one of --file and --gpu-memory")
        choose_type(
            measured=arguments.measured,
            budget=Budget(arguments.file, arguments.gpu_memory),
            cache=arguments.cache,
            output=arguments.output,
        )

    run_script(parser, work)


if __name__ == "__main__":
    main()
