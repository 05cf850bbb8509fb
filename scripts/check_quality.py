"""Hold a model's quantized types to the limits that are set for them."""

from __future__ import annotations

import argparse
from pathlib import Path

from lib.chosen_type import read_chosen
from lib.cli import run_script, script_parser
from lib.console import say
from lib.jsonfile import read_json, write_json
from lib.options import add_setting
from lib.perplexity import QualityError
from lib.quality_report import LIMITS, Matrices, add_matrices, describe_types, matrices_from, refused


def check_quality(
    *,
    model: str,
    measured: Path,
    types: list[str],
    auto: bool,
    matrices: Matrices,
    limits: dict[str, float],
    output: Path,
) -> None:
    """
    Write down that all types are within the limits.

    Args:
        model: its name.
        measured: figures, of measure_types.py.
        matrices: which importance matrices the types were made with.
        types: those that are held to the limits.
        auto: that was chosen by choose_type.py.
        limits: by their settings in `quality`.

    Raises:
        QualityError: with the figures of each type that is not, and what to try; no file is touched.
    """
    rows = describe_types(read_json(measured), matrices)
    if problems := refused(rows, types, limits, auto=auto):
        told = [f"{model} is not as good as its limits in `quality` ask for:", *problems]
        raise QualityError("\n  ".join([*told, f"all files are kept; all figures are in {measured}"]))
    write_json(output, {"types": types, "limits": limits})
    say(f"{', '.join(types)} of {model}: within the limits")


def main() -> None:
    """The command line."""
    parser = script_parser(__doc__, threads=False)
    parser.add_argument("--model", required=True, metavar="NAME", help="what messages call the model")
    parser.add_argument("--measured", type=Path, required=True, metavar="FILE", help="figures, of measure_types.py")
    judged = parser.add_mutually_exclusive_group(required=True)
    judged.add_argument("--types", nargs="+", metavar="TYPE", help="types that have to be within them")
    judged.add_argument("--chosen", type=Path, metavar="FILE", help="the type that choose_type.py wrote there")
    parser.add_argument("--output", type=Path, required=True, metavar="FILE", help="where it is written down")
    add_matrices(parser)
    for name in LIMITS:
        add_setting(parser, "quality", name)

    def work(arguments: argparse.Namespace) -> None:
        limits = {name: getattr(arguments, name) for name in LIMITS if getattr(arguments, name) is not None}
        check_quality(
            model=arguments.model,
            measured=arguments.measured,
            types=arguments.types or [read_chosen(arguments.chosen)],
            auto=arguments.chosen is not None,
            matrices=matrices_from(arguments),
            limits=limits,
            output=arguments.output,
        )

    run_script(parser, work)


if __name__ == "__main__":
    main()
