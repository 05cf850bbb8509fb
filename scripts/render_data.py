"""Write what is trained on as a text, as training sees it, and what is held out as tokens, for llama.cpp's programs."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lib.cli import run_script, script_parser
from lib.console import say
from lib.jsonfile import write_json
from lib.manifest import describe_file
from lib.options import add_setting
from lib.outputs import finished_file
from lib.samples import Sample, summarize_samples
from lib.training_data import read_training_data

SETTINGS = ("data", "eval_data", "eval_fraction", "max_length", "seed")


def render_data(
    *,
    base: Path,
    data: Path,
    eval_data: Path | None,
    eval_fraction: float,
    max_length: int,
    seed: int,
    output: Path,
    held_out: Path,
    identity: Path,
) -> dict[str, Any]:
    """
    Write what is trained on to `output`, what is held out to `held_out`, and what they are to `identity`.

    In the text samples follow one another with nothing between them, and what the tokenizer adds around a plain text
    is written as well. Special tokens are there by their texts, which are tokens again only to a program that is told
    so: llama-imatrix with --parse-special, llama-tokenize unless it is given --no-parse-special. llama-perplexity has
    no such option, to it "<|im_start|>" is several tokens of plain text; so what is held out are tokens. llama-imatrix
    resolves no escapes, and drops a line feed at the file's end.

    Args:
        base: folder of the base checkpoint, of which only the tokenizer is read.
        data, eval_data, eval_fraction, max_length, seed: as in training.
        output: text file.
        held_out: JSON file, the tokens of each sample; there may be none.
        identity: JSON file.

    Returns:
        What is written to `identity`.

    Raises:
        DataError, BaseModelError: see lib.training_data.
    """
    train, rest = read_training_data(
        base=base, data=data, eval_data=eval_data, eval_fraction=eval_fraction, max_length=max_length, seed=seed
    )
    with finished_file(output) as partial, partial.open("w", encoding="utf-8", newline="") as file:
        file.writelines(sample.text for sample in train)
    write_json(held_out, [sample.input_ids for sample in rest])
    facts = {"training": _describe(output, train), "held_out": _describe(held_out, rest)}
    write_json(identity, facts)
    for path, written in zip((output, held_out), facts.values(), strict=True):
        say(f"wrote {path}: {written['samples']} samples, {written['tokens']} tokens")
    return facts


def _describe(path: Path, samples: Sequence[Sample]) -> dict[str, Any]:
    counts = summarize_samples(samples)
    return {**describe_file(path), "samples": counts.samples, "tokens": counts.tokens}


def main() -> None:
    """The command line."""
    parser = script_parser(__doc__, threads=False)
    parser.add_argument("--base", type=Path, required=True, metavar="DIR", help="base checkpoint")
    for name in SETTINGS:
        add_setting(parser, "train", name, required=name == "data")
    parser.add_argument("--output", type=Path, required=True, metavar="FILE", help="text of what is trained on")
    parser.add_argument("--held-out", type=Path, required=True, metavar="FILE", help="tokens of what is held out, JSON")
    parser.add_argument("--identity", type=Path, required=True, metavar="FILE", help="JSON file: which they are")

    def work(arguments: argparse.Namespace) -> None:
        render_data(
            base=arguments.base,
            data=Path(arguments.data),
            eval_data=Path(arguments.eval_data) if arguments.eval_data else None,
            eval_fraction=arguments.eval_fraction,
            max_length=arguments.max_length,
            seed=arguments.seed,
            output=arguments.output,
            held_out=arguments.held_out,
            identity=arguments.identity,
        )

    run_script(parser, work, outputs=lambda arguments: (arguments.output, arguments.held_out))


if __name__ == "__main__":
    main()
