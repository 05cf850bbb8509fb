"""Files of logits: the codes of llama-perplexity's own function, sizes, and files that are none."""

from __future__ import annotations

import ctypes
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT

from lib.llama_cpp import LlamaCpp
from lib.logits_file import (
    LogitsError,
    LogitsFile,
    encode,
    logits_bytes,
    predictions,
    read_logits_file,
    write_logits_file,
)
from lib.toolchain import compiler

Encode = Callable[[np.ndarray], np.ndarray]


@pytest.fixture(scope="module")
def llama_encode(llama_cpp: LlamaCpp, tmp_path_factory: pytest.TempPathFactory) -> Encode:
    """llama-perplexity's own function, cut out of its source and compiled with the flags of our build."""
    source = (llama_cpp.source / "tools/perplexity/perplexity.cpp").read_text()
    start = source.index("static inline int nearest_int")
    head = "static double log_softmax(int n_vocab, const float * logits, uint16_t * log_prob, int tok) {"
    end = source.index("\n}\n", source.index(head)) + 3
    folder = tmp_path_factory.mktemp("oracle")
    call = 'extern "C" double encode(int n, const float * x, uint16_t * out) { return log_softmax(n, x, out, 0); }\n'
    includes = "#include <algorithm>\n#include <cmath>\n#include <cstdint>\n#include <cstring>\n"
    (folder / "oracle.cpp").write_text(includes + source[start:end] + call)
    flags = ["-O3", "-ffp-contract=off", "-shared", "-fPIC", "-std=c++17"]
    subprocess.run([*compiler(), *flags, folder / "oracle.cpp", "-o", folder / "oracle.so"], check=True)
    function = ctypes.CDLL(str(folder / "oracle.so")).encode

    def encode_row(row: np.ndarray) -> np.ndarray:
        row, out = np.ascontiguousarray(row, np.float32), np.zeros(4 + len(row) + len(row) % 2, np.uint16)
        function(len(row), ctypes.c_void_p(row.ctypes.data), ctypes.c_void_p(out.ctypes.data))
        return out

    return lambda rows: np.stack([encode_row(row) for row in rows])


def some_logits(rows: int, vocabulary: int, *, spread: float) -> np.ndarray:
    return np.random.default_rng(vocabulary).normal(3, spread, (rows, vocabulary)).astype(np.float32)


@pytest.mark.parametrize("vocabulary", [2, 7, 384, 5001])
@pytest.mark.parametrize("spread", [1e-6, 0.1, 2.0, 40.0])
def test_codes_are_those_of_llama_perplexity(vocabulary: int, spread: float, llama_encode: Encode) -> None:
    logits = some_logits(40, vocabulary, spread=spread)
    logits[1] = logits[0] + 500  # as far as float32 goes
    logits[2, vocabulary // 2] = -np.inf
    logits[3, 1] = 30
    found, expected = encode(logits), llama_encode(logits)
    assert (found[:, 4:] == expected[:, 4:]).all()
    (scale, least), (right_scale, right_least) = (each[:, :4].copy().view(np.float32).T for each in (found, expected))
    assert (scale == right_scale).all()
    assert (np.abs(least - right_least) <= np.spacing(np.abs(right_least))).all()
    assert len(np.unique(found[:, 4:])) > min(vocabulary, 3) - 1


def test_a_row_of_equal_logits(llama_encode: Encode) -> None:
    logits = np.full((1, 10), 2.5, np.float32)
    assert (encode(logits) == llama_encode(logits)).all() and not encode(logits)[:, 4:].any()


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_logits_that_are_not_finite_are_refused(value: float) -> None:
    logits = some_logits(3, 20, spread=1)
    logits[2, 7] = value
    with pytest.raises(LogitsError, match="not finite"):
        encode(logits)


def written(path: Path, *, context: int = 16, vocabulary: int = 21, chunks: int = 3) -> LogitsFile:
    """A file of random logits."""
    tokens = np.arange(chunks * context, dtype=np.int32).reshape(chunks, context) % vocabulary
    like = LogitsFile(path, vocabulary, tokens)
    write_logits_file(path, like=like, logits=blocks(like))
    return like


def blocks(like: LogitsFile) -> list[np.ndarray]:
    return [some_logits(predictions(like.context), like.vocabulary, spread=2)] * like.chunks


def test_a_file_is_read_as_it_was_written(tmp_path: Path) -> None:
    like = written(tmp_path / "logits")
    found = read_logits_file(tmp_path / "logits")
    assert (found.vocabulary, found.chunks, found.context) == (21, 3, 16)
    assert (found.tokens == like.tokens).all()
    content = (tmp_path / "logits").read_bytes()
    assert len(content) == logits_bytes(vocabulary=21, chunks=3, context=16)
    chunk = encode(blocks(like)[0]).tobytes()
    assert content.endswith(3 * chunk) and len(content) == 8 + 3 * 4 + 3 * 16 * 4 + 3 * len(chunk)


def test_large_chunks_are_written_in_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written(tmp_path / "whole")
    monkeypatch.setattr("lib.logits_file.VALUES_AT_ONCE", 50)
    written(tmp_path / "parts")
    assert (tmp_path / "parts").read_bytes() == (tmp_path / "whole").read_bytes()


@pytest.mark.parametrize("wrong", ["chunks", "rows"])
def test_too_few_logits_are_no_file(wrong: str, tmp_path: Path) -> None:
    like = LogitsFile(tmp_path / "logits", 21, np.zeros((3, 16), np.int32))
    given = blocks(like)[:2] if wrong == "chunks" else [each[1:] for each in blocks(like)]
    with pytest.raises(ValueError, match="expected"):
        write_logits_file(tmp_path / "logits", like=like, logits=given)


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda content: b"_tokens_" + content[8:], "is no file of logits"),
        (lambda content: content[:15], "is no file of logits"),
        (lambda _: b"", "is no file of logits"),
        (lambda content: content[:8] + b"\0\0\0\0" + content[12:], "is no file of logits"),
        (lambda content: content[:12] + b"\xff\xff\xff\x7f" + content[16:], "is not whole"),
        (lambda content: content[:-1], "is not whole"),
        (lambda content: content[:230], "is not whole"),
        (lambda content: content + b"\0", "is not whole"),
        (lambda content: content[:20] + b"\x15" + content[21:], "tokens beyond its vocabulary of 21"),
    ],
)
def test_what_is_no_file_of_logits(damage: Callable[[bytes], bytes], said: str, tmp_path: Path) -> None:
    path = tmp_path / "logits"
    written(path)
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(LogitsError, match=said):
        read_logits_file(path)
    with pytest.raises(LogitsError, match="is missing; llama-perplexity writes it"):
        read_logits_file(tmp_path / "nothing")


def test_sizes_need_no_library() -> None:
    """The plan is made where neither torch nor numpy is."""
    code = (
        "import sys\nsys.modules |= {'torch': None, 'numpy': None}\nfrom lib.logits_file import logits_bytes\n"
        "print(logits_bytes(vocabulary=152064, chunks=2))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT / "scripts", capture_output=True, text=True)
    assert done.stdout == f"{20 + 2 * 512 * 4 + 2 * 255 * 2 * (152064 + 4)}\n", done.stderr
