"""
What a model predicts on a text, as llama-perplexity writes it (--kl-divergence-base) and compares with it.

The header gives the sizes and the tokens, cut into chunks. Then for every prediction of a chunk's second half stand the
logarithms of all probabilities in 16 bits: `scale` and `least` as float32, and a code for each token of the vocabulary,
which means least + code·scale. What is less likely than the likeliest by more than e^16 has code 0.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from struct import Struct
from typing import TYPE_CHECKING

from lib.calibration import CHUNK_TOKENS
from lib.errors import ModelmillError

if TYPE_CHECKING:
    from numpy import ndarray

MAGIC = b"_logits_"
SIZES = Struct("<3i")  # context, vocabulary and chunks
HIGHEST_CODE, DEEPEST = 65535, 16
# Logits that are encoded at once: 2^21 in float64 are 17 MB.
VALUES_AT_ONCE = 1 << 21


class LogitsError(ModelmillError):
    """A file of logits is missing, damaged or of another model, or a model gives none."""


@dataclass(frozen=True)
class LogitsFile:
    """
    Attributes:
        vocabulary: tokens that each prediction is about.
        tokens: of the text, (chunks, context), int32; a chunk's first is not yet replaced by the one that begins it.
    """

    path: Path
    vocabulary: int
    tokens: ndarray

    @property
    def chunks(self) -> int:
        """How many chunks of the text are predicted."""
        return self.tokens.shape[0]

    @property
    def context(self) -> int:
        """Tokens of a chunk."""
        return self.tokens.shape[1]


def first_predicting(context: int) -> int:
    """Place in a chunk of the first token whose successor's prediction is kept; those before are context alone."""
    return context // 2


def predictions(context: int) -> int:
    """Predictions of a chunk that are kept; that of its last token's successor is not."""
    return max(0, context - 1 - first_predicting(context))


def logits_bytes(*, vocabulary: int, chunks: int, context: int = CHUNK_TOKENS) -> int:
    """Size of a file."""
    header = len(MAGIC) + SIZES.size + 4 * chunks * context
    return header + chunks * predictions(context) * 2 * _row_codes(vocabulary)


def _row_codes(vocabulary: int) -> int:
    """16-bit numbers of a prediction: two float32, and an even number of codes."""
    return 4 + vocabulary + vocabulary % 2


def read_logits_file(path: Path) -> LogitsFile:
    """
    Read sizes and tokens of a file that is whole.

    Raises:
        LogitsError: it is missing, of another kind, or cut off, as llama-perplexity leaves it without a word.
    """
    import numpy as np

    if not path.is_file():
        raise LogitsError(f"{path} is missing; llama-perplexity writes it when given --kl-divergence-base")
    with path.open("rb") as file:
        magic, sizes = file.read(len(MAGIC)), file.read(SIZES.size)
        if magic != MAGIC or len(sizes) < SIZES.size or min(SIZES.unpack(sizes)) < 1:
            raise LogitsError(f"{path} is no file of logits that llama-perplexity wrote")
        context, vocabulary, chunks = SIZES.unpack(sizes)
        expected, found = logits_bytes(vocabulary=vocabulary, chunks=chunks, context=context), path.stat().st_size
        if found != expected:
            raise LogitsError(
                f"{path} is not whole: {found} bytes, expected {expected} for {chunks} chunks of {context} tokens; "
                "remove it, look whether the disk is full, and compute it again"
            )
        tokens = np.frombuffer(file.read(4 * chunks * context), "<i4").reshape(chunks, context)
    if tokens.min() < 0 or tokens.max() >= vocabulary:
        raise LogitsError(f"{path} is damaged: it holds tokens beyond its vocabulary of {vocabulary}")
    return LogitsFile(path, vocabulary, tokens)


def write_logits_file(path: Path, *, like: LogitsFile, logits: Iterable[ndarray]) -> None:
    """
    Write what another model predicts on the same tokens.

    Args:
        like: the file whose tokens and sizes it has.
        logits: (predictions of a chunk, vocabulary), float32, for each chunk; any constant may be added to a row.

    Raises:
        LogitsError: a value is not finite, so that it gives no probabilities.
        ValueError: not as many chunks or predictions as there have to be.
    """
    shape, written = (predictions(like.context), like.vocabulary), 0
    with path.open("wb") as file:
        file.write(MAGIC + SIZES.pack(like.context, like.vocabulary, like.chunks))
        file.write(like.tokens.astype("<i4").tobytes())
        for chunk in logits:
            if chunk.shape != shape:
                raise ValueError(f"a chunk of logits is {chunk.shape}, expected {shape}")
            for rows in _encoded(chunk):
                file.write(rows)
            written += 1
    if written != like.chunks:
        raise ValueError(f"{written} chunks of logits, expected {like.chunks}")


def _encoded(logits: ndarray) -> Iterator[memoryview]:
    step = max(1, VALUES_AT_ONCE // logits.shape[1])
    for top in range(0, len(logits), step):
        yield encode(logits[top : top + step]).data


def encode(logits: ndarray) -> ndarray:
    """
    Predictions as they stand in a file, by the very operations of llama-perplexity's `log_softmax`.

    Only the sum of the exponentials is more exact here; `least` can differ by its last bit.

    Args:
        logits: (rows, vocabulary), float32.

    Returns:
        (rows, two float32 and the codes), uint16.

    Raises:
        LogitsError: a row has no finite maximum.
    """
    import numpy as np

    largest = logits.max(axis=1, keepdims=True)
    if not np.isfinite(largest).all():
        raise LogitsError("the model's logits are not finite, so that they give no probabilities; was it trained well?")
    smallest = np.maximum(logits.min(axis=1, keepdims=True), largest - np.float32(DEEPEST))
    sums = np.exp(logits - largest, dtype=np.float64).sum(axis=1, keepdims=True)
    least = smallest - largest - np.log(sums).astype(np.float32)
    scale = (largest - smallest) / np.float32(HIGHEST_CODE)
    # A row of equal logits has no scale, and codes of 0.
    inverse = np.divide(np.float32(1), scale, out=np.zeros_like(scale), where=scale > 0)
    encoded = np.zeros((len(logits), _row_codes(logits.shape[1])), np.uint16)
    encoded[:, :4] = np.concatenate([scale, least], axis=1).astype("<f4").view("<u2")
    encoded[:, 4 : 4 + logits.shape[1]] = np.rint(inverse * (np.maximum(logits, smallest) - smallest))
    return encoded
