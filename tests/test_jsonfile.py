"""JSON files: the same bytes for the same content, never half of it."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest

from lib.jsonfile import digest_json, dump_json, read_json, write_json


def test_same_content_same_bytes() -> None:
    assert dump_json({"b": [1, 2.5], "a": {"d": None, "c": True}}) == dump_json(
        {"a": {"c": True, "d": None}, "b": [1, 2.5]}
    )


def test_form() -> None:
    assert dump_json({"b": 1, "a": "語"}) == '{\n  "a": "語",\n  "b": 1\n}\n'


@pytest.mark.parametrize("value", [{"text": 'a "b"\n\u2028'}, [], "x", {"n": -1.5e-300}])
def test_what_is_written_is_read(value: object, tmp_path: Path) -> None:
    path = tmp_path / "new" / "x.json"
    write_json(path, value)
    assert json.loads(path.read_bytes()) == value
    assert read_json(path) == value
    assert [file.name for file in path.parent.iterdir()] == ["x.json"]


def test_an_earlier_file_outlives_a_failure(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    write_json(path, {"kept": True})
    for bad in (float("nan"), float("inf"), {1, 2}):
        with pytest.raises((ValueError, TypeError)):
            write_json(path, bad)
    assert read_json(path) == {"kept": True}


@pytest.mark.parametrize("content", [b"{", b"", b'{"a": "\xff"}'])
def test_a_damaged_file_is_named(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "bad.json"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"bad\.json is no valid JSON"):
        read_json(path)


def test_digest() -> None:
    assert digest_json({"b": 1, "a": 2}) == hashlib.sha256(b'{\n  "a": 2,\n  "b": 1\n}\n').hexdigest()
