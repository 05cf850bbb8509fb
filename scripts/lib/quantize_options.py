"""The options that every script has which quantizes, and what is refused of them before anything is done."""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from pathlib import Path

from lib.cli import UsageError
from lib.options import add_settings, settings_from
from lib.quant_types import NEED_IMATRIX
from lib.tensor_types import TensorTypes, pattern_problems, pure_problem
from lib.typed import build


def add_quantize_options(parser: argparse.ArgumentParser) -> None:
    """Add the importance matrix, and the types of single tensors."""
    parser.add_argument("--imatrix", type=Path, metavar="FILE", help="importance matrix, by compute_imatrix.py")
    add_settings(parser, "quantize", without=("types", "path", "imatrix", "budget"))


def tensor_types_from(arguments: argparse.Namespace, *, quants: Iterable[str]) -> TensorTypes:
    """
    What the options say of single tensors.

    Args:
        quants: the types of the files to make.

    Raises:
        UsageError: a type without the matrix that it needs, or settings that llama-quantize could not follow.
    """
    tensor_types = build(TensorTypes, settings_from(arguments, "quantize"))
    for quant in quants:
        if quant in NEED_IMATRIX and arguments.imatrix is None:
            raise UsageError(f"{quant} needs an importance matrix; give it with --imatrix")
        if problem := pure_problem(tensor_types, quant):
            raise UsageError(f"--pure: {problem}")
    if problems := pattern_problems(arguments.tensor_type):
        raise UsageError("\n".join(f"--tensor-type: {problem}" for problem in problems))
    return tensor_types
