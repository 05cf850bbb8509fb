"""Reading a GGUF's metadata without its tokens, held against gguf's own reader."""

from __future__ import annotations

from pathlib import Path

import pytest
from gguf import GGUFReader

from lib.gguf_file import GgufError, scan_metadata


@pytest.mark.slow
def test_it_is_what_ggufs_reader_reads(built: Path) -> None:
    path = built / "models/tiny.q4_k_m.gguf"
    expected = {key: field.contents() for key, field in GGUFReader(path).fields.items() if not key.startswith("GGUF.")}
    found = scan_metadata(path)
    assert found == {key: len(value) if isinstance(value, list) else value for key, value in expected.items()}
    assert found["tokenizer.ggml.tokens"] == 384
    assert found["general.architecture"] == "llama"


@pytest.mark.slow
def test_a_file_cut_off_anywhere_in_it_is_refused(built: Path, tmp_path: Path) -> None:
    whole = (built / "models/tiny.q4_k_m.gguf").read_bytes()
    end = whole.index(b"general.file_type")
    for length in (0, 3, 20, 24, 30, 100, *range(200, end, 211)):
        (tmp_path / "cut.gguf").write_bytes(whole[:length])
        with pytest.raises(GgufError, match=r"cut off or damaged|no GGUF file"):
            scan_metadata(tmp_path / "cut.gguf")


def test_another_kind_of_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "other.gguf").write_bytes(b"PK\3\4" + bytes(100))
    with pytest.raises(GgufError, match="no GGUF file"):
        scan_metadata(tmp_path / "other.gguf")
