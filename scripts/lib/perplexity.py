"""
How well a GGUF file predicts a text, and how far it is from another one, by llama.cpp's own evaluator.

llama-perplexity cuts a text into chunks, begins each with the vocabulary's start token, and judges the predictions of a
chunk's second half. It ends with status 0 whatever happened, so that its figures are looked for.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import repeat
from pathlib import Path

from lib.calibration import CHUNK_TOKENS
from lib.console import progress
from lib.errors import ModelmillError
from lib.gguf_file import read_gguf
from lib.llama_cpp import LlamaCpp
from lib.logits_file import LogitsFile, predictions, read_logits_file, write_logits_file
from lib.process import run_program

# A text has to hold two chunks; shorter ones are judged in shorter chunks.
CONTEXTS = (CHUNK_TOKENS, 256, 128, 64, 32)
LEAST_JUDGED = 100  # predictions, below which llama-perplexity gives no figures
ALL_LAYERS = 999
LAST_LINES = 3
TOO_SHORT = re.compile(r"tokenizes to only (\d+) tokens")
FINAL = re.compile(r"Final estimate: PPL = ([0-9.]+) \+/- ([0-9.]+)")
CHUNKS = re.compile(r"calculating perplexity over (\d+) chunks")
WITH_ERROR = re.compile(r"^Mean PPL\(Q\) *: +([0-9.]+) ± +([0-9.]+)", re.M)
# As printed, by the attribute of Divergence.
FIGURES = {
    "perplexity": r"Mean PPL\(Q\)",
    "reference_perplexity": r"Mean PPL\(base\)",
    "perplexity_ratio": r"Mean PPL\(Q\)/PPL\(base\)",
    "mean_kld": r"Mean +KLD",
    "kld_999": r"99\.9% +KLD",
    "top1": r"Same top p",
}


class QualityError(ModelmillError):
    """A text or a file cannot be evaluated, or what was measured is not good enough."""


class TooFewTokensError(QualityError):
    """There are not enough tokens to judge a file by."""


@dataclass(frozen=True)
class Perplexity:
    """
    How well a text is predicted.

    Attributes:
        perplexity: exp of the mean negative log-likelihood of a token.
        error: its standard error.
        context: tokens of a chunk.
        chunks: how many were judged.
    """

    perplexity: float
    error: float
    context: int
    chunks: int


@dataclass(frozen=True)
class Divergence:
    """
    How far a file's predictions are from those of a reference, over the same tokens.

    Attributes:
        perplexity, reference_perplexity: see Perplexity.
        perplexity_ratio: the first by the second.
        mean_kld: mean Kullback-Leibler divergence from the reference's distribution of the next token, in nats.
        kld_999: 99.9 % of the tokens diverge by less.
        top1: share of the tokens at which both hold the same one for the likeliest.
        chunks: how many were judged.
    """

    perplexity: float
    reference_perplexity: float
    perplexity_ratio: float
    mean_kld: float
    kld_999: float
    top1: float
    chunks: int


@dataclass(frozen=True)
class Evaluator:
    """
    llama-perplexity on this machine.

    Attributes:
        gpu: whether the layers go to a GPU, which a llama.cpp built for CUDA finds.
    """

    llama_cpp: LlamaCpp
    threads: int
    gpu: bool = False

    def perplexity(self, gguf: Path, text: Path, *, chunks: int, logits: Path | None = None) -> Perplexity:
        """
        Judge a file by a text; one with fewer tokens than two chunks of CHUNK_TOKENS in shorter chunks.

        Args:
            chunks: how many are judged, if the text has as many.
            logits: where the logarithms of all probabilities are written, which `divergence` reads; then chunks are of
                CHUNK_TOKENS.

        Raises:
            QualityError: the text is too short, or the program failed.
            LogitsError: the logits could not be written whole.
        """
        contexts = CONTEXTS[:1] if logits else CONTEXTS
        for context in contexts:
            words = ["--file", text, "--chunks", chunks]
            words += ["--kl-divergence-base", logits] if logits else []
            printed = self._run(gguf, words, context=context, chunks=chunks, output=logits)
            if found := FINAL.search(printed):
                if logits:
                    read_logits_file(logits)  # of a full disk the program says nothing
                return Perplexity(float(found[1]), float(found[2]), context, _chunks(printed))
            if not (short := TOO_SHORT.search(printed)):
                raise _no_figures(gguf, printed)
        raise QualityError(
            f"{text} is too short: {short[1]} tokens, and {2 * contexts[-1]} are the least; give a longer one"
        )

    def perplexity_of_tokens(self, gguf: Path, tokens: Sequence[int], *, chunks: int, scratch: Path) -> Perplexity:
        """
        Judge a file by tokens, special ones among them, which llama-perplexity would read as plain text in a text.

        It takes tokens with logits alone, to compare with: those given say that every token is as likely.

        Args:
            tokens: cut into chunks one after the other; see cut_tokens.
            chunks: how many are judged, if there are as many.
            scratch: where these logits lie meanwhile; see lib.logits_file.logits_bytes.

        Raises:
            TooFewTokensError: there are not enough.
            QualityError: one is not of the file's vocabulary, or the program failed.
            GgufError: the file cannot be read.
        """
        import numpy as np

        cut = np.array(cut_tokens(tokens, chunks), np.int32)
        vocabulary = len(read_gguf(gguf, vocabulary_only=True).tokenizer("tokens", ()))
        if cut.max() >= vocabulary:
            raise QualityError(f"{gguf} has {vocabulary} tokens, and there is a token {cut.max()}: of another model?")
        like = LogitsFile(scratch, vocabulary, cut)
        nothing = np.zeros((predictions(like.context), vocabulary), np.float32)
        write_logits_file(scratch, like=like, logits=repeat(nothing, like.chunks))
        printed = self._compare(gguf, like)
        found = WITH_ERROR.search(printed)
        if found is None:
            raise _no_figures(gguf, printed)
        return Perplexity(float(found[1]), float(found[2]), like.context, like.chunks)

    def divergence(self, gguf: Path, logits: Path) -> Divergence:
        """
        Compare a file with the one that wrote the logits.

        Raises:
            QualityError: the logits are of another vocabulary, or the program failed.
            LogitsError: the logits are not whole.
        """
        held = read_logits_file(logits)
        printed = self._compare(gguf, held)
        found = {name: re.search(rf"^{label} *: +(-?[0-9.]+)", printed, re.M) for name, label in FIGURES.items()}
        if None in found.values() or "inconsistent vocabulary" in printed:
            raise _no_figures(gguf, printed)
        figures = {name: float(match[1]) for name, match in found.items() if match}
        figures["top1"] = round(figures["top1"] / 100, 5)
        return Divergence(**figures, chunks=held.chunks)

    def _compare(self, gguf: Path, held: LogitsFile) -> str:
        words = ["--kl-divergence", "--kl-divergence-base", held.path]
        return self._run(gguf, words, context=held.context, chunks=held.chunks)

    def _run(
        self,
        gguf: Path,
        words: Sequence[str | int | Path],
        *,
        context: int,
        chunks: int,
        output: Path | None = None,
    ) -> str:
        """What the program printed."""
        command = [self.llama_cpp.tool("llama-perplexity"), "--model", gguf, *words]
        # A chunk at a time: several would need memory for the probabilities of all their tokens.
        command += ["--ctx-size", context, "--batch-size", context, "--ubatch-size", context]
        command += ["--threads", self.threads, "--n-gpu-layers", ALL_LAYERS if self.gpu else 0, "--no-warmup"]
        lines: list[str] = []
        with progress(f"evaluating {gguf.name}", total=chunks, unit="chunk") as bar:
            done = 0

            def follow(line: str) -> None:
                nonlocal done
                lines.append(line)
                # "[1]7.25,[2]6.93," of a text, and a line for each chunk that is compared.
                if found := re.match(r"\[(\d+)\]\d| *(\d+) +[0-9.]+ ±", line):
                    bar.advance(int(found[1] or found[2]) - done)
                    done = int(found[1] or found[2])

            run_program([str(word) for word in command], follow=follow, line_ends="\r,", output=output)
        return "\n".join(lines)


def cut_tokens(tokens: Sequence[int], chunks: int) -> list[Sequence[int]]:
    """
    The first chunks of tokens, as long as there are two, with as much context as that leaves.

    Raises:
        TooFewTokensError: there are not enough to be judged by.
    """
    for context in CONTEXTS:
        cut = [tokens[place : place + context] for place in range(0, len(tokens) - context + 1, context)][:chunks]
        if len(tokens) >= 2 * context and len(cut) * predictions(context) >= LEAST_JUDGED:
            return cut
    least = min(context * max(2, -(-LEAST_JUDGED // predictions(context))) for context in CONTEXTS)
    raise TooFewTokensError(f"{len(tokens)} tokens are too few to be judged by: {least} are the least")


def _chunks(printed: str) -> int:
    found = CHUNKS.search(printed)
    return int(found[1]) if found else 0


def _no_figures(gguf: Path, printed: str) -> QualityError:
    last = [f"  {line}" for line in printed.splitlines()[-LAST_LINES:]]
    return QualityError("\n".join([f"llama-perplexity gave no figures for {gguf}; its last lines:", *last]))
