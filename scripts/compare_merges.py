"""Which merge is nearer to the model as it was trained: into the original weights, or into those of 4-bit training."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from lib.calibration import identify_text
from lib.cli import run_script, script_parser
from lib.console import say
from lib.jsonfile import write_json
from lib.llama_cpp import add_llama_cpp_options, llama_cpp_from, llama_cpp_words
from lib.merge_inputs import add_merge_inputs
from lib.options import add_setting
from lib.outputs import scratch_beside
from lib.perplexity import Evaluator
from lib.process import run_program
from lib.provenance import BASE_WEIGHTS

SCRIPTS = Path(__file__).parent
# Small, and so near to 16 bits that what it adds is the same for both.
QUANT = "q8_0"


def compare_merges(
    *,
    inputs: Sequence[str],
    merging: Sequence[str],
    text: Path,
    chunks: int,
    trained_on: Sequence[str],
    output: Path,
    evaluator: Evaluator,
    shared: Sequence[str],
) -> dict[str, Any]:
    """
    Merge both ways, and compare each with the adapter on the base as it was trained.

    Args:
        inputs: options that name base and adapter.
        merging: how they are merged, as options of build_direct.py.
        text: UTF-8 text that is judged by, of which `chunks` are taken if it has as many.
        trained_on: where compute_logits.py computes what was trained, as options.
        shared: options of every script that uses llama.cpp.

    Returns:
        The figures of a Divergence for each of BASE_WEIGHTS, and the text.

    Raises:
        ProgramError: a script failed.
        CalibrationError, QualityError, LogitsError: the text cannot be used, or the evaluator failed.
    """
    report: dict[str, Any] = {"text": identify_text(text)}
    with scratch_beside(output) as folder:
        tokens, trained = folder / "tokens.logits", folder / "trained.logits"
        for weights in BASE_WEIGHTS:
            say(f"merging into {BASE_WEIGHTS[weights]}")
            words = [*inputs, *merging, f"--base-weights={weights}", f"--quant={QUANT}", *shared]
            _run("build_direct.py", *words, "--name=merged", f"--output={folder}/{weights}.{{quant}}.gguf")
        merged = {weights: folder / f"{weights}.{QUANT}.gguf" for weights in BASE_WEIGHTS}
        # For the tokens of the text, which are the same for both.
        evaluator.perplexity(merged["original"], text, chunks=chunks, logits=tokens)
        _run("compute_logits.py", *inputs, *trained_on, f"--tokens={tokens}", f"--output={trained}")
        tokens.unlink()
        for weights, gguf in merged.items():
            report[weights] = asdict(evaluator.divergence(gguf, trained))
            say(f"merged into {BASE_WEIGHTS[weights]}: {report[weights]['mean_kld']:.5f} nats from what was trained")
    write_json(output, report)
    return report


def _run(script: str, *words: str) -> None:
    run_program([sys.executable, str(SCRIPTS / script), *words], follow=say)


def _work(arguments: argparse.Namespace) -> None:
    named = {name: getattr(arguments, name) for name in ("base", "base_manifest", "adapter", "adapter_manifest")}
    threads = f"--threads={arguments.threads}"
    compare_merges(
        inputs=[f"--{name.replace('_', '-')}={path}" for name, path in named.items() if path is not None],
        merging=[f"--dtype={arguments.dtype}", f"--device={arguments.merge_device}"],
        text=Path(arguments.text),
        chunks=arguments.chunks,
        trained_on=[f"--device={arguments.trained_device}", f"--gpus={arguments.gpus}", threads],
        output=arguments.output,
        evaluator=Evaluator(
            llama_cpp_from(arguments, tools=("llama-perplexity",)), arguments.threads, gpu=arguments.device == "cuda"
        ),
        shared=[threads, *llama_cpp_words(arguments)],
    )


def main() -> None:
    """The command line."""
    parser = script_parser(__doc__)
    add_merge_inputs(parser)
    parser.add_argument("--output", type=Path, required=True, metavar="FILE", help="the figures, JSON")
    for name in ("text", "chunks", "device"):
        add_setting(parser, "quality", name, required=name == "text")
    add_setting(parser, "merge", "dtype")
    devices = {"choices": ["auto", "cpu", "cuda"], "default": "auto"}
    parser.add_argument("--merge-device", **devices, help="where is merged; auto is cuda where there is a GPU")
    parser.add_argument("--trained-device", **devices, help="where the model is run as it was trained")
    parser.add_argument("--gpus", default="", metavar="GIB,GIB", help="memory of each planned GPU")
    add_llama_cpp_options(parser)
    run_script(parser, _work)


if __name__ == "__main__":
    main()
