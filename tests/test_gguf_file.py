"""A GGUF file's header: what gguf's own reader reads of it, damage in every place, and keys moved within the file."""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from gguf import GGUFReader, GGUFWriter

from lib.gguf_file import GgufError, check_same_tensors, count_types, put_last, read_gguf

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
    return [key for key in read_gguf(path).metadata if key.split(".")[0] in "abcde"]


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
    assert {key: read_gguf(path).metadata[key] for key in values} == values
    start = int(GGUFReader(path).tensors[0].field.offset)
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
@pytest.mark.parametrize("name", ["tiny.f16", "tiny.q4_k_m", "tiny.base.f16"])
def test_it_is_what_ggufs_reader_reads(name: str, built: Path) -> None:
    path = built / f"models/{name}.gguf"
    expected, found = GGUFReader(path), read_gguf(path)
    fields = {key: field.contents() for key, field in expected.fields.items() if not key.startswith("GGUF.")}
    assert (found.metadata, list(found.metadata)) == (fields, list(fields))
    assert [(each.name, each.shape, each.type, each.offset, each.size, each.values) for each in found.tensors] == [
        (
            tensor.name,
            tuple(reversed(tensor.shape.tolist())),
            tensor.tensor_type.name,
            tensor.data_offset,
            tensor.n_bytes,
            tensor.n_elements,
        )
        for tensor in expected.tensors
    ]
    assert sum(count_types(found).values()) == len(expected.tensors)


def test_numbers_of_every_kind(tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    writer = GGUFWriter(path, "llama")
    values = {"int8": -3, "uint16": 65535, "int16": -9, "int32": -(2**31), "int64": -(2**40), "uint64": 2**63}
    values |= {"float32": 0.5, "float64": 0.1}
    for kind, value in values.items():
        getattr(writer, f"add_{kind}")(f"x.{kind}", value)
    writer.add_array("x.floats", [0.25, -1.0])
    writer.add_array("x.flags", [True, False])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    found = read_gguf(path, vocabulary_only=True).metadata
    assert {key.removeprefix("x."): value for key, value in found.items() if key.startswith("x.")} == {
        **values,
        "floats": [0.25, -1.0],
        "flags": [True, False],
    }
    with pytest.raises(GgufError, match="cut off or damaged"):
        read_gguf(path)  # nobody asked for one without tensors


def test_a_file_cut_off_anywhere_is_refused(tmp_path: Path) -> None:
    write_gguf(tmp_path / "x.gguf")
    whole = (tmp_path / "x.gguf").read_bytes()
    read_gguf(tmp_path / "x.gguf")
    for length in range(len(whole) - 1):
        (tmp_path / "cut.gguf").write_bytes(whole[:length])
        with pytest.raises(GgufError, match=r"cut off or damaged|no GGUF file"):
            read_gguf(tmp_path / "cut.gguf")


def test_tensors_of_another_name_or_shape(tmp_path: Path) -> None:
    write_gguf(tmp_path / "x.gguf")
    whole = read_gguf(tmp_path / "x.gguf")
    check_same_tensors(whole, whole)
    one, other = whole.tensors
    for tensors, said in (
        ([one], r"1 differ, first y.weight, missing instead of \(2, 24\)"),
        ([one, other, replace(other, name="z.weight")], r"1 differ, first z.weight, \(2, 24\) instead of none"),
        ([one, replace(other, shape=(24, 2))], r"1 differ, first y.weight, \(24, 2\) instead of \(2, 24\)"),
    ):
        with pytest.raises(GgufError, match=said):
            check_same_tensors(replace(whole, tensors=tensors), whole)


def put(data: bytes, behind: bytes, offset: int, number: bytes) -> bytes:
    """Bytes with `number` written `offset` bytes after the end of `behind`."""
    start = data.index(behind) + len(behind) + offset
    return data[:start] + number + data[start + len(number) :]


LONG = struct.pack("<Q", 2**62)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda data: b"PK\3\4" + data[4:], r"no GGUF file: it begins with b'PK"),
        (lambda data: put(data, b"GGUF", 0, struct.pack("<I", 9)), "its version is 9"),
        (lambda data: put(data, b"GGUF", 4, LONG), "damaged"),
        (lambda data: put(data, b"GGUF", 12, LONG), "damaged"),
        (lambda data: put(data, b"a.text", 4, LONG), "end behind the end of the file"),
        (lambda data: put(data, b"c.list", 8, LONG), "damaged"),
        (lambda data: put(data, b"c.list", 4, struct.pack("<IQ", 10, 2**61)), "end behind the end of the file"),
        (lambda data: put(data, b"c.list", 4, struct.pack("<I", 9)), "a value of type 9"),
        (lambda data: put(data, b"b.number", 0, struct.pack("<I", 77)), "a value of type 77"),
        (lambda data: data.replace(b"d.flag", b"c.list"), "c.list stands in it twice"),
        (lambda data: data.replace(b"y.weight", b"x.weight"), "x.weight stands in it twice"),
        (lambda data: put(data, b"x.weight", 0, struct.pack("<I", 2**31)), "x.weight has 2147483648 dimensions"),
        (lambda data: put(data, b"x.weight", 4, LONG), "its header implies"),
        (
            lambda data: put(data, b"x.weight", 20, struct.pack("<I", 12)),
            "rows of 24 values, and Q4_K has blocks of 256",
        ),
        (lambda data: put(data, b"x.weight", 20, struct.pack("<I", 999)), "damaged"),
        (lambda data: put(data, b"y.weight", 24, LONG), "its header implies"),
        (lambda data: data.replace("ß語".encode(), b"\xff" * 5), "damaged"),
        (lambda data: data + bytes(32), "its header implies"),
    ],
)
def test_damage_is_told(damage: Callable[[bytes], bytes], message: str, tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    write_gguf(path)
    damaged = damage(path.read_bytes())
    path.write_bytes(damaged)
    with pytest.raises(GgufError, match=message):
        read_gguf(path)
