"""Train the same steps with bf16 LoRA, int8 and QLoRA, and set memory, speed and held-out loss side by side."""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from lib.cli import run_script, script_parser
from lib.console import say
from lib.jsonfile import read_json, write_json
from lib.method_report import describe_methods, draw_methods
from lib.options import add_settings, option_words, settings_from
from lib.process import run_program
from lib.train_method import resolve_method
from lib.train_settings import Train
from lib.typed import build

METHODS = ("lora", "int8", "qlora")


def compare_methods(
    *, base: Path, settings: dict[str, Any], methods: Sequence[str], gpus: str, output: Path, picture: Path
) -> dict[str, Any]:
    """
    Train with each method, one after another in a process of its own, and write what it took.

    Args:
        base: folder of the base checkpoint.
        settings: the `train` section that all methods share, with every key.
        methods: out of METHODS.
        gpus: planned cards, as --gpus of train_adapter.py takes them.
        output, picture: JSON and PNG of the comparison, written after each method.

    Returns:
        For each method peak memory in GB (10^9), tokens per second and losses in nats per token.

    Raises:
        ProgramError: a method failed; those measured before it are written.
    """
    report: dict[str, Any] = {"base": base.name, "unit": "tokens", "methods": {}}
    for method in methods:
        say(f"training by {method}")
        report["methods"][method] = _measure(base, {**settings, "method": method}, gpus)
        write_json(output, report)
        draw_methods(report, picture)
    say(describe_methods(report))
    say(f"comparison written to {output} and {picture}")
    return report


def _measure(base: Path, settings: dict[str, Any], gpus: str) -> dict[str, Any]:
    """One method's figures."""
    # The number of weights decides about `auto` alone.
    resolve_method(settings, parameters=0, gpus=[float(size) for size in gpus.split(",") if size])
    with TemporaryDirectory(prefix="modelmill-compare-") as scratch:
        history = Path(scratch, "history.json")
        script = Path(__file__).with_name("train_adapter.py")
        command = [sys.executable, str(script), f"--base={base}", f"--gpus={gpus}", f"--history={history}"]
        run_program([*command, f"--output={scratch}/adapter", *option_words(build(Train, settings))], follow=say)
        record = read_json(history)
    # The first steps pay for compiling and for caches.
    settled = record["steps"][len(record["steps"]) // 4 :]
    return {
        "peak_gpu_gb": record["peak_gpu_gb"],
        "peak_ram_gb": record["peak_ram_gb"],
        "tokens_per_second": statistics.median(step["tokens_per_second"] for step in settled),
        "first_loss": record["steps"][0]["loss"],
        "last_loss": record["steps"][-1]["loss"],
        "held_out_loss": record["evaluations"][-1]["loss"],
        "steps": len(record["steps"]),
    }


def _work(arguments: argparse.Namespace) -> None:
    settings = {**settings_from(arguments, "train"), "precision": "bf16", "method": None}
    compare_methods(
        base=arguments.base,
        settings=settings,
        methods=arguments.methods,
        gpus=arguments.gpus,
        output=arguments.output,
        picture=arguments.output.with_suffix(".png"),
    )


def main() -> None:
    """The command line."""
    parser = script_parser(__doc__, threads=False)
    parser.add_argument("--base", type=Path, required=True, metavar="DIR", help="base checkpoint")
    parser.add_argument(
        "--output", type=Path, default=Path("reports/methods.json"), metavar="FILE", help="JSON; a PNG lies beside it"
    )
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS), help="what is compared")
    parser.add_argument("--gpus", default="", metavar="GIB,GIB", help="memory of each planned GPU; none: the CPU")
    add_settings(parser, "train", without=("method", "precision"))
    # Held-out loss is what the comparison is for.
    parser.set_defaults(eval_fraction=0.1)
    run_script(parser, _work)


if __name__ == "__main__":
    main()
