"""Judge a tuned model and its base by held-out training data, so that a tuning that did nothing, or harmed, shows."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import asdict
from itertools import chain
from pathlib import Path
from typing import Any

from lib.cli import run_script, script_parser
from lib.console import say
from lib.jsonfile import read_json, write_json
from lib.llama_cpp import add_llama_cpp_options, llama_cpp_from
from lib.manifest import read_file_manifest
from lib.options import add_setting
from lib.outputs import scratch_beside
from lib.perplexity import Evaluator, QualityError, TooFewTokensError, cut_tokens


def measure_tuning(
    *, tuned: Path, base: Path, held_out: Path, chunks: int, output: Path, evaluator: Evaluator
) -> dict[str, Any]:
    """
    Write the perplexities of both, over the same tokens.

    Args:
        tuned, base: GGUF files of the same type, with their manifests.
        held_out: tokens of the samples, of render_data.py; special tokens among them, as in training.
        chunks: how many of them are judged, if there are as many.

    Returns:
        Number of samples; of "tuned" and "base" name, size and digest of the file and the figures of a Perplexity, or
        "reason" why they could not be judged by so few tokens.

    Raises:
        ManifestError: a file is not whole.
        QualityError: the tokens are not of these files, or the evaluator failed.
    """
    samples = _read_samples(held_out)
    tokens = list(chain.from_iterable(samples))
    report: dict[str, Any] = {"samples": len(samples)}
    try:
        cut_tokens(tokens, chunks)
    except TooFewTokensError as error:
        # All else in a report is worth having without it.
        report["reason"] = str(error)
        write_json(output, report)
        say(f"held-out training data: {error}")
        return report
    with scratch_beside(output) as folder:
        for role, gguf in (("base", base), ("tuned", tuned)):
            facts = {key: value for key, value in read_file_manifest(gguf).items() if key in ("name", "size", "sha256")}
            judged = evaluator.perplexity_of_tokens(gguf, tokens, chunks=chunks, scratch=folder / "tokens.logits")
            report[role] = {**facts, **asdict(judged)}
    write_json(output, report)
    before, after = report["base"]["perplexity"], report["tuned"]["perplexity"]
    say(f"perplexity of the held-out training data: {before:.3f} before tuning, {after:.3f} after")
    return report


def _read_samples(path: Path) -> Sequence[list[int]]:
    try:
        samples = read_json(path)
    except (OSError, ValueError) as error:
        raise QualityError(str(error)) from error
    whole = isinstance(samples, list) and all(isinstance(sample, list) for sample in samples)
    if not whole or not all(isinstance(token, int) and token >= 0 for sample in samples for token in sample):
        raise QualityError(f"{path} is not what render_data.py writes of held-out data; run that again")
    return samples


def main() -> None:
    """The command line."""
    parser = script_parser(__doc__)
    parser.add_argument("--tuned", type=Path, required=True, metavar="FILE", help="GGUF file of the tuned model")
    parser.add_argument("--base", type=Path, required=True, metavar="FILE", help="GGUF file of its base")
    parser.add_argument("--held-out", type=Path, required=True, metavar="FILE", help="tokens, of render_data.py")
    parser.add_argument("--output", type=Path, required=True, metavar="FILE", help="the figures, JSON")
    for name in ("chunks", "device"):
        add_setting(parser, "quality", name)
    add_llama_cpp_options(parser)

    def work(arguments: argparse.Namespace) -> None:
        llama_cpp = llama_cpp_from(arguments, tools=("llama-perplexity",))
        measure_tuning(
            tuned=arguments.tuned,
            base=arguments.base,
            held_out=arguments.held_out,
            chunks=arguments.chunks,
            output=arguments.output,
            evaluator=Evaluator(llama_cpp, arguments.threads, gpu=arguments.device == "cuda"),
        )

    run_script(parser, work)


if __name__ == "__main__":
    main()
