"""What a run learns from and what it is measured on: read, rendered by the base's chat template, and divided."""

from __future__ import annotations

import random
from pathlib import Path

from lib.console import say
from lib.dataset import DataError, read_examples
from lib.loading import explain_loading
from lib.samples import Sample, SampleSummary, check_learnable, encode_examples, summarize_samples


def read_training_data(
    *, base: Path, data: Path, eval_data: Path | None, eval_fraction: float, max_length: int, seed: int
) -> tuple[list[Sample], list[Sample]]:
    """
    Read, render and encode training data; says how much of it was cut.

    It needs the base's tokenizer alone, and works without torch.

    Args:
        base: folder of the base checkpoint.
        data: JSONL file.
        eval_data: JSONL file of held-out data.
        eval_fraction: share of `data` that is held out, drawn with the seed; 0 holds out nothing.
        max_length: of a sample, in tokens.

    Returns:
        Samples to train on, and held-out ones, in the files' order.

    Raises:
        BaseModelError: the tokenizer cannot be loaded.
        DataError: the data cannot be used with it.
    """
    from transformers import AutoTokenizer

    with explain_loading("tokenizer", base):
        tokenizer = AutoTokenizer.from_pretrained(base, local_files_only=True)

    def encode(path: Path) -> list[Sample]:
        examples = read_examples(path)
        samples = encode_examples(tokenizer, examples, max_length=max_length)
        check_learnable(samples, examples, path, max_length=max_length)
        _say_counts(path, summarize_samples(samples), max_length)
        return samples

    train = encode(data)
    held_out = encode(eval_data) if eval_data else []
    if eval_fraction:
        train, held_out = _hold_out(train, data, eval_fraction, seed)
    return train, held_out


def _say_counts(path: Path, counts: SampleSummary, max_length: int) -> None:
    say(f"{path.name}: {counts.samples} samples, {counts.tokens} tokens, {counts.learned_tokens} of them learned")
    if counts.cut_samples:
        say(f"{counts.cut_samples} samples are longer than max_length {max_length}: {counts.cut_tokens} tokens are cut")


def _hold_out(samples: list[Sample], data: Path, share: float, seed: int) -> tuple[list[Sample], list[Sample]]:
    """
    Draw the held-out share by the seed, at least one sample and not all.

    Raises:
        DataError: there is but one sample.
    """
    if len(samples) < 2:
        raise DataError(f"{data}: eval_fraction has to leave samples to train on, and there is but one")
    count = min(max(1, round(len(samples) * share)), len(samples) - 1)
    chosen = set(random.Random(seed).sample(range(len(samples)), count))
    say(f"{count} of {len(samples)} samples are held out")
    return [each for i, each in enumerate(samples) if i not in chosen], [samples[i] for i in sorted(chosen)]
