"""Train a heatmap model in full precision, int8 and QLoRA, and set memory, speed and accuracy side by side."""

from __future__ import annotations

import argparse
import copy
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from lib.cli import UsageError, planned_cards, run_script, script_parser
from lib.console import say
from lib.heatmap_settings import ClipUse, Evaluation, Heatmap, TrainHeatmap
from lib.jsonfile import read_json, write_json
from lib.method_report import describe_methods, draw_methods
from lib.options import add_settings, option_words, settings_from
from lib.process import run_program
from lib.train_method import resolve_heatmap_method
from lib.typed import build

METHODS = ("full", "lora", "int8", "qlora")
COMPARED = ("full", "int8", "qlora")
SCRIPTS = Path(__file__).parent


def compare_heatmaps(
    *,
    base: Path,
    clips: Path,
    heatmap: Heatmap,
    use: ClipUse,
    train: dict[str, Any],
    evaluation: Evaluation,
    methods: Sequence[str],
    gpus: str,
    output: Path,
    picture: Path,
) -> dict[str, Any]:
    """
    Train, merge and evaluate with each method, one after another in processes of their own.

    Args:
        base: folder of the backbone's checkpoint.
        clips: folder of games, some of which `use` holds out.
        train: the settings that all methods share; those that are None have each method's own default.
        methods: out of METHODS.
        gpus: planned cards, as --gpus of train_heatmap.py takes them.
        output, picture: JSON and PNG of the comparison, written after each method.

    Returns:
        For each method peak memory in GB (10^9), frames per second in training, F1 and mean error in pixels.

    Raises:
        ProgramError: a method failed; those measured before it are written.
    """
    report: dict[str, Any] = {"base": base.name, "unit": "frames", "methods": {}}
    for method in methods:
        say(f"training by {method}")
        settings = {**copy.deepcopy(train), "method": method}
        resolve_heatmap_method(settings, gpus=planned_cards(gpus))
        with TemporaryDirectory(prefix="modelmill-compare-") as scratch:
            words = [*option_words(heatmap), *option_words(use), *option_words(build(TrainHeatmap, settings))]
            _train(Path(scratch), base, clips, words, gpus)
            judged = [*option_words(use), *option_words(evaluation), f"--device={settings['device']}"]
            _evaluate(Path(scratch), clips, judged)
            report["methods"][method] = _figures(Path(scratch))
        write_json(output, report)
        draw_methods(report, picture)
    say(describe_methods(report))
    say(f"comparison written to {output} and {picture}")
    return report


def _train(scratch: Path, base: Path, clips: Path, settings: list[str], gpus: str) -> None:
    inputs = [f"--base={base}", f"--clips={clips}", f"--gpus={gpus}", f"--history={scratch}/history.json"]
    _run("train_heatmap.py", *inputs, *settings, f"--output={scratch}/adapter")
    _run("merge_heatmap.py", f"--base={base}", f"--adapter={scratch}/adapter", f"--output={scratch}/merged")


def _evaluate(scratch: Path, clips: Path, settings: list[str]) -> None:
    inputs = [f"--model={scratch}/merged", f"--clips={clips}"]
    _run("evaluate_heatmap.py", *inputs, *settings, f"--output={scratch}/eval.json", f"--overlays={scratch}/overlays")


def _run(script: str, *words: str) -> None:
    run_program([sys.executable, str(SCRIPTS / script), *words], follow=say)


def _figures(scratch: Path) -> dict[str, Any]:
    """One method's figures."""
    record, judged = read_json(scratch / "history.json"), read_json(scratch / "eval.json")
    # The first steps pay for compiling and for caches.
    settled = record["steps"][len(record["steps"]) // 4 :]
    return {
        "peak_gpu_gb": record["peak_gpu_gb"],
        "peak_ram_gb": record["peak_ram_gb"],
        "frames_per_second": statistics.median(step["frames_per_second"] for step in settled),
        "held_out_loss": record["evaluations"][-1]["loss"],
        "f1": judged["f1"],
        "mean_error": judged["mean_error"],
        "steps": len(record["steps"]),
    }


def _work(arguments: argparse.Namespace) -> None:
    use = build(ClipUse, settings_from(arguments, "clips"))
    if not use.eval_games:
        raise UsageError("--eval-games: name the games whose clips are held out")
    train = settings_from(arguments, "train_heatmap")
    compare_heatmaps(
        base=arguments.base,
        clips=arguments.clips,
        heatmap=build(Heatmap, settings_from(arguments, "heatmap")),
        use=use,
        train=train,
        evaluation=build(Evaluation, settings_from(arguments, "evaluation")),
        methods=arguments.methods,
        gpus=arguments.gpus,
        output=arguments.output,
        picture=arguments.output.with_suffix(".png"),
    )


def main() -> None:
    """The command line."""
    parser = script_parser(__doc__, threads=False)
    parser.add_argument("--base", type=Path, required=True, metavar="DIR", help="the backbone's checkpoint")
    parser.add_argument("--clips", type=Path, required=True, metavar="DIR", help="games in TrackNet's layout")
    parser.add_argument(
        "--output", type=Path, default=Path("reports/heatmaps.json"), metavar="FILE", help="JSON; a PNG lies beside it"
    )
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(COMPARED), help="what is compared")
    parser.add_argument("--gpus", default="", metavar="GIB,GIB", help="memory of each planned GPU; none: the CPU")
    add_settings(parser, "heatmap")
    add_settings(parser, "clips", without=("path", "synthetic"))
    add_settings(parser, "evaluation")
    add_settings(parser, "train_heatmap", without=("method",))
    run_script(parser, _work)


if __name__ == "__main__":
    main()
