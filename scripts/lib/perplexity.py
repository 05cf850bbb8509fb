"""
How well a GGUF file predicts a text, and how far it is from another one, by llama.cpp's own evaluator.

llama-perplexity cuts a text into chunks, begins each with the vocabulary's start token, and judges the predictions of a
chunk's second half. It ends with status 0 whatever happened, so that its figures are looked for.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from lib.calibration import CHUNK_TOKENS
from lib.console import progress
from lib.errors import ModelmillError
from lib.llama_cpp import LlamaCpp
from lib.logits_file import read_logits_file
from lib.process import run_program

# A text has to hold two chunks; shorter ones are judged in shorter chunks.
CONTEXTS = (CHUNK_TOKENS, 256, 128, 64, 32)
ALL_LAYERS = 999
LAST_LINES = 3
TOO_SHORT = re.compile(r"tokenizes to only (\d+) tokens")
FINAL = re.compile(r"Final estimate: PPL = ([0-9.]+) \+/- ([0-9.]+)")
CHUNKS = re.compile(r"calculating perplexity over (\d+) chunks")
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
        raise QualityError(f"{text} is too short: {short[1]} tokens, and {2 * contexts[-1]} are the least")

    def divergence(self, gguf: Path, logits: Path) -> Divergence:
        """
        Compare a file with the one that wrote the logits.

        Raises:
            QualityError: the logits are of another vocabulary, or the program failed.
            LogitsError: the logits are not whole.
        """
        held = read_logits_file(logits)
        words = ["--kl-divergence", "--kl-divergence-base", logits]
        printed = self._run(gguf, words, context=held.context, chunks=held.chunks)
        found = {name: re.search(rf"^{label} *: +(-?[0-9.]+)", printed, re.M) for name, label in FIGURES.items()}
        if None in found.values() or "inconsistent vocabulary" in printed:
            raise _no_figures(gguf, printed)
        figures = {name: float(match[1]) for name, match in found.items() if match}
        figures["top1"] = round(figures["top1"] / 100, 5)
        return Divergence(**figures, chunks=held.chunks)

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


def _chunks(printed: str) -> int:
    found = CHUNKS.search(printed)
    return int(found[1]) if found else 0


def _no_figures(gguf: Path, printed: str) -> QualityError:
    last = [f"  {line}" for line in printed.splitlines()[-LAST_LINES:]]
    return QualityError("\n".join([f"llama-perplexity gave no figures for {gguf}; its last lines:", *last]))
