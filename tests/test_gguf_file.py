"""Metadata of a GGUF: read without its tokens, and moved within the file."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from gguf import GGUFReader, GGUFWriter

from lib.gguf_file import GgufError, gguf_value, open_gguf, put_last, scan_metadata

KEYS = ["a.text", "b.number", "c.list", "d.flag", "e.text"]


def write_gguf(path: Path) -> dict[str, object]:
    """A file with metadata of several kinds and sizes, and two tensors; its values."""
    values = {"a.text": "ß語", "b.number": 7, "c.list": ["x", "yy", ""], "d.flag": True, "e.text": "e" * 100}
    writer = GGUFWriter(path, "llama")
    writer.add_string("a.text", values["a.text"])
    writer.add_uint32("b.number", values["b.number"])
    writer.add_array("c.list", values["c.list"])
    writer.add_bool("d.flag", values["d.flag"])
    writer.add_string("e.text", values["e.text"])
    for name in ("x.weight", "y.weight"):
        writer.add_tensor(name, np.arange(48, dtype=np.float32).reshape(2, 24))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return values


def keys_of(path: Path) -> list[str]:
    return [key for key in open_gguf(path).fields if key.split(".")[0] in "abcde"]


@pytest.mark.parametrize(
    ("moved", "order"),
    [
        (["b.number"], ["a.text", "c.list", "d.flag", "e.text", "b.number"]),
        (["c.list", "a.text"], ["b.number", "d.flag", "e.text", "c.list", "a.text"]),
        (["e.text"], KEYS),
        (["e.text", "d.flag"], ["a.text", "b.number", "c.list", "e.text", "d.flag"]),
    ],
)
def test_keys_are_put_last_and_nothing_else_changes(moved: list[str], order: list[str], tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    values = write_gguf(path)
    before = path.read_bytes()
    assert keys_of(path) == KEYS
    put_last(path, moved)
    assert keys_of(path) == order
    reader = open_gguf(path)
    assert {key: gguf_value(reader, key) for key in values} == values
    start = int(reader.tensors[0].field.offset)
    assert path.read_bytes()[start:] == before[start:]
    assert sorted(path.read_bytes()) == sorted(before)
    put_last(path, moved)
    assert keys_of(path) == order


def test_a_key_that_is_not_there(tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    write_gguf(path)
    before = path.read_bytes()
    with pytest.raises(GgufError, match=r"x\.gguf has no f\.gone$"):
        put_last(path, ["a.text", "f.gone"])
    assert path.read_bytes() == before


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
