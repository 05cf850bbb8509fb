"""Run a program on GPUs of its own: others of modelmill's jobs take other cards, or share one if both fit."""

from __future__ import annotations

import argparse
import os

from lib.cli import UsageError, positive, run_script, script_parser
from lib.gpu_claims import claim_cards
from lib.toolchain import cache_folder


def _work(arguments: argparse.Namespace) -> None:
    if not arguments.command:
        raise UsageError("no program was given; write it after --")
    cards = claim_cards(arguments.gpus, arguments.gpu_mem_mb * 10**6, folder=cache_folder() / "gpus")
    if cards:
        os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(cards)
    # Instead of a child: signals and the exit status are then the program's own, and so is the claim.
    os.execvp(arguments.command[0], arguments.command)


def main() -> None:
    """The command line."""
    parser = script_parser(__doc__, threads=False)
    parser.add_argument("--gpus", type=positive, required=True, metavar="N", help="number of cards")
    parser.add_argument("--gpu-mem-mb", type=positive, required=True, metavar="MB", help="memory planned on each card")
    parser.add_argument("command", nargs="*", metavar="-- PROGRAM", help="what is run, with its arguments")
    run_script(parser, _work)


if __name__ == "__main__":
    main()
