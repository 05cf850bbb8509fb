"""The text of an importance matrix: which ones can be used, as far as their bytes tell."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from lib.calibration import CalibrationError, identify_text, size_problem


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "text.txt is empty"),
        (b"a" * 1021, "text.txt is too short: 1021 bytes, and 1024 tokens (two chunks) are the least"),
        (b" \n\t" * 1000, "text.txt is empty but for spaces and line ends"),
        (b"a b c d \xff" * 1000, "text.txt is no UTF-8 text: invalid start byte"),
    ],
    ids=["empty", "short", "blank", "binary"],
)
def test_texts_that_cannot_be_used(content: bytes, said: str, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_bytes(content)
    with pytest.raises(CalibrationError) as refused:
        identify_text(text)
    assert str(refused.value) == f"{tmp_path}/{said}"


def test_the_size_alone_is_judged_while_planning(tmp_path: Path) -> None:
    """A tokenizer may make a token of each byte, and adds two of its own."""
    text = tmp_path / "text.txt"
    for size, fine in ((0, False), (1021, False), (1022, True)):
        text.write_bytes(b"\xff" * size)
        assert (size_problem(text) is None) == fine


def test_a_text_is_known_by_its_bytes(tmp_path: Path) -> None:
    content = "Ein Satz. 文です。\n".encode() * 100
    for name in ("one.txt", "other.txt"):
        (tmp_path / name).write_bytes(content)
        expected = {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        assert identify_text(tmp_path / name) == expected
