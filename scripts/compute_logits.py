"""Compute what a model predicts as it was trained, base and adapter apart, as logits that llama.cpp compares with."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

from lib.base_model import limit_memory
from lib.cli import free_space, planned_cards, run_script, script_parser
from lib.console import say
from lib.logits_file import LogitsError, LogitsFile, logits_bytes, read_logits_file, write_logits_file
from lib.logits_inputs import check_fit, identify_adapter, start_token
from lib.merge_inputs import add_merge_inputs
from lib.micro_batch import is_out_of_memory
from lib.outputs import finished_file
from lib.trained_model import (
    METHODS,
    TRAINED,
    TrainedModelError,
    check_held,
    describe_weights,
    load_trained,
    predict_chunks,
    settings_as_trained,
)
from lib.training_run import fix_threads, quieten_transformers


def compute_logits(
    *,
    base: Path,
    base_manifest: Path | None,
    adapter: Path | None,
    adapter_manifest: Path | None,
    base_weights: str,
    tokens: Path,
    device: str,
    gpus: Sequence[float],
    threads: int,
    output: Path,
) -> None:
    """
    Write `output`, over the same tokens and in the same form as `tokens`.

    Args:
        base, adapter: folders of a checkpoint and of a LoRA in peft's format; without one, the base alone.
        base_manifest, adapter_manifest: their manifests, where these are not in the folders themselves.
        base_weights: original, nf4, int8, or trained for which of these the adapter's training had.
        tokens: file of logits that llama-perplexity wrote for a GGUF of this model.
        device: cpu or cuda.
        gpus: memory of each planned GPU in GiB; the process takes no more of a card.

    Raises:
        LogitsError: `tokens` is no such file or of another vocabulary, or the disk has no room.
        LoraError, TrainedModelError: the adapter is not of this base.
        FourBitError: it was not trained on NF4 weights.
        OutOfMemoryError and others: see lib.trained_model.
    """
    fix_threads(threads)
    quieten_transformers()
    _check_device(device)
    read = read_logits_file(tokens)
    _check_room(output, read)
    trained = identify_adapter(adapter, adapter_manifest, base=base, base_manifest=base_manifest, threads=threads)
    vocabulary = check_fit(base, adapter, read)
    settings = settings_as_trained(
        trained, base=base, base_weights=base_weights, device=device, threads=threads, scratch=output.parent
    )
    start = start_token(base, read)
    held = describe_weights(settings)
    say(f"computing the logits of {adapter or base} on {held}, {read.chunks} × {read.context} tokens, on {device}")
    with finished_file(output) as partial, ExitStack() as cleanup:
        try:
            if device == "cuda":
                limit_memory(gpus)
            model = load_trained(base, adapter, settings, vocabulary=vocabulary, gpus=gpus, cleanup=cleanup)
            if adapter and settings.method == METHODS["nf4"] and trained["origin"].get("four_bit"):
                check_held(model, trained)
            write_logits_file(partial, like=read, logits=predict_chunks(model, read, settings, start=start))
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            raise TrainedModelError(
                f"the memory of {device} does not suffice for the model on {held}; plan more or larger cards (--gpus), "
                "or take --device cpu"
            ) from error
    say(f"wrote {output}: {output.stat().st_size / 1e6:.0f} MB")


def _check_device(device: str) -> None:
    import torch

    if device == "cuda" and not torch.cuda.is_available():
        raise TrainedModelError("the device is cuda, but there is no usable GPU; take --device cpu")


def _check_room(output: Path, read: LogitsFile) -> None:
    size = logits_bytes(vocabulary=read.vocabulary, chunks=read.chunks, context=read.context)
    if size > (free := free_space(output)):
        raise LogitsError(
            f"{output} takes {size / 1e6:.1f} MB, and {free / 1e6:.1f} MB are free there: free some space, or take "
            "fewer chunks"
        )


def _work(arguments: argparse.Namespace) -> None:
    gpus, device = planned_cards(arguments.gpus), arguments.device
    compute_logits(
        base=arguments.base,
        base_manifest=arguments.base_manifest,
        adapter=arguments.adapter,
        adapter_manifest=arguments.adapter_manifest,
        base_weights=arguments.base_weights,
        tokens=arguments.tokens,
        device=("cuda" if gpus else "cpu") if device == "auto" else device,
        gpus=gpus,
        threads=arguments.threads,
        output=arguments.output,
    )


def main() -> None:
    """The command line."""
    parser = script_parser(__doc__)
    add_merge_inputs(parser)
    parser.add_argument(
        "--base-weights",
        choices=[TRAINED, *METHODS],
        default=TRAINED,
        help="how the base is held: as in training, or in one of its forms",
    )
    parser.add_argument(
        "--tokens", type=Path, required=True, metavar="FILE", help="logits that llama-perplexity wrote for its GGUF"
    )
    parser.add_argument("--output", type=Path, required=True, metavar="FILE", help="the logits")
    parser.add_argument(
        "--device", choices=["auto", "cpu", "cuda"], default="auto", help="auto is cuda where GPUs are planned"
    )
    parser.add_argument("--gpus", default="", metavar="GIB,GIB", help="memory of each planned GPU")
    run_script(parser, _work)


if __name__ == "__main__":
    main()
